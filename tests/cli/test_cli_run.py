"""A run of `stop`: its progress, and early ends by a deadline or signals."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from conftest import KEY
from support.commands import (
    NOTICE,
    Command,
    Process,
    begin_to_end,
    close_stdin,
    finish,
    outcomes_of,
    save,
    start,
    start_on_terminal,
    without_notices,
    without_times,
    write,
)
from support.helpers import (
    BOUND,
    add_runtimes,
    until,
    wait_for_line,
    wait_for_requests,
)
from support.journal_lines import read_lines
from support.warm_server import program

from bctrl_async import BctrlSession, StopBatch, StopResult
from bctrl_async.cli._outcomes import OutcomePrinter
from bctrl_async.cli._output import Output
from bctrl_async.cli._progress import run_with_progress
from bctrl_async.emulator import Emulator

ONE_AT_A_TIME = ("stop", "--concurrency", "1", "ws", "a", "b", "c")


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


# Progress


async def test_progress_is_lines_without_a_terminal(command: Command) -> None:
    command.patch.setattr("bctrl_async.cli._progress._LINE_EVERY", 0.05)
    command.api.hold("ws", "b")
    running = asyncio.create_task(command(*ONE_AT_A_TIME))
    err = ""
    async with asyncio.timeout(BOUND):
        while "1 of 3 done, 1 in flight, 1 stopped\n" not in err:
            await asyncio.sleep(0.01)
            err += command.capfd.readouterr().err
    command.api.release("ws", "b")
    code, _, more = await running
    assert code == 0
    assert all(re.match(r"\d of 3 done, ", line) for line in (err + more).splitlines())


async def test_the_progress_bar_disappears_at_the_end(command: Command) -> None:
    command.api.hold("ws", "b")
    process, terminal = await start_on_terminal(*ONE_AT_A_TIME)
    await terminal.until_drawn("a  stopped .*\n1 of 3 ━.{72}\n1 in flight\n1 stopped")

    command.api.release("ws", "b")
    await terminal.rest()

    assert [without_times(line) for line in terminal.screen] == [
        "a  stopped          0.0 s",
        "b  stopped          0.0 s",
        "c  stopped          0.0 s",
        "3 of 3 no longer running after 0.0 s: 3 stopped",
    ]
    assert (await finish(process))[0] == 0


async def test_progress_goes_to_stderr_and_has_no_bar_for_a_pipe(
    command: Command,
) -> None:
    results = command.folder / "results"
    with results.open("wb") as file:
        files = {"stdin": asyncio.subprocess.PIPE, "stdout": file.fileno()}
        args = ("stop", "--from", "-")
        process, terminal = await start_on_terminal(*args, streams=("stderr",), **files)
    write(process, "ws,a\nws,..\n")
    await terminal.until_drawn(r"(.*\n)*0 in flight\n1 stopped, 1 invalid")
    assert "━" not in terminal.text
    assert process.stdin is not None
    process.stdin.close()
    await terminal.rest()
    assert terminal.screen == [""]
    assert (await finish(process))[0] == 1
    line, account = results.read_text().splitlines()
    assert line.startswith("ws ..  ")
    assert account.startswith("1 of 2 no longer running, 1 unconfirmed after ")


async def test_ctrl_c_on_a_terminal_keeps_the_summary_intact(command: Command) -> None:
    command.api.hold("ws", "a")
    process, terminal = await start_on_terminal("stop", "ws", "a")
    await terminal.until("1 in flight")
    process.send_signal(signal.SIGINT)
    await terminal.until("1 in flight, Ctrl-C again to abort")
    process.send_signal(signal.SIGINT)
    await terminal.rest()
    first, *_, account = terminal.screen
    assert first.startswith("a  unknown ")
    assert account.startswith(
        "Interrupted: 0 of 1 no longer running, 1 unconfirmed after "
    )
    assert (await finish(process))[0] == 130


# The end


async def test_the_remedy_fits_how_many_targets_were_not_found(
    command: Command,
) -> None:
    remedy = "check the workspace ids, the aliases and the base URL"
    for aliases, account in (
        ("a nobody", f"1 of 2 targets not found: {remedy}, or add --ignore-not-found"),
        ("nobody", f"1 of 1 targets not found: {remedy}"),
    ):
        _, _, err = await command("stop", "ws", *aliases.split())
        assert err == f"bctrl-async: error: {account}\n"


async def test_the_deadline_aborts_the_run_and_exits_with_1(command: Command) -> None:
    command.api.hold("ws", *"abc")
    code, out, err = await command("stop", "--deadline", "100ms", "--from", "targets")
    assert err == "bctrl-async: error: ended early: the deadline of 100ms has passed\n"
    assert (code, out.count("0 of 3 no longer running, 3 unconfirmed")) == (1, 1)


@pytest.mark.parametrize(
    ("option", "methods"),
    [
        ("--verify=1ms", ["POST", "GET"]),
        ("--verify=0", ["POST"]),
        ("--no-verify", ["POST"]),
    ],
)
async def test_verify_says_for_how_long_runtimes_are_polled(
    command: Command, option: str, methods: list[str]
) -> None:
    command.api.add_runtime("ws", "a", stop_takes=3600)
    code, out, _ = await command("stop", option, "ws", "a")
    assert code == 1
    assert "status active (still running)" in out
    # A timer may end a little early, and then a second poll follows.
    assert [request.method for request in command.api.requests][:2] == methods


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
async def test_ctrl_c_waits_and_the_second_one_aborts_a_run_that_resumes(
    command: Command, signal_: signal.Signals, *, twice: bool
) -> None:
    command.api.hold("ws", "b")
    args = (*ONE_AT_A_TIME, "--journal", str(command.folder / "journal"), "-o", "json")
    process = await start(*program(), *args)
    await until(lambda: len(command.api.requests) == 2)

    said = await begin_to_end(process, signal_)
    assert said == f"1 of 3 done, 1 in flight, {NOTICE}, 1 stopped\n"
    if twice:
        process.send_signal(signal_)
    else:
        command.api.release("ws", "b")
    code, out, err = await finish(process)

    results = {each["alias"]: each["result"] for each in outcomes_of(out)}
    assert results == {
        "a": "stopped",
        "b": "unknown" if twice else "stopped",
        "c": "not_sent",
    }
    account, hint = without_notices(err).splitlines()
    assert account.startswith(
        f"Interrupted: {1 if twice else 2} of 3 no longer running, "
    )
    assert hint == "Run the same command again to resume"
    assert (code, len(command.api.requests)) == (130, 2)

    command.api.release("ws", "b")
    code, _, err = await command(*args)
    assert code == 0
    assert f"; {1 if twice else 2} from an earlier run, not sent again\n" in err
    assert [command.api.received["ws", alias] for alias in "abc"] == [1, 1 + twice, 1]


async def test_a_pipe_that_was_read_to_its_end_is_not_called_unread(
    command: Command,
) -> None:
    command.api.hold("ws", "a")
    # The second worker reads the end at once: of a hundred, each takes a turn first.
    args = ("--concurrency", "2", "--from", "-")
    process = await start(*program(), "stop", *args, stdin=asyncio.subprocess.PIPE)
    # A line without its newline is sent after the end alone.
    write(process, "ws,a")
    assert process.stdin is not None
    process.stdin.close()
    await until(lambda: len(command.api.requests) == 1)
    await begin_to_end(process)
    process.send_signal(signal.SIGINT)
    _, out, _ = await finish(process)
    summary = "Interrupted: 0 of 1 no longer running, 1 unconfirmed after 0.0 s"
    assert without_times(out).endswith(f"{summary}: 1 unknown\n")


async def test_ctrl_c_ends_the_wait_for_an_open_pipe(command: Command) -> None:
    process = await start(
        *program(), "stop", "--from", "-", stdin=asyncio.subprocess.PIPE
    )
    write(process, "ws,a\n")
    await until(lambda: command.api.status("ws", "a") == "stopped")
    process.send_signal(signal.SIGINT)
    code, out, err = await finish(process)
    assert without_times(out) == (
        "Interrupted: 1 of 1 no longer running after 0.0 s: 1 stopped; "
        "the input was not read to its end\n"
    )
    assert (code, without_notices(err)) == (130, "")


async def test_a_run_that_fails_has_its_account_before_its_error(
    command: Command,
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("s3cret")

    command.patch.setattr(OutcomePrinter, "print", fail)
    code, out, err = await command(*ONE_AT_A_TIME)
    account = "1 of 3 no longer running, 2 unconfirmed after "
    assert (code, out.startswith(account)) == (1, True)
    assert err.startswith("bctrl-async: error: unexpected LookupError at line ")
    assert "s3cret" not in err


NO_THREADS = """
import sys, threading
from bctrl_async.__main__ import main

threading.stack_size(1 << 62)
sys.exit(main())
"""
"""A program that runs the command where no thread can start."""


async def test_a_lookup_that_gets_no_thread_has_an_account(command: Command) -> None:
    """Fault: the command said that this was a fault of its own, and nothing else."""
    command.setenv(BCTRL_BASE_URL=command.api.url.replace("127.0.0.1", "localhost"))
    process = await start(sys.executable, "-c", NO_THREADS, "stop", "ws", "a")
    code, out, err = await finish(process)
    assert (code, "got no thread" in out + err) == (1, True)
    assert "0 of 1 no longer running, 1 unconfirmed" in out


HUNG_LOOKUP = """
import socket, sys, threading
from bctrl_async.__main__ import main

def look_up(*_):
    print("looking up", file=sys.stderr, flush=True)
    threading.Event().wait()

socket.getaddrinfo = look_up
sys.exit(main())
"""
"""A program that runs the command where the lookup of a host never ends."""


class TestHungLookup:
    """Fault: a command printed its account, and ended, after its lookups had ended."""

    @pytest.fixture(autouse=True)
    def _named_host(self, command: Command) -> None:
        command.setenv(BCTRL_BASE_URL="https://api.test")

    @pytest.mark.parametrize(
        ("args", "account"),
        [
            ("a", "0 of 1 no longer running, 1 unconfirmed"),
            ("--all --yes", "was not listed within the deadline"),
        ],
    )
    async def test_the_deadline_ends_it(self, args: str, account: str) -> None:
        words = ("stop", "ws", *args.split(), "--deadline", "0.1s")
        process = await start(sys.executable, "-c", HUNG_LOOKUP, *words)
        code, out, err = await finish(process)
        assert (code, account in out + err) == (1, True)

    @pytest.mark.parametrize(
        ("args", "account"),
        [("stop ws a", "Interrupted: 0 of 1 no longer running"), ("list ws", "")],
    )
    async def test_ctrl_c_ends_it(self, args: str, account: str) -> None:
        process = await start(sys.executable, "-c", HUNG_LOOKUP, *args.split())
        await wait_for_line(process.stderr, "looking up")
        process.send_signal(signal.SIGINT)
        code, out, _ = await finish(process)
        assert (code, account in out) == (130, True)


@asynccontextmanager
async def stopping(
    holding: Emulator, output: Output
) -> AsyncIterator[tuple[StopBatch, asyncio.Task[bool]]]:
    """Yield a run that stops `a`, then `b`, and its task; `a` is not answered."""
    holding.hold("ws", "a")
    async with BctrlSession(KEY, base_url=holding.url) as session:
        batch = session.stop_runtimes([("ws", "a"), ("ws", "b")], concurrency=1)
        running = asyncio.create_task(run_with_progress(batch, session, output))
        await until(lambda: holding.requests)
        yield batch, running


async def test_a_run_that_is_cancelled_is_interrupted(command: Command) -> None:
    """Without signal handlers, as on Windows, that is what Ctrl-C does."""
    async with stopping(command.api, Output()) as (batch, running):
        running.cancel()
        assert await running
    assert batch.report.counts == {StopResult.UNKNOWN: 1, StopResult.NOT_SENT: 1}


async def test_a_hangup_that_nohup_ignores_does_not_interrupt(command: Command) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        async with stopping(command.api, Output()) as (batch, running):
            os.kill(os.getpid(), signal.SIGHUP)
            command.api.release("ws", "a")
            assert not await running
    finally:
        signal.signal(signal.SIGHUP, before)
    assert batch.report.counts == {StopResult.STOPPED: 2}


async def test_an_early_ctrl_c_has_a_line_of_its_own(command: Command) -> None:
    """Fault: the summary followed the ^C on its line."""
    command.patch.setattr("bctrl_async.cli._progress._SHOW_AFTER", 3600)
    output = Output()
    command.patch.setattr(output, "progress_console", lambda: (output, True))
    async with stopping(command.api, output) as (batch, running):
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: batch.ended_early)
        command.api.release("ws", "a")
        assert await running
    assert command.capfd.readouterr().err == f"0 of 2 done, 1 in flight, {NOTICE}\n"
    assert batch.report.counts == {StopResult.STOPPED: 1, StopResult.NOT_SENT: 1}


# In a process that lacks what Windows lacks

WITHOUT = """
import asyncio, os, select, signal, sys
from types import SimpleNamespace

def missing(*args):
    raise NotImplementedError  # A loop of Windows does the same.

for kind in ("reader", "signal_handler"):
    setattr(asyncio.SelectorEventLoop, f"add_{kind}", missing)
    setattr(asyncio.SelectorEventLoop, f"remove_{kind}", missing)
from fcntl import LOCK_EX, LOCK_NB, flock
sys.modules["msvcrt"] = SimpleNamespace(
    LK_NBLCK=LOCK_EX | LOCK_NB, locking=lambda file, mode, _: flock(file, mode)
)
sys.modules["fcntl"] = None
del select.poll, os.register_at_fork, os.fork, os.O_NONBLOCK, signal.SIGHUP

from bctrl_async.__main__ import main
from bctrl_async.pace import _file

# A busy disk is no reason for a warning.
_file.PATIENCE = 50.0
sys.exit(main())
"""
"""A program that runs the command without locks, poll(), fork and signal handlers.

This is not Windows: its event loop, its files and its console differ as well.
"""


async def start_like_windows(*args: str | Path) -> Process:
    arguments = (sys.executable, "-c", WITHOUT, "stop", *args)
    return await start(*arguments, stdin=asyncio.subprocess.PIPE)


async def test_like_windows_a_list_is_stopped_and_its_journal_resumed(
    command: Command,
) -> None:
    args = (
        "--from",
        "-",
        "--journal",
        "journal.jsonl",
        "--rate",
        "1000",
        "--pace",
        "pace",
    )
    for account in (
        "3 of 3 no longer running",
        "3 from an earlier run, not sent again",
    ):
        process = await start_like_windows(*args)
        write(process, "ws,a\nws,b\nws,c\n")
        code, out, err = await close_stdin(process)
        assert (code, account in out, "warning" in err) == (0, True, False), err
    assert command.api.received.total() == 3


async def test_like_windows_ctrl_c_aborts_and_all_have_an_outcome(
    command: Command,
) -> None:
    targets = add_runtimes(command.api, 150)
    command.api.hold("ws-1", *(alias for _, alias in targets))
    save(
        "targets",
        "".join(f"{workspace_id},{alias}\n" for workspace_id, alias in targets),
    )
    process = await start_like_windows(
        "--from", "targets", "--journal", "journal.jsonl"
    )
    await wait_for_requests(command.api, 100)

    process.send_signal(signal.SIGINT)
    code, _, err = await finish(process)

    assert code == 130, err
    written = (command.folder / "journal.jsonl").read_bytes()
    entries = read_lines(written).entries
    assert Counter(entry["result"] for entry in entries) == {
        "unknown": 100,
        "not_sent": 50,
    }
