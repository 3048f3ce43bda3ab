"""Targets read from a file or a pipe; the first ones are checked before any is used."""

import asyncio
import os
import stat
import sys
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import typer

from bctrl_async import BctrlConfigError
from bctrl_async.cli._items import BadLine, Item
from bctrl_async.cli._output import print_error, print_info
from bctrl_async.cli._parser import TargetParser
from bctrl_async.cli._shard import WHOLE, Shard

_CHUNK = 65536
_END_KEYS = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"
"""The keys that end the input on a terminal."""
_PREVIEWED = 100
"""The number of items that must be targets before the first of them is used."""
_PREVIEW_TIME = 1.0
"""Seconds for which further items of a pipe are waited for before the first is used."""


def is_typed(file: str | None) -> bool:
    """Return True if this FILE of --from is a terminal."""
    return file == "-" and sys.stdin is not None and sys.stdin.isatty()


def open_targets(
    context: typer.Context, file: str, *, allow_empty: bool, shard: Shard = WHOLE
) -> Iterable[Item] | AsyncIterable[Item]:
    """Return the targets of --from, as `read_targets` does, or fail if it cannot be opened."""
    try:
        return read_targets(file, allow_empty=allow_empty, shard=shard)
    except OSError as error:
        context.fail(f"cannot read {'stdin' if file == '-' else file}: {error.strerror}")


def print_read_error(error: OSError) -> None:
    """Report that an input could be opened, but not read to its end."""
    print_error(f"cannot read all targets: {error.strerror}")


def read_targets(
    path: str, *, allow_empty: bool, shard: Shard = WHOLE
) -> Iterable[Item] | AsyncIterable[Item]:
    """Return the targets of a file or a pipe.

    Args:
        path: The file or named pipe; `-` is stdin.
        allow_empty: Accept an input without targets.
        shard: The part of the targets to return. The checks are of the whole input.

    Raises:
        BctrlConfigError: The beginning of a file is not a list of targets, or it is empty. A pipe
            raises it when it is read.
        OSError: It cannot be opened. A file that changes later raises it when it is read.
    """
    if path == "-":
        # A shell that closes stdin leaves None in its place.
        if sys.stdin is None:
            raise OSError(None, "it is closed")
        if is_typed(path):
            print_info(f"Reading targets from the terminal, a line each; end with {_END_KEYS}")
        return _PipeTargets(sys.stdin.fileno(), "stdin", allow_empty=allow_empty, shard=shard)
    with Path(path).open("rb") as opened:
        if stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            version = _version(opened)
            return _FileTargets(path, version, allow_empty=allow_empty, shard=shard)
        file = os.dup(opened.fileno())
    return _PipeTargets(file, path, allow_empty=allow_empty, shard=shard)


class _FileTargets:
    """The targets of a regular file, counted at first and parsed again as they are needed.

    Args:
        path: The file.
        version: Its version; any other raises OSError.
        allow_empty: Accept an input without targets.
        shard: The part of the targets to yield.
    """

    def __init__(
        self, path: str, version: tuple[int, ...], *, allow_empty: bool, shard: Shard
    ) -> None:
        self._path = Path(path)
        self._version = version
        self.shard: Shard = shard
        preview = _Preview(path, allow_empty=allow_empty)
        read = length = 0
        for read, item in enumerate(self._items(preview.parser), start=1):
            if read <= _PREVIEWED:
                preview.check(item)
            length += shard.keeps(item)
        preview.check_length(read)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        return filter(self.shard.keeps, self._items(TargetParser()))

    def _items(self, parser: TargetParser) -> Iterator[Item]:
        with self._path.open("rb") as file:
            data = b"-"
            while data:
                data = file.read(_CHUNK)
                # Before it is parsed: a file that is written anew may end within a row.
                if _version(file) != self._version:
                    raise OSError(None, "the file has changed since the run began")
                yield from parser.feed(data)


def _version(file: BinaryIO) -> tuple[int, ...]:
    """Return what changes if a file is replaced or written."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _PipeTargets:
    """The targets of a pipe or a terminal, as they arrive.

    Args:
        file: The descriptor.
        name: The name of the input in errors.
        allow_empty: Accept an input without targets.
        shard: The part of the targets to yield.
    """

    def __init__(self, file: int, name: str, *, allow_empty: bool, shard: Shard) -> None:
        self._items = read_pipe(file, name, allow_empty=allow_empty)
        self.shard: Shard = shard

    async def __aiter__(self) -> AsyncIterator[Item]:
        async for item in self._items:
            if self.shard.keeps(item):
                yield item


async def read_pipe(file: int, name: str, *, allow_empty: bool) -> AsyncIterator[Item]:
    """Yield the targets of a pipe or a terminal as they arrive.

    The first are held back for up to a second, until a hundred have arrived.

    Args:
        file: The descriptor.
        name: The name of the input in errors.
        allow_empty: Accept an input without targets.

    Raises:
        BctrlConfigError: One of these is not a target, or there is none at all.
        OSError: It cannot be read.
    """
    preview = _Preview(name, allow_empty=allow_empty)
    items: list[Item] = []
    data: bytes | None = None
    preview_until: float | None = None
    while data != b"" and len(items) < _PREVIEWED:
        try:
            async with asyncio.timeout_at(preview_until):
                await _wait_readable(file)
        except TimeoutError:
            break
        data = os.read(file, _CHUNK)
        for item in preview.parser.feed(data):
            if len(items) < _PREVIEWED:
                preview.check(item)
            items.append(item)
        if items and preview_until is None:
            preview_until = asyncio.get_running_loop().time() + _PREVIEW_TIME
    preview.check_length(len(items))
    for item in items:
        yield item
    while data != b"":
        await _wait_readable(file)
        data = os.read(file, _CHUNK)
        for item in preview.parser.feed(data):
            yield item


class _Preview:
    """The check of the first items of an input.

    Args:
        name: The name of the input.
        allow_empty: Accept an input without targets.

    Attributes:
        parser: The parser of the input.
    """

    def __init__(self, name: str, *, allow_empty: bool) -> None:
        self.parser = TargetParser()
        self._name = name
        self._allow_empty = allow_empty

    def check(self, item: Item) -> None:
        """Raise BctrlConfigError if this is not a target."""
        if isinstance(item, BadLine):
            raise BctrlConfigError(
                f"{self._name}: {item!r} is not a target: {item}",
                advice=f"Nothing was stopped; {self.parser.advise()}",
            )

    def check_length(self, length: int) -> None:
        """Raise BctrlConfigError if there are no targets."""
        if not length and not self._allow_empty:
            raise BctrlConfigError(
                f"there are no targets in {self._name}",
                advice="Add --allow-empty if that may be so",
            )


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
