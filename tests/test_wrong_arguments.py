"""Wrong use: errors name the argument, or the extra that is not installed."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from redis.asyncio import Redis

from bctrl_async import (
    BctrlConfigError,
    BctrlSession,
    RetryPolicy,
    RuntimeFilter,
    shard,
)
from bctrl_async.emulator import Emulator
from bctrl_async.fastapi import add_exception_handlers, lifespan
from bctrl_async.journal import Journal, read_journals
from bctrl_async.otel import OpenTelemetry
from bctrl_async.pace import FilePace
from bctrl_async.redis import RedisPace

Call = Callable[..., object]
Types = type | tuple[type, ...]
Arguments = dict[Types, str]
"""The arguments of a function, by the types of wrong values that they take."""

NUMBER: Types = (int, float)
OTHER: Types = ()
"""For what takes none of the wrong values, whatever their type."""


def read_all_journals(
    paths: Any,  # noqa: ANN401 - each argument gets wrong types.
    targets: Any = None,  # noqa: ANN401 - as `paths`.
    max_age: Any = None,  # noqa: ANN401 - as `paths`.
) -> object:
    # It checks its arguments when the iteration starts.
    return list(read_journals(paths, targets, max_age=max_age))


FUNCTIONS: dict[Call, Arguments] = {
    BctrlSession: {
        NUMBER: "timeout rate",
        int: "max_connections",
        bool: "trust_env allow_plaintext check_answers",
        dict: "headers",
        OTHER: "base_url retry http proxy ssl observer",
    },
    RetryPolicy: {int: "attempts", NUMBER: "base cap patience", OTHER: "statuses"},
    RuntimeFilter: {str: "status kind", NUMBER: "older_than"},
    OpenTelemetry: {OTHER: "tracer_provider meter_provider"},
    FilePace: {str: "path", NUMBER: "rate"},
    RedisPace: {OTHER: "client", NUMBER: "rate", str: "name"},
    shard: {list: "targets", int: "number count"},
    read_all_journals: {
        (list, dict): "paths",
        (list, dict, str, bytes): "targets",
        NUMBER: "max_age",
    },
    Journal: {str: "path", NUMBER: "max_age", OTHER: "base_url"},
    lifespan: {OTHER: "make_session inner", NUMBER: "rate"},
    add_exception_handlers: {OTHER: "app"},
}
METHODS: dict[str, Arguments] = {
    "stop_runtime": {
        NUMBER: "timeout",
        dict: "headers",
        bool: "stopped_ok",
        OTHER: "retry",
    },
    "get_runtime": {NUMBER: "timeout", OTHER: "retry"},
    "list_runtimes": {NUMBER: "timeout", OTHER: "retry on_unreadable"},
    "stop_runtimes": {
        (list, dict): "targets",
        NUMBER: "deadline timeout",
        int: "concurrency",
        str: "journal",
        (bool, int, float): "verify",
        bool: "missing_ok",
        OTHER: "on_outcome retry",
    },
    "stop_workspace": {
        (bool, int, float): "verify",
        bool: "missing_ok",
        OTHER: "where on_outcome",
    },
}
VALID: dict[str, object] = {
    "path": "unused.pace",
    "rate": 5,
    "client": Redis(),
    "targets": [],
    "number": 1,
    "count": 2,
    "paths": ["unused.jsonl"],
    "workspace_id": "ws-1",
    "alias": "crm",
}
"""A value for each argument that a call needs."""


def each_argument(table: Mapping[Any, Arguments]) -> list[object]:
    return [
        pytest.param(
            call, name, accepted, id=f"{getattr(call, '__name__', call)} {name}"
        )
        for call, arguments in table.items()
        for accepted, names in arguments.items()
        for name in names.split()
    ]


def wrong_calls(call: Call, name: str, accepted: Types) -> Iterator[dict[str, object]]:
    """Yield the arguments of calls in which one argument has a wrong type."""
    parameters = inspect.signature(call).parameters.values()
    needed = {
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
    } & VALID.keys()
    # No argument takes the first four: a collection takes none with "x" in it.
    values: list[object] = [
        object(),
        1j,
        ["x"],
        {"x": 1},
        1,
        -1.5,
        "x",
        b"x",
        True,
        math.nan,
    ]
    for value in values:
        if not isinstance(value, accepted):
            yield {**{key: VALID[key] for key in needed}, name: value}


@pytest.mark.parametrize(("function", "name", "accepted"), each_argument(FUNCTIONS))
def test_a_wrong_type_is_rejected_by_name(
    function: Call, name: str, accepted: Types, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BCTRL_API_KEY", "k")
    for arguments in wrong_calls(function, name, accepted):
        with pytest.raises(BctrlConfigError, match=name) as caught:
            function(**arguments)
        assert caught.value.argument == name


@pytest.mark.parametrize(("method", "name", "accepted"), each_argument(METHODS))
async def test_a_wrong_argument_of_a_call_is_rejected_unsent(
    method: str, name: str, accepted: Types, emulator: Emulator, session: BctrlSession
) -> None:
    call = getattr(session, method)
    for arguments in wrong_calls(call, name, accepted):
        with pytest.raises(BctrlConfigError, match=name) as caught:
            await call(**arguments)
        assert caught.value.argument == name
    assert emulator.requests == []


def test_the_error_says_what_the_argument_takes() -> None:
    with pytest.raises(BctrlConfigError) as caught:
        RetryPolicy(statuses=503)  # type: ignore[arg-type]  # the mistake.
    assert str(caught.value) == "invalid statuses: expected a set of statuses, not int"


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("fastapi", "fastapi"),
        ("otel", "opentelemetry"),
    ],
)
def test_without_an_extra_the_import_names_it(module: str, package: str) -> None:
    """Fault: it told to install a name from an index, which anyone could register."""
    program = (
        f"import sys; sys.modules['{package}'] = None; import bctrl_async.{module}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    problem, _, advice = done.stderr.splitlines()[-1].partition(": install ")
    assert re.fullmatch(rf"ModuleNotFoundError: {package}[.a-z]* is missing", problem)
    command = f"python -m pip install '.[{module}]'"
    assert advice == f"bctrl-async with the extra {module} (in a clone: {command})"
