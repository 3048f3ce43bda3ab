"""A bulk stop that is awaited: its report, its callbacks and its arguments."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest
from helpers import BOUND, Bulk, add_runtimes, await_batch, pass_time, run_of

from bctrl_async import (
    BctrlConfigError,
    BctrlRateLimitError,
    BctrlSession,
    RetryPolicy,
    RuntimeRef,
    StopOutcome,
    StopResult,
)
from bctrl_async.bulk._targets import Targets
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN


async def async_iterable(pairs: list[tuple[str, str]]) -> AsyncIterator[tuple[str, str]]:
    for pair in pairs:
        yield pair


class TestAwaited:
    async def test_every_target_is_stopped_and_counted(self, bulk: Bulk) -> None:
        report = await bulk.stop(300)

        assert report.ok
        assert report.counts == {STOPPED: 300}
        assert (report.total, report.failures, report.retries, report.throttled) == (300, (), 0, 0)
        assert report.elapsed > 0
        statuses = Counter(runtime["status"] for runtime in bulk.emulator.runtimes.values())
        assert statuses == {"stopped": 300, "active": 1}

    async def test_a_target_that_is_there_twice_has_two_outcomes(self, bulk: Bulk) -> None:
        targets = add_runtimes(bulk.emulator, 1) * 2

        report = await bulk.session.stop_runtimes(targets, concurrency=1)

        assert report.ok
        assert report.counts == {STOPPED: 1, StopResult.ALREADY_STOPPED: 1}

    async def test_each_target_has_the_outcome_of_its_own_response(self, bulk: Bulk) -> None:
        bulk.emulator.add_runtime("ws-1", "done", status="stopped")
        bulk.emulator.inject(Fault.ACCEPTED, alias="crm")
        outcomes: list[StopOutcome] = []
        report = await bulk.session.stop_runtimes(
            [("ws-1", "crm"), ("ws-1", "done"), ("ws-1", "none"), ("ws-1", "..")],
            on_outcome=outcomes.append,
            verify=False,
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
        with pytest.raises(ExceptionGroup, match="3 of 4 runtimes may still be running"):
            report.raise_for_failures()

    @pytest.mark.parametrize(
        ("faults", "result", "throttled"),
        [
            ([Fault.RATE_LIMITED, Reply(503), Fault.SERVER_ERROR], STOPPED, 2),
            ([Fault.RATE_LIMITED, Fault.DROP_BEFORE], STOPPED, 1),
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

        assert report.counts == Counter([result, *[STOPPED] * 49])
        assert (report.retries, report.throttled) == (len(faults), throttled)
        assert len(pauses) == len(faults)

    async def test_a_task_cancelled_before_it_starts_reads_nothing(self, bulk: Bulk) -> None:
        batch = bulk.session.stop_runtimes([("ws-1", "crm")])
        task = asyncio.create_task(batch)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert (batch.read, len(bulk.emulator.requests)) == (0, 0)

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
        for task in run_of(batch)._tasks:
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

    async def test_a_batch_runs_only_once(self, bulk: Bulk) -> None:
        batch = bulk.session.stop_runtimes([("ws-1", "crm")])
        assert not batch.report.ok
        assert str(batch.report.ended_early) == "the bulk stop was not run"
        assert batch.report.total == 0
        assert batch.report.elapsed == 0
        await batch

        with pytest.raises(BctrlConfigError, match="has started already"):
            await batch
        with pytest.raises(BctrlConfigError, match="has started already"):
            await batch.__aenter__()
        assert bulk.emulator.received.total() == 1

    async def test_failures_keep_no_traceback(
        self, session: BctrlSession, emulator: Emulator
    ) -> None:
        emulator.inject(Reply(307))
        report = await session.stop_runtimes([("ws-1", "crm"), ("", "")])

        errors = [outcome.error for outcome in report.failures]
        assert [error and error.__traceback__ for error in errors] == [None, None]


class TestArguments:
    @pytest.mark.parametrize(
        ("name", "value"),
        [("concurrency", 0), ("deadline", 0), ("timeout", -1), ("journal_max_age", 0)],
    )
    async def test_an_argument_that_is_out_of_range_is_named(
        self, session: BctrlSession, name: str, value: int
    ) -> None:
        with pytest.raises(BctrlConfigError, match=rf"^invalid {name}[: ]"):
            session.stop_runtimes([("ws-1", "crm")], **{name: value})  # type: ignore[arg-type]

    async def test_timeout_and_retry_apply_to_each_target(self, bulk: Bulk) -> None:
        bulk.emulator.inject(*[Fault.HANG] * 10)
        batch = bulk.session.stop_runtimes(
            [RuntimeRef("ws-1", "crm")],
            timeout=40,
            retry=RetryPolicy(attempts=2, base=0.001),
            verify=False,
        )
        running = asyncio.create_task(await_batch(batch))
        for attempt in (1, 2):
            # Between them a canary is sent, which is answered.
            async with asyncio.timeout(BOUND):
                while len(bulk.emulator.stops) < attempt:
                    await asyncio.sleep(0)
            pass_time(40)
        await running

        [failure] = batch.report.failures
        assert (failure.result, failure.attempts) == (UNKNOWN, 2)

    async def test_the_patience_of_the_policy_applies(self, bulk: Bulk) -> None:
        bulk.emulator.inject(*[Fault.RATE_LIMITED] * 10)
        report = await bulk.session.stop_runtimes([("ws-1", "crm")], retry=RetryPolicy(patience=0))

        [failure] = report.failures
        assert isinstance(failure.error, BctrlRateLimitError)
        assert (failure.result, failure.attempts) == (StopResult.REJECTED, 1)
