"""The command `report`."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from io import FileIO, TextIOWrapper
from pathlib import Path

import pytest
from conftest import KEY
from helpers import Command
from msgspec.structs import replace
from runtimes import runtime

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlNotFoundError,
    BctrlTimeoutError,
    RuntimeRef,
    StopOutcome,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.journal._format import Mark, entry_line, header_line, mark_line

STARTED = datetime(2026, 11, 24, 2, 30, tzinfo=UTC)
INCOMPLETE = "Their runs go on, ended early or had failures; repeat each with its whole input"


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def outcome(alias: str, result: StopResult = StopResult.STOPPED, after: float = 1.5) -> StopOutcome:
    error: BctrlError | None = None
    if result is StopResult.NOT_FOUND:
        error = BctrlNotFoundError("no such alias", code="runtime.not_found")
    elif not result.settled:
        error = BctrlTimeoutError("no answer", may_have_stopped=result is StopResult.UNKNOWN)
    return StopOutcome(
        index=0,
        target=RuntimeRef("ws", alias),
        result=result,
        error=error,
        at=STARTED + timedelta(seconds=after),
        attempts=int(result is not StopResult.NOT_SENT),
        elapsed=0.25,
    )


def journal(
    name: str,
    *outcomes: StopOutcome,
    complete: bool = True,
    shard: tuple[int, int] | None = None,
) -> str:
    lines = [header_line("https://api.test/v1", STARTED), *map(entry_line, outcomes)]
    lines += [mark_line(Mark(STARTED, shard))] if complete else []
    Path(name).write_bytes(b"".join(lines))
    return name


def targets(*aliases: str) -> str:
    Path("all.csv").write_text("".join(f"ws,{alias}\n" for alias in aliases), "utf-8")
    return "all.csv"


def objects(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


async def test_a_list_that_is_stopped_exits_with_0(command: Command) -> None:
    first = journal("1.jsonl", outcome("a"))
    second = journal("2.jsonl", outcome("b"), outcome("c", StopResult.ALREADY_STOPPED, 2))

    assert await command("report", first, second, "--from", targets("a", "b", "c")) == (
        0,
        (
            "3 of 3 no longer running after 2.00 s: 2 stopped, 1 already_stopped; "
            "2 journals, no target in two of them\n"
        ),
        "",
    )


async def test_targets_that_may_be_running_have_a_line_and_fail(command: Command) -> None:
    results = [StopResult.STOPPED, StopResult.UNKNOWN, StopResult.REJECTED, StopResult.NOT_SENT]
    path = journal("1.jsonl", *(outcome(f"r{n}", result) for n, result in enumerate(results)))

    code, out, _ = await command("report", path, "--from", targets("r0", "r1", "r2", "r3"))
    lines = [line.split() for line in out.splitlines()]
    assert [line[:3] for line in lines[:-1]] == [["ws", "r1", "unknown"], ["ws", "r2", "rejected"]]
    assert out.splitlines()[-1] == (
        "1 of 4 no longer running, 3 unconfirmed after 1.50 s: "
        "1 stopped, 1 rejected, 1 not_sent, 1 unknown; 1 journal"
    )
    assert code == 1


async def test_targets_without_an_outcome_are_counted_and_the_first_ten_shown(
    command: Command,
) -> None:
    """Fault: a shard that was never started is missed, since its targets have no outcome."""
    path = journal("1.jsonl", outcome("done"))
    code, out, err = await command(
        "report", path, "--from", targets("done", *(f"r{number}" for number in range(12)))
    )

    *lines, summary = out.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["ws", f"r{number}", "no", "outcome"] for number in range(10)
    ]
    assert summary.startswith(
        "1 of 13 no longer running after 1.50 s: 1 stopped; 12 without an outcome"
    )
    assert err == "2 more targets without an outcome are not shown: add -o json\n"
    assert code == 1


async def test_outcomes_of_other_targets_do_not_count_but_are_named(command: Command) -> None:
    path = journal("1.jsonl", *map(outcome, "abcde"))

    assert await command("report", path, "--from", targets("a")) == (
        0,
        "1 of 1 no longer running after 1.50 s: 1 stopped; 1 journal\n",
        "bctrl-async: warning: 4 outcomes not in the list: ws b, ws c, ws d and 1 more\n",
    )


async def test_a_target_in_two_journals_counts_once_and_is_named(command: Command) -> None:
    first = journal("1.jsonl", outcome("a", StopResult.UNKNOWN), outcome("b"))
    second = journal("2.jsonl", outcome("a"))

    assert await command("report", first, second, "--from", targets("a", "b")) == (
        0,
        "2 of 2 no longer running after 1.50 s: 2 stopped; 2 journals, 1 target in two of them\n",
        "bctrl-async: warning: 1 target in two journals: ws a (the first in 1.jsonl and 2.jsonl)\n",
    )


async def test_json_has_one_object_for_each_target(command: Command) -> None:
    """Fault: a target without an outcome that the list has twice is printed and counted twice."""
    first = journal("1.jsonl", outcome("a"), outcome("b", StopResult.UNKNOWN))
    second = journal("2.jsonl", outcome("a"), outcome("other"))
    code, out, err = await command(
        "report",
        "-o",
        "json",
        first,
        second,
        "--from",
        targets("missing", "b", "b", "missing", "a"),
    )

    found = objects(out)
    assert [(line["index"], line["alias"], line["result"], line["journals"]) for line in found] == [
        (0, "missing", None, []),
        (1, "b", "unknown", ["1.jsonl"]),
        (4, "a", "stopped", ["1.jsonl", "2.jsonl"]),
        (None, "other", "stopped", ["2.jsonl"]),
    ]
    assert len({tuple(line) for line in found}) == 1
    assert found[1]["error"] == {
        "type": "BctrlTimeoutError",
        "message": "stop of 'b' in workspace 'ws': no answer (the runtime may have stopped). "
        "Allow a longer timeout; retrying is safe",
        "status": None,
        "code": None,
        "request_id": None,
        "may_have_stopped": True,
    }
    assert err.splitlines()[-1] == (
        "1 of 3 no longer running, 1 unconfirmed after 1.50 s: 1 stopped, 1 unknown; "
        "1 without an outcome; 2 duplicates in the list; 2 journals, 1 target in two of them"
    )
    assert code == 1


async def test_without_a_list_every_outcome_counts_and_journals_must_be_complete(
    command: Command,
) -> None:
    first, second = journal("1.jsonl", outcome("a")), journal("2.jsonl", outcome("b"))
    summary = (
        "2 of 2 no longer running after 1.50 s: 2 stopped; 2 journals, no target in two of them\n"
    )
    assert await command("report", first, second) == (0, summary, "")

    journal("2.jsonl", outcome("b"), complete=False)
    assert await command("report", first, second) == (
        1,
        summary,
        f"bctrl-async: warning: 1 of 2 journals are not complete: '2.jsonl'. {INCOMPLETE}\n",
    )
    # A list shows that there are no other targets.
    assert (await command("report", first, second, "--from", targets("a", "b")))[0] == 0

    code, out, _ = await command("report", first, second, "-o", "json")
    assert [(line["index"], line["alias"]) for line in objects(out)] == [(None, "a"), (None, "b")]
    assert code == 1


async def test_without_a_list_no_shard_may_be_missing(command: Command) -> None:
    """Fault: a job that never ran goes unnoticed."""
    first = journal("1.jsonl", outcome("a"), shard=(1, 2))
    code, out, err = await command("report", first)
    assert (code, out.split(" after ")[0]) == (1, "1 of 1 no longer running")
    assert err == (
        "bctrl-async: warning: no journal is of shard 2/2. Add the missing journals, or stop these "
        "shards\n"
    )
    second = journal("2.jsonl", shard=(2, 2))
    code, _, err = await command("report", first, second)
    assert (code, err) == (0, "")


async def test_a_target_that_was_not_found_fails_unless_it_is_ignored(command: Command) -> None:
    path = journal("1.jsonl", outcome("a", StopResult.NOT_FOUND))
    args = ("report", path, "--from", targets("a"))

    code, _, err = await command(*args)
    assert code == 1
    assert "1 of 1 targets not found: check the workspace ids" in err
    assert await command(*args, "--ignore-not-found") == (
        0,
        "1 of 1 no longer running after 1.50 s: 1 not_found; 1 journal\n",
        "",
    )


@pytest.mark.parametrize(
    ("status", "code", "state"),
    [
        ("failed", 0, "1 of 1 no longer running"),
        ("active", 1, "0 of 1 no longer running, 1 still running"),
    ],
)
async def test_an_accepted_stop_counts_as_in_the_run(
    command: Command, status: str, code: int, state: str
) -> None:
    """Fault: every shard ends with 0, and the report with 1."""
    accepted = replace(outcome("a", StopResult.ACCEPTED), runtime=runtime(status))
    path = journal("1.jsonl", accepted)

    found = await command("report", path, "--from", targets("a"))
    assert found[0] == code
    assert found[1].splitlines()[-1].startswith(state)


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        ("active", "1 still running", "it still ran"),
        ("stopping", "1 unconfirmed", "it may have run"),
    ],
)
async def test_one_that_ran_after_it_was_stopped_says_what_to_do(
    command: Command, status: str, state: str, reason: str
) -> None:
    """Fault: the advice was shown nowhere."""
    first = journal("1.jsonl", outcome("a"))
    accepted = replace(outcome("a", StopResult.ACCEPTED, 2), runtime=runtime(status))
    second = journal("2.jsonl", accepted)

    code, out, _ = await command("report", first, second)
    line, summary = out.splitlines()
    detail = (
        f"status {status} ({state[2:]}), {reason} after another journal has it as no longer "
        "running. Stop it again, with a new journal"
    )
    assert line.split(maxsplit=3) == [
        "ws",
        "a",
        "accepted",
        detail,
    ]
    assert summary.startswith(f"0 of 1 no longer running, {state} after 2.00 s: 1 accepted; ")
    assert code == 1


@pytest.mark.parametrize("reply", [Reply(403), Fault.BAD_GATEWAY])
async def test_one_that_a_later_run_lists_as_active_and_cannot_stop_still_runs(
    command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, reply: Fault | Reply
) -> None:
    """Fault: that run ended with 1, and the report of both nights with 0."""
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
    emulator.add_runtime("ws", "a")
    stop = ("stop", "ws", "--all", "--yes", "--no-verify", "--attempts", "1", "--journal")
    assert (await command(*stop, "1.jsonl"))[0] == 0

    emulator.runtimes["ws", "a"]["status"] = "active"
    emulator.inject(reply)
    assert (await command(*stop, "2.jsonl"))[0] == 1
    for journals in (["1.jsonl", "2.jsonl"], ["2.jsonl", "1.jsonl"]):
        code, out, _ = await command("report", *journals, "--from", targets("a"))
        assert out.splitlines()[-1].startswith("0 of 1 no longer running, 1 still running")
        assert code == 1


async def test_a_bad_line_of_the_list_is_matched_with_its_outcome(
    command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
    aliases = [f"r{number}" for number in range(100)]
    for alias in aliases:
        emulator.add_runtime("ws", alias)
    # After the quote, nothing is read.
    listed = targets(*aliases, "<p>,x", 'more\n"ws,open', "lost")
    for number in (1, 2):
        args = ("--shard", f"{number}/2", "--journal", f"{number}.jsonl")
        assert (await command("stop", "--from", listed, *args))[0] == 1

    code, out, _ = await command("report", "1.jsonl", "2.jsonl", "--from", listed)
    assert "invalid target 'ws,<p>,x' on line 101: it has more columns" in out
    assert "100 of 103 no longer running, 1 unconfirmed, 2 invalid after " in out
    assert "; the input was not read to its end; 2 journals, no target in two of them" in out
    assert code == 1


async def test_many_invalid_targets_are_counted(command: Command) -> None:
    invalid = BctrlConfigError("invalid target", reason_class="invalid_input")
    names = [RuntimeRef("", f"x{number}") for number in range(12)]
    rejected = [
        StopOutcome(index=0, target=name, result=StopResult.REJECTED, error=invalid, at=STARTED)
        for name in names
    ]
    code, out, err = await command("report", journal("1.jsonl", *rejected))
    assert (code, out.count("\n")) == (1, 11)
    assert err == "2 more invalid targets are not shown\n"


async def test_the_list_may_come_from_stdin(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = journal("1.jsonl", outcome("a"))
    with FileIO(targets("a", "b")) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        code, out, _ = await command("report", path, "--from", "-")
    assert code == 1
    assert out.splitlines()[-1].startswith("1 of 2 no longer running after ")


@pytest.mark.parametrize("command_line", ["report 1.jsonl", "stop --dry-run"])
async def test_a_list_that_cannot_be_read_to_its_end_exits_with_1(
    command: Command, monkeypatch: pytest.MonkeyPatch, command_line: str
) -> None:
    """Fault: a read error of stdin was reported as one of stdout."""
    journal("1.jsonl", outcome("a"))
    with FileIO(targets("a"), "w") as write_only:
        monkeypatch.setattr("sys.stdin", write_only)
        code, out, err = await command(*command_line.split(), "--from", "-")
    assert (code, out) == (1, "")
    assert err == "bctrl-async: error: cannot read all targets: Bad file descriptor\n"


@pytest.mark.parametrize("command_line", ["report 1.jsonl", "stop --dry-run"])
async def test_a_list_that_changes_while_it_is_read_exits_with_1(
    command: Command, monkeypatch: pytest.MonkeyPatch, command_line: str
) -> None:
    journal("1.jsonl", outcome("a"))
    path = Path(targets("a", "b"))
    # After it was counted.
    check_length = "bctrl_async.cli._targets._Preview.check_length"
    monkeypatch.setattr(check_length, lambda *_: path.write_text(""))
    code, out, err = await command(*command_line.split(), "--from", path)
    assert (code, out) == (1, "")
    assert err == (
        "bctrl-async: error: cannot read all targets: the file has changed since the run began\n"
    )


async def test_an_empty_list_is_an_error_unless_allowed(command: Command) -> None:
    path = journal("1.jsonl")
    args = ("report", path, "--from", targets())
    code, _, err = await command(*args)
    assert (code, "there are no targets in all.csv. Add --allow-empty" in err) == (2, True)
    assert await command(*args, "--allow-empty") == (
        0,
        "0 of 0 no longer running after 0.00 s; 1 journal\n",
        "",
    )


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((), "Missing argument 'JOURNAL'"),
        (("1.jsonl", "--allow-empty"), "--allow-empty needs --from"),
        (("1.jsonl", "--from", "a", "--from", "b"), "--from takes one FILE"),
        (
            ("1.jsonl", "--journal-max-age", "1h", "--journal-max-age", "2h"),
            "--journal-max-age takes one AGE",
        ),
        (("1.jsonl", "--from", "gone.csv"), "cannot read gone.csv: No such file or directory"),
        (("gone.jsonl",), "the journal 'gone.jsonl' cannot be read: No such file or directory"),
        (("all.csv",), "the journal 'all.csv' cannot be read: it is not a journal"),
        (("1.jsonl", "--from", "1.jsonl"), "is not a target"),
        (("1.jsonl", "other.jsonl"), "the journals are of two servers"),
        (("1.jsonl", "--journal-max-age", "1s"), "it was begun "),
    ],
)
async def test_a_wrong_use_exits_with_2(
    command: Command, args: tuple[str, ...], reason: str
) -> None:
    journal("1.jsonl", outcome("a"))
    targets("a")
    _write_other()
    code, out, err = await command("report", *args)
    assert (code, out) == (2, "")
    assert reason in err
    assert err.count("\n") == 1


def _write_other() -> None:
    Path("other.jsonl").write_bytes(header_line("https://other.test/v1", STARTED))


async def test_output_that_cannot_be_written_fails(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = journal("1.jsonl", outcome("a"))
    with TextIOWrapper(FileIO("/dev/full", "w")) as full:
        monkeypatch.setattr("sys.stdout", full)
        code, _, err = await command("report", path)
    assert code == 1
    assert "cannot write to stdout: No space left on device" in err
