"""Workers of a bulk stop on a cluster that die, leave, hang or cannot stop anything."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast
from unittest.mock import Mock

import pytest
from dask_cluster import SmallCluster, begin, faulty, small_cluster
from distributed import Client, Future, Worker
from helpers import BOUND, add_runtimes, until

import bctrl_async.dask
from bctrl_async import BctrlError, RuntimeRef, RuntimeState, StopOutcome, StopResult
from bctrl_async.bulk._cancel import CancelLevel
from bctrl_async.dask import Chunk, ClusterRun, stop_runtimes
from bctrl_async.emulator import Emulator, Fault

pytestmark = pytest.mark.usefixtures("emulator_environment")

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN
REJECTED = StopResult.REJECTED


class TestLoss:
    @pytest.mark.parametrize(
        "leave",
        [SmallCluster.lose, SmallCluster.close_worker, SmallCluster.retire],
        ids=["dies", "closes", "is scaled away"],
    )
    async def test_the_chunks_of_a_worker_that_leaves_are_repeated(
        self, emulator: Emulator, leave: Callable[[SmallCluster, Worker], Awaitable[None]]
    ) -> None:
        """Fault: the run took the end of one worker's chunks for the end of all."""
        targets = faulty(emulator, Fault.LATENCY, 60)
        async with small_cluster() as cluster:
            running = await begin(cluster, emulator, targets, 6, chunk_size=15, concurrency=3)
            await leave(cluster, cluster.workers[0])
            report = await running.ended()

        assert report.ok, report
        assert set(report.counts) <= {STOPPED, StopResult.ALREADY_STOPPED}
        assert report.total == 60

    async def test_it_waits_for_workers_and_uses_those_that_come(self, emulator: Emulator) -> None:
        async with small_cluster(0) as cluster:
            running = await begin(cluster, emulator, add_runtimes(emulator, 100), 0, chunk_size=5)
            await asyncio.sleep(0.1)
            assert not running.task.done()
            await cluster.add_worker()
            await cluster.add_worker()
            assert (await running.ended()).counts == {STOPPED: 100}

    async def test_a_chunk_that_kills_its_workers_is_unknown_and_the_rest_goes_on(
        self, emulator: Emulator
    ) -> None:
        """Fault: targets that were perhaps stopped are reported as not sent."""
        targets = add_runtimes(emulator, 30)
        faulty(emulator, Fault.HANG, 10)

        async with small_cluster(1, allowed_failures=0) as cluster:
            # An iterator: a short list would be cut into shorter chunks. All of the first chunk are
            # in flight, and the worker does not start the next.
            options = {"chunk_size": 10, "concurrency": 10}
            running = await begin(cluster, emulator, iter(targets), 10, **options)
            await cluster.lose(cluster.workers[0])
            await cluster.add_worker()
            report = await running.ended()

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
            running = await begin(cluster, emulator, iter(add_runtimes(emulator, 5)), 0)
            for _ in range(3):
                await cluster.add_worker()
            report = await running.ended()

        assert len(lost) == 3
        assert report.counts == {NOT_SENT: 5}
        assert "KilledWorker" in str(report.ended_early)

    @pytest.mark.parametrize("is_repeated", [True, False])
    async def test_a_run_that_has_ended_neither_repeats_a_chunk_nor_waits_for_new_workers(
        self, emulator: Emulator, *, is_repeated: bool
    ) -> None:
        """Fault: a worker that begins a chunk after Ctrl-C does not know of it."""
        targets = faulty(emulator, Fault.HANG, 20)
        async with small_cluster(1) as cluster:
            running = await begin(cluster, emulator, iter(targets), 2, concurrency=2)
            running.batch.stop_reading()
            if is_repeated:
                await until(lambda: running.engine._told is not None)
                await cluster.add_worker()
            await cluster.lose(cluster.workers[0])
            report = await running.ended()

        assert len(emulator.requests) == 2
        assert report.counts[UNKNOWN] >= 2

    async def test_workers_that_do_not_answer_are_waited_for_only_so_long(
        self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: Ctrl-C hangs for as long as a worker does."""
        monkeypatch.setattr(bctrl_async.dask, "_GRACE", 0.3)

        async def ignore(_: object) -> None: ...

        targets = faulty(emulator, Fault.HANG, 20)
        async with small_cluster(1) as cluster:
            running = await begin(cluster, emulator, iter(targets), 2, concurrency=2)
            monkeypatch.setattr(bctrl_async.dask.Visit, "_obey", ignore)
            running.batch.abort()
            assert (await running.ended()).counts == {UNKNOWN: 20}

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
        running = await begin(cluster, emulator, iter(add_runtimes(emulator, 5)), 0)
        await asyncio.wait_for(has_task.wait(), BOUND)
        client: Any = cluster.client
        await client.cancel([Future(key, client) for key in client.futures])
        report = await running.ended()
        may_go_on.set()

        assert report.counts == {UNKNOWN: 5}
        assert report.ended_early is None


def told(index: int, result: StopResult) -> StopOutcome:
    """Return the outcome of a target by the word of a worker."""
    target, state = RuntimeRef("ws-1", f"r{index}"), RuntimeState.UNCONFIRMED
    return StopOutcome(index=index, target=target, result=result, state=state)


def chunk_of(count: int, begins: int, *messages: StopResult) -> Chunk:
    """Make a chunk with the words of a worker about its first targets."""
    chunk = Chunk([(index, RuntimeRef("ws-1", f"r{index}")) for index in range(count)])
    chunk.begins = begins
    for index, result in enumerate(messages):
        assert list(chunk.add(told(index, result))) == []
    return chunk


class TestChunk:
    """What is known of a chunk by the messages of its workers, some of whom have died."""

    @pytest.mark.parametrize(
        ("begins", "messages", "result"),
        [
            (0, [], NOT_SENT),
            (1, [], UNKNOWN),
            (1, [NOT_SENT], NOT_SENT),
            (1, [REJECTED], REJECTED),
            # Fault: a worker that died may have sent what the next one has not, or may not.
            (2, [NOT_SENT], UNKNOWN),
            (2, [REJECTED], UNKNOWN),
        ],
    )
    def test_a_target_that_no_worker_has_stopped_has_an_outcome_that_is_proven(
        self, begins: int, messages: list[StopResult], result: StopResult
    ) -> None:
        [outcome] = chunk_of(1, begins, *messages).end(BctrlError("its workers died"))
        assert (outcome.index, outcome.result) == (0, result)

    def test_a_target_that_is_known_to_be_gone_has_no_second_outcome(self) -> None:
        chunk = chunk_of(1, 2)
        gone = told(0, StopResult.NOT_FOUND)
        assert list(chunk.add(gone)) == [gone]
        assert list(chunk.add(told(0, UNKNOWN))) == []
        assert list(chunk.end(BctrlError("its workers died"))) == []

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
        chunk = chunk_of(1, begins)
        run._add(chunk, None)
        [outcome] = chunk.end(BctrlError("its worker died"))
        assert outcome.result is result

    @pytest.mark.parametrize(
        ("begun", "messages", "begins", "rejected"),
        [
            (1, [NOT_SENT, REJECTED], 0, [1]),
            (1, [NOT_SENT], 1, []),
            # An earlier worker died, and may have sent both.
            (2, [NOT_SENT, REJECTED], 2, []),
        ],
    )
    def test_a_worker_that_has_left_is_forgotten_only_if_it_was_alone_and_has_told_all(
        self, begun: int, messages: list[StopResult], begins: int, rejected: list[int]
    ) -> None:
        chunk = chunk_of(2, begun, *messages)
        assert [outcome.index for outcome in chunk.restart()] == rejected
        assert chunk.begins == begins
