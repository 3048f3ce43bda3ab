"""The progress of `stop` on a terminal, and beside it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from commands import NOTICE, Terminal, finish, start, until, without_times, write
from helpers import BOUND, Command, HoldingEmulator
from warm_server import program

from bctrl_async.cli._output import Output

ONE_AT_A_TIME = ("stop", "--concurrency", "1", "ws", "a", "b", "c")


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


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
    terminal = Terminal()
    files = dict.fromkeys(("stdout", "stderr"), terminal.fd)
    process = await start(*program(), *ONE_AT_A_TIME, **files)
    await terminal.until_drawn("a  stopped .*\n1 of 3 ━.{72}\n1 in flight\n1 stopped")

    holding.held.clear()
    await terminal.rest()

    assert [without_times(line) for line in terminal.screen] == [
        "a  stopped          0.0 s",
        "b  stopped          0.0 s",
        "c  stopped          0.0 s",
        "3 of 3 no longer running after 0.0 s: 3 stopped",
    ]
    async with asyncio.timeout(BOUND):
        assert await process.wait() == 0


async def test_quiet_draws_no_progress(holding: HoldingEmulator, tmp_path: Path) -> None:
    holding.held.add("a")
    terminal = Terminal()
    results = tmp_path / "results"
    with results.open("wb") as file:
        files = {"stdout": file.fileno(), "stderr": terminal.fd}
        process = await start(*program(), "stop", "-q", "-o", "json", "ws", "a", "b", **files)
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
    assert holding.status("ws", "a") == "stopped"


async def test_nothing_is_drawn_beside_a_pipe_for_the_results(holding: HoldingEmulator) -> None:
    """Fault: what `| jq` printed on the same terminal was erased when progress was drawn anew."""
    holding.held.add("a")
    terminal = Terminal()
    process = await start(*program(), "stop", "-o", "json", "ws", "a", stderr=terminal.fd)
    await until(lambda: holding.received["ws", "a"])
    process.send_signal(signal.SIGINT)
    await terminal.until(NOTICE)
    holding.held.clear()
    code, out, _ = await finish(process)
    assert (json.loads(out)["result"], code) == ("stopped", 130)
    assert "\x1b" not in await terminal.rest()
    line, _ = terminal.text.splitlines()
    assert line.startswith("0 of 1 sent, 1 in flight")


def test_progress_is_drawn_on_a_terminal_if_stdout_is_no_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(Terminal().fd, "w") as stderr, os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr("sys.stderr", stderr)
        for stdout in (None, pipe):
            monkeypatch.setattr("sys.stdout", stdout)
            output = Output()
            assert output.progress_console()[1] is (stdout is None)
            output.file.close()


async def test_ctrl_c_on_a_terminal_announces_the_second_one_and_keeps_the_summary_intact(
    holding: HoldingEmulator,
) -> None:
    holding.held.add("a")
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
