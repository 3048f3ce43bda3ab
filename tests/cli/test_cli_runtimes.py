"""The commands `list` and `get`, and `stop --all`: selection and question."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from unittest.mock import Mock
from uuid import uuid4

import pytest
from support.commands import (
    Command,
    finish,
    outcomes_of,
    results_of,
    start,
    start_on_terminal,
)
from support.helpers import BOUND
from support.warm_server import program

from bctrl_async.emulator import Emulator, Fault, Reply

STOP_ALL = ("stop", "mixed", "--all", "--yes")
ASKED = ("stdin", "stderr")
NEW, OLD, ENDED, ODD = "new", 'old; "one", [x]', "日本", " odd"


@pytest.fixture(autouse=True)
def _runtimes(holding: Emulator) -> None:
    now = datetime.now(UTC)
    for alias, kind, status, age in (
        (NEW, "browser", "active", timedelta(hours=-1)),
        (OLD, "desktop", "active", timedelta(days=3)),
        (ENDED, "spreadsheet", "stopped", timedelta(hours=2, minutes=5)),
    ):
        created_at = (now - age).isoformat()
        holding.add_runtime(
            "mixed", alias, kind=kind, status=status, created_at=created_at
        )
    holding.add_runtime("mixed", ODD, created_at="long ago")


def give_list(emulator: Emulator, *runtimes: Mapping[str, object]) -> None:
    """Let the next list have these runtimes."""
    emulator.inject(Reply(200, body={"runtimes": list(runtimes)}), method="GET")


# The commands list and get


async def test_a_long_cell_moves_its_row_and_no_other(command: Command) -> None:
    """Fault: a status was cut, and another padded the whole table to a megabyte."""
    runtime = dict(command.api.runtimes["mixed", ODD], alias="x" * 200)
    give_list(
        command.api, *(runtime | {"kind": kind} for kind in ("k", "k" * 40, "日" * 15))
    )
    _, out, _ = await command("list", "mixed")
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
async def test_stop_reads_json_of_a_list(
    command: Command, options: str, found: list[str]
) -> None:
    code, out, err = await command("list", "-o", "json", "mixed", *options.split())
    assert [line["alias"] for line in outcomes_of(out)] == found
    assert (code, err) == (0, "")

    file = command.folder / "found.jsonl"
    file.write_text(out, "ascii")
    _, out, _ = await command("stop", "--dry-run", "--allow-empty", "--from", file)
    assert outcomes_of(out) == [
        {"workspace_id": "mixed", "alias": alias} for alias in found
    ]


@pytest.mark.parametrize("args", ["list mixed --alias new", "get mixed new new"])
async def test_json_keeps_the_field_names_of_the_api(
    command: Command, args: str
) -> None:
    runtime = command.api.runtimes["mixed", NEW]
    _, out, _ = await command(*args.split(), "-o", "json")
    fields = {name: runtime[name] for name in ("alias", "status", "kind")}
    given = {"workspace_id": "mixed", "created_at": runtime["createdAt"]}
    assert outcomes_of(out) == [{**fields, **given, "runtime": runtime}]


async def test_a_pipe_has_no_count_among_its_rows(command: Command) -> None:
    """Fault: `list | head` had the count above or between the rows."""
    code, out, err = await finish(await start(*program(), "list", "mixed"))
    assert (code, out.count("\n"), err) == (0, 5, "")
    pipeline = f"{shlex.join(program())} list mixed | :"  # The reader leaves at once.
    assert (await finish(await start("sh", "-c", pipeline)))[2] == ""
    assert (await command("list", "mixed"))[2] == "4 runtimes\n"


# What stop --all stops


@pytest.mark.parametrize(
    ("filters", "fit"),
    [
        ("", {NEW, OLD, ODD}),
        ("--status any --older-than 2h --kind spreadsheet", {ENDED}),
        ("--alias [a-o]*", {NEW, OLD}),
    ],
)
async def test_all_stops_what_matches(
    command: Command, filters: str, fit: set[str]
) -> None:
    code, out, err = await command(*STOP_ALL, *filters.split())
    assert f"{len(fit)} of {len(fit)} no longer running" in out
    assert (code, err, {request.alias for request in command.api.stops}) == (0, "", fit)
    assert command.api.status("ws", "a") == "active"


async def test_all_names_the_first_that_have_started_since(command: Command) -> None:
    """Fault: "a, b, …. Run the same command" left open how many were not named."""
    new = dict(command.api.runtimes["mixed", NEW])
    later = [{**new, "alias": f"later-{n}", "id": str(uuid4())} for n in range(12)]
    give_list(command.api, new)
    give_list(command.api, *later)
    _, _, err = await command(*STOP_ALL)

    names = ", ".join(f"later-{n}" for n in range(10))
    assert f"not stopped: {names} and 2 more. Run the same command again" in err


@pytest.mark.parametrize("output", ["table", "json"])
async def test_all_tells_what_has_started_since(command: Command, output: str) -> None:
    new = dict(command.api.runtimes["mixed", NEW])
    give_list(command.api, new)
    give_list(command.api, {**new, "alias": "later", "id": str(uuid4())})
    code, out, err = await command(*STOP_ALL, "-o", output)

    assert code == 0
    summary = out if output == "table" else err
    assert "1 of 1 no longer running" in summary
    assert "; 1 started since\n" in summary
    assert "Started since, and not stopped: later. Run the same command again" in err
    if output == "json":
        told = outcomes_of(out)[-1]
        assert (told["alias"], told["started_since"]) == ("later", True)
        # Fault: the line had the workspace's UUID, which `--from` took for another.
        assert told["workspace_id"] == "mixed" != new["workspaceId"]


async def test_a_shard_tells_of_its_own_part_alone(command: Command) -> None:
    new = dict(command.api.runtimes["mixed", NEW])
    later = [
        {**new, "alias": f"later-{number}", "id": str(uuid4())} for number in range(40)
    ]
    told = 0
    for number in (1, 2):
        give_list(command.api, new, {**new, "alias": "b", "id": str(uuid4())})
        give_list(command.api, *later)
        _, out, _ = await command(*STOP_ALL, "-o", "json", "--shard", f"{number}/2")
        told += sum("started_since" in line for line in outcomes_of(out))
    assert told == 40


@pytest.mark.parametrize("option", [(), ("--dry-run",)], ids=["run", "dry run"])
async def test_a_journal_does_not_keep_a_runtime_from_being_stopped_again(
    command: Command, option: tuple[str, ...]
) -> None:
    """Fault: a listed, active runtime counted as stopped by an earlier run."""
    args = (*STOP_ALL, "--journal", command.folder / "night.jsonl", "-o", "json")
    assert (await command(*args))[0] == 0
    command.api.add_runtime("mixed", NEW)
    code, out, _ = await command(*args, *option)
    assert (code, [line["alias"] for line in outcomes_of(out)]) == (0, [NEW])


@pytest.mark.parametrize("left_out", ["--alias=old*", "--alias=x", "--shard=2/3"])
async def test_the_list_corrects_a_journal_whatever_a_filter_leaves_out(
    command: Command, left_out: str
) -> None:
    """Fault: it did not, so `report` and the next `stop` called it stopped."""
    journal = ("--journal", command.folder / "night.jsonl")
    assert (await command("stop", *journal, "mixed", NEW))[0] == 0
    command.api.add_runtime("mixed", NEW)

    assert (await command(*STOP_ALL, *journal, left_out))[0] == 0
    assert command.api.status("mixed", NEW) == "active"

    await command("stop", *journal, "mixed", NEW)
    assert command.api.status("mixed", NEW) == "stopped"


async def test_an_empty_selection_has_a_journal_too(command: Command) -> None:
    """Fault: the report on all shards failed, because one had no journal."""
    path = command.folder / "night.jsonl"
    code, out, _ = await command(*STOP_ALL, "--alias", "nosuch", "--journal", path)
    assert (code, out.startswith("0 of 0 no longer running"), path.exists()) == (
        0,
        True,
        True,
    )


async def test_the_deadline_includes_the_listing(command: Command) -> None:
    command.api.inject(Fault.HANG, method="GET")
    code, _, err = await command(*STOP_ALL, "--deadline", "200ms")
    assert "workspace 'mixed' was not listed within the deadline of 200ms" in err
    assert (code, command.api.stops) == (1, [])


@pytest.mark.parametrize("listing", [59.9, 100.0])
async def test_stops_get_the_time_left(command: Command, listing: float) -> None:
    clock = Mock(monotonic=Mock(side_effect=[0.0, listing]))
    command.patch.setattr("bctrl_async.cli._list.time", clock)
    command.api.inject(*[Fault.HANG] * 3)
    error = "bctrl-async: error: ended early: the deadline of 1m has passed\n"
    async with asyncio.timeout(BOUND):
        code, _, err = await command(*STOP_ALL, "--deadline", "60s")
    assert (code, err) == (1, error)


async def test_a_last_look_that_the_deadline_ends_says_so(command: Command) -> None:
    """Fault: it named the seconds that the first list had left, such as 14.7s."""
    command.api.inject(Fault.LATENCY, Fault.HANG, method="GET")
    words = (*STOP_ALL, "--alias", NEW, "--deadline", "1s", "--quiet")
    code, out, _ = await command(*words)
    reason = "aborted before an answer because the deadline of 1s has passed"
    assert code == 0
    assert f"; nobody knows what has started since ({reason})" in out


@pytest.mark.parametrize("readable", [0, 1])
async def test_what_cannot_be_read_is_rejected_and_counted(
    command: Command, readable: int
) -> None:
    """Fault: summary and journal of `stop --all` counted only what was read."""
    runtime = dict(command.api.runtimes["mixed", NEW])
    odd: list[Mapping[str, object]]
    odd = [{"alias": "odd"}, {**runtime, "alias": "null", "status": None}]
    listed, journal = [*odd, *[runtime] * readable], command.folder / "run.jsonl"

    give_list(command.api, *listed)
    code, out, err = await command(*STOP_ALL, "--dry-run")
    assert (code, len(outcomes_of(out))) == (1, readable)
    assert "error: could not list 'odd': " in err
    assert f"Dry run: {readable} to stop, 2 invalid" in err

    give_list(command.api, *listed)
    process, terminal = await start_on_terminal("stop", "mixed", "--all", streams=ASKED)
    if readable:
        await terminal.until(r"1 browser; 2 cannot be read\s+Stop 1 runtime\? ")
        os.write(terminal._master, b"n\n")
    # If nothing can be stopped, there is nothing to confirm.
    assert (await finish(process))[0] == 1
    await terminal.rest()

    give_list(command.api, *listed)
    give_list(command.api)  # The last look finds nothing.
    code, out, _ = await command(*STOP_ALL, "--journal", journal, "-o", "json")
    assert (code, Counter(results_of(out))) == (
        1,
        Counter(rejected=2, stopped=readable),
    )
    _, out, _ = await command("report", journal)
    assert f"{readable} of {readable + 2} done, 2 pending" in out


async def test_a_listed_alias_that_cannot_be_sent_is_no_usage_error(
    command: Command,
) -> None:
    give_list(command.api, dict(command.api.runtimes["mixed", NEW], alias=".."))
    code, out, _ = await command(*STOP_ALL)
    assert (code, command.api.stops) == (1, [])
    assert "0 of 1 no longer running, 1 still running" in out


# The question of stop --all


@pytest.mark.parametrize(
    ("answer", "stops"),
    [
        ("y", True),
        ("YES", True),
        ("", False),
        ("n", False),
        ("yess", False),
        ("\x04", False),
    ],
)
async def test_all_asks_for_confirmation(
    command: Command, answer: str, *, stops: bool
) -> None:
    process, terminal = await start_on_terminal("stop", "mixed", "--all", streams=ASKED)
    await terminal.until(
        rf"In workspace mixed at {command.api.url}/v1: 2 browser, 1 desktop\s+Stop"
    )
    await terminal.until(r"Stop 3 runtimes\? \[y/N\] ")
    assert not command.api.stops
    os.write(terminal._master, f"{answer}\n".encode())
    code, out, _ = await finish(process)

    said = await terminal.rest()
    assert (code, len(command.api.stops)) == ((0, 3) if stops else (1, 0))
    assert ("3 of 3 no longer running" in out) is stops
    assert ("Nothing was stopped" in said) is not stops


async def test_ctrl_c_at_the_question_stops_nothing(command: Command) -> None:
    process, terminal = await start_on_terminal("stop", "mixed", "--all", streams=ASKED)
    await terminal.until(r"Stop 3 runtimes\? ")
    async with asyncio.timeout(BOUND):
        while process.returncode is None:
            process.send_signal(signal.SIGINT)
            # Python does not see a signal that comes just before the system call that
            # reads.
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5)
    code, out, _ = await finish(process)
    said = await terminal.rest()
    assert (code, out, command.api.stops) == (130, "", [])
    assert "Traceback" not in said
    # Fault: it was not said of a Ctrl-C that came just after the question.
    assert "Nothing was stopped" in said
