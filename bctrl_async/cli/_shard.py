"""The option `--shard` and the items that it keeps."""

import re
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import typer

from bctrl_async.cli._items import BadLine
from bctrl_async.shards import shard_of

_T = TypeVar("_T")
_parts = re.compile(r"([0-9]{1,9})/([1-9][0-9]{0,8})").fullmatch


class Shard(NamedTuple):
    """A shard of the targets, such as 3/16."""

    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def keeps(self, item: object) -> bool:
        """Return True if an item is in this shard.

        A line after which nothing is read is in every shard: each lacks the targets after it.
        """
        if self == WHOLE or (isinstance(item, BadLine) and item.ends_input):
            return True
        return shard_of(item, self.total) == self.number

    def select(self, items: Iterable[_T]) -> list[_T]:
        """Return the items that are in this shard."""
        return [*filter(self.keeps, items)]


WHOLE = Shard(1, 1)
"""The only shard of an input that is not divided."""


def parse_shard(value: str | Shard) -> Shard:
    """Return a shard such as 3/16.

    Args:
        value: The text; a shard is returned as it is, because typer also parses defaults.

    Raises:
        typer.BadParameter: The text is not a shard.
    """
    if isinstance(value, Shard):
        return value
    parts = _parts(value)
    if parts is None:
        raise typer.BadParameter(f"{value!r} is not a shard such as 3/16")
    number, count = map(int, parts.groups())
    if not 1 <= number <= count:
        raise typer.BadParameter(f"{value!r} is not one of the shards 1/{count} to {count}/{count}")
    return Shard(number, count)
