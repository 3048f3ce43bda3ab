"""The delivery of outcomes to callbacks and readers, and what garbage collections make of them."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from helpers import BOUND, Bulk, assert_conserved

from bctrl_async import BctrlError, StopOutcome, StopResult
from bctrl_async.bulk._delivery import OutcomeBuffer
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import outcome_of

FIRST, SECOND, THIRD = (
    outcome_of(RuntimeRef("ws-1", f"r{index}"), BctrlError("not sent"), index=index)
    for index in range(3)
)


class TestBuffer:
    async def test_workers_wait_once_too_many_outcomes_are_unread_until_there_is_room(self) -> None:
        buffer = OutcomeBuffer(1)
        assert buffer.put(FIRST) is None
        waits = [put for outcome in (SECOND, THIRD) if (put := buffer.put(outcome)) is not None]
        waiting = asyncio.gather(*waits)
        assert await buffer.get() is FIRST
        await asyncio.sleep(0)
        assert not waiting.done()
        assert await buffer.get() is SECOND

        async with asyncio.timeout(BOUND):
            assert len(await waiting) == 2
        assert await buffer.get() is THIRD

    @pytest.mark.parametrize("is_woken", [False, True])
    async def test_a_reader_that_is_cancelled_takes_nothing_from_the_next(
        self, *, is_woken: bool
    ) -> None:
        buffer = OutcomeBuffer(1)
        first, second = (asyncio.create_task(buffer.get()) for _ in range(2))
        await asyncio.sleep(0)
        if is_woken:
            buffer.put(FIRST)
            first.cancel()
        else:
            first.cancel()
            await asyncio.wait([first])
            buffer.put(FIRST)

        async with asyncio.timeout(BOUND):
            assert await second is FIRST
        assert first.cancelled()


class TestAsyncCallback:
    async def test_it_ends_before_its_outcome_is_read(self, bulk: Bulk) -> None:
        called: set[int] = set()

        async def call(outcome: StopOutcome) -> None:
            await asyncio.sleep(0)
            called.add(outcome.index)

        async with bulk.stop(300, on_outcome=call) as batch:
            async for outcome in batch:
                assert outcome.index in called
                if outcome.index == 0:
                    # A hundred are unread, and the workers wait.
                    await asyncio.sleep(0.1)
        assert called == set(range(300))
        assert_conserved(batch, bulk.emulator)

    async def test_abort_waits_until_it_ends(self, bulk: Bulk) -> None:
        called, ended = asyncio.Event(), []

        async def call(outcome: StopOutcome) -> None:
            called.set()
            await asyncio.sleep(0.01)
            ended.append(outcome.result)

        batch = bulk.stop(1, on_outcome=call)
        running = asyncio.create_task(batch)
        await called.wait()
        batch.abort()
        await running
        assert ended == [StopResult.STOPPED]


async def test_a_callback_that_cancels_its_worker_cancels_the_run(bulk: Bulk) -> None:
    def cancel(_: StopOutcome) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        raise asyncio.CancelledError

    batch = bulk.stop(3, on_outcome=cancel, concurrency=1)
    report = await batch

    assert report.counts == {StopResult.STOPPED: 1, StopResult.NOT_SENT: 2}
    assert_conserved(batch, bulk.emulator)


class TestGarbageCollection:
    def test_an_error_raised_where_its_outcome_is_in_reach_is_collected(self) -> None:
        """The traceback of the error has the frame, and the frame has the outcome."""

        def reraised() -> weakref.ref[BctrlError]:
            outcome = outcome_of(RuntimeRef("ws-1", "r0"), BctrlError("not sent"))
            assert outcome.error is not None
            try:
                raise outcome.error
            except BctrlError as error:
                return weakref.ref(error)

        error = reraised()
        gc.collect()
        assert error() is None
