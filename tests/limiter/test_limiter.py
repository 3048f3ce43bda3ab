"""The limiter: fair, bounded, and closable while tasks wait. No test here waits for a clock."""

import asyncio

import pytest
from helpers import BOUND
from hypothesis import example, given, settings
from hypothesis import strategies as st
from throttling import past_start

from bctrl_async._limiter.limiter import Limiter
from bctrl_async.errors import BctrlConfigError

CLOSED = r"^the session is closed\. Make the call inside `async with`"


async def run_loop(iterations: int = 3) -> None:
    """Run the event loop, by default until every task is blocked."""
    for _ in range(iterations):
        await asyncio.sleep(0)


class Users:
    """Tasks that use a limiter, numbered in their order; each holds its slot until told to end."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.limiter = Limiter(limit, past_start())
        self.tasks: list[asyncio.Task[None]] = []
        self.acquired: list[int] = []
        self.waited: list[int] = []
        self.holding: dict[int, asyncio.Event] = {}
        self.max_in_use = 0

    def start(self) -> None:
        self.tasks.append(asyncio.create_task(self._use(len(self.tasks))))

    def cancel(self, number: int) -> None:
        self.tasks[number].cancel()

    def finish(self, number: int) -> None:
        self.holding[number].set()

    async def _use(self, number: int) -> None:
        if self.limiter.acquire_nowait():
            # Earlier waiters may not have run yet, but each of them has been admitted.
            assert all(waiter.done() for queue in self.limiter._queues for waiter in queue)
        else:
            await self.limiter.acquire(60.0)
            self.waited.append(number)
        self.acquired.append(number)
        finished = self.holding[number] = asyncio.Event()
        self.max_in_use = max(self.max_in_use, len(self.holding))
        try:
            await finished.wait()
        finally:
            del self.holding[number]
            self.limiter.release(None)

    async def finish_all(self) -> None:
        """Finish every task that holds a slot until no task waits any more."""
        await run_loop()
        while self.holding:
            for number in list(self.holding):
                self.finish(number)
            await run_loop()
        await asyncio.wait_for(asyncio.gather(*self.tasks, return_exceptions=True), BOUND)

    def free_slots(self) -> int:
        free = 0
        while self.limiter.acquire_nowait():
            free += 1
        return free


class TestOrder:
    async def test_waiters_are_admitted_in_order(self) -> None:
        users = Users(limit=2)
        for _ in range(6):
            users.start()
        await run_loop()
        assert users.acquired == [0, 1]

        users.finish(1)
        await run_loop()
        assert users.acquired == [0, 1, 2]

        await users.finish_all()
        assert users.acquired == [0, 1, 2, 3, 4, 5]
        assert users.max_in_use == 2


class TestCancellation:
    async def test_a_waiter_cancelled_after_admission_passes_its_slot_on(self) -> None:
        limiter = Limiter(1, past_start())
        assert limiter.acquire_nowait()
        first = asyncio.create_task(limiter.acquire(60.0))
        second = asyncio.create_task(limiter.acquire(60.0))
        await run_loop()

        limiter.release(None)
        first.cancel()
        await run_loop()

        assert first.cancelled()
        assert second.done()
        assert second.exception() is None
        assert not limiter.acquire_nowait()

    steps = st.lists(
        st.one_of(
            st.tuples(st.just("start"), st.just(0)),
            st.tuples(st.just("cancel"), st.integers(0, 30)),
            st.tuples(st.just("finish"), st.integers(0, 30)),
            st.tuples(st.just("run"), st.integers(1, 3)),
        ),
        max_size=60,
    )

    @settings(max_examples=300, deadline=None)
    @given(limit=st.integers(1, 4), steps=steps)
    @example(
        limit=1,
        steps=[
            *[("start", 0)] * 3,
            ("run", 3),
            ("finish", 0),
            ("run", 1),
            ("cancel", 1),
        ],
    )
    def test_no_schedule_exceeds_the_limit_breaks_the_order_or_loses_a_slot(
        self, limit: int, steps: list[tuple[str, int]]
    ) -> None:
        async def scenario() -> None:
            users = Users(limit)
            for step, number in steps:
                if step == "start":
                    users.start()
                elif step == "run":
                    await run_loop(number)
                elif step == "cancel" and users.tasks:
                    users.cancel(number % len(users.tasks))
                elif step == "finish" and users.holding:
                    users.finish(list(users.holding)[number % len(users.holding)])
            await users.finish_all()

            assert users.max_in_use <= limit
            assert users.waited == sorted(users.waited)
            never_acquired = set(range(len(users.tasks))) - set(users.acquired)
            assert all(users.tasks[number].cancelled() for number in never_acquired)
            assert users.free_slots() == limit

        asyncio.run(scenario())


class TestClose:
    async def test_it_fails_all_waiters_and_all_later_calls(self) -> None:
        users = Users(limit=1)
        for _ in range(3):
            users.start()
        await run_loop()

        users.limiter.close()
        await run_loop()

        for task in users.tasks[1:]:
            with pytest.raises(BctrlConfigError, match=CLOSED):
                await task
        await users.finish_all()
        assert users.acquired == [0]
        assert not users.limiter.acquire_nowait()
        with pytest.raises(BctrlConfigError, match=CLOSED):
            await users.limiter.acquire(60.0)

    async def test_it_fails_a_waiter_that_was_admitted_but_has_not_run(self) -> None:
        limiter = Limiter(1, past_start())
        assert limiter.acquire_nowait()
        waiting = asyncio.create_task(limiter.acquire(60.0))
        await run_loop()

        limiter.release(None)
        limiter.close()

        with pytest.raises(BctrlConfigError, match=CLOSED):
            await waiting

    async def test_a_waiter_cancelled_at_the_same_time_is_cancelled(self) -> None:
        limiter = Limiter(1, past_start())
        assert limiter.acquire_nowait()
        early = asyncio.create_task(limiter.acquire(60.0))
        late = asyncio.create_task(limiter.acquire(60.0))
        await run_loop()

        early.cancel()
        limiter.close()
        late.cancel()
        await run_loop()

        assert early.cancelled()
        assert late.cancelled()
        assert not limiter.acquire_nowait()


async def test_a_sleep_takes_no_slot_and_ends_when_the_limiter_is_closed() -> None:
    limiter = Limiter(1, past_start())
    sleeping = asyncio.create_task(limiter.sleep(3600))
    await run_loop()
    assert limiter.acquire_nowait()
    assert not sleeping.done()

    limiter.close()

    async with asyncio.timeout(BOUND):
        await sleeping
        await limiter.sleep(3600)
