"""A bulk stop that ends early: exactly one outcome for each target, whatever ends it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path

import aiohttp
import pytest
from helpers import (
    BOUND,
    Connect,
    HoldingEmulator,
    add_runtimes,
    assert_conserved,
    await_batch,
    pass_time,
    run_of,
    wait_for_requests,
)
from leaks import bulk_tasks
from servers import emulator_in_a_thread

from bctrl_async import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    BctrlRateLimitError,
    BctrlSession,
    RetryPolicy,
    StopBatch,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async._calls.sender import Sender
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN


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

    async def test_leaving_the_block_at_once_is_not_a_success(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        """Fault: the run was cancelled before its first step, and its report was ok."""
        async with session.stop_runtimes(add_runtimes(emulator, 5)) as batch:
            pass

        assert not batch.report.ok
        assert str(batch.report.ended_early) == "the run was cancelled"
        assert [outcome async for outcome in batch] == []
        assert emulator.requests == []

    def test_a_run_can_be_told_to_end_where_there_is_no_event_loop(self) -> None:
        batch = BctrlSession("key").stop_runtimes([("ws-1", "crm")])
        batch.stop_reading()
        batch.abort()
        batch.close()

        assert batch.report.total == 0

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

    async def test_a_coroutine_that_is_closed_leaves_its_journal_to_its_tasks(
        self, emulator: Emulator, session: BctrlSession, tmp_path: Path
    ) -> None:
        """Fault: to close it raised a RuntimeError, and the journal stayed locked."""
        targets = add_runtimes(emulator, 10)
        emulator.inject(*[Fault.HANG] * 5)
        journal = tmp_path / "closed.jsonl"
        batch = session.stop_runtimes(targets, journal=journal, concurrency=5)
        opened = batch.send(None)
        assert isinstance(opened, asyncio.Future)
        await asyncio.wait([opened])
        batch.send(None)
        await wait_for_requests(emulator, 5)

        batch.close()
        await asyncio.wait(run_of(batch)._tasks)
        await asyncio.sleep(0)

        assert batch.report.counts == {UNKNOWN: 5, NOT_SENT: 5}
        assert (await session.stop_runtimes(targets, journal=journal)).ok

    async def test_a_coroutine_that_is_closed_while_it_polls_is_not_ok(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        """Fault: the report was ok, and the runtime went on running."""
        emulator.inject(*[Fault.ACCEPTED] * 2)
        batch = session.stop_runtimes(add_runtimes(emulator, 1))
        batch.send(None)
        async with asyncio.timeout(BOUND):
            while not batch.polling:
                await asyncio.sleep(0)

        batch.close()

        assert not batch.report.ok
        await asyncio.wait(run_of(batch)._tasks)

    async def test_the_journal_of_a_closed_coroutine_has_what_a_cancelled_poller_leaves(
        self, emulator: Emulator, session: BctrlSession, tmp_path: Path
    ) -> None:
        """Fault: the journal was closed first, and the record of the outcome raised an error."""
        emulator.inject(Fault.ACCEPTED)
        journal = tmp_path / "closed.jsonl"

        def targets() -> Iterator[tuple[str, str]]:
            yield from add_runtimes(emulator, 1)
            batch.close()
            _, poller = run_of(batch)._tasks
            poller.cancel()

        batch = session.stop_runtimes(targets(), journal=journal, concurrency=1, verify=True)
        opened = batch.send(None)
        assert isinstance(opened, asyncio.Future)
        await asyncio.wait([opened])
        batch.send(None)
        async with asyncio.timeout(BOUND):
            while run_of(batch)._tasks:
                await asyncio.sleep(0.01)

        assert batch.report.counts == {StopResult.ACCEPTED: 1}
        assert '"accepted"' in journal.read_text("utf-8")

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

    @pytest.mark.parametrize("end", [StopBatch.stop_reading, StopBatch.abort])
    async def test_a_list_that_grows_with_each_outcome_has_an_end(
        self, emulator: Emulator, session: BctrlSession, end: Callable[[StopBatch], None]
    ) -> None:
        """Fault: a callback that appended what was not sent made the run endless."""
        targets = add_runtimes(emulator, 50)

        def append(outcome: StopOutcome) -> None:
            end(batch)
            if len(targets) < 1000:
                targets.append(outcome.target)

        batch = session.stop_runtimes(targets, concurrency=1, on_outcome=append)
        report = await batch

        assert report.total == 50
        assert_conserved(batch, emulator)

    async def test_a_list_that_shrinks_is_not_the_whole_input(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        """Fault: a callback that removed what was stopped left half of the list running."""
        targets = add_runtimes(emulator, 10)
        report = await session.stop_runtimes(
            targets,
            concurrency=1,
            on_outcome=lambda outcome: targets.remove((outcome.target[0], outcome.target[1])),
        )

        assert report.counts == {STOPPED: 5}
        assert not report.ok
        assert str(report.ended_early) == "the input ended after 5 of 10 targets"

    async def test_an_input_that_calls_stop_reading_aborts_nothing(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 10)
        emulator.inject(*[Fault.LATENCY] * 3)

        async def source() -> AsyncIterator[tuple[str, str]]:
            for number, target in enumerate(targets):
                if number == 3:
                    await wait_for_requests(emulator, 3)
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

    @pytest.mark.parametrize("cancelled", [1, 5])
    async def test_workers_cancelled_from_outside_end_the_run_with_every_target_recorded(
        self, emulator: Emulator, session: BctrlSession, cancelled: int
    ) -> None:
        emulator.inject(*[Fault.HANG] * 5)
        batch = session.stop_runtimes(add_runtimes(emulator, 30), concurrency=5)
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(emulator, 5)
        workers = bulk_tasks()
        assert len(workers) == 5
        for task in list(workers)[:cancelled]:
            task.cancel()
        await asyncio.wait([running])

        assert batch.report.counts == {UNKNOWN: 5, NOT_SENT: 25}
        assert str(batch.report.ended_early) == "the run was cancelled"
        assert_conserved(batch, emulator)

    async def test_abort_delivers_every_outcome_after_a_cancellation_was_swallowed(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(Fault.HANG, alias="r1")
        delivered: list[StopResult] = []

        async def swallow(outcome: StopOutcome) -> None:
            delivered.append(outcome.result)
            if outcome.index == 0:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)

        batch = session.stop_runtimes(add_runtimes(emulator, 4), concurrency=1, on_outcome=swallow)
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(emulator, 2)
        batch.abort()
        await running
        assert delivered == [STOPPED, UNKNOWN, NOT_SENT, NOT_SENT]

    async def test_a_call_that_raises_cancelled_error_fails_the_run(
        self, emulator: Emulator
    ) -> None:
        """It awaited something that was cancelled; the run itself was not."""

        async def cancelled(*_: object) -> None:
            raise asyncio.CancelledError

        traces = aiohttp.TraceConfig()
        traces.on_request_start.append(cancelled)
        async with BctrlSession(
            "emulator-key", base_url=emulator.url, trace_configs=[traces]
        ) as session:
            batch = session.stop_runtimes(add_runtimes(emulator, 3), concurrency=1)
            with pytest.raises(BctrlError, match="the call raised CancelledError"):
                await batch
        assert batch.report.counts.total() == 3
        assert not batch.report.ok

    async def test_a_worker_cancelled_while_it_waits_for_the_input_ends_the_run(
        self, session: BctrlSession
    ) -> None:
        awaited = asyncio.Event()

        async def never() -> AsyncIterator[tuple[str, str]]:
            awaited.set()
            await asyncio.Event().wait()
            yield "ws-1", "crm"

        running = asyncio.create_task(await_batch(session.stop_runtimes(never(), concurrency=2)))
        await awaited.wait()
        next(iter(bulk_tasks())).cancel()
        await asyncio.wait_for(running, BOUND)

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
                # The run ends within a few turns of the loop.
                for _ in range(100):
                    await asyncio.sleep(0)
        assert_conserved(batch, emulator)

    async def test_a_hanging_on_outcome_is_cancelled_with_the_run(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        both_hang = asyncio.Barrier(3)

        async def hang(_: StopOutcome) -> None:
            await both_hang.wait()
            await asyncio.Event().wait()

        batch = session.stop_runtimes(add_runtimes(emulator, 10), on_outcome=hang, concurrency=2)
        running = asyncio.create_task(await_batch(batch))
        await both_hang.wait()
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
        assert str(outcomes[29].error) == "not sent: the run was asked to start no more stops"
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
        batch = session.stop_runtimes(targets, concurrency=5, deadline=9.5)
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(emulator, 5)
        pass_time(9.5)
        await running

        assert batch.report.counts == {UNKNOWN: 5, NOT_SENT: 45}
        assert str(batch.report.ended_early) == "the deadline of 9.5 s has passed"
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

        batch = session.stop_runtimes(add_runtimes(emulator, 2), deadline=9.5, on_outcome=record)
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(emulator, 2)
        pass_time(9.5)
        await running

        assert batch.report.counts == {UNKNOWN: 2}
        assert cancelling == [0, 0]

    async def test_every_outcome_is_delivered(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(*[Fault.HANG] * 5)
        batch = session.stop_runtimes(add_runtimes(emulator, 50), concurrency=5, deadline=9.5)
        async with batch:
            await wait_for_requests(emulator, 5)
            pass_time(9.5)
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
            [("ws-1", "crm")], deadline=9.5, retry=RetryPolicy(patience=60)
        )
        report = await end_while_throttled(batch)

        [failure] = report.failures
        assert failure.result is StopResult.REJECTED
        assert failure.error is not None
        assert failure.error.status == 429
        assert "aborted before it was sent again: the deadline of 9.5 s" in str(failure.error)
        assert "before that, the server answered 429" in str(failure.error)

    async def test_a_throttled_target_that_may_have_stopped_before_is_unknown(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(Fault.BAD_GATEWAY, *[Fault.RATE_LIMITED] * 100)
        report = await end_while_throttled(session.stop_runtimes([("ws-1", "crm")], deadline=9.5))

        assert report.counts == {UNKNOWN: 1}


async def end_while_throttled(batch: StopBatch) -> StopReport:
    """Let the deadline of 9.5 s pass once a target is throttled; return the report."""
    running = asyncio.create_task(await_batch(batch))
    async with asyncio.timeout(BOUND):
        while not batch.is_throttled:
            await asyncio.sleep(0)
    pass_time(9.5)
    await running
    return batch.report


class TestEndedByError:
    async def test_an_invalid_key_ends_the_run(self, emulator: Emulator) -> None:
        async with BctrlSession("wrong", base_url=emulator.url) as session:
            batch = session.stop_runtimes(add_runtimes(emulator, 500), concurrency=10)
            report = await batch

        assert isinstance(report.ended_early, BctrlAuthenticationError)
        assert report.counts.keys() == {StopResult.REJECTED, NOT_SENT}
        assert report.counts[StopResult.REJECTED] == len(emulator.requests) <= 10
        assert report.total == 500

    async def test_requests_in_flight_may_still_be_answered_but_are_not_retried(
        self,
    ) -> None:
        keys = chain(["emulator-key", "emulator-key", "wrong"], repeat("emulator-key"))
        async with (
            HoldingEmulator() as emulator,
            BctrlSession(lambda: next(keys), base_url=emulator.url) as session,
        ):
            targets = add_runtimes(emulator, 3)
            emulator.held.update(("r0", "r2"))
            emulator.inject(Fault.HANG, alias="r1")
            async with session.stop_runtimes(targets) as batch:
                await wait_for_requests(emulator, 3)
                emulator.held.remove("r2")
                rejected = await anext(batch)
                emulator.held.clear()
                answered = await anext(batch)
                pass_time(60.0)
                unanswered = await anext(batch)

        outcomes = [answered, unanswered, rejected]
        assert [outcome.index for outcome in outcomes] == [0, 1, 2]
        assert [outcome.result for outcome in outcomes] == [STOPPED, UNKNOWN, "rejected"]
        assert unanswered.attempts == emulator.received["ws-1", "r1"] == 1

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
        async with Emulator(port=0) as emulator:
            emulator.add_runtime("ws-1", "crm")
            emulator.inject(Reply(429, headers={"Retry-After": "301"}))
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

    async def test_a_run_cancelled_as_its_input_raises_is_not_a_success(
        self, session: BctrlSession
    ) -> None:
        """Fault: `report.ok` was true."""

        async def targets() -> AsyncIterator[tuple[str, str]]:
            if running.cancel():
                raise LookupError
            yield ("ws-1", "crm")

        batch = session.stop_runtimes(targets())
        running = asyncio.create_task(await_batch(batch))
        with pytest.raises(asyncio.CancelledError):
            await running

        assert not batch.report.ok

    async def test_a_target_that_is_throttled_as_the_session_is_closed_is_rejected(
        self, emulator: Emulator
    ) -> None:
        emulator.inject(Fault.RATE_LIMITED)
        async with aiohttp.ClientSession() as http:
            session = BctrlSession("emulator-key", base_url=emulator.url, http=http)
            running = asyncio.ensure_future(session.stop_runtimes([("ws-1", "crm")]))
            await wait_for_requests(emulator, 1)
            await session.close()
            report = await running

        assert report.counts == {StopResult.REJECTED: 1}

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

        # It came before there was a connection.
        assert batch.report.counts == {NOT_SENT: 50}
        assert_conserved(batch, emulator)
