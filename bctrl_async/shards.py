"""Shards: parts of an input that several processes stop, each on its own.

A target is in exactly one shard, from any source and in any order. The shard depends on nothing but
its names, so it is the same in every process, on every machine and in every version of Python.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sized
from hashlib import blake2b
from typing import Generic, TypeVar, overload

from bctrl_async import _config
from bctrl_async.bulk._targets import as_target, best_effort_ref, check_targets
from bctrl_async.errors import BctrlConfigError, BctrlResponseError

__all__ = ["shard", "shard_of"]

_T = TypeVar("_T")

_FIRST = 1
_new_hash = blake2b(digest_size=8).copy
"""Returns a new hash, for less than the constructor with its many arguments."""


@overload
def shard(targets: AsyncIterable[_T], number: int, count: int) -> AsyncIterable[_T]: ...
@overload
def shard(targets: Iterable[_T], number: int, count: int) -> Iterable[_T]: ...
def shard(
    targets: AsyncIterable[_T] | Iterable[_T], number: int, count: int
) -> AsyncIterable[_T] | Iterable[_T]:
    """Return the targets of one shard, in their order.

    Nothing is read before the shard is iterated over. If `targets` has a length, so has the shard,
    which is counted when it is first needed. The journal of a bulk stop of it records the shard, so
    that a report on the journals of all shards names those that are missing.

    Args:
        targets: Any iterable or async iterable, as `stop_runtimes` takes it. An item that is not a
            target is in a shard as well, see `shard_of`, and becomes `rejected` there.
        number: The shard, from 1 to `count`.
        count: The number of shards; the same for all of them.

    Returns:
        An async iterable if `targets` is one, else an iterable.

    Raises:
        BctrlConfigError: There is no such shard, or `targets` cannot be iterated over, or are a
            shard: one hash decides about both, and the journals would not name the whole.
    """
    _config.count(count, "count")
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= count:
        raise BctrlConfigError(
            f"invalid shard {number!r:.50} of {count}: expected a whole number from 1 to {count}",
            advice="Add 1 to an index that begins with 0",
            argument="number",
        )
    check_targets(targets)
    if shard_in(targets) is not None:
        raise BctrlConfigError(
            "invalid targets: they are a shard already",
            advice="Divide the whole input into as many shards as there are runs",
            argument="targets",
        )
    if isinstance(targets, AsyncIterable):
        return _AsyncShard(targets, number, count)
    # To count an iterator would use it up.
    if isinstance(targets, Iterator) or not isinstance(targets, Sized):
        return _Shard(targets, number, count)
    return _SizedShard(targets, number, count)


def shard_of(target: object, count: int) -> int:
    """Return the number of the shard that a target is in, from 1.

    The hash of its names decides: BLAKE2b (RFC 7693) of 8 bytes, read as a big-endian number, of
    the workspace id, a NUL and the alias in UTF-8, with A to Z as a to z, since the letters of a
    UUID are written in both cases. The shard is the remainder by `count`, plus 1.

    Args:
        target: A target. An item that is not one is in the first shard; a listed runtime that could
            not be parsed is in that of its names.
        count: The number of shards.

    Raises:
        BctrlConfigError: `count` is not a whole number of at least 1.
    """
    return _shard_of(target, _config.count(count, "count"))


class Sharded:
    """Targets that are one shard of a longer input; the journal of their bulk stop records it.

    Attributes:
        shard: The number of the shard, from 1, and the number of shards.
    """

    shard: tuple[int, int]


def shard_in(targets: object) -> tuple[int, int] | None:
    """Return the shard that targets are, and the number of shards; None if not divided."""
    return targets.shard if isinstance(targets, Sharded) and targets.shard != (1, 1) else None


def _shard_of(item: object, count: int) -> int:
    try:
        is_unreadable = type(item) is BctrlResponseError
        workspace_id, alias = best_effort_ref(item) if is_unreadable else as_target(item)
    except BctrlConfigError:
        # Its repr, such as `<object at 0x7f…>`, may be another in each process.
        return _FIRST
    # A name with a control character or a lone surrogate is invalid, but has a shard as well.
    name = f"{workspace_id}\0{alias}".encode(errors="surrogatepass")
    digest = _new_hash()
    # Of bytes: it leaves all but ASCII, for which `str.lower` differs between versions of Unicode.
    digest.update(name.lower())
    return int.from_bytes(digest.digest()) % count + 1


class _Shard(Sharded, Generic[_T]):
    """A shard of an iterable."""

    def __init__(self, targets: Iterable[_T], number: int, count: int) -> None:
        self._targets = targets
        self.shard = number, count

    def __iter__(self) -> Iterator[_T]:
        number, count = self.shard
        return (item for item in self._targets if _shard_of(item, count) == number)


class _SizedShard(_Shard[_T]):
    """A shard of a list or the like, counted when its length is first needed."""

    _length: int | None = None

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(1 for _ in self)
        return self._length


class _AsyncShard(Sharded, Generic[_T]):
    """A shard of an async iterable."""

    def __init__(self, targets: AsyncIterable[_T], number: int, count: int) -> None:
        self._targets = targets
        self.shard = number, count

    async def __aiter__(self) -> AsyncIterator[_T]:
        number, count = self.shard
        async for item in self._targets:
            if _shard_of(item, count) == number:
                yield item
