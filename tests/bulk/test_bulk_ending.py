"""A bulk stop that ends early: exactly one outcome for each target, whatever ends it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import aiohttp
import pytest
from helpers import (
    BOUND,
    Bulk,
    Connect,
    HoldingEmulator,
    add_runtimes,
    assert_conserved,
    await_batch,
    pass_time,
    run_of,
    started,
    until,
    wait_for_requests,
)
from leaks import bulk_tasks
from servers import emulator_in_a_thread

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlRateLimitError,
    BctrlSession,
    StopBatch,
    StopOutcome,
    StopResult,
)
from bctrl_async._calls.sender import Sender
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN


@dataclass
class Running:
    """A bulk stop that a task of a session awaits or reads."""

    batch: StopBatch
    task: asyncio.Task[None]
    session: BctrlSession

    async def cancel_twice(self) -> None:
        self.task.cancel()
        await asyncio.sleep(0)
        self.task.cancel()

    def cancel_workers(self) -> None:
        for task in bulk_tasks():
            task.cancel()

    def ask_and_abort(self) -> None:
        self.batch.stop_reading()
        self.batch.abort()


async def read_all(batch: StopBatch) -> None:
    async with batch:
        [outcome async for outcome in batch]


Run = Callable[[StopBatch], Coroutine[object, object, None]]
CANCELLED, ABORTED = "the run was cancelled", "the run was aborted"
ASKED = "the run was asked to start no more stops"
PASSED = "the deadline of 9.5 s has passed"
CLOSED = "the session is closed"
ENDS: dict[str, tuple[Callable[[Running], object], Run, str]] = {
    # They say what ends it, how it runs, and why it ended early.
    "its task is cancelled": (lambda run: run.task.cancel(), await_batch, CANCELLED),
    "its task is cancelled twice": (Running.cancel_twice, await_batch, CANCELLED),
    "its block is cancelled": (lambda run: run.task.cancel(), read_all, CANCELLED),
    "a worker is cancelled": (lambda _: bulk_tasks().pop().cancel(), await_batch, CANCELLED),
    "all workers are cancelled": (Running.cancel_workers, await_batch, CANCELLED),
    "it is aborted": (lambda run: run.batch.abort(), await_batch, ABORTED),
    "it is aborted within its block": (lambda run: run.batch.abort(), read_all, ABORTED),
    "it is aborted after it was asked to end": (Running.ask_and_abort, await_batch, ASKED),
    "its deadline passes": (lambda _: pass_time(9.5), await_batch, PASSED),
    "its deadline passes within its block": (lambda _: pass_time(9.5), read_all, PASSED),
    "its session is closed": (lambda run: run.session.close(), await_batch, CLOSED),
}
ERRORS = {ASKED: ABORTED, CLOSED: "the session was closed during the call"}
"""A part of the error of what was in flight, if that is not why the run ended."""


async def end_as(case: str, run: Running) -> None:
    """End a bulk stop as in a case of ENDS."""
    ending = ENDS[case][0](run)
    if inspect.isawaitable(ending):
        await ending


@pytest.mark.parametrize("case", ENDS)
async def test_what_is_in_flight_becomes_unknown_and_the_rest_not_sent_if(
    emulator: Emulator, connect: Connect, case: str
) -> None:
    _, run, why = ENDS[case]
    emulator.inject(*[Fault.HANG] * 5)
    delivered: list[StopOutcome] = []
    cancelling: set[int] = set()

    def deliver(outcome: StopOutcome) -> None:
        delivered.append(outcome)
        task = asyncio.current_task()
        assert task is not None
        cancelling.add(task.cancelling())

    async with connect() as session:
        batch = session.stop_runtimes(
            add_runtimes(emulator, 30), concurrency=5, deadline=9.5, on_outcome=deliver
        )
        task = await started(batch, emulator, 5, run)
        await end_as(case, Running(batch, task, session))
        await asyncio.wait([task])

        report = batch.report
        assert task.cancelled() is (why is CANCELLED and "worker" not in case)
        assert report.counts == {UNKNOWN: 5, NOT_SENT: 25}
        assert why in str(report.ended_early)
        in_flight = [str(each.error) for each in report.failures if each.attempts]
        assert all(ERRORS.get(why, why) in error for error in in_flight)
        assert delivered == ([] if why is CANCELLED else list(report.failures))
        # A callback may wait for something.
        assert cancelling <= {0}
        assert_conserved(batch, emulator)


@pytest.mark.parametrize("case", ["a worker is cancelled", "it is aborted", "its deadline passes"])
async def test_the_wait_for_an_input_that_yields_nothing_more_ends_if(
    session: BctrlSession, case: str
) -> None:
    awaited = asyncio.Event()

    async def one_target() -> AsyncIterator[tuple[str, str]]:
        yield "ws-1", "crm"
        awaited.set()
        await asyncio.Event().wait()

    batch = session.stop_runtimes(one_target(), deadline=9.5, concurrency=2)
    running = asyncio.create_task(await_batch(batch))
    await awaited.wait()
    while not batch.counts:
        await asyncio.sleep(0)
    await end_as(case, Running(batch, running, session))
    await asyncio.wait_for(running, BOUND)
    assert batch.report.counts == {STOPPED: 1}
    assert not batch.report.ok


class TestBlock:
    @pytest.mark.parametrize("error", [None, LookupError("mine")])
    async def test_leaving_it_early_aborts_the_requests_in_flight(
        self, bulk: Bulk, error: LookupError | None
    ) -> None:
        bulk.emulator.inject(Fault.HANG, alias="r1")
        batch = bulk.stop(50, concurrency=2)
        raised = None if error is None else pytest.raises(LookupError, match="mine")
        with raised or nullcontext():
            async with batch:
                async for outcome in batch:
                    if outcome.index == 10 and error is not None:
                        raise error
                    if outcome.index == 10:
                        break

        assert_conserved(batch, bulk.emulator)
        assert batch.report.total == 50
        assert batch.report.counts[NOT_SENT] > 30
        [aborted] = [outcome for outcome in batch.report.failures if outcome.index == 1]
        assert aborted.result is UNKNOWN
        assert str(aborted.error) == (
            "stop of 'r1' in workspace 'ws-1': aborted before an answer: the run was cancelled "
            "(the runtime may have stopped). Stop it again: a stop is safe to repeat"
        )

    async def test_leaving_it_at_once_is_not_a_success(self, bulk: Bulk) -> None:
        async with bulk.stop(5) as batch:
            pass

        assert not batch.report.ok
        assert str(batch.report.ended_early) == CANCELLED
        assert [outcome async for outcome in batch] == []
        assert bulk.emulator.requests == []

    @pytest.mark.parametrize("end", [lambda _: None, StopBatch.stop_reading, StopBatch.abort])
    async def test_an_end_after_the_last_outcome_is_not_early(
        self, bulk: Bulk, end: Callable[[StopBatch], None]
    ) -> None:
        async with bulk.stop(3) as batch:
            for _ in range(3):
                await anext(batch)
            end(batch)
        assert batch.report.ok


class TestCoroutine:
    async def started(self, batch: StopBatch) -> None:
        """Run the coroutine of a bulk stop until its journal is open."""
        opened = batch.send(None)
        assert isinstance(opened, asyncio.Future)
        await asyncio.wait([opened])
        batch.send(None)

    def test_it_can_be_closed_where_there_is_no_event_loop(self) -> None:
        batch = BctrlSession("key").stop_runtimes([("ws-1", "crm")])
        batch.stop_reading()
        batch.abort()
        batch.close()

        assert batch.report.total == 0

    async def test_if_it_is_closed_its_journal_is_left_to_its_tasks(
        self, bulk: Bulk, tmp_path: Path
    ) -> None:
        targets = add_runtimes(bulk.emulator, 10)
        bulk.emulator.inject(*[Fault.HANG] * 5)
        journal = tmp_path / "closed.jsonl"
        batch = bulk.session.stop_runtimes(targets, journal=journal, concurrency=5)
        await self.started(batch)
        await wait_for_requests(bulk.emulator, 5)

        batch.close()
        await asyncio.wait(run_of(batch)._tasks, timeout=BOUND)
        await asyncio.sleep(0)

        assert batch.report.counts == {UNKNOWN: 5, NOT_SENT: 5}
        assert (await bulk.session.stop_runtimes(targets, journal=journal)).ok

    async def test_if_it_is_closed_its_journal_has_what_a_cancelled_poller_leaves(
        self, bulk: Bulk, tmp_path: Path
    ) -> None:
        bulk.emulator.inject(Fault.ACCEPTED)
        journal = tmp_path / "closed.jsonl"

        def targets() -> Iterator[tuple[str, str]]:
            yield from add_runtimes(bulk.emulator, 1)
            batch.close()
            _, poller = run_of(batch)._tasks
            poller.cancel()

        batch = bulk.session.stop_runtimes(targets(), journal=journal, concurrency=1, verify=True)
        await self.started(batch)
        await until(lambda: not run_of(batch)._tasks)

        assert batch.report.counts == {StopResult.ACCEPTED: 1}
        assert '"accepted"' in journal.read_text("utf-8")


class TestCallback:
    @pytest.mark.parametrize(
        "error", [LookupError, asyncio.CancelledError, KeyboardInterrupt, SystemExit]
    )
    @pytest.mark.parametrize("run", [await_batch, read_all])
    def test_its_exception_propagates_once_every_target_is_recorded(
        self, error: type[BaseException], run: Run
    ) -> None:
        batches: list[StopBatch] = []
        delivered: list[StopOutcome] = []

        def fail(outcome: StopOutcome) -> None:
            delivered.append(outcome)
            raise error

        async def scenario(url: str) -> None:
            async with BctrlSession("emulator-key", base_url=url) as session:
                targets = [("ws-1", f"r{number}") for number in range(10)]
                batches.append(session.stop_runtimes(targets, on_outcome=fail, concurrency=2))
                await run(batches[0])

        expected = BctrlError if error is asyncio.CancelledError else error
        with emulator_in_a_thread() as emulator, pytest.raises(expected) as caught:
            asyncio.run(scenario(emulator.url))
        if expected is BctrlError:
            assert str(caught.value) == "on_outcome raised CancelledError"
        assert len(delivered) == 1
        assert batches[0].report.counts.total() == batches[0].read == 10
        assert not batches[0].report.ok

    async def test_its_exception_is_raised_at_the_end_of_an_unread_block(self, bulk: Bulk) -> None:
        failed = asyncio.Event()

        def fail(_: StopOutcome) -> None:
            failed.set()
            raise LookupError("mine")

        batch = bulk.stop(1, on_outcome=fail)
        with pytest.raises(LookupError, match="mine"):  # noqa: PT012 - the block is tested.
            async with batch:
                await failed.wait()
                # The run ends within a few turns of the loop.
                for _ in range(100):
                    await asyncio.sleep(0)
        assert_conserved(batch, bulk.emulator)

    async def test_it_is_cancelled_with_the_run_if_it_hangs(self, bulk: Bulk) -> None:
        both_hang = asyncio.Barrier(3)

        async def hang(_: StopOutcome) -> None:
            await both_hang.wait()
            await asyncio.Event().wait()

        batch = bulk.stop(10, on_outcome=hang, concurrency=2)
        running = asyncio.create_task(await_batch(batch))
        await both_hang.wait()
        running.cancel()
        await asyncio.wait([running])
        assert batch.report.counts == {STOPPED: 2, NOT_SENT: 8}
        assert_conserved(batch, bulk.emulator)

    async def test_abort_delivers_every_outcome_after_it_swallowed_a_cancellation(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(Fault.HANG, alias="r1")
        delivered: list[StopResult] = []

        async def swallow(outcome: StopOutcome) -> None:
            delivered.append(outcome.result)
            if outcome.index == 0:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)

        batch = bulk.stop(4, concurrency=1, on_outcome=swallow)
        running = await bulk.started(batch, 2)
        batch.abort()
        await running
        assert delivered == [STOPPED, UNKNOWN, NOT_SENT, NOT_SENT]


class TestInput:
    @pytest.mark.parametrize("count", [1, 50])
    @pytest.mark.parametrize("end", [StopBatch.stop_reading, StopBatch.abort])
    async def test_a_list_that_grows_with_each_outcome_has_an_end_and_is_not_the_whole_input(
        self,
        emulator: Emulator,
        session: BctrlSession,
        end: Callable[[StopBatch], None],
        count: int,
    ) -> None:
        targets = add_runtimes(emulator, count)

        def append(outcome: StopOutcome) -> None:
            if len(targets) < 1000:
                targets.append(outcome.target)
            end(batch)

        batch = session.stop_runtimes(targets, concurrency=1, on_outcome=append)
        report = await batch

        assert (report.total, report.ok) == (count, False)
        assert_conserved(batch, emulator)

    async def test_a_list_that_shrinks_is_not_the_whole_input(self, bulk: Bulk) -> None:
        targets = add_runtimes(bulk.emulator, 10)
        report = await bulk.session.stop_runtimes(
            targets,
            concurrency=1,
            on_outcome=lambda outcome: targets.remove((outcome.target[0], outcome.target[1])),
        )

        assert report.counts == {STOPPED: 5}
        assert not report.ok
        assert str(report.ended_early) == "the input ended after 5 of 10 targets"

    async def test_it_aborts_nothing_if_it_calls_stop_reading(self, bulk: Bulk) -> None:
        targets = add_runtimes(bulk.emulator, 10)
        bulk.emulator.inject(*[Fault.LATENCY] * 3)

        async def source() -> AsyncIterator[tuple[str, str]]:
            for number, target in enumerate(targets):
                if number == 3:
                    await wait_for_requests(bulk.emulator, 3)
                    batch.stop_reading()
                yield target

        batch = bulk.session.stop_runtimes(source())
        report = await batch

        assert report.counts == {STOPPED: 3, NOT_SENT: 1}

    async def test_a_run_cancelled_as_its_input_raises_is_not_a_success(
        self, session: BctrlSession
    ) -> None:
        async def targets() -> AsyncIterator[tuple[str, str]]:
            if running.cancel():
                raise LookupError
            yield ("ws-1", "crm")

        batch = session.stop_runtimes(targets())
        running = asyncio.create_task(await_batch(batch))
        with pytest.raises(asyncio.CancelledError):
            await running

        assert not batch.report.ok


class TestError:
    async def test_requests_in_flight_may_still_be_answered_but_are_not_retried(self) -> None:
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

    async def test_a_retry_after_beyond_the_patience_ends_the_run(self, bulk: Bulk) -> None:
        bulk.emulator.inject(Reply(429, headers={"Retry-After": "301"}))
        targets = repeat(("ws-1", "crm"), 1000)
        report = await bulk.session.stop_runtimes(targets, concurrency=10)

        assert isinstance(report.ended_early, BctrlRateLimitError)
        assert report.total <= 20

    @pytest.mark.parametrize("closes", [False, True])
    async def test_a_target_that_is_throttled_as_the_run_ends_is_rejected(
        self, emulator: Emulator, *, closes: bool
    ) -> None:
        keys = iter(["emulator-key"] if not closes else repeat("emulator-key"))
        emulator.inject(Fault.RATE_LIMITED)
        async with aiohttp.ClientSession() as http:
            session = BctrlSession(lambda: next(keys), base_url=emulator.url, http=http)
            batch = session.stop_runtimes([("ws-1", "crm")])
            running = await started(batch, emulator, 1)
            if closes:
                await session.close()
            await running

        assert emulator.received.total() == 1
        assert batch.report.counts == {StopResult.REJECTED: 1}

    async def test_a_closed_session_is_an_error_before_any_target_is_read(
        self, connect: Connect
    ) -> None:
        session = connect()
        await session.close()
        batch = session.stop_runtimes([("ws-1", "crm")])
        for run in (await_batch, read_all):
            with pytest.raises(BctrlConfigError, match="closed"):
                await run(batch)
        assert batch.read == 0

    async def test_a_bug_is_raised_once_every_target_is_recorded(
        self, bulk: Bulk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(Sender, "_attempt", fail)
        batch = bulk.stop(50, concurrency=5)
        with pytest.raises(ZeroDivisionError):
            await batch

        # It came before there was a connection.
        assert batch.report.counts == {NOT_SENT: 50}
        assert_conserved(batch, bulk.emulator)
