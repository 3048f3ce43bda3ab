"""The bulk stop: exactly one outcome for each target, however the run ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from helpers import Connect, add_runtimes, assert_conserved, await_batch, wait_for_requests
from leaks import bulk_tasks
from servers import emulator_in_a_thread

from bctrl_async import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    BctrlRateLimitError,
    BctrlSession,
    RetryPolicy,
    RuntimeRef,
    StopBatch,
    StopOutcome,
    StopResult,
)
from bctrl_async._calls.sender import Sender
from bctrl_async.bulk._targets import Targets
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.outcomes import result_of

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN


async def async_iterable(pairs: list[tuple[str, str]]) -> AsyncIterator[tuple[str, str]]:
    for pair in pairs:
        yield pair


class TestAwaited:
    async def test_every_target_is_stopped_and_counted(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        report = await session.stop_runtimes(add_runtimes(emulator, 300))

        assert report.ok
        assert report.counts == {STOPPED: 300}
        assert (report.total, report.failures, report.retries, report.throttled) == (300, (), 0, 0)
        assert report.elapsed > 0
        statuses = Counter(runtime["status"] for runtime in emulator.runtimes.values())
        assert statuses == {"stopped": 300, "active": 1}

    async def test_an_empty_input_is_a_success(self, session: BctrlSession) -> None:
        report = await session.stop_runtimes([])

        assert (report.ok, report.total) == (True, 0)

    async def test_on_outcome_gets_each_outcome_with_its_index(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 20)
        sync_outcomes: list[StopOutcome] = []
        async_outcomes: list[StopOutcome] = []

        async def collect(outcome: StopOutcome) -> None:
            await asyncio.sleep(0)
            async_outcomes.append(outcome)

        await session.stop_runtimes(targets, on_outcome=sync_outcomes.append)
        await session.stop_runtimes(targets, on_outcome=collect)

        assert sorted((o.index, o.target) for o in sync_outcomes) == list(enumerate(targets))
        assert {o.result for o in async_outcomes} == {StopResult.ALREADY_STOPPED}
        assert all(
            o.runtime is not None and o.attempts == 1 and o.elapsed > 0 for o in sync_outcomes
        )

    async def test_each_target_has_the_outcome_of_its_own_response(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.add_runtime("ws-1", "done", status="stopped")
        emulator.inject(Fault.ACCEPTED, alias="crm")
        outcomes: list[StopOutcome] = []
        report = await session.stop_runtimes(
            [("ws-1", "crm"), ("ws-1", "done"), ("ws-1", "none"), ("ws-1", "..")],
            on_outcome=outcomes.append,
        )

        by_index = sorted(outcomes, key=lambda outcome: outcome.index)
        assert [outcome.result for outcome in by_index] == [
            "accepted",
            "already_stopped",
            "not_found",
            "rejected",
        ]
        assert [outcome.attempts for outcome in by_index] == [1, 1, 1, 0]
        assert not report.ok
        with pytest.raises(ExceptionGroup, match="1 of 4 stops are not settled"):
            report.raise_for_failures()

    async def test_a_conflict_after_a_lost_response_is_settled(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(Fault.DROP_AFTER)
        report = await session.stop_runtimes([("ws-1", "crm")])

        assert report.counts == {StopResult.ALREADY_STOPPED: 1}
        assert report.retries == 1

    async def test_retries_and_throttled_attempts_are_counted(
        self, emulator: Emulator, session: BctrlSession, pauses: list[float]
    ) -> None:
        emulator.inject(Fault.RATE_LIMITED, Fault.UNAVAILABLE, Fault.SERVER_ERROR)
        report = await session.stop_runtimes([("ws-1", "crm")])

        assert report.counts == {STOPPED: 1}
        assert (report.retries, report.throttled) == (3, 2)
        assert len(pauses) == 3

    @pytest.mark.usefixtures("pauses")
    async def test_a_throttled_target_is_still_retried_after_a_lost_connection(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 50)
        emulator.inject(Fault.RATE_LIMITED, Fault.DROP_BEFORE, alias="r7")
        report = await session.stop_runtimes(targets)

        assert report.counts == {STOPPED: 50}
        assert report.retries == 2

    async def test_a_batch_can_run_as_a_task(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(session.stop_runtimes([("ws-1", "crm")]))
        assert task.result().ok

        emulator.inject(Fault.HANG)
        batch = session.stop_runtimes([("ws-1", "crm")])
        cancelled = asyncio.create_task(batch)
        await wait_for_requests(emulator, 2)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert cancelled.cancelled()
        assert batch.report.counts == {UNKNOWN: 1}

    async def test_a_task_cancelled_before_it_starts_reads_nothing(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        batch = session.stop_runtimes([("ws-1", "crm")])
        task = asyncio.create_task(batch)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert (batch.read, len(emulator.requests)) == (0, 0)

    async def test_closing_a_batch_that_runs_ends_its_workers(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(*[Fault.HANG] * 3)
        batch = session.stop_runtimes(add_runtimes(emulator, 10), concurrency=3)
        batch.send(None)
        await wait_for_requests(emulator, 3)
        batch.close()
        async with asyncio.timeout(5):
            while bulk_tasks():
                await asyncio.sleep(0)
        assert batch.report.counts == {UNKNOWN: 3, NOT_SENT: 7}

    async def test_a_worker_can_be_closed_without_its_loop(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        batch = session.stop_runtimes(add_runtimes(emulator, 3))
        await session.stop_runtime("ws-1", "crm")
        worker = batch._run._workers[0]
        coroutine = batch._run._work(worker)
        coroutine.send(None)
        coroutine.close()
        batch.close()

    @pytest.mark.parametrize("targets", [list, async_iterable])
    async def test_a_run_whose_workers_are_cancelled_before_they_start_is_not_a_success(
        self,
        emulator: Emulator,
        session: BctrlSession,
        targets: Callable[[list[tuple[str, str]]], Targets],
    ) -> None:
        batch = session.stop_runtimes(targets([("ws-1", "crm")]))
        running = asyncio.ensure_future(batch)
        await asyncio.sleep(0)
        for task in batch._run._tasks:
            task.cancel()
        report = await running

        assert not report.ok
        assert report.counts == ({NOT_SENT: 1} if targets is list else {})
        assert str(report.ended_early) == "the run was cancelled"
        assert not emulator.requests

    async def test_a_batch_that_is_never_awaited_warns_that_nothing_was_stopped(
        self, session: BctrlSession
    ) -> None:
        batch = session.stop_runtimes([("ws-1", "crm")])
        with pytest.warns(RuntimeWarning, match="never awaited or entered: nothing was stopped"):
            del batch

    async def test_a_batch_runs_only_once(self, emulator: Emulator, session: BctrlSession) -> None:
        batch = session.stop_runtimes([("ws-1", "crm")])
        assert not batch.report.ok
        assert str(batch.report.ended_early) == "the bulk stop was not run"
        assert batch.report.total == 0
        assert batch.report.elapsed == 0
        await batch

        with pytest.raises(BctrlConfigError, match="has run already"):
            await batch
        with pytest.raises(BctrlConfigError, match="has run already"):
            await batch.__aenter__()
        assert emulator.received.total() == 1

    async def test_failures_keep_no_traceback(
        self, session: BctrlSession, emulator: Emulator
    ) -> None:
        emulator.inject(Fault.REDIRECT)
        report = await session.stop_runtimes([("ws-1", "crm"), ("", "")])

        errors = [outcome.error for outcome in report.failures]
        assert [error and error.__traceback__ for error in errors] == [None, None]


class TestStreamed:
    async def test_outcomes_are_yielded_as_soon_as_they_are_known(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 3)
        emulator.inject(Fault.HANG, alias="r0")
        async with session.stop_runtimes(
            targets, timeout=1, retry=RetryPolicy(attempts=1)
        ) as batch:
            indices = [outcome.index async for outcome in batch]

        assert set(indices[:2]) == {1, 2}
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

    async def test_progress_can_be_read_during_the_run(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 5)
        emulator.inject(Fault.HANG, alias="r4")
        async with session.stop_runtimes(targets) as batch:
            for _ in range(4):
                await anext(batch)
            assert batch.counts == {STOPPED: 4}
            assert (batch.read, batch.total, batch.in_flight) == (5, 5, 1)
            assert (batch.retries, batch.is_throttled) == (0, False)
            assert batch.report.elapsed > 0
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
            await wait_for_requests(emulator, 100)
            await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            assert [outcome async for outcome in batch] == []
        assert batch.report.ok

    async def test_concurrency_is_bounded_by_max_connections(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.inject(*[Fault.HANG] * 100)
        async with connect(max_connections=3) as session:
            batch = session.stop_runtimes(add_runtimes(emulator, 50), concurrency=20)
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
            await wait_for_requests(emulator, 110)
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
            await asyncio.sleep(0.3)
            # One outcome was read, 100 are queued, and each worker holds one more.
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


class TestEndedByCaller:
    async def test_leaving_the_block_early_aborts_the_requests_in_flight(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 50)
        emulator.inject(Fault.HANG, alias="r1")
        async with session.stop_runtimes(targets, concurrency=2) as batch:
            async for outcome in batch:
                if outcome.index == 10:
                    break

        assert_conserved(batch, emulator)
        report = batch.report
        assert report.total == 50
        assert str(report.ended_early).startswith("the run was cancelled")
        aborted = next(outcome for outcome in report.failures if outcome.index == 1)
        assert aborted.result is UNKNOWN
        assert aborted.error is not None
        assert str(aborted.error) == (
            "stop of 'r1' in workspace 'ws-1': aborted before an answer: the run was cancelled "
            "(the runtime may have stopped). Stop it again: a stop is safe to repeat"
        )
        assert report.counts[NOT_SENT] > 30

    async def test_an_exception_in_the_block_propagates(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        batch = session.stop_runtimes(add_runtimes(emulator, 50))
        with pytest.raises(LookupError):  # noqa: PT012 - the block is tested.
            async with batch:
                await anext(batch)
                raise LookupError
        assert_conserved(batch, emulator)
        assert batch.report.total == 50

    @pytest.mark.parametrize("steps", range(14))
    async def test_cancelling_after_any_number_of_steps_leaves_no_tasks_behind(
        self, steps: int
    ) -> None:
        with emulator_in_a_thread() as emulator:
            async with BctrlSession("emulator-key", base_url=emulator.url) as session:
                batch = session.stop_runtimes([("ws-1", f"r{number}") for number in range(10)])
                running = asyncio.create_task(await_batch(batch))
                for _ in range(steps):
                    await asyncio.sleep(0)
                running.cancel()
                await asyncio.wait([running])
            if steps:
                assert batch.report.counts.total() == 10
            else:
                batch.close()
            assert_conserved(batch, emulator)

    @pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("streamed", [False, True])
    def test_an_exception_of_on_outcome_propagates_once_every_target_is_recorded(
        self, error: type[BaseException], *, streamed: bool
    ) -> None:
        batches: list[StopBatch] = []

        def fail(_: StopOutcome) -> None:
            raise error

        async def scenario(url: str) -> None:
            async with BctrlSession("emulator-key", base_url=url) as session:
                targets = [("ws-1", f"r{number}") for number in range(10)]
                batch = session.stop_runtimes(targets, on_outcome=fail, concurrency=2)
                batches.append(batch)
                if streamed:
                    async with batch:
                        [outcome async for outcome in batch]
                else:
                    await batch

        expected = BctrlError if error is asyncio.CancelledError else error
        with emulator_in_a_thread() as emulator, pytest.raises(expected) as caught:
            asyncio.run(scenario(emulator.url))
        if expected is BctrlError:
            assert str(caught.value) == "on_outcome raised CancelledError"
        assert batches[0].report.counts.total() == batches[0].read == 10
        assert not batches[0].report.ok

    async def test_an_input_that_calls_stop_reading_aborts_nothing(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 10)
        emulator.inject(*[Fault.LATENCY] * 3)

        async def source() -> AsyncIterator[tuple[str, str]]:
            for number, target in enumerate(targets):
                if number == 3:
                    batch.stop_reading()
                yield target

        batch = session.stop_runtimes(source())
        report = await batch

        assert report.counts == {STOPPED: 3, NOT_SENT: 1}

    async def test_leaving_the_block_after_the_last_outcome_does_not_end_the_run_early(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        async with session.stop_runtimes(add_runtimes(emulator, 3)) as batch:
            for _ in range(3):
                await anext(batch)
        assert batch.report.ok

    async def test_a_second_cancellation_still_leaves_every_target_recorded(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(*[Fault.HANG] * 100)
        batch = session.stop_runtimes(add_runtimes(emulator, 2000))
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(emulator, 100)
        running.cancel()
        await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait([running])

        assert running.cancelled()
        assert batch.report.counts == {UNKNOWN: 100, NOT_SENT: 1900}
        assert_conserved(batch, emulator)

    async def test_cancelling_the_consumer_ends_the_run(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(*[Fault.HANG] * 3)
        batch = session.stop_runtimes(add_runtimes(emulator, 3))

        async def consume() -> None:
            async with batch:
                await anext(batch)

        consuming = asyncio.create_task(consume())
        await wait_for_requests(emulator, 3)
        consuming.cancel()
        await asyncio.wait([consuming])
        assert batch.report.counts == {UNKNOWN: 3}
        assert_conserved(batch, emulator)

    async def test_workers_cancelled_from_outside_end_the_run_with_every_target_recorded(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(*[Fault.HANG] * 5)
        batch = session.stop_runtimes(add_runtimes(emulator, 30), concurrency=5)
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(emulator, 5)
        workers = bulk_tasks()
        assert len(workers) == 5
        for task in workers:
            task.cancel()
        await asyncio.wait([running])

        assert batch.report.counts == {UNKNOWN: 5, NOT_SENT: 25}
        assert_conserved(batch, emulator)

    async def test_a_worker_cancelled_while_it_waits_for_the_input_ends_the_run(
        self, session: BctrlSession
    ) -> None:
        async def never() -> AsyncIterator[tuple[str, str]]:
            await asyncio.Event().wait()
            yield "ws-1", "crm"

        running = asyncio.create_task(await_batch(session.stop_runtimes(never(), concurrency=2)))
        await asyncio.sleep(0.01)
        next(iter(bulk_tasks())).cancel()
        await asyncio.wait_for(running, 5)

    async def test_an_exception_of_on_outcome_ends_the_run(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 200)
        emulator.inject(Fault.HANG, alias="r1")
        delivered: list[int] = []

        def fail(outcome: StopOutcome) -> None:
            delivered.append(outcome.index)
            if len(delivered) == 10:
                raise LookupError("mine")

        batch = session.stop_runtimes(targets, on_outcome=fail, concurrency=4)
        with pytest.raises(LookupError, match="mine"):
            await batch

        assert batch.report.total == 200
        assert len(delivered) == 10
        assert_conserved(batch, emulator)

    async def test_an_exception_of_on_outcome_is_raised_by_the_iteration(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        def fail(_: StopOutcome) -> None:
            raise LookupError("mine")

        async with session.stop_runtimes(add_runtimes(emulator, 50), on_outcome=fail) as batch:
            with pytest.raises(LookupError, match="mine"):
                [outcome async for outcome in batch]
        assert_conserved(batch, emulator)

    async def test_an_exception_of_on_outcome_is_raised_at_the_end_of_an_unread_block(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        failed = asyncio.Event()

        def fail(_: StopOutcome) -> None:
            failed.set()
            raise LookupError("mine")

        batch = session.stop_runtimes(add_runtimes(emulator, 1), on_outcome=fail)
        with pytest.raises(LookupError, match="mine"):  # noqa: PT012 - the block is tested.
            async with batch:
                await failed.wait()
                await asyncio.sleep(0.01)
        assert_conserved(batch, emulator)

    async def test_a_hanging_on_outcome_is_cancelled_with_the_run(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        async def hang(_: StopOutcome) -> None:
            await asyncio.Event().wait()

        batch = session.stop_runtimes(add_runtimes(emulator, 10), on_outcome=hang, concurrency=2)
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(emulator, 2)
        await asyncio.sleep(0.02)
        running.cancel()
        await asyncio.wait([running])
        assert batch.report.counts == {STOPPED: 2, NOT_SENT: 8}
        assert_conserved(batch, emulator)

    async def test_stop_reading_records_the_rest_of_a_list_as_not_sent(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 30)
        emulator.inject(Fault.DROP_BEFORE, alias="r1")
        async with session.stop_runtimes(targets, concurrency=3) as batch:
            await wait_for_requests(emulator, 3)
            batch.stop_reading()
            outcomes = {outcome.index: outcome async for outcome in batch}

        assert len(outcomes) == 30
        # A target that was begun is still retried and stopped.
        assert outcomes[1].result is STOPPED
        assert outcomes[1].attempts == 2
        assert outcomes[29].result is NOT_SENT
        assert str(outcomes[29].error) == "not sent: the run was asked to begin no more stops"
        assert not batch.report.ok
        assert_conserved(batch, emulator)

    async def test_stop_reading_reads_no_more_of_a_generator(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        async with session.stop_runtimes(
            iter(add_runtimes(emulator, 1000)), concurrency=3
        ) as batch:
            await wait_for_requests(emulator, 3)
            batch.stop_reading()
            results = [outcome.result async for outcome in batch]

        assert set(results) == {STOPPED}
        assert len(results) == batch.read < 20
        assert not batch.report.ok
        with pytest.raises(ExceptionGroup, match="ended early"):
            batch.report.raise_for_failures()

    async def test_abort_ends_the_run_with_a_report_and_delivers_every_outcome(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(*[Fault.HANG] * 5)
        outcomes: list[StopOutcome] = []
        batch = session.stop_runtimes(
            add_runtimes(emulator, 30), concurrency=5, on_outcome=outcomes.append
        )
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(emulator, 5)
        batch.stop_reading()
        batch.abort()
        await running

        assert batch.report.counts == {UNKNOWN: 5, NOT_SENT: 25}
        assert Counter(outcome.result for outcome in outcomes) == batch.report.counts
        assert "before an answer: the run was aborted" in str(outcomes[0].error)
        assert_conserved(batch, emulator)

    async def test_stop_reading_after_the_last_outcome_changes_nothing(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        async with session.stop_runtimes(iter(add_runtimes(emulator, 3))) as batch:
            async for _ in batch:
                pass
            batch.stop_reading()

        assert batch.report.ok

    async def test_stop_reading_interrupts_the_wait_for_the_input(
        self, session: BctrlSession
    ) -> None:
        async def one_target() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "crm"
            await asyncio.Event().wait()

        async with session.stop_runtimes(one_target()) as batch:
            assert (await anext(batch)).result is STOPPED
            batch.stop_reading()
            assert [outcome async for outcome in batch] == []


class TestDeadline:
    async def test_requests_in_flight_are_unknown_and_the_rest_is_not_sent(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 50)
        emulator.inject(*[Fault.HANG] * 5)
        batch = session.stop_runtimes(targets, concurrency=5, deadline=0.2)
        report = await batch

        assert report.counts == {UNKNOWN: 5, NOT_SENT: 45}
        assert str(report.ended_early) == "the deadline of 0.2 s has passed"
        assert_conserved(batch, emulator)

    async def test_on_outcome_is_called_in_a_task_that_is_not_cancelled(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(*[Fault.HANG] * 2)
        cancelling: list[int] = []

        def record(_: StopOutcome) -> None:
            task = asyncio.current_task()
            assert task is not None
            cancelling.append(task.cancelling())

        report = await session.stop_runtimes(
            add_runtimes(emulator, 2), deadline=0.1, on_outcome=record
        )

        assert report.counts == {UNKNOWN: 2}
        assert cancelling == [0, 0]

    async def test_every_outcome_is_delivered(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(*[Fault.HANG] * 5)
        batch = session.stop_runtimes(add_runtimes(emulator, 50), concurrency=5, deadline=0.2)
        async with batch:
            results = Counter([outcome.result async for outcome in batch])

        assert results == {UNKNOWN: 5, NOT_SENT: 45}

    async def test_the_wait_for_an_input_that_yields_nothing_ends(
        self, session: BctrlSession
    ) -> None:
        async def never() -> AsyncIterator[tuple[str, str]]:
            await asyncio.Event().wait()
            yield "ws-1", "crm"

        report = await session.stop_runtimes(never(), deadline=0.05)

        assert (report.total, report.ok) == (0, False)

    async def test_a_throttled_target_is_rejected(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(*[Fault.RATE_LIMITED] * 100)
        batch = session.stop_runtimes(
            [("ws-1", "crm")], deadline=0.3, retry=RetryPolicy(patience=60)
        )
        report = await batch

        [failure] = report.failures
        assert failure.result is StopResult.REJECTED
        assert failure.error is not None
        assert failure.error.status == 429
        assert "aborted before it was sent again: the deadline of 0.3 s" in str(failure.error)
        assert "before that, the server answered 429" in str(failure.error)

    async def test_a_throttled_target_that_may_have_stopped_before_is_unknown(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(Fault.BAD_GATEWAY, *[Fault.RATE_LIMITED] * 100)
        report = await session.stop_runtimes([("ws-1", "crm")], deadline=0.3)

        assert report.counts == {UNKNOWN: 1}


class TestEndedByError:
    async def test_an_invalid_key_ends_the_run(self, emulator: Emulator) -> None:
        async with BctrlSession("wrong", base_url=emulator.url) as session:
            batch = session.stop_runtimes(add_runtimes(emulator, 500), concurrency=10)
            report = await batch

        assert isinstance(report.ended_early, BctrlAuthenticationError)
        assert report.counts.keys() == {StopResult.REJECTED, NOT_SENT}
        assert report.counts[StopResult.REJECTED] == len(emulator.requests) == 10
        assert report.total == 500

    async def test_requests_in_flight_may_still_be_answered_but_are_not_retried(
        self, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 3)
        emulator.inject(Fault.LATENCY, alias="r0")
        emulator.inject(Fault.HANG, alias="r1")
        keys = iter(["emulator-key", "emulator-key", "wrong"])
        async with BctrlSession(lambda: next(keys), base_url=emulator.url, timeout=0.5) as session:
            outcomes: dict[int, StopOutcome] = {}
            await session.stop_runtimes(
                targets, on_outcome=lambda outcome: outcomes.update({outcome.index: outcome})
            )

        assert [outcomes[index].result for index in range(3)] == [STOPPED, UNKNOWN, "rejected"]
        assert outcomes[1].attempts == 1

    async def test_a_throttled_target_is_rejected_if_the_key_can_no_longer_be_fetched(
        self, emulator: Emulator
    ) -> None:
        calls = 0

        def key() -> str:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise LookupError("the vault is sealed")
            return "emulator-key"

        emulator.inject(Fault.RATE_LIMITED)
        async with BctrlSession(key, base_url=emulator.url) as session:
            report = await session.stop_runtimes([("ws-1", "crm")])

        assert emulator.received.total() == 1
        assert report.counts == {StopResult.REJECTED: 1}

    async def test_a_retry_after_beyond_the_patience_ends_the_run(self) -> None:
        async with Emulator(port=0, retry_after="301") as emulator:
            emulator.add_runtime("ws-1", "crm")
            emulator.inject(Fault.RATE_LIMITED_RETRY_AFTER)
            endless = iter(lambda: ("ws-1", "crm"), None)
            async with BctrlSession("emulator-key", base_url=emulator.url) as session:
                report = await session.stop_runtimes(endless, concurrency=10)

        assert isinstance(report.ended_early, BctrlRateLimitError)
        assert report.total <= 20

    @pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
    def test_every_target_has_an_outcome_whatever_the_key_function_raises(
        self, error: type[BaseException]
    ) -> None:
        batches: list[StopBatch] = []

        def no_key() -> str:
            raise error

        async def scenario(url: str) -> None:
            async with BctrlSession(no_key, base_url=url) as session:
                batches.append(session.stop_runtimes([("ws-1", "r0")] * 50))
                await batches[0]

        with emulator_in_a_thread() as emulator:
            if error is KeyboardInterrupt:
                with pytest.raises(KeyboardInterrupt):
                    asyncio.run(scenario(emulator.url))
            else:
                asyncio.run(scenario(emulator.url))
        assert batches[0].report.counts.total() == 50
        assert not batches[0].report.ok

    async def test_a_key_that_cannot_be_fetched_ends_the_run(self, emulator: Emulator) -> None:
        def no_key() -> str:
            raise LookupError("the vault is sealed")

        async with BctrlSession(no_key, base_url=emulator.url) as session:
            report = await session.stop_runtimes(add_runtimes(emulator, 100))

        assert report.counts == {NOT_SENT: 100}
        assert isinstance(report.ended_early, BctrlConfigError)
        assert not emulator.requests

    async def test_closing_the_session_ends_the_run(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.inject(*[Fault.HANG] * 5)
        session = connect()
        batch = session.stop_runtimes(add_runtimes(emulator, 50), concurrency=5)
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(emulator, 5)
        await session.close()
        await running

        assert batch.report.counts == {UNKNOWN: 5, NOT_SENT: 45}
        assert_conserved(batch, emulator)

    async def test_a_closed_session_is_an_error_before_any_target_is_read(
        self, connect: Connect
    ) -> None:
        session = connect()
        await session.close()
        batch = session.stop_runtimes([("ws-1", "crm")])
        with pytest.raises(BctrlConfigError, match="closed"):
            await batch
        with pytest.raises(BctrlConfigError, match="closed"):
            async with batch:
                pass
        assert batch.read == 0

    async def test_a_bug_is_raised_once_every_target_is_recorded(
        self, emulator: Emulator, session: BctrlSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(Sender, "_attempt", fail)
        batch = session.stop_runtimes(add_runtimes(emulator, 50), concurrency=5)
        with pytest.raises(ZeroDivisionError):
            await batch

        assert batch.report.total == 50
        assert batch.report.counts[UNKNOWN] == 1
        assert_conserved(batch, emulator)


class TestArguments:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("concurrency", 0),
            ("concurrency", 1.5),
            ("deadline", 0),
            ("deadline", "soon"),
            ("timeout", -1),
            ("retry", 3),
            ("journal", 3),
            ("on_outcome", 5),
        ],
    )
    async def test_an_invalid_argument_is_named(
        self, session: BctrlSession, name: str, value: object
    ) -> None:
        with pytest.raises(BctrlConfigError, match=rf"^({name} is|invalid {name}) "):
            session.stop_runtimes([("ws-1", "crm")], **{name: value})  # type: ignore[arg-type]

    async def test_timeout_and_retry_apply_to_each_target(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(*[Fault.HANG] * 10)
        report = await session.stop_runtimes(
            [RuntimeRef("ws-1", "crm")], timeout=0.05, retry=RetryPolicy(attempts=2, base=0.001)
        )

        [failure] = report.failures
        assert (failure.result, failure.attempts) == (UNKNOWN, 2)

    async def test_the_patience_of_the_policy_applies(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(*[Fault.RATE_LIMITED] * 10)
        report = await session.stop_runtimes([("ws-1", "crm")], retry=RetryPolicy(patience=0))

        [failure] = report.failures
        assert isinstance(failure.error, BctrlRateLimitError)
        assert (failure.result, failure.attempts) == (StopResult.REJECTED, 1)


class TestSingleStop:
    async def test_a_throttled_stop_is_rejected_if_its_next_connection_fails(self) -> None:
        emulator = Emulator(port=0)
        emulator.add_runtime("ws-1", "crm")
        emulator.inject(Fault.RATE_LIMITED)
        async with emulator:
            session = BctrlSession("emulator-key", base_url=emulator.url)
            stopping = asyncio.create_task(
                session.stop_runtime("ws-1", "crm", retry=RetryPolicy(attempts=1))
            )
            await wait_for_requests(emulator, 1)
        with pytest.raises(BctrlError) as caught:
            await stopping
        await session.close()

        assert caught.value.status == 429
        assert result_of(caught.value) is StopResult.REJECTED
