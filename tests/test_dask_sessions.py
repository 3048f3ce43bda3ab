"""The sessions of the workers of a cluster, and the arguments of the coordinator."""

from __future__ import annotations

import asyncio
import pickle
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from dask_cluster import (
    SmallCluster,
    connect,
    make_session,
    record_sessions,
)
from helpers import BOUND, add_runtimes, wait_for_requests

import bctrl_async.dask._dispatcher
import bctrl_async.dask._worker
from bctrl_async import (
    BctrlConfigError,
    BctrlSession,
    StopResult,
)
from bctrl_async.dask import stop_runtimes
from bctrl_async.dask._distributed import Client, Cluster, Future
from bctrl_async.dask._worker import Visit
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.pace import FilePace

pytestmark = pytest.mark.usefixtures("emulator_environment")

KEY = "emulator-key"


def _raise() -> BctrlSession:
    raise LookupError("no vault")


class _Unpicklable:
    """A function that is pickled, and cannot be unpickled."""

    def __call__(self) -> BctrlSession:
        raise AssertionError

    def __reduce__(self) -> tuple[object, ...]:
        return _fail_to_import, ()


def _fail_to_import() -> object:
    raise ModuleNotFoundError("No module named 'vault'")


def _close(client: Client) -> None:
    close: Callable[[], None] = client.close
    close()


class TestSession:
    async def test_each_worker_makes_one_session_and_closes_it(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        made = record_sessions()

        report = await stop_runtimes(
            cluster.client, add_runtimes(emulator, 100), chunk_size=5, session=make_session
        )

        assert report.ok
        assert len(made) == 2
        assert all(session.closed for session in made)

    async def test_the_sessions_share_a_pace(
        self,
        cluster: SmallCluster,
        emulator: Emulator,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # On a busy machine, nothing is sent before the store has answered.
        for name in ("_PATIENCE", "_INTERVAL"):
            monkeypatch.setattr(f"bctrl_async.pace._leases.{name}", BOUND)
        pace = FilePace(tmp_path / "pace", rate=10_000)

        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 20), pace=pace)

        assert report.ok
        assert (tmp_path / "pace").exists()

    async def test_a_worker_without_a_key_ends_the_run_and_says_so(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("BCTRL_API_KEY")

        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 50))

        assert report.counts == {StopResult.NOT_SENT: 50}
        assert isinstance(report.ended_early, BctrlConfigError)
        assert "cannot make its session: no API key" in str(report.ended_early)

    async def test_a_worker_that_would_send_elsewhere_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        """Fault: workers and coordinator mean different servers, and production is stopped."""
        report = await stop_runtimes(
            cluster.client, add_runtimes(emulator, 5), base_url="https://api.bctrl.ai"
        )

        assert report.counts == {StopResult.NOT_SENT: 5}
        assert "would send to" in str(report.ended_early)

    async def test_a_worker_of_another_version_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bctrl_async.dask._dispatcher, "__version__", "0.0.1")

        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 5))

        assert report.counts == {StopResult.NOT_SENT: 5}
        assert "not 0.0.1" in str(report.ended_early)

    async def test_a_function_that_makes_no_session_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        report = await stop_runtimes(
            cluster.client,
            add_runtimes(emulator, 5),
            session=dict,  # type: ignore[arg-type]
        )

        assert report.counts == {StopResult.NOT_SENT: 5}
        assert "not a BctrlSession" in str(report.ended_early)

    async def test_a_worker_that_lacks_the_module_of_the_function_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        report = await stop_runtimes(
            cluster.client,
            add_runtimes(emulator, 5),
            session=_Unpicklable(),
        )

        assert report.counts == {StopResult.NOT_SENT: 5}
        assert "cannot import" in str(report.ended_early)

    async def test_a_function_that_raises_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 5), session=_raise)

        assert report.counts == {StopResult.NOT_SENT: 5}
        addresses = "|".join(re.escape(worker.address) for worker in cluster.workers)
        assert re.match(
            rf"the worker ({addresses}) cannot make its session: LookupError: no vault\. Read",
            str(report.ended_early),
        )

    async def test_an_idle_session_is_closed(
        self, cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the sessions of a coordinator that was killed stay open for ever."""
        monkeypatch.setattr(bctrl_async.dask._worker, "_IDLE", 0.01)
        made = record_sessions()
        closed = asyncio.Event()

        async def targets() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "crm"
            while not (made and all(session.closed for session in made)):
                await asyncio.sleep(0.01)
            closed.set()
            yield "ws-1", "crm"

        report = await stop_runtimes(cluster.client, targets(), session=make_session)

        assert closed.is_set()
        assert report.counts == {StopResult.STOPPED: 1, StopResult.ALREADY_STOPPED: 1}

    async def test_a_session_with_chunks_is_not_idle(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        """Fault: a chunk that comes as its session is about to be closed fails."""
        emulator.poison("ws-1", "crm", Fault.HANG)
        batch = stop_runtimes(cluster.client, [("ws-1", "crm")])
        running = asyncio.create_task(batch)
        await wait_for_requests(emulator, 1)
        visits = [
            plugin
            for worker in cluster.workers
            for plugin in worker.plugins.values()
            if isinstance(plugin, Visit)
        ]

        await visits[0]._close()

        assert not visits[0]._session.closed
        batch.abort()
        await running

    async def test_the_key_is_not_in_what_is_sent(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent: list[bytes] = []
        submit = Cluster.submit

        def record(
            self: Cluster,
            number: int,
            function: Callable[..., Coroutine[object, object, bytes]],
            *args: object,
        ) -> Future[bytes]:
            sent.append(pickle.dumps(args))
            return submit(self, number, function, *args)

        monkeypatch.setattr(Cluster, "submit", record)
        await stop_runtimes(cluster.client, add_runtimes(emulator, 5))

        assert sent
        assert not any(KEY.encode() in data for data in sent)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"session": "a-key"}, "invalid session"),
            ({"session": partial(BctrlSession, "another-key")}, "would travel"),
            ({"session": partial(BctrlSession, api_key="another-key")}, "would travel"),
            ({"session": lambda: BctrlSession("emulator-key")}, "would travel"),
            ({"pace": 5}, "invalid pace"),
            ({"chunk_size": 0}, "invalid chunk_size"),
            ({"concurrency": 0}, "invalid concurrency"),
            ({"deadline": 0}, "invalid deadline"),
            ({"timeout": 0}, "invalid timeout"),
            ({"retry": 3}, "invalid retry"),
            ({"journal": 3}, "invalid journal"),
            ({"journal_max_age": 0}, "invalid journal_max_age"),
            ({"on_outcome": 3}, "invalid on_outcome"),
            ({"base_url": "nonsense"}, "invalid base_url"),
            ({"targets": 3}, "invalid targets"),
            ({"client": 3}, "invalid client"),
        ],
    )
    def test_an_invalid_argument_is_an_error_at_once(
        self, arguments: dict[str, object], text: str
    ) -> None:
        given: dict[str, object] = {"client": Mock(spec=Client), "targets": [], **arguments}

        with pytest.raises(BctrlConfigError, match=text) as raised:
            stop_runtimes(**given)  # type: ignore[arg-type]

        assert "another-key" not in str(raised.value)

    def test_a_function_that_cannot_be_pickled_is_an_error(self) -> None:
        lock = threading.Lock()

        def session() -> BctrlSession:
            raise AssertionError(lock)

        with pytest.raises(BctrlConfigError, match="cannot be pickled"):
            stop_runtimes(Mock(spec=Client), [], session=session)

    async def test_a_client_that_is_closed_is_an_error(self, cluster: SmallCluster) -> None:
        async with connect(cluster.address) as client:
            pass

        with pytest.raises(BctrlConfigError, match="it is closed"):
            await stop_runtimes(client, [])

    async def test_a_client_of_another_loop_is_an_error(self, cluster: SmallCluster) -> None:
        client = await asyncio.to_thread(connect, cluster.address, asynchronous=False)
        try:
            with pytest.raises(BctrlConfigError, match="another event loop"):
                await stop_runtimes(client, [])
        finally:
            await asyncio.to_thread(_close, client)
