"""Targets that the command reads: CSV, JSON, files and pipes."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
import tables
from hypothesis import given
from hypothesis import strategies as st

from bctrl_async import BctrlConfigError, RuntimeRef
from bctrl_async.cli import _lines, _targets
from bctrl_async.cli._lines import MAX_LINE, BadLine, Item, LineParser
from bctrl_async.cli._targets import WHOLE, Shard, _wait_readable

A, B, C = (RuntimeRef("ws", alias) for alias in "abc")
INPUTS = Path(__file__).with_name("inputs.jsonl")
"""What each input gives: targets, and lines that are none with their reasons."""


def parse(data: bytes | str, chunks: Sequence[int] = ()) -> list[Item]:
    """Return the items of an input that arrives in chunks of these lengths."""
    parser = LineParser()
    items: list[Item] = []
    rest = data.encode(errors="surrogateescape") if isinstance(data, str) else data
    for length in chunks:
        chunk, rest = rest[:length], rest[length:]
        if chunk:
            items += parser.feed(chunk)
    if rest:
        items += parser.feed(rest)
    return [*items, *parser.feed(b"")]


def plain(items: Sequence[Item]) -> list[list[str] | str]:
    return [f"{item!r}: {item}" if isinstance(item, BadLine) else list(item) for item in items]


@pytest.mark.parametrize("line", INPUTS.read_text("utf-8").splitlines())
def test_what_each_input_gives(line: str) -> None:
    row = json.loads(line)
    assert plain(parse(row["input"])) == row["gives"]
    assert plain(parse(row["input"], [1] * 600)) == row["gives"]


def test_no_decoy_of_a_random_table_is_stopped_and_nothing_is_lost_silently() -> None:
    """Fault: reading on after an odd quote stopped runtimes that only a note named."""
    assert [found for seed in range(1000) if (found := tables.check(seed)[0]).isupper()] == []


def broken(text: str) -> st.SearchStrategy[list[int]]:
    """Return lengths of the chunks in which a text arrives."""
    return st.lists(st.integers(1, 9), max_size=len(text.encode()))


names = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=6)
pairs = st.lists(st.tuples(names, names), min_size=1, max_size=6)


@given(st.data(), pairs, st.sampled_from([None, 0, 2]), st.sampled_from(["array", "runtimes", ""]))
def test_however_json_is_broken_the_targets_are_the_same(
    data: st.DataObject, targets: list[tuple[str, str]], indent: int | None, form: str
) -> None:
    values = [
        {"workspaceId": workspace, "alias": alias, "runtime": {"alias": [alias, workspace]}}
        for workspace, alias in targets
    ]
    document = {"runtimes": values} if form == "runtimes" else values
    text = json.dumps(document, indent=indent) if form else "\n".join(map(json.dumps, values))
    assert parse(text, data.draw(broken(text))) == targets


@given(
    st.data(), pairs, st.sampled_from("\t,;"), st.permutations(["Alias", "note", "workspace_id"])
)
def test_however_csv_is_broken_the_targets_are_the_same(
    data: st.DataObject, targets: list[tuple[str, str]], delimiter: str, header: list[str]
) -> None:
    file = io.StringIO()
    rows = csv.DictWriter(file, header, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    rows.writeheader()
    for workspace, alias in targets:
        note = data.draw(st.sampled_from(["", '"', f"ws{delimiter}a"]))
        rows.writerow({"workspace_id": workspace, "Alias": alias, "note": note})
    text = file.getvalue()
    assert parse(text, data.draw(broken(text))) == targets


@given(st.binary(max_size=200), st.lists(st.integers(1, 9), max_size=50))
def test_however_any_bytes_are_broken_the_targets_are_the_same(
    data: bytes, chunks: list[int]
) -> None:
    assert plain(parse(data, chunks)) == plain(parse(data))


LONG = MAX_LINE + 1


@pytest.mark.parametrize("long", ["x" * LONG, 'ws,"' + "x" * LONG, "é" * LONG])
@pytest.mark.parametrize("first", ["ws,a\n", '["ws", "a"]\n', ""])
def test_nothing_is_read_after_a_line_that_is_too_long(first: str, long: str) -> None:
    """Fault: a line of 40 MiB was held in memory, and copied at every chunk."""
    *targets, bad = parse(f"{first}{long}\nws,b\n", [65536] * 100)
    assert targets == ([A] if first else [])
    assert isinstance(bad, BadLine)
    assert str(bad) == "it is longer than 1 MiB; nothing after it was read"
    assert bad.ends_input


@pytest.mark.parametrize("chunk", [65536, 10 * LONG])
def test_a_document_may_be_on_one_long_line(chunk: int) -> None:
    values = [["ws", f"é{number}"] for number in range(100_000)]
    text = json.dumps(values, ensure_ascii=False)
    assert len(text) > LONG
    assert parse(f"\ufeff\n{text}", [chunk] * 100) == [tuple(value) for value in values]


def test_a_document_that_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lines, "MAX_DOCUMENT", 100)
    text = json.dumps([["ws", f"r{number}"] for number in range(100)])
    (bad,) = parse(text, [64] * 100)
    assert str(bad).startswith("it is more than 64 MiB of JSON in one document")


# Files


def read(path: Path, *, allow_empty: bool = False, shard: Shard = WHOLE) -> list[Item]:
    with path.open("rb") as file:
        return _targets._read_file(
            file, path.name, LineParser(), allow_empty=allow_empty, shard=shard
        )


def test_a_file_yields_its_targets_in_order_and_each_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "targets"
    many = "".join(f"{number},ws,x{number}\n" for number in range(100))
    file.write_text(f"x,workspace,alias\n{many}\nnonsense\n1,ws,b\n1,ws,c\n2,ws,b\n")
    assert plain(read(file))[100:] == [
        "'nonsense' on line 103: it has fewer columns than the first line",
        ["ws", "b"],
        ["ws", "c"],
    ]
    assert capsys.readouterr().err == "1 duplicate in targets, counted once\n"


def test_a_bad_line_among_the_first_hundred_targets_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "targets"
    file.write_text("ws,a\n" * 99 + "\n# x\n" * 5 + "nonsense\n")
    with pytest.raises(BctrlConfigError, match="'nonsense' on line 110 is not a target"):
        read(file)
    file.write_text("ws,a\n" * 100 + "nonsense\n")
    assert len(read(file)) == 2


def test_a_fault_that_ends_the_input_is_an_error_on_any_line(tmp_path: Path) -> None:
    file = tmp_path / "targets"
    file.write_text("ws,a\n" * 1000 + 'ws,"b\nws,c\n')
    with pytest.raises(BctrlConfigError, match="on line 1001 is not a target: a quote is missing"):
        read(file)


# Pipes


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        try:
            os.close(end)
        except OSError:
            assert end == writer  # A test may have closed it.


def read_pipe(file: int, *, allow_empty: bool = False) -> AsyncIterator[Item]:
    return _targets._read_pipe(file, "the pipe", LineParser(), allow_empty=allow_empty, shard=WHOLE)


async def test_a_line_of_a_pipe_is_used_before_the_next_arrives(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    items = read_pipe(reader)
    for target in (A, B):
        os.write(writer, f"ws,{target.alias}\n".encode())
        assert await anext(items) == target
    os.write(writer, b"nonsense\n")
    assert isinstance(await anext(items), BadLine)
    os.write(writer, b"ws,c\n")
    assert await anext(items) == C


async def test_a_pipe_ends_at_a_fault_after_which_nothing_is_read(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b'ws,a\nws,"b\nws,c\n')
    first, bad = [item async for item in read_pipe(reader)]
    assert first == A
    assert isinstance(bad, BadLine)
    assert bad.ends_input


async def test_a_pipe_that_begins_with_a_fault_is_an_error(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"<!DOCTYPE html>\nws,a\n")
    with pytest.raises(BctrlConfigError, match="on line 1 is not a target: it is no header"):
        await anext(read_pipe(reader))


async def test_a_pipe_without_targets_is_an_error_unless_allowed(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"workspace,alias\n")
    os.close(writer)
    with pytest.raises(BctrlConfigError, match="there are no targets in the pipe"):
        await anext(read_pipe(reader))
    assert [item async for item in read_pipe(reader, allow_empty=True)] == []


async def test_a_character_can_arrive_in_two_parts(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    first, second = "é".encode()[:1], "é".encode()[1:]
    os.write(writer, b"ws,a\n" * 100 + b"ws," + first)
    items = read_pipe(reader)
    assert [await anext(items) for _ in range(100)] == [A] * 100
    os.write(writer, second + b"\n")
    assert await anext(items) == RuntimeRef("ws", "é")
    await items.aclose()  # type: ignore[attr-defined]


async def test_a_pipe_is_read_beyond_its_capacity(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    count = 30_000

    def write() -> None:
        with os.fdopen(os.dup(writer), "wb") as file:
            file.writelines(b"ws,runtime-%d\n" % number for number in range(count))
        os.close(writer)

    writing = asyncio.create_task(asyncio.to_thread(write))
    found = [item async for item in read_pipe(reader)]
    await writing
    assert found == [RuntimeRef("ws", f"runtime-{number}") for number in range(count)]


async def test_a_regular_file_can_be_read_as_a_pipe(tmp_path: Path) -> None:
    file = tmp_path / "targets"
    file.write_bytes(b"ws,a\nws,b\n")
    number = os.open(file, os.O_RDONLY)
    assert [item async for item in read_pipe(number)] == [A, B]
    os.close(number)


async def test_waiting_for_a_pipe_can_be_cancelled_as_it_becomes_readable(
    pipe: tuple[int, int],
) -> None:
    reader, writer = pipe
    waiting = asyncio.create_task(_wait_readable(reader))
    await asyncio.sleep(0)
    os.write(writer, b"x")
    # In one iteration of the loop, the task is cancelled and then the pipe becomes readable.
    asyncio.get_running_loop().call_soon(waiting.cancel)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not asyncio.get_running_loop().remove_reader(reader)
