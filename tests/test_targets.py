"""The input of a bulk stop: what is one, what is a target, and the report that accounts for it."""

from __future__ import annotations

import asyncio
import csv
import gc
import io
import re
import reprlib
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
    BctrlNetworkError,
    BctrlSession,
    BctrlTimeoutError,
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


class Name(StrEnum):
    """Text of another type, as libraries for tables and settings have it."""

    ALIAS = "a"


@pytest.fixture
def runtimes(emulator: Emulator) -> Emulator:
    for name in ("a", "b", "c", "d"):
        emulator.add_runtime("ws-1", name)
    emulator.add_runtime(str(WORKSPACE), "a")
    return emulator


def targets(*items: object) -> Targets:
    """Items of any kind, as an untyped program passes them."""
    return cast("Targets", list(items))


async def outcomes(session: BctrlSession, given: Targets) -> list[StopOutcome]:
    """Stop what is given, and return the outcomes in the order of the input."""
    told: list[StopOutcome] = []
    report = await session.stop_runtimes(given, on_outcome=told.append)
    assert report.counts == Counter(each.result for each in told)
    assert report.total == len(told)
    told.sort(key=lambda each: each.index)
    assert [each.index for each in told] == list(range(len(told)))
    return told


def generator() -> Iterator[Target]:
    yield from PAIRS


async def async_generator() -> AsyncIterator[Target]:
    for pair in PAIRS:
        await asyncio.sleep(0)
        yield pair


class Stream:
    """An async iterable that is no generator, and whose iterator cannot be asked twice at once."""

    def __init__(self, pairs: Iterable[Target]) -> None:
        self._left = iter(pairs)
        self._asked = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Target:
        assert not self._asked
        self._asked = True
        await asyncio.sleep(0)
        self._asked = False
        for pair in self._left:
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
    "a list of lists": lambda: targets(*map(list, PAIRS)),
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
    async def test_every_target_of_it_is_stopped_once(
        self, runtimes: Emulator, session: BctrlSession, make: Callable[[], Targets]
    ) -> None:
        runtimes.add_runtime("ws-2", "b")
        runtimes.add_runtime("ws-3", "c")

        told = await outcomes(session, make())

        assert [each.result for each in told] == [StopResult.STOPPED] * 3
        assert Counter(each.target for each in told) == runtimes.received
        assert {each.target.alias for each in told} == {"a", "b", "c"}

    async def test_the_order_of_it_is_that_of_the_indexes(
        self, runtimes: Emulator, session: BctrlSession
    ) -> None:
        for given in (list(REFS), Stream(PAIRS), async_generator(), generator()):
            told = await outcomes(session, given)
            assert [each.target for each in told] == REFS
        assert runtimes.received.total() == 12

    @pytest.mark.parametrize("given", [[], (), set(), iter(()), Stream(())], ids=repr)
    async def test_an_empty_one_is_a_run_without_outcomes(
        self, runtimes: Emulator, session: BctrlSession, given: Targets
    ) -> None:
        report = await session.stop_runtimes(given)

        assert (report.ok, report.total, report.counts) == (True, 0, Counter())
        assert runtimes.requests == []

    async def test_a_target_that_is_there_twice_has_two_outcomes(
        self, runtimes: Emulator, session: BctrlSession
    ) -> None:
        told = await outcomes(session, [("ws-1", "a"), ("ws-1", "a")])

        assert sorted(str(each.result) for each in told) == ["already_stopped", "stopped"]
        assert runtimes.received["ws-1", "a"] == 2

    async def test_rows_of_a_database_are_read(
        self, runtimes: Emulator, session: BctrlSession
    ) -> None:
        with closing(sqlite3.connect(":memory:")) as database:
            database.row_factory = sqlite3.Row
            database.execute("create table runtimes (workspace text, alias text)")
            database.executemany("insert into runtimes values (?, ?)", PAIRS)
            rows = database.execute("select workspace, alias from runtimes order by alias")
            told = await outcomes(session, cast("Targets", rows))
            every = database.execute("select * from runtimes").fetchall()

        assert [each.target for each in told] == REFS
        assert {each.result for each in told} == {StopResult.STOPPED}
        assert [as_target(row) for row in every] == REFS
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
    async def test_its_length_is_known_where_it_has_one(
        self, session: BctrlSession, make: Callable[[], Targets], length: int | None
    ) -> None:
        batch = session.stop_runtimes(make())

        assert (batch.total, batch.read) == (length, 0)
        batch.close()

    async def test_it_is_read_no_faster_than_it_is_worked_off(
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

    async def test_many_readers_of_a_slow_one_get_each_item_once(self) -> None:
        source = Input(Stream([("ws-1", str(number)) for number in range(50)]))
        items: list[tuple[int, object]] = []

        async def read() -> None:
            while (item := await source.next()) is not None:
                items.append(item)

        await asyncio.gather(*(read() for _ in range(8)))

        assert items == [(number, ("ws-1", str(number))) for number in range(50)]
        assert (source.count, source.closed, source.error) == (50, True, None)

    async def test_only_one_with_a_length_that_need_not_be_awaited_is_finite(self) -> None:
        class Sized(Stream):
            def __len__(self) -> int:
                return 3

        sources = [Input(each) for each in (PAIRS, generator(), Stream(PAIRS), Sized(PAIRS))]

        assert [source.can_drain for source in sources] == [True, False, False, False]
        assert [source.is_async for source in sources] == [False, False, True, True]
        assert sources[3].length == 3

    async def test_nothing_is_read_after_its_end(self) -> None:
        for source in (Input(PAIRS), Input(Stream(PAIRS))):
            source.closed = True
            assert (source.next_nowait(), await source.next()) == (None, None)
            assert source.count == 0


class TestRefusal:
    @pytest.mark.parametrize(
        ("given", "kind"),
        [
            ("ws-1", "str"),
            ("", "str"),
            (b"ws-1", "bytes"),
            ({}, "dict"),
            ({"ws-1": "a"}, "dict"),
            (RuntimeRef("ws-1", "a"), "RuntimeRef"),
        ],
    )
    def test_what_is_no_list_of_targets_is_refused_at_once(self, given: object, kind: str) -> None:
        session = BctrlSession("key")
        with pytest.raises(BctrlConfigError) as caught:
            session.stop_runtimes(given)  # type: ignore[arg-type]

        assert str(caught.value) == (
            f"targets is a {kind}. Pass an iterable of (workspace id, alias), also for one target"
        )

    @pytest.mark.parametrize(
        ("given", "kind"), [(3, "int"), (None, "NoneType"), (generator, "function")]
    )
    def test_what_cannot_be_iterated_over_is_refused_at_once(
        self, given: object, kind: str
    ) -> None:
        session = BctrlSession("key")
        with pytest.raises(BctrlConfigError) as caught:
            session.stop_runtimes(given)  # type: ignore[arg-type]

        assert str(caught.value) == (
            f"targets is a {kind}, which cannot be iterated over. "
            "Pass an iterable or async iterable of (workspace id, alias)"
        )

    async def test_a_plain_pair_in_place_of_a_list_of_pairs_stops_nothing(
        self, runtimes: Emulator, session: BctrlSession
    ) -> None:
        told = await outcomes(session, cast("Targets", ("ws-1", "a")))

        assert [str(each.result) for each in told] == ["rejected", "rejected"]
        assert runtimes.requests == []


GOOD: dict[str, object] = {
    "a tuple": ("ws-1", "a"),
    "a list": ["ws-1", "a"],
    "a ref": RuntimeRef("ws-1", "a"),
    "a deque": deque(("ws-1", "a")),
    "a list of one's own": UserList(("ws-1", "a")),
    "values of a dict": {"workspace": "ws-1", "alias": "a"}.values(),
    "an enum's text": ("ws-1", Name.ALIAS),
}


class TestTargets:
    @pytest.mark.parametrize("item", GOOD.values(), ids=GOOD.keys())
    async def test_any_pair_of_texts_is_one(
        self, runtimes: Emulator, session: BctrlSession, item: object
    ) -> None:
        (told,) = await outcomes(session, targets(item))

        assert told.target == as_target(item) == RuntimeRef("ws-1", "a")
        assert type(told.target) is RuntimeRef
        assert (told.result, told.attempts, told.error) == (StopResult.STOPPED, 1, None)
        assert runtimes.received == {("ws-1", "a"): 1}

    @pytest.mark.parametrize(
        "item", [(WORKSPACE, "a"), [WORKSPACE, "a"], (str(WORKSPACE), "a")], ids=repr
    )
    async def test_a_workspace_id_may_be_a_uuid(
        self, runtimes: Emulator, session: BctrlSession, item: object
    ) -> None:
        (told,) = await outcomes(session, targets(item))

        assert told.target == RuntimeRef(str(WORKSPACE), "a")
        assert type(told.target.workspace_id) is str
        assert runtimes.received == {(str(WORKSPACE), "a"): 1}


NONE: dict[str, tuple[object, RuntimeRef, str]] = {
    # What it is, what stands for it in the account, and what its error says.
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
        f"invalid target ('ws-1', {reprlib.repr(UUID(int=5))})",
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


class TestNoTargets:
    @pytest.mark.parametrize(("item", "target", "says"), NONE.values(), ids=NONE.keys())
    async def test_each_one_is_rejected_and_named_and_the_others_are_stopped(
        self,
        runtimes: Emulator,
        session: BctrlSession,
        item: object,
        target: RuntimeRef,
        says: str,
    ) -> None:
        first, told, last = await outcomes(session, targets(("ws-1", "a"), item, ("ws-1", "b")))

        assert (told.result, told.target, told.attempts) == (StopResult.REJECTED, target, 0)
        assert type(told.error) is BctrlConfigError
        assert says in str(told.error)
        assert told.runtime is None
        assert (first.result, last.result) == (StopResult.STOPPED, StopResult.STOPPED)
        assert runtimes.received == {("ws-1", "a"): 1, ("ws-1", "b"): 1}

    async def test_an_object_of_another_kind_is_named(self, session: BctrlSession) -> None:
        class Thing:
            def __repr__(self) -> str:
                return "<Thing 7>"

        (told,) = await outcomes(session, targets(Thing()))

        assert told.target == RuntimeRef("", "<Thing 7>")
        assert str(told.error).startswith("invalid target <Thing 7>: expected")

    async def test_an_object_that_cannot_be_shown_is_rejected_all_the_same(
        self, session: BctrlSession
    ) -> None:
        class Thing:
            def __repr__(self) -> str:
                raise LookupError

        (told,) = await outcomes(session, targets(Thing()))

        assert "<Thing instance at" in str(told.error)

    async def test_a_generator_of_two_is_none_and_is_not_read(self, session: BctrlSession) -> None:
        pair = iter(("ws-1", "a"))

        (told,) = await outcomes(session, targets(pair))

        assert told.result is StopResult.REJECTED
        assert list(pair) == ["ws-1", "a"]

    @pytest.mark.parametrize(
        "item",
        ["x" * 10**6, list(range(10**5)), ("ws-1", ["x" * 10**6])],
        ids=["text", "list", "in"],
    )
    def test_a_large_one_is_named_in_short(self, item: object) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            as_target(item)

        assert len(str(caught.value)) < 200
        if not isinstance(item, str):
            assert len(str(best_effort_ref(item))) < 200

    async def test_a_report_raises_what_names_each_of_them(self, session: BctrlSession) -> None:
        report = await session.stop_runtimes(targets("ab", 3, ("ws-1", "a", "b")))
        with pytest.raises(ExceptionGroup, match="3 of 3 stops are not settled") as caught:
            report.raise_for_failures()

        assert [str(error).split(": expected")[0] for error in caught.value.exceptions] == [
            "invalid target 'ab'",
            "invalid target 3",
            "invalid target ('ws-1', 'a', 'b')",
        ]

    @pytest.mark.parametrize("item", [("ws-7", ""), ("ws-7", ".."), ("..", "a7")], ids=repr)
    async def test_the_error_of_one_that_cannot_be_sent_names_both_its_parts(
        self, session: BctrlSession, item: tuple[str, str]
    ) -> None:
        (told,) = await outcomes(session, [item])

        assert told.error is not None
        assert (told.error.workspace_id, told.error.alias) == item

    async def test_one_that_breaks_when_it_is_looked_at_has_its_outcome(
        self, runtimes: Emulator, session: BctrlSession
    ) -> None:
        class Lazy:
            """A proxy of what cannot be loaded any more."""

            @property  # type: ignore[misc]
            def __class__(self) -> type:
                raise LookupError("detached")

            def __repr__(self) -> str:
                raise LookupError("detached")

        class Detached(UserList[str]):
            """A row that loads itself, of a database that is gone."""

            def __len__(self) -> int:
                return 2

            def __iter__(self) -> Iterator[str]:
                raise LookupError("detached")

        report = await session.stop_runtimes(
            [("ws-1", "a"), Detached(), Lazy(), ("ws-1", "b")],  # type: ignore[list-item]
            concurrency=1,
        )
        gc.collect()  # A worker that died complains when it is collected: here, not anywhere else.

        assert report.total == report.counts.total() == 4
        assert runtimes.received == {("ws-1", "a"): 1, ("ws-1", "b"): 1}


class MineError(Exception):
    """What an input of the tests raises."""


def broken(read: int, error: Exception) -> Iterator[Target]:
    yield from PAIRS[:read]
    raise error


async def broken_async(read: int, error: Exception) -> AsyncIterator[Target]:
    for pair in PAIRS[:read]:
        await asyncio.sleep(0)
        yield pair
    raise error


@pytest.mark.parametrize("concurrency", [1, 2, 10])
@pytest.mark.parametrize("read", [0, 1, 3])
@pytest.mark.parametrize("make", [broken, broken_async])
class TestInputThatRaises:
    async def test_what_was_read_has_its_outcome_before_the_same_exception_comes_out(
        self,
        runtimes: Emulator,
        session: BctrlSession,
        make: Callable[[int, Exception], Targets],
        read: int,
        concurrency: int,
    ) -> None:
        error = MineError("row 4")
        told: list[RuntimeRef] = []
        batch = session.stop_runtimes(
            make(read, error),
            concurrency=concurrency,
            on_outcome=lambda each: told.append(each.target),
        )
        with pytest.raises(MineError) as caught:
            await batch

        assert caught.value is error
        assert sorted(told) == REFS[:read]
        assert runtimes.received == dict.fromkeys(PAIRS[:read], 1)
        self.complete(batch.report, read)

    async def test_outcomes_that_are_iterated_over_come_before_it(
        self,
        runtimes: Emulator,
        session: BctrlSession,
        make: Callable[[int, Exception], Targets],
        read: int,
        concurrency: int,
    ) -> None:
        error = MineError("row 4")
        told: list[RuntimeRef] = []
        async with session.stop_runtimes(make(read, error), concurrency=concurrency) as batch:
            while len(told) < read:
                told.append((await anext(batch)).target)
            with pytest.raises(MineError) as caught:
                await anext(batch)

        assert caught.value is error
        assert sorted(told) == REFS[:read]
        assert runtimes.received == dict.fromkeys(PAIRS[:read], 1)
        self.complete(batch.report, read)

    def complete(self, report: StopReport, read: int) -> None:
        assert report.total == read
        assert report.counts == ({StopResult.STOPPED: read} if read else {})
        assert report.failures == ()


class TestInputThatRaisesOnce:
    @pytest.mark.parametrize("read_again", [True, False])
    async def test_it_is_not_read_again(
        self, runtimes: Emulator, session: BctrlSession, *, read_again: bool
    ) -> None:
        class Flaky:
            asked = 0

            def __iter__(self) -> Flaky:
                return self

            def __next__(self) -> Target:
                self.asked += 1
                if self.asked == 2:
                    raise MineError
                return PAIRS[0]

        flaky = Flaky()
        with pytest.raises(MineError):
            await session.stop_runtimes(flaky, concurrency=3 if read_again else 1)

        assert flaky.asked == 2
        assert runtimes.received == {PAIRS[0]: 1}

    def test_what_iterating_over_it_raises_comes_out_at_once(self) -> None:
        class Broken:
            def __iter__(self) -> Iterator[Target]:
                raise MineError("no cursor")

        with pytest.raises(MineError, match="no cursor"):
            BctrlSession("key").stop_runtimes(Broken())

    async def test_one_that_is_cancelled_does_not_look_like_one_that_ended(
        self, runtimes: Emulator, session: BctrlSession
    ) -> None:
        def cancelled() -> Iterator[Target]:
            yield PAIRS[0]
            raise asyncio.CancelledError  # As `Task.result` of a task that was cancelled does.

        batch = session.stop_runtimes(cancelled())
        with pytest.raises(BctrlError, match="the input raised CancelledError"):
            await batch
        assert runtimes.received.total() == 1
        assert not batch.report.ok

    @pytest.mark.parametrize("concurrency", [1, 5])
    async def test_an_async_one_that_raises_cancelled_error_has_failed(
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


def failure(index: int, error: BctrlError | None) -> StopOutcome:
    return StopOutcome(
        index=index,
        target=RuntimeRef("ws-1", str(index)),
        result=StopResult.UNKNOWN,
        error=error,
    )


def report_of(*failures: StopOutcome, ended_early: BctrlError | None = None) -> StopReport:
    counts = Counter({StopResult.STOPPED: 2})
    counts.update(each.result for each in failures)
    return StopReport(
        total=counts.total(),
        counts=counts,
        failures=failures,
        elapsed=1.0,
        retries=0,
        throttled=0,
        ended_early=ended_early,
    )


TIMEOUT = BctrlTimeoutError("no answer", workspace_id="ws-1", alias="0", may_have_stopped=True)
NETWORK = BctrlNetworkError("no connection")
ENDED = BctrlError("the deadline of 3 s has passed")


class TestReport:
    def test_one_without_failures_is_ok_and_raises_nothing(self) -> None:
        report = report_of()

        assert report.ok
        report.raise_for_failures()

    def test_one_with_a_failure_is_not_ok(self) -> None:
        assert not report_of(failure(0, TIMEOUT)).ok

    def test_one_of_a_run_that_ended_early_is_not_ok(self) -> None:
        assert not report_of(ended_early=ENDED).ok

    def test_a_result_that_did_not_occur_has_a_count_of_0(self) -> None:
        report = report_of(failure(0, TIMEOUT))

        assert {result: report.counts[result] for result in StopResult} == {
            **dict.fromkeys(StopResult, 0),
            StopResult.STOPPED: 2,
            StopResult.UNKNOWN: 1,
        }
        assert report.counts["rejected"] == 0  # type: ignore[index]
        assert report.counts["stopped"] == 2  # type: ignore[index]

    def test_the_errors_of_all_failures_are_raised_together_in_their_order(self) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            report_of(failure(1, NETWORK), failure(0, TIMEOUT)).raise_for_failures()

        assert caught.value.message == "2 of 4 stops are not settled"
        assert list(caught.value.exceptions) == [NETWORK, TIMEOUT]
        assert "stop of '0' in workspace 'ws-1'" in str(caught.value.exceptions[1])

    def test_why_it_ended_early_is_raised_first(self) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            report_of(failure(0, TIMEOUT), ended_early=ENDED).raise_for_failures()

        assert caught.value.message == "1 of 3 stops are not settled, and the run ended early"
        assert list(caught.value.exceptions) == [ENDED, TIMEOUT]

    def test_a_run_that_ended_early_without_failures_raises_why(self) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            report_of(ended_early=ENDED).raise_for_failures()

        assert caught.value.message == "0 of 2 stops are not settled, and the run ended early"
        assert list(caught.value.exceptions) == [ENDED]

    def test_a_failure_can_be_caught_by_its_kind(self) -> None:
        caught: list[Exception] = []
        try:
            report_of(failure(0, TIMEOUT), ended_early=ENDED).raise_for_failures()
        except* TimeoutError as group:
            caught += group.exceptions
        except* BctrlError as group:
            caught += group.exceptions

        assert caught == [TIMEOUT, ENDED]

    def test_raising_leaves_the_report_as_it_is(self) -> None:
        report = report_of(failure(0, TIMEOUT), ended_early=ENDED)
        for _ in range(2):
            with pytest.raises(ExceptionGroup) as caught:
                report.raise_for_failures()
            assert len(caught.value.exceptions) == 2
        assert len(report.failures) == 1

    def test_it_cannot_be_changed(self) -> None:
        with pytest.raises(AttributeError, match="immutable"):
            report_of().total = 5  # type: ignore[misc]

    async def test_that_of_a_run_counts_what_the_server_did(
        self, runtimes: Emulator, session: BctrlSession
    ) -> None:
        report = await session.stop_runtimes([*PAIRS, ("ws-1", "gone"), ("ws-1", "")])

        assert report.total == 5
        assert report.counts == {
            StopResult.STOPPED: 3,
            StopResult.NOT_FOUND: 1,
            StopResult.REJECTED: 1,
        }
        assert report.counts[StopResult.UNKNOWN] == report.retries == report.throttled == 0
        assert [each.index for each in report.failures] == [4]
        assert runtimes.received.total() == 4
        with pytest.raises(ExceptionGroup, match=re.escape("1 of 5 stops are not settled")):
            report.raise_for_failures()
