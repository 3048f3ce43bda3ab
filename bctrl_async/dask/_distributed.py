"""All that is used of dask.distributed, which has few types: its client, and its workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError
from typing import Any, cast

from distributed import Client, Future, KilledWorker, Worker, get_worker
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.protocol import pickle
from distributed.worker_state_machine import SecedeEvent

from bctrl_async.errors import BctrlConfigError, BctrlError

__all__ = [
    "Client",
    "Cluster",
    "DiedError",
    "Future",
    "Host",
    "HostPlugin",
    "LostError",
    "Worker",
    "pickled",
    "unpickled",
]

_RUNS = "bctrl-async"
"""The key of the runs in the metadata of the scheduler. Each is there only while it goes on, as an
empty text, or ends: a worker that begins a chunk too late does not find it, and sends nothing."""


class DiedError(BctrlError):
    """All workers died that had a task."""


_LATE = 1.0
"""Seconds for which a message may be on its way."""


def _ignore(event: object) -> None: ...


class LostError(Exception):
    """The client has lost its scheduler, or was closed."""


def pickled(value: object) -> bytes:
    """Pickle a value as dask does, also with functions of the main module."""
    dumps: Callable[[object], bytes] = pickle.dumps
    return dumps(value)


def unpickled(data: bytes) -> Any:  # noqa: ANN401 - it is what was pickled.
    """Return a value that was pickled."""
    loads: Callable[[bytes], Any] = pickle.loads
    return loads(data)


def task_key(run: str, number: int) -> str:
    """Return the key of the task of a chunk."""
    return f"{run}-{number}"


class Cluster:
    """A cluster, as the coordinator of a run sees it.

    Args:
        client: The client.
        run: The name of the run: that of its topic, of its tasks and of the plugin of its workers.
    """

    def __init__(self, client: Client, run: str) -> None:
        # Few of its methods have types.
        self._client: Any = client
        self._run = run

    def check_usable(self) -> None:
        """Check that the client runs in the current event loop.

        Raises:
            BctrlConfigError: It does not.
        """
        client = self._client
        if client.status != "running":
            raise BctrlConfigError(
                f"the dask client cannot be used: it is {client.status}",
                advice="Stop runtimes within `async with Client(…, asynchronous=True) as client`",
                argument="client",
            )
        if client.loop.asyncio_loop is not asyncio.get_running_loop():
            raise BctrlConfigError(
                "the dask client belongs to another event loop",
                advice="Use `async with Client(…, asynchronous=True) as client` in this one",
                argument="client",
            )

    def subscribe(self, receive: Callable[[bytes], None]) -> None:
        """Call a function with each message of the run."""
        # If the client was closed meanwhile, that is found when the workers are counted.
        self._client.subscribe_topic(self._run, lambda event: receive(event[1]))

    def unsubscribe(self) -> None:
        """Call that function no more."""
        # `unsubscribe_topic` would keep it, and with it the run.
        handlers: dict[str, object] = self._client._event_handlers  # noqa: SLF001
        handlers[self._run] = _ignore
        # Dask logs an error for a message without a function, and some may be on their way.
        asyncio.get_running_loop().call_later(_LATE, handlers.pop, self._run, None)

    async def publish(self, message: bytes) -> None:
        """Send a message to the coordinator itself, after those that the scheduler has."""
        await self._call(self._client.log_event, self._run, message)

    def submit(
        self, number: int, function: Callable[..., Coroutine[object, object, bytes]], *args: object
    ) -> Future[bytes]:
        """Submit the task of a chunk.

        Raises:
            LostError: The client was closed.
        """
        try:
            future = self._client.submit(
                function, self._run, *args, key=task_key(self._run, number)
            )
        except Exception as error:
            raise LostError(str(error)) from error
        return cast("Future[bytes]", future)

    def release(self, future: Future[bytes]) -> None:
        """Forget a task: it is cancelled if it has not ended."""
        release: Callable[[], None] = future.release
        release()

    async def result(self, future: Future[bytes]) -> bytes:
        """Return the result of a task, or raise its error.

        Raises:
            LostError: The client has lost its scheduler, or was closed.
            DiedError: All workers died that had the task, in turn.
            BctrlError: The task failed.
        """
        try:
            return cast("bytes", await future)
        except CancelledError as error:
            raise LostError(f"the client is {self._client.status}") from error
        except BctrlError:
            raise
        except Exception as error:
            raise _failure_of(error) from error

    async def count_workers(self) -> int:
        """Return the number of workers.

        Raises:
            LostError: The scheduler cannot be reached.
        """
        workers: dict[str, int] = await self._call(self._client.nthreads)
        return len(workers)

    async def set_state(self, state: bytes | None) -> None:
        """Tell the scheduler the state of the run, for workers that begin a chunk.

        Args:
            state: An empty text while it goes on, its encoded `End`, or None once it is over.

        Raises:
            LostError: The scheduler cannot be reached.
        """
        await self._call(self._client.set_metadata, [_RUNS, self._run], state)

    async def run_on_workers(self, function: Callable[..., object], *args: object) -> None:
        """Call a function with the run and the keyword `dask_worker` on all workers.

        Raises:
            LostError: The scheduler cannot be reached.
        """
        await self._call(self._client.run, function, self._run, *args, on_error="ignore")

    async def forget(self) -> None:
        """Remove all that the scheduler keeps of the run.

        Raises:
            LostError: The scheduler cannot be reached.
        """

        # Defined here, it is pickled by value: the scheduler may be without this package.
        def forget(  # pragma: no cover - the copy is executed, by the scheduler.
            runs: str,
            run: str,
            late: float,
            dask_scheduler: Any,  # noqa: ANN401
        ) -> None:
            dask_scheduler.task_metadata.get(runs, {}).pop(run, None)
            # Dask has nothing public that ends a topic. A late message would begin it again.
            topics = dask_scheduler._broker._topics  # noqa: SLF001
            topics.pop(run, None)
            dask_scheduler.loop.call_later(late, topics.pop, run, None)

        await self._call(self._client.run_on_scheduler, forget, _RUNS, self._run, _LATE)

    async def _call(
        self, method: Callable[..., Awaitable[Any]], *args: object, **kwargs: object
    ) -> Any:  # noqa: ANN401 - what the method returns.
        try:
            return await method(*args, **kwargs)
        except Exception as error:
            # Of a scheduler that is gone, or a client that is closed: there is no common class.
            raise LostError(f"{type(error).__name__}: {error}") from error


def _failure_of(error: Exception) -> BctrlError:
    if isinstance(error, KilledWorker):
        return DiedError(
            f"{error.allowed_failures + 1} workers died that had its chunk",
            advice="Read the logs of the workers; a stop is safe to repeat",
        )
    if isinstance(error, ImportError | AttributeError):
        return BctrlConfigError(
            f"a worker cannot import bctrl_async, or the session= function: {error}",
            advice="Install the same packages on all workers",
        )
    return BctrlError(
        f"a worker failed: {type(error).__name__}: {error}", advice="Read the logs of the workers"
    )


HostPlugin = WorkerPlugin


class Host:
    """A worker of the cluster, as the code that it runs sees it.

    Args:
        worker: The worker.
        run: The name of the run.
    """

    def __init__(self, worker: Worker, run: str) -> None:
        self._worker: Any = worker
        self._run = run

    @classmethod
    def current(cls, run: str) -> Host:
        """Return the worker that runs the current task."""
        return cls(get_worker(), run)

    @property
    def address(self) -> str:
        """The address of the worker."""
        return cast("str", self._worker.address)

    @property
    def plugin(self) -> WorkerPlugin | None:
        """The plugin of the run."""
        return cast("WorkerPlugin | None", self._worker.plugins.get(self._run))

    async def add_plugin(self, plugin: WorkerPlugin) -> None:
        """Add the plugin of the run, which the worker tears down when it closes."""
        await self._worker.plugin_add(plugin, self._run)

    async def remove_plugin(self) -> None:
        """Remove the plugin of the run, if the worker has it, and tear it down."""
        if self.plugin is not None:
            await self._worker.plugin_remove(self._run)

    def publish(self, message: bytes) -> None:
        """Send a message to the coordinator."""
        self._worker.log_event(self._run, message)

    async def publish_and_wait(self, message: bytes) -> None:
        """Send a message to the coordinator, and wait until the scheduler has it."""
        await self._worker.scheduler.log_event(topic=self._run, msg=message)

    async def state(self) -> bytes | None:
        """Return the end of the run, an empty text while it goes on, or None if it is over."""
        state = await self._worker.scheduler.get_metadata(keys=[_RUNS, self._run], default=None)
        return cast("bytes | None", state)

    def secede(self, number: int, began: float) -> None:
        """Let the worker take another task while that of a chunk goes on.

        Dask's own `secede` is for threads, and this is the event that it sends.

        Args:
            number: The number of the chunk.
            began: The time at which it began, by `time.monotonic`.
        """
        self._worker.handle_stimulus(
            SecedeEvent(
                key=task_key(self._run, number),
                compute_duration=time.monotonic() - began,
                stimulus_id=f"secede-{time.time()}",
            )
        )
