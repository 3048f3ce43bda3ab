"""The error tree, its attributes and texts."""

import copy
import pickle

import pytest

from bctrl_async import errors
from bctrl_async.errors import (
    BctrlApiError,
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNetworkError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlRateLimitError,
    BctrlResponseError,
    BctrlServerError,
    BctrlTimeoutError,
    BctrlValidationError,
)

TREE: dict[type[BctrlError], tuple[type[Exception], ...]] = {
    BctrlError: (Exception,),
    BctrlConfigError: (BctrlError, ValueError),
    BctrlNetworkError: (BctrlError,),
    BctrlTimeoutError: (BctrlNetworkError, TimeoutError),
    BctrlResponseError: (BctrlNetworkError,),
    BctrlApiError: (BctrlError,),
    BctrlValidationError: (BctrlApiError,),
    BctrlAuthenticationError: (BctrlApiError,),
    BctrlPermissionError: (BctrlApiError,),
    BctrlNotFoundError: (BctrlApiError,),
    BctrlConflictError: (BctrlApiError,),
    BctrlRateLimitError: (BctrlApiError,),
    BctrlServerError: (BctrlApiError,),
}

every_class = pytest.mark.parametrize("error_class", TREE, ids=lambda cls: cls.__name__)


def test_the_tree_is_that_of_the_design() -> None:
    defined = [getattr(errors, name) for name in errors.__all__]
    assert {error_class: error_class.__bases__ for error_class in defined} == TREE


def full(error_class: type[BctrlError]) -> BctrlError:
    """Return an error in which no two attributes are equal, so that a mix-up shows."""
    error = error_class(
        "the server answered 409 runtime.not_active: gone",
        advice="Do nothing",
        operation="get",
        workspace_id="ws-1",
        alias="crm",
        attempts=3,
        may_have_stopped=True,
        accepted=True,
        status=409,
        code="runtime.not_active",
        message="gone",
        reason_class="conflict",
        request_id="req-1",
        hint="Look at the list",
        retry_after=1.5,
        body='{"code": "runtime.not_active"}',
        argument="timeout",
    )
    error.add_note("attempt 1: the connection broke")
    return error


@every_class
def test_a_copy_has_all_attributes_of_the_original(
    error_class: type[BctrlError],
) -> None:
    """Fault: errors cannot be unpickled, which kills worker pools.

    The vendor's SDK and openai have these errors.
    """
    error = full(error_class)
    pickled = [
        pickle.dumps(error, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ]
    for twin in (*map(pickle.loads, pickled), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is error_class
        assert vars(twin) == vars(error)
        assert twin.__notes__ == ["attempt 1: the connection broke"]
        assert twin.args == error.args
        assert str(twin) == str(error)


def part_of(letter: str) -> str:
    return f"{letter * 47}...{letter * 48}"


TEXTS = {
    "the failure, the runtime and the remedy": (
        full(BctrlConflictError),
        (
            "get of 'crm' in workspace 'ws-1': the server answered 409 "
            "runtime.not_active: gone (request id req-1, 3 attempts, the runtime may "
            "have stopped). Look at the list. Do nothing"
        ),
    ),
    "neither a single attempt nor a runtime that is unknown": (
        BctrlError("there is no API key", attempts=1),
        "there is no API key",
    ),
    "the advice of the class, if there is no other": (
        BctrlAuthenticationError("the server answered 401 Unauthorized"),
        "the server answered 401 Unauthorized. Check the API key",
    ),
    "single full stops": (
        BctrlError("it failed.", hint="Wait.", advice="Call again."),
        "it failed. Wait. Call again",
    ),
    "no line end of a name": (
        BctrlError("it failed", workspace_id="w\x851", alias="c\r\nr\u2028m"),
        r"stop of 'c\r\nr\u2028m' in workspace 'w\x851': it failed",
    ),
    "a part of a long name": (
        BctrlError("it failed", workspace_id="w" * 70_000, alias="a" * 65_536),
        f"stop of '{part_of('a')}' in workspace '{part_of('w')}': it failed",
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_an_error_has(name: str) -> None:
    error, text = TEXTS[name]
    assert str(error) == text
    assert repr(error) == f"{type(error).__name__}({text!r})"


@every_class
def test_a_leaf_of_the_tree_has_advice_which_is_an_attribute_too(
    error_class: type[BctrlError],
) -> None:
    """Fault: an error's text had the advice of its class, its attribute None."""
    is_leaf = not error_class.__subclasses__() and error_class is not BctrlConfigError
    error = error_class("it failed.")

    assert error.summary == "it failed"
    # There is no common remedy for invalid arguments.
    assert not is_leaf or error.advice
    assert str(error) == f"it failed. {error.advice}" if error.advice else "it failed"
