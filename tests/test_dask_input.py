"""The input of a bulk stop on a cluster, and the callback that takes its outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from dask_cluster import (
    SmallCluster,
)
from helpers import BOUND, add_runtimes

import bctrl_async.dask._dispatcher
import bctrl_async.dask._worker
from bctrl_async import (
    StopOutcome,
    StopResult,
)
from bctrl_async.dask import stop_runtimes
from bctrl_async.emulator import Emulator

pytestmark = pytest.mark.usefixtures("emulator_environment")


class TestInput:
    async def test_a_plain_generator_is_read(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 50)

        report = await stop_runtimes(cluster.client, (target for target in targets), chunk_size=8)

        assert report.counts == {StopResult.STOPPED: 50}

    async def test_the_targets_of_a_slow_input_do_not_wait_for_a_full_chunk(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        """Fault: a target waits for a thousand others that may come tomorrow."""
        add_runtimes(emulator, 2)
        stopped = asyncio.Event()

        async def targets() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "r0"
            await asyncio.wait_for(stopped.wait(), BOUND)
            yield "ws-1", "r1"

        report = await stop_runtimes(cluster.client, targets(), on_outcome=lambda _: stopped.set())

        assert report.counts == {StopResult.STOPPED: 2}

    async def test_targets_wait_for_others_anew_after_a_full_chunk(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        add_runtimes(emulator, 3)

        async def targets() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "r0"
            yield "ws-1", "r1"
            # Longer than the first of a chunk waits for others.
            await asyncio.sleep(0.15)
            yield "ws-1", "r2"

        report = await stop_runtimes(cluster.client, targets(), chunk_size=2)

        assert report.counts == {StopResult.STOPPED: 3}

    async def test_an_endless_input_is_read_only_as_far_as_the_workers_need(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        """Fault: the whole input is handed to the scheduler, and kept in its memory."""
        for number in range(500):
            emulator.add_runtime("ws-1", f"r{number}")
        read = 0

        def targets() -> Iterator[tuple[str, str]]:
            nonlocal read
            while True:
                read += 1
                yield "ws-1", f"r{read % 500}"

        ahead: list[int] = []

        def on_outcome(_: StopOutcome) -> None:
            ahead.append(read - len(ahead))
            if len(ahead) == 300:
                batch.stop_reading()

        batch = stop_runtimes(cluster.client, targets(), chunk_size=10, on_outcome=on_outcome)
        report = await batch

        assert max(ahead) <= 2 * 10 * 10 + 10
        assert report.total == read
        assert report.counts.total() == read
        assert report.ended_early is not None

    async def test_a_slow_callback_holds_up_the_reading(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bctrl_async.dask._deliveries._LIMIT", 3)
        targets = add_runtimes(emulator, 200)
        read = 0

        def source() -> Iterator[tuple[str, str]]:
            nonlocal read
            for target in targets:
                read += 1
                yield target

        delivered = 0
        ahead: list[int] = []

        async def on_outcome(_: StopOutcome) -> None:
            nonlocal delivered
            delivered += 1
            ahead.append(read - delivered)
            await asyncio.sleep(0)

        report = await stop_runtimes(cluster.client, source(), chunk_size=5, on_outcome=on_outcome)

        assert report.ok
        assert delivered == 200
        assert max(ahead) < 200

    async def test_the_error_of_the_input_is_raised_after_all_outcomes(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 5)
        outcomes: list[StopOutcome] = []

        def source() -> Iterator[tuple[str, str]]:
            yield from targets
            raise LookupError("the database is gone")

        batch = stop_runtimes(cluster.client, source(), on_outcome=outcomes.append)
        with pytest.raises(LookupError):
            await batch

        assert len(outcomes) == 5
        assert batch.report.ended_early is not None
        assert "LookupError" in str(batch.report.ended_early)

    async def test_the_error_of_a_callback_cancels_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 200)

        def on_outcome(outcome: StopOutcome) -> None:
            raise LookupError(outcome.index)

        batch = stop_runtimes(cluster.client, targets, on_outcome=on_outcome, chunk_size=10)
        with pytest.raises(LookupError):
            await batch

        assert batch.report.counts.total() == 200
        assert batch.report.ended_early is not None

    async def test_a_fault_in_handing_out_fails_the_run(
        self, cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the event loop logs the exception of a timer, and the run waits for ever."""

        def fail(*_: object) -> object:
            raise LookupError("cannot be encoded")

        async def targets() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "crm"
            await asyncio.sleep(60)

        with monkeypatch.context() as patch:
            batch = stop_runtimes(cluster.client, targets())
            running = asyncio.ensure_future(batch)
            await asyncio.sleep(0)
            patch.setattr(bctrl_async.dask._dispatcher, "Order", fail)
            with pytest.raises(LookupError):
                await asyncio.wait_for(running, BOUND)

        assert batch.report.counts == {StopResult.NOT_SENT: 1}
