"""The input of a bulk stop: its iterables and its targets."""

from __future__ import annotations

import asyncio
import csv
import gc
import io
import sqlite3
from collections import Counter, UserList, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import closing
from enum import StrEnum
from typing import cast
from uuid import UUID

import pytest

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    RuntimeRef,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.bulk._targets import Input, Target, Targets, as_target, best_effort_ref
from bctrl_async.emulator import Emulator

PAIRS = [("ws-1", "a"), ("ws-1", "b"), ("ws-1", "c")]
REFS = [RuntimeRef(*pair) for pair in PAIRS]
WORKSPACE = UUID("0190b5f0-0000-7000-8000-000000000001")


class Alias(StrEnum):
    """A str subclass, as libraries for tables and settings yield."""

    A = "a"


@pytest.fixture
def runtimes(emulator: Emulator) -> Emulator:
    for name in ("a", "b", "c", "d"):
        emulator.add_runtime("ws-1", name)
    emulator.add_runtime(str(WORKSPACE), "a")
    return emulator


def untyped(*items: object) -> Targets:
    """Return items of any type, as an untyped program passes them."""
    return cast("Targets", list(items))


async def stop_all(session: BctrlSession, targets: Targets) -> list[StopOutcome]:
    """Stop the targets, and return the outcomes in the order of the input."""
    outcomes: list[StopOutcome] = []
    report = await session.stop_runtimes(targets, on_outcome=outcomes.append)
    assert report.counts == Counter(outcome.result for outcome in outcomes)
    assert report.total == len(outcomes)
    outcomes.sort(key=lambda outcome: outcome.index)
    assert [outcome.index for outcome in outcomes] == list(range(len(outcomes)))
    return outcomes


def generator() -> Iterator[Target]:
    yield from PAIRS


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


INPUTS: dict[str, Callable[[], Targets]] = {
    "a list": PAIRS.copy,
    "a tuple": lambda: tuple(PAIRS),
    "a set": lambda: set(PAIRS),
    "a frozenset": lambda: frozenset(PAIRS),
    "a deque": lambda: deque(PAIRS),
    "the items of a dict": {"ws-1": "a", "ws-2": "b", "ws-3": "c"}.items,
    "the keys of a dict": lambda: dict.fromkeys(PAIRS, 1).keys(),
    "a list of lists": lambda: untyped(*map(list, PAIRS)),
    "a list of refs": lambda: list(REFS),
    "an iterator": lambda: iter(PAIRS),
    "a zip": lambda: zip(["ws-1"] * 3, "abc", strict=True),
    "a generator": generator,
    "an async generator": async_generator,
    "an async iterator": lambda: Stream(PAIRS),
    "rows of a CSV file": lambda: cast(
        "Targets", csv.reader(io.StringIO("ws-1,a\nws-1,b\nws-1,c\n"))
    ),
}


class TestInput:
    @pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
    async def test_every_target_is_stopped_once(
        self, runtimes: Emulator, session: BctrlSession, make: Callable[[], Targets]
    ) -> None:
        runtimes.add_runtime("ws-2", "b")
        runtimes.add_runtime("ws-3", "c")

        outcomes = await stop_all(session, make())

        assert [outcome.result for outcome in outcomes] == [StopResult.STOPPED] * 3
        assert Counter(outcome.target for outcome in outcomes) == runtimes.received
        assert {outcome.target.alias for outcome in outcomes} == {"a", "b", "c"}

    async def test_outcomes_are_indexed_in_input_order(
        self, runtimes: Emulator, session: BctrlSession
    ) -> None:
        for source in (list(REFS), Stream(PAIRS), async_generator(), generator()):
            outcomes = await stop_all(session, source)
            assert [outcome.target for outcome in outcomes] == REFS
        assert runtimes.received.total() == 12

    @pytest.mark.parametrize(
        "source",
        [[], (), set(), iter(()), Stream(())],
        ids=lambda source: type(source).__name__,
    )
    async def test_an_empty_input_has_no_outcomes(
        self, runtimes: Emulator, session: BctrlSession, source: Targets
    ) -> None:
        report = await session.stop_runtimes(source)

        assert (report.ok, report.total, report.counts) == (True, 0, Counter())
        assert runtimes.requests == []

    async def test_database_rows_are_targets(
        self, runtimes: Emulator, session: BctrlSession
    ) -> None:
        with closing(sqlite3.connect(":memory:")) as database:
            database.row_factory = sqlite3.Row
            database.execute("create table runtimes (workspace text, alias text)")
            database.executemany("insert into runtimes values (?, ?)", PAIRS)
            rows = database.execute("select workspace, alias from runtimes order by alias")
            outcomes = await stop_all(session, cast("Targets", rows))
            all_rows = database.execute("select * from runtimes").fetchall()

        assert [outcome.target for outcome in outcomes] == REFS
        assert {outcome.result for outcome in outcomes} == {StopResult.STOPPED}
        assert [as_target(row) for row in all_rows] == REFS
        assert set(runtimes.received) == set(PAIRS)

    @pytest.mark.parametrize(
        ("make", "length"),
        [
            (PAIRS.copy, 3),
            (lambda: set(PAIRS), 3),
            ({"ws-1": "a"}.items, 1),
            (list, 0),
            (generator, None),
            (async_generator, None),
            (lambda: iter(PAIRS), None),
            (lambda: Stream(PAIRS), None),
        ],
    )
    async def test_total_is_the_length_of_the_input_or_none(
        self, session: BctrlSession, make: Callable[[], Targets], length: int | None
    ) -> None:
        batch = session.stop_runtimes(make())

        assert (batch.total, batch.read) == (length, 0)
        batch.close()

    async def test_targets_are_read_only_as_workers_become_free(
        self, runtimes: Emulator, session: BctrlSession
    ) -> None:
        read = 0

        def count() -> Iterator[Target]:
            nonlocal read
            for pair in PAIRS * 5:
                read += 1
                yield pair

        async with session.stop_runtimes(count(), concurrency=2) as batch:
            assert read == 0
            async for _ in batch:
                assert read <= runtimes.received.total() + 2

        assert read == batch.read == 15

    async def test_concurrent_readers_of_a_slow_input_get_each_item_once(self) -> None:
        source = Input(Stream([("ws-1", str(number)) for number in range(50)]))
        items: list[tuple[int, object]] = []

        async def read() -> None:
            while (item := await source.next()) is not None:
                items.append(item)

        await asyncio.gather(*(read() for _ in range(8)))

        assert items == [(number, ("ws-1", str(number))) for number in range(50)]
        assert (source.count, source.closed, source.error) == (50, True, None)

    async def test_only_a_sized_sync_input_can_be_drained(self) -> None:
        class Sized(Stream):
            def __len__(self) -> int:
                return 3

        sources = [Input(targets) for targets in (PAIRS, generator(), Stream(PAIRS), Sized(PAIRS))]

        assert [source.can_drain for source in sources] == [True, False, False, False]
        assert [source.is_async for source in sources] == [False, False, True, True]
        assert sources[3].length == 3

    async def test_nothing_is_read_from_a_closed_input(self) -> None:
        for source in (Input(PAIRS), Input(Stream(PAIRS))):
            source.closed = True
            assert (source.next_nowait(), await source.next()) == (None, None)
            assert source.count == 0


class TestInvalidInput:
    @pytest.mark.parametrize(
        ("given", "kind"),
        [
            ("ws-1", "str"),
            ("", "str"),
            (b"ws-1", "bytes"),
            ({}, "dict"),
            ({"ws-1": "a"}, "dict"),
        ],
    )
    def test_text_and_mappings_are_rejected_at_once(self, given: object, kind: str) -> None:
        session = BctrlSession("key")
        with pytest.raises(BctrlConfigError) as caught:
            session.stop_runtimes(given)  # type: ignore[arg-type]

        assert str(caught.value) == (
            "invalid targets: expected an iterable or async iterable of (workspace id, alias), "
            f"not {kind}"
        )

    @pytest.mark.parametrize(
        ("given", "kind"), [(3, "int"), (None, "NoneType"), (generator, "function")]
    )
    def test_an_input_that_is_not_iterable_is_rejected_at_once(
        self, given: object, kind: str
    ) -> None:
        session = BctrlSession("key")
        with pytest.raises(BctrlConfigError) as caught:
            session.stop_runtimes(given)  # type: ignore[arg-type]

        assert str(caught.value) == (
            "invalid targets: expected an iterable or async iterable of (workspace id, alias), "
            f"not {kind}"
        )

    @pytest.mark.parametrize("given", [("ws-1", "a"), (UUID(int=1), "a"), RuntimeRef("ws-1", "a")])
    def test_a_single_pair_as_input_is_rejected_at_once(self, given: object) -> None:
        """Fault: each of the two names was an invalid target."""
        session = BctrlSession("key")
        with pytest.raises(BctrlConfigError) as caught:
            session.stop_runtimes(cast("Targets", given))

        assert caught.value.argument == "targets"
        assert str(caught.value) == (
            "invalid targets: expected an iterable or async iterable of (workspace id, alias), "
            "not a single target. Pass a list, such as [('ws-1', 'crm')]"
        )

    @pytest.mark.parametrize("first", ["a", 3, None, {"ws-1": "a"}, ("ws-1", "a", "b"), b"ab"])
    @pytest.mark.parametrize("concurrency", [1, 2])
    async def test_a_first_item_of_another_type_is_an_error_and_nothing_is_sent(
        self, runtimes: Emulator, session: BctrlSession, first: object, concurrency: int
    ) -> None:
        """Fault: `stop_runtimes(["a", "b"])` was a report, in which each name was rejected."""
        batch = session.stop_runtimes(untyped(first, ("ws-1", "b")), concurrency=concurrency)
        with pytest.raises(BctrlConfigError) as caught:
            await batch

        assert str(caught.value) == (
            "invalid targets: expected an iterable or async iterable of (workspace id, alias); "
            f"the first item is {first!r}. Pass pairs, such as [('ws-1', 'crm')]; nothing was "
            "stopped"
        )
        assert runtimes.requests == []
        assert not batch.report.ok
        assert batch.report.total == batch.report.counts.total() == 2

    async def test_what_a_list_gives_can_be_stopped(
        self, runtimes: Emulator, session: BctrlSession
    ) -> None:
        listed = await session.list_runtimes("ws-1")
        outcomes = await stop_all(session, listed)

        assert [outcome.ok for outcome in outcomes] == [True] * len(listed)
        assert {outcome.target.alias for outcome in outcomes} == {each.alias for each in listed}
        assert {runtimes.status("ws-1", alias) for alias in "ab"} == {"stopped"}


VALID_TARGETS: dict[str, object] = {
    "a tuple": ("ws-1", "a"),
    "a list": ["ws-1", "a"],
    "a ref": RuntimeRef("ws-1", "a"),
    "a deque": deque(("ws-1", "a")),
    "a UserList": UserList(("ws-1", "a")),
    "values of a dict": {"workspace": "ws-1", "alias": "a"}.values(),
    "a str enum": ("ws-1", Alias.A),
}


class TestValidTargets:
    @pytest.mark.parametrize("item", VALID_TARGETS.values(), ids=VALID_TARGETS.keys())
    async def test_any_pair_of_texts_is_a_target(
        self, runtimes: Emulator, session: BctrlSession, item: object
    ) -> None:
        (outcome,) = await stop_all(session, untyped(item))

        assert outcome.target == as_target(item) == RuntimeRef("ws-1", "a")
        assert type(outcome.target) is RuntimeRef
        assert (outcome.result, outcome.attempts, outcome.error) == (StopResult.STOPPED, 1, None)
        assert runtimes.received == {("ws-1", "a"): 1}

    @pytest.mark.parametrize(
        "item", [(WORKSPACE, "a"), [WORKSPACE, "a"], (str(WORKSPACE), "a")], ids=repr
    )
    async def test_a_workspace_id_may_be_a_uuid(
        self, runtimes: Emulator, session: BctrlSession, item: object
    ) -> None:
        (outcome,) = await stop_all(session, untyped(item))

        assert outcome.target == RuntimeRef(str(WORKSPACE), "a")
        assert type(outcome.target.workspace_id) is str
        assert runtimes.received == {(str(WORKSPACE), "a"): 1}


INVALID_TARGETS: dict[str, tuple[object, RuntimeRef, str]] = {
    # The item, the target of its outcome, and a part of the text of its error.
    "None": (None, RuntimeRef("", "None"), "invalid target None"),
    "a number": (3, RuntimeRef("", "3"), "invalid target 3"),
    "a two-letter text": ("ab", RuntimeRef("", "ab"), "invalid target 'ab'"),
    "two bytes": (b"ab", RuntimeRef("", "b'ab'"), "invalid target b'ab'"),
    "a dict": (
        {"workspace": "ws-1", "alias": "a"},
        RuntimeRef("", "{'alias': 'a', 'workspace': 'ws-1'}"),
        "invalid target {'alias': 'a', 'workspace': 'ws-1'}",
    ),
    "a set": ({"a", "ws-1"}, RuntimeRef("", "{'a', 'ws-1'}"), "invalid target {'a', 'ws-1'}"),
    "a frozenset": (
        frozenset({"a", "ws-1"}),
        RuntimeRef("", "frozenset({'a', 'ws-1'})"),
        "invalid target frozenset({'a', 'ws-1'})",
    ),
    "three": (
        ("ws-1", "a", "b"),
        RuntimeRef("", "('ws-1', 'a', 'b')"),
        "invalid target ('ws-1', 'a', 'b')",
    ),
    "one": (("a",), RuntimeRef("", "('a',)"), "invalid target ('a',)"),
    "nothing": ((), RuntimeRef("", "()"), "invalid target ()"),
    "a number and a text": ((1, "a"), RuntimeRef("1", "a"), "invalid target (1, 'a')"),
    "a text and None": (
        ("ws-1", None),
        RuntimeRef("ws-1", "None"),
        "invalid target ('ws-1', None)",
    ),
    "a text and a UUID": (
        ("ws-1", UUID(int=5)),
        RuntimeRef("ws-1", str(UUID(int=5))),
        f"invalid target ('ws-1', {UUID(int=5)!r})",
    ),
    "bytes": ((b"ws", b"a"), RuntimeRef("b'ws'", "b'a'"), "invalid target (b'ws', b'a')"),
    "an empty workspace id": (("", "a"), RuntimeRef("", "a"), "workspace id is empty"),
    "an empty alias": (("ws-1", ""), RuntimeRef("ws-1", ""), "alias is empty"),
    "a step in a path": (("ws-1", ".."), RuntimeRef("ws-1", ".."), "alias '..' could be taken"),
    "another step in a path": (("..", "a"), RuntimeRef("..", "a"), "workspace id '..' could be"),
    "a line end": (("ws-1", "a\n"), RuntimeRef("ws-1", "a\n"), r"alias 'a\n' contains a control"),
    "a lone surrogate": (
        ("ws-1", "\ud800"),
        RuntimeRef("ws-1", "\ud800"),
        r"alias '\ud800' contains a lone",
    ),
}


class TestInvalidTargets:
    @pytest.mark.parametrize(
        ("item", "target", "text"), INVALID_TARGETS.values(), ids=INVALID_TARGETS.keys()
    )
    async def test_an_invalid_target_is_rejected_and_the_others_are_stopped(
        self,
        runtimes: Emulator,
        session: BctrlSession,
        item: object,
        target: RuntimeRef,
        text: str,
    ) -> None:
        first, outcome, last = await stop_all(session, untyped(("ws-1", "a"), item, ("ws-1", "b")))

        assert (outcome.result, outcome.target, outcome.attempts) == (
            StopResult.REJECTED,
            target,
            0,
        )
        assert type(outcome.error) is BctrlConfigError
        assert text in str(outcome.error)
        assert outcome.runtime is None
        assert (first.result, last.result) == (StopResult.STOPPED, StopResult.STOPPED)
        assert runtimes.received == {("ws-1", "a"): 1, ("ws-1", "b"): 1}

    async def test_the_error_of_any_other_object_has_its_repr(self, session: BctrlSession) -> None:
        class Thing:
            def __repr__(self) -> str:
                return "<Thing 7>"

        _, outcome = await stop_all(session, untyped(("ws-1", "a"), Thing()))

        assert outcome.target == RuntimeRef("", "<Thing 7>")
        assert str(outcome.error).startswith("invalid target <Thing 7>: expected")

    async def test_an_object_whose_repr_raises_is_rejected(self, session: BctrlSession) -> None:
        class Thing:
            def __repr__(self) -> str:
                raise LookupError

        _, outcome = await stop_all(session, untyped(("ws-1", "a"), Thing()))

        assert "<Thing instance at" in str(outcome.error)

    async def test_the_text_of_a_value_error_is_the_reason(self, session: BctrlSession) -> None:
        error = ValueError("row 7 has one column")
        (first,) = await stop_all(session, untyped(error))

        assert str(first.error) == (
            "invalid target ValueError('row 7 has one column'): row 7 has one column"
        )
        assert first.error is not None
        assert first.error.__cause__ is error

    async def test_an_iterator_of_two_is_rejected_and_not_read(self, session: BctrlSession) -> None:
        pair = iter(("ws-1", "a"))

        _, outcome = await stop_all(session, untyped(("ws-1", "a"), pair))

        assert outcome.result is StopResult.REJECTED
        assert list(pair) == ["ws-1", "a"]

    @pytest.mark.parametrize(
        "item",
        ["x" * 10**6, list(range(10**5)), ("ws-1", ["x" * 10**6])],
        ids=["text", "list", "in"],
    )
    def test_the_repr_of_a_large_item_is_shortened(self, item: object) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            as_target(item)

        assert len(str(caught.value)) < 200
        if not isinstance(item, str):
            assert len(str(best_effort_ref(item))) < 200

    @pytest.mark.usefixtures("runtimes")
    async def test_raise_for_failures_names_each_invalid_target(
        self, session: BctrlSession
    ) -> None:
        report = await session.stop_runtimes(untyped(("ws-1", "a"), "ab", 3, ("ws-1", "a", "b")))
        with pytest.raises(ExceptionGroup, match="3 of 4 runtimes may still be") as caught:
            report.raise_for_failures()

        assert [str(error).split(": expected")[0] for error in caught.value.exceptions] == [
            "invalid target 'ab'",
            "invalid target 3",
            "invalid target ('ws-1', 'a', 'b')",
        ]

    @pytest.mark.parametrize("item", [("ws-7", ""), ("ws-7", ".."), ("..", "a7")], ids=repr)
    async def test_the_error_of_an_invalid_name_has_the_workspace_id_and_alias(
        self, session: BctrlSession, item: tuple[str, str]
    ) -> None:
        (outcome,) = await stop_all(session, [item])

        assert outcome.error is not None
        assert (outcome.error.workspace_id, outcome.error.alias) == item

    @pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError])
    async def test_an_item_that_raises_on_access_has_an_outcome(
        self, runtimes: Emulator, session: BctrlSession, error: type[BaseException]
    ) -> None:
        class Detached(UserList[str]):
            """A lazily loaded row of a database that is gone."""

            def __len__(self) -> int:
                return 2

            def __iter__(self) -> Iterator[str]:
                raise error("detached")

        items = [Detached(), ("ws-1", Detached())]
        report = await session.stop_runtimes(
            [("ws-1", "a"), *items, ("ws-1", "b")],  # type: ignore[list-item]  # Odd on purpose.
            concurrency=1,
        )
        gc.collect()  # A crashed worker warns when it is collected, so collect it in this test.

        assert report.total == report.counts.total() == 2 + len(items)
        assert report.counts[StopResult.REJECTED] == len(items)
        assert runtimes.received == {("ws-1", "a"): 1, ("ws-1", "b"): 1}


class InputError(Exception):
    """Raised by an input of these tests."""


def failing(read: int, error: Exception) -> Iterator[Target]:
    yield from PAIRS[:read]
    raise error


async def failing_async(read: int, error: Exception) -> AsyncIterator[Target]:
    for pair in PAIRS[:read]:
        await asyncio.sleep(0)
        yield pair
    raise error


@pytest.mark.parametrize("concurrency", [1, 2, 10])
@pytest.mark.parametrize("read", [0, 1, 3])
@pytest.mark.parametrize("make", [failing, failing_async])
class TestInputRaises:
    async def test_the_error_is_raised_after_the_outcomes_of_the_targets_read(
        self,
        runtimes: Emulator,
        session: BctrlSession,
        make: Callable[[int, Exception], Targets],
        read: int,
        concurrency: int,
    ) -> None:
        error = InputError("row 4")
        stopped: list[RuntimeRef] = []
        batch = session.stop_runtimes(
            make(read, error),
            concurrency=concurrency,
            on_outcome=lambda outcome: stopped.append(outcome.target),
        )
        with pytest.raises(InputError) as caught:
            await batch

        assert caught.value is error
        assert sorted(stopped) == REFS[:read]
        assert runtimes.received == dict.fromkeys(PAIRS[:read], 1)
        self.assert_all_stopped(batch.report, read)

    async def test_the_error_is_raised_after_the_streamed_outcomes(
        self,
        runtimes: Emulator,
        session: BctrlSession,
        make: Callable[[int, Exception], Targets],
        read: int,
        concurrency: int,
    ) -> None:
        error = InputError("row 4")
        stopped: list[RuntimeRef] = []
        async with session.stop_runtimes(make(read, error), concurrency=concurrency) as batch:
            while len(stopped) < read:
                stopped.append((await anext(batch)).target)
            with pytest.raises(InputError) as caught:
                await anext(batch)

        assert caught.value is error
        assert sorted(stopped) == REFS[:read]
        assert runtimes.received == dict.fromkeys(PAIRS[:read], 1)
        self.assert_all_stopped(batch.report, read)

    def assert_all_stopped(self, report: StopReport, read: int) -> None:
        assert report.total == read
        assert report.counts == ({StopResult.STOPPED: read} if read else {})
        assert report.failures == ()


class TestFailedInput:
    @pytest.mark.parametrize("several_workers", [True, False])
    async def test_a_failed_input_is_not_read_again(
        self, runtimes: Emulator, session: BctrlSession, *, several_workers: bool
    ) -> None:
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
            await session.stop_runtimes(flaky, concurrency=3 if several_workers else 1)

        assert flaky.reads == 2
        assert runtimes.received == {PAIRS[0]: 1}

    def test_an_error_of_iter_is_raised_at_once(self) -> None:
        class Broken:
            def __iter__(self) -> Iterator[Target]:
                raise InputError("no cursor")

        with pytest.raises(InputError, match="no cursor"):
            BctrlSession("key").stop_runtimes(Broken())

    async def test_a_generator_that_raises_cancelled_error_has_failed(
        self, runtimes: Emulator, session: BctrlSession
    ) -> None:
        def cancelled() -> Iterator[Target]:
            yield PAIRS[0]
            raise asyncio.CancelledError  # As `Task.result` of a cancelled task does.

        batch = session.stop_runtimes(cancelled())
        with pytest.raises(BctrlError, match="the input raised CancelledError"):
            await batch
        assert runtimes.received.total() == 1
        assert not batch.report.ok

    @pytest.mark.parametrize("concurrency", [1, 5])
    async def test_an_async_generator_that_raises_cancelled_error_has_failed(
        self, runtimes: Emulator, session: BctrlSession, concurrency: int
    ) -> None:
        """Fault: an async input that raised CancelledError ended the run as a success."""

        async def targets() -> AsyncIterator[Target]:
            for pair in PAIRS[:3]:
                yield pair
            cancelled = asyncio.get_running_loop().create_future()
            cancelled.cancel()
            await cancelled
            yield PAIRS[0]

        batch = session.stop_runtimes(targets(), concurrency=concurrency)
        with pytest.raises(BctrlError, match="the input raised CancelledError") as caught:
            await batch

        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        assert batch.report.counts == {StopResult.STOPPED: 3}
        assert runtimes.received.total() == 3
        assert str(batch.report.ended_early) == str(caught.value)
        assert not batch.report.ok


async def test_a_list_that_is_read_no_further_is_let_go(session: BctrlSession) -> None:
    """Fault: the file of a generator stays open until garbage is collected."""
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
