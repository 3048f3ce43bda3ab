"""A bulk stop that is entered: iteration, backpressure, callbacks, and handles that are dropped."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    BOUND,
    Bulk,
    Connect,
    add_runtimes,
    assert_conserved,
    await_batch,
    pass_time,
    started,
    until,
    wait_for_requests,
)
from journal_lines import read_lines
from leaks import bulk_tasks

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    RetryPolicy,
    RuntimeRef,
    StopBatch,
    StopOutcome,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.outcomes import outcome_of

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN


class TestIteration:
    async def test_outcomes_are_yielded_as_soon_as_they_are_known(self, bulk: Bulk) -> None:
        bulk.emulator.inject(Fault.HANG, alias="r0")
        async with bulk.stop(3) as batch:
            assert {(await anext(batch)).index, (await anext(batch)).index} == {1, 2}
            await wait_for_requests(bulk.emulator, 3)
            batch.abort()
            assert [outcome.index async for outcome in batch] == [0]

        assert batch.report.counts == {STOPPED: 2, UNKNOWN: 1}

    async def test_it_is_an_error_outside_the_block(self, session: BctrlSession) -> None:
        batch = session.stop_runtimes([("ws-1", "crm")])
        with pytest.raises(BctrlConfigError, match="async with"):
            await anext(batch)
        batch.close()

    async def test_a_second_one_yields_nothing(self, session: BctrlSession) -> None:
        async with session.stop_runtimes([("ws-1", "crm")]) as batch:
            assert [outcome.result async for outcome in batch] == [STOPPED]
            assert [outcome async for outcome in batch] == []
            assert batch.report.ok

    async def test_several_consumers_share_the_outcomes(self, bulk: Bulk) -> None:
        async def consume(batch: StopBatch) -> list[int]:
            return [outcome.index async for outcome in batch]

        async with bulk.stop(200) as batch:
            parts = await asyncio.gather(*(consume(batch) for _ in range(3)))

        assert sorted(index for part in parts for index in part) == list(range(200))

    @pytest.mark.parametrize("is_woken", [False, True])
    async def test_a_reader_that_is_cancelled_takes_nothing_from_the_next(
        self, bulk: Bulk, *, is_woken: bool
    ) -> None:
        def cancel(_: object = None) -> None:
            asyncio.get_running_loop().call_soon(first.cancel)

        async with bulk.stop(1, on_outcome=cancel if is_woken else None) as batch:
            first, second = (asyncio.ensure_future(anext(batch)) for _ in range(2))
            await asyncio.sleep(0)
            if not is_woken:
                cancel()
            async with asyncio.timeout(BOUND):
                assert (await second).result is STOPPED
        assert first.cancelled()

    @pytest.mark.parametrize(("count", "stopped"), [(3, 3), (100, 100), (300, 110)])
    async def test_outcomes_that_are_unread_at_the_end_of_the_block_are_never_read(
        self, bulk: Bulk, count: int, stopped: int
    ) -> None:
        targets = iter(add_runtimes(bulk.emulator, count))
        async with bulk.session.stop_runtimes(targets, concurrency=10) as batch:
            await until(lambda: batch.counts.total() >= stopped)
            await asyncio.sleep(0.01)
        assert batch.report.counts == {STOPPED: stopped}
        assert batch.report.ok is (stopped == count)
        assert_conserved(batch, bulk.emulator)
        async with asyncio.timeout(BOUND):
            assert [outcome async for outcome in batch] == []


class TestProgress:
    async def test_the_targets_that_wait_to_be_retried_are_counted_by_reason(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(Fault.SERVER_ERROR, alias="r0")
        bulk.emulator.inject(Fault.DROP_BEFORE, alias="r1")
        async with bulk.stop(3, retry=RetryPolicy(base=60, cap=60)) as batch:
            assert (batch.retrying, batch.retry_after) == ({}, 0.0)
            await anext(batch)
            while batch.retrying.total() < 2:
                await asyncio.sleep(0)
            assert batch.retrying == {"500": 1, "BctrlNetworkError": 1}
            batch.abort()
        assert batch.retrying == {}

    async def test_an_attempt_in_flight_does_not_wait_to_be_retried(self, bulk: Bulk) -> None:
        bulk.emulator.inject(Fault.SERVER_ERROR, Fault.HANG)
        async with bulk.stop(1) as batch:
            await wait_for_requests(bulk.emulator, 2)
            assert (batch.in_flight, batch.retrying) == (1, {})
            batch.abort()

    async def test_it_has_the_time_for_which_the_server_has_asked_to_wait(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(Reply(429, headers={"Retry-After": "50"}))
        async with session.stop_runtimes([("ws-1", "crm")]) as batch:
            while not batch.retry_after:
                await asyncio.sleep(0)
            assert batch.retry_after == pytest.approx(50, abs=5)
            assert batch.retrying == {"429": 1}
            pass_time(60)
            assert batch.retry_after == 0.0
            assert (await anext(batch)).result is STOPPED

    def test_it_can_be_read_outside_a_loop(self) -> None:
        async def run() -> StopBatch:
            async with BctrlSession("key") as session:
                batch = session.stop_runtimes([])
                await batch
            return batch

        assert asyncio.run(run()).retry_after == 0.0

    async def test_it_counts_what_is_done_and_the_report_is_not_ok_before_the_end(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(Fault.HANG, alias="r4")
        async with bulk.stop(5) as batch:
            for _ in range(4):
                await anext(batch)
            await wait_for_requests(bulk.emulator, 5)
            assert batch.counts == {STOPPED: 4}
            assert (batch.read, batch.total, batch.in_flight) == (5, 5, 1)
            assert (batch.retries, batch.is_throttled) == (0, False)
            assert batch.report.elapsed > 0
            assert not batch.report.ok
            assert str(batch.report.ended_early) == "the bulk stop has not ended"
            assert batch.ended_early is None
        assert_conserved(batch, bulk.emulator)


class TestBackpressure:
    async def test_a_target_is_read_only_when_a_worker_is_free(self, bulk: Bulk) -> None:
        bulk.emulator.inject(*[Fault.HANG] * 100)
        read: list[int] = []

        def targets() -> Iterator[tuple[str, str]]:
            for number, target in enumerate(add_runtimes(bulk.emulator, 100)):
                read.append(number)
                yield target

        batch = bulk.session.stop_runtimes(targets(), concurrency=7)
        running = await bulk.started(batch, 7)
        await asyncio.sleep(0.01)

        assert len(read) == len(bulk.emulator.requests) == batch.in_flight == 7
        running.cancel()
        await asyncio.wait([running])

    async def test_all_stops_of_a_session_share_its_max_connections(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.inject(*[Fault.HANG] * 3)
        async with connect(max_connections=3) as session:
            with pytest.raises(BctrlConfigError, match="at most the session's max_connections, 3"):
                session.stop_runtimes([], concurrency=4)
            batch = session.stop_runtimes(add_runtimes(emulator, 50))
            running = await started(batch, emulator, 3)
            single = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
            await asyncio.sleep(0.01)
            assert len(emulator.requests) == 3
            running.cancel()
            await asyncio.wait([running])
            assert (await single).alias == "crm"
        assert batch.report.counts == {UNKNOWN: 3, NOT_SENT: 47}

    async def test_a_slow_consumer_slows_down_the_workers(self, bulk: Bulk) -> None:
        targets = iter(add_runtimes(bulk.emulator, 300))
        async with bulk.session.stop_runtimes(targets, concurrency=10) as batch:
            await anext(batch)
            # One outcome was read, 100 are queued, and each worker holds one more.
            await wait_for_requests(bulk.emulator, 1 + 100 + 10)
            await asyncio.sleep(0.1)
            assert len(bulk.emulator.requests) == batch.read == 1 + 100 + 10
            for _ in range(10):
                await anext(batch)
            # They go on as soon as a hundred are left.
            await wait_for_requests(bulk.emulator, 1 + 100 + 10 + 1)
            assert [outcome.result async for outcome in batch] == [STOPPED] * 289

    async def test_targets_that_need_no_request_do_not_block_the_event_loop(
        self, session: BctrlSession
    ) -> None:
        running = asyncio.create_task(await_batch(session.stop_runtimes([("ws-1", "")] * 1000)))
        iterations = 0
        while not running.done():
            await asyncio.sleep(0)
            iterations += 1

        assert iterations >= 1000 / 100


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
        assert ended == [STOPPED]


async def test_a_callback_that_cancels_its_worker_cancels_the_run(bulk: Bulk) -> None:
    def cancel(_: StopOutcome) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        raise asyncio.CancelledError

    batch = bulk.stop(3, on_outcome=cancel, concurrency=1)
    report = await batch

    assert report.counts == {STOPPED: 1, NOT_SENT: 2}
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


async def enter(batch: StopBatch) -> StopBatch:
    """Enter a block that is never left."""
    await batch.__aenter__()
    await anext(batch)
    return batch


async def test_a_dropped_handle_records_every_target_and_leaves_no_task_and_no_lock(
    emulator: Emulator, connect: Connect, tmp_path: Path
) -> None:
    """Fault: its task was destroyed while pending, and the journal stayed locked."""
    reported: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    targets = add_runtimes(emulator, 300)
    journal = tmp_path / "dropped.jsonl"
    async with connect() as session:
        batch = await enter(session.stop_runtimes(targets, journal=journal))
        # With a hundred outcomes unread, all workers wait.
        await wait_for_requests(emulator, 150)
        del batch
        gc.collect()
        await until(lambda: not bulk_tasks())
        assert len(read_lines(journal.read_bytes()).entries) == len(targets)

        again = await session.stop_runtimes(targets, journal=journal)
    # Stops in flight when the run was cancelled are unknown.
    assert again.ok
    assert again.resumed >= 100
    assert reported == []


def test_a_handle_may_be_dropped_after_its_loop(tmp_path: Path) -> None:
    kept: list[StopBatch] = []

    async def scenario() -> None:
        async with Emulator(port=0) as emulator:
            targets = add_runtimes(emulator, 300)
            async with BctrlSession("emulator-key", base_url=emulator.url) as session:
                batch = session.stop_runtimes(targets, journal=tmp_path / "kept.jsonl")
                kept.append(await enter(batch))

    asyncio.run(scenario())
    assert kept.pop().report.total == 300
    gc.collect()
