"""Shards: parts of an input that several processes stop, each on its own."""

from collections.abc import AsyncIterable, Sized
from hashlib import blake2b

from bctrl_async import _config
from bctrl_async._refs import as_target
from bctrl_async.bulk._input import Targets, check_first, check_targets
from bctrl_async.errors import BctrlConfigError, BctrlError

__all__ = ["shard", "shard_of"]


def shard(targets: Targets, number: int, count: int) -> Targets:
    """Return the targets of one shard in their order; each is in exactly one shard.

    Args:
        targets: As for `stop_runtimes`. Targets with a length give a list, others are
            read lazily.
        number: The shard, from 1 to `count`.
        count: The number of shards; the same in each process.

    Raises:
        BctrlConfigError: `targets` cannot be iterated over, `number` is not in range,
            or the first item is not a target: then perhaps only when the result is
            read.
    """
    if number not in range(1, _config.count(count, "count") + 1):
        problem = f"invalid number {number!r:.50}: expected 1 to {count}, the count"
        raise BctrlConfigError(problem, argument="number")
    check_targets(targets)
    is_first = True

    def is_in_shard(item: object) -> bool:
        nonlocal is_first
        if is_first:
            # Shard 1 has all items that are not targets, so without this check it alone
            # would reject a wrong input.
            check_first(item)
            is_first = False
        return shard_of(item, count) == number

    if isinstance(targets, AsyncIterable):
        return (item async for item in targets if is_in_shard(item))
    items = (item for item in targets if is_in_shard(item))
    if isinstance(targets, Sized):
        return list(items)
    return items


def shard_of(target: object, count: int) -> int:
    """Return the shard of a target, from 1, the same in every process and version.

    It is 1 plus the remainder by `count` of the big-endian BLAKE2b hash (8 bytes) of
    workspace id, NUL and alias in UTF-8, with A to Z as a to z. Items that are not
    targets are in shard 1.
    """
    try:
        workspace_id, alias = as_target(target)
    except BctrlError:
        return 1
    # Lowering bytes changes only ASCII: Unicode's letters differ between versions.
    name = f"{workspace_id}\0{alias}".encode(errors="surrogatepass").lower()
    digest = blake2b(name, digest_size=8).digest()
    return int.from_bytes(digest) % _config.count(count, "count") + 1
