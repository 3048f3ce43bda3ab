"""Shards: which targets of an input are in one, and in which."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, UserList
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from enum import StrEnum
from typing import cast
from uuid import UUID

import pytest
from helpers import Bulk
from hypothesis import given, settings
from hypothesis import strategies as st

from bctrl_async import (
    BctrlConfigError,
    BctrlResponseError,
    RuntimeRef,
    StopResult,
    shard,
)
from bctrl_async.bulk._targets import Target, Targets
from bctrl_async.shards import shard_of

COUNT = 4
WORKSPACE = "0190b5f0-00aa-7000-8000-000000000001"
TARGETS = [RuntimeRef("ws-1", f"r{number}") for number in range(100)]

# They must never change: a process with another version would stop another shard.
KNOWN = [
    (("ws-1", "r0"), 16, 8),
    (("a", "bc"), 1_000_000_007, 485_641_377),
    (("ab", "c"), 1_000_000_007, 360_410_712),
    ((WORKSPACE, "crm"), 1_000_000_007, 736_177_921),
    (("ws", "日本"), 1_000_000_007, 788_034_249),
    (("ws", "Ä"), 1_000_000_007, 559_552_955),
    (("", ""), 1_000_000_007, 759_442_749),
    (("ws", "\udc80"), 1_000_000_007, 822_673_021),
]


class Alias(StrEnum):
    """A str subclass, as libraries for tables and settings yield."""

    CRM = "crm"


class Broken:
    """An item that is not a target and has another repr in each process."""


def all_shards(items: Iterable[object], count: int = COUNT) -> list[list[object]]:
    return [plain(items, number, count) for number in range(1, count + 1)]


def plain(items: Iterable[object], number: int, count: int = COUNT) -> list[object]:
    """Return a shard of items that are no stream."""
    part = shard(cast("Iterable[Target]", items), number, count)
    assert isinstance(part, Iterable)
    return list(part)


async def stream(items: Iterable[Target]) -> AsyncIterator[Target]:
    for item in items:
        yield item
        await asyncio.sleep(0)


async def collect(targets: Targets) -> list[Target]:
    assert isinstance(targets, AsyncIterable)
    return [target async for target in targets]


class TestShardOf:
    @pytest.mark.parametrize(("target", "count", "number"), KNOWN)
    def test_it_is_a_known_number_for_ever(
        self, target: tuple[str, str], count: int, number: int
    ) -> None:
        assert shard_of(target, count) == number

    @pytest.mark.parametrize(
        "target",
        [
            (WORKSPACE, "crm"),
            [WORKSPACE, "crm"],
            (UUID(WORKSPACE), "crm"),
            (WORKSPACE.upper(), "crm"),
            (WORKSPACE, Alias.CRM),
            RuntimeRef(WORKSPACE, "crm"),
        ],
        ids=["tuple", "list", "UUID", "upper case", "enum", "ref"],
    )
    def test_it_does_not_depend_on_the_form_of_a_target(self, target: object) -> None:
        assert shard_of(target, 1_000_000_007) == shard_of((WORKSPACE, "crm"), 1_000_000_007)

    @pytest.mark.parametrize(
        "item",
        [
            *("ws,crm", None, Broken(), ("ws",), ("ws", 5), ValueError()),
            BctrlResponseError("unreadable", workspace_id=WORKSPACE, alias="crm"),
        ],
    )
    def test_an_item_that_is_not_a_target_is_in_the_first(self, item: object) -> None:
        assert shard_of(item, COUNT) == 1

    @pytest.mark.parametrize("count", [0, -1, 1.0, "4", True])
    def test_the_number_of_shards_is_a_positive_whole_number(self, count: int) -> None:
        with pytest.raises(BctrlConfigError, match="invalid count"):
            shard_of(("ws", "a"), count)


class TestShard:
    @settings(max_examples=30)
    @given(
        st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)) | st.none() | st.text()),
        st.integers(1, 5),
        st.randoms(use_true_random=False),
    )
    def test_every_item_is_in_one_shard_from_any_order(
        self, items: list[object], count: int, order: random.Random
    ) -> None:
        items.insert(0, ("ws", "first"))
        shards = all_shards(items, count)
        shuffled = items[:1] + order.sample(items[1:], len(items) - 1)

        assert Counter(item for each in shards for item in each) == Counter(items)
        assert list(map(Counter, all_shards(shuffled, count))) == list(map(Counter, shards))

    async def test_it_is_the_same_from_a_list_a_generator_and_a_stream(self) -> None:
        expected = [target for target in TARGETS if shard_of(target, COUNT) == 3]

        assert plain(TARGETS, 3) == expected
        assert plain(iter(TARGETS), 3) == expected
        assert await collect(shard(stream(TARGETS), 3, COUNT)) == expected

    async def test_it_reads_nothing_ahead(self) -> None:
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

    def test_it_can_be_read_twice_and_has_a_length_if_its_targets_have(self) -> None:
        for targets in (TARGETS, UserList(TARGETS), set(TARGETS)):
            part = shard(targets, 3, COUNT)
            assert isinstance(part, list)
            assert len(part) > 0

    @pytest.mark.parametrize("number", [0, 5, -1, 1.5, "1", None])
    def test_there_is_no_other_than_those_from_1_to_the_count(self, number: int) -> None:
        with pytest.raises(BctrlConfigError, match="expected 1 to 4, the count") as raised:
            shard(TARGETS, number, 4)
        assert raised.value.argument == "number"

    @pytest.mark.parametrize("number", [1, 2])
    async def test_the_first_item_must_be_a_target_in_every_shard(self, number: int) -> None:
        names = cast("list[Target]", ["r0", "r1"])
        invalid = pytest.raises(BctrlConfigError, match="the first item is 'r0'")
        with invalid:
            shard(names, number, 2)
        lazy = shard(iter(names), number, 2)
        assert isinstance(lazy, Iterator)
        with invalid:
            next(lazy)
        with invalid:
            await collect(shard(stream(names), number, 2))


async def test_the_shards_together_give_every_item_one_outcome(bulk: Bulk) -> None:
    for target in TARGETS:
        bulk.emulator.add_runtime(*target)
    items = cast("Targets", [*TARGETS, "not a target", Broken(), ("", "nameless")])

    results: Counter[StopResult] = Counter()
    for number in range(1, COUNT + 1):
        batch = bulk.session.stop_runtimes(shard(items, number, COUNT))
        report = await batch
        assert batch.total == report.total == report.counts.total()
        results += report.counts

    assert results == {StopResult.STOPPED: 100, StopResult.REJECTED: 3}
    assert {bulk.emulator.received[target] for target in TARGETS} == {1}
