"""Targets read from a file, which is parsed to its end before any is used, or from a pipe."""

import asyncio
import os
import re
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bctrl_async import BctrlConfigError
from bctrl_async.cli._lines import BadLine, Item, LineParser
from bctrl_async.cli._options import STDIN
from bctrl_async.cli._output import pluralize, print_info
from bctrl_async.shards import shard_of

_CHUNK = 65536
_BINARY = getattr(os, "O_BINARY", 0)
"""Windows would translate line ends."""
_CHECKED = 100
"""The number of items of a file that must be targets before the first of them is used."""
_END_KEYS = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"
"""The keys that end the input on a terminal."""
_parts = re.compile(r"([0-9]{1,9})/([1-9][0-9]{0,8})").fullmatch


class Shard(NamedTuple):
    """A shard of the targets, such as 3/16."""

    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def keeps(self, item: object) -> bool:
        """Return True if an item is in this shard, or ends the input of every shard."""
        is_end = isinstance(item, BadLine) and item.ends_input
        return is_end or self == WHOLE or shard_of(item, self.total) == self.number


WHOLE = Shard(1, 1)
"""The only shard of an input that is not divided."""


def parse_shard(value: str) -> Shard:
    """Return a shard such as 3/16."""
    parts = _parts(value)
    if parts is None:
        raise ValueError(f"{value!r} is not a shard such as 3/16")
    number, count = map(int, parts.groups())
    if not 1 <= number <= count:
        raise ValueError(f"{value!r} is not one of the shards 1/{count} to {count}/{count}")
    return Shard(number, count)


def is_typed(file: Path | None) -> bool:
    """Return True if this FILE of --from is a terminal."""
    return file is STDIN and sys.stdin is not None and sys.stdin.isatty()


def open_targets(
    file: Path,
    *,
    allow_empty: bool,
    shard: Shard = WHOLE,
    workspace: str | None = None,
    is_only: bool = False,
) -> list[Item] | AsyncIterator[Item]:
    """Return the targets of a regular file, each once, or those of a pipe as they arrive.

    It fails if the file cannot be read, and raises BctrlConfigError if it is not a list of targets.
    A pipe does so when it is read.
    """
    name = "stdin" if file is STDIN else str(file)
    parser = LineParser(workspace, is_only=is_only)
    try:
        if file is STDIN:
            # A shell that closes stdin leaves None in its place.
            if sys.stdin is None:
                raise BctrlConfigError("cannot read stdin: it is closed")
            if is_typed(file):
                print_info(f"Reading targets from the terminal, a line each; end with {_END_KEYS}")
            number = sys.stdin.fileno()
        else:
            number = os.open(file, os.O_RDONLY | _BINARY)
        if stat.S_IFMT(os.fstat(number).st_mode) not in {stat.S_IFREG, stat.S_IFDIR}:
            return _read_pipe(number, name, parser, allow_empty=allow_empty, shard=shard)
        with os.fdopen(number, "rb", closefd=file is not STDIN) as opened:
            return _read_file(opened, name, parser, allow_empty=allow_empty, shard=shard)
    except OSError as error:
        raise BctrlConfigError(f"cannot read {name}: {error.strerror}") from error


def _read_file(
    file: BinaryIO, name: str, parser: LineParser, *, allow_empty: bool, shard: Shard
) -> list[Item]:
    items: list[Item] = []
    while not parser.ended:
        data = file.read(_CHUNK)
        items += parser.feed(data)
        if not data:
            break
    for number, item in enumerate(items):
        if isinstance(item, BadLine) and (number < _CHECKED or item.ends_input):
            raise _not_a_target(name, item)
    if not (items or allow_empty):
        raise _empty(name)
    once = dict.fromkeys(items)
    if len(once) < len(items):
        print_info(f"{pluralize(len(items) - len(once), 'duplicate')} in {name}, counted once")
    return [item for item in once if shard.keeps(item)]


async def _read_pipe(
    file: int, name: str, parser: LineParser, *, allow_empty: bool, shard: Shard
) -> AsyncIterator[Item]:
    data, is_empty = b"-", True
    while data and not parser.ended:
        await _wait_readable(file)
        data = os.read(file, _CHUNK)
        for item in parser.feed(data):
            if is_empty and isinstance(item, BadLine) and item.ends_input:
                raise _not_a_target(name, item)
            is_empty = False
            if shard.keeps(item):
                yield item
    if is_empty and not allow_empty:
        raise _empty(name)


def _not_a_target(name: str, item: BadLine) -> BctrlConfigError:
    problem = f"{name}: {item!r} is not a target: {item.reason}"
    return BctrlConfigError(problem, advice="Nothing was stopped")


def _empty(name: str) -> BctrlConfigError:
    advice = "Add --allow-empty if that may be so"
    return BctrlConfigError(f"there are no targets in {name}", advice=advice)


async def _wait_readable(file: int) -> None:
    """Wait until a pipe is readable; return at once for anything else."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    try:
        loop.add_reader(file, readable.set)
    except (NotImplementedError, PermissionError):  # Windows, or a device such as /dev/null.
        return
    try:
        await readable.wait()
    finally:
        loop.remove_reader(file)
