"""`stop --all`: which runtimes it stops, its question, its deadline and what cannot be read."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
from commands import (
    STOP_ALL,
    finish,
    outcomes_of,
    results_of,
    start,
    start_on_terminal,
    without_times,
)
from helpers import BOUND, Command, HoldingEmulator
from servers import http_answer, raw_server
from warm_server import program

from bctrl_async import BctrlSession
from bctrl_async.emulator import Emulator, Fault, Reply

ASKED = ("stdin", "stderr")


@pytest.fixture(autouse=True)
def emulator(holding: HoldingEmulator) -> HoldingEmulator:
    """The emulator with three active browsers, and three other runtimes."""
    holding.add_runtime("ws", "sheet", kind="spreadsheet")
    holding.add_runtime("ws", "done", status="stopped")
    holding.add_runtime("ws", "failed", kind="desktop", status="failed")
    return holding


def stopped_in(emulator: Emulator) -> set[str | None]:
    return {request.alias for request in emulator.stops}


async def test_all_stops_active_runtimes_only(emulator: HoldingEmulator, command: Command) -> None:
    emulator.add_runtime("other", "a")
    code, out, err = await command(*STOP_ALL)
    assert without_times(out) == "4 of 4 no longer running after 0.0 s: 4 stopped\n"
    assert (code, err, stopped_in(emulator)) == (0, "", {"a", "b", "c", "sheet"})
    assert emulator.status("other", "a") == "active"


@pytest.mark.parametrize(
    ("filters", "fit"),
    [
        ("--kind browser --status any --older-than 2h", {"a", "b", "c", "done"}),
        ("--alias [b-s]*", {"b", "c", "sheet"}),
    ],
)
async def test_all_stops_runtimes_that_match_the_filters(
    emulator: HoldingEmulator, command: Command, filters: str, fit: set[str]
) -> None:
    code, out, _ = await command(*STOP_ALL, "-o", "json", *filters.split())
    assert results_of(out).count("already_stopped") == ("done" in fit)
    assert (code, stopped_in(emulator)) == (0, fit)


async def test_a_runtime_that_was_started_anew_is_stopped_again_with_the_same_journal(
    emulator: HoldingEmulator, command: Command, tmp_path: Path
) -> None:
    """Fault: a runtime that the list has as active was said to be stopped by an earlier run."""
    journal = ("--journal", tmp_path / "night.jsonl")
    assert (await command(*STOP_ALL, *journal))[0] == 0
    emulator.add_runtime("ws", "a")
    _, out, err = await command(*STOP_ALL, "--dry-run", *journal)
    assert [line["alias"] for line in outcomes_of(out)] == ["a"]
    assert err == "Dry run: 1 to stop, 0 invalid\n"
    code, out, err = await command(*STOP_ALL, *journal)
    assert without_times(out) == "1 of 1 no longer running after 0.0 s: 1 stopped\n"
    assert (code, err, emulator.status("ws", "a")) == (0, "", "stopped")


# The deadline


async def test_the_deadline_includes_the_listing(
    emulator: HoldingEmulator, command: Command
) -> None:
    emulator.inject(Fault.HANG, method="GET")
    code, _, err = await command(*STOP_ALL, "--deadline", "200ms")
    assert "workspace 'ws' was not listed within the deadline of 200ms" in err
    assert code == 1


@pytest.mark.parametrize(("listing", "left"), [(10.0001, 50.0), (100.0, 0.001)])
async def test_the_stops_get_the_rest_of_the_deadline_and_name_the_whole(
    emulator: HoldingEmulator,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    listing: float,
    left: float,
) -> None:
    stop_runtimes, deadlines = BctrlSession.stop_runtimes, []

    def stop(session: BctrlSession, items: object, *, deadline: float, **options: object) -> object:
        deadlines.append(deadline)
        return stop_runtimes(session, items, deadline=0.05, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(BctrlSession, "stop_runtimes", stop)
    clock = iter((0.0, listing))
    monkeypatch.setattr("bctrl_async.cli._stop.time", Mock(monotonic=lambda: next(clock)))
    emulator.held.update(("a", "b", "c", "sheet"))
    code, out, err = await command(*STOP_ALL, "--deadline", "60s")
    assert "the deadline of 1m has passed" in err
    # Some may not have been sent.
    counts = re.findall(r"(\d+) (?:not_sent|unknown)(?:,|$)", out.splitlines()[-1])
    assert (code, deadlines, sum(map(int, counts))) == (1, [left], 4)


# The question


@pytest.mark.parametrize("redirect", ["</dev/null", "<&-"])
async def test_a_missing_terminal_is_detected_before_anything_is_sent(
    emulator: HoldingEmulator, redirect: str
) -> None:
    line = f"exec {shlex.join(program())} stop ws --all {redirect}"
    code, out, err = await finish(await start("sh", "-c", line))
    assert "cannot ask for confirmation without a terminal: add --yes" in err
    assert (code, out, emulator.requests) == (2, "", [])


@pytest.mark.parametrize(
    ("answer", "stops"),
    [("y", True), ("YES", True), ("", False), ("n", False), ("yess", False), ("\x04", False)],
)
async def test_all_asks_for_confirmation(
    emulator: HoldingEmulator, answer: str, *, stops: bool
) -> None:
    process, terminal = await start_on_terminal("stop", "ws", "--all", streams=ASKED)
    await terminal.until(rf"In workspace ws at {emulator.url}/v1: 3 browser, 1 spreadsheet\s+Stop")
    await terminal.until(r"Stop 4 runtimes\? \[y/N\] ")
    assert not emulator.stops
    os.write(terminal._master, f"{answer}\n".encode())
    code, out, _ = await finish(process)

    said = await terminal.rest()
    assert code == (0 if stops else 1)
    assert without_times(out) == "4 of 4 no longer running after 0.0 s: 4 stopped\n" * stops
    assert ("Nothing was stopped" in said) is not stops
    assert len(stopped_in(emulator)) == 4 * stops


async def test_ctrl_c_at_the_question_stops_nothing(emulator: HoldingEmulator) -> None:
    emulator.add_runtime("one", "a")
    process, terminal = await start_on_terminal("stop", "one", "--all", streams=ASKED)
    await terminal.until(r"Stop 1 runtime\? ")
    async with asyncio.timeout(BOUND):
        while process.returncode is None:
            process.send_signal(signal.SIGINT)
            # Python does not see one that comes just before the system call that reads.
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5)
    code, out, _ = await finish(process)
    said = await terminal.rest()
    assert (code, out, emulator.stops) == (130, "", [])
    assert "Traceback" not in said
    # Fault: it was not said of a Ctrl-C that came just after the question.
    assert "Nothing was stopped" in said


# Runtimes that cannot be read


@pytest.mark.parametrize("count", [0, 1])
async def test_unreadable_runtimes_are_rejected_and_the_others_are_stopped(
    emulator: HoldingEmulator,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    count: int,
) -> None:
    """Fault: the summary and the journal of `stop --all` counted only those that were read."""
    runtime = dict(emulator.runtimes["ws", "a"])
    odd = [{"alias": "odd"}, {**runtime, "alias": "null", "status": None}]
    listed = json.dumps({"runtimes": odd + [runtime] * count}).encode()
    stopped = json.dumps({**runtime, "status": "stopped"}).encode()

    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(http_answer("200 OK", listed if head.startswith(b"GET") else stopped))

    async with raw_server(handle) as url:
        monkeypatch.setenv("BCTRL_BASE_URL", url)
        code, _, err = await command("list", "ws")
        assert (code, "error: could not list 'odd': " in err) == (1, True)

        code, out, err = await command(*STOP_ALL, "--dry-run")
        assert (code, len(outcomes_of(out))) == (1, count)
        assert "error: could not list 'odd': " in err
        assert f"Dry run: {count} to stop, 2 invalid" in err

        code, out, _ = await command(*STOP_ALL)
        assert f"{count} of {count + 2} no longer running, 2 unconfirmed" in out
        assert ("ws odd " in out, code) == (True, 1)

        journal = tmp_path / "run.jsonl"
        code, out, _ = await command(*STOP_ALL, "--journal", journal, "-o", "json")
        assert Counter(results_of(out)) == Counter(rejected=2, stopped=count)
        assert code == 1

        process, terminal = await start_on_terminal("stop", "ws", "--all", streams=ASKED)
        if count:
            await terminal.until(r"1 browser; 2 cannot be read\s+Stop 1 runtime\? ")
            os.write(terminal._master, b"y\n")
        # Without any that can be stopped, there is nothing to confirm.
        assert (await finish(process))[0] == 1
        await terminal.rest()
    code, out, _ = await command("report", journal)
    assert (f"{count} of {count + 2} done, 2 pending" in out, code) == (True, 1)


async def test_a_listed_alias_that_cannot_be_sent_is_no_usage_error(
    emulator: HoldingEmulator, command: Command
) -> None:
    listed = {"runtimes": [dict(emulator.runtimes["ws", "a"]) | {"alias": ".."}]}
    emulator.inject(Reply(200, body=listed), method="GET")
    code, out, err = await command(*STOP_ALL)
    assert (code, emulator.stops) == (1, []), err
    assert "0 of 1 no longer running, 1 still running" in out
