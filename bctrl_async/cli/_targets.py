"""Targets from a pipe, or from a file, which is parsed to its end before its use."""

import asyncio
import io
import os
import re
import stat
import sys
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from bctrl_async import BctrlConfigError, BctrlError
from bctrl_async.cli._lines import MAX_LINE, BadLine, Item, LineParser
from bctrl_async.cli._options import STDIN
from bctrl_async.cli._output import pluralize, print_info
from bctrl_async.errors import quote

_T = TypeVar("_T")

_CHUNK = 65536
_CHECKED = 100
"""The number of items at the start of a file that must all be targets."""


class UnreadInputError(BctrlError):
    """A fault that ends the input from a pipe; the targets before it are stopped."""


class Shard(NamedTuple):
    """A shard of the targets, such as 3/16."""

    number: int
    total: int

    def keeps(self, item: object) -> bool:
        """Return True for an item of this shard; what is not a target is in shard 1."""
        if self.total == 1:
            return True
        from bctrl_async.shards import shard_of  # noqa: PLC0415 - it delays --help.

        return shard_of(item, self.total) == self.number


WHOLE = Shard(1, 1)


def parse_shard(value: str) -> Shard:
    """Return a shard such as 3/16."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", value)
    if match is not None:
        shard = Shard(int(match[1]), int(match[2]))
        if 1 <= shard.number <= shard.total:
            return shard
    raise ValueError(f"{value!r} is not a shard K/N, from 1/N to N/N")


def is_typed(file: Path | None) -> bool:
    """Return True if this FILE of --from is a terminal."""
    return file is STDIN and sys.stdin is not None and sys.stdin.isatty()


def open_targets(
    file: Path, parser: LineParser, *, allow_empty: bool, shard: Shard = WHOLE
) -> list[Item] | AsyncIterator[Item]:
    """Return the targets of a file, each once, or of a pipe, as they arrive."""
    name = "stdin" if file is STDIN else str(file)
    try:
        descriptor = _open(file)
        file_type = stat.S_IFMT(os.fstat(descriptor).st_mode)
        # A folder is opened like a file; reading it fails.
        if file_type not in {stat.S_IFREG, stat.S_IFDIR}:
            return _read_pipe(descriptor, name, parser, shard, allow_empty=allow_empty)
        with os.fdopen(descriptor, "rb", closefd=file is not STDIN) as lines:
            items = _parse_file(lines, name, parser)
    except OSError as error:
        raise BctrlConfigError(f"cannot read {name}: {error.strerror}") from error
    except BadLine as bad_line:
        raise _refusal(name, bad_line) from bad_line
    if not (items or allow_empty):
        raise _refusal(name)
    targets = dict.fromkeys(items)
    duplicates = len(items) - len(targets)
    if duplicates:
        print_info(f"{pluralize(duplicates, 'duplicate')} in {name}, counted once")
    return [target for target in targets if shard.keeps(target)]


def _open(file: Path) -> int:
    """Return the descriptor of a file or of stdin."""
    if file is not STDIN:
        return os.open(file, os.O_RDONLY)
    # A shell that closes stdin leaves None in its place.
    if sys.stdin is None:
        raise BctrlConfigError("cannot read stdin: it is closed")
    if sys.stdin.isatty():
        keys = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"
        print_info(f"Reading targets from the terminal, a line each; end with {keys}")
    return sys.stdin.fileno()


def _parse_file(lines: BinaryIO, name: str, parser: LineParser) -> list[Item]:
    """Return the items of a file, which must not start with bad lines."""
    items: list[Item] = []
    while line := lines.readline(MAX_LINE + 1):
        items += parser.parse(line)
    items += parser.parse(b"")
    # Anything but a list of targets, such as a program, has bad lines from the start.
    for item in items[:_CHECKED]:
        if isinstance(item, BadLine):
            raise _refusal(name, item)
    return items


async def _read_pipe(
    descriptor: int, name: str, parser: LineParser, shard: Shard, *, allow_empty: bool
) -> AsyncIterator[Item]:
    is_empty = True
    try:
        async for line in _read_lines(descriptor, name):
            for item in parser.parse(line):
                is_empty = False
                if shard.keeps(item):
                    yield item
    except BadLine as bad_line:
        if is_empty:
            raise _refusal(name, bad_line) from bad_line
        problem = f"{bad_line!r} is not a target: {bad_line}"
        raise UnreadInputError(f"cannot read all targets: {problem}") from bad_line
    if is_empty and not allow_empty:
        raise _refusal(name)


async def _read_lines(descriptor: int, name: str) -> AsyncIterator[bytes]:
    """Yield lines, in parts beyond MAX_LINE, and an empty line at the end."""
    part = b""
    while True:
        try:
            await _wait_readable(descriptor)
            data = os.read(descriptor, _CHUNK)
        except OSError as error:
            raise UnreadInputError(
                f"cannot read all targets: {error.strerror}"
            ) from error
        if not data:
            break
        lines = io.BytesIO(part + data).readlines()
        part = b""
        # The rest of the last line may not have arrived yet.
        if not data.endswith(b"\n") and len(lines[-1]) <= MAX_LINE:
            part = lines.pop()
        for line in lines:
            yield line
    if part:
        _warn_of_part(part, name)
        yield part
    yield b""


def _warn_of_part(line: bytes, name: str) -> None:
    """Warn of a last line without its newline: its alias may be another, cut off."""
    # JSON that is cut off cannot be read, which is an error.
    is_json = line.startswith((b"[", b"{")) or line.endswith((b"]", b"}"))
    if not is_json:
        text = quote(line.decode(errors="replace"))
        print_info(
            f"bctrl-async: warning: {name} ended within {text}, which may be cut off"
        )


def _refusal(name: str, line: BadLine | None = None) -> BctrlConfigError:
    """Return the error of an input with a bad line, or else without targets."""
    if line is None:
        advice = "Add --allow-empty if that may be so"
        return BctrlConfigError(f"there are no targets in {name}", advice=advice)
    problem = f"{name}: {line!r} is not a target: {line}"
    return BctrlConfigError(problem, advice="None of it was used")


async def collect(items: Iterable[_T] | AsyncIterable[_T]) -> list[_T]:
    """Return all items; this reads a pipe to its end."""
    if isinstance(items, Iterable):
        return list(items)
    return [item async for item in items]


async def _wait_readable(descriptor: int) -> None:
    """Wait until a pipe is readable; return at once for anything else."""
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Windows and devices do not support `add_reader`.
    with suppress(NotImplementedError, PermissionError):
        loop.add_reader(descriptor, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(descriptor)
