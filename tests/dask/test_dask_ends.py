"""The ways in which a bulk stop on a cluster ends, and what dies meanwhile."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
from dask_cluster import (
    SmallCluster,
    collect_lost_connections,
    connect,
    let_first_worker,
    local_cluster,
    make_unfit_session,
    scheduler_process,
    small_cluster,
)
from distributed import Client, Future, Queue, Variable, Worker
from helpers import BOUND, add_runtimes, free_port, pass_time, wait_for_requests
from journal_lines import read_lines

import bctrl_async.dask
from bctrl_async import (
    BctrlError,
    BctrlSession,
    RetryPolicy,
    RuntimeRef,
    RuntimeState,
    StopBatch,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async._calls.call import Call
from bctrl_async._http import transport
from bctrl_async.bulk._cancel import CancelLevel
from bctrl_async.dask import Chunk, ClusterRun, stop_runtimes
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.errors import BctrlAuthenticationError, BctrlNetworkError, BctrlPermissionError
from bctrl_async.models import Runtime
from bctrl_async.outcomes import outcome_of

pytestmark = pytest.mark.usefixtures("emulator_environment")

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN
REJECTED = StopResult.REJECTED
Targets = list[tuple[str, str]]


def hanging(emulator: Emulator, count: int, every: int = 1) -> Targets:
    """Add runtimes whose stops, or each so many-th of them, take effect and are never answered."""
    targets = add_runtimes(emulator, count)
    for target in targets[::every]:
        emulator.poison(*target, Fault.HANG)
    return targets


def slow(emulator: Emulator, count: int) -> Targets:
    """Add runtimes whose stops are answered so late that a test can do something meanwhile."""
    targets = add_runtimes(emulator, count)
    for target in targets:
        emulator.inject(*[Fault.LATENCY] * 10, workspace_id=target[0], alias=target[1])
    return targets


async def ended(batch: asyncio.Future[StopReport]) -> StopReport:
    return await asyncio.wait_for(batch, BOUND)


async def asked_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait until the coordinator asks for messages, and never answer it."""
    asked = asyncio.Event()

    async def get(*_: object, **__: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Queue, "get", get)
    await asked.wait()


def start(batch: StopBatch) -> asyncio.Task[StopReport]:
    return asyncio.create_task(batch)


def assert_true(report: StopReport, emulator: Emulator) -> None:
    """Check that what is not sent was never received."""
    for outcome in report.failures:
        if outcome.result is NOT_SENT:
            assert emulator.received[outcome.target] == 0


async def assert_all_stopped(running: asyncio.Task[StopReport], emulator: Emulator) -> None:
    """Check that a run that has lost a worker has lost none of its outcomes."""
    report = await ended(running)
    assert report.ok, report
    assert set(report.counts) <= {STOPPED, StopResult.ALREADY_STOPPED}
    assert report.counts.total() == len(emulator.runtimes) - 1  # "crm"


class TestEnding:
    async def test_the_first_401_ends_the_run_and_names_the_worker(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the account did not say on which of the workers the key is wrong."""
        monkeypatch.setenv("BCTRL_API_KEY", "a-revoked-key")
        targets = add_runtimes(emulator, 3_000)

        report = await stop_runtimes(cluster.client, targets, chunk_size=50, concurrency=5)

        assert isinstance(report.ended_early, BctrlAuthenticationError)
        assert report.ended_early.status == 401
        assert any(
            f"the worker {worker.address}: the server answered 401" in str(report.ended_early)
            for worker in cluster.workers
        )
        assert report.counts.total() == 3_000
        assert report.counts[NOT_SENT] > 1_000
        assert_true(report, emulator)

    async def test_the_deadline_ends_it_with_true_outcomes(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = hanging(emulator, 400, every=2)

        running = start(
            stop_runtimes(cluster.client, targets, chunk_size=20, concurrency=5, deadline=10.0)
        )
        await wait_for_requests(emulator, 1)
        pass_time(10.0)
        report = await ended(running)

        assert "deadline" in str(report.ended_early)
        assert report.counts.total() == 400
        assert report.counts[UNKNOWN] > 0
        assert_true(report, emulator)

    @pytest.mark.parametrize(
        ("earlier", "failure"), [(False, None), (True, None), (False, OSError("killed"))]
    )
    async def test_a_chunk_that_ended_was_sent_even_if_its_messages_are_lost(
        self,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        failure: Exception | None,
        *,
        earlier: bool,
    ) -> None:
        """Fault: if the scheduler was lost just then, its targets were `not_sent`.

        They were `rejected` if an earlier worker had been refused, and had died.
        """
        result_of = ClusterRun._result_of

        async def lose_the_messages(*_: object) -> None: ...

        async def lose_the_scheduler(run: ClusterRun, chunk: Chunk) -> Exception | None:
            ended = await result_of(run, chunk)
            if earlier:
                refused = BctrlPermissionError("403", status=403)
                told = {i: outcome_of(each, refused, index=i) for i, each in chunk.targets.items()}
                chunk.begins, chunk.open = 1, {**told}
            run._lose("it was killed")
            return failure or ended

        monkeypatch.setattr(ClusterRun, "_fetch", lose_the_messages)
        monkeypatch.setattr(ClusterRun, "_result_of", lose_the_scheduler)
        targets = add_runtimes(emulator, 5)
        async with small_cluster(1) as cluster:
            report = await ended(start(stop_runtimes(cluster.client, targets, chunk_size=5)))

        assert report.counts == {UNKNOWN: 5}
        assert_true(report, emulator)

    async def test_a_deadline_works_without_workers(self, emulator: Emulator) -> None:
        async with small_cluster(0) as cluster:
            targets = add_runtimes(emulator, 30)
            report = await stop_runtimes(cluster.client, targets, deadline=0.2, chunk_size=5)
            await cluster.assert_clean()

        assert report.counts == {NOT_SENT: 30}
        assert "deadline" in str(report.ended_early)

    async def test_it_waits_for_workers_and_uses_those_that_come(self, emulator: Emulator) -> None:
        targets = add_runtimes(emulator, 100)

        async with small_cluster(0) as cluster:
            running = start(stop_runtimes(cluster.client, targets, chunk_size=5))
            await asyncio.sleep(0.1)
            assert not running.done()
            await cluster.add_worker()
            await cluster.add_worker()
            await assert_all_stopped(running, emulator)

    async def test_stop_reading_finishes_what_is_in_flight(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 1_000)

        async with stop_runtimes(cluster.client, iter(targets), chunk_size=10) as batch:
            async for _ in batch:
                batch.stop_reading()

        report = batch.report
        assert report.counts.total() == batch.read < 1_000
        assert set(report.counts) <= {STOPPED, NOT_SENT}
        assert report.counts[STOPPED] == len(emulator.requests)
        assert "start no more stops" in str(report.ended_early)

    async def test_a_cancelled_run_says_so_in_its_journal(
        self, cluster: SmallCluster, emulator: Emulator, tmp_path: Path
    ) -> None:
        targets = hanging(emulator, 300)
        journal = tmp_path / "night.jsonl"
        running = start(
            stop_runtimes(cluster.client, targets, journal=journal, chunk_size=10, concurrency=2)
        )
        await wait_for_requests(emulator, 4)

        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ended(running)

        entries = read_lines(journal.read_bytes()).entries
        results = Counter(entry["result"] for entry in entries)
        assert results == {
            "unknown": len(emulator.requests),
            "not_sent": 300 - len(emulator.requests),
        }

    async def test_a_run_can_be_cancelled_before_it_knows_its_workers(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        batch = stop_runtimes(cluster.client, add_runtimes(emulator, 10))
        running = start(batch)
        await asyncio.sleep(0)
        running.cancel()

        with pytest.raises(asyncio.CancelledError):
            await running

        assert batch.report.counts == {NOT_SENT: 10}

    async def test_what_was_read_and_not_handed_out_has_an_outcome(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        [target] = add_runtimes(emulator, 1)

        async def source() -> AsyncIterator[tuple[str, str]]:
            yield target
            for task in batch._run._tasks:
                task.cancel()
            await asyncio.Event().wait()

        batch = stop_runtimes(cluster.client, source())
        with suppress(asyncio.CancelledError):
            await ended(start(batch))

        assert batch.report.counts == {NOT_SENT: 1}
        assert emulator.requests == []

    async def test_what_is_aborted_before_its_start_sends_nothing(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        batch = stop_runtimes(cluster.client, add_runtimes(emulator, 5))
        batch.abort()

        assert (await batch).counts == {NOT_SENT: 5}
        assert emulator.requests == []

    async def test_a_run_whose_tasks_are_cancelled_from_outside_accounts_for_all(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        batch = stop_runtimes(cluster.client, hanging(emulator, 50), chunk_size=5)
        running = start(batch)
        await wait_for_requests(emulator, 1)
        for task in batch._run._tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await ended(running)

        assert batch.report.counts.total() == batch.read == 50
        assert "cancelled" in str(batch.report.ended_early)
        assert_true(batch.report, emulator)

    async def test_a_run_that_is_cancelled_from_outside_while_it_asks_leaves_nothing_behind(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the plugin, and with it the session of each worker, stayed on the cluster."""
        batch = stop_runtimes(cluster.client, hanging(emulator, 5))
        running = start(batch)
        await wait_for_requests(emulator, 1)
        await asked_in_vain(monkeypatch)
        monkeypatch.undo()
        for task in batch._run._tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await ended(running)

        assert batch.report.counts == {UNKNOWN: 5}
        await cluster.assert_clean()

    async def test_a_run_whose_coroutine_is_closed_leaves_nothing_behind(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = hanging(emulator, 50)
        batch = stop_runtimes(cluster.client, targets, chunk_size=5)
        batch.send(None)
        await wait_for_requests(emulator, 1)

        batch.close()
        await asyncio.wait(batch._run._tasks)

        assert batch.report.counts.total() == 50

    def test_a_run_whose_loop_has_ended_can_be_closed(self, emulator: Emulator) -> None:
        async def begin() -> StopBatch:
            async with small_cluster(1) as cluster:
                batch = stop_runtimes(cluster.client, [("ws-1", "crm")] * 5)
                batch.send(None)
            return batch

        batch = asyncio.run(begin())
        batch.close()

        assert emulator.requests == []
        assert not batch.report.ok

    async def test_leaving_the_block_early_cancels_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 500)

        async with stop_runtimes(cluster.client, targets, chunk_size=10) as batch:
            await anext(batch)
            # More than the buffer of the outcomes holds.
            await wait_for_requests(emulator, 200)
            assert batch.in_flight > 0

        assert batch.report.counts.total() == 500
        assert batch.report.ended_early is not None

    async def test_a_slow_reader_does_not_hold_up_the_end(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        """Fault: workers that are not told of the end go on while outcomes are delivered."""
        targets = add_runtimes(emulator, 3)
        emulator.poison(*targets[2], Fault.HANG)
        told = asyncio.Event()

        async def read_slowly(outcome: StopOutcome) -> None:
            if outcome.result is STOPPED:
                await wait_for_requests(emulator, 3)
                batch.abort()
                await asyncio.wait_for(told.wait(), BOUND)
            else:
                told.set()

        batch = stop_runtimes(cluster.client, targets, chunk_size=1, on_outcome=read_slowly)
        report = await ended(start(batch))

        assert report.counts == {STOPPED: 2, UNKNOWN: 1}


class TestWorkers:
    @pytest.mark.parametrize(
        "leave",
        [SmallCluster.lose, SmallCluster.close_worker, SmallCluster.retire],
        ids=["dies", "closes", "is scaled away"],
    )
    async def test_the_chunks_of_a_worker_that_leaves_are_repeated(
        self, emulator: Emulator, leave: Callable[[SmallCluster, Worker], Awaitable[None]]
    ) -> None:
        """Fault: the run took the end of one worker's chunks for the end of all."""
        targets = slow(emulator, 60)
        async with small_cluster() as cluster:
            running = start(stop_runtimes(cluster.client, targets, chunk_size=15, concurrency=3))
            await wait_for_requests(emulator, 6)
            await leave(cluster, cluster.workers[0])
            await assert_all_stopped(running, emulator)

    async def test_a_worker_that_closes_leaves_the_rest_of_its_chunk_to_another(
        self, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 20)
        emulator.inject(Fault.HANG, workspace_id="ws-1", alias="r0")
        outcomes: list[StopOutcome] = []

        async with small_cluster(1) as cluster:
            running = start(
                stop_runtimes(cluster.client, iter(targets), on_outcome=outcomes.append)
            )
            async with asyncio.timeout(BOUND):
                while len(outcomes) < 19:
                    await asyncio.sleep(0.01)
            await cluster.add_worker()
            await cluster.workers[0].close()
            report = await ended(running)

        # r0 was stopped by the request that was not answered.
        assert report.counts == {STOPPED: 19, StopResult.ALREADY_STOPPED: 1}

    async def test_a_chunk_that_kills_its_workers_is_unknown_and_the_rest_goes_on(
        self, emulator: Emulator
    ) -> None:
        """Fault: targets that were perhaps stopped are reported as not sent."""
        targets = add_runtimes(emulator, 30)
        for target in targets[:10]:
            emulator.inject(Fault.HANG, workspace_id=target[0], alias=target[1])

        async with small_cluster(1, allowed_failures=0) as cluster:
            running = start(
                # An iterator: a short list would be cut into shorter chunks.
                stop_runtimes(cluster.client, iter(targets), chunk_size=10, concurrency=10)
            )
            await wait_for_requests(emulator, 10)
            await cluster.lose(cluster.workers[0])
            await cluster.add_worker()
            report = await ended(running)

        assert report.counts == {UNKNOWN: 10, STOPPED: 20}
        error = report.failures[0].error
        assert error is not None
        assert error.may_have_stopped
        # The worker may have said that it is closed.
        assert str(error).startswith("stop of 'r0' in workspace 'ws-1': ")
        assert str(error).endswith("Stop it again: a stop is safe to repeat")
        assert report.ended_early is None

    async def test_a_chunk_that_no_worker_survives_to_begin_ends_the_run(
        self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the run ended when workers died of another chunk than the one that waited."""
        async with small_cluster(0, allowed_failures=0) as cluster:
            lost: list[str] = []

            async def die(visit: bctrl_async.dask.Visit) -> None:
                lost.append(visit._worker.address)
                await cluster.scheduler.remove_worker(lost[-1], stimulus_id="test")
                raise OSError

            monkeypatch.setattr(bctrl_async.dask.Visit, "_open", die)
            targets = iter(add_runtimes(emulator, 5))
            running = start(stop_runtimes(cluster.client, targets))
            for _ in range(3):
                await cluster.add_worker()
            report = await ended(running)

        assert len(lost) == 3
        assert report.counts == {NOT_SENT: 5}
        assert "KilledWorker" in str(report.ended_early)

    async def test_a_worker_killed_with_sigkill_costs_no_outcome(
        self, emulator: Emulator, tmp_path: Path
    ) -> None:
        targets = slow(emulator, 300)
        journal = tmp_path / "night.jsonl"

        async with local_cluster(2) as cluster, connect(cluster) as client:
            running = start(
                stop_runtimes(client, targets, chunk_size=50, concurrency=20, journal=journal)
            )
            await wait_for_requests(emulator, 50)
            pids = await client.run(os.getpid)
            os.kill(next(iter(pids.values())), signal.SIGKILL)
            await assert_all_stopped(running, emulator)
        collect_lost_connections()

        entries = read_lines(journal.read_bytes()).entries
        assert len(entries) == len({entry["index"] for entry in entries}) == 300

    @pytest.mark.parametrize("is_repeated", [True, False])
    async def test_a_run_that_has_ended_neither_repeats_a_chunk_nor_waits_for_new_workers(
        self, emulator: Emulator, *, is_repeated: bool
    ) -> None:
        """Fault: a worker that begins a chunk after Ctrl-C does not know of it."""
        targets = hanging(emulator, 20)
        async with small_cluster(1) as cluster:
            batch = stop_runtimes(cluster.client, iter(targets), chunk_size=20, concurrency=2)
            running = start(batch)
            await wait_for_requests(emulator, 2)
            batch.stop_reading()
            if is_repeated:
                await until_told(batch)
                await cluster.add_worker()
            await cluster.lose(cluster.workers[0])
            report = await ended(running)

        assert len(emulator.requests) == 2
        assert report.counts.total() == 20
        assert report.counts[UNKNOWN] >= 2
        assert_true(report, emulator)

    async def test_workers_that_do_not_answer_are_waited_for_only_so_long(
        self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: Ctrl-C hangs for as long as a worker does."""
        monkeypatch.setattr(bctrl_async.dask, "_GRACE", 0.3)

        async def ignore(_: object) -> None: ...

        targets = hanging(emulator, 20)
        async with small_cluster(1) as cluster:
            batch = stop_runtimes(cluster.client, iter(targets), chunk_size=20, concurrency=2)
            running = start(batch)
            await wait_for_requests(emulator, 2)
            monkeypatch.setattr(bctrl_async.dask.Visit, "_obey", ignore)
            batch.abort()
            report = await ended(running)

        assert report.counts == {UNKNOWN: 20}

    async def test_a_worker_that_hangs_at_the_start_does_not_end_the_run(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: one of many workers ended the run after a minute, and nothing was stopped."""
        register: Callable[..., Awaitable[object]] = Client.register_plugin

        async def wait_in_vain(*args: object) -> None:
            await register(*args)
            raise TimeoutError

        monkeypatch.setattr(Client, "register_plugin", wait_in_vain)
        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 20))

        assert report.counts == {STOPPED: 20}

    async def test_a_task_that_is_cancelled_on_the_cluster_is_unknown(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = hanging(emulator, 5)
        running = start(stop_runtimes(cluster.client, iter(targets), verify=False))
        await wait_for_requests(emulator, 5)
        client: Any = cluster.client
        await client.cancel([Future(key, client) for key in client.futures])
        report = await ended(running)

        assert report.counts == {UNKNOWN: 5}
        assert report.ended_early is None


def told(index: int, result: StopResult) -> StopOutcome:
    """Return the outcome of a target by the word of a worker."""
    target, state = RuntimeRef("ws-1", f"r{index}"), RuntimeState.UNCONFIRMED
    return StopOutcome(index=index, target=target, result=result, state=state)


class TestChunk:
    """What is known of a chunk by the messages of its workers, some of whom have died."""

    @pytest.mark.parametrize(
        ("begins", "message", "result"),
        [
            (0, None, NOT_SENT),
            (1, None, UNKNOWN),
            (1, NOT_SENT, NOT_SENT),
            (1, REJECTED, REJECTED),
            # Fault: a worker that died may have sent what the next one has not, or may not.
            (2, NOT_SENT, UNKNOWN),
            (2, REJECTED, UNKNOWN),
        ],
    )
    def test_a_target_that_no_worker_has_stopped_has_an_outcome_that_is_proven(
        self, begins: int, message: StopResult | None, result: StopResult
    ) -> None:
        chunk = Chunk([(7, RuntimeRef("ws-1", "r7"))])
        chunk.begins = begins
        if message is not None:
            assert list(chunk.add(told(7, message))) == []
        [outcome] = chunk.end(BctrlError("its workers died"))
        assert (outcome.index, outcome.result) == (7, result)

    @pytest.mark.parametrize(
        ("begins", "is_told", "result"),
        [(0, False, UNKNOWN), (0, True, NOT_SENT), (1, True, UNKNOWN)],
        ids=["by a first worker", "by one that finds the end", "by a second one"],
    )
    async def test_a_chunk_that_is_begun_may_have_been_sent_unless_its_worker_finds_the_end(
        self, begins: int, *, is_told: bool, result: StopResult
    ) -> None:
        batch = stop_runtimes(Mock(spec=Client), [])
        batch.close()
        run = cast("ClusterRun", batch._run)
        run._told = CancelLevel.WAITING if is_told else None
        chunk = Chunk([(7, RuntimeRef("ws-1", "r7"))])
        chunk.begins = begins
        run._add(chunk, None)
        [outcome] = chunk.end(BctrlError("its worker died"))
        assert outcome.result is result

    @pytest.mark.parametrize("messages", [[NOT_SENT], [NOT_SENT, REJECTED]])
    def test_a_worker_that_has_left_is_forgotten_only_if_it_has_told_all(
        self, messages: list[StopResult]
    ) -> None:
        chunk = Chunk([(index, RuntimeRef("ws-1", f"r{index}")) for index in range(2)])
        chunk.begins = 1
        for index, message in enumerate(messages):
            assert list(chunk.add(told(index, message))) == []
        rejected = [outcome.index for outcome in chunk.restart()]
        assert (chunk.begins, rejected) == ((1, []) if len(messages) == 1 else (0, [1]))

    async def test_a_task_that_is_cancelled_before_its_worker_begins_it_is_unknown(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The worker has the task, and may send its targets later."""
        monkeypatch.setattr(bctrl_async.dask, "_GRACE", 0.3)
        has_task, may_go_on = asyncio.Event(), asyncio.Event()

        async def open_late(_: object) -> None:
            has_task.set()
            await may_go_on.wait()
            raise LookupError

        monkeypatch.setattr(bctrl_async.dask.Visit, "_open", open_late)
        running = start(stop_runtimes(cluster.client, iter(add_runtimes(emulator, 5))))
        async with asyncio.timeout(BOUND):
            await has_task.wait()
        client: Any = cluster.client
        await client.cancel([Future(key, client) for key in client.futures])
        report = await ended(running)
        may_go_on.set()

        assert report.counts == {UNKNOWN: 5}


def fail() -> BctrlSession:
    # Its lock cannot be pickled.
    error = LookupError("no vault")
    error.__cause__ = LookupError(threading.Lock())
    raise error


def without_network() -> BctrlSession:
    return BctrlSession(proxy="http://127.0.0.1:1", allow_plaintext=True)


def without_key() -> BctrlSession:
    def ask() -> str:
        raise LookupError

    return BctrlSession(api_key=ask)


def intercept(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[object, Call[Runtime]], object]
) -> None:
    """Let `answer` say what the attempts of a session's client get; None asks the server."""
    send_once: Callable[..., Awaitable[object]] = transport.send_once

    async def send(
        http: object, path: object, call: Call[Runtime], *args: object, **kwargs: object
    ) -> object:
        return answer(http, call) or await send_once(http, path, call, *args, **kwargs)

    monkeypatch.setattr(transport, "send_once", send)


def refuse(monkeypatch: pytest.MonkeyPatch, aliases: set[str]) -> None:
    """Refuse the connections for stops of these aliases."""

    def answer(_: object, call: Call[Runtime]) -> object:
        is_refused = call.operation.stops and call.alias in aliases
        return BctrlNetworkError("no connection: refused") if is_refused else None

    intercept(monkeypatch, answer)


def cut_first_session(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Let the session that sends first lose its network after some attempts, as it sends r2."""
    attempts: list[object] = []

    def answer(http: object, call: Call[Runtime]) -> object:
        attempts.append(http)
        is_cut = http is attempts[0] and attempts.count(http) > after
        error = BctrlNetworkError("the network is down", may_have_stopped=call.alias == "r2")
        return error if is_cut else None

    intercept(monkeypatch, answer)


class TestUnfitWorkers:
    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (fail, "no vault"),
            (without_key, "the api_key function raised LookupError"),
            (without_network, "the server does not answer"),
        ],
    )
    async def test_a_worker_that_cannot_stop_leaves_its_chunks_to_the_others(
        self,
        cluster: SmallCluster,
        emulator: Emulator,
        caplog: pytest.LogCaptureFixture,
        make: Callable[[], BctrlSession],
        reason: str,
    ) -> None:
        """Fault: one worker without a key, or a network, ended the run for all."""
        let_first_worker(make)
        targets = add_runtimes(emulator, 400)

        report = await stop_runtimes(
            cluster.client,
            iter(targets),
            session=make_unfit_session,
            chunk_size=5,
            retry=RetryPolicy(base=0.001, cap=0.001),
        )

        assert report.ok
        assert report.counts == {STOPPED: 400}
        [said] = [each for each in caplog.records if each.name == "bctrl_async.dask"]
        assert getattr(said, "bctrl.event") == "worker_left"
        assert re.search(rf"the worker tcp://\S+: .*{reason}", said.getMessage())

    async def test_a_worker_that_the_server_answers_stays_though_a_connection_is_refused(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: one refused connection took a worker out, and two of them ended the run."""
        refuse(monkeypatch, {f"r{number}" for number in range(10, 100, 20)})
        targets = add_runtimes(emulator, 100)

        report = await stop_runtimes(
            cluster.client, iter(targets), chunk_size=20, retry=RetryPolicy(attempts=1)
        )

        assert report.counts == {STOPPED: 95, NOT_SENT: 5}
        assert report.ended_early is None
        assert_true(report, emulator)

    @pytest.mark.parametrize(
        ("answers", "results"),
        [
            ([], {"r0": STOPPED, "r1": REJECTED, "r2": STOPPED, "r3": STOPPED}),
            ([Reply(403)], {"r0": STOPPED, "r1": REJECTED, "r2": UNKNOWN, "r3": REJECTED}),
        ],
    )
    async def test_a_worker_that_leaves_hands_over_what_it_has_not_settled(
        self,
        cluster: SmallCluster,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        answers: list[Reply],
        results: dict[str, StopResult],
    ) -> None:
        """Fault: all was sent again, even a `rejected` target, and a 403 became `unknown`."""
        monkeypatch.setattr("bctrl_async.bulk._run.BULK_PATIENCE", 0.2)
        cut_first_session(monkeypatch, after=2)
        targets = add_runtimes(emulator, 20)
        emulator.inject(Reply(403), alias="r1")
        for alias in ("r2", "r3"):
            emulator.inject(*answers, alias=alias)
        outcomes: list[StopOutcome] = []

        await stop_runtimes(
            cluster.client,
            iter(targets),
            concurrency=1,
            retry=RetryPolicy(base=0.001, cap=0.001),
            on_outcome=outcomes.append,
        )

        others = {alias: STOPPED for _, alias in targets[4:]}
        assert {each.target.alias: each.result for each in outcomes} == results | others
        assert all(targets[each.index] == each.target for each in outcomes)
        assert set(emulator.received.values()) == {1}

    async def test_the_run_ends_if_no_worker_is_left(self, emulator: Emulator) -> None:
        let_first_worker(fail)
        async with small_cluster() as cluster:
            batch = stop_runtimes(
                cluster.client, iter(hanging(emulator, 1)), session=make_unfit_session
            )
            running = start(batch)
            await wait_for_requests(emulator, 1)
            [left] = cast("ClusterRun", batch._run)._left
            [other] = [each for each in cluster.workers if each.address != left]
            # It refuses the chunk at once, even if it is the only one that is there.
            await cluster.lose(other)
            report = await ended(running)

        assert report.counts == {UNKNOWN: 1}
        assert "no vault" in str(report.ended_early)

    async def test_a_chunk_is_handed_out_in_measure_while_only_an_unfit_worker_takes_it(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: while the others were paused, it was handed out hundreds of times a second."""
        let_first_worker(fail)
        targets = add_runtimes(emulator, 2)
        submit: Callable[..., object] = Client.submit
        paused: list[str] = []
        times: list[float] = []

        def set_status(status: str) -> None:
            for address in paused:
                cluster.scheduler.handle_worker_status_change(status, address, stimulus_id="test")

        def record(*args: object, **kwargs: object) -> object:
            _, _, _, number, _ = args
            if number == 1:  # It is read when the others are paused already.
                times.append(asyncio.get_running_loop().time())
            return submit(*args, **kwargs)

        async def source() -> AsyncIterator[tuple[str, str]]:
            yield targets[0]
            async with asyncio.timeout(BOUND):
                while not (left := cast("ClusterRun", batch._run)._left):
                    await asyncio.sleep(0.01)
                paused.extend(each.address for each in cluster.workers if each.address not in left)
                set_status("paused")
                yield targets[1]
                while len(times) < 3:
                    await asyncio.sleep(0.01)
            set_status("running")

        monkeypatch.setattr(Client, "submit", record)
        batch = stop_runtimes(cluster.client, source(), session=make_unfit_session)
        report = await ended(start(batch))

        assert report.counts == {STOPPED: 2}
        # A busy machine makes them longer.
        assert min(later - earlier for earlier, later in pairwise(times)) > 0.2

    async def test_an_outage_at_the_start_of_a_chunk_is_survived(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: a worker gave the server up at once, though it had answered other chunks."""
        port = free_port()
        first, restarted = Emulator(port=port), Emulator(port=port)
        await first.start()
        monkeypatch.setenv("BCTRL_BASE_URL", first.url)
        targets = add_runtimes(first, 30)
        add_runtimes(restarted, 30)

        async def restart(outcome: StopOutcome) -> None:
            if outcome.index == 0:
                await first.close()
                down.set()
                await asyncio.sleep(0.5)
                await restarted.start()

        down = asyncio.Event()

        async def source() -> AsyncIterator[tuple[str, str]]:
            yield targets[0]
            await down.wait()
            for target in targets[1:]:
                yield target

        async with small_cluster(1) as cluster:
            retry = RetryPolicy(base=0.05, cap=0.1)
            report = await stop_runtimes(
                cluster.client, source(), on_outcome=restart, retry=retry, verify=False
            )
        await restarted.close()

        assert report.ok


async def until_told(batch: StopBatch) -> None:
    """Wait until the workers can read the end of a run, and the coordinator knows that."""
    async with asyncio.timeout(BOUND):
        while cast("ClusterRun", batch._run)._told is None:
            await asyncio.sleep(0.01)


Remote = tuple[SmallCluster, subprocess.Popen[str]]


@pytest.fixture
async def remote(
    emulator_environment: None, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Remote]:
    """A cluster with one worker whose scheduler is another process; nothing waits long for it."""
    del emulator_environment
    monkeypatch.setattr(bctrl_async.dask, "_GRACE", 0.3)
    with scheduler_process() as (process, address):
        async with small_cluster(1, scheduler_address=address) as cluster:
            yield cluster, process
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)


class TestSchedulers:
    async def test_a_scheduler_that_is_killed_ends_the_run_with_a_true_report(
        self, remote: Remote, emulator: Emulator
    ) -> None:
        cluster, process = remote
        targets = iter(slow(emulator, 600))
        running = start(stop_runtimes(cluster.client, targets, chunk_size=20, concurrency=5))
        await wait_for_requests(emulator, 30)
        process.kill()
        report = await ended(running)

        assert report.counts.total() == report.total <= 600
        assert report.counts[UNKNOWN] > 0
        assert "the cluster was lost" in str(report.ended_early)
        assert_true(report, emulator)

    @pytest.mark.parametrize("waits", [True, False])
    async def test_a_client_that_is_closed_ends_the_run(
        self, emulator: Emulator, *, waits: bool
    ) -> None:
        targets = hanging(emulator, 300)

        async def source() -> AsyncIterator[tuple[str, str]]:
            for target in targets[:2] if waits else targets:
                yield target
            await asyncio.sleep(60)

        async with small_cluster(1) as cluster:
            running = start(stop_runtimes(cluster.client, source(), chunk_size=10, concurrency=2))
            await wait_for_requests(emulator, 2)
            await cluster.close_client()
            report = await ended(running)

        assert report.counts[UNKNOWN] == min(report.total, 100)
        assert report.counts.total() == report.total
        assert "was lost" in str(report.ended_early)
        assert_true(report, emulator)

    async def test_a_question_to_a_lost_scheduler_does_not_hold_up_the_end(
        self, remote: Remote, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: dask tries for 30 s to connect again, and the slots wait for its answer."""
        cluster, process = remote
        targets = iter(hanging(emulator, 10))
        running = start(stop_runtimes(cluster.client, targets, concurrency=1))
        await wait_for_requests(emulator, 1)
        await asked_in_vain(monkeypatch)
        process.kill()
        report = await ended(running)

        assert report.counts == {UNKNOWN: 10}
        assert "the cluster was lost" in str(report.ended_early)

    async def test_a_client_that_is_closed_while_chunks_are_handed_out_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> object:
            raise RuntimeError("the client is closed")

        monkeypatch.setattr(Client, "submit", fail)
        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 100), chunk_size=10)
        monkeypatch.undo()
        await cluster.forget()

        assert report.counts == {NOT_SENT: 100}
        assert "the client is closed" in str(report.ended_early)

    async def test_a_scheduler_that_does_not_answer_is_given_up(
        self, remote: Remote, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: a scheduler that hangs holds the run for ever."""
        cluster, process = remote
        targets = iter(hanging(emulator, 100))
        running = start(stop_runtimes(cluster.client, targets, chunk_size=10, concurrency=2))
        await wait_for_requests(emulator, 2)
        # Only now, as a busy scheduler may need longer to begin.
        monkeypatch.setattr(bctrl_async.dask, "_PATIENCE", 0.3)
        process.send_signal(signal.SIGSTOP)
        report = await ended(running)

        assert report.counts == {UNKNOWN: 100}
        assert "did not answer" in str(report.ended_early)

    async def test_the_end_of_a_run_does_not_wait_for_a_question_that_was_asked(
        self, remote: Remote, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: `abort` took up to a minute while the scheduler hung."""
        cluster, process = remote
        batch = stop_runtimes(cluster.client, iter(hanging(emulator, 10)), concurrency=1)
        running = start(batch)
        await wait_for_requests(emulator, 1)
        await asked_in_vain(monkeypatch)
        process.send_signal(signal.SIGSTOP)
        batch.abort()

        assert (await ended(running)).counts == {UNKNOWN: 10}

    @pytest.mark.parametrize("method", ["register_plugin", "nthreads"])
    async def test_a_scheduler_that_is_lost_at_the_start_ends_the_run(
        self,
        cluster: SmallCluster,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        method: str,
    ) -> None:
        async def fail(*_: object, **__: object) -> None:
            raise OSError("the connection was reset")

        monkeypatch.setattr(Client, method, fail)
        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 5))
        monkeypatch.undo()
        await cluster.forget()

        assert report.counts == {NOT_SENT: 5}
        assert "the connection was reset" in str(report.ended_early)

    async def test_what_may_have_begun_is_unknown_if_messages_are_lost(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the message that a chunk was begun is on its way, and it is called not sent."""
        targets = hanging(emulator, 40)
        batch = stop_runtimes(cluster.client, iter(targets), chunk_size=10, concurrency=1)
        monkeypatch.setattr(Queue, "get", lambda *_, **__: asyncio.sleep(3600, []))
        monkeypatch.setattr(bctrl_async.dask, "_GRACE", 0.2)
        running = start(batch)
        await wait_for_requests(emulator, 2)
        batch.abort()
        pass_time(61)
        report = await ended(running)
        monkeypatch.undo()
        await cluster.forget()

        assert report.counts == {UNKNOWN: 40}

    async def test_a_message_that_cannot_be_read_fails_the_run(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the exception is only logged, and the run waits for ever."""

        async def get(*_: object, **__: object) -> list[bytes]:
            return [b"nonsense"]

        monkeypatch.setattr(Queue, "get", get)
        batch = stop_runtimes(cluster.client, add_runtimes(emulator, 50), chunk_size=10)
        with pytest.raises(Exception, match="invalid load key"):
            await ended(start(batch))
        monkeypatch.undo()

        assert batch.report.counts.total() == 50

    async def test_the_end_that_a_worker_cannot_read_does_not_end_its_chunks(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        targets = slow(emulator, 10)
        running = start(stop_runtimes(cluster.client, iter(targets), concurrency=1))
        await wait_for_requests(emulator, 2)

        async def fail(*_: object, **__: object) -> None:
            raise OSError("the connection was reset")

        monkeypatch.setattr(Variable, "get", fail)
        await assert_all_stopped(running, emulator)
