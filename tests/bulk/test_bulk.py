"""A bulk stop, awaited or entered: its report, outcomes, progress and backpressure."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.helpers import (
    BOUND,
    Bulk,
    Connect,
    add_runtimes,
    assert_conserved,
    await_batch,
    pass_time,
    run_of,
    started,
    until,
    wait_for_requests,
)
from support.journal_lines import read_lines
from support.leaks import bulk_tasks

from bctrl_async import (
    BctrlConfigError,
    BctrlSession,
    RetryPolicy,
    StopBatch,
    StopOutcome,
    StopResult,
)
from bctrl_async.bulk._input import Targets
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN
CRM = [("ws-1", "crm")]


async def async_iterable(
    pairs: list[tuple[str, str]],
) -> AsyncIterator[tuple[str, str]]:
    for pair in pairs:
        yield pair


class TestAwaited:
    async def test_every_target_is_stopped_and_counted(self, bulk: Bulk) -> None:
        report = await bulk.stop(300)

        assert report.ok
        assert report.counts == {STOPPED: 300}
        assert (report.total, report.failures, report.retries, report.throttled) == (
            300,
            (),
            0,
            0,
        )
        assert report.elapsed > 0
        statuses = Counter(
            runtime["status"] for runtime in bulk.emulator.runtimes.values()
        )
        assert statuses == {"stopped": 300, "active": 1}

    async def test_each_target_has_the_outcome_of_its_own_response(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.add_runtime("ws-1", "twice")
        bulk.emulator.inject(Fault.ACCEPTED, alias="crm")
        aliases = ["crm", "twice", "none", "..", "twice"]
        outcomes: list[StopOutcome] = []
        report = await bulk.session.stop_runtimes(
            [("ws-1", alias) for alias in aliases],
            on_outcome=outcomes.append,
            concurrency=1,
            verify=False,
        )

        assert not report.ok
        assert [(outcome.index, outcome.target.alias) for outcome in outcomes] == [
            *enumerate(aliases)
        ]
        assert [(outcome.result.value, outcome.attempts) for outcome in outcomes] == [
            ("accepted", 1),
            ("stopped", 1),
            ("not_found", 1),
            ("invalid", 0),
            ("already_stopped", 1),
        ]

    @pytest.mark.parametrize(
        ("faults", "result", "throttled"),
        [
            ([Fault.RATE_LIMITED, Reply(503), Fault.SERVER_ERROR], STOPPED, 2),
            ([Fault.DROP_AFTER], StopResult.ALREADY_STOPPED, 0),
        ],
    )
    async def test_retries_and_throttled_attempts_are_counted(
        self,
        bulk: Bulk,
        pauses: list[float],
        faults: list[Fault | Reply],
        result: StopResult,
        throttled: int,
    ) -> None:
        bulk.emulator.inject(*faults, alias="r7")
        report = await bulk.stop(50)

        assert report.ok
        assert report.counts == Counter([result, *[STOPPED] * 49])
        assert (report.retries, report.throttled) == (len(faults), throttled)
        assert len(pauses) == len(faults)

    @pytest.mark.moves_clock
    async def test_timeout_and_retry_apply_to_each_target(self, bulk: Bulk) -> None:
        bulk.emulator.inject(*[Fault.HANG] * 10)
        policy = RetryPolicy(attempts=2, base=0.001)
        batch = bulk.session.stop_runtimes(CRM, timeout=40, retry=policy, verify=False)
        running = await bulk.started(batch, 1)
        pass_time(40)
        # A canary is sent before the next attempt, and is answered.
        await until(lambda: len(bulk.emulator.stops) == 2)
        pass_time(40)
        await running

        [failure] = batch.report.failures
        assert (failure.result, failure.attempts) == (UNKNOWN, 2)

    async def test_failures_have_no_traceback(
        self, session: BctrlSession, emulator: Emulator
    ) -> None:
        emulator.inject(Reply(307))
        report = await session.stop_runtimes([*CRM, ("", "")])

        errors = [outcome.error for outcome in report.failures]
        assert [error and error.__traceback__ for error in errors] == [None, None]

    async def test_it_runs_only_once(self, bulk: Bulk) -> None:
        batch = bulk.session.stop_runtimes(CRM)
        assert not batch.report.ok
        assert str(batch.report.ended_early) == "the bulk stop was not run"
        assert (batch.report.total, batch.report.elapsed) == (0, 0)
        await batch

        with pytest.raises(BctrlConfigError, match="has started already"):
            await batch
        with pytest.raises(BctrlConfigError, match="has started already"):
            await batch.__aenter__()
        assert bulk.emulator.received.total() == 1

    async def test_if_it_is_never_awaited_it_warns_of_that(
        self, session: BctrlSession
    ) -> None:
        batch = session.stop_runtimes(CRM)
        with pytest.warns(
            RuntimeWarning, match="never awaited or entered: nothing was stopped"
        ):
            del batch

    @pytest.mark.usefixtures("lazy_only")
    async def test_a_task_cancelled_before_it_starts_reads_nothing(
        self, bulk: Bulk
    ) -> None:
        batch = bulk.session.stop_runtimes(CRM)
        task = asyncio.create_task(batch)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert (batch.read, len(bulk.emulator.requests)) == (0, 0)

    @pytest.mark.usefixtures("lazy_only")
    @pytest.mark.parametrize("targets", [list, async_iterable])
    async def test_if_its_workers_are_cancelled_before_they_start_it_is_not_a_success(
        self, bulk: Bulk, targets: Callable[[list[tuple[str, str]]], Targets]
    ) -> None:
        batch = bulk.session.stop_runtimes(targets(CRM))
        running = asyncio.ensure_future(batch)
        await asyncio.sleep(0)
        for task in run_of(batch)._tasks:
            task.cancel()
        report = await running

        assert report.counts == ({NOT_SENT: 1} if targets is list else {})
        assert str(report.ended_early) == "the run was cancelled"
        assert not bulk.emulator.requests

    @pytest.mark.parametrize("name", ["concurrency", "deadline", "timeout"])
    async def test_an_argument_out_of_range_is_named(
        self, session: BctrlSession, name: str
    ) -> None:
        with pytest.raises(BctrlConfigError, match=rf"^invalid {name}[: ]"):
            session.stop_runtimes(CRM, **{name: 0})  # type: ignore[arg-type]  # any name.


class TestIteration:
    async def test_outcomes_are_yielded_as_soon_as_they_are_known(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(Fault.HANG, alias="r0")
        async with bulk.stop(3) as batch:
            assert {(await anext(batch)).index, (await anext(batch)).index} == {1, 2}
            await wait_for_requests(bulk.emulator, 3)
            batch.abort()
            assert [outcome.index async for outcome in batch] == [0]
            assert [outcome async for outcome in batch] == []

        assert batch.report.counts == {STOPPED: 2, UNKNOWN: 1}

    async def test_it_is_an_error_outside_the_block(
        self, session: BctrlSession
    ) -> None:
        batch = session.stop_runtimes(CRM)
        with pytest.raises(BctrlConfigError, match="async with"):
            await anext(batch)
        batch.close()

    async def test_several_readers_share_the_outcomes(self, bulk: Bulk) -> None:
        async def read(batch: StopBatch) -> list[int]:
            return [outcome.index async for outcome in batch]

        async with bulk.stop(200) as batch, asyncio.timeout(BOUND):
            parts = await asyncio.gather(read(batch), read(batch), read(batch))
        assert sorted(index for part in parts for index in part) == list(range(200))

    @pytest.mark.parametrize("is_woken", [False, True])
    async def test_a_cancelled_reader_takes_nothing(
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

    @pytest.mark.parametrize(("count", "stopped"), [(100, 100), (300, 110)])
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
        assert [outcome async for outcome in batch] == []


class TestProgress:
    async def test_it_counts_what_is_done_and_is_not_ok_before_the_end(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(Fault.HANG, alias="r4")
        async with bulk.stop(5) as batch:
            for _ in range(4):
                await anext(batch)
            await wait_for_requests(bulk.emulator, 5)
            assert batch.counts == {STOPPED: 4}
            assert (batch.read, batch.total, batch.progress.in_flight) == (5, 5, 1)
            assert (batch.retries, batch.progress.is_throttled) == (0, False)
            assert batch.report.elapsed > 0
            assert not batch.report.ok
            assert str(batch.report.ended_early) == "the bulk stop has not ended"
            assert batch.ended_early is None

    @pytest.mark.moves_clock
    async def test_targets_that_wait_to_be_retried_are_counted_by_reason(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(Fault.SERVER_ERROR, alias="r0")
        bulk.emulator.inject(Fault.DROP_BEFORE, alias="r1")
        async with bulk.stop(3, retry=RetryPolicy(base=60, cap=60)) as batch:
            assert batch.progress.retrying == {}
            await until(lambda: batch.progress.retrying.total() == 2)
            assert batch.progress.retrying == {"500": 1, "BctrlNetworkError": 1}
            # The time of the canary must not pass before its answer is read.
            await until(lambda: len(bulk.emulator.requests) == 4)
            await until(lambda: bulk.session.stats.in_flight == 0)
            bulk.emulator.inject(*[Fault.HANG] * 2)
            pass_time(60)
            await until(lambda: batch.progress.in_flight == 2)
            assert batch.progress.retrying == {}
            batch.abort()

    @pytest.mark.moves_clock
    async def test_it_has_the_time_for_which_the_server_has_asked_to_wait(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(*[Reply(429, headers={"Retry-After": "50"})] * 8)
        async with bulk.session.stop_runtimes(add_runtimes(bulk.emulator, 8)) as batch:
            assert batch.progress.retry_after == 0.0
            await until(lambda: batch.progress.retry_after)
            assert batch.progress.retry_after == pytest.approx(50, abs=5)
            await until(lambda: batch.progress.retrying == {"429": 8})
            pass_time(60)
            assert batch.progress.retry_after == 0.0
            assert (await anext(batch)).result is STOPPED


class TestBackpressure:
    async def test_a_target_is_read_only_when_a_worker_is_free(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(*[Fault.HANG] * 100)
        read: list[int] = []

        def targets() -> Iterator[tuple[str, str]]:
            for number, target in enumerate(add_runtimes(bulk.emulator, 100)):
                read.append(number)
                yield target

        batch = bulk.session.stop_runtimes(targets(), concurrency=7)
        running = await bulk.started(batch, 7)
        await asyncio.sleep(0.01)

        assert len(read) == len(bulk.emulator.requests) == batch.progress.in_flight == 7
        running.cancel()
        await asyncio.wait([running])

    async def test_all_stops_share_max_connections(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.inject(*[Fault.HANG] * 3)
        async with connect(max_connections=3) as session:
            with pytest.raises(
                BctrlConfigError, match="at most the session's max_connections, 3"
            ):
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

    async def test_invalid_targets_do_not_block_the_event_loop(
        self, session: BctrlSession
    ) -> None:
        running = asyncio.create_task(
            await_batch(session.stop_runtimes([("ws-1", "")] * 1000))
        )
        iterations = 0
        while not running.done():
            await asyncio.sleep(0)
            iterations += 1

        assert iterations >= 1000 / 100


class TestDropped:
    async def test_it_records_every_target_and_leaves_no_task_and_no_lock(
        self, emulator: Emulator, connect: Connect, tmp_path: Path
    ) -> None:
        """Fault: its task was destroyed while pending; the journal stayed locked."""
        reported: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        targets = add_runtimes(emulator, 300)
        journal = tmp_path / "dropped.jsonl"
        async with connect() as session:
            batch = await session.stop_runtimes(targets, journal=journal).__aenter__()
            # All workers wait once a hundred outcomes are unread.
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

    def test_it_may_be_read_and_dropped_after_its_loop(self) -> None:
        async def scenario() -> StopBatch:
            async with Emulator(port=0) as emulator:
                targets = add_runtimes(emulator, 300)
                async with BctrlSession(
                    "emulator-key", base_url=emulator.url
                ) as session:
                    batch = await session.stop_runtimes(targets).__aenter__()
                    await anext(batch)
                    return batch

        batch = asyncio.run(scenario())
        assert (batch.report.total, batch.progress.retry_after) == (300, 0.0)
        del batch
        gc.collect()
