"""The ways in which a bulk stop on a cluster ends."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from dask_cluster import SmallCluster, small_cluster, tasks_of
from helpers import BOUND, add_runtimes, pass_time, wait_for_requests
from journal_lines import read_lines

import bctrl_async.dask._dispatcher
from bctrl_async import StopBatch, StopReport, StopResult
from bctrl_async.bulk._engine import Engine
from bctrl_async.dask import stop_runtimes
from bctrl_async.dask._distributed import Cluster
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.errors import BctrlAuthenticationError

pytestmark = pytest.mark.usefixtures("emulator_environment")


class TestEnding:
    async def test_the_first_401_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the account did not say on which of the workers the key is wrong."""
        monkeypatch.setenv("BCTRL_API_KEY", "a-revoked-key")
        targets = add_runtimes(emulator, 3_000)

        report = await stop_runtimes(cluster.client, targets, chunk_size=50, concurrency=5)

        assert isinstance(report.ended_early, BctrlAuthenticationError)
        assert report.ended_early.status == 401
        addresses = "|".join(re.escape(worker.address) for worker in cluster.workers)
        assert re.match(
            rf"(stop of .*: )?the worker ({addresses}): the server answered 401 .*"
            r"Check the API key \(BCTRL_API_KEY\)$",
            str(report.ended_early),
        )
        assert report.counts.total() == 3_000
        assert report.counts[StopResult.NOT_SENT] > 2_500

    async def test_the_deadline_ends_it_with_true_outcomes(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 400)
        for target in targets[::2]:
            emulator.poison(*target, Fault.HANG)

        running = asyncio.create_task(
            stop_runtimes(cluster.client, targets, chunk_size=20, concurrency=5, deadline=10.0)
        )
        while not emulator.received[targets[0]]:
            await asyncio.sleep(0)
        pass_time(10.0)
        report = await running

        assert "deadline" in str(report.ended_early)
        assert report.counts.total() == 400
        assert report.counts[StopResult.UNKNOWN] > 0
        for outcome in report.failures:
            if outcome.result is StopResult.NOT_SENT:
                assert emulator.received[outcome.target] == 0

    async def test_a_deadline_works_without_workers(self, emulator: Emulator) -> None:
        async with small_cluster(0) as cluster:
            report = await stop_runtimes(
                cluster.client, add_runtimes(emulator, 30), deadline=0.2, chunk_size=5
            )
            await cluster.assert_clean()

        assert report.counts == {StopResult.NOT_SENT: 30}
        assert "deadline" in str(report.ended_early)

    async def test_it_waits_for_workers_and_uses_those_that_come(self, emulator: Emulator) -> None:
        targets = add_runtimes(emulator, 100)

        async with small_cluster(0) as cluster:
            running = asyncio.create_task(stop_runtimes(cluster.client, targets, chunk_size=5))
            await asyncio.sleep(0.1)
            assert not running.done()
            await cluster.add_worker()
            await cluster.add_worker()
            report = await running

        assert report.ok

    async def test_stop_reading_finishes_what_is_in_flight(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 1_000)

        async with stop_runtimes(cluster.client, targets, chunk_size=50) as batch:
            async for _ in batch:
                batch.stop_reading()

        report = batch.report
        assert report.counts.total() == 1_000
        assert set(report.counts) == {StopResult.STOPPED, StopResult.NOT_SENT}
        assert report.counts[StopResult.STOPPED] == len(emulator.requests)
        assert "begin no more stops" in str(report.ended_early)

    async def test_a_cancelled_run_says_so_in_its_journal(
        self,
        cluster: SmallCluster,
        emulator: Emulator,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # The workers deliver their outcomes, so it does not wait for this long.
        monkeypatch.setattr(bctrl_async.dask._dispatcher, "_GRACE", 3600.0)
        targets = add_runtimes(emulator, 300)
        for target in targets:
            emulator.poison(*target, Fault.HANG)
        journal = tmp_path / "night.jsonl"
        running = asyncio.create_task(
            stop_runtimes(cluster.client, targets, journal=journal, chunk_size=10, concurrency=2)
        )
        await wait_for_requests(emulator, 4)

        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, BOUND)

        entries = read_lines(journal.read_bytes()).entries
        assert len(entries) == 300
        results = Counter(entry["result"] for entry in entries)
        assert results["unknown"] == len(emulator.requests)
        assert results["not_sent"] == 300 - len(emulator.requests)

    async def test_a_run_can_be_cancelled_before_it_knows_its_workers(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        batch = stop_runtimes(cluster.client, add_runtimes(emulator, 10))
        running = asyncio.create_task(batch)
        await asyncio.sleep(0)
        running.cancel()

        with pytest.raises(asyncio.CancelledError):
            await running

        assert batch.report.counts == {StopResult.NOT_SENT: 10}

    async def test_what_is_ended_after_its_end_stays_as_it_was(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        batch = stop_runtimes(cluster.client, add_runtimes(emulator, 5))
        await batch

        batch.abort()

        assert batch.report.ok

    async def test_what_is_aborted_before_its_start_sends_nothing(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        batch = stop_runtimes(cluster.client, add_runtimes(emulator, 5))
        batch.abort()
        report = await batch

        assert report.counts == {StopResult.NOT_SENT: 5}
        assert emulator.requests == []

    @pytest.mark.parametrize("plain", [True, False])
    async def test_a_run_whose_tasks_are_cancelled_from_outside_accounts_for_all(
        self, cluster: SmallCluster, emulator: Emulator, *, plain: bool
    ) -> None:
        targets = add_runtimes(emulator, 50)
        for target in targets:
            emulator.poison(*target, Fault.HANG)

        async def source() -> AsyncIterator[tuple[str, str]]:
            for target in targets:
                yield target

        batch = stop_runtimes(cluster.client, targets if plain else source(), chunk_size=5)
        running = asyncio.create_task(batch)
        await wait_for_requests(emulator, 1)
        for task in tasks_of(Engine):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(running, BOUND)

        assert batch.report.counts.total() == batch.read
        assert batch.read == 50 or not plain
        assert "cancelled" in str(batch.report.ended_early)

    async def test_a_run_whose_coroutine_is_closed_leaves_nothing_behind(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 50)
        for target in targets:
            emulator.poison(*target, Fault.HANG)
        batch = stop_runtimes(cluster.client, targets, chunk_size=5)
        batch.send(None)
        await wait_for_requests(emulator, 1)

        batch.close()
        async with asyncio.timeout(BOUND):
            while batch.report.counts.total() < 50:
                await asyncio.sleep(0.01)

        assert tasks_of(Engine) == []

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

        assert batch.report.counts.total() == 500
        assert batch.report.ended_early is not None

    async def test_what_may_have_begun_is_unknown_if_the_scheduler_does_not_answer(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the message that a chunk was begun is on its way, and it is called not sent."""
        targets = add_runtimes(emulator, 40)
        for target in targets:
            emulator.poison(*target, Fault.HANG)

        async def never(*_: object) -> None:
            await asyncio.sleep(60)

        with monkeypatch.context() as patch:
            patch.setattr(Cluster, "publish", never)
            batch = stop_runtimes(cluster.client, iter(targets), chunk_size=10, concurrency=1)
            running = asyncio.create_task(batch)
            await wait_for_requests(emulator, 2)
            batch.abort()
            await asyncio.sleep(0)
            pass_time(bctrl_async.dask._dispatcher._GRACE)
            report: StopReport = await asyncio.wait_for(running, BOUND)

        assert report.counts == {StopResult.UNKNOWN: 40}
