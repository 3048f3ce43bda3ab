"""A bulk stop that ends early: one outcome for each target, whatever ends it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
import pytest_asyncio
from support.helpers import (
    BOUND,
    Bulk,
    Connect,
    add_runtimes,
    assert_conserved,
    await_batch,
    new_poller,
    no_threads,
    pass_time,
    read_all,
    run_of,
    started,
    until,
    wait_for_requests,
)
from support.leaks import bulk_tasks

from bctrl_async import (
    BctrlSession,
    RetryPolicy,
    StopBatch,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async._http.fast.answer import Connector
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN
REJECTED = StopResult.REJECTED


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


End = Callable[[StopBatch], None]
Run = Callable[[StopBatch], Coroutine[object, object, None]]
CANCELLED, ABORTED = "the run was cancelled", "the run was aborted"
ASKED = "the run was asked to start no more stops"
PASSED = "the deadline of 9.5s has passed"
CLOSED = "the session is closed"
ENDS: dict[str, tuple[Callable[[Running], object], Run, str]] = {
    # They say what ends it, how it runs, and why it ended early.
    "its task is cancelled": (lambda run: run.task.cancel(), await_batch, CANCELLED),
    "its task is cancelled twice": (Running.cancel_twice, await_batch, CANCELLED),
    "its block is cancelled": (lambda run: run.task.cancel(), read_all, CANCELLED),
    "a worker is cancelled": (
        lambda _: bulk_tasks().pop().cancel(),
        await_batch,
        CANCELLED,
    ),
    "all workers are cancelled": (Running.cancel_workers, await_batch, CANCELLED),
    "it is aborted": (lambda run: run.batch.abort(), await_batch, ABORTED),
    "it is aborted within its block": (
        lambda run: run.batch.abort(),
        read_all,
        ABORTED,
    ),
    "it is aborted after it was asked to end": (
        Running.ask_and_abort,
        await_batch,
        ASKED,
    ),
    "its deadline passes": (lambda _: pass_time(9.5), await_batch, PASSED),
    "its deadline passes within its block": (
        lambda _: pass_time(9.5),
        read_all,
        PASSED,
    ),
    "its session is closed": (lambda run: run.session.close(), await_batch, CLOSED),
}
ERRORS = {ASKED: ABORTED, CLOSED: "the session was closed during the call"}
"""A part of the error of what was in flight, if that is not why the run ended."""


def with_cases(cases: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrize a test with cases of ENDS; it moves the clock to a deadline."""
    others = [case for case in cases if "deadline" not in case]
    moving = [
        pytest.param(case, marks=pytest.mark.moves_clock)
        for case in cases
        if "deadline" in case
    ]
    return pytest.mark.parametrize("case", [*others, *moving])


async def end_as(case: str, run: Running) -> None:
    """End a bulk stop as in a case of ENDS."""
    ending = ENDS[case][0](run)
    if inspect.isawaitable(ending):
        await ending


@with_cases(ENDS)
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
        in_flight = [
            str(outcome.error) for outcome in report.failures if outcome.attempts
        ]
        assert all(ERRORS.get(why, why) in error for error in in_flight)
        assert delivered == ([] if why is CANCELLED else list(report.failures))
        # A callback may wait for something.
        assert cancelling <= {0}
        assert_conserved(batch, emulator)


@pytest.mark.parametrize("run", [await_batch, read_all])
async def test_a_scope_of_anyio_ends_it_as_a_cancelled_task_does(
    bulk: Bulk, run: Run
) -> None:
    """It cancels again at each turn of the loop, until the task has left the scope."""
    bulk.emulator.inject(*[Fault.HANG] * 4)
    batch = bulk.stop(10, concurrency=4)

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(run, batch)
            await wait_for_requests(bulk.emulator, 4)
            scope.cancel()

    assert batch.report.counts == {UNKNOWN: 4, NOT_SENT: 6}
    assert_conserved(batch, bulk.emulator)


async def test_a_scope_of_anyio_takes_no_memory_until_the_callbacks_end(
    bulk: Bulk,
) -> None:
    """Fault: it took 20 MB a second: each turn of the loop asked for the end anew."""
    is_called = asyncio.Event()
    grown: list[int] = []

    async def wait_for_turns(outcome: StopOutcome) -> None:
        del outcome
        is_called.set()
        try:
            await asyncio.Event().wait()
        finally:
            for turns in (100, 5_000):
                before = tracemalloc.get_traced_memory()[0]
                for _ in range(turns):
                    await asyncio.sleep(0)
                grown.append(tracemalloc.get_traced_memory()[0] - before)

    batch = bulk.stop(1, on_outcome=wait_for_turns)
    tracemalloc.start()
    try:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(await_batch, batch)
                await is_called.wait()
                scope.cancel()
    finally:
        tracemalloc.stop()

    assert grown[1] < 100_000


@with_cases(["a worker is cancelled", "it is aborted", "its deadline passes"])
async def test_the_wait_for_a_silent_input_ends_if(
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


@pytest.mark.parametrize("moment", ["before its poll", "during its poll"])
async def test_an_accepted_stop_is_still_running_if_the_run_ends(
    emulator: Emulator, connect: Connect, moment: str
) -> None:
    """Fault: whether its poll was due decided; and its end passed for a failure."""
    emulator.add_runtime("ws-1", "r0", stop_takes=60)
    if moment == "during its poll":
        emulator.inject(Fault.HANG, method="GET")
    async with connect() as session:
        batch = session.stop_runtimes([("ws-1", "r0")])
        running = await started(batch, emulator, 1)
        await until(lambda: batch.progress.polling)
        if moment == "during its poll":
            await wait_for_requests(emulator, 2)
        batch.stop_reading()
        await running

    [outcome] = batch.report.failures
    assert outcome.running
    assert "the runtime was still 'active'" in str(outcome.error)


class TestClosedSession:
    """Fault: a server that had shut down ended its process before the account."""

    @pytest.mark.parametrize("run", [await_batch, read_all])
    async def test_a_cancelled_run_is_over_when_its_session_is_closed(
        self, bulk: Bulk, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        reports: list[StopReport] = []

        async def run_and_report(batch: StopBatch) -> None:
            try:
                await run(batch)
            finally:
                reports.append(batch.report)

        path = tmp_path / "journal"
        bulk.emulator.inject(*[Fault.HANG] * 10)
        batch = bulk.stop(5_000, concurrency=10, journal=path)
        caplog.set_level(logging.INFO, "bctrl_async")
        running = await started(batch, bulk.emulator, 10, run_and_report)
        running.cancel()
        await bulk.session.close()

        [report] = reports
        assert report.counts == {UNKNOWN: 10, NOT_SENT: 4_990}
        assert len(path.read_bytes().splitlines()) == 1 + 5_000
        assert "a bulk stop ended early, with 5000 targets read" in caplog.text
        await asyncio.wait([running])
        assert_conserved(batch, bulk.emulator)

    async def test_a_run_that_waits_for_its_input_is_over_too(self, bulk: Bulk) -> None:
        async def one_target() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "crm"
            await asyncio.Event().wait()

        batch = bulk.session.stop_runtimes(one_target())
        running = await bulk.started(batch, 1)
        await until(lambda: batch.counts)
        async with asyncio.timeout(BOUND):
            await asyncio.gather(bulk.session.close(), bulk.session.close())

        assert CLOSED in str(batch.report.ended_early)
        await running

    async def test_its_reader_can_close_it(self, bulk: Bulk) -> None:
        async with asyncio.timeout(BOUND):
            async with bulk.stop(300) as batch:
                await until(lambda: len(batch.counts) and batch.counts.total() > 100)
                await bulk.session.close()
                outcomes = [outcome async for outcome in batch]

        assert len(outcomes) == 300

    async def test_its_input_can_close_it(self, bulk: Bulk) -> None:
        async def targets() -> AsyncIterator[tuple[str, str]]:
            async with bulk.session:
                yield "ws-1", "crm"

        async with asyncio.timeout(BOUND):
            report = await bulk.session.stop_runtimes(targets(), concurrency=1)

        assert report.counts == {STOPPED: 1}

    async def test_a_run_whose_coroutine_was_closed_is_over_too(
        self, bulk: Bulk
    ) -> None:
        batch = bulk.stop(2_000, concurrency=1)
        bulk.emulator.inject(Fault.HANG)
        batch.send(None)
        await wait_for_requests(bulk.emulator, 1)
        batch.close()
        await bulk.session.close()

        assert batch.report.counts == {UNKNOWN: 1, NOT_SENT: 1_999}


@pytest.mark.parametrize("run", [await_batch, read_all])
async def test_a_run_whose_journal_gets_no_thread_is_not_ok(
    bulk: Bulk, tmp_path: Path, run: Run
) -> None:
    """Fault: nothing was sent, and the report of no targets was ok."""
    batch = bulk.stop(5, journal=tmp_path / "journal")

    with no_threads(), pytest.raises(Exception, match="can't start new thread"):
        await run(batch)

    assert bulk.emulator.requests == []
    assert not batch.report.ok
    with pytest.raises(ExceptionGroup, match="the run ended early"):
        batch.report.raise_for_failures()


AFTER_MAIN = """
import asyncio, sys, threading
from bctrl_async import BctrlSession, RetryPolicy

URL, ONCE = "http://localhost:9", RetryPolicy(attempts=1)

async def main():
    async with BctrlSession("key", base_url=URL, retry=ONCE) as session:
        for journal in (sys.argv[1], None):
            batch = session.stop_runtimes([("ws-1", "crm")], journal=journal)
            try:
                await batch
            except Exception:
                pass
            print(batch.report.ok, dict(batch.report.counts))

def run():
    threading.main_thread().join()
    asyncio.run(main())

threading.Thread(target=run).start()
"""
"""A program whose runs start after its main thread has ended: no other thread can."""


def test_after_the_main_thread_has_ended_no_run_is_ok(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AFTER_MAIN, tmp_path / "journal"],
        capture_output=True,
        check=True,
        text=True,
        timeout=BOUND,
    )
    assert done.stdout.splitlines() == ["False {}", "False {'not_sent': 1}"]


@pytest.mark.parametrize("run", [await_batch, read_all])
async def test_a_run_that_raises_is_not_ok_even_if_all_were_stopped(
    bulk: Bulk, run: Run
) -> None:
    def fail(outcome: StopOutcome) -> None:
        if outcome.index == 2:
            raise ValueError("mine")

    batch = bulk.stop(3, on_outcome=fail, concurrency=1)
    with pytest.raises(ValueError, match="mine"):
        await run(batch)

    assert batch.report.counts == {STOPPED: 3}
    assert "the run failed: ValueError" in str(batch.report.ended_early)


class TestBlock:
    async def test_leaving_it_early_aborts_the_requests_in_flight(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(Fault.HANG, alias="r1")
        async with bulk.stop(50, concurrency=2) as batch:
            async for outcome in batch:
                if outcome.index == 10:
                    break

        assert_conserved(batch, bulk.emulator)
        assert batch.report.total == 50
        assert batch.report.counts[NOT_SENT] > 30
        [aborted] = [outcome for outcome in batch.report.failures if outcome.index == 1]
        assert aborted.result is UNKNOWN
        assert str(aborted.error) == (
            "stop of 'r1' in workspace 'ws-1': aborted before an answer because the "
            "run was cancelled (the runtime may have stopped). Stop it again: a stop "
            "is safe to repeat"
        )

    async def test_leaving_it_at_once_is_not_a_success(self, bulk: Bulk) -> None:
        async with bulk.stop(5) as batch:
            pass

        assert not batch.report.ok
        assert str(batch.report.ended_early) == CANCELLED
        assert [outcome async for outcome in batch] == []
        assert bulk.emulator.requests == []

    @pytest.mark.parametrize(
        "end", [lambda _: None, StopBatch.stop_reading, StopBatch.abort]
    )
    async def test_an_end_after_the_last_outcome_is_not_early(
        self, bulk: Bulk, end: End
    ) -> None:
        async with bulk.stop(3) as batch:
            for _ in range(3):
                await anext(batch)
            end(batch)
        assert batch.report.ok


class TestCoroutine:
    def test_it_can_be_closed_where_there_is_no_event_loop(self) -> None:
        batch = BctrlSession("key").stop_runtimes([("ws-1", "crm")])
        batch.stop_reading()
        batch.abort()
        batch.close()

        assert batch.report.total == 0

    async def test_if_closed_it_leaves_its_journal_to_its_tasks(
        self, bulk: Bulk, tmp_path: Path
    ) -> None:
        targets = add_runtimes(bulk.emulator, 10)
        bulk.emulator.inject(*[Fault.HANG] * 5)
        journal = tmp_path / "closed.jsonl"
        batch = bulk.session.stop_runtimes(targets, journal=journal, concurrency=5)
        await self.start(batch)
        await wait_for_requests(bulk.emulator, 5)

        batch.close()
        await asyncio.wait(run_of(batch)._tasks, timeout=BOUND)
        await asyncio.sleep(0)

        assert batch.report.counts == {UNKNOWN: 5, NOT_SENT: 5}
        assert (await bulk.session.stop_runtimes(targets, journal=journal)).ok

    @pytest.mark.usefixtures("lazy_only")
    async def test_if_closed_its_journal_has_what_a_cancelled_poller_leaves(
        self, bulk: Bulk, tmp_path: Path
    ) -> None:
        bulk.emulator.inject(Fault.ACCEPTED)
        journal = tmp_path / "closed.jsonl"

        targets = add_runtimes(bulk.emulator, 1)
        batch = bulk.session.stop_runtimes(targets, journal=journal, concurrency=1)
        await self.start(batch)
        poller = await new_poller(batch)
        batch.close()
        poller.cancel()
        await until(lambda: not run_of(batch)._tasks)

        assert '"accepted"' in journal.read_text("utf-8")

    async def start(self, batch: StopBatch) -> None:
        """Start a run by its coroutine, up to its first wait for tasks."""
        opened = batch.send(None)
        assert isinstance(opened, asyncio.Future)
        await asyncio.wait([opened])
        batch.send(None)


class TestStopReading:
    @pytest.mark.parametrize("make", [list, iter])
    async def test_a_target_that_waits_for_the_limiter_is_not_sent(
        self,
        emulator: Emulator,
        connect: Connect,
        make: Callable[[list[tuple[str, str]]], Iterable[tuple[str, str]]],
    ) -> None:
        async with connect(rate=20) as session:
            targets = make(add_runtimes(emulator, 100))
            batch = session.stop_runtimes(
                targets, on_outcome=lambda _: batch.stop_reading(), concurrency=50
            )
            report = await batch

        requests = len(emulator.requests)
        assert requests < 50
        assert report.counts == {STOPPED: requests, NOT_SENT: report.total - requests}
        assert (report.total == 100) is (make is list)
        assert ASKED in str(report.ended_early)

    @pytest.mark.parametrize("fault", [Fault.DROP_AFTER, Fault.SERVER_ERROR])
    async def test_a_stop_that_may_have_worked_is_retried(
        self, bulk: Bulk, fault: Fault
    ) -> None:
        bulk.emulator.inject(fault)
        batch = bulk.stop(3, concurrency=1, retry=RetryPolicy(base=0.05))
        running = await bulk.started(batch, 1)
        batch.stop_reading()
        await running

        assert batch.report.counts[NOT_SENT] == 2
        assert batch.report.counts[UNKNOWN] == 0
        assert bulk.emulator.received["ws-1", "r0"] == 2

    @pytest.mark.parametrize(
        ("reply", "is_final"), [(Reply(429), False), (Reply(307), True)]
    )
    async def test_what_is_then_rejected_is_not_sent_again(
        self, bulk: Bulk, reply: Reply, *, is_final: bool
    ) -> None:
        bulk.emulator.inject(reply)
        batch = bulk.stop(1, retry=RetryPolicy(base=0.01))
        running = await bulk.started(batch, 1)
        batch.stop_reading()
        await running

        assert batch.report.counts == {REJECTED: 1}
        assert len(bulk.emulator.requests) == 1
        # A final answer to the last target is no early end.
        assert (batch.report.ended_early is None) is is_final

    async def test_a_call_of_the_key_function_is_abandoned(
        self, emulator: Emulator
    ) -> None:
        asked = asyncio.Event()

        async def key() -> str:
            asked.set()
            await asyncio.Event().wait()
            return "emulator-key"

        async with BctrlSession(key, base_url=emulator.url) as session:
            batch = session.stop_runtimes([("ws-1", "crm")])
            running = asyncio.create_task(await_batch(batch))
            await asked.wait()
            batch.stop_reading()
            await running

        assert batch.report.counts == {NOT_SENT: 1}


@pytest.mark.parametrize(
    ("before", "result"),
    [([], REJECTED), ([Fault.BAD_GATEWAY], UNKNOWN)],
    ids=["", "in doubt"],
)
@with_cases(["it is aborted", "its deadline passes", "its session is closed"])
async def test_a_throttled_target_is_rejected_unless_it_may_have_stopped_before_if(
    emulator: Emulator,
    connect: Connect,
    case: str,
    before: list[Fault],
    result: StopResult,
) -> None:
    emulator.inject(*before, *[Reply(429, headers={"Retry-After": "5"})] * 2)
    async with connect() as session:
        batch = session.stop_runtimes([("ws-1", "crm")], deadline=9.5)
        running = asyncio.create_task(await_batch(batch))
        await until(
            lambda: batch.progress.retrying["429"] and not batch.progress.in_flight
        )
        await end_as(case, Running(batch, running, session))
        await running

    [failure] = batch.report.failures
    assert failure.result is result
    assert ENDS[case][2] in str(failure.error)


async def test_the_error_of_an_aborted_stop_is_one_sentence(
    emulator: Emulator, connect: Connect
) -> None:
    """Fault: the abort, its reason and the failure before it had a colon of their own.

    The colon after the subject was then the first of four.
    """
    emulator.inject(Reply(429, headers={"Retry-After": "5"}))
    async with connect() as session:
        batch = session.stop_runtimes([("ws-1", "crm")])
        running = asyncio.create_task(await_batch(batch))
        await until(
            lambda: batch.progress.retrying["429"] and not batch.progress.in_flight
        )
        batch.abort()
        await running

    [failure] = batch.report.failures
    assert str(failure.error) == (
        "stop of 'crm' in workspace 'ws-1': aborted before its next attempt because "
        "the run was aborted; before that, the server answered 429 rate.limited, Too "
        "Many Requests. Stop it again: a stop is safe to repeat"
    )


class TestConnecting:
    """An attempt that has no connection yet as the run is ended."""

    @pytest_asyncio.fixture
    async def found(self, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
        """Hold every DNS lookup of aiohttp until the event is set."""
        found = asyncio.Event()
        # The extra speedups replaces the resolver.
        resolver = aiohttp.DefaultResolver
        resolve = resolver.resolve

        async def slow_resolve(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - passed on.
            await found.wait()
            return await resolve(*args, **kwargs)

        monkeypatch.setattr(resolver, "resolve", slow_resolve)
        return found

    @pytest.mark.parametrize("end", [StopBatch.stop_reading, StopBatch.abort])
    @pytest.mark.parametrize("is_borrowed", [False, True])
    async def test_it_is_not_sent_unless_the_pool_is_borrowed(
        self, emulator: Emulator, found: asyncio.Event, end: End, *, is_borrowed: bool
    ) -> None:
        # It cannot be known what a borrowed pool has sent.
        in_doubt = STOPPED if end is StopBatch.stop_reading else UNKNOWN
        result = in_doubt if is_borrowed else NOT_SENT
        url = emulator.url.replace("127.0.0.1", "localhost")
        async with aiohttp.ClientSession() as http:
            borrowed = http if is_borrowed else None
            async with BctrlSession(
                "emulator-key", base_url=url, http=borrowed
            ) as session:
                batch = session.stop_runtimes(add_runtimes(emulator, 5))
                running = asyncio.create_task(await_batch(batch))
                await until(lambda: batch.progress.in_flight == 5)
                end(batch)
                if result is STOPPED:
                    found.set()
                await running
                found.set()

        assert batch.report.counts == {result: 5}
        if result is NOT_SENT:
            assert "before it had a connection" in str(batch.report.failures[0].error)
            assert emulator.requests == []


async def test_a_connector_serves_requests_that_belong_to_no_call(
    emulator: Emulator,
) -> None:
    async with (
        aiohttp.ClientSession(connector=Connector()) as http,
        http.get(emulator.url) as got,
    ):
        assert got.status == 404
