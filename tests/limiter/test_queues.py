"""The order of waiters, and how long they are patient."""

from __future__ import annotations

import asyncio

import pytest
from support.throttling import past_start
from support.virtual_time import in_virtual_time

from bctrl_async._limiter.evidence import History
from bctrl_async._limiter.patience import PatienceTimer
from bctrl_async._limiter.queues import Priority, Queues, Waiter
from bctrl_async._limiter.standings import Standing

HELD, UNKNOWN, ANSWERED, EXEMPT = Standing


def waiter(standing: Standing = HELD, patience: float = 60.0) -> Waiter:
    admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    history = History(workspace=standing.name, waits_since=0.0)
    return Waiter(admitted, history, Priority.SINGLE, patience, standing)


def queues_of(*standings: Standing) -> Queues:
    queues = Queues()
    for standing in standings:
        queues.add(waiter(standing))
    return queues


def order(queues: Queues) -> list[Standing]:
    """Admit all waiters under a limit; return their standings in order."""
    standings = []
    while queues.count:
        head = queues.heads(is_limited=True)[0]
        queues.remove(head)
        standings.append(head.standing)
    return standings


@in_virtual_time
class TestQueues:
    async def test_those_whom_a_limit_holds_take_turns_before_the_exempt(self) -> None:
        queues = queues_of(*[HELD] * 2, *[UNKNOWN] * 3, ANSWERED, EXEMPT)
        turns = [HELD, UNKNOWN, ANSWERED, HELD, UNKNOWN, UNKNOWN]
        assert order(queues) == [*turns, EXEMPT]

    async def test_without_a_limit_only_their_priority_tells_waiters_apart(
        self,
    ) -> None:
        """Fault: single calls waited half a minute behind a bulk stop, held before."""
        queues = queues_of(*[HELD, EXEMPT] * 2, UNKNOWN, ANSWERED)
        for priority in (Priority.BULK, Priority.CANARY):
            last = waiter(EXEMPT)
            last.priority = priority
            queues.add(last)
        met = []
        while queues.count:
            (head,) = queues.heads(is_limited=False)
            queues.remove(head)
            met.append((head.priority, head.history.workspace))
        singles = [EXEMPT, EXEMPT, ANSWERED, UNKNOWN, HELD, HELD]
        expected = [(Priority.SINGLE, standing.name) for standing in singles]
        expected.insert(0, (Priority.CANARY, EXEMPT.name))
        # It gets every fifth slot.
        expected.insert(5, (Priority.BULK, EXEMPT.name))
        assert met == expected

    async def test_the_exempt_take_nobodys_turn(self) -> None:
        queues = queues_of(HELD, UNKNOWN, ANSWERED, EXEMPT)
        heads = queues.heads(is_limited=True)
        queues.remove(heads[0])
        queues.remove(heads[-1])
        assert order(queues) == [UNKNOWN, ANSWERED]

    async def test_a_waiter_that_left_is_not_counted(self) -> None:
        queues = queues_of(HELD, EXEMPT)
        for head in queues.heads(is_limited=True):
            head.admitted.cancel()
        assert queues.heads(is_limited=True) == []
        assert queues.count == 0
        assert not queues.are_ahead_of(EXEMPT)

    async def test_waiters_that_were_taken_are_not_counted(self) -> None:
        queues = queues_of(HELD, EXEMPT)
        taken = queues.take([EXEMPT.name])
        assert [waiter.standing for waiter in taken] == [EXEMPT]
        assert queues.count == 1
        assert queues.are_ahead_of(HELD)
        assert not queues.are_ahead_of(EXEMPT)


async def looks_at(*watched: list[Waiter], again: int = 0) -> list[float]:
    """Watch these waiters in turn; return when the timer looked at them."""
    rate = past_start()
    rate.on_throttled(0.0, None, History())
    looks: list[float] = []

    def on_end(time: float) -> None:
        looks.append(time)
        if len(looks) <= again:
            timer.watch(watched[0], rate)

    timer = PatienceTimer(on_end)
    for waiters in watched:
        timer.watch(waiters, rate)
    await asyncio.sleep(5.0)
    return looks


@in_virtual_time
class TestPatienceTimer:
    async def test_it_looks_four_times_a_second_at_most(self) -> None:
        """A look at 100,000 waiters takes some milliseconds."""
        waiters = [waiter(patience=0.5 + number / 1000) for number in range(500)]
        assert await looks_at(waiters, again=2) == [0.5, 0.75, 1.0]

    @pytest.mark.parametrize("is_later_first", [True, False])
    async def test_it_looks_once_when_the_first_ends(
        self, *, is_later_first: bool
    ) -> None:
        first, second = [waiter(patience=1.0)], [waiter(patience=2.0)]
        watched = [second, first] if is_later_first else [first, second]
        assert await looks_at(*watched) == [1.0]

    async def test_a_call_without_patience_waits_for_its_attempt(self) -> None:
        assert await looks_at([waiter(patience=0.0)]) == []
