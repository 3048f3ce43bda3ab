"""Hand out chunks to the workers of a cluster, and follow each to its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from bctrl_async._version import __version__
from bctrl_async.bulk._cancel import CancelLevel, RunState, wait_shielded
from bctrl_async.dask._chunks import Chunk
from bctrl_async.dask._distributed import Cluster, DiedError, Future, LostError
from bctrl_async.dask._messages import (
    AllRead,
    Barrier,
    Begun,
    End,
    Order,
    decode_message,
    decode_result,
    encode,
)
from bctrl_async.dask._worker import close_visit, end_visit, stop_chunk
from bctrl_async.errors import BctrlError
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import StopOutcome

_AHEAD = 2
"""Chunks for each worker that are not read to their end: it begins the next without waiting."""
_OPEN = 10
"""Chunks for each worker in all: some targets may take long, and hold up no others."""
_POLL = 0.5
"""Seconds between two counts of the workers."""
_SCHEDULER_PATIENCE = 60.0
"""Seconds after which a scheduler is given up that does not answer."""
_TRIES = 3
"""Times that a chunk is handed out that no worker has begun; some may have died of another one."""
_GRACE = 5.0
"""Seconds for the workers to send the outcomes of what was aborted."""


class Dispatcher:
    """The chunks of a run that are handed out and have not ended.

    Args:
        cluster: The cluster.
        recipe: The pickled recipe of the run.
        ending: Tells how much of the run is cancelled.
        record: Records an outcome.
        throttled: Counts answers that were 429 or 503.
        end_early: Ends the run, for a reason and up to a level.
        fail: Ends the run, which raises the error.
        changed: Called when there may be room for a chunk.

    Attributes:
        workers: The number of workers when they were last counted; None before.
        ends_at: The deadline by `time.monotonic`, or None.
    """

    def __init__(
        self,
        cluster: Cluster,
        recipe: bytes,
        ending: RunState,
        *,
        record: Callable[[StopOutcome], None],
        throttled: Callable[[int], None],
        end_early: Callable[[BctrlError, CancelLevel], None],
        fail: Callable[[BaseException], None],
        changed: Callable[[], None],
    ) -> None:
        self._cluster = cluster
        self._recipe = recipe
        self._ending = ending
        self._record = record
        self._throttled = throttled
        self._end_early = end_early
        self._fail = fail
        self._changed = changed
        self._count = 0
        self._chunks: dict[int, Chunk] = {}
        self._unread: set[int] = set()
        self._followers: dict[int, asyncio.Task[None]] = {}
        self._ends: list[asyncio.Task[None]] = []
        self._barrier = asyncio.Event()
        self._give_up: asyncio.TimerHandle | None = None
        self._is_open = False
        self._is_lost = False
        self.workers: int | None = None
        self.ends_at: float | None = None

    @property
    def has_room(self) -> bool:
        """True if the workers need a further chunk."""
        workers = self.workers or 1
        return len(self._unread) < _AHEAD * workers and len(self._chunks) < _OPEN * workers

    @property
    def open(self) -> int:
        """The number of targets that are handed out and have no settled outcome."""
        return sum(chunk.open for chunk in self._chunks.values())

    @property
    def all_read(self) -> bool:
        """True if the workers have begun all targets that are handed out."""
        return not self._unread

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """The tasks of the chunks that have not ended."""
        return list(self._followers.values())

    def begin(self) -> None:
        """Listen to the workers."""
        self._is_open = True
        self._cluster.subscribe(self._receive)

    async def watch(self) -> None:
        """Count the workers again and again, which also shows that the scheduler is there."""
        while True:
            try:
                async with asyncio.timeout(_SCHEDULER_PATIENCE):
                    if self.workers is None and self._ending.goes_on():
                        await self._cluster.set_state(b"")
                    self.workers = await self._cluster.count_workers()
            except LostError as error:
                self._lose(error)
                return
            except TimeoutError:
                waited = f"it did not answer for {_SCHEDULER_PATIENCE:g} s"
                self._lose(LostError(waited))
                return
            self._changed()
            if not self.workers and self._barrier.is_set():
                # The run is ended, and no worker is left that could send an outcome.
                self._abandon()
            await asyncio.sleep(_POLL)

    def hand_out(self, indices: Sequence[int], targets: Sequence[RuntimeRef]) -> None:
        """Hand out targets as a chunk."""
        self._submit(Chunk(self._next_number(), indices, targets))

    def _next_number(self) -> int:
        self._count += 1
        return self._count

    def _submit(self, chunk: Chunk) -> None:
        patience = None if self.ends_at is None else max(self.ends_at - time.monotonic(), 0.001)
        try:
            future = self._cluster.submit(
                chunk.number,
                stop_chunk,
                __version__,
                self._recipe,
                encode(Order(chunk.number, chunk.targets, patience)),
            )
        except LostError as error:
            self._lose(error)
            self._end(chunk)
            return
        except BaseException:
            self._end(chunk)
            raise
        self._chunks[chunk.number] = chunk
        self._unread.add(chunk.number)
        follower = asyncio.create_task(self._follow(chunk, future))
        self._followers[chunk.number] = follower
        # Not at the end of the task, which may be cancelled before its first step.
        follower.add_done_callback(partial(self._on_end, chunk, future))

    async def _follow(self, chunk: Chunk, future: Future[bytes]) -> None:
        try:
            result = decode_result(await self._cluster.result(future))
            if not chunk.is_known:
                # Messages were lost.
                for message in result.messages:
                    self._receive(message)
        except LostError as error:
            self._lose(error)
        except BctrlError as error:
            self._on_failure(chunk, error.with_traceback(None))
        else:
            self._on_ended_early(result.ended_early)
            self._throttled(result.throttled)

    def _on_failure(self, chunk: Chunk, failure: BctrlError) -> None:
        if not chunk.has_begun and self._ending.goes_on():
            if isinstance(failure, DiedError) and chunk.tries < _TRIES:
                # Dask counts the deaths also for chunks that only waited for such a worker.
                self._submit(chunk.again(self._next_number()))
                return
            # No chunk would fare better.
            self._end_early(failure, CancelLevel.WAITING)
        self._end(chunk, failure)

    def _on_end(self, chunk: Chunk, future: Future[bytes], follower: asyncio.Task[None]) -> None:
        del self._chunks[chunk.number], self._followers[chunk.number]
        self._unread.discard(chunk.number)
        self._cluster.release(future)
        self._end(chunk)
        if not follower.cancelled() and (error := follower.exception()) is not None:
            self._fail(error)
        self._changed()

    def _end(self, chunk: Chunk, reason: BctrlError | None = None) -> None:
        for outcome in chunk.end(reason or self._ending.reason):
            self._record(outcome)

    def _receive(self, data: bytes) -> None:
        try:
            self._on_message(data)
        except BaseException as error:  # noqa: BLE001 - dask would only log it.
            self._fail(error)

    def _on_message(self, data: bytes) -> None:
        message = decode_message(data)
        if isinstance(message, Barrier):
            self._barrier.set()
            return
        chunk = self._chunks.get(message.chunk)
        if chunk is None:
            return
        if isinstance(message, Begun):
            chunk.begin()
        elif isinstance(message, AllRead):
            self._unread.discard(chunk.number)
            self._changed()
        else:
            for outcome in chunk.add(message.known):
                self._record(outcome)
            self._on_ended_early(message.ended_early)

    def _on_ended_early(self, reason: BctrlError | None) -> None:
        """End the run because a worker has ended a chunk, as for a rejected key."""
        if reason is not None and self._ending.goes_on():
            self._end_early(reason, CancelLevel.WAITING)

    def end(self, reason: BctrlError, level: CancelLevel) -> None:
        """Tell the workers how much of the run is cancelled, and why."""
        if not self._is_open:
            return
        # The workers must deliver their outcomes.
        end = End(reason, min(level, CancelLevel.IN_FLIGHT))
        # A coroutine may be closed when its loop has ended.
        with suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            self._ends.append(loop.create_task(self._tell(encode(end))))
            if level >= CancelLevel.IN_FLIGHT and self._give_up is None:
                self._give_up = loop.call_later(_GRACE, self._abandon)

    async def _tell(self, end: bytes) -> None:
        with suppress(LostError, TimeoutError):
            async with asyncio.timeout(_GRACE):
                await self._cluster.set_state(end)
                await self._cluster.publish(encode(Barrier()))
                await self._barrier.wait()
                # No worker begins these any more.
                for number, follower in self._followers.items():
                    if not self._chunks[number].has_begun:
                        follower.cancel()
                await self._cluster.run_on_workers(end_visit, end)

    def _lose(self, error: LostError) -> None:
        """End the run, since the workers cannot be reached any more."""
        self._is_lost = True
        reason = BctrlError(
            f"the connection to the scheduler of dask was lost: {error}",
            advice="Stop the rest again on another cluster: a stop is safe to repeat",
        )
        self._end_early(reason, CancelLevel.IN_FLIGHT)
        self._barrier.clear()
        self._abandon()

    def _abandon(self) -> None:
        """Wait for no further outcome."""
        for number, follower in self._followers.items():
            if not self._barrier.is_set():
                # The message that says so may be on its way, or lost.
                self._chunks[number].has_begun = True
            follower.cancel()

    def close_later(self) -> None:
        """Close in the background, once all chunks have ended."""
        with suppress(RuntimeError):
            self._closing = asyncio.get_running_loop().create_task(self._close_after_chunks())

    async def _close_after_chunks(self) -> None:
        while self._followers:
            await asyncio.wait(self.tasks)
            # Their callbacks remove them.
            await asyncio.sleep(0)
        await self.close()

    async def close(self) -> None:
        """Close the sessions of the workers; a cancellation takes effect after that."""
        self._is_open = False
        for task in self._ends:
            task.cancel()
        if self._give_up is not None:
            self._give_up.cancel()
        closing = asyncio.create_task(self._close())
        closing.add_done_callback(lambda _: self._cluster.unsubscribe())
        await wait_shielded(closing)

    async def _close(self) -> None:
        for step in (
            # First, so that a chunk that begins now does not make a session that is never closed.
            partial(self._cluster.set_state, None),
            partial(self._cluster.run_on_workers, close_visit),
            self._cluster.forget,
        ):
            if not self._is_lost:
                with suppress(LostError, TimeoutError):
                    async with asyncio.timeout(_GRACE):
                        await step()
