"""The command: run in this process for its texts, in others for signals and terminals."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from commands import (
    NOTICE,
    Terminal,
    begin_to_end,
    finish,
    outcomes_of,
    results_of,
    start,
    stop_piped,
    until,
    without_notices,
    without_times,
    write,
)
from helpers import BOUND, Command, HoldingEmulator, pass_time
from journal_lines import read_lines
from warm_server import program

from bctrl_async import (
    BctrlSession,
    RuntimeRef,
    StopBatch,
    StopOutcome,
    StopResult,
)
from bctrl_async.cli import (
    _output,
    _progress,
    _run,
)
from bctrl_async.emulator import Fault
from bctrl_async.journal import Journal

pty = pytest.importorskip("pty", reason="signals and terminals are tested where there are any")

KEY = "emulator-key"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCTRL_API_KEY", KEY)


@pytest.fixture
def emulator(holding: HoldingEmulator) -> HoldingEmulator:
    return holding


@pytest.fixture
def pass_time_in_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], object]:
    """Return a function that lets time pass in the bulk stop of a command in this process."""
    loops: list[asyncio.AbstractEventLoop] = []
    run_with_progress = _run.run_with_progress

    async def record_loop(batch: StopBatch, output: _output.Output) -> bool:
        loops.append(asyncio.get_running_loop())
        return await run_with_progress(batch, output)

    monkeypatch.setattr(_run, "run_with_progress", record_loop)
    return lambda seconds: loops[-1].call_soon_threadsafe(pass_time, seconds)


def fill(file: Path, text: str) -> None:
    file.write_text(text)


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    """A file with three targets."""
    file = tmp_path / "targets.csv"
    file.write_text("workspace_id,alias\nws,a\nws,b\nws,c\n")
    return file


# Journal


async def test_the_same_command_resumes_from_its_journal(
    emulator: HoldingEmulator, command: Command, targets: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    emulator.inject(*[Fault.SERVER_ERROR] * 4, alias="b")
    args = ("stop", "--no-verify", "--journal", journal, "--from", targets)
    assert (await command(*args))[0] == 1
    assert KEY not in journal.read_text()
    emulator.received.clear()

    code, out, err = await command(*args, "-o", "json")

    assert emulator.received == {("ws", "b"): 1}
    resumed = {outcome["alias"]: outcome["resumed"] for outcome in outcomes_of(out)}
    assert resumed == {"a": True, "b": False, "c": True}
    assert set(results_of(out)) == {"stopped"}
    assert (code, without_times(err)) == (
        0,
        "3 of 3 no longer running after 0.0 s: 3 stopped; 2 from an earlier run, not sent again\n",
    )
    assert KEY not in journal.read_text()


async def test_a_journal_in_use_exits_with_75(
    emulator: HoldingEmulator, command: Command, tmp_path: Path
) -> None:
    """Fault: it is 2, and a supervisor gives up while a file server holds a dead client's lock."""
    path = tmp_path / "journal"
    journal = Journal(path, f"{emulator.url}/v1")
    code, out, err = await command("stop", "--journal", path, "ws", "a")
    journal.close()
    assert err.startswith(f"bctrl-async: error: the journal '{path}' is in use by another run. ")
    assert (code, out, err.count("\n")) == (75, "", 1)
    assert not emulator.requests


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
async def test_a_file_that_is_not_a_journal_of_this_server_exits_with_2_and_is_unchanged(
    emulator: HoldingEmulator, command: Command, tmp_path: Path, option: tuple[str, ...]
) -> None:
    foreign, elsewhere = tmp_path / "foreign", tmp_path / "elsewhere"
    foreign.write_text("workspace,alias\n")
    Journal(elsewhere, "https://other.test/v1").close()
    for path, why in [
        (foreign, "cannot be used: it is not a journal"),
        (elsewhere, "cannot be used: it is of another server, https://other.test/v1"),
    ]:
        before = path.read_bytes()
        code, out, err = await command("stop", *option, "--journal", path, "ws", "a")
        assert err.startswith(f"bctrl-async: error: the journal '{path}' ")
        assert why in err
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert path.read_bytes() == before
    assert not emulator.requests


# Dry run


async def test_a_dry_run_needs_no_key_and_prints_lines_for_from(
    emulator: HoldingEmulator,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    targets: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("BCTRL_API_KEY")
    code, out, err = await command("stop", "--dry-run", "--from", targets)
    assert outcomes_of(out) == [{"workspace_id": "ws", "alias": alias} for alias in "abc"]
    assert err == "Dry run: 3 to stop, 0 invalid\n"
    assert code == 0
    assert not emulator.requests

    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    again = tmp_path / "again"
    again.write_text(out)
    assert (await command("stop", "--from", again))[0] == 0
    assert {emulator.status("ws", alias) for alias in "abc"} == {"stopped"}


async def test_a_dry_run_with_invalid_targets_exits_with_1(
    emulator: HoldingEmulator,
) -> None:
    code, out, err = await stop_piped('ws,a\n"ws","日本"\nws,..', "--dry-run")
    assert [outcome["alias"] for outcome in outcomes_of(out)] == ["a", "日本"]
    dots, account = err.splitlines()
    assert dots.startswith("bctrl-async: error: alias '..' ")
    assert account == "Dry run: 2 to stop, 1 invalid"
    assert code == 1
    assert not emulator.requests


async def test_a_dry_run_does_not_create_a_journal(
    emulator: HoldingEmulator, command: Command, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    code, _, err = await command("stop", "--dry-run", "--journal", journal, "ws", "a")
    assert (code, err) == (0, "Dry run: 1 to stop, 0 invalid\n")
    assert not journal.exists()
    assert not emulator.requests


# Limits


async def test_rate_limits_the_requests_per_second(
    emulator: HoldingEmulator, command: Command
) -> None:
    code, out, _ = await command("stop", "--rate", "10", "ws", "a", "b", "c")
    took = re.search(r"no longer running after (\d+\.\d+) s", out)
    assert took is not None
    assert float(took[1]) >= 0.17
    assert code == 0
    assert len(emulator.requests) == 3


async def test_the_deadline_aborts_the_run_and_exits_with_1(
    emulator: HoldingEmulator,
    command: Command,
    targets: Path,
    pass_time_in_run: Callable[[float], object],
) -> None:
    emulator.held.add("b")
    limits = ("--deadline", "50s", "--concurrency", "1")
    running = asyncio.create_task(command("stop", *limits, "--from", targets))
    await until(lambda: emulator.received["ws", "b"])
    pass_time_in_run(50)
    code, out, err = await running
    line, account = out.splitlines()
    assert line.startswith(f"{'ws b':28}  unknown          aborted before an answer: the deadline ")
    assert without_times(account) == (
        "1 of 3 no longer running, 2 unconfirmed after 0.0 s: 1 stopped, 1 not_sent, 1 unknown"
    )
    assert err == "bctrl-async: error: ended early: the deadline of 50s has passed\n"
    assert code == 1


# Signals


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("option", [(), ("-o", "json")])
async def test_the_first_ctrl_c_stops_reading_and_waits_for_requests_in_flight(
    emulator: HoldingEmulator, option: tuple[str, ...], signal_: signal.Signals
) -> None:
    emulator.held.add("b")
    args = ("stop", *option, "--concurrency", "1", "ws", "a", "b", "c", "d")
    process = await start(*program(), *args)
    await until(lambda: len(emulator.requests) == 2)

    said = await begin_to_end(process, signal_)
    assert said == f"1 of 4 sent, 1 in flight, {NOTICE}, 1 stopped\n"
    emulator.held.clear()
    code, out, err = await finish(process)

    if option:
        outcomes = outcomes_of(out)
        assert [outcome["index"] for outcome in outcomes] == [0, 1, 2, 3]
        assert [outcome["attempts"] for outcome in outcomes] == [1, 1, 0, 0]
        results = results_of(out)
    else:
        *lines, account = out.splitlines()
        results = [line.split()[1] for line in lines]
        assert without_times(account) == (
            "Interrupted: 2 of 4 no longer running, 2 unconfirmed after 0.0 s: "
            "2 stopped, 2 not_sent"
        )
    assert results == ["stopped", "stopped", "not_sent", "not_sent"]
    assert (code, bool(without_notices(err))) == (130, bool(option))
    assert len(emulator.requests) == 2


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("option", [(), ("-o", "json")])
async def test_the_second_ctrl_c_aborts_with_an_outcome_for_every_alias(
    emulator: HoldingEmulator, option: tuple[str, ...], signal_: signal.Signals
) -> None:
    emulator.held.add("b")
    args = ("stop", *option, "--concurrency", "1", "ws", "a", "b", "c", "d")
    process = await start(*program(), *args)
    await until(lambda: len(emulator.requests) == 2)

    await begin_to_end(process, signal_)
    process.send_signal(signal_)
    code, out, err = await finish(process)

    if option:
        outcomes = sorted(outcomes_of(out), key=lambda outcome: str(outcome["index"]))
        assert [outcome["index"] for outcome in outcomes] == [0, 1, 2, 3]
        assert [outcome["attempts"] for outcome in outcomes] == [1, 1, 0, 0]
        results = [str(outcome["result"]) for outcome in outcomes]
    else:
        *lines, account = out.splitlines()
        assert [line.split()[0] for line in lines] == ["a", "b", "c", "d"]
        results = [line.split()[1] for line in lines]
        assert without_times(account) == (
            "Interrupted: 1 of 4 no longer running, 3 unconfirmed after 0.0 s: "
            "1 stopped, 2 not_sent, 1 unknown"
        )
    assert results == ["stopped", "unknown", "not_sent", "not_sent"]
    assert (code, bool(without_notices(err))) == (130, bool(option))


@pytest.mark.parametrize("signals", [1, 2])
async def test_a_run_interrupted_by_ctrl_c_can_be_resumed(
    emulator: HoldingEmulator, command: Command, targets: Path, tmp_path: Path, signals: int
) -> None:
    journal = tmp_path / "journal"
    emulator.held.add("b")
    args = ("stop", "--journal", journal, "--concurrency", "1", "--from", targets)
    process = await start(*program(), *args)
    await until(lambda: len(emulator.requests) == 2)
    await begin_to_end(process)
    if signals == 2:
        process.send_signal(signal.SIGTERM)
    else:
        emulator.held.clear()
    code, out, err = await finish(process)
    emulator.held.clear()
    assert err.endswith("Run the same command again to resume\n")

    *lines, account = out.splitlines()
    result = "stopped" if signals == 1 else "unknown"
    assert [line.split()[:3] for line in lines] == [["ws", "b", "unknown"]] * (signals - 1)
    assert account.startswith(
        f"Interrupted: {3 - signals} of 3 no longer running, {signals} unconfirmed"
    )
    found = read_lines(journal.read_bytes()).entries
    noted = {line["alias"]: line["result"] for line in found}
    assert noted == {"a": "stopped", "b": result, "c": "not_sent"}
    assert code == 130

    assert (await command(*args))[0] == 0
    assert emulator.received == {("ws", "a"): 1, ("ws", "b"): signals, ("ws", "c"): 1}


async def test_ctrl_c_ends_the_wait_for_an_open_pipe(
    emulator: HoldingEmulator,
) -> None:
    process = await start(*program(), "stop", "--from", "-", stdin=asyncio.subprocess.PIPE)
    write(process, "ws,a\n")
    await until(lambda: emulator.status("ws", "a") == "stopped")
    process.send_signal(signal.SIGINT)
    code, out, err = await finish(process)
    assert without_times(out) == (
        "Interrupted: 1 of 1 no longer running after 0.0 s: 1 stopped; "
        "the input was not read to its end\n"
    )
    assert (code, without_notices(err)) == (130, "")


async def test_without_signal_handlers_cancellation_counts_as_an_interrupt(
    emulator: HoldingEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    emulator.held.add("a")
    shown: list[StopOutcome] = []

    async def stop() -> _run.FinishedRun:
        session = BctrlSession(KEY, base_url=emulator.url, max_connections=1)
        targets = [RuntimeRef("ws", "a"), RuntimeRef("ws", "b")]
        batch = partial(session.stop_runtimes, targets, on_outcome=shown.append)
        stopping = asyncio.create_task(_run.run_stops(session, batch, _output.Output()))
        await until(lambda: emulator.requests)
        stopping.cancel()
        return await stopping

    finished = await asyncio.to_thread(asyncio.run, stop())

    assert finished.interrupted
    assert [outcome.result for outcome in shown] == [StopResult.UNKNOWN, StopResult.NOT_SENT]
    assert finished.report.counts == {StopResult.UNKNOWN: 1, StopResult.NOT_SENT: 1}
    assert capfd.readouterr() == ("", "")


# Progress


async def test_progress_is_a_line_every_few_seconds_without_a_terminal(
    emulator: HoldingEmulator,
    command: Command,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_progress, "_LINE_EVERY", 0.05)
    emulator.held.add("b")
    running = asyncio.create_task(command("stop", "--concurrency", "1", "ws", "a", "b", "c"))
    err = ""
    async with asyncio.timeout(BOUND):
        while "1 of 3 done, 1 in flight, 1 stopped\n" not in err:
            await asyncio.sleep(0.01)
            err += capfd.readouterr().err
    emulator.held.clear()
    code, _, more = await running
    assert code == 0
    assert all(re.match(r"\d of 3 done, ", line) for line in (err + more).splitlines())


async def test_progress_is_dropped_if_stderr_is_closed(emulator: HoldingEmulator) -> None:
    emulator.held.add("a")
    closing = ("/bin/sh", "-c", 'exec "$@" 2>&-', "sh")
    # Started anew, since nothing shows when a signal that is forwarded has arrived.
    process = await start(*closing, sys.executable, "-m", "bctrl_async", "stop", "ws", "a")
    await until(lambda: emulator.requests)
    process.send_signal(signal.SIGINT)
    emulator.held.clear()
    code, out, err = await finish(process)
    assert re.fullmatch(
        r"a  stopped +0\.0 s\n(Interrupted: )?1 of 1 no longer running after 0\.0 s: 1 stopped\n",
        without_times(out),
    )
    assert (code, err) == (130 if "Interrupted" in out else 0, "")


async def test_the_progress_bar_disappears_at_the_end(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    emulator.held.add("b")
    terminal = Terminal()
    process = await start(
        *program(),
        *("stop", "--concurrency", "1", "ws", "a", "b", "c"),
        stdout=terminal.fd,
        stderr=terminal.fd,
    )
    await terminal.until_drawn("a  stopped .*\n1 of 3 ━.{72}\n1 in flight\n1 stopped")

    emulator.held.clear()
    await terminal.rest()

    assert [without_times(line) for line in terminal.screen] == [
        "a  stopped          0.0 s",
        "b  stopped          0.0 s",
        "c  stopped          0.0 s",
        "3 of 3 no longer running after 0.0 s: 3 stopped",
    ]
    async with asyncio.timeout(BOUND):
        assert await process.wait() == 0


async def test_quiet_draws_no_progress(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    emulator.held.add("a")
    terminal = Terminal()
    results = tmp_path / "results"
    with results.open("wb") as file:
        files = {"stdout": file.fileno(), "stderr": terminal.fd}
        process = await start(*program(), "stop", "-q", "-o", "json", "ws", "a", "b", **files)
    await until(lambda: '"alias": "b", "result": "stopped"' in results.read_text())
    # The bar would appear after 0.4 s.
    await asyncio.sleep(1)
    emulator.held.clear()
    assert await terminal.rest() == ""
    assert (await finish(process))[0] == 0
    assert results.read_text().count("\n") == 2


async def test_progress_goes_to_stderr_and_has_no_bar_for_a_pipe_of_targets(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    results = tmp_path / "results"
    with results.open("wb") as file:
        files = {"stdout": file.fileno(), "stderr": terminal.fd}
        process = await start(
            *program(), "stop", "--from", "-", stdin=asyncio.subprocess.PIPE, **files
        )
    write(process, "ws,a\nws,..\n")
    await terminal.until_drawn(r"(.*\n)*0 in flight\n1 stopped, 1 rejected")
    assert "━" not in terminal.text
    assert process.stdin is not None
    process.stdin.close()
    await terminal.rest()
    assert terminal.screen == [""]
    code, _, _ = await finish(process)
    line, account = results.read_text().splitlines()
    assert line.startswith("ws ..  ")
    assert (
        without_times(account)
        == "1 of 2 no longer running, 1 invalid after 0.0 s: 1 stopped, 1 rejected"
    )
    assert code == 1
    assert emulator.status("ws", "a") == "stopped"


async def test_nothing_is_drawn_beside_a_pipe_for_the_results(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: what `| jq` printed on the same terminal was erased when progress was drawn anew."""
    monkeypatch.setenv("TERM", "xterm")
    emulator.held.add("a")
    terminal = Terminal()
    process = await start(*program(), "stop", "-o", "json", "ws", "a", stderr=terminal.fd)
    await until(lambda: emulator.received["ws", "a"])
    process.send_signal(signal.SIGINT)
    await terminal.until(NOTICE)
    emulator.held.clear()
    code, out, _ = await finish(process)
    assert (json.loads(out)["result"], code) == ("stopped", 130)
    assert "\x1b" not in await terminal.rest()
    line, _ = terminal.text.splitlines()
    assert line.startswith("0 of 1 sent, 1 in flight")


@pytest.mark.parametrize(("kind", "draws"), [("pipe", False), ("file", True), ("closed", True)])
def test_progress_is_drawn_on_a_terminal_unless_stdout_is_a_pipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, *, draws: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    if kind == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(tmp_path / "results", os.O_CREAT | os.O_WRONLY)
    with os.fdopen(writer, "w") as stdout, os.fdopen(Terminal().fd, "w") as stderr:
        monkeypatch.setattr("sys.stdout", None if kind == "closed" else stdout)
        monkeypatch.setattr("sys.stderr", stderr)
        console, is_live = _output.Output().progress_console()
        assert (console.file, is_live) == (stderr, draws)


async def test_ctrl_c_on_a_terminal_announces_the_second_one_and_keeps_the_summary_intact(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    emulator.held.add("a")
    terminal = Terminal()
    process = await start(*program(), "stop", "ws", "a", stdout=terminal.fd, stderr=terminal.fd)
    await terminal.until("1 in flight")
    process.send_signal(signal.SIGINT)
    await terminal.until(f"1 in flight, {NOTICE}")
    process.send_signal(signal.SIGINT)
    await terminal.rest()
    first, *_, account = terminal.screen
    assert first.startswith("a  unknown ")
    assert (
        without_times(account)
        == "Interrupted: 0 of 1 no longer running, 1 unconfirmed after 0.0 s: 1 unknown"
    )
    async with asyncio.timeout(BOUND):
        assert await process.wait() == 130


async def test_an_early_ctrl_c_begins_a_new_line_for_the_summary(
    emulator: HoldingEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(_progress, "_SHOW_AFTER", 3600)
    emulator.held.add("a")
    output = _output.Output()
    lines: list[object] = []
    monkeypatch.setattr(output, "progress_console", lambda: (output, True))
    monkeypatch.setattr(output, "end_line", lambda: lines.append("\n"))

    async with BctrlSession(KEY, base_url=emulator.url) as session:
        batch = session.stop_runtimes([("ws", "a")])
        running = asyncio.create_task(_run.run_with_progress(batch, output))
        await until(lambda: emulator.requests)
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: lines)
        emulator.held.clear()
        assert await running
    assert lines == ["\n"]
    assert batch.report.ok
