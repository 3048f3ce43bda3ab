"""The options of the connection, and results as exit codes."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest
from helpers import Command

from bctrl_async import BctrlSession
from bctrl_async.emulator import Emulator, Fault, Reply


@pytest.fixture(autouse=True)
def _environment(emulator_environment: None, emulator: Emulator) -> None:
    del emulator_environment
    emulator.add_runtime("ws", "a")


# Without --no-verify, a stop that failed would be polled for.
commands = pytest.mark.parametrize("args", ["stop --no-verify ws a", "list ws"])


def inject(emulator: Emulator, *faults: Fault) -> None:
    for method in ("POST", "GET"):
        emulator.inject(*faults, method=method)


@pytest.mark.parametrize(
    ("faults", "options", "code", "requests"),
    [
        ([Fault.SERVER_ERROR] * 4, "--attempts 1", 1, 1),
        ([Fault.SERVER_ERROR] * 4, "--attempts 3", 1, 3),
        ([Fault.RATE_LIMITED], "--patience 0", 1, 1),
        ([Fault.RATE_LIMITED], "--patience 30s", 0, 2),
    ],
)
@commands
async def test_attempts_and_patience_limit_the_requests_of_a_call(
    emulator: Emulator,
    command: Command,
    *,
    args: str,
    faults: list[Fault],
    options: str,
    code: int,
    requests: int,
) -> None:
    inject(emulator, *faults)
    assert (await command(*args.split(), *options.split()))[0] == code
    assert len(emulator.requests) == requests


@pytest.mark.parametrize(("args", "limit"), [("stop ws a", 60), ("list ws", 10), ("get ws a", 10)])
async def test_an_attempt_of_a_command_that_only_reads_ends_sooner(
    command: Command, monkeypatch: pytest.MonkeyPatch, args: str, limit: float
) -> None:
    made = Mock(wraps=BctrlSession)
    monkeypatch.setattr("bctrl_async.BctrlSession", made)
    assert (await command(*args.split()))[0] == 0
    assert made.call_args.kwargs["timeout"] == limit


@pytest.mark.parametrize(("option", "shown"), [("-v", 1), ("--verbose", 1), ("--timeout=9s", 0)])
@commands
async def test_retries_are_shown_with_verbose_only(
    emulator: Emulator, command: Command, args: str, option: str, shown: int
) -> None:
    inject(emulator, Fault.SERVER_ERROR)
    _, _, err = await command(*args.split(), option)
    assert err.count("bctrl-async: info: attempt 1 failed: ") == shown
    assert err.count("bctrl-async: ") == shown


async def test_an_unexpected_error_is_one_line_without_its_text(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("http://user:s3cret@proxy")

    monkeypatch.setattr("bctrl_async.cli._list._print_table", broken)
    line = broken.__code__.co_firstlineno + 1
    place = f"unexpected RuntimeError at line {line} of test_cli_connection.py"
    error = f"bctrl-async: error: {place}. This is a fault of bctrl-async: please report it\n"
    assert await command("list", "ws") == (1, "", error)


# The results


@pytest.mark.parametrize(
    ("faults", "option", "result", "expected"),
    [
        ([], "--verify", "stopped", 0),
        ([Fault.FAILED], "--no-verify", "accepted", 0),
        ([Fault.ACCEPTED], "--no-verify", "accepted", 1),
        ([Fault.DROP_AFTER], "--verify", "stopped", 0),
        ([Fault.DROP_AFTER], "--no-verify", "unknown", 1),
        ([Reply(403, code="workspace.forbidden")], "--verify", "rejected", 1),
    ],
)
async def test_the_exit_code_is_0_only_if_no_runtime_runs(
    command: Command,
    emulator: Emulator,
    *,
    faults: list[Fault | Reply],
    option: str,
    result: str,
    expected: int,
) -> None:
    emulator.inject(*faults, method="POST")
    code, out, _ = await command("stop", option, "--attempts", "1", "-o", "json", "ws", "a")

    record = json.loads(out)
    assert (code, record["result"], record["ok"]) == (expected, result, code == 0)
    assert (record["state"] == "not_running", record["error"] is None) == (code == 0, code == 0)
