"""The input of a bulk stop: its iterables and its targets."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from collections import Counter, UserList
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sized
from collections.abc import Set as AbstractSet
from contextlib import closing
from enum import StrEnum
from typing import cast
from uuid import UUID

import pytest
from helpers import Bulk

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    RuntimeRef,
    StopOutcome,
    StopResult,
)
from bctrl_async.bulk._targets import Target, Targets
from bctrl_async.emulator import Emulator

PAIRS = [("ws-1", "a"), ("ws-1", "b"), ("ws-1", "c")]
REFS = [RuntimeRef(*pair) for pair in PAIRS]
WORKSPACE = UUID("0190b5f0-0000-7000-8000-000000000001")


class Alias(StrEnum):
    """A str subclass, as libraries for tables and settings yield."""

    A = "a"


@pytest.fixture(autouse=True)
def _runtimes(emulator: Emulator) -> None:
    for name in ("a", "b", "c", "d"):
        emulator.add_runtime("ws-1", name)
    emulator.add_runtime(str(WORKSPACE), "a")


def untyped(*items: object) -> Targets:
    """Return items of any type, as an untyped program passes them."""
    return cast("Targets", list(items))


async def stop_all(bulk: Bulk, targets: Targets) -> list[StopOutcome]:
    """Stop the targets, and return the outcomes in the order of the input."""
    outcomes: list[StopOutcome] = []
    batch = bulk.session.stop_runtimes(targets, on_outcome=outcomes.append)
    assert batch.total == (len(targets) if isinstance(targets, Sized) else None)
    assert batch.read == 0
    report = await batch
    assert report.counts == Counter(outcome.result for outcome in outcomes)
    assert report.total == len(outcomes)
    outcomes.sort(key=lambda outcome: outcome.index)
    assert [outcome.index for outcome in outcomes] == list(range(len(outcomes)))
    return outcomes


async def async_generator() -> AsyncIterator[Target]:
    for pair in PAIRS:
        await asyncio.sleep(0)
        yield pair


class Stream:
    """An async iterator that fails if two readers await it at once."""

    def __init__(self, pairs: Iterable[Target]) -> None:
        self._remaining = iter(pairs)
        self._reading = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Target:
        assert not self._reading
        self._reading = True
        await asyncio.sleep(0)
        self._reading = False
        for pair in self._remaining:
            return pair
        raise StopAsyncIteration


class SizedStream(Stream):
    def __len__(self) -> int:
        return 3


def database_rows() -> Targets:
    with closing(sqlite3.connect(":memory:")) as database:
        database.row_factory = sqlite3.Row
        database.execute("create table runtimes (workspace text, alias text)")
        database.executemany("insert into runtimes values (?, ?)", PAIRS)
        return untyped(*database.execute("select * from runtimes order by alias").fetchall())


INPUTS: dict[str, Callable[[], Targets]] = {
    "a list": PAIRS.copy,
    "a set": lambda: set(PAIRS),
    "the items of a dict": {"ws-1": "a", "ws-2": "b", "ws-3": "c"}.items,
    "a zip": lambda: zip(["ws-1"] * 3, "abc", strict=True),
    "an async generator": async_generator,
    "an async iterator": lambda: Stream(PAIRS),
    "an async iterator with a length": lambda: SizedStream(PAIRS),
    "rows of a database": database_rows,
}


class TestInput:
    @pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
    async def test_every_target_is_stopped_once(
        self, bulk: Bulk, make: Callable[[], Targets]
    ) -> None:
        bulk.emulator.add_runtime("ws-2", "b")
        bulk.emulator.add_runtime("ws-3", "c")

        outcomes = await stop_all(bulk, make())

        assert [outcome.result for outcome in outcomes] == [StopResult.STOPPED] * 3
        assert Counter(outcome.target for outcome in outcomes) == bulk.emulator.received
        assert {outcome.target.alias for outcome in outcomes} == {"a", "b", "c"}
        if not isinstance(make(), AbstractSet):
            assert [outcome.target.alias for outcome in outcomes] == ["a", "b", "c"]

    @pytest.mark.parametrize("source", [[], iter(()), Stream(())], ids=type)
    async def test_an_empty_input_has_no_outcomes(self, bulk: Bulk, source: Targets) -> None:
        report = await bulk.session.stop_runtimes(source)

        assert (report.ok, report.total, report.counts) == (True, 0, Counter())
        assert bulk.emulator.requests == []


SINGLE = "a single target. Pass a list, such as [('ws-1', 'crm')]"


class TestInvalidInput:
    @pytest.mark.parametrize(
        ("given", "kind"),
        [
            ("ws-1", "str"),
            (b"ws-1", "bytes"),
            ({"ws-1": "a"}, "dict"),
            (async_generator, "function"),
            (("ws-1", "a"), SINGLE),
            ((UUID(int=1), "a"), SINGLE),
            (RuntimeRef("ws-1", "a"), SINGLE),
        ],
    )
    def test_what_is_no_iterable_of_targets_is_rejected_at_once(
        self, given: object, kind: str
    ) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            BctrlSession("key").stop_runtimes(cast("Targets", given))

        assert caught.value.argument == "targets"
        assert str(caught.value) == (
            "invalid targets: expected an iterable or async iterable of (workspace id, alias), "
            f"not {kind}"
        )

    @pytest.mark.parametrize("first", [None, {"ws-1": "a"}, ("ws-1", "a", "b"), b"ab"])
    @pytest.mark.parametrize("concurrency", [1, 2])
    async def test_a_first_item_of_another_type_is_an_error_and_nothing_is_sent(
        self, bulk: Bulk, first: object, concurrency: int
    ) -> None:
        batch = bulk.session.stop_runtimes(untyped(first, ("ws-1", "b")), concurrency=concurrency)
        with pytest.raises(BctrlConfigError) as caught:
            await batch

        assert str(caught.value) == (
            "invalid targets: expected an iterable or async iterable of (workspace id, alias); "
            f"the first item is {first!r}. Pass pairs, such as [('ws-1', 'crm')]; nothing was "
            "stopped"
        )
        assert bulk.emulator.requests == []
        assert not batch.report.ok
        assert batch.report.total == batch.report.counts.total() == 2

    async def test_what_a_list_gives_can_be_stopped(self, bulk: Bulk) -> None:
        listed = await bulk.session.list_runtimes("ws-1")
        outcomes = await stop_all(bulk, listed)

        assert [outcome.ok for outcome in outcomes] == [True] * len(listed)
        assert {outcome.target.alias for outcome in outcomes} == {each.alias for each in listed}
        assert {bulk.emulator.status("ws-1", alias) for alias in "ab"} == {"stopped"}


VALID_TARGETS: dict[str, tuple[object, str]] = {
    "a tuple": (("ws-1", "a"), "ws-1"),
    "a ref": (RuntimeRef("ws-1", "a"), "ws-1"),
    "a UserList": (UserList(("ws-1", "a")), "ws-1"),
    "values of a dict": ({"workspace": "ws-1", "alias": "a"}.values(), "ws-1"),
    "a str enum": (("ws-1", Alias.A), "ws-1"),
    "a tuple with a UUID": ((WORKSPACE, "a"), str(WORKSPACE)),
}


@pytest.mark.parametrize(("item", "workspace_id"), VALID_TARGETS.values(), ids=VALID_TARGETS)
async def test_any_pair_of_texts_is_a_target(bulk: Bulk, item: object, workspace_id: str) -> None:
    (outcome,) = await stop_all(bulk, untyped(item))

    assert outcome.target == RuntimeRef(workspace_id, "a")
    assert type(outcome.target) is RuntimeRef
    assert {type(text) for text in outcome.target} == {str}
    assert (outcome.result, outcome.attempts, outcome.error) == (StopResult.STOPPED, 1, None)
    assert outcome.runtime is not None
    assert outcome.elapsed > 0
    assert bulk.emulator.received == {(workspace_id, "a"): 1}


class Unprintable:
    def __repr__(self) -> str:
        raise LookupError


NOT_TARGETS: list[tuple[object, str]] = [
    # The item, and its description in the text of its error.
    (3, "3"),
    ("ab", "'ab'"),
    (b"ab", "b'ab'"),
    ({"workspace": "ws-1", "alias": "a"}, "{'alias': 'a', 'workspace': 'ws-1'}"),
    ({"a", "ws-1"}, "{'a', 'ws-1'}"),
    (("ws-1", "a", "b"), "('ws-1', 'a', 'b')"),
    (Unprintable(), "<Unprintable instance at"),
    ((1, "a"), "(1, 'a')"),
    (("ws-1", UUID(int=5)), f"('ws-1', {UUID(int=5)!r})"),
    (iter(("ws-1", "a")), "<tuple_iterator"),
]
NAMED: dict[str, RuntimeRef] = {
    # The targets of the outcomes of pairs.
    "(1, 'a')": RuntimeRef("1", "a"),
    f"('ws-1', {UUID(int=5)!r})": RuntimeRef("ws-1", str(UUID(int=5))),
}
BAD_NAMES = {
    ("", "a"): "workspace id is empty",
    ("ws-1", ".."): "alias '..' could be taken",
    ("ws-1", "\ud800"): r"alias '\ud800' contains a lone",
}


class TestInvalidTargets:
    async def rejected(self, bulk: Bulk, item: object) -> tuple[StopOutcome, str]:
        """Stop two targets with an item between them; return its outcome and error."""
        first, outcome, last = await stop_all(bulk, untyped(("ws-1", "a"), item, ("ws-1", "b")))

        assert (outcome.result, outcome.attempts) == (StopResult.REJECTED, 0)
        assert outcome.runtime is None
        assert type(outcome.error) is BctrlConfigError
        assert (first.result, last.result) == (StopResult.STOPPED, StopResult.STOPPED)
        assert bulk.emulator.received == {("ws-1", "a"): 1, ("ws-1", "b"): 1}
        return outcome, str(outcome.error)

    @pytest.mark.parametrize(("item", "text"), NOT_TARGETS, ids=lambda value: str(type(value)))
    async def test_what_is_no_target_is_rejected_and_the_others_are_stopped(
        self, bulk: Bulk, item: object, text: str
    ) -> None:
        outcome, error = await self.rejected(bulk, item)

        assert error.startswith(f"invalid target {text}")
        if isinstance(item, Unprintable | Iterator):
            assert text in outcome.target.alias
        else:
            alias = item if isinstance(item, str) else text
            assert outcome.target == NAMED.get(text, RuntimeRef("", alias))

    @pytest.mark.parametrize(("item", "text"), BAD_NAMES.items(), ids=map(ascii, BAD_NAMES))
    async def test_a_name_that_no_runtime_has_is_rejected_and_the_others_are_stopped(
        self, bulk: Bulk, item: tuple[str, str], text: str
    ) -> None:
        outcome, error = await self.rejected(bulk, item)

        assert text in error
        assert outcome.target == item
        assert outcome.error is not None
        assert (outcome.error.workspace_id, outcome.error.alias) == item

    @pytest.mark.parametrize(
        "item",
        ["x" * 10**6, list(range(10**5)), ("ws-1", ["x" * 10**6])],
        ids=["text", "list", "in"],
    )
    async def test_the_repr_of_a_large_item_is_shortened(self, bulk: Bulk, item: object) -> None:
        outcome, error = await self.rejected(bulk, item)

        assert len(error) < 200
        # A text is its own alias.
        assert len(str(outcome.target)) < 200 or isinstance(item, str)

    async def test_the_text_of_a_value_error_is_the_reason(self, bulk: Bulk) -> None:
        error = ValueError("row 7 has one column")
        (first,) = await stop_all(bulk, untyped(error))

        assert str(first.error) == (
            "invalid target ValueError('row 7 has one column'): row 7 has one column"
        )
        assert first.error is not None
        assert first.error.__cause__ is error

    @pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError])
    async def test_an_item_that_raises_on_access_has_an_outcome(
        self, bulk: Bulk, error: type[BaseException]
    ) -> None:
        class Detached(UserList[str]):
            """A lazily loaded row of a database that is gone."""

            def __len__(self) -> int:
                return 2

            def __iter__(self) -> Iterator[str]:
                raise error("detached")

        items = [Detached(), ("ws-1", Detached())]
        report = await bulk.session.stop_runtimes(
            [("ws-1", "a"), *items, ("ws-1", "b")],  # type: ignore[list-item]  # Odd on purpose.
            concurrency=1,
        )
        gc.collect()  # A crashed worker warns when it is collected, so collect it in this test.

        assert report.total == report.counts.total() == 2 + len(items)
        assert report.counts[StopResult.REJECTED] == len(items)
        assert bulk.emulator.received == {("ws-1", "a"): 1, ("ws-1", "b"): 1}


class InputError(Exception):
    """Raised by an input of these tests."""


def failing(read: int, error: BaseException) -> Iterator[Target]:
    yield from PAIRS[:read]
    raise error


async def failing_async(read: int, error: BaseException) -> AsyncIterator[Target]:
    for pair in PAIRS[:read]:
        await asyncio.sleep(0)
        yield pair
    raise error


@pytest.mark.parametrize("concurrency", [1, 10])
@pytest.mark.parametrize("read", [0, 3])
@pytest.mark.parametrize("make", [failing, failing_async])
# A CancelledError is what `Task.result` of a cancelled task raises.
@pytest.mark.parametrize("error", [InputError("row 4"), asyncio.CancelledError()])
@pytest.mark.parametrize("streamed", [False, True])
async def test_the_error_of_an_input_is_raised_after_the_outcomes_of_the_targets_read(
    bulk: Bulk,
    make: Callable[[int, BaseException], Targets],
    read: int,
    error: BaseException,
    concurrency: int,
    *,
    streamed: bool,
) -> None:
    stopped: list[RuntimeRef] = []
    batch = bulk.session.stop_runtimes(
        make(read, error),
        concurrency=concurrency,
        on_outcome=lambda outcome: stopped.append(outcome.target),
    )
    with pytest.raises((InputError, BctrlError)) as caught:  # noqa: PT012 - the block is tested.
        if streamed:
            async with batch:
                for _ in range(read):
                    await anext(batch)
                await anext(batch)
        else:
            await batch

    if isinstance(error, InputError):
        assert caught.value is error
    else:
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        assert str(caught.value) == "the input raised CancelledError"
        assert str(batch.report.ended_early) == str(caught.value)
    assert sorted(stopped) == REFS[:read]
    assert bulk.emulator.received == dict.fromkeys(PAIRS[:read], 1)
    assert batch.report.total == read
    assert batch.report.counts == ({StopResult.STOPPED: read} if read else {})
    assert (batch.report.failures, batch.report.ok) == ((), False)


class TestFailedInput:
    @pytest.mark.parametrize("concurrency", [1, 3])
    async def test_a_failed_input_is_not_read_again(self, bulk: Bulk, concurrency: int) -> None:
        class Flaky:
            reads = 0

            def __iter__(self) -> Flaky:
                return self

            def __next__(self) -> Target:
                self.reads += 1
                if self.reads == 2:
                    raise InputError
                return PAIRS[0]

        flaky = Flaky()
        with pytest.raises(InputError):
            await bulk.session.stop_runtimes(flaky, concurrency=concurrency)

        assert flaky.reads == 2
        assert bulk.emulator.received == {PAIRS[0]: 1}

    def test_an_error_of_iter_is_raised_at_once(self) -> None:
        class Broken:
            def __iter__(self) -> Iterator[Target]:
                raise InputError("no cursor")

        with pytest.raises(InputError, match="no cursor"):
            BctrlSession("key").stop_runtimes(Broken())


async def test_a_list_that_is_read_no_further_is_let_go(session: BctrlSession) -> None:
    ended = []

    class Lines(UserList[RuntimeRef]):
        def __iter__(self) -> Iterator[RuntimeRef]:
            try:
                yield from self.data
            finally:
                ended.append(True)

    batch = session.stop_runtimes(Lines(REFS))
    batch.stop_reading()
    await batch
    assert ended == [True]
