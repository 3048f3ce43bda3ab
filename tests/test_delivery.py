"""The delivery of outcomes to callbacks and readers, and what garbage collections make of them."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from helpers import BOUND, add_runtimes, assert_conserved

from bctrl_async import BctrlError, BctrlSession, Runtime, StopOutcome, StopResult
from bctrl_async.bulk._delivery import OutcomeBuffer
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import outcome_of

FIRST, SECOND, THIRD = (
    outcome_of(RuntimeRef("ws-1", f"r{index}"), BctrlError("not sent"), index=index)
    for index in range(3)
)


async def stopped(emulator: Emulator, session: BctrlSession) -> Runtime:
    [target] = add_runtimes(emulator, 1)
    return await session.stop_runtime(*target)


class TestBuffer:
    async def test_a_worker_waits_for_nothing_until_too_many_outcomes_are_unread(self) -> None:
        """Fault: each outcome cost a coroutine around a queue, also where a reader waited."""
        buffer = OutcomeBuffer(2)

        assert buffer.put(FIRST) is None
        assert buffer.put(SECOND) is None
        waits = buffer.put(THIRD)
        assert waits is not None
        waiting = asyncio.ensure_future(waits)
        await asyncio.sleep(0)
        assert not waiting.done()
        assert await buffer.get() is FIRST
        async with asyncio.timeout(BOUND):
            await waiting
        assert [await buffer.get(), await buffer.get()] == [SECOND, THIRD]

    async def test_all_workers_that_wait_go_on_once_there_is_room(self) -> None:
        buffer = OutcomeBuffer(1)
        buffer.put(FIRST)
        waits = [put for outcome in (SECOND, THIRD) if (put := buffer.put(outcome)) is not None]
        waiting = asyncio.gather(*waits)
        await buffer.get()
        await asyncio.sleep(0)
        assert not waiting.done()
        await buffer.get()

        async with asyncio.timeout(BOUND):
            assert len(await waiting) == 2

    async def test_a_reader_that_is_cancelled_as_it_is_woken_wakes_the_next(self) -> None:
        buffer = OutcomeBuffer(1)
        first, second = (asyncio.create_task(buffer.get()) for _ in range(2))
        await asyncio.sleep(0)
        buffer.put(FIRST)
        first.cancel()

        async with asyncio.timeout(BOUND):
            assert await second is FIRST
        assert first.cancelled()

    async def test_a_reader_that_gave_up_takes_no_wake_up_from_the_next(self) -> None:
        buffer = OutcomeBuffer(1)
        first, second = (asyncio.create_task(buffer.get()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        buffer.put(FIRST)

        async with asyncio.timeout(BOUND):
            assert await second is FIRST

    async def test_an_outcome_that_another_reader_took_leaves_the_first_waiting(self) -> None:
        buffer = OutcomeBuffer(1)
        woken = asyncio.create_task(buffer.get())
        await asyncio.sleep(0)
        buffer.put(FIRST)

        assert await buffer.get() is FIRST
        await asyncio.sleep(0)
        assert not woken.done()
        buffer.put(SECOND)
        assert await woken is SECOND

    async def test_every_reader_gets_none_at_the_end(self) -> None:
        buffer = OutcomeBuffer(1)
        readers = [asyncio.create_task(buffer.get()) for _ in range(3)]
        await asyncio.sleep(0)
        buffer.put(FIRST)
        buffer.end()

        assert await asyncio.gather(*readers) == [FIRST, None, None]
        assert await buffer.get() is None


async def test_no_outcome_is_read_after_the_block(
    emulator: Emulator, session: BctrlSession
) -> None:
    """Fault: outcomes were left over after the block if there were fewer than a hundred."""
    async with session.stop_runtimes(add_runtimes(emulator, 3)) as batch:
        while batch.counts.total() < 3:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)

    assert [outcome async for outcome in batch] == []
    assert_conserved(batch, emulator)


async def test_an_async_callback_ends_before_its_outcome_is_read(
    emulator: Emulator, session: BctrlSession
) -> None:
    called: set[int] = set()

    async def call(outcome: StopOutcome) -> None:
        await asyncio.sleep(0)
        called.add(outcome.index)

    targets = add_runtimes(emulator, 300)
    async with session.stop_runtimes(targets, on_outcome=call) as batch:
        async for outcome in batch:
            assert outcome.index in called
            if outcome.index == 0:
                # A hundred are unread, and the workers wait.
                await asyncio.sleep(0.1)
    assert called == set(range(300))
    assert_conserved(batch, emulator)


async def test_an_async_callback_is_called_for_an_outcome_that_was_verified(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.inject(Fault.ACCEPTED, alias="r0")
    called: list[StopOutcome] = []

    async def call(outcome: StopOutcome) -> None:
        await asyncio.sleep(0)
        called.append(outcome)

    batch = session.stop_runtimes(add_runtimes(emulator, 1), verify=True, on_outcome=call)
    await batch

    assert [outcome.result for outcome in called] == [StopResult.STOPPED]
    assert_conserved(batch, emulator)


async def test_a_cancelled_error_of_an_async_callback_fails_the_run(
    emulator: Emulator, session: BctrlSession
) -> None:
    async def fail(_: StopOutcome) -> None:
        raise asyncio.CancelledError

    batch = session.stop_runtimes(add_runtimes(emulator, 3), on_outcome=fail)
    with pytest.raises(BctrlError, match="on_outcome raised CancelledError"):
        await batch
    assert_conserved(batch, emulator)


async def test_a_callback_that_cancels_its_worker_cancels_the_run(
    emulator: Emulator, session: BctrlSession
) -> None:
    def cancel(_: StopOutcome) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        raise asyncio.CancelledError

    batch = session.stop_runtimes(add_runtimes(emulator, 3), on_outcome=cancel, concurrency=1)
    report = await batch

    assert report.counts == {StopResult.STOPPED: 1, StopResult.NOT_SENT: 2}
    assert_conserved(batch, emulator)


class TestGarbageCollection:
    async def test_a_runtime_does_not_count_towards_the_next_collection(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        """Fault: a hundred unread outcomes were so many objects that each hundred was searched."""
        runtime = await stopped(emulator, session)

        assert runtime.summary is not None
        assert not gc.is_tracked(runtime)
        assert not gc.is_tracked(runtime.summary)

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
