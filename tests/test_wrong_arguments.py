"""Arguments of a wrong type: each is an error that names the argument and says what it takes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import Connect

from bctrl_async import BctrlConfigError, BctrlSession, RetryPolicy, RuntimeFilter, shard
from bctrl_async.emulator import Emulator
from bctrl_async.fastapi import add_exception_handlers, lifespan
from bctrl_async.journal import read_journals
from bctrl_async.otel import OpenTelemetry
from bctrl_async.pace import FilePace
from bctrl_async.redis import RedisPace


def wrong_values(accepted: object) -> Iterator[object]:
    """Return values of a wrong type for an argument, other than those that it takes."""
    # No argument takes the first four: a collection takes none with "x" in it.
    candidates: list[object] = [object(), 1j, ["x"], {"x": 1}, 1, -1.5, "x", b"x", True, math.nan]
    return (value for value in candidates if not isinstance(value, accepted))  # type: ignore[arg-type]


def rejection(make: Callable[[], object]) -> BctrlConfigError:
    with pytest.raises(BctrlConfigError) as caught:
        make()
    return caught.value


def read_all_journals(
    paths: Any,  # noqa: ANN401 - of a wrong type.
    targets: Any = None,  # noqa: ANN401
    max_age: Any = None,  # noqa: ANN401
) -> object:
    # It checks its arguments when the iteration starts.
    return list(read_journals(paths, targets, max_age=max_age))


CONSTRUCTORS: list[tuple[Callable[..., object], str, Any]] = [
    (BctrlSession, "base_url", ()),
    (BctrlSession, "timeout", (int, float)),
    (BctrlSession, "max_connections", int),
    (BctrlSession, "retry", ()),
    (BctrlSession, "rate", (int, float)),
    (BctrlSession, "pace", ()),
    (BctrlSession, "http", ()),
    (BctrlSession, "trace_configs", ()),
    (BctrlSession, "trust_env", bool),
    (BctrlSession, "proxy", ()),
    (BctrlSession, "ssl", ()),
    (BctrlSession, "allow_plaintext", bool),
    (BctrlSession, "observer", ()),
    (BctrlSession, "headers", dict),
    (BctrlSession, "check_answers", bool),
    (RetryPolicy, "attempts", int),
    (RetryPolicy, "base", (int, float)),
    (RetryPolicy, "cap", (int, float)),
    (RetryPolicy, "patience", (int, float)),
    (RetryPolicy, "statuses", ()),
    (RuntimeFilter, "status", str),
    (RuntimeFilter, "kind", str),
    (RuntimeFilter, "older_than", (int, float)),
    (OpenTelemetry, "tracer_provider", ()),
    (OpenTelemetry, "meter_provider", ()),
    (FilePace, "path", str),
    (FilePace, "rate", (int, float)),
    (RedisPace, "url_or_client", ()),
    (RedisPace, "rate", (int, float)),
    (RedisPace, "name", str),
    (shard, "targets", list),
    (shard, "number", int),
    (shard, "count", int),
    (read_all_journals, "paths", (list, dict)),
    (read_all_journals, "targets", (list, dict, str, bytes, type(None))),
    (read_all_journals, "max_age", (int, float)),
    (lifespan, "make_session", ()),
    (lifespan, "pace", ()),
    (lifespan, "inner", ()),
    (add_exception_handlers, "app", ()),
]
OTHERS: dict[str, object] = {
    "path": "unused.pace",
    "rate": 5,
    "url_or_client": "redis://localhost",
    "targets": [],
    "number": 1,
    "count": 2,
    "paths": [],
}


@pytest.mark.parametrize(
    ("make", "argument", "accepted"),
    CONSTRUCTORS,
    ids=[f"{make.__name__} {argument}" for make, argument, _ in CONSTRUCTORS],
)
def test_a_wrong_type_is_rejected_by_name(
    make: Callable[..., object],
    argument: str,
    accepted: Any,  # noqa: ANN401 - the second argument of isinstance.
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BCTRL_API_KEY", "k")
    parameters = inspect.signature(make).parameters
    others = {
        name: OTHERS[name]
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name in OTHERS
    }
    for value in wrong_values(accepted):
        error = rejection(lambda value=value: make(**{**others, argument: value}))  # type: ignore[misc]
        assert argument in str(error)
        assert error.argument == argument


ARGUMENTS: dict[str, dict[str, Any]] = {
    "stop_runtime": {"timeout": (int, float), "retry": (), "headers": dict},
    "get_runtime": {"timeout": (int, float), "retry": ()},
    "list_runtimes": {"on_unreadable": (), "timeout": (int, float), "retry": ()},
    "stop_runtimes": {
        "targets": (list, dict),
        "concurrency": int,
        "deadline": (int, float),
        "on_outcome": (),
        "timeout": (int, float),
        "retry": (),
        "journal": str,
        "journal_max_age": (int, float),
        "verify": (bool, int, float),
        "missing_ok": bool,
    },
    "stop_workspace": {
        "where": (),
        "verify": (bool, int, float),
        "missing_ok": bool,
        "on_outcome": (),
    },
}
OTHERS_OF_CALLS: dict[str, dict[str, object]] = {
    "stop_runtime": {"workspace_id": "ws-1", "alias": "crm"},
    "get_runtime": {"workspace_id": "ws-1", "alias": "crm"},
    "list_runtimes": {"workspace_id": "ws-1"},
    "stop_runtimes": {"targets": []},
    "stop_workspace": {"workspace_id": "ws-1"},
}


@pytest.mark.parametrize("name", ARGUMENTS)
async def test_a_wrong_argument_of_a_call_is_rejected_unsent(
    name: str, emulator: Emulator, connect: Connect
) -> None:
    async with connect() as session:
        for argument, accepted in ARGUMENTS[name].items():
            for value in wrong_values(accepted):
                arguments = {**OTHERS_OF_CALLS[name], argument: value}
                with pytest.raises(BctrlConfigError, match=argument) as caught:
                    await getattr(session, name)(**arguments)
                assert caught.value.argument == argument
    assert emulator.requests == []


def test_what_an_argument_takes_is_in_its_error() -> None:
    error = rejection(lambda: RetryPolicy(statuses=503))  # type: ignore[arg-type]
    assert str(error) == "invalid statuses: expected a set of statuses, not int"
