"""Shards: which targets of an input are in a shard, and in which."""

from __future__ import annotations

import random
from collections import Counter, UserList
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import cast
from uuid import UUID

import pytest
from hypothesis import given, settings, strategies as st

from bctrl_async import BctrlConfigError, BctrlResponseError, RuntimeRef, shard
from bctrl_async.bulk._input import Target, Targets
from bctrl_async.shards import shard_of

COUNT = 4
PRIME = 1_000_000_007
WORKSPACE = "0190b5f0-00aa-7000-8000-000000000001"
TARGETS = [RuntimeRef("ws-1", f"r{number}") for number in range(100)]

# They must never change: a process with another version would stop another shard.
KNOWN = [
    (("ws-1", "r0"), 16, 8),
    (("a", "bc"), PRIME, 485_641_377),
    (("ab", "c"), PRIME, 360_410_712),
    ((WORKSPACE, "crm"), PRIME, 736_177_921),
    (("ws", "日本"), PRIME, 788_034_249),
    (("ws", "Ä"), PRIME, 559_552_955),
    (("", ""), PRIME, 759_442_749),
    (("ws", "\udc80"), PRIME, 822_673_021),
]


class Broken:
    """An item that is not a target and has another repr in each process."""


def plain(items: Iterable[object], number: int, count: int = COUNT) -> list[object]:
    """Return a shard of items that are no stream."""
    part = shard(cast("Iterable[Target]", items), number, count)
    assert isinstance(part, Iterable)
    return list(part)


async def stream(items: Iterable[Target]) -> AsyncIterator[Target]:
    for item in items:
        yield item


async def collect(targets: Targets) -> list[Target]:
    assert isinstance(targets, AsyncIterable)
    return [target async for target in targets]


@pytest.mark.parametrize(("target", "count", "number"), KNOWN)
def test_it_is_a_known_number_for_ever(
    target: tuple[str, str], count: int, number: int
) -> None:
    assert shard_of(target, count) == number


@pytest.mark.parametrize(
    "target",
    [
        [WORKSPACE, "crm"],
        (UUID(WORKSPACE), "crm"),
        (WORKSPACE.upper(), "crm"),
        RuntimeRef(WORKSPACE, "crm"),
    ],
    ids=["list", "UUID", "upper case", "ref"],
)
def test_it_does_not_depend_on_the_form_of_a_target(target: object) -> None:
    assert shard_of(target, PRIME) == shard_of((WORKSPACE, "crm"), PRIME)


@pytest.mark.parametrize(
    "item",
    [
        *("ws,crm", None, Broken(), ("ws", 5), ValueError()),
        BctrlResponseError("unreadable", workspace_id=WORKSPACE, alias="crm"),
    ],
)
def test_an_item_that_is_not_a_target_is_in_the_first(item: object) -> None:
    assert shard_of(item, COUNT) == 1


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.text(max_size=3), st.text(max_size=3)) | st.none() | st.text()
    ),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_in_any_order_every_item_is_in_one(
    items: list[object], count: int, order: random.Random
) -> None:
    items.insert(0, ("ws", "first"))
    shuffled = items[:1] + order.sample(items[1:], len(items) - 1)
    shards, others = (
        [Counter(plain(collection, number, count)) for number in range(1, count + 1)]
        for collection in (items, shuffled)
    )

    assert sum(shards, Counter()) == Counter(items)
    assert others == shards


async def test_a_shard_is_the_same_from_a_collection_a_generator_and_a_stream() -> None:
    expected = [target for target in TARGETS if shard_of(target, COUNT) == 3]

    assert plain(iter(TARGETS), 3) == expected
    assert await collect(shard(stream(TARGETS), 3, COUNT)) == expected
    # It can be read twice and has a length if its targets have.
    assert shard(TARGETS, 3, COUNT) == shard(UserList(TARGETS), 3, COUNT) == expected


async def test_it_reads_nothing_ahead() -> None:
    read = []

    def targets() -> Iterator[RuntimeRef]:
        for target in TARGETS:
            read.append(target)
            yield target

    part, streamed = shard(targets(), 3, COUNT), shard(stream(targets()), 3, COUNT)
    assert read == []
    assert isinstance(part, Iterator)
    assert next(part) == read[-1]
    read.clear()
    assert isinstance(streamed, AsyncIterator)
    assert await anext(streamed) == read[-1]


@pytest.mark.parametrize("number", [0, 5, 1.5])
def test_there_is_no_other_than_those_from_1_to_the_count(number: int) -> None:
    with pytest.raises(BctrlConfigError, match="expected 1 to 4, the count") as raised:
        shard(TARGETS, number, 4)
    assert raised.value.argument == "number"
    with pytest.raises(BctrlConfigError, match="invalid count"):
        shard_of(TARGETS[0], 0)


@pytest.mark.parametrize("number", [1, 2])
async def test_the_first_item_must_be_a_target_in_every_shard(number: int) -> None:
    names = cast("list[Target]", ["r0", "r1"])
    invalid = pytest.raises(BctrlConfigError, match="the first item is 'r0'")
    with invalid:
        shard(names, number, 2)
    with invalid:
        plain(iter(names), number, 2)
    with invalid:
        await collect(shard(stream(names), number, 2))
