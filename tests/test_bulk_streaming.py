"""A bulk stop that is entered: iteration over its outcomes, and backpressure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from helpers import (
    BOUND,
    Connect,
    add_runtimes,
    assert_conserved,
    await_batch,
    pass_time,
    wait_for_requests,
)

from bctrl_async import (
    BctrlConfigError,
    BctrlSession,
    RetryPolicy,
    StopBatch,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN


async def wait_for_outcomes(batch: StopBatch, count: int) -> None:
    """Wait until a bulk stop has this many outcomes, which need not be read."""
    async with asyncio.timeout(BOUND):
        while batch.counts.total() < count:
            await asyncio.sleep(0)


class TestStreamed:
    async def test_outcomes_are_yielded_as_soon_as_they_are_known(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 3)
        emulator.inject(Fault.HANG, alias="r0")
        async with session.stop_runtimes(targets) as batch:
            assert {(await anext(batch)).index, (await anext(batch)).index} == {1, 2}
            await wait_for_requests(emulator, 3)
            batch.abort()
            assert [outcome.index async for outcome in batch] == [0]

        assert batch.report.counts == {STOPPED: 2, UNKNOWN: 1}

    async def test_iterating_over_a_batch_that_was_not_entered_is_an_error(
        self, session: BctrlSession
    ) -> None:
        batch = session.stop_runtimes([("ws-1", "crm")])
        with pytest.raises(BctrlConfigError, match="async with"):
            await anext(batch)
        batch.close()

    async def test_a_second_iteration_yields_nothing(self, session: BctrlSession) -> None:
        async with session.stop_runtimes([("ws-1", "crm")]) as batch:
            assert [outcome.result async for outcome in batch] == [STOPPED]
            assert [outcome async for outcome in batch] == []
            assert batch.report.ok

    async def test_several_consumers_share_the_outcomes(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        async def consume(batch: StopBatch) -> list[int]:
            return [outcome.index async for outcome in batch]

        async with session.stop_runtimes(add_runtimes(emulator, 200)) as batch:
            parts = await asyncio.gather(*(consume(batch) for _ in range(3)))

        assert sorted(index for part in parts for index in part) == list(range(200))

    async def test_the_targets_that_wait_to_be_retried_are_counted_by_reason(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        """Fault: a run of which all stops failed looked as if it did nothing."""
        targets = add_runtimes(emulator, 3)
        emulator.inject(Fault.SERVER_ERROR, alias="r0")
        emulator.inject(Fault.DROP_BEFORE, alias="r1")
        async with session.stop_runtimes(targets, retry=RetryPolicy(base=60, cap=60)) as batch:
            assert (batch.retrying, batch.retry_after) == ({}, 0.0)
            await anext(batch)
            while batch.retrying.total() < 2:
                await asyncio.sleep(0)
            assert batch.retrying == {"500": 1, "BctrlNetworkError": 1}
            batch.abort()
        assert batch.retrying == {}

    async def test_an_attempt_in_flight_does_not_wait_to_be_retried(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 1)
        emulator.inject(Fault.SERVER_ERROR, Fault.HANG)
        async with session.stop_runtimes(targets, retry=RetryPolicy(base=0.001)) as batch:
            await wait_for_requests(emulator, 2)
            assert (batch.in_flight, batch.retrying) == (1, {})
            batch.abort()

    async def test_it_is_known_for_how_long_the_server_has_asked_to_wait(
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
        """Fault: it raised a RuntimeError."""

        async def run() -> StopBatch:
            async with BctrlSession("key") as session:
                batch = session.stop_runtimes([])
                await batch
            return batch

        assert asyncio.run(run()).retry_after == 0.0

    async def test_progress_can_be_read_during_the_run(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 5)
        emulator.inject(Fault.HANG, alias="r4")
        async with session.stop_runtimes(targets) as batch:
            for _ in range(4):
                await anext(batch)
            await wait_for_requests(emulator, 5)
            assert batch.counts == {STOPPED: 4}
            assert (batch.read, batch.total, batch.in_flight) == (5, 5, 1)
            assert (batch.retries, batch.is_throttled) == (0, False)
            assert batch.report.elapsed > 0
            # Fault: what was stopped so far was all, and all of it was stopped.
            assert not batch.report.ok
            assert str(batch.report.ended_early) == "the bulk stop has not ended"
            assert batch.ended_early is None
        assert_conserved(batch, emulator)


class TestBackpressure:
    async def test_a_target_is_read_only_when_a_worker_is_free(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(*[Fault.HANG] * 100)
        read: list[int] = []

        def targets() -> Iterator[tuple[str, str]]:
            for number, target in enumerate(add_runtimes(emulator, 1000)):
                read.append(number)
                yield target

        batch = session.stop_runtimes(targets(), concurrency=7)
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(emulator, 7)
        await asyncio.sleep(0.01)

        assert len(read) == len(emulator.requests) == batch.in_flight == 7
        running.cancel()
        await asyncio.wait([running])
        assert_conserved(batch, emulator)

    async def test_iterating_after_the_block_yields_nothing(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        async with session.stop_runtimes(add_runtimes(emulator, 100)) as batch:
            await wait_for_outcomes(batch, 100)
        async with asyncio.timeout(BOUND):
            assert [outcome async for outcome in batch] == []
        assert batch.report.ok

    async def test_concurrency_is_bounded_by_max_connections(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.inject(*[Fault.HANG] * 100)
        async with connect(max_connections=3) as session:
            with pytest.raises(BctrlConfigError, match="at most the session's max_connections, 3"):
                session.stop_runtimes([], concurrency=4)
            batch = session.stop_runtimes(add_runtimes(emulator, 50))
            running = asyncio.create_task(await_batch(batch))
            await wait_for_requests(emulator, 3)
            await asyncio.sleep(0.01)
            assert len(emulator.requests) == 3
            running.cancel()
            await asyncio.wait([running])
        assert batch.report.counts == {UNKNOWN: 3, NOT_SENT: 47}

    async def test_leaving_the_block_with_unread_outcomes_leaves_no_tasks_behind(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        async with session.stop_runtimes(
            iter(add_runtimes(emulator, 300)), concurrency=10
        ) as batch:
            await wait_for_outcomes(batch, 110)
            await asyncio.sleep(0.05)
        assert batch.report.counts[STOPPED] == batch.read == 110
        assert_conserved(batch, emulator)
        assert [outcome async for outcome in batch] == []

    async def test_a_slow_consumer_slows_down_the_workers(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 1000)
        async with session.stop_runtimes(iter(targets), concurrency=10) as batch:
            await anext(batch)
            # One outcome was read, 100 are queued, and each worker holds one more.
            await wait_for_requests(emulator, 1 + 100 + 10)
            await asyncio.sleep(0.1)
            assert len(emulator.requests) == batch.read == 1 + 100 + 10
            assert [outcome.result async for outcome in batch] == [STOPPED] * 999

    async def test_single_and_bulk_stops_share_max_connections(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        async with connect(max_connections=2) as session:
            emulator.inject(*[Fault.HANG] * 2)
            batch = session.stop_runtimes(add_runtimes(emulator, 5))
            running = asyncio.create_task(await_batch(batch))
            await wait_for_requests(emulator, 2)
            single = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
            await asyncio.sleep(0.01)
            assert len(emulator.requests) == 2
            running.cancel()
            await asyncio.wait([running])
            assert (await single).alias == "crm"

    async def test_targets_that_need_no_request_do_not_block_the_event_loop(
        self, session: BctrlSession
    ) -> None:
        running = asyncio.create_task(await_batch(session.stop_runtimes([("ws-1", "")] * 5000)))
        iterations = 0
        while not running.done():
            await asyncio.sleep(0)
            iterations += 1

        assert iterations >= 5000 / 100
