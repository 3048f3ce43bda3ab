"""The command's journals: `stop --journal`, dry runs, and `report`."""

from __future__ import annotations

import errno
import os
import stat
from datetime import UTC, datetime
from io import FileIO
from itertools import count
from pathlib import Path

import pytest
from support.commands import (
    Command,
    finish,
    outcomes_of,
    save,
    start,
    without_times,
)
from support.journal_lines import entry_line, header_line
from support.warm_server import program

from bctrl_async.journal import Journal

NOW = datetime.now(UTC)
JOURNAL = Path("tonight.jsonl")


def content() -> bytes:
    return JOURNAL.read_bytes() if JOURNAL.exists() else b""


async def test_a_journal_in_use_exits_with_75(command: Command) -> None:
    """Fault: it is 2, and a supervisor gives up.

    For a while, a file server holds the lock of a client that died.
    """
    journal = Journal(JOURNAL, base_url=command.api.url)
    code, out, err = await command("stop", "--journal", JOURNAL, "ws", "a")
    assert err.startswith(
        f"bctrl-async: error: the journal '{JOURNAL}' is in use by another run. "
    )
    assert (code, out, err.count("\n")) == (75, "", 1)
    assert not command.api.requests
    code, _, err = await command("stop", "--dry-run", "--journal", JOURNAL, "ws", "a")
    journal.close()
    assert (code, err) == (0, "Dry run: 1 to stop, 0 invalid\n")


@pytest.mark.parametrize("has_entry", [True, False])
@pytest.mark.parametrize("torn", [b"", b'{"journal"'])
async def test_a_dry_run_only_reads(
    command: Command, torn: bytes, *, has_entry: bool
) -> None:
    """Fault: a dry run cut off the torn tail, or wrote a header."""
    args = ("stop", "--dry-run", "--journal", JOURNAL, "ws", "a", "b")
    assert len(outcomes_of((await command(*args))[1])) == 2
    assert not content()
    lines = header_line(f"{command.api.url}/v1", NOW) + entry_line(("ws", "a"), NOW)
    before = lines * has_entry + torn
    save(JOURNAL, before)
    code, out, err = await command(*args)
    assert [target["alias"] for target in outcomes_of(out)] == ["a", "b"][has_entry:]
    assert f"Dry run: {2 - has_entry} to stop, " in err
    assert ("1 no longer running" in err) is has_entry
    assert (code, content(), command.api.requests) == (0, before, [])


@pytest.mark.parametrize("fails_from", [1, 2])
@pytest.mark.parametrize("output_format", ["table", "json"])
async def test_a_journal_that_cannot_be_flushed_is_an_error_beside_the_summary(
    command: Command, output_format: str, fails_from: int
) -> None:
    """Fault: only the error was printed: the journal was flushed again."""
    flushes = count(1)

    def fail(_: int) -> None:
        if next(flushes) >= fails_from:
            raise OSError(errno.ENOSPC, "No space left on device")

    command.patch.setattr("os.fsync", fail)
    command.api.add_runtime("ws", "a")
    args = ("stop", "--journal", JOURNAL, "-o", output_format, "ws", "a")
    code, out, err = await command(*args)

    assert (code, err.count("No space left on device")) == (1, 1)
    assert "1 of 1 no longer running" in out + err


def link_journal() -> None:
    Path("link").symlink_to(JOURNAL)


@pytest.mark.parametrize("flag", [os.O_APPEND, os.O_TRUNC], ids=[">>", ">"])
@pytest.mark.parametrize(
    ("args", "option"),
    [
        (("stop", "--journal", JOURNAL, "-o", "json", "ws", "c"), "--journal"),
        (("stop", "--dry-run", "--journal", "link", "ws", "c"), "--journal"),
        (("stop", "--from", JOURNAL), "--from"),
        (("report", JOURNAL), "JOURNAL"),
    ],
)
@pytest.mark.parametrize("outputs", [("stdout",), ("stderr",), ("stdout", "stderr")])
async def test_a_file_that_the_command_uses_is_never_written_to_as_its_output(
    command: Command,
    args: tuple[str | Path, ...],
    option: str,
    outputs: tuple[str, ...],
    flag: int,
) -> None:
    """Fault: outcomes stood among the entries, and the exit code was 0."""
    write_journal()
    link_journal()
    before = content() if flag is os.O_APPEND else b""
    file = os.open(JOURNAL, os.O_WRONLY | flag)
    process = await start(*program(), *args, **dict.fromkeys(outputs, file))
    os.close(file)
    code, out, err = await finish(process)

    assert (code, content(), command.api.requests) == (2, before, [])
    redirect = f"redirect {outputs[0]} to another file\n"
    printed = out + err
    if len(outputs) == 1:
        assert printed.startswith(f"bctrl-async: error: invalid value for {option}: ")
        assert printed.endswith(redirect)
    else:
        assert not printed


@pytest.mark.usefixtures("command")
async def test_input_and_output_may_be_the_same_device() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    args = ("--from", os.devnull, "--allow-empty")
    process = await start(*program(), "stop", *args, stdout=null)
    os.close(null)
    assert (await finish(process))[0] == 0


# The command report


def write_journal() -> None:
    """Write the journal of a run in which `a` was stopped and `b` not answered."""
    error = {"type": "BctrlTimeoutError", "message": "no answer"}
    unknown = entry_line(("ws", "b"), NOW, running=None, result="unknown", error=error)
    save(
        JOURNAL,
        header_line("https://api.test/v1", NOW)
        + entry_line(("ws", "a"), NOW)
        + unknown,
    )


async def test_the_json_of_a_report_has_a_line_for_each_target(
    command: Command,
) -> None:
    write_journal()
    save("all.csv", "ws,missing\nws,b\nws,a\n")
    code, out, err = await command("report", "-o", "json", JOURNAL, "--from", "all.csv")

    outcomes = outcomes_of(out)
    assert [
        (each["index"], each["alias"], each["result"], each["ok"]) for each in outcomes
    ] == [
        (0, "missing", "unknown", False),
        (1, "b", "unknown", False),
        (2, "a", "stopped", True),
    ]
    assert len({tuple(each) for each in outcomes}) == 1
    assert "Allow a longer timeout" in str(outcomes[1]["error"])
    assert (code, err) == (1, "1 of 3 done, 2 pending: 1 stopped, 2 unknown\n")


async def test_a_report_accepts_what_was_not_found_and_nothing_else(
    command: Command,
) -> None:
    missing = entry_line(("ws", "a"), NOW, running=None, result="not_found")
    accepted = entry_line(("ws", "b"), NOW, running=None, result="accepted", error=None)
    save(JOURNAL, header_line("https://api.test/v1", NOW) + missing + accepted)
    save("all.csv", "ws,a\nws,b\n")
    code, out, _ = await command(
        "report", JOURNAL, "--from", "all.csv", "--ignore-not-found"
    )
    outcome, account = without_times(out).splitlines()
    assert (code, outcome.split()) == (1, ["ws", "b", "accepted", "0.0", "s"])
    assert account == "1 of 2 done, 1 pending: 1 accepted, 1 not_found"


async def test_outcomes_without_a_reason_are_not_confirmed(command: Command) -> None:
    fields: dict[str, object] = {"result": "accepted", "error": None}
    lines = [entry_line(("ws", alias), NOW, running=None, **fields) for alias in "ab"]
    save(JOURNAL, header_line("https://api.test/v1", NOW) + b"".join(lines))
    _, out, _ = await command("report", JOURNAL)
    assert "1 more accepted (not confirmed): ws b\n" in out


@pytest.mark.parametrize("args", ["report tonight.jsonl", "stop --dry-run"])
@pytest.mark.parametrize(
    ("mode", "said"),
    [("r", "'ws,\"open' on line 2 is not a target"), ("w", "Bad file descriptor")],
)
async def test_half_a_pipe_prints_nothing(
    command: Command, args: str, mode: str, said: str
) -> None:
    """Fault: a read error of stdin was reported as one of stdout."""
    write_journal()
    save("all.csv", 'ws,a\nws,"open\nws,lost\n')
    command.patch.setattr(
        "bctrl_async.cli._targets.stat.S_IFMT", lambda _: stat.S_IFIFO
    )
    with FileIO("all.csv", mode) as file:
        command.patch.setattr("sys.stdin", file)
        code, out, err = await command(*args.split(), "--from", "-")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"bctrl-async: error: cannot read all targets: {said}")
