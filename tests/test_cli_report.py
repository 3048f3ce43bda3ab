"""The command `report`."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from io import FileIO, TextIOWrapper
from pathlib import Path

import pytest
from commands import outcomes_of
from helpers import Command
from journal_lines import entry_line, header_line

STARTED = datetime.now(UTC) - timedelta(hours=1)
LACKS = "A journal does not know which targets it lacks: add --from FILE\n"


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def outcome(
    alias: str, result: str = "stopped", after: float = 1.5, state: str = "unconfirmed"
) -> bytes:
    fields: dict[str, object] = {"result": result}
    if result in {"stopped", "already_stopped"}:
        state = "not_running"
    else:
        fields["error"] = {"type": "BctrlTimeoutError", "message": "no answer"}
    return entry_line(("ws", alias), STARTED + timedelta(seconds=after), state, **fields)


def journal(
    name: str, *lines: bytes, server: str = "https://api.test/v1", started: datetime = STARTED
) -> str:
    Path(name).write_bytes(b"".join((header_line(server, started), *lines)))
    return name


def targets(*aliases: str) -> str:
    Path("all.csv").write_text("".join(f"ws,{alias}\n" for alias in aliases), "utf-8")
    return "all.csv"


async def test_a_list_that_is_done_exits_with_0(command: Command) -> None:
    first = journal("1.jsonl", outcome("a"))
    second = journal("2.jsonl", outcome("b"), outcome("c", "already_stopped", 2))

    assert await command("report", first, second, "--from", targets("a", "b", "c")) == (
        0,
        "3 of 3 done, 0 pending: 2 stopped, 1 already_stopped\n",
        "",
    )


async def test_targets_that_may_be_running_have_a_line_and_fail(command: Command) -> None:
    results = ["stopped", "unknown", "rejected", "not_sent"]
    path = journal("1.jsonl", *(outcome(f"r{n}", result) for n, result in enumerate(results)))

    code, out, _ = await command("report", path, "--from", targets("r0", "r1", "r2", "r3"))
    *lines, summary = out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["ws", f"r{number}", result] for number, result in enumerate(results) if number
    ]
    assert summary == "1 of 4 done, 3 pending: 1 stopped, 1 rejected, 1 not_sent, 1 unknown"
    assert code == 1


async def test_targets_in_no_journal_are_counted_and_the_first_ones_named(
    command: Command,
) -> None:
    """Fault: a shard that was never started is missed, since its targets have no outcome."""
    path = journal("1.jsonl", outcome("done"))
    listed = targets("done", *(f"r{number}" for number in range(12)))
    code, out, err = await command("report", path, "--from", listed)

    first, others, summary = out.splitlines()
    assert first.split(maxsplit=3) == ["ws", "r0", "not_sent", "no journal has it"]
    assert others == "11 more not_sent (no journal has it): ws r1, ws r2, ws r3 and 8 more"
    assert summary == "1 of 13 done, 12 pending: 1 stopped, 12 not_sent"
    assert (code, err) == (1, "All of them: add -o json\n")


async def test_json_has_an_object_for_each_target_of_the_list(command: Command) -> None:
    """Fault: a target without an outcome that the list has twice was counted twice."""
    first = journal("1.jsonl", outcome("a"), outcome("b", "unknown"))
    second = journal("2.jsonl", outcome("a"), outcome("other"))
    listed = targets("missing", "b", "b", "missing", "a")
    code, out, err = await command("report", "-o", "json", first, second, "--from", listed)

    missing, unknown, stopped = outcomes_of(out)
    assert missing.keys() == unknown.keys() == stopped.keys()
    names = ("index", "alias", "result", "ok")
    assert [tuple(line[name] for name in names) for line in (missing, unknown, stopped)] == [
        (0, "missing", "not_sent", False),
        (1, "b", "unknown", False),
        (2, "a", "stopped", True),
    ]
    assert "Allow a longer timeout" in str(unknown["error"])
    assert err == (
        "2 duplicates in all.csv, counted once\n"
        "1 of 3 done, 2 pending: 1 stopped, 1 not_sent, 1 unknown\n"
    )
    assert code == 1


async def test_without_a_list_outcomes_are_counted_and_the_exit_code_is_1(
    command: Command,
) -> None:
    """No journal can show that there are no other targets, so that nothing claims it."""
    first, second = journal("1.jsonl", outcome("a")), journal("2.jsonl", outcome("b"))
    assert await command("report", first, second) == (
        *(1, "2 of 2 done, 0 pending: 2 stopped\n", LACKS),
    )
    code, out, _ = await command("report", first, second, "-o", "json")
    assert ([line["alias"] for line in outcomes_of(out)], code) == (["a", "b"], 1)


async def test_a_target_that_was_not_found_is_pending_unless_it_is_ignored(
    command: Command,
) -> None:
    path = journal("1.jsonl", outcome("a", "not_found"))
    args = ("report", path, "--from", targets("a"))
    code, out, _ = await command(*args)
    assert (code, out.splitlines()[-1]) == (1, "0 of 1 done, 1 pending: 1 not_found")
    assert await command(*args, "--ignore-not-found") == (
        *(0, "1 of 1 done, 0 pending: 1 not_found\n", ""),
    )


async def test_a_bad_line_of_the_list_is_not_done(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = journal("1.jsonl", *(outcome(f"r{number}") for number in range(100)))
    listed = targets(*(f"r{number}" for number in range(100)), *["<p>,x"] * 12)
    code, out, err = await command("report", path, "--from", listed)
    assert err.count("error: invalid target 'ws,<p>,x' on line ") == 10
    assert out == "100 of 112 done, 0 pending, 12 invalid: 100 stopped\n"
    assert code == 1

    # A pipe ends at the quote.
    listed = targets("r0", '"open', "lost")
    monkeypatch.setattr("bctrl_async.cli._targets.stat.S_IFMT", lambda _: stat.S_IFIFO)
    code, out, err = await command("report", path, "--from", listed)
    assert "on line 2 is not a target: a quote is missing" in err
    assert (code, out) == (1, "")


@pytest.mark.parametrize("command_line", ["report 1.jsonl", "stop --dry-run"])
async def test_a_pipe_that_cannot_be_read_to_its_end_exits_with_1(
    command: Command, monkeypatch: pytest.MonkeyPatch, command_line: str
) -> None:
    """Fault: a read error of stdin was reported as one of stdout."""
    journal("1.jsonl", outcome("a"))
    monkeypatch.setattr("bctrl_async.cli._targets.stat.S_IFMT", lambda _: stat.S_IFIFO)
    with FileIO(targets("a"), "w") as write_only:
        monkeypatch.setattr("sys.stdin", write_only)
        code, out, err = await command(*command_line.split(), "--from", "-")
    assert (code, out) == (1, "")
    assert err == "bctrl-async: error: cannot read all targets: Bad file descriptor\n"


async def test_an_empty_list_is_an_error_unless_allowed(command: Command) -> None:
    path = journal("1.jsonl")
    args = ("report", path, "--from", targets())
    code, _, err = await command(*args)
    assert (code, "there are no targets in all.csv. Add --allow-empty" in err) == (2, True)
    assert await command(*args, "--allow-empty") == (
        *(0, "0 of 0 done, 0 pending: no target\n", ""),
    )


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("1.jsonl", "--from", "1.jsonl"), "is not a target"),
        (("1.jsonl", "other.jsonl"), "it is of another server, https://other.test/v1"),
        (("1.jsonl", "--journal-max-age", "1s"), "old; the limit is 0:00:01"),
    ],
)
async def test_a_wrong_use_exits_with_2(
    command: Command, args: tuple[str, ...], reason: str
) -> None:
    journal("1.jsonl", outcome("a"))
    targets("a")
    journal("other.jsonl", server="https://other.test/v1")
    code, out, err = await command("report", *args)
    assert (code, out) == (2, "")
    assert reason in err
    assert err.count("\n") == 1


async def test_an_old_journal_is_a_warning(command: Command) -> None:
    """Fault: last week's journal said that all is done, while everything had been started anew."""
    old = datetime.now(UTC) - timedelta(days=8, minutes=1)
    path = journal("old.jsonl", outcome("a"), started=old)
    code, out, err = await command("report", path, "--from", targets("a"))
    assert err.startswith("bctrl-async: warning: the journal 'old.jsonl' is 8 days, 0:01:")
    assert err.endswith(" old, and runtimes started anew since then count as stopped\n")
    assert (code, out) == (0, "1 of 1 done, 0 pending: 1 stopped\n")


async def test_output_that_cannot_be_written_fails(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = journal("1.jsonl", outcome("a"))
    with TextIOWrapper(FileIO("/dev/full", "w")) as full:
        monkeypatch.setattr("sys.stdout", full)
        code, _, err = await command("report", path)
    assert code == 1
    assert "cannot write to stdout: No space left on device" in err
