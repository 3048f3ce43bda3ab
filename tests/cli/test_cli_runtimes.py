"""The commands `list` and `get`, and `stop --all`: what they select, and its question."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
from commands import STOP_ALL, finish, outcomes_of, results_of, start_on_terminal
from helpers import BOUND, Command

from bctrl_async import BctrlSession
from bctrl_async.emulator import Emulator, Fault, Reply

ASKED = ("stdin", "stderr")
NEW, OLD, ENDED, ODD = "new", 'old; "one", [x]', "日本", " odd"


@pytest.fixture(autouse=True)
def _runtimes(emulator: Emulator, emulator_environment: None) -> None:
    del emulator_environment
    now = datetime.now(UTC)
    for alias, kind, status, age in (
        (NEW, "browser", "active", timedelta(hours=-1)),
        (OLD, "desktop", "active", timedelta(days=3)),
        (ENDED, "spreadsheet", "stopped", timedelta(hours=2, minutes=5)),
    ):
        created_at = (now - age).isoformat()
        emulator.add_runtime("ws", alias, kind=kind, status=status, created_at=created_at)
    emulator.add_runtime("ws", ODD, created_at="long ago")
    emulator.add_runtime("other", NEW)


def give_list(emulator: Emulator, *runtimes: Mapping[str, object]) -> None:
    """Let the next list have these runtimes."""
    emulator.inject(Reply(200, body={"runtimes": list(runtimes)}), method="GET")


# The commands list and get


async def test_a_long_cell_moves_its_row_and_no_other(command: Command, emulator: Emulator) -> None:
    """Fault: a status was cut, and another padded the whole table to a megabyte."""
    runtime = dict(emulator.runtimes["ws", ODD], alias="x" * 200)
    give_list(emulator, *(runtime | {"kind": kind} for kind in ("k", "k" * 40, "日" * 15)))
    _, out, _ = await command("list", "ws")
    assert [line.removeprefix("active  ") for line in out.splitlines()[1:]] == [
        f"k{' ' * 27}  ?    {'x' * 200}",
        f"{'k' * 40}  ?    {'x' * 200}",
        f"{'日' * 15}  ?    {'x' * 200}",
    ]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("", [NEW, OLD, ENDED, ODD]),
        ("--status any", [NEW, OLD, ENDED, ODD]),
        ("--status active", [NEW, OLD, ODD]),
        ("--kind browser --status active", [NEW, ODD]),
        ("--older-than 1.5d --kind desktop", [OLD]),
        ("--older-than 90000d --kind desktop", []),
        ("--alias *o*", [OLD, ODD]),
    ],
)
async def test_list_filters_runtimes_and_stop_reads_its_json(
    command: Command, tmp_path: Path, options: str, found: list[str]
) -> None:
    code, out, err = await command("list", "-o", "json", "ws", *options.split())
    assert [line["alias"] for line in outcomes_of(out)] == found
    assert (code, err) == (0, "")

    file = tmp_path / "found.jsonl"
    file.write_text(out, "ascii")
    _, out, _ = await command("stop", "--dry-run", "--allow-empty", "--from", file)
    assert outcomes_of(out) == [{"workspace_id": "ws", "alias": alias} for alias in found]


@pytest.mark.parametrize("args", ["list other", f"get other {NEW} {NEW}"])
async def test_json_keeps_the_field_names_of_the_api(
    command: Command, emulator: Emulator, args: str
) -> None:
    runtime = emulator.runtimes["other", NEW]
    _, out, _ = await command(*args.split(), "-o", "json")
    fields = {name: runtime[name] for name in ("alias", "status", "kind")}
    given = {"workspace_id": "other", "created_at": runtime["createdAt"]}
    assert outcomes_of(out) == [{**fields, **given, "runtime": runtime}]


# What stop --all stops


@pytest.mark.parametrize(
    ("filters", "fit"),
    [
        ("", {NEW, OLD, ODD}),
        ("--status any --older-than 2h --kind spreadsheet", {ENDED}),
        ("--alias [a-o]*", {NEW, OLD}),
    ],
)
async def test_all_stops_what_has_not_ended_and_matches(
    emulator: Emulator, command: Command, filters: str, fit: set[str]
) -> None:
    code, out, err = await command(*STOP_ALL, *filters.split())
    assert f"{len(fit)} of {len(fit)} no longer running" in out
    assert (code, err, {request.alias for request in emulator.stops}) == (0, "", fit)
    assert emulator.status("other", NEW) == "active"


@pytest.mark.parametrize("option", [(), ("--dry-run",)], ids=["run", "dry run"])
async def test_a_runtime_that_was_started_anew_is_stopped_again_with_the_same_journal(
    emulator: Emulator, command: Command, tmp_path: Path, option: tuple[str, ...]
) -> None:
    """Fault: a runtime that the list has as active was said to be stopped by an earlier run."""
    args = (*STOP_ALL, "--journal", tmp_path / "night.jsonl", "-o", "json")
    assert (await command(*args))[0] == 0
    emulator.add_runtime("ws", NEW)
    code, out, _ = await command(*args, *option)
    assert (code, [line["alias"] for line in outcomes_of(out)]) == (0, [NEW])


async def test_an_empty_selection_has_a_journal_too(command: Command, tmp_path: Path) -> None:
    """Fault: the report on all shards failed, because one had no journal."""
    path = tmp_path / "night.jsonl"
    code, out, _ = await command(*STOP_ALL, "--alias", "nosuch", "--journal", path)
    assert (code, out.startswith("0 of 0 no longer running"), path.exists()) == (0, True, True)


async def test_the_deadline_includes_the_listing(emulator: Emulator, command: Command) -> None:
    emulator.inject(Fault.HANG, method="GET")
    code, _, err = await command(*STOP_ALL, "--deadline", "200ms")
    assert "workspace 'ws' was not listed within the deadline of 200ms" in err
    assert (code, emulator.stops) == (1, [])


@pytest.mark.parametrize(("listing", "left"), [(10.0001, 50.0), (100.0, 0.001)])
async def test_the_stops_get_the_rest_of_the_deadline_and_name_the_whole(
    emulator: Emulator,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    *,
    listing: float,
    left: float,
) -> None:
    def stop(session: BctrlSession, items: object, *, deadline: float, **options: object) -> object:
        assert deadline == left
        return stop_runtimes(session, items, deadline=0.05, **options)  # type: ignore[arg-type]

    stop_runtimes = BctrlSession.stop_runtimes
    monkeypatch.setattr(BctrlSession, "stop_runtimes", stop)
    clock = Mock(monotonic=Mock(side_effect=[0.0, listing]))
    monkeypatch.setattr("bctrl_async.cli._stop.time", clock)
    emulator.inject(*[Fault.HANG] * 3)
    error = "bctrl-async: error: ended early: the deadline of 1m has passed\n"
    assert (await command(*STOP_ALL, "--deadline", "60s"))[::2] == (1, error)


@pytest.mark.parametrize("readable", [0, 1])
async def test_what_cannot_be_read_is_rejected_and_the_others_are_stopped(
    emulator: Emulator, command: Command, tmp_path: Path, readable: int
) -> None:
    """Fault: the summary and the journal of `stop --all` counted only those that were read."""
    runtime = dict(emulator.runtimes["ws", NEW])
    odd: list[Mapping[str, object]]
    odd = [{"alias": "odd"}, {**runtime, "alias": "null", "status": None}]
    listed, journal = [*odd, *[runtime] * readable], tmp_path / "run.jsonl"

    give_list(emulator, *listed)
    code, out, err = await command(*STOP_ALL, "--dry-run")
    assert (code, len(outcomes_of(out))) == (1, readable)
    assert "error: could not list 'odd': " in err
    assert f"Dry run: {readable} to stop, 2 invalid" in err

    give_list(emulator, *listed)
    process, terminal = await start_on_terminal("stop", "ws", "--all", streams=ASKED)
    if readable:
        await terminal.until(r"1 browser; 2 cannot be read\s+Stop 1 runtime\? ")
        os.write(terminal._master, b"n\n")
    # If nothing can be stopped, there is nothing to confirm.
    assert (await finish(process))[0] == 1
    await terminal.rest()

    give_list(emulator, *listed)
    code, out, _ = await command(*STOP_ALL, "--journal", journal, "-o", "json")
    assert (code, Counter(results_of(out))) == (1, Counter(rejected=2, stopped=readable))
    _, out, _ = await command("report", journal)
    assert f"{readable} of {readable + 2} done, 2 pending" in out


async def test_a_listed_alias_that_cannot_be_sent_is_no_usage_error(
    emulator: Emulator, command: Command
) -> None:
    give_list(emulator, dict(emulator.runtimes["ws", NEW], alias=".."))
    code, out, _ = await command(*STOP_ALL)
    assert (code, emulator.stops) == (1, [])
    assert "0 of 1 no longer running, 1 still running" in out


# The question of stop --all


@pytest.mark.parametrize(
    ("answer", "stops"),
    [("y", True), ("YES", True), ("", False), ("n", False), ("yess", False), ("\x04", False)],
)
async def test_all_asks_for_confirmation(emulator: Emulator, answer: str, *, stops: bool) -> None:
    process, terminal = await start_on_terminal("stop", "ws", "--all", streams=ASKED)
    await terminal.until(rf"In workspace ws at {emulator.url}/v1: 2 browser, 1 desktop\s+Stop")
    await terminal.until(r"Stop 3 runtimes\? \[y/N\] ")
    assert not emulator.stops
    os.write(terminal._master, f"{answer}\n".encode())
    code, out, _ = await finish(process)

    said = await terminal.rest()
    assert (code, len(emulator.stops)) == ((0, 3) if stops else (1, 0))
    assert ("3 of 3 no longer running" in out) is stops
    assert ("Nothing was stopped" in said) is not stops


async def test_ctrl_c_at_the_question_stops_nothing(emulator: Emulator) -> None:
    process, terminal = await start_on_terminal("stop", "ws", "--all", streams=ASKED)
    await terminal.until(r"Stop 3 runtimes\? ")
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
