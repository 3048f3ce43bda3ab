"""A worker's part of a bulk stop on a cluster: one session for each run, and the chunks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import copy

from bctrl_async._version import __version__
from bctrl_async.bulk import StopBatch
from bctrl_async.bulk._cancel import wait_shielded
from bctrl_async.dask._distributed import Host, HostPlugin, Worker, unpickled
from bctrl_async.dask._messages import (
    AllRead,
    Begun,
    End,
    Known,
    Order,
    Outcomes,
    Recipe,
    Result,
    decode_end,
    decode_order,
    encode,
)
from bctrl_async.errors import BctrlConfigError, BctrlError
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import StopOutcome, StopReport, outcome_of
from bctrl_async.session import BctrlSession

_REPORT_EVERY = 0.1
"""Seconds between two messages with outcomes."""
_MAX_OUTCOMES = 500
"""The outcomes of one message: dask keeps the last thousand messages of a topic."""
_OVER = BctrlError("the run is over")
_IDLE = 60.0
"""Seconds without a chunk after which a session is closed: its coordinator may be gone."""


async def stop_chunk(run: str, version: str, recipe: bytes, order: bytes) -> bytes:
    """Stop the targets of a chunk: the task that a worker runs.

    Args:
        run: The name of the run.
        version: The version of the coordinator.
        recipe: The pickled `Recipe`.
        order: The encoded `Order`.

    Returns:
        The encoded `Result`.

    Raises:
        BctrlConfigError: The worker has another version, or cannot make its session.
    """
    host = Host.current(run)
    if version != __version__:
        raise BctrlConfigError(
            f"the worker {host.address} has bctrl_async {__version__}, not {version}",
            advice="Install the same version on all workers",
        )
    chunk = decode_order(order)
    visit = host.plugin
    if not isinstance(visit, Visit):
        visit = Visit(host, unpickled(recipe))
        await host.add_plugin(visit)
        # Asked after that: the end of a run first removes its state, then the plugins.
        if await host.state() is None:
            await host.remove_plugin()
            return _not_sent(chunk, _OVER)
    return await visit.stop(chunk)


def _not_sent(order: Order, reason: BctrlError) -> bytes:
    error = BctrlError(f"not sent: {reason.summary}")
    known = [
        Known.of(outcome_of(target, error, index=number))
        for number, target in enumerate(order.targets)
    ]
    return encode(Result([encode(Outcomes(order.number, known))]))


def end_visit(run: str, end: bytes, dask_worker: Worker) -> None:
    """End the chunks of a run on a worker: called there by the coordinator."""
    visit = Host(dask_worker, run).plugin
    if isinstance(visit, Visit):
        visit.end(decode_end(end))


async def close_visit(run: str, dask_worker: Worker) -> None:
    """Close the session of a run on a worker: called there by the coordinator."""
    await Host(dask_worker, run).remove_plugin()


class Visit(HostPlugin):
    """A run on one worker: its session, and the chunks that are stopped with it.

    It is a plugin of the worker, so that the session is closed with the worker.

    Args:
        host: The worker.
        recipe: The recipe of the run.

    Raises:
        BctrlConfigError: The session cannot be made, or has another server than the run.
    """

    def __init__(self, host: Host, recipe: Recipe) -> None:
        self._host = host
        self._recipe = recipe
        self._session = _session(host, recipe)
        self._turn = asyncio.Lock()
        self._batches: set[StopBatch] = set()
        self._ended: End | None = None
        self._chunks = 0
        self._closing: asyncio.TimerHandle | None = None

    async def teardown(self, worker: object) -> None:
        """Close the session."""
        del worker
        self._keep_open()
        for batch in self._batches:
            batch.abort()
        await self._session.close()

    def end(self, end: End) -> None:
        """End the chunks, as much as the level says, and those that come."""
        self._ended = end
        for batch in self._batches:
            # The handle has no method with the reason of a coordinator.
            batch._run.state.end_early(end.reason, end.level)  # noqa: SLF001

    async def stop(self, order: Order) -> bytes:
        """Stop the targets of a chunk, and return the encoded `Result`."""
        self._keep_open()
        self._chunks += 1
        try:
            return await self._stop(order)
        finally:
            self._chunks -= 1
            if not self._chunks:
                self._closing = asyncio.get_running_loop().call_later(_IDLE, self._begin_closing)

    def _keep_open(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None

    def _begin_closing(self) -> None:
        # The event loop has weak references only.
        self._removal = asyncio.create_task(self._close())

    async def _close(self) -> None:
        if not self._chunks:
            await self._host.remove_plugin()

    async def _stop(self, order: Order) -> bytes:
        began, number = time.monotonic(), order.number
        account = _Account(self._host, number)
        # In turn, so that a worker that dies has begun no more than it needs to be busy.
        async with self._turn:
            # The coordinator must know before anything is sent: this worker may die at once.
            await self._host.publish_and_wait(encode(Begun(number)))
            # Asked after that: what is begun after the end is known not to be sent.
            state = await self._host.state()
            if state != b"" or self._ended is not None:
                ended = self._ended or (decode_end(state) if state else None)
                return _not_sent(order, _OVER if ended is None else ended.reason)
            items = _Items(order.targets)
            batch = self._session.stop_runtimes(
                items,
                concurrency=self._recipe.concurrency,
                deadline=order.patience,
                on_outcome=account.add,
                timeout=self._recipe.timeout,
                retry=self._recipe.retry,
                verify=self._recipe.verify,
            )
            account.batch = batch
            self._batches.add(batch)
            stopping = asyncio.create_task(batch)
            stopping.add_done_callback(lambda _: items.all_read.set())
            try:
                await items.all_read.wait()
            except asyncio.CancelledError:
                await self._cancel(stopping, batch)
                raise
        self._host.publish(encode(AllRead(number)))
        self._host.secede(number, began)
        try:
            report = await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await self._cancel(stopping, batch)
            raise
        finally:
            self._batches.discard(batch)
        return account.result(report)

    async def _cancel(self, stopping: asyncio.Task[StopReport], batch: StopBatch) -> None:
        self._batches.discard(batch)
        stopping.cancel()
        with suppress(asyncio.CancelledError):
            await wait_shielded(stopping)


def _session(host: Host, recipe: Recipe) -> BctrlSession:
    arguments = {} if recipe.pace is None else {"pace": recipe.pace}
    try:
        session = recipe.make_session(**arguments)
    except BctrlConfigError as error:
        raise BctrlConfigError(
            f"the worker {host.address} cannot make its session: {error.summary}",
            advice=error.advice,
            argument=error.argument,
        ) from None
    except Exception as error:
        raise BctrlError(
            f"the worker {host.address} cannot make its session: {type(error).__name__}: {error}",
            advice="Read the logs of the workers",
        ) from error
    if not isinstance(session, BctrlSession):
        raise BctrlConfigError(
            f"the session= function returned {type(session).__name__}, not a BctrlSession",
            argument="session",
        )
    if session.base_url != recipe.base_url:
        raise BctrlConfigError(
            f"the worker {host.address} would send to {session.base_url}, and the run is for "
            f"{recipe.base_url}",
            advice="Set BCTRL_BASE_URL alike here and on all workers, or pass base_url=",
            argument="base_url",
        )
    return session


class _Items:
    """The targets of a chunk, with an event that is set once all are read."""

    def __init__(self, targets: Sequence[RuntimeRef]) -> None:
        self._targets = targets
        self.all_read = asyncio.Event()

    def __len__(self) -> int:
        return len(self._targets)

    def __iter__(self) -> Iterator[RuntimeRef]:
        yield from self._targets
        self.all_read.set()


class _Account:
    """The outcomes of a chunk, sent to the coordinator as they are known.

    Args:
        host: The worker.
        number: The number of the chunk.

    Attributes:
        batch: The bulk stop of the chunk.
    """

    _timer: asyncio.TimerHandle

    def __init__(self, host: Host, number: int) -> None:
        self._host = host
        self._number = number
        self._new: list[Known] = []
        self._messages: list[bytes] = []
        self.batch: StopBatch | None = None

    def add(self, outcome: StopOutcome) -> None:
        """Add an outcome."""
        if not self._new:
            self._timer = asyncio.get_running_loop().call_later(_REPORT_EVERY, self._send)
        self._new.append(Known.of(outcome))
        if len(self._new) >= _MAX_OUTCOMES:
            self._send()

    def _send(self) -> None:
        self._timer.cancel()
        ended = None if self.batch is None else self.batch.ended_early
        message = encode(Outcomes(self._number, self._new, self._named(ended)))
        self._new = []
        self._messages.append(message)
        self._host.publish(message)

    def result(self, report: StopReport) -> bytes:
        """Return the encoded `Result` of a chunk that has ended."""
        if self._new:
            self._send()
        return encode(Result(self._messages, report.throttled, self._named(report.ended_early)))

    def _named(self, reason: BctrlError | None) -> BctrlError | None:
        """Return the reason with the worker in it: its key, or its network, may be another."""
        if reason is None:
            return None
        named = copy(reason)
        named.summary = f"the worker {self._host.address}: {reason.summary}"
        return named
