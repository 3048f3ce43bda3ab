"""A run of `stop`: its progress, and how a deadline or signals end it before its input does."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from commands import (
    NOTICE,
    begin_to_end,
    finish,
    outcomes_of,
    start,
    start_on_terminal,
    without_notices,
    without_times,
    write,
)
from conftest import KEY
from helpers import BOUND, Command, HoldingEmulator, pass_time, until
from warm_server import program

from bctrl_async import BctrlSession, StopBatch, StopOutcome, StopResult
from bctrl_async.cli._output import Output
from bctrl_async.cli._progress import run_with_progress

ONE_AT_A_TIME = ("stop", "--concurrency", "1", "ws", "a", "b", "c")


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


# Progress


async def test_progress_is_a_line_every_few_seconds_without_a_terminal(
    holding: HoldingEmulator,
    command: Command,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bctrl_async.cli._progress._LINE_EVERY", 0.05)
    holding.held.add("b")
    running = asyncio.create_task(command(*ONE_AT_A_TIME))
    err = ""
    async with asyncio.timeout(BOUND):
        while "1 of 3 done, 1 in flight, 1 stopped\n" not in err:
            await asyncio.sleep(0.01)
            err += capfd.readouterr().err
    holding.held.clear()
    code, _, more = await running
    assert code == 0
    assert all(re.match(r"\d of 3 done, ", line) for line in (err + more).splitlines())


async def test_progress_is_dropped_if_stderr_is_closed(holding: HoldingEmulator) -> None:
    holding.held.add("a")
    closing = ("/bin/sh", "-c", 'exec "$@" 2>&-', "sh")
    # Started anew, since nothing shows when a signal that is forwarded has arrived.
    process = await start(*closing, sys.executable, "-m", "bctrl_async", "stop", "ws", "a")
    await until(lambda: holding.requests)
    process.send_signal(signal.SIGINT)
    holding.held.clear()
    code, out, err = await finish(process)
    assert re.fullmatch(
        r"a  stopped +0\.0 s\n(Interrupted: )?1 of 1 no longer running after 0\.0 s: 1 stopped\n",
        without_times(out),
    )
    assert (code, err) == (130 if "Interrupted" in out else 0, "")


async def test_the_progress_bar_disappears_at_the_end(holding: HoldingEmulator) -> None:
    holding.held.add("b")
    process, terminal = await start_on_terminal(*ONE_AT_A_TIME)
    await terminal.until_drawn("a  stopped .*\n1 of 3 ━.{72}\n1 in flight\n1 stopped")

    holding.held.clear()
    await terminal.rest()

    assert [without_times(line) for line in terminal.screen] == [
        "a  stopped          0.0 s",
        "b  stopped          0.0 s",
        "c  stopped          0.0 s",
        "3 of 3 no longer running after 0.0 s: 3 stopped",
    ]
    assert (await finish(process))[0] == 0


async def test_quiet_draws_no_progress(holding: HoldingEmulator, tmp_path: Path) -> None:
    holding.held.add("a")
    results = tmp_path / "results"
    args = ("stop", "-q", "-o", "json", "ws", "a", "b")
    with results.open("wb") as file:
        files = {"stdout": file.fileno()}
        process, terminal = await start_on_terminal(*args, streams=("stderr",), **files)
    await until(lambda: '"alias": "b", "result": "stopped"' in results.read_text())
    # The bar would appear after 0.4 s.
    await asyncio.sleep(1)
    holding.held.clear()
    assert await terminal.rest() == ""
    assert (await finish(process))[0] == 0
    assert results.read_text().count("\n") == 2


async def test_progress_goes_to_stderr_and_has_no_bar_for_a_pipe_of_targets(
    holding: HoldingEmulator, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    with results.open("wb") as file:
        files = {"stdin": asyncio.subprocess.PIPE, "stdout": file.fileno()}
        args = ("stop", "--from", "-")
        process, terminal = await start_on_terminal(*args, streams=("stderr",), **files)
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
    assert holding.status("ws", "a") == "stopped"


async def test_ctrl_c_on_a_terminal_announces_the_second_one_and_keeps_the_summary_intact(
    holding: HoldingEmulator,
) -> None:
    holding.held.add("a")
    process, terminal = await start_on_terminal("stop", "ws", "a")
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
    assert (await finish(process))[0] == 130


# The end


async def test_rate_limits_the_requests_per_second(
    holding: HoldingEmulator, command: Command
) -> None:
    code, out, _ = await command("stop", "--rate", "10", "ws", "a", "b", "c")
    took = re.search(r"no longer running after (\d+\.\d+) s", out)
    assert took is not None
    assert float(took[1]) >= 0.17
    assert (code, len(holding.requests)) == (0, 3)


async def test_the_deadline_aborts_the_run_and_exits_with_1(
    holding: HoldingEmulator, command: Command, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def run(batch: StopBatch, output: Output) -> bool:
        loops.append(asyncio.get_running_loop())
        return await run_with_progress(batch, output)

    monkeypatch.setattr("bctrl_async.cli._stop.run_with_progress", run)
    holding.held.add("b")
    limits = ("--deadline", "50s", "--concurrency", "1")
    running = asyncio.create_task(command("stop", *limits, "--from", file))
    await until(lambda: holding.received["ws", "b"])
    loops[0].call_soon_threadsafe(pass_time, 50)
    code, out, err = await running
    line, account = out.splitlines()
    assert line.startswith(f"{'ws b':28}  unknown          aborted before an answer: the deadline ")
    assert without_times(account) == (
        "1 of 3 no longer running, 2 unconfirmed after 0.0 s: 1 stopped, 1 not_sent, 1 unknown"
    )
    assert err == "bctrl-async: error: ended early: the deadline of 50s has passed\n"
    assert code == 1


@pytest.mark.parametrize(
    ("signal_", "option"), [(signal.SIGINT, ()), (signal.SIGTERM, ("-o", "json"))]
)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
async def test_ctrl_c_waits_for_requests_in_flight_the_second_one_aborts_and_the_run_resumes(
    holding: HoldingEmulator,
    command: Command,
    tmp_path: Path,
    option: tuple[str, ...],
    signal_: signal.Signals,
    *,
    twice: bool,
) -> None:
    holding.add_runtime("ws", "d")
    holding.held.add("b")
    args: list[str | Path] = ["stop", "--journal", tmp_path / "journal", *option]
    args += ["--concurrency", "1", "ws", "a", "b", "c", "d"]
    process = await start(*program(), *args)
    await until(lambda: len(holding.requests) == 2)

    said = await begin_to_end(process, signal_)
    assert said == f"1 of 4 answered, 1 in flight, {NOTICE}, 1 stopped\n"
    if twice:
        process.send_signal(signal_)
    else:
        holding.held.clear()
    code, out, err = await finish(process)

    *summaries, hint = without_notices(err).splitlines()
    assert hint == "Run the same command again to resume"
    if option:
        outcomes = {str(outcome["alias"]): outcome for outcome in outcomes_of(out)}
        assert [outcomes[alias]["attempts"] for alias in "abcd"] == [1, 1, 0, 0]
        results = [str(outcomes[alias]["result"]) for alias in "abcd"]
    else:
        *lines, summary = out.splitlines()
        assert [line.split()[0] for line in lines] == ["a", "b", "c", "d"]
        results = [line.split()[1] for line in lines]
        summaries.append(summary)
    assert results == ["stopped", "unknown" if twice else "stopped", "not_sent", "not_sent"]
    account = (
        "1 of 4 no longer running, 3 unconfirmed: 1 stopped, 2 not_sent, 1 unknown"
        if twice
        else "2 of 4 no longer running, 2 unconfirmed: 2 stopped, 2 not_sent"
    )
    assert [re.sub(r" after .* s:", ":", line) for line in summaries] == [f"Interrupted: {account}"]
    assert (code, len(holding.requests)) == (130, 2)

    holding.held.clear()
    code, out, err = await command(*args)
    assert code == 0
    assert f"; {1 if twice else 2} from an earlier run, not sent again\n" in out + err
    assert [holding.received["ws", alias] for alias in "abcd"] == [1, 1 + twice, 1, 1]


async def test_ctrl_c_ends_the_wait_for_an_open_pipe(holding: HoldingEmulator) -> None:
    process = await start(*program(), "stop", "--from", "-", stdin=asyncio.subprocess.PIPE)
    write(process, "ws,a\n")
    await until(lambda: holding.status("ws", "a") == "stopped")
    process.send_signal(signal.SIGINT)
    code, out, err = await finish(process)
    assert without_times(out) == (
        "Interrupted: 1 of 1 no longer running after 0.0 s: 1 stopped; "
        "the input was not read to its end\n"
    )
    assert (code, without_notices(err)) == (130, "")


async def test_without_signal_handlers_cancellation_counts_as_an_interrupt(
    holding: HoldingEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    holding.held.add("a")
    shown: list[StopOutcome] = []

    async def stop() -> bool:
        async with BctrlSession(KEY, base_url=holding.url, max_connections=1) as session:
            batch = session.stop_runtimes([("ws", "a"), ("ws", "b")], on_outcome=shown.append)
            stopping = asyncio.create_task(run_with_progress(batch, Output()))
            await until(lambda: holding.requests)
            stopping.cancel()
            return await stopping

    assert await asyncio.to_thread(asyncio.run, stop())
    assert [outcome.result for outcome in shown] == [StopResult.UNKNOWN, StopResult.NOT_SENT]
    assert capfd.readouterr() == ("", "")


async def test_a_hangup_that_nohup_ignores_does_not_interrupt(holding: HoldingEmulator) -> None:
    holding.held.add("a")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        async with BctrlSession(KEY, base_url=holding.url) as session:
            batch = session.stop_runtimes([("ws", "a"), ("ws", "b")], concurrency=1)
            running = asyncio.create_task(run_with_progress(batch, Output()))
            await until(lambda: holding.requests)
            os.kill(os.getpid(), signal.SIGHUP)
            holding.held.clear()
            assert not await running
    finally:
        signal.signal(signal.SIGHUP, before)
    assert batch.report.counts == {StopResult.STOPPED: 2}


async def test_an_early_ctrl_c_on_a_terminal_announces_the_second_one_in_a_line(
    holding: HoldingEmulator,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Fault: the summary followed the ^C on its line."""
    monkeypatch.setattr("bctrl_async.cli._progress._SHOW_AFTER", 3600)
    holding.held.add("a")
    output = Output()
    monkeypatch.setattr(output, "progress_console", lambda: (output, True))
    async with BctrlSession(KEY, base_url=holding.url) as session:
        batch = session.stop_runtimes([("ws", "a"), ("ws", "b")], concurrency=1)
        running = asyncio.create_task(run_with_progress(batch, output))
        await until(lambda: holding.requests)
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: batch.ended_early)
        holding.held.clear()
        assert await running
    assert capfd.readouterr().err == f"0 of 2 answered, 1 in flight, {NOTICE}\n"
    assert batch.report.counts == {StopResult.STOPPED: 1, StopResult.NOT_SENT: 1}
