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


class TestTree:
    @every_class
    def test_each_class_has_the_bases_of_the_design(self, error_class: type[BctrlError]) -> None:
        assert error_class.__bases__ == TREE[error_class]

    @every_class
    def test_the_branches_do_not_overlap(self, error_class: type[BctrlError]) -> None:
        branches = (BctrlConfigError, BctrlNetworkError, BctrlApiError)

        count = sum(issubclass(error_class, branch) for branch in branches)

        assert count == (0 if error_class is BctrlError else 1)

    def test_the_module_defines_no_error_outside_the_tree(self) -> None:
        assert {getattr(errors, name) for name in errors.__all__} == set(TREE)


def copies(error: BctrlError) -> list[BctrlError]:
    pickled = [pickle.dumps(error, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    return [*map(pickle.loads, pickled), copy.copy(error), copy.deepcopy(error)]


@every_class
def test_a_copy_has_all_attributes_of_the_original(error_class: type[BctrlError]) -> None:
    """Fault: errors cannot be unpickled, which kills worker pools (vendor's SDK, openai)."""
    error = full(error_class)
    for twin in copies(error):
        assert type(twin) is type(error)
        assert vars(twin) == vars(error)
        assert twin.__notes__ == ["attempt 1: the connection broke"]
        assert twin.args == error.args
        assert str(twin) == str(error)


def test_only_the_code_not_active_means_already_stopped() -> None:
    assert BctrlConflictError("conflict", code="runtime.not_active").already_stopped
    assert not BctrlConflictError("conflict", code="runtime.busy").already_stopped
    assert not BctrlConflictError("conflict").already_stopped


class TestText:
    def test_the_text_has_the_failure_the_runtime_and_the_remedy(self) -> None:
        assert str(full(BctrlConflictError)) == (
            "get of 'crm' in workspace 'ws-1': the server answered 409 runtime.not_active: gone "
            "(request id req-1, 3 attempts, the runtime may have stopped). "
            "Look at the list. Do nothing"
        )

    def test_a_single_attempt_without_a_runtime_is_not_mentioned(self) -> None:
        assert str(BctrlError("there is no API key", attempts=1)) == "there is no API key"

    def test_the_advice_of_the_class_is_the_default(self) -> None:
        """Fault: the text of an error had this advice, and its attribute was None."""
        error = BctrlAuthenticationError("the server answered 401 Unauthorized")

        assert error.advice == "Check the API key (BCTRL_API_KEY)"
        assert str(error) == f"the server answered 401 Unauthorized. {error.advice}"

    @pytest.mark.parametrize(
        "error_class",
        [cls for cls in TREE if not cls.__subclasses__() and cls is not BctrlConflictError],
        ids=lambda cls: cls.__name__,
    )
    def test_every_leaf_class_but_config_error_has_default_advice(
        self, error_class: type[BctrlError]
    ) -> None:
        # There is no common remedy for invalid arguments.
        assert (error_class("it failed").advice is None) is (error_class is BctrlConfigError)

    def test_full_stops_are_not_doubled(self) -> None:
        error = BctrlError("it failed.", hint="Wait.", advice="Call again.")

        assert error.summary == "it failed"
        assert str(error) == "it failed. Wait. Call again"

    @every_class
    def test_line_ends_in_names_are_escaped(self, error_class: type[BctrlError]) -> None:
        for line_end in ("\r\n", "\x85", "\u2028"):
            error = error_class(
                "alias contains a control character",
                workspace_id=f"ws{line_end}1",
                alias=f"c{line_end}rm",
            )

            assert len(str(error).splitlines()) == 1, repr(line_end)

    def test_a_long_name_is_shown_in_part(self) -> None:
        error = BctrlConfigError("it failed", workspace_id="w" * 70_000, alias="a" * 65_536)

        assert len(str(error)) < 300
        assert str(error).startswith("stop of 'aaaa")
        assert error.alias == "a" * 65_536

    def test_the_repr_shows_the_text_but_not_the_body(self) -> None:
        error = full(BctrlConflictError)
        assert repr(error) == f"BctrlConflictError({str(error)!r})"
        assert error.body
        assert error.body not in repr(error)
