"""The messages between the workers and the coordinator of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest
from dask_cluster import (
    SmallCluster,
)
from helpers import BOUND, add_runtimes

import bctrl_async.dask._dispatcher
import bctrl_async.dask._worker
from bctrl_async import (
    StopResult,
)
from bctrl_async.bulk._cancel import CancelLevel
from bctrl_async.dask import stop_runtimes
from bctrl_async.dask._distributed import Cluster, Future, Host, Worker
from bctrl_async.dask._messages import (
    End,
    Outcomes,
    decode_end,
    decode_message,
    decode_result,
    encode,
)
from bctrl_async.dask._worker import Visit, stop_chunk
from bctrl_async.emulator import Emulator
from bctrl_async.errors import BctrlAuthenticationError

pytestmark = pytest.mark.usefixtures("emulator_environment")


def end_nothing(run: str, dask_worker: object) -> None:
    """Leave the session of a run open."""


async def _remove_visits(dask_worker: Worker) -> None:
    for name, plugin in list(dask_worker.plugins.items()):
        if isinstance(plugin, Visit):
            await dask_worker.plugin_remove(name)


def _recorded_orders(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Return a list of the arguments of all chunks that are submitted from now on."""
    orders: list[tuple[object, ...]] = []
    submit = Cluster.submit

    def record(
        self: Cluster,
        number: int,
        function: Callable[..., Coroutine[object, object, bytes]],
        *args: object,
    ) -> Future[bytes]:
        orders.append((self._run, *args))
        return submit(self, number, function, *args)

    monkeypatch.setattr(Cluster, "submit", record)
    return orders


class TestMessages:
    async def test_outcomes_whose_messages_were_lost_come_with_the_result(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Host, "publish", lambda *_: None)

        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 50), chunk_size=10)

        assert report.counts == {StopResult.STOPPED: 50}

    async def test_a_message_that_is_full_is_sent_at_once(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bctrl_async.dask._worker, "_MAX_OUTCOMES", 5)

        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 40))

        assert report.counts == {StopResult.STOPPED: 40}

    @pytest.mark.parametrize("has_session", [True, False])
    async def test_a_worker_sends_nothing_of_a_run_that_is_over(
        self,
        cluster: SmallCluster,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        *,
        has_session: bool,
    ) -> None:
        """Fault: a chunk that was taken back reaches a worker late, and is stopped after all."""
        orders = _recorded_orders(monkeypatch)
        if has_session:
            monkeypatch.setattr(bctrl_async.dask._dispatcher, "close_visit", end_nothing)
        await stop_runtimes(cluster.client, [("ws-1", "crm")])

        late: Callable[..., Future[bytes]] = cluster.client.submit
        # On the worker that has had it.
        for worker in cluster.workers:
            result = await late(stop_chunk, *orders[0], workers=worker.address, pure=False)
            (message,) = decode_result(result).messages
            outcomes = decode_message(message)
            assert isinstance(outcomes, Outcomes)
            assert [known.result for known in outcomes.known] == [StopResult.NOT_SENT]

        assert len(emulator.requests) == 1
        await cluster.client.run(_remove_visits)

    async def test_a_chunk_that_begins_while_its_run_closes_leaves_no_session(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: it finds the run still there, and its session stays open for a minute."""
        orders = _recorded_orders(monkeypatch)
        late: Callable[..., Future[bytes]] = cluster.client.submit
        run_on_workers = Cluster.run_on_workers

        async def begin_late(self: Cluster, function: Callable[..., object], *args: object) -> None:
            await run_on_workers(self, function, *args)
            for worker in cluster.workers:
                await late(stop_chunk, *orders[0], workers=worker.address, pure=False)

        monkeypatch.setattr(Cluster, "run_on_workers", begin_late)

        await stop_runtimes(cluster.client, [("ws-1", "crm")])

        assert [worker.plugins.keys() & {orders[0][0]} for worker in cluster.workers] == [
            set(),
            set(),
        ]
        assert len(emulator.requests) == 1

    @pytest.mark.parametrize("name", ["decode_message", "decode_result"])
    async def test_a_message_that_cannot_be_read_fails_the_run(
        self,
        cluster: SmallCluster,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
    ) -> None:
        """Fault: dask logs the exception, and the run waits for ever."""

        def fail(_: bytes) -> object:
            raise LookupError(name)

        monkeypatch.setattr(bctrl_async.dask._dispatcher, name, fail)
        batch = stop_runtimes(cluster.client, add_runtimes(emulator, 50), chunk_size=10)

        with pytest.raises(LookupError, match=name):
            await asyncio.wait_for(asyncio.ensure_future(batch), BOUND)

        assert batch.report.counts.total() == 50

    async def test_nothing_but_errors_is_pickled_in_a_message(self) -> None:
        with pytest.raises(TypeError, match="not part of a message"):
            encode(object())

    def test_an_error_keeps_its_attributes_and_loses_its_cause(self) -> None:
        error = BctrlAuthenticationError("no", status=401, request_id="r-1")
        error.__cause__ = OSError("a socket")

        end = decode_end(encode(End(error, CancelLevel.WAITING)))

        assert vars(end.reason) == vars(error)
        assert type(end.reason) is BctrlAuthenticationError
        assert end.reason.__cause__ is None
