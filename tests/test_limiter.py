"""The limiter of every attempt: fair, bounded, and closable while tasks wait.

Nothing here waits for a clock: a turn of the loop is all the time that passes.
"""

import asyncio
import contextlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async.errors import BctrlConfigError

CLOSED = r"^the session is closed\. Make the call inside `async with`"


async def turns(count: int = 3) -> None:
    """Let every task go as far as it can."""
    for _ in range(count):
        await asyncio.sleep(0)


class Visitors:
    """Tasks at a limiter, numbered as they arrive; each holds its slot until it is released."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.limiter = Limiter(limit, AdaptiveRate())
        self.tasks: list[asyncio.Task[None]] = []
        self.entered: list[int] = []
        self.waited: list[int] = []
        self.inside: dict[int, asyncio.Event] = {}
        self.most = 0

    def come(self) -> None:
        self.tasks.append(asyncio.create_task(self._visit(len(self.tasks))))

    def cancel(self, number: int) -> None:
        self.tasks[number].cancel()

    def send_out(self, number: int) -> None:
        self.inside[number].set()

    async def _visit(self, number: int) -> None:
        if self.limiter.acquire_nowait():
            # Those before it may not have moved yet, but each of them has a place.
            assert all(waiter.done() for queue in self.limiter._queues for waiter in queue)
        else:
            await self.limiter.acquire(60.0)
            self.waited.append(number)
        self.entered.append(number)
        leave = self.inside[number] = asyncio.Event()
        self.most = max(self.most, len(self.inside))
        try:
            await leave.wait()
        finally:
            del self.inside[number]
            self.limiter.release(None)

    async def end(self) -> None:
        """Send out all who are inside until nobody waits any more."""
        await turns()
        while self.inside:
            for number in list(self.inside):
                self.send_out(number)
            await turns()
        await asyncio.wait_for(asyncio.gather(*self.tasks, return_exceptions=True), timeout=10)

    def free_places(self) -> int:
        taken = 0
        while self.limiter.acquire_nowait():
            taken += 1
        return taken


class TestOrder:
    async def test_as_many_as_the_limit_enter_without_waiting(self) -> None:
        limiter = Limiter(3, AdaptiveRate())

        assert [limiter.acquire_nowait() for _ in range(5)] == [True, True, True, False, False]

    async def test_a_place_that_is_left_is_free_again(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        assert limiter.acquire_nowait()

        limiter.release(None)

        assert limiter.acquire_nowait()
        assert not limiter.acquire_nowait()

    async def test_who_waits_enters_in_the_order_of_coming(self) -> None:
        visitors = Visitors(limit=2)
        for _ in range(6):
            visitors.come()
        await turns()
        assert visitors.entered == [0, 1]

        visitors.send_out(1)
        await turns()
        assert visitors.entered == [0, 1, 2]

        await visitors.end()
        assert visitors.entered == [0, 1, 2, 3, 4, 5]
        assert visitors.most == 2

    async def test_nobody_overtakes_one_whose_turn_has_come(self) -> None:
        visitors = Visitors(limit=1)
        visitors.come()
        visitors.come()
        await turns()

        visitors.send_out(0)
        while visitors.inside:
            await asyncio.sleep(0)

        # The place is handed on, although its new owner has not moved yet.
        assert not visitors.limiter.acquire_nowait()
        await turns()
        assert visitors.entered == [0, 1]
        await visitors.end()


class TestCancellation:
    async def test_who_waits_and_is_cancelled_is_passed_over(self) -> None:
        visitors = Visitors(limit=1)
        for _ in range(3):
            visitors.come()
        await turns()

        visitors.cancel(1)
        await visitors.end()

        assert visitors.entered == [0, 2]
        assert visitors.tasks[1].cancelled()
        assert visitors.free_places() == 1

    async def test_who_is_cancelled_after_the_turn_came_passes_the_place_on(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        assert limiter.acquire_nowait()
        first = asyncio.create_task(limiter.acquire(60.0))
        second = asyncio.create_task(limiter.acquire(60.0))
        await turns()

        limiter.release(None)
        first.cancel()
        await turns()

        assert first.cancelled()
        assert second.done()
        assert second.exception() is None
        assert not limiter.acquire_nowait()

    async def test_a_place_that_nobody_takes_over_is_free(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        assert limiter.acquire_nowait()
        only = asyncio.create_task(limiter.acquire(60.0))
        await turns()

        limiter.release(None)
        only.cancel()
        await turns()

        assert only.cancelled()
        assert limiter.acquire_nowait()

    steps = st.lists(
        st.one_of(
            st.tuples(st.just("come"), st.just(0)),
            st.tuples(st.just("cancel"), st.integers(0, 30)),
            st.tuples(st.just("leave"), st.integers(0, 30)),
            st.tuples(st.just("turn"), st.integers(1, 3)),
        ),
        max_size=60,
    )

    @settings(max_examples=300, deadline=None)
    @given(limit=st.integers(1, 4), steps=steps)
    @example(
        limit=1,
        steps=[
            *[("come", 0)] * 3,
            ("turn", 3),
            ("leave", 0),
            ("turn", 1),
            ("cancel", 1),
        ],
    )
    def test_no_schedule_lets_too_many_in_or_anybody_out_of_turn_or_loses_a_place(
        self, limit: int, steps: list[tuple[str, int]]
    ) -> None:
        async def scenario() -> None:
            visitors = Visitors(limit)
            for step, number in steps:
                if step == "come":
                    visitors.come()
                elif step == "turn":
                    await turns(number)
                elif step == "cancel" and visitors.tasks:
                    visitors.cancel(number % len(visitors.tasks))
                elif step == "leave" and visitors.inside:
                    visitors.send_out(list(visitors.inside)[number % len(visitors.inside)])
            await visitors.end()

            assert visitors.most <= limit
            assert visitors.waited == sorted(visitors.waited)
            left_out = set(range(len(visitors.tasks))) - set(visitors.entered)
            assert all(visitors.tasks[number].cancelled() for number in left_out)
            assert visitors.free_places() == limit

        asyncio.run(scenario())


class TestClose:
    async def test_it_sends_away_all_who_wait(self) -> None:
        visitors = Visitors(limit=1)
        for _ in range(3):
            visitors.come()
        await turns()

        visitors.limiter.close()
        await turns()

        for task in visitors.tasks[1:]:
            assert task.done()
            with pytest.raises(BctrlConfigError, match=CLOSED):
                await task
        assert visitors.entered == [0]
        await visitors.end()

    async def test_it_sends_away_all_who_come(self) -> None:
        limiter = Limiter(5, AdaptiveRate())

        limiter.close()

        assert not limiter.acquire_nowait()
        with pytest.raises(BctrlConfigError, match=CLOSED):
            await limiter.acquire(60.0)

    async def test_whose_turn_had_come_is_sent_away_too(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        assert limiter.acquire_nowait()
        waiting = asyncio.create_task(limiter.acquire(60.0))
        await turns()

        limiter.release(None)
        limiter.close()

        with pytest.raises(BctrlConfigError, match=CLOSED):
            await waiting

    async def test_one_who_was_cancelled_at_the_same_moment_is_cancelled(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        assert limiter.acquire_nowait()
        early = asyncio.create_task(limiter.acquire(60.0))
        late = asyncio.create_task(limiter.acquire(60.0))
        await turns()

        early.cancel()
        limiter.close()
        late.cancel()
        await turns()

        assert early.cancelled()
        assert late.cancelled()
        assert not limiter.acquire_nowait()

    async def test_those_inside_may_still_leave(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        assert limiter.acquire_nowait()
        limiter.close()

        limiter.release(None)

        assert not limiter.acquire_nowait()

    async def test_a_second_time_changes_nothing(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        limiter.close()

        limiter.close()

        assert not limiter.acquire_nowait()


class TestPause:
    async def test_it_ends_with_its_time(self) -> None:
        await Limiter(1, AdaptiveRate()).sleep(0)

    async def test_it_ends_when_the_gate_is_closed(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        pause = asyncio.create_task(limiter.sleep(3600))
        await turns()
        assert not pause.done()

        limiter.close()
        await turns()

        assert pause.done()
        await pause

    async def test_at_a_closed_gate_it_is_over_at_once(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        limiter.close()

        await asyncio.wait_for(limiter.sleep(3600), timeout=10)

    async def test_it_takes_no_place(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        pause = asyncio.create_task(limiter.sleep(3600))
        await turns()

        assert limiter.acquire_nowait()

        pause.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pause

    async def test_it_can_be_cancelled(self) -> None:
        pause = asyncio.create_task(Limiter(1, AdaptiveRate()).sleep(3600))
        await turns()

        pause.cancel()

        with pytest.raises(asyncio.CancelledError):
            await pause
