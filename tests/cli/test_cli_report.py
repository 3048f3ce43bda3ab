"""The command `report`."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from io import FileIO
from pathlib import Path

import pytest
from commands import outcomes_of, save
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


def journal(name: str, *lines: bytes) -> str:
    Path(name).write_bytes(b"".join((header_line("https://api.test/v1", STARTED), *lines)))
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
    assert (code, err) == (1, "")


async def test_json_has_an_object_for_each_target_of_the_list(command: Command) -> None:
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


@pytest.mark.parametrize("args", ["report 1.jsonl", "stop --dry-run"])
@pytest.mark.parametrize(
    ("mode", "said"),
    [("r", "'ws,\"open' on line 2 is not a target"), ("w", "Bad file descriptor")],
)
async def test_nothing_is_printed_of_a_pipe_that_cannot_be_read_to_its_end(
    command: Command, monkeypatch: pytest.MonkeyPatch, args: str, mode: str, said: str
) -> None:
    """Fault: a read error of stdin was reported as one of stdout."""
    journal("1.jsonl", outcome("a"))
    listed = targets("a", '"open', "lost")
    monkeypatch.setattr("bctrl_async.cli._targets.stat.S_IFMT", lambda _: stat.S_IFIFO)
    with FileIO(listed, mode) as file:
        monkeypatch.setattr("sys.stdin", file)
        code, out, err = await command(*args.split(), "--from", "-")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"bctrl-async: error: cannot read all targets: {said}")


async def test_a_list_of_aliases_needs_their_workspace(command: Command) -> None:
    args = ("report", journal("1.jsonl", outcome("a")), "--from", "aliases")
    save("aliases", "a\n")
    assert (await command(*args, "--workspace", "ws"))[0] == 0
    assert (await command(*args))[0] == 2
