"""The options of the connection, and the seven results as exit codes."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest
from helpers import Command, unused_url

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
    """Fault: it left the command as a box with the lines of the code."""

    def broken(*_: object) -> None:
        raise RuntimeError("http://user:s3cret@proxy")

    monkeypatch.setattr("bctrl_async.cli._list._print_table", broken)
    line = broken.__code__.co_firstlineno + 1
    place = f"unexpected RuntimeError at line {line} of test_cli_connection.py"
    error = f"bctrl-async: error: {place}. This is a fault of bctrl-async: please report it\n"
    assert await command("list", "ws") == (1, "", error)


# The results

Row = tuple[str, list[Fault | Reply], tuple[str, int], tuple[str, int]]
ROWS: list[Row] = [
    # Row, what the server does with every stop, result and code with --verify, with --no-verify.
    ("stopped", [], ("stopped", 0), ("stopped", 0)),
    ("accepted", [Fault.ACCEPTED], ("accepted", 1), ("accepted", 1)),
    ("failed", [Fault.FAILED], ("accepted", 0), ("accepted", 0)),
    ("already stopped", [], ("already_stopped", 0), ("already_stopped", 0)),
    ("not found", [], ("not_found", 1), ("not_found", 1)),
    ("rejected", [Reply(403, code="workspace.forbidden")], ("rejected", 1), ("rejected", 1)),
    ("throttled", [Fault.RATE_LIMITED], ("rejected", 1), ("rejected", 1)),
    ("not sent", [], ("not_sent", 1), ("not_sent", 1)),
    ("unknown", [Fault.BAD_GATEWAY], ("unknown", 1), ("unknown", 1)),
    ("lost", [], ("stopped", 0), ("unknown", 1)),
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
async def test_the_exit_code_is_0_only_if_no_runtime_runs(
    command: Command,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    *,
    row: Row,
    verify: bool,
) -> None:
    name, faults, with_verify, without = row
    if name == "already stopped":
        emulator.add_runtime("ws", "a", status="stopped")
    for fault in faults:
        emulator.poison("ws", "a", fault)
    if name == "lost":
        emulator.inject(Fault.DROP_AFTER, method="POST")
    if name == "accepted":
        emulator.inject(*[Reply(200, body={**emulator.runtimes["ws", "a"]})] * 99, method="GET")
    options = ["--verify" if verify else "--no-verify", "--attempts", "1", "--patience", "0"]
    options += ["--deadline", "500ms"] if verify and name in {"accepted", "unknown"} else []
    with unused_url() as unused:
        url = unused if name == "not sent" else emulator.url
        monkeypatch.setenv("BCTRL_BASE_URL", url)
        alias = "nobody" if name == "not found" else "a"
        code, out, _ = await command("stop", *options, "-o", "json", "ws", alias)

    result, exit_code = with_verify if verify else without
    record = json.loads(out)
    assert (code, record["result"], record["ok"]) == (exit_code, result, code == 0)
    assert (record["state"] == "not_running", record["error"] is None) == (code == 0, code == 0)
    if code == 0:
        assert emulator.status("ws", "a") in {"stopped", "failed"}
