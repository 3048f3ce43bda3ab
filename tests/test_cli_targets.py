"""Targets that the command reads from lines, files and pipes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, Iterable, Iterator
from pathlib import Path

import pytest

from bctrl_async import RuntimeRef
from bctrl_async.cli._targets import BadLine, Item, _wait_readable, parse_line, read_file, read_pipe

A, B, C = (RuntimeRef("ws", alias) for alias in "abc")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        try:
            os.close(end)
        except OSError:
            assert end == writer  # A test may have closed it.


def plain(items: Iterable[Item]) -> list[RuntimeRef | str]:
    return [repr(item) if isinstance(item, BadLine) else item for item in items]


async def all_of(found: Iterable[Item] | AsyncIterable[Item]) -> list[RuntimeRef | str]:
    if isinstance(found, AsyncIterable):
        return plain([item async for item in found])
    return plain(found)


# Lines


@pytest.mark.parametrize(
    ("line", "workspace_id", "alias"),
    [
        (b"ws,crm", "ws", "crm"),
        (b"ws,crm\n", "ws", "crm"),
        (b"ws,crm\r\n", "ws", "crm"),
        (b"  ws, crm \n", "ws", "crm"),
        (b'"w,s","a ""b"""\n', "w,s", 'a "b"'),
        (b'ws, " a "\n', "ws", " a "),
        ("ws,日本\n".encode(), "ws", "日本"),
        (b"ws,\n", "ws", ""),
        (b'["ws", "crm"]\n', "ws", "crm"),
        (b' [ "w,s" , " crm " ] \r\n', "w,s", " crm "),
        (b'{"workspace_id": "ws", "alias": "crm"}\n', "ws", "crm"),
        (b'{"alias": "crm", "workspaceId": "ws"}\n', "ws", "crm"),
        (b'{"workspace": "ws", "alias": "crm", "kind": "browser"}\n', "ws", "crm"),
        (b'{"workspace_id": "ws", "workspace": "its name", "alias": "crm"}\n', "ws", "crm"),
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_a_line_is_read_as_csv_or_json(
    number: int, line: bytes, workspace_id: str, alias: str
) -> None:
    found = parse_line(number, line)
    assert found == RuntimeRef(workspace_id, alias)
    assert isinstance(found, RuntimeRef)


@pytest.mark.parametrize("line", [b"", b"\n", b"\r\n", b" \t \n"])
@pytest.mark.parametrize("number", [1, 7])
def test_a_blank_line_is_skipped(number: int, line: bytes) -> None:
    assert parse_line(number, line) is None


@pytest.mark.parametrize(
    "header", ["workspace_id,alias", "workspaceId,alias", "Workspace, Alias", '"workspace","alias"']
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_header_in_the_first_line_is_skipped(mark: bytes, header: str) -> None:
    assert parse_line(1, mark + header.encode()) is None


@pytest.mark.parametrize(
    "line", [b"workspace,crm", b'["workspace", "alias"]', b'{"workspace":"workspace","alias":"a"}']
)
def test_a_workspace_called_workspace_is_not_a_header(line: bytes) -> None:
    found = parse_line(1, line)
    assert isinstance(found, RuntimeRef)
    assert found.workspace_id == "workspace"


def test_a_header_below_the_first_line_is_a_target() -> None:
    assert parse_line(2, b"workspace_id,alias") == RuntimeRef("workspace_id", "alias")


def test_a_byte_order_mark_is_removed() -> None:
    assert parse_line(1, b"\xef\xbb\xbfws,crm\r\n") == RuntimeRef("ws", "crm")
    assert parse_line(1, b'\xef\xbb\xbf["ws", "crm"]\n') == RuntimeRef("ws", "crm")
    assert parse_line(1, b"\xef\xbb\xbf\n") is None


def test_bytes_that_are_not_utf_8_become_surrogates() -> None:
    assert parse_line(3, b"ws,caf\xe9\n") == RuntimeRef("ws", "caf\udce9")


@pytest.mark.parametrize(
    "line",
    [
        "crm",
        "ws,crm,browser",
        "workspace_id,alias,kind",
        "[]",
        '["ws"]',
        '["ws", 1]',
        '["ws", "a", "b"]',
        '["ws", "crm"',
        '["ws", "crm"],',
        "{}",
        '{"alias": "crm"}',
        '{"workspace_id": "ws"}',
        '{"workspace_id": 7, "alias": "crm"}',
        '{"workspace_id": null, "alias": "crm"}',
        "{ws}",
        "ws\rx,a",
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_any_other_line_is_a_bad_line_with_its_number(number: int, line: str) -> None:
    found = parse_line(number, f"{line}\n".encode())
    assert isinstance(found, BadLine)
    assert repr(found) == f"{line!r} on line {number}"


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" + b"1" * 10_000 + b"]",
        b"ws," + b"y" * 140_000,
    ],
)
def test_a_long_bad_line_is_truncated(line: bytes) -> None:
    found = parse_line(9, line)
    assert repr(found) == f"{line[:60].decode()!r} on line 9"


# Files


async def test_a_file_yields_its_targets_in_order_and_has_a_length(tmp_path: Path) -> None:
    file = tmp_path / "targets"
    file.write_bytes(
        b"\xef\xbb\xbfworkspace_id,alias\r\n"
        b"ws,a\r\n"
        b"\r\n"
        b"nonsense\r\n"
        b'{"workspaceId": "ws", "alias": "b"}\r\n'
        b'["ws", "c"]'
    )
    found = read_file(file)
    assert isinstance(found, Iterable)
    assert len(found) == 4  # type: ignore[arg-type]
    assert plain(found) == [A, "'nonsense' on line 4", B, C]
    assert plain(found) == [A, "'nonsense' on line 4", B, C]


def test_a_file_without_targets_has_length_0(tmp_path: Path) -> None:
    file = tmp_path / "targets"
    file.write_bytes(b"\n\n")
    found = read_file(file)
    assert isinstance(found, Iterable)
    assert len(found) == len(list(found)) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["missing", "."])
def test_an_unreadable_file_raises_an_os_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"No such file|Is a directory|Permission denied"):
        read_file(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
async def test_a_named_pipe_is_read_as_it_is_written(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writing = asyncio.create_task(asyncio.to_thread(fifo.open, "wb", 0))
    found = await asyncio.to_thread(read_file, fifo)
    writer = await writing
    assert isinstance(found, AsyncIterable)
    items = aiter(found)
    writer.write(b"ws,a\n")
    assert await anext(items) == A
    writer.write(b"ws,b\nws,c\n")
    writer.close()
    assert [item async for item in items] == [B, C]


# Pipes


async def test_a_target_is_yielded_as_soon_as_its_line_is_complete(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    items = read_pipe(reader)
    os.write(writer, b"ws,a\nws,")
    assert await anext(items) == A
    following = asyncio.ensure_future(anext(items))
    await asyncio.sleep(0)
    assert not following.done()
    os.write(writer, b"b\n")
    assert await following == B
    os.close(writer)
    assert [item async for item in items] == []


async def test_a_last_line_without_a_line_end_is_a_target(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"ws,a\r\n\r\nws,b")
    os.close(writer)
    assert await all_of(read_pipe(reader)) == [A, B]


async def test_blank_lines_of_a_pipe_count_in_line_numbers(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"\xef\xbb\xbfworkspace,alias\n\nx\nws,a\ny")
    os.close(writer)
    assert await all_of(read_pipe(reader)) == ["'x' on line 3", A, "'y' on line 5"]


async def test_a_character_can_arrive_in_two_parts(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    first, second = "é".encode()[:1], "é".encode()[1:]
    os.write(writer, b"ws,a\nws," + first)
    items = read_pipe(reader)
    assert await anext(items) == A
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
    found = await all_of(read_pipe(reader))
    await writing
    assert found == [RuntimeRef("ws", f"runtime-{number}") for number in range(count)]


async def test_a_regular_file_can_be_read_as_a_pipe(tmp_path: Path) -> None:
    file = tmp_path / "targets"
    file.write_bytes(b"ws,a\nws,b\n")
    number = os.open(file, os.O_RDONLY)
    assert await all_of(read_pipe(number)) == [A, B]
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
