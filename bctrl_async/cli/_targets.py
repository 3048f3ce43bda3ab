"""Targets read from a file or a pipe."""

import asyncio
import csv
import json
import os
import stat
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path

from bctrl_async import RuntimeRef

_CHUNK = 65536
_WORKSPACE_KEYS = ("workspace_id", "workspaceId", "workspace")
_HEADERS = [[key.lower(), "alias"] for key in _WORKSPACE_KEYS]
_MAX_SHOWN = 60


class BadLine:
    """A line that is not a target; the bulk stop rejects it and shows its repr."""

    def __init__(self, number: int, text: str) -> None:
        self._number = number
        self._text = text

    def __repr__(self) -> str:
        return f"{self._text[:_MAX_SHOWN]!r} on line {self._number}"


Item = RuntimeRef | BadLine


def read_file(path: Path) -> Iterable[Item] | AsyncIterator[Item]:
    """Return the targets of a file or a named pipe.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return _FileTargets(path)
        return read_pipe(os.dup(file.fileno()))


class _FileTargets:
    """The targets of a regular file, counted at first and parsed as they are needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            # Every non-blank line but a header counts; parsing is lazy.
            self._length = sum(
                bool(_decode(number, line)) if number > 1 else parse_line(number, line) is not None
                for number, line in enumerate(file, start=1)
            )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if (item := parse_line(number, line)) is not None:
                    yield item


async def read_pipe(file: int) -> AsyncIterator[Item]:
    """Yield targets from a pipe or a terminal, given its descriptor, as their lines arrive."""
    number, rest = 0, b""
    while True:
        await _wait_readable(file)
        chunk = os.read(file, _CHUNK)
        *lines, rest = (rest + chunk).split(b"\n")
        if not chunk:
            lines = [rest]
        for line in lines:
            number += 1
            if (item := parse_line(number, line)) is not None:
                yield item
        if not chunk:
            return


async def _wait_readable(file: int) -> None:
    """Wait until a pipe is readable; return at once for anything else."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    try:
        loop.add_reader(file, _set_done, readable)
    except (NotImplementedError, PermissionError):  # Windows, or a regular file.
        return
    try:
        await readable
    finally:
        loop.remove_reader(file)


def _set_done(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def parse_line(number: int, line: bytes) -> Item | None:
    """Return the target of a line of CSV or JSON; None for a blank line or a header.

    Only line 1 can be a header.
    """
    text = _decode(number, line)
    if not text:
        return None
    is_json = text[0] in "{["
    parts = _parse_json(text) if is_json else _parse_csv(text)
    if number == 1 and not is_json and [str(part).lower() for part in parts] in _HEADERS:
        return None
    match parts:
        case [str() as workspace_id, str() as alias]:
            return RuntimeRef(workspace_id, alias)
    return BadLine(number, text)


def _decode(number: int, line: bytes) -> str:
    # Bytes that are not UTF-8 become surrogates, which are rejected as a name but can be shown.
    return line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").strip()


def _parse_csv(text: str) -> Sequence[object]:
    try:
        return next(csv.reader([text], skipinitialspace=True))
    except csv.Error:
        return []


def _parse_json(text: str) -> Sequence[object]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if isinstance(value, dict):
        workspace_id = next((value[key] for key in _WORKSPACE_KEYS if key in value), None)
        return [workspace_id, value.get("alias")]
    return value if isinstance(value, list) else []
