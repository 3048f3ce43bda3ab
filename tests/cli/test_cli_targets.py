"""Targets that the command reads with `--from`: CSV, JSON, files, pipes and terminals."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import stat
from contextlib import suppress
from io import FileIO
from pathlib import Path

import pytest
import tables
from commands import (
    close_stdin,
    finish,
    outcomes_of,
    save,
    start,
    start_on_terminal,
    stop_piped,
    without_times,
    write,
)
from helpers import Command, HoldingEmulator, until
from hypothesis import given
from hypothesis import strategies as st
from warm_server import program

from bctrl_async import BctrlError
from bctrl_async.cli import _lines, _targets
from bctrl_async.cli._lines import MAX_LINE, BadLine, Item, LineParser
from bctrl_async.cli._targets import WHOLE

INPUTS = Path(__file__).with_name("inputs.jsonl").read_text("utf-8").splitlines()
"""What each input gives: targets, and lines that are none with their reasons."""
MANY = "".join(f"ws,x{number}\n" for number in range(100))
"""As many lines as are checked before the first request."""
BAD_QUOTES = "a quote is missing, or a cell has several lines: export the two columns only"
READ_ERROR = "bctrl-async: error: cannot read all targets: "

# What an input gives


def gives(data: bytes) -> list[list[str] | str]:
    """Return the items of a file; a fault after which nothing is read is the last."""
    file, parser = io.BytesIO(data), LineParser()
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
    items = _targets._read_pipe(reader, "the pipe", LineParser(), WHOLE, allow_empty=True)
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


@pytest.mark.parametrize("chunk", [1, 7, 65536])
async def test_a_pipe_gives_the_same_in_whatever_parts_it_arrives(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(_targets, "_CHUNK", chunk)
    for row in map(json.loads, INPUTS):
        if len(data := input_of(row)) <= chunk * 500:
            assert await gives_as_a_pipe(data) == row["gives"]


def test_no_decoy_of_a_random_table_is_stopped_and_nothing_is_lost_silently() -> None:
    """Fault: reading on after an odd quote stopped runtimes that only a note named."""
    assert [found for seed in range(1000) if (found := tables.check(seed)[0]).isupper()] == []


names = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=6)


@given(
    st.data(),
    st.lists(st.tuples(names, names)),
    st.sampled_from("\t,;"),
    st.permutations(["Alias", "note", "workspace_id"]),
)
def test_any_name_is_read_from_csv(
    data: st.DataObject, targets: list[tuple[str, str]], delimiter: str, header: list[str]
) -> None:
    file = io.StringIO()
    rows = csv.DictWriter(file, header, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    rows.writeheader()
    for workspace, alias in targets:
        note = data.draw(st.sampled_from(["", '"', f"ws{delimiter}a"]))
        rows.writerow({"workspace_id": workspace, "Alias": alias, "note": note})
    assert gives(file.getvalue().encode()) == [*map(list, targets)]


async def test_a_document_may_be_on_one_long_line() -> None:
    values = [["ws", f"{'é' * 1000}{number}"] for number in range(600)]
    data = f"\ufeff\n{json.dumps(values, ensure_ascii=False)}".encode()
    assert len(data) > MAX_LINE
    assert gives(data) == await gives_as_a_pipe(data) == values


async def test_a_document_that_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lines, "MAX_DOCUMENT", 100)
    data = b"[" + b'["ws", "a"],\n' * 100
    (bad,) = gives(data)
    assert str(bad).endswith('or ≤ 64 MiB of […] or {"runtimes": […]}; nothing after it was read')
    assert await gives_as_a_pipe(data) == [bad]


# Lines that are not targets


async def test_a_late_bad_line_is_rejected_and_the_others_are_stopped_each_once(
    holding: HoldingEmulator, command: Command, file: Path
) -> None:
    for number in range(100):
        holding.add_runtime("ws", f"x{number}")
    many = MANY.replace("\n", "\r\n").encode()
    save(
        file,
        b"\xef\xbb\xbfworkspace_id,alias\r\n" + many + b"\r\na,b,c\r\nws,caf\xe9\r\nws,b\r\nws,b",
    )
    code, out, err = await command("stop", "--from", file)
    bad, undecodable, account = out.splitlines()
    assert bad == (
        "'a,b,c' on line 103           rejected         it has more columns than the first line"
    )
    assert undecodable.startswith("'ws,caf\\udce9' on line 104    rejected  ")
    assert without_times(account) == (
        "101 of 103 no longer running, 2 invalid after 0.0 s: 101 stopped, 2 rejected"
    )
    assert (code, err) == (1, f"1 duplicate in {file}, counted once\n")
    assert holding.received["ws", "b"] == 1

    _, out, _ = await command("stop", "-o", "json", "--from", file)
    found = {outcome["index"]: outcome["alias"] for outcome in outcomes_of(out)}
    assert [found[index] for index in (0, 100, 102)] == ["x0", "'a,b,c' on line 103", "b"]


@pytest.mark.parametrize("output", ["table", "json"])
async def test_a_fault_ends_a_pipe_whose_earlier_targets_are_stopped(
    holding: HoldingEmulator, output: str
) -> None:
    text = MANY + "nonsense\n" * 20 + 'ws,"open\nws,decoy\n'
    args = ("--ignore-not-found", "-o", output)
    code, out, err = await stop_piped(text, *args)
    assert f"""{READ_ERROR}'ws,"open' on line 121 is not a target: {BAD_QUOTES}\n""" in err
    assert "100 of 120 no longer running, 20 invalid after " in out + err
    assert "; the input was not read to its end\n" in out + err
    assert code == 1
    assert {alias for _, alias in holding.received} == {f"x{number}" for number in range(100)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "it has a control character, or was not saved as UTF-8"),
        ("ws,a\nws,b\n".encode("utf-16"), "it has a control character, or was not saved as UTF-8"),
        (
            b"\n<!DOCTYPE html>\n<p>Log in",
            "' on line 2 is not a target: it is neither a header nor a pair",
        ),
        (b"ws,a\n\nws,c,d\nws,c\n", "'ws,c,d' on line 3 is not a target: it has more columns"),
        (f"{MANY[:-7]}\n# x\nnonsense\n".encode(), "'nonsense' on line 102 is not a target"),
    ],
)
async def test_input_that_is_not_targets_is_reported_once_and_nothing_is_stopped(
    holding: HoldingEmulator, command: Command, file: Path, content: bytes, reason: str
) -> None:
    """Fault: `--from` with an image printed a line for each of its lines, and sent some of them."""
    save(file, content)
    code, out, err = await command("stop", "--from", file)
    assert reason in err
    assert err.count("\n") == err.count("None of it was used") == 1
    assert err.removesuffix("\n").isprintable()
    assert (code, out) == (2, "")
    assert holding.requests == []


@pytest.mark.parametrize(
    ("content", "args"),
    [
        ("<!DOCTYPE html>\nws,a\n", ("--dry-run",)),
        # With a workspace, any text on a line could be an alias.
        ("PNG\x1a\na\n", ("ws",)),
    ],
)
async def test_a_pipe_that_is_not_targets_is_reported_once_and_nothing_is_stopped(
    holding: HoldingEmulator, content: str, args: tuple[str, ...]
) -> None:
    code, out, err = await stop_piped(content, *args)
    assert err.startswith("bctrl-async: error: stdin: '")
    assert "' on line 1 is not a target: " in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert holding.requests == []


@pytest.mark.parametrize("content", ["\n# none tonight\n", "workspace,alias\n", "[]"])
async def test_an_empty_input_exits_with_2_unless_allowed(
    holding: HoldingEmulator, command: Command, file: Path, content: str
) -> None:
    """Fault: a pipe whose writer had failed before its first line was a success."""
    save(file, content)
    advice = "Add --allow-empty if that may be so\n"
    found = await command("stop", "--from", file)
    assert found == (2, "", f"bctrl-async: error: there are no targets in {file}. {advice}")
    refused = await stop_piped(content)
    assert refused == (2, "", f"bctrl-async: error: there are no targets in stdin. {advice}")

    for code, out, _ in (
        await command("stop", "--allow-empty", "--from", file),
        await stop_piped(content, "--allow-empty"),
    ):
        assert (code, without_times(out)) == (0, "0 of 0 no longer running after 0.0 s\n")
    assert holding.requests == []


# The workspace of aliases


@pytest.mark.parametrize(
    "text", ["a\nb\n", "Alias\na\n\n# note\nb\n", '{"alias": "a"}\n["ws", "b"]']
)
@pytest.mark.parametrize("given", ["argument", "variable"])
async def test_a_list_of_aliases_is_of_the_workspace(
    holding: HoldingEmulator,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    file: Path,
    *,
    text: str,
    given: str,
) -> None:
    if given == "variable":
        monkeypatch.setenv("BCTRL_WORKSPACE", "ws")
    save(file, text)
    code, _, _ = await command("stop", *["ws"] * (given == "argument"), "--from", file)
    assert (code, holding.received) == (0, {("ws", "a"): 1, ("ws", "b"): 1})


async def test_the_variable_says_only_where_aliases_are(
    command: Command, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    monkeypatch.setenv("BCTRL_WORKSPACE", "another")
    _, out, _ = await command("stop", "--dry-run", "--from", file)
    assert [target["workspace_id"] for target in outcomes_of(out)] == ["ws"] * 3


# Files, pipes and terminals


@pytest.mark.parametrize("name", ["stdin", "./stdin", "./-"])
async def test_only_a_dash_is_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("ws,of-the-file\n")
    _, out, _ = await stop_piped("ws,of-stdin\n", "--dry-run", source=name)
    assert json.loads(out)["alias"] == "of-the-file"


async def test_a_line_of_a_slow_pipe_is_stopped_before_the_next_arrives(
    holding: HoldingEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a pipe was read to its end where a folder was named like it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").mkdir()
    process = await start(*program(), "stop", "-q", "--from", "-", stdin=asyncio.subprocess.PIPE)
    for alias in "abc":
        write(process, f"ws,{alias}\n")
        await until(lambda alias=alias: holding.status("ws", alias) == "stopped")  # type: ignore[misc]
    assert process.returncode is None
    assert await close_stdin(process) == (0, "", "")


async def test_stdin_can_be_a_file(holding: HoldingEmulator, file: Path) -> None:
    number = os.open(file, os.O_RDONLY)
    process = await start(*program(), "stop", "-q", "--from", "-", stdin=number)
    os.close(number)
    assert await finish(process) == (0, "", "")
    assert holding.received.total() == 3


async def test_targets_can_be_typed_without_a_progress_drawn_over_them(
    holding: HoldingEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    streams = ("stdin", "stdout", "stderr")
    process, terminal = await start_on_terminal("stop", "--from", "-", streams=streams)
    await terminal.until("Reading targets from the terminal, a line each; end with Ctrl-D\n")
    os.write(terminal._master, b"ws,a\n")
    await until(lambda: holding.status("ws", "a") == "stopped")
    os.write(terminal._master, b"ws,b\n\x04")
    assert (await finish(process))[0] == 0
    assert without_times(await terminal.rest()) == (
        "Reading targets from the terminal, a line each; end with Ctrl-D\n"
        "ws,a\nws,b\n"
        "2 of 2 no longer running after 0.0 s: 2 stopped\n"
    )


@pytest.mark.parametrize(
    ("stdin", "why"),
    [("<&-", "cannot read stdin: it is closed\n"), ("</dev/null", "no targets in stdin. Add")],
)
@pytest.mark.usefixtures("holding")
async def test_stdin_without_targets_is_a_usage_error(stdin: str, why: str) -> None:
    shell = ("/bin/sh", "-c", f'exec "$@" {stdin}', "sh")
    code, out, err = await finish(await start(*shell, *program(), "stop", "--from", "-"))
    assert why in err
    assert (code, out) == (2, "")


@pytest.mark.usefixtures("holding")
async def test_a_pipe_that_fails_later_exits_with_1(
    command: Command, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bctrl_async.cli._targets.stat.S_IFMT", lambda _: stat.S_IFIFO)
    with FileIO(file, "w") as write_only:
        monkeypatch.setattr("sys.stdin", write_only)
        code, out, err = await command("stop", "--from", "-")
    assert without_times(out) == (
        "0 of 0 no longer running after 0.0 s; the input was not read to its end\n"
    )
    assert (code, err) == (1, f"{READ_ERROR}Bad file descriptor\n")


async def test_a_list_that_is_written_anew_while_it_is_stopped_is_stopped_as_it_was(
    holding: HoldingEmulator, file: Path
) -> None:
    holding.held.add("a")
    process = await start(*program(), "stop", "-q", "--concurrency", "1", "--from", file)
    await until(lambda: holding.status("ws", "a") == "stopped")
    save(file, "ws,other")
    holding.held.clear()
    code, _, err = await finish(process)
    assert (code, err) == (0, "")
    assert [request.alias for request in holding.stops] == ["a", "b", "c"]
