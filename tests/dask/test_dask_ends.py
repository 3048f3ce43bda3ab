"""The ways in which a bulk stop on a cluster ends, and a scheduler that is lost."""

from __future__ import annotations

import asyncio
import pickle
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from dask_cluster import Running, SmallCluster, begin, faulty, scheduler_process, small_cluster
from distributed import Client, Queue, Variable
from helpers import BOUND, add_runtimes, pass_time, wait_for_requests
from journal_lines import read_lines

import bctrl_async.dask
from bctrl_async import StopOutcome, StopResult
from bctrl_async.dask import Chunk, ClusterRun, stop_runtimes
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.errors import BctrlAuthenticationError, BctrlPermissionError
from bctrl_async.outcomes import outcome_of

pytestmark = pytest.mark.usefixtures("emulator_environment")

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN
OPTIONS = {"chunk_size": 10, "concurrency": 2}


async def never(*_: object, **__: object) -> None:
    await asyncio.Event().wait()


async def asked_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait until the coordinator asks for messages, and never answer it."""
    asked = asyncio.Event()

    async def get(*_: object, **__: object) -> None:
        asked.set()
        await never()

    monkeypatch.setattr(Queue, "get", get)
    await asked.wait()


def cancel_tasks(running: Running) -> None:
    """Cancel the run from outside, as `asyncio.run` does at its end."""
    for task in running.engine._tasks:
        task.cancel()


ENDINGS: dict[str, tuple[Callable[[Running], object], dict[StopResult, int], str]] = {
    # Two workers have two stops in flight each.
    "the deadline": (lambda _: pass_time(20), {UNKNOWN: 4, NOT_SENT: 96}, "deadline"),
    "abort": (lambda run: run.batch.abort(), {UNKNOWN: 4, NOT_SENT: 96}, "abort"),
    "a cancelled run": (lambda run: run.task.cancel(), {UNKNOWN: 4, NOT_SENT: 96}, "cancel"),
    # No worker can be asked any more.
    "cancelled tasks": (cancel_tasks, {UNKNOWN: 100}, "cancel"),
}


class TestEnding:
    @pytest.mark.parametrize(("end", "counts", "said"), ENDINGS.values(), ids=ENDINGS)
    async def test_an_end_from_here_has_true_outcomes_and_leaves_nothing_behind(
        self,
        cluster: SmallCluster,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        *,
        end: Callable[[Running], object],
        counts: dict[StopResult, int],
        said: str,
    ) -> None:
        monkeypatch.setattr(bctrl_async.dask, "_GRACE", BOUND)
        targets, journal = faulty(emulator, Fault.HANG, 100), tmp_path / "night.jsonl"
        options: Any = {"deadline": 20.0, "journal": journal, **OPTIONS}
        running = await begin(cluster, emulator, targets, 4, **options)
        assert running.batch.in_flight == 100, "all are handed out"
        end(running)
        report = await running.ended()

        assert report.counts == counts
        assert said in str(report.ended_early)
        entries = read_lines(journal.read_bytes()).entries
        assert Counter(entry["result"] for entry in entries) == counts

    async def test_the_first_401_ends_the_run_and_names_the_worker(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the account did not say on which of the workers the key is wrong."""
        monkeypatch.setenv("BCTRL_API_KEY", "a-revoked-key")
        targets = add_runtimes(emulator, 3_000)
        running = await begin(cluster, emulator, targets, 0, chunk_size=50, concurrency=5)
        report = await running.ended()

        assert isinstance(report.ended_early, BctrlAuthenticationError)
        assert report.ended_early.status == 401
        said = [f"the worker {each.address}: the server answered 401" for each in cluster.workers]
        assert any(each in str(report.ended_early) for each in said)
        assert report.counts[NOT_SENT] > 1_000

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

    async def test_a_deadline_works_without_workers(self, emulator: Emulator) -> None:
        async with small_cluster(0) as cluster:
            targets = add_runtimes(emulator, 30)
            report = await stop_runtimes(cluster.client, targets, deadline=0.2, chunk_size=5)
            await cluster.assert_clean()

        assert report.counts == {NOT_SENT: 30}
        assert "deadline" in str(report.ended_early)

    async def test_a_run_can_be_cancelled_before_it_knows_its_workers(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        running = await begin(cluster, emulator, add_runtimes(emulator, 10), 0)
        await asyncio.sleep(0)
        running.task.cancel()

        assert (await running.ended()).counts == {NOT_SENT: 10}

    async def test_what_was_read_and_not_handed_out_has_an_outcome(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        async def source() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "crm"
            cancel_tasks(running)
            await never()

        running = await begin(cluster, emulator, source(), 0)

        assert (await running.ended()).counts == {NOT_SENT: 1}
        assert emulator.requests == []

    async def test_a_run_that_is_cancelled_from_outside_while_it_asks_leaves_nothing_behind(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the plugin, and with it the session of each worker, stayed on the cluster."""
        running = await begin(cluster, emulator, faulty(emulator, Fault.HANG, 5), 1)
        await asked_in_vain(monkeypatch)
        monkeypatch.undo()
        cancel_tasks(running)

        assert (await running.ended()).counts == {UNKNOWN: 5}

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
                running.batch.abort()
                await asyncio.wait_for(told.wait(), BOUND)
            else:
                told.set()

        running = await begin(cluster, emulator, targets, 0, chunk_size=1, on_outcome=read_slowly)

        assert (await running.ended()).counts == {STOPPED: 2, UNKNOWN: 1}

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
        async with small_cluster(1) as cluster:
            running = await begin(cluster, emulator, add_runtimes(emulator, 5), 0, chunk_size=5)
            assert (await running.ended()).counts == {UNKNOWN: 5}


Remote = tuple[SmallCluster, subprocess.Popen[str]]


@pytest.fixture
async def remote(
    emulator_environment: None, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Remote]:
    """A cluster with one worker whose scheduler is another process; nothing waits long for it."""
    del emulator_environment
    monkeypatch.setattr(bctrl_async.dask, "_GRACE", 0.3)
    # An answer that was asked for before the scheduler hangs is awaited so long.
    monkeypatch.setattr(bctrl_async.dask, "_PATIENCE", BOUND / 2)
    with scheduler_process() as (process, address):
        async with small_cluster(1, scheduler_address=address) as cluster:
            yield cluster, process
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)


class TestSchedulers:
    @pytest.mark.parametrize(
        ("loss", "is_asked", "said"),
        [
            (signal.SIGKILL, False, "the cluster was lost"),
            # Fault: dask tries for 30 s to connect again, and the slots wait for its answer.
            (signal.SIGKILL, True, "the cluster was lost"),
            # Fault: a scheduler that hangs holds the run for ever.
            (signal.SIGSTOP, False, "did not answer"),
        ],
    )
    async def test_a_scheduler_that_is_lost_ends_the_run_soon(
        self,
        remote: Remote,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        *,
        loss: signal.Signals,
        is_asked: bool,
        said: str,
    ) -> None:
        cluster, process = remote
        targets = faulty(emulator, Fault.HANG, 100)
        running = await begin(cluster, emulator, iter(targets), 2, **OPTIONS)
        if is_asked:
            await asked_in_vain(monkeypatch)
        # Only now, as a busy scheduler may need longer to begin.
        monkeypatch.setattr(bctrl_async.dask, "_PATIENCE", 0.3)
        process.send_signal(loss)
        report = await running.ended()

        assert report.counts == {UNKNOWN: 100}
        assert said in str(report.ended_early)

    async def test_abort_does_not_wait_for_the_answer_of_a_scheduler_that_hangs(
        self, remote: Remote, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: it took up to a minute."""
        cluster, process = remote
        targets = faulty(emulator, Fault.HANG, 10)
        running = await begin(cluster, emulator, iter(targets), 1, concurrency=1)
        await asked_in_vain(monkeypatch)
        process.send_signal(signal.SIGSTOP)
        running.batch.abort()

        assert (await running.ended()).counts == {UNKNOWN: 10}

    @pytest.mark.parametrize("waits", [True, False])
    async def test_a_client_that_is_closed_ends_the_run(
        self, emulator: Emulator, *, waits: bool
    ) -> None:
        targets = faulty(emulator, Fault.HANG, 300)

        async def source() -> AsyncIterator[tuple[str, str]]:
            for target in targets[:2] if waits else targets:
                yield target
            await never()

        async with small_cluster(1) as cluster:
            running = await begin(cluster, emulator, source(), 2, **OPTIONS)
            await cluster.close_client()
            report = await running.ended()

        assert report.counts[UNKNOWN] == min(report.total, 100)
        assert "was lost" in str(report.ended_early)

    @pytest.mark.parametrize("method", ["register_plugin", "nthreads", "submit"])
    async def test_a_cluster_that_is_lost_before_it_has_a_chunk_ends_the_run(
        self,
        cluster: SmallCluster,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        method: str,
    ) -> None:
        monkeypatch.setattr(Client, method, Mock(side_effect=OSError("the connection was reset")))
        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 100), chunk_size=10)
        monkeypatch.undo()
        await cluster.forget()

        assert report.counts == {NOT_SENT: 100}
        assert "the connection was reset" in str(report.ended_early)

    async def test_what_may_have_begun_is_unknown_if_messages_are_lost(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the message that a chunk was begun is on its way, and it is called not sent."""
        monkeypatch.setattr(Queue, "get", never)
        monkeypatch.setattr(bctrl_async.dask, "_GRACE", 0.2)
        targets = faulty(emulator, Fault.HANG, 40)
        running = await begin(cluster, emulator, iter(targets), 2, chunk_size=10, concurrency=1)
        running.batch.abort()
        pass_time(61)
        report = await running.ended()
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
        targets = add_runtimes(emulator, 50)
        running = await begin(cluster, emulator, targets, 0, chunk_size=10)
        with pytest.raises(Exception, match="invalid load key"):
            await running.ended()
        monkeypatch.undo()

        assert running.batch.report.counts.total() == 50

    async def test_a_late_message_about_a_chunk_that_has_ended_changes_nothing(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        get: Callable[..., Awaitable[list[bytes]]] = Queue.get

        async def get_late(queue: Queue, **options: object) -> list[bytes]:
            return [pickle.dumps([(99, None)]), *await get(queue, **options)]

        monkeypatch.setattr(Queue, "get", get_late)
        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 5))

        assert report.counts == {STOPPED: 5}

    async def test_the_end_that_a_worker_cannot_read_does_not_end_its_chunks(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        targets = faulty(emulator, Fault.LATENCY, 10)
        running = await begin(cluster, emulator, iter(targets), 2, concurrency=1)
        monkeypatch.setattr(Variable, "get", Mock(side_effect=OSError("the connection was reset")))

        assert (await running.ended()).counts == {STOPPED: 10}
