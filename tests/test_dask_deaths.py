"""Workers and schedulers that die during a bulk stop on a cluster, and clients that are closed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from dask_cluster import (
    collect_lost_connections,
    connect,
    local_cluster,
    scheduler_process,
    small_cluster,
    tasks_of,
)
from distributed import Client
from helpers import BOUND, add_runtimes, pass_time, wait_for_requests
from journal_lines import read_lines

import bctrl_async.dask._dispatcher
from bctrl_async import BctrlSession, StopOutcome, StopReport, StopResult
from bctrl_async.dask import stop_runtimes
from bctrl_async.dask._dispatcher import Dispatcher
from bctrl_async.dask._distributed import Cluster
from bctrl_async.emulator import Emulator, Fault

pytestmark = pytest.mark.usefixtures("emulator_environment")


def slow(emulator: Emulator, targets: list[tuple[str, str]]) -> None:
    """Answer all stops of these targets so late that a test can do something meanwhile."""
    for target in targets:
        emulator.inject(*[Fault.LATENCY] * 10, workspace_id=target[0], alias=target[1])


class TestWorkers:
    async def test_the_chunk_of_a_worker_that_dies_is_repeated(self, emulator: Emulator) -> None:
        targets = add_runtimes(emulator, 60)
        slow(emulator, targets)
        outcomes: list[StopOutcome] = []

        async with small_cluster() as cluster:
            running = asyncio.create_task(
                stop_runtimes(
                    cluster.client,
                    targets,
                    chunk_size=15,
                    concurrency=3,
                    on_outcome=outcomes.append,
                )
            )
            await wait_for_requests(emulator, 6)
            await cluster.lose(cluster.workers[0])
            report = await asyncio.wait_for(running, BOUND)

        assert report.ok
        assert sorted(outcome.index for outcome in outcomes) == list(range(60))
        assert set(report.counts) <= {StopResult.STOPPED, StopResult.ALREADY_STOPPED}

    async def test_a_worker_that_closes_is_replaced_by_another(self, emulator: Emulator) -> None:
        targets = add_runtimes(emulator, 60)
        slow(emulator, targets)

        async with small_cluster() as cluster:
            running = asyncio.create_task(
                stop_runtimes(cluster.client, targets, chunk_size=15, concurrency=3)
            )
            await wait_for_requests(emulator, 6)
            await cluster.workers[0].close()
            report = await asyncio.wait_for(running, BOUND)

        assert report.ok
        assert report.counts.total() == 60

    async def test_a_worker_that_closes_leaves_the_rest_of_its_chunk_to_another(
        self, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 20)
        emulator.inject(Fault.HANG, workspace_id="ws-1", alias="r0")
        outcomes: list[StopOutcome] = []

        async with small_cluster(1) as cluster:
            running = asyncio.create_task(
                stop_runtimes(cluster.client, iter(targets), on_outcome=outcomes.append)
            )
            async with asyncio.timeout(BOUND):
                while len(outcomes) < 19:
                    await asyncio.sleep(0.01)
            await cluster.add_worker()
            await cluster.workers[0].close()
            report = await asyncio.wait_for(running, BOUND)

        # r0 was stopped by the request that was not answered.
        assert report.counts == {StopResult.STOPPED: 19, StopResult.ALREADY_STOPPED: 1}

    async def test_a_chunk_that_kills_its_workers_is_unknown_and_the_rest_goes_on(
        self, emulator: Emulator
    ) -> None:
        """Fault: targets that were perhaps stopped are reported as not sent."""
        targets = add_runtimes(emulator, 30)
        for target in targets[:10]:
            emulator.poison(*target, Fault.HANG)

        async with small_cluster(1, allowed_failures=0) as cluster:
            running = asyncio.create_task(
                # An iterator: a short list would be cut into shorter chunks.
                stop_runtimes(cluster.client, iter(targets), chunk_size=10, concurrency=10)
            )
            await wait_for_requests(emulator, 10)
            await cluster.lose(cluster.workers[0])
            await cluster.add_worker()
            report = await asyncio.wait_for(running, BOUND)

        assert report.counts[StopResult.UNKNOWN] >= 10
        assert report.counts.total() == 30
        unknown = {outcome.target.alias: outcome for outcome in report.failures}
        assert {alias for _, alias in targets[:10]} <= unknown.keys()
        error = unknown["r0"].error
        assert error is not None
        assert error.may_have_stopped
        assert "workers died" in str(error)
        assert report.ended_early is None

    async def test_a_worker_killed_with_sigkill_costs_no_outcome(
        self, emulator: Emulator, tmp_path: Path
    ) -> None:
        targets = add_runtimes(emulator, 300)
        slow(emulator, targets)
        journal = tmp_path / "night.jsonl"

        async with local_cluster(2) as cluster, connect(cluster) as client:
            running = asyncio.create_task(
                stop_runtimes(client, targets, chunk_size=50, concurrency=20, journal=journal)
            )
            await wait_for_requests(emulator, 50)
            pids = await client.run(os.getpid)
            os.kill(next(iter(pids.values())), signal.SIGKILL)
            report = await asyncio.wait_for(running, BOUND)
        collect_lost_connections()

        assert report.ok
        assert report.counts.total() == 300
        entries = read_lines(journal.read_bytes()).entries
        assert len(entries) == len({entry["index"] for entry in entries}) == 300
        assert len(emulator.requests) >= 300

    async def test_a_chunk_that_is_repeated_after_the_end_sends_nothing(
        self, emulator: Emulator
    ) -> None:
        """Fault: a worker that begins a chunk after Ctrl-C does not know of it."""
        targets = add_runtimes(emulator, 20)
        for target in targets:
            emulator.poison(*target, Fault.HANG)

        async with small_cluster(1) as cluster:
            batch = stop_runtimes(cluster.client, iter(targets), chunk_size=20, concurrency=2)
            running = asyncio.create_task(batch)
            await wait_for_requests(emulator, 2)
            batch.stop_reading()
            assert tasks_of(Dispatcher, "_tell")
            async with asyncio.timeout(BOUND):
                while tasks_of(Dispatcher, "_tell"):
                    await asyncio.sleep(0.01)
            await cluster.add_worker()
            await cluster.lose(cluster.workers[0])
            report: StopReport = await asyncio.wait_for(running, BOUND)

        assert len(emulator.requests) == 2
        # A worker that dies has sent an unknown part of its chunk.
        assert report.counts.total() == 20
        unknown = {o.target for o in report.failures if o.result is StopResult.UNKNOWN}
        assert {target for target in emulator.received if emulator.received[target]} <= unknown

    async def test_a_run_that_is_ended_does_not_wait_for_new_workers(
        self, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 20)
        for target in targets:
            emulator.poison(*target, Fault.HANG)

        async with small_cluster(1) as cluster:
            batch = stop_runtimes(cluster.client, iter(targets), chunk_size=10, concurrency=2)
            running = asyncio.create_task(batch)
            await wait_for_requests(emulator, 2)
            batch.stop_reading()
            await cluster.lose(cluster.workers[0])
            report: StopReport = await asyncio.wait_for(running, BOUND)

        assert report.counts == {StopResult.UNKNOWN: 10, StopResult.NOT_SENT: 10}

    async def test_workers_that_do_not_answer_are_waited_for_only_so_long(
        self, emulator: Emulator
    ) -> None:
        """Fault: Ctrl-C hangs for as long as a worker does."""
        targets = add_runtimes(emulator, 20)
        for target in targets:
            emulator.poison(*target, Fault.HANG)

        async with small_cluster(1) as cluster:
            batch = stop_runtimes(cluster.client, iter(targets), chunk_size=20, concurrency=2)
            running = asyncio.create_task(batch)
            await wait_for_requests(emulator, 2)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(BctrlSession, "stop_runtimes", None)
                patch.setattr("bctrl_async.dask._worker.Visit.end", lambda *_: None)
                batch.abort()
                await asyncio.sleep(0)
                pass_time(bctrl_async.dask._dispatcher._GRACE)
                report: StopReport = await asyncio.wait_for(running, BOUND)

        assert report.counts == {StopResult.UNKNOWN: 20}


class TestSchedulers:
    async def test_a_scheduler_that_is_killed_ends_the_run_with_a_true_report(
        self, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 400)
        slow(emulator, targets)

        with scheduler_process() as (process, address):
            async with (
                small_cluster(2, scheduler_address=address) as cluster,
            ):
                running = asyncio.create_task(
                    stop_runtimes(cluster.client, targets, chunk_size=20, concurrency=5)
                )
                await wait_for_requests(emulator, 30)
                process.kill()
                report = await asyncio.wait_for(running, BOUND)

        assert report.counts.total() == 400
        assert report.counts[StopResult.UNKNOWN] > 0
        assert report.counts[StopResult.NOT_SENT] > 200
        assert "scheduler of dask was lost" in str(report.ended_early)
        for outcome in report.failures:
            if outcome.result is StopResult.NOT_SENT:
                assert emulator.received[outcome.target] == 0

    async def test_a_client_that_is_closed_ends_the_run(self, emulator: Emulator) -> None:
        targets = add_runtimes(emulator, 100)
        for target in targets:
            emulator.poison(*target, Fault.HANG)

        async with small_cluster(1) as cluster:
            running = asyncio.create_task(
                stop_runtimes(cluster.client, iter(targets), chunk_size=10, concurrency=2)
            )
            await wait_for_requests(emulator, 2)
            await cluster.close_client()
            report = await asyncio.wait_for(running, BOUND)

        assert report.counts == {StopResult.UNKNOWN: 20, StopResult.NOT_SENT: 10}
        assert "was lost" in str(report.ended_early)

    async def test_a_client_that_is_closed_while_the_input_is_awaited_ends_the_run(self) -> None:
        async with small_cluster(1) as cluster:

            async def targets() -> AsyncIterator[tuple[str, str]]:
                yield "ws-1", "crm"
                await asyncio.sleep(60)

            outcome = asyncio.Event()
            batch = stop_runtimes(cluster.client, targets(), on_outcome=lambda _: outcome.set())
            running = asyncio.create_task(batch)
            await outcome.wait()
            while tasks_of(Dispatcher, "_follow"):
                await asyncio.sleep(0.01)
            await cluster.close_client()
            report: StopReport = await asyncio.wait_for(running, BOUND)

        assert report.counts == {StopResult.STOPPED: 1}
        assert "was lost" in str(report.ended_early)

    async def test_a_client_that_is_closed_while_chunks_are_handed_out_ends_the_run(
        self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        submit = Client.submit

        def close_first(self: Client, *args: object, **kwargs: object) -> object:
            if args[1:] and self.futures:
                self.status = "closed"
                raise RuntimeError("the client is closed")
            given: Any = submit
            return given(self, *args, **kwargs)

        targets = add_runtimes(emulator, 100)
        async with small_cluster(1) as cluster:
            with monkeypatch.context() as patch:
                patch.setattr(Client, "submit", close_first)
                running = asyncio.create_task(stop_runtimes(cluster.client, targets, chunk_size=10))
                report = await asyncio.wait_for(running, BOUND)
            cluster.client.status = "running"

        assert report.counts.total() == 100
        assert report.counts[StopResult.NOT_SENT] >= 90
        assert "the client is closed" in str(report.ended_early)

    async def test_a_scheduler_that_does_not_answer_is_given_up(
        self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: a scheduler that hangs holds the run for ever."""
        monkeypatch.setattr(bctrl_async.dask._dispatcher, "_POLL", 0.01)
        asked = asyncio.Event()
        count_workers = Cluster.count_workers

        async def count(self: Cluster) -> int:
            asked.set()
            return await count_workers(self)

        monkeypatch.setattr(Cluster, "count_workers", count)
        targets = add_runtimes(emulator, 100)
        for target in targets:
            emulator.poison(*target, Fault.HANG)

        with scheduler_process() as (process, address):
            async with small_cluster(1, scheduler_address=address) as cluster:
                running = asyncio.create_task(
                    stop_runtimes(cluster.client, iter(targets), chunk_size=10, concurrency=2)
                )
                await wait_for_requests(emulator, 2)
                # Only now, as a busy scheduler may need longer to begin.
                monkeypatch.setattr(bctrl_async.dask._dispatcher, "_SCHEDULER_PATIENCE", 0.3)
                asked.clear()
                await asked.wait()
                process.send_signal(signal.SIGSTOP)
                try:
                    report = await asyncio.wait_for(running, BOUND)
                finally:
                    process.send_signal(signal.SIGCONT)

        assert report.counts == {StopResult.UNKNOWN: 20, StopResult.NOT_SENT: 10}
        assert "did not answer" in str(report.ended_early)
