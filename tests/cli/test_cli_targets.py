"""Targets that `--from` reads, from files, pipes and terminals, and their shards."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import tables
from support.commands import (
    Command,
    Terminal,
    close_stdin,
    outcomes_of,
    save,
    start,
    stop_piped,
    without_times,
    write,
)
from support.helpers import until
from support.warm_server import program

from bctrl_async import BctrlError
from bctrl_async.cli import _lines, _targets
from bctrl_async.cli._lines import MAX_LINE, BadLine, Item, LineParser
from bctrl_async.cli._targets import WHOLE
from bctrl_async.shards import shard_of

INPUTS = Path(__file__).with_name("inputs.jsonl").read_text("utf-8").splitlines()
"""The targets of each input, and its invalid lines with their reasons."""
MANY = "".join(f"ws,x{number}\n" for number in range(100))
"""As many lines as are checked before the first request."""
BAD_QUOTES = (
    "a quote is missing, or a cell has several lines: export the two columns only"
)
READ_ERROR = "bctrl-async: error: cannot read all targets: "

# What an input gives


def gives(data: bytes, workspace: str | None = None) -> list[list[str] | str]:
    """Return the items of a file; a fault after which nothing is read is the last."""
    file, parser = io.BytesIO(data), LineParser(workspace)
    items: list[Item] = []
    try:
        while line := file.readline(MAX_LINE + 1):
            items += parser.parse(line)
        items += parser.parse(b"")
    except BadLine as bad:
        return [*map(plain, items), ended_by(bad)]
    return [*map(plain, items)]


async def gives_as_a_pipe(data: bytes) -> list[list[str] | str]:
    reader, writer = os.pipe()
    writing = asyncio.create_task(asyncio.to_thread(write_all, writer, data))
    items = _targets._read_pipe(
        reader, "the pipe", LineParser(), WHOLE, allow_empty=True
    )
    found: list[list[str] | str] = []
    try:
        async for item in items:
            found.append(plain(item))  # noqa: PERF401 - an error ends the loop.
    except BctrlError as error:
        found.append(ended_by(error.__cause__))
    os.close(reader)
    await writing
    return found


def write_all(file: int, data: bytes) -> None:
    with suppress(BrokenPipeError), os.fdopen(file, "wb") as opened:
        opened.write(data)


def plain(item: Item) -> list[str] | str:
    return f"{item!r}: {item}" if isinstance(item, BadLine) else list(item)


def ended_by(bad: BaseException | None) -> str:
    return f"{bad!r}: {bad}; nothing after it was read"


def input_of(row: dict[str, object]) -> bytes:
    """Return an input of the table, in which a text that is repeated is a pair."""
    text = row["input"]
    if isinstance(text, list):
        text = "".join(part * times for part, times in text)
    return str(text).encode(errors="surrogateescape")


@pytest.mark.parametrize("line", INPUTS)
def test_what_each_input_gives(line: str) -> None:
    row = json.loads(line)
    assert gives(input_of(row)) == row["gives"]


@pytest.mark.parametrize(
    "header",
    [
        "alias,created_at",
        "Name;Host",
        "alias\tname",
        "created_at,alias,note",
        'note,"alias,",name',
    ],
)
def test_with_a_workspace_a_header_needs_no_workspace_column(header: str) -> None:
    """Fault: the same as JSON was read."""
    row = re.sub("alias|Name|name", "crm", header)
    assert gives(f"{header}\n{row}\n".encode(), "demo") == [["demo", "crm"]]
    [fault] = gives(f"{header}\n{row}\n".encode())
    assert "the header has no column workspace_id" in fault


@pytest.mark.parametrize("line", ["demo,name", "other,alias", "created_at;alias"])
def test_a_header_without_a_workspace_column_is_never_a_pair(line: str) -> None:
    """The runtime `name` would be left out, and its neighbours taken for others."""
    [fault] = gives(f"{line}\nother,crm\n".encode(), "demo")
    assert "it is a pair, or a header without workspace_id: put alias first" in fault


@pytest.mark.parametrize("chunk", [1, 7, 65536])
async def test_a_pipe_gives_the_same_in_any_parts(command: Command, chunk: int) -> None:
    command.patch.setattr(_targets, "_CHUNK", chunk)
    for row in map(json.loads, INPUTS):
        if len(data := input_of(row)) <= chunk * 500:
            assert await gives_as_a_pipe(data) == row["gives"]


def test_no_decoy_of_a_random_table_is_stopped_and_nothing_is_lost_silently() -> None:
    """Fault: reading on after an odd quote stopped runtimes that only a note named."""
    assert [
        found for seed in range(1000) if (found := tables.check(seed)[0]).isupper()
    ] == []


async def test_a_document_may_be_on_one_long_line() -> None:
    values = [["ws", f"{'é' * 1000}{number}"] for number in range(600)]
    data = f"\ufeff\n{json.dumps(values, ensure_ascii=False)}".encode()
    assert len(data) > MAX_LINE
    assert gives(data) == await gives_as_a_pipe(data) == values


async def test_a_document_that_is_too_large_is_not_read(command: Command) -> None:
    command.patch.setattr(_lines, "MAX_DOCUMENT", 100)
    data = b"[" + b'["ws", "a"],\n' * 100
    (bad,) = gives(data)
    assert str(bad).endswith(
        'or ≤ 64 MiB of […] or {"runtimes": […]}; nothing after it was read'
    )
    assert await gives_as_a_pipe(data) == [bad]


# Lines that are not targets


async def test_a_fault_ends_a_pipe_whose_earlier_targets_are_stopped(
    command: Command,
) -> None:
    text = MANY + "nonsense\n" * 20 + 'ws,"open\nws,decoy\n'
    code, out, err = await stop_piped(text, "--ignore-not-found", "-o", "json")
    assert (
        f"""{READ_ERROR}'ws,"open' on line 121 is not a target: {BAD_QUOTES}\n""" in err
    )
    assert "100 of 120 no longer running, 20 unconfirmed after " in err
    assert "; the input was not read to its end\n" in err
    assert (code, len(outcomes_of(out))) == (1, 120)
    assert {alias for _, alias in command.api.received} == {
        f"x{number}" for number in range(100)
    }


CUT = "bctrl-async: warning: stdin ended within {!r}, which may be cut off\n"


@pytest.mark.parametrize(
    ("text", "options", "line"),
    [
        ("ws,a\nws,b", (), "ws,b"),
        ("alias\na\nb", ("-w", "ws"), "b"),
        ("ws,a\nws,b\n", (), None),
        # JSON that is cut off cannot be read, which is an error.
        ('["ws", "a"]\n["ws", "b"]', (), None),
        ('[\n["ws", "a"],\n{"workspace": "ws", "alias": "b"}\n]', (), None),
    ],
)
async def test_a_line_that_may_be_cut_off_is_sent_with_a_warning(
    command: Command, text: str, options: tuple[str, ...], line: str | None
) -> None:
    """Fault: a writer killed within runtime-10 had runtime-1 stopped in silence."""
    code, _, err = await stop_piped(text, *options)
    assert (code, err) == (0, "" if line is None else CUT.format(line))
    assert command.api.received == {("ws", "a"): 1, ("ws", "b"): 1}
    # A file is whole, and often has no last newline.
    save("whole", text)
    assert (await command("stop", *options, "--from", "whole"))[2] == ""


async def test_a_skipped_line_that_may_be_an_alias_is_warned_of(
    command: Command,
) -> None:
    """Fault: the runtime named like the column was left out in silence."""
    save("names", "name\na\nname\nb\n")
    save("pairs", "workspace,name\nws,a\nworkspace,name\nws,b\n")

    warning = "bctrl-async: warning: line 3 is skipped: it repeats the header\n"
    assert (await command("stop", "-w", "ws", "--from", "names"))[2] == warning
    assert (await command("stop", "--from", "pairs", "--ignore-not-found"))[2] == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
            "it has a control character, or was not saved as UTF-8",
        ),
        # It is the hundredth item.
        (
            f"{MANY[:-7]}\n# x\nnonsense\n".encode(),
            "'nonsense' on line 102 is not a target",
        ),
    ],
)
async def test_other_files_are_refused_whole(
    command: Command, content: bytes, reason: str
) -> None:
    """Fault: `--from` with an image printed each line, and sent some."""
    save("targets", content)
    code, out, err = await command("stop", "--from", "targets")
    assert reason in err
    assert err.count("\n") == err.count("None of it was used") == 1
    assert (code, out, command.api.requests) == (2, "", [])


@pytest.mark.parametrize(
    ("content", "args"),
    [
        ("<!DOCTYPE html>\nws,a\n", ("--dry-run",)),
        # With a workspace, any text on a line could be an alias.
        ("PNG\x1a\na\n", ("ws",)),
    ],
)
async def test_other_pipes_are_refused_at_their_first_line(
    command: Command, content: str, args: tuple[str, ...]
) -> None:
    code, out, err = await stop_piped(content, *args)
    assert err.startswith("bctrl-async: error: stdin: '")
    assert "' on line 1 is not a target: " in err
    assert (code, out, err.count("\n"), command.api.requests) == (2, "", 1, [])


@pytest.mark.usefixtures("holding")
async def test_an_empty_pipe_exits_with_2_unless_allowed() -> None:
    """Fault: a pipe whose writer had failed before its first line was a success."""
    error = "there are no targets in stdin. Add --allow-empty if that may be so"
    assert await stop_piped("workspace,alias\n") == (
        2,
        "",
        f"bctrl-async: error: {error}\n",
    )
    code, out, _ = await stop_piped("", "--allow-empty")
    assert (code, without_times(out)) == (0, "0 of 0 no longer running after 0.0 s\n")


# The workspace of aliases


@pytest.mark.parametrize(
    ("variable", "args", "text"),
    [
        *[("", "ws a b", ""), ("ws", "ws a b", ""), ("ws", "-w ws a b", "")],
        *[("other", "-w ws a b", ""), ("", "a --workspace ws b", "")],
        ("other", "-w ws --from targets", "a\nb\n"),
        ("other", "ws --from targets", "Alias\na\n\n# note\nb\n"),
        ("ws", "--from targets", '{"alias": "a"}\n["ws", "b"]'),
        # The variable says only where aliases are.
        ("other", "--from targets", "ws,a\nws,b\n"),
    ],
)
async def test_aliases_are_of_the_workspace_of_a_word_an_option_a_line_or_the_variable(
    command: Command, variable: str, args: str, text: str
) -> None:
    command.setenv(BCTRL_WORKSPACE=variable)
    save("targets", text)
    code, out, _ = await command("stop", *args.split())
    assert (code, "2 of 2 no longer running" in out) == (0, True)
    assert command.api.received == {("ws", "a"): 1, ("ws", "b"): 1}


@pytest.mark.parametrize("args", ["a", "ws a", "-w ws a"])
async def test_a_single_word_is_an_alias_of_the_default_workspace(
    command: Command, args: str
) -> None:
    """Fault: it was taken for a workspace, and nothing was there to stop."""
    command.setenv(BCTRL_WORKSPACE="ws")
    assert (await command("get", *args.split()))[0] == 0
    assert (await command("stop", *args.split()))[0] == 0
    assert command.api.received == {("ws", "a"): 1}


async def test_names_that_may_be_of_two_workspaces_are_refused(
    command: Command,
) -> None:
    """Fault: the first of the aliases was taken for their workspace."""
    command.setenv(BCTRL_WORKSPACE="ws")
    words = "a 'b c' ddddddddd ddddddddd ddddddddd …"
    code, out, err = await command("get", "a", "b c", *["d" * 9] * 99)
    assert err == (
        "bctrl-async: error: 'a' may be a workspace, or an alias of 'ws', the default. "
        f"Run get -w ws {words}, or get -w {words}\n"
    )
    assert (code, out, command.api.requests) == (2, "", [])


@pytest.mark.parametrize("args", ["list", "doctor"])
async def test_other_commands_have_the_same_option(command: Command, args: str) -> None:
    command.setenv(BCTRL_WORKSPACE="nosuch")
    for workspace in ("ws", "-w ws", "--workspace ws", "--workspace=ws"):
        code, out, err = await command(args, *workspace.split())
        assert (code, "3 runtimes" in out + err) == (0, True)


# Files, pipes and terminals


@pytest.mark.parametrize("name", ["stdin", "./stdin", "./-"])
async def test_only_a_dash_is_stdin(command: Command, name: str) -> None:
    (command.folder / name).write_text("ws,of-the-file\n")
    _, out, _ = await stop_piped("ws,of-stdin\n", "--dry-run", source=name)
    assert json.loads(out)["alias"] == "of-the-file"


async def test_a_line_of_a_slow_pipe_is_stopped_before_the_next_arrives(
    command: Command,
) -> None:
    """Fault: a pipe was read to its end if a folder was named `-`."""
    (command.folder / "-").mkdir()

    def is_stopped(alias: str) -> bool:
        return command.api.status("ws", alias) == "stopped"

    process = await start(
        *program(), "stop", "-q", "--from", "-", stdin=asyncio.subprocess.PIPE
    )
    for alias in "abc":
        write(process, f"ws,{alias}\n")
        await until(partial(is_stopped, alias))
    assert process.returncode is None
    assert await close_stdin(process) == (0, "", "")


async def test_targets_can_be_typed_without_a_progress_drawn_over_them(
    command: Command,
) -> None:
    command.setenv(TERM="xterm")
    command.patch.setattr("bctrl_async.cli._progress._SHOW_AFTER", 0)
    terminal = Terminal()
    for name in ("stdin", "stdout", "stderr"):
        command.patch.setattr(f"sys.{name}", terminal.stream())
    running = asyncio.create_task(command("stop", "--from", "-"))
    await terminal.until(
        "Reading targets from the terminal, a line each; end with Ctrl-D\n"
    )
    os.write(terminal._master, b"ws,a\n")
    await until(lambda: command.api.status("ws", "a") == "stopped")
    os.write(terminal._master, b"ws,b\n\x04")
    assert (await running)[0] == 0
    assert without_times(await terminal.rest()) == (
        "Reading targets from the terminal, a line each; end with Ctrl-D\n"
        "ws,a\nws,b\n"
        "2 of 2 no longer running after 0.0 s: 2 stopped\n"
    )


# Shards

SHARDS = ("1/4", "2/4", "3/4", "4/4")
ALIASES = [f"r{number}" for number in range(120)]
LIST = "".join(f"ws,{alias}\n" for alias in ALIASES)
"""More than the targets that are checked before the first request."""


def aliases_of(shard: str) -> list[str]:
    return [alias for alias in ALIASES if shard_of(("ws", alias), 4) == int(shard[0])]


async def test_the_shards_of_a_file_together_give_each_line_one_outcome(
    command: Command,
) -> None:
    for alias in ALIASES:
        command.api.add_runtime("ws", alias)
    save("targets", f"{LIST}<p>\n")
    rejected = 0
    for shard in SHARDS:
        code, out, _ = await command(
            "stop", "--from", "targets", "--shard", shard, "-o", "json"
        )
        outcomes = outcomes_of(out)
        stopped = [
            str(each["alias"]) for each in outcomes if each["result"] == "stopped"
        ]
        assert sorted(stopped) == sorted(aliases_of(shard))
        assert {each["index"] for each in outcomes} == {*range(len(outcomes))}
        assert code == len(outcomes) - len(stopped)
        rejected += code
    assert rejected == 1
    assert {command.api.received["ws", alias] for alias in ALIASES} == {1}


async def test_a_pipe_and_aliases_are_divided_as_a_file(command: Command) -> None:
    save("targets", LIST)
    args = ("--shard", "2/4", "--dry-run", "-o", "json")
    for given in (("--from", "targets"), ("ws", *ALIASES)):
        code, out, _ = await command("stop", *given, *args)
        assert (code, [each["alias"] for each in outcomes_of(out)]) == (
            0,
            aliases_of("2/4"),
        )
    assert (await stop_piped(LIST, *args))[:2] == (0, out)
