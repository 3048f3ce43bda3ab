"""Clusters of dask.distributed in this process, for tests: over real sockets, on one event loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, NamedTuple, cast

from distributed import Client, LocalCluster, Scheduler, Worker
from helpers import BOUND, add_runtimes, wait_for_requests

from bctrl_async import BctrlSession, StopBatch, StopReport, StopResult
from bctrl_async.dask import ClusterRun, stop_runtimes
from bctrl_async.emulator import Emulator, Fault

# Its own handler would print each worker that comes and goes.
logging.getLogger("distributed").setLevel(logging.CRITICAL)


def connect(cluster: object, *, asynchronous: bool = True) -> Client:
    """Return a client of a cluster."""
    make: Callable[..., Client] = Client
    return make(cluster, asynchronous=asynchronous, set_as_default=False, timeout=BOUND)


_made: list[list[BctrlSession]] = []


def record_sessions() -> list[BctrlSession]:
    """Return a list of the sessions that `make_session` makes from now on."""
    _made.append([])
    return _made[-1]


def make_session() -> BctrlSession:
    """Make and record the session of a worker."""
    session = BctrlSession()
    _made[-1].append(session)
    return session


_unfit: list[Callable[[], BctrlSession]] = []


def let_first_worker(make: Callable[[], BctrlSession]) -> None:
    """Let the first of the workers that ask `make_unfit_session` have this session."""
    _unfit[:] = [make]


def make_unfit_session() -> BctrlSession:
    """Make the session of a worker, of which the first may have another."""
    return (_unfit.pop() if _unfit else BctrlSession)()


def collect_lost_connections() -> None:
    """Collect sockets that dask does not close if their other end is killed as it connects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def local_cluster(workers: int) -> LocalCluster:
    """Return a cluster whose workers are processes."""
    make: Callable[..., LocalCluster] = LocalCluster
    return make(
        n_workers=workers,
        threads_per_worker=1,
        dashboard_address=":0",
        asynchronous=True,
        silence_logs=logging.CRITICAL,
    )


class SmallCluster:
    """A running scheduler with its workers, and a client."""

    client: Client

    def __init__(self, address: str, scheduler: Scheduler | None) -> None:
        self.address = address
        self._scheduler = scheduler
        self.workers: list[Worker] = []

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, if it is in this process."""
        assert self._scheduler is not None
        return self._scheduler

    async def close_workers(self) -> None:
        for worker in self.workers:
            await worker.close()

    async def add_worker(self, nthreads: int = 1) -> Worker:
        worker: Worker = await Worker(self.address, nthreads=nthreads, dashboard_address=":0")
        self.workers.append(worker)
        return worker

    async def close_client(self) -> None:
        client: Any = self.client
        await client.close()

    async def lose(self, worker: Worker) -> None:
        """Treat a worker as dead: its tasks are repeated elsewhere, or have killed it."""
        await self.scheduler.remove_worker(worker.address, stimulus_id="test")

    async def close_worker(self, worker: Worker) -> None:
        await worker.close()

    async def retire(self, worker: Worker) -> None:
        """Scale a worker away."""
        client: Any = self.client
        await client.retire_workers([worker.address])

    async def forget(self) -> None:
        """Remove what a run left that could not reach the scheduler."""
        for name in self.scheduler.worker_plugins.keys() - {"shuffle"}:
            await self.scheduler.unregister_worker_plugin(None, name)
        for kept in ("queues", "variables"):
            getattr(self.scheduler.extensions[kept], kept).clear()

    async def assert_clean(self) -> None:
        """Check that runs left nothing behind; what is released is on its way."""
        with suppress(TimeoutError):
            async with asyncio.timeout(BOUND):
                while self._leftovers:
                    await asyncio.sleep(0.01)
        assert self._leftovers == [], self._leftovers

    @property
    def _leftovers(self) -> list[object]:
        """What a run left on the scheduler, the workers and the client."""
        extensions = self.scheduler.extensions
        kept = {
            "plugin": self.scheduler.worker_plugins,
            "queue": extensions["queues"].queues,
            "variable": extensions["variables"].variables,
            **{f"plugin of {worker.address}": worker.plugins for worker in self.workers},
        }
        found = [(kind, name) for kind, names in kept.items() for name in names]
        ours = [item for item in found if item[1].startswith("bctrl")]
        return [*self.scheduler.tasks.values(), *ours]


@asynccontextmanager
async def small_cluster(
    workers: int = 2,
    *,
    nthreads: int = 1,
    allowed_failures: int = 3,
    scheduler_address: str | None = None,
) -> AsyncIterator[SmallCluster]:
    """Run a cluster until the block is left.

    Args:
        workers: The number of workers.
        nthreads: The threads of each worker.
        allowed_failures: The workers that a task may kill.
        scheduler_address: The address of a scheduler in another process.
    """
    async with AsyncExitStack() as stack:
        scheduler: Scheduler | None = None
        if scheduler_address is None:
            scheduler = Scheduler(
                host="127.0.0.1",
                port=0,
                dashboard_address=":0",
                allowed_failures=allowed_failures,
            )
            await stack.enter_async_context(scheduler)
            scheduler_address = scheduler.address
        cluster = SmallCluster(scheduler_address, scheduler)
        stack.push_async_callback(cluster.close_workers)
        for _ in range(workers):
            await cluster.add_worker(nthreads)
        cluster.client = await stack.enter_async_context(connect(scheduler_address))
        yield cluster


_SCHEDULER = """
import asyncio
from distributed import Scheduler

async def main():
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address=":0") as scheduler:
        print(scheduler.address, flush=True)
        await scheduler.finished()

asyncio.run(main())
"""


@contextmanager
def scheduler_process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a scheduler in a process of its own; yield the process and its address."""
    with subprocess.Popen(
        [sys.executable, "-c", _SCHEDULER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()
    collect_lost_connections()


def faulty(emulator: Emulator, fault: Fault, count: int) -> list[tuple[str, str]]:
    """Add runtimes of which each stop meets a fault; return them as targets."""
    targets = add_runtimes(emulator, count)
    for target in targets:
        emulator.poison(*target, fault)
    return targets


class Running(NamedTuple):
    """A bulk stop on a cluster that runs in a task."""

    batch: StopBatch
    task: asyncio.Task[StopReport]
    emulator: Emulator

    @property
    def engine(self) -> ClusterRun:
        return cast("ClusterRun", self.batch._run)

    async def ended(self) -> StopReport:
        """Wait for its end; check that each target has a result, and none that is not proven."""
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(self.task, BOUND)
        report = self.batch.report
        assert report.counts.total() == report.total == self.batch.read
        for outcome in report.failures:
            if outcome.result is StopResult.NOT_SENT:
                assert self.emulator.received[outcome.target] == 0
        return report


async def begin(
    cluster: SmallCluster,
    emulator: Emulator,
    targets: Any,  # noqa: ANN401 - tests pass wrong inputs too.
    requests: int,
    **options: Any,  # noqa: ANN401 - `stop_runtimes` checks them.
) -> Running:
    """Start a bulk stop; return it once there were so many requests."""
    batch = stop_runtimes(cluster.client, targets, **options)
    running = Running(batch, asyncio.create_task(batch), emulator)
    await wait_for_requests(emulator, requests)
    return running
