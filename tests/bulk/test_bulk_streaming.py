"""A bulk stop that is entered: iteration over its outcomes, and backpressure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

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
    wait_for_requests,
)

from bctrl_async import BctrlConfigError, BctrlSession, RetryPolicy, StopBatch, StopResult
from bctrl_async.emulator import Emulator, Fault, Reply

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

    @pytest.mark.parametrize(("count", "stopped"), [(3, 3), (100, 100), (300, 110)])
    async def test_outcomes_that_are_unread_at_the_end_of_the_block_are_never_read(
        self, bulk: Bulk, count: int, stopped: int
    ) -> None:
        targets = iter(add_runtimes(bulk.emulator, count))
        async with bulk.session.stop_runtimes(targets, concurrency=10) as batch:
            async with asyncio.timeout(BOUND):
                while batch.counts.total() < stopped:
                    await asyncio.sleep(0)
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
            assert [outcome.result async for outcome in batch] == [STOPPED] * 299

    async def test_targets_that_need_no_request_do_not_block_the_event_loop(
        self, session: BctrlSession
    ) -> None:
        running = asyncio.create_task(await_batch(session.stop_runtimes([("ws-1", "")] * 1000)))
        iterations = 0
        while not running.done():
            await asyncio.sleep(0)
            iterations += 1

        assert iterations >= 1000 / 100
