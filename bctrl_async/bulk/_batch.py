"""The handle of a bulk stop: await it for its report, or iterate over its outcomes."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections import Counter, deque
from collections.abc import Awaitable, Coroutine, Generator
from contextlib import suppress
from functools import partial
from typing import Any, Self

from bctrl_async.bulk._cancel import CancelLevel, wait_shielded
from bctrl_async.bulk._run import Run
from bctrl_async.bulk._state import Progress
from bctrl_async.errors import BctrlConfigError, BctrlError
from bctrl_async.outcomes import StopOutcome, StopReport, StopResult

_MAX_UNREAD = 100
"""The most unread outcomes; beyond them, workers wait for the reader."""

_runners: set[asyncio.Task[None]] = set()


class OutcomeBuffer:
    """A queue of outcomes between the workers of a bulk stop and its readers.

    A worker waits while more than `limit` are unread. An `asyncio.Queue` would cost a
    coroutine for each outcome, even if there is nothing to wait for.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queue: deque[StopOutcome] = deque()
        self._has_outcome = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_ended = False

    def put(self, outcome: StopOutcome) -> Awaitable[object] | None:
        """Add an outcome; return what its worker must await if too many are unread."""
        self._queue.append(outcome)
        self._has_outcome.set()
        if len(self._queue) <= self._limit:
            return None
        self._has_room.clear()
        return self._has_room.wait()

    async def get(self) -> StopOutcome | None:
        """Return the next outcome, waiting if necessary; None at the end."""
        while not self._queue:
            if self._has_ended:
                return None
            self._has_outcome.clear()
            await self._has_outcome.wait()
        outcome = self._queue.popleft()
        if len(self._queue) <= self._limit:
            self._has_room.set()
        return outcome

    def end(self) -> None:
        """Give readers the unread outcomes, and then None."""
        self._has_ended = True
        self._has_outcome.set()

    def discard(self) -> None:
        """Discard the unread outcomes, and give readers None."""
        self._queue.clear()
        self.end()


class StopBatch(Coroutine[object, object, StopReport]):
    """A bulk stop, made by `BctrlSession.stop_runtimes`; it runs once.

    Await it for its `StopReport`, or enter it and iterate over its outcomes:

        async with session.stop_runtimes(targets) as batch:
            async for outcome in batch:
                ...

    Leaving the block early cancels the run. The attributes can be read at any time,
    also after an exception.
    """

    # `__del__` needs these even if the constructor was not reached.
    _has_started = True
    _runner: asyncio.Task[None] | None = None

    def __init__(self, run: Run) -> None:
        self._run = run
        self._whole_run: Coroutine[object, object, StopReport] | None = None
        self._outcomes = OutcomeBuffer(_MAX_UNREAD)
        self._has_started = False

    @property
    def counts(self) -> Counter[StopResult]:
        """The number of outcomes so far, by result."""
        return Counter(self._run.ledger.tally.counts)

    @property
    def read(self) -> int:
        """The number of targets read so far."""
        return self._run.source.count

    @property
    def total(self) -> int | None:
        """The number of targets; None while it is unknown.

        The number of an input without a length is known at its end.
        """
        source = self._run.source
        if source.length is None and source.is_exhausted:
            return source.count
        return source.length

    @property
    def progress(self) -> Progress:
        """The activity of the run at this moment."""
        return self._run.progress

    @property
    def retries(self) -> int:
        """The number of retries of the targets that have their outcome."""
        return self._run.ledger.tally.retries

    @property
    def ended_early(self) -> BctrlError | None:
        """The reason why the run ended early, such as its deadline, or None."""
        return self._run.state.ended_early

    @property
    def report(self) -> StopReport:
        """The report on the targets read so far; it is not `ok` before the run ends."""
        return self._run.ledger.report(self._run.source.count)

    def stop_reading(self) -> None:
        """Stop reading targets, send no new stops, and wait for requests in flight.

        Stops that may have taken effect are still retried. All other targets that were
        read, and the rest of an input with a length, become `not_sent`. Polls end.
        """
        self._run.state.ask_to_end(
            "the run was asked to start no more stops", CancelLevel.READING
        )

    def abort(self) -> None:
        """Abandon requests in flight (`unknown`) and send nothing more (`not_sent`).

        Unlike cancellation, the run still delivers every outcome and returns its
        report. To call it from a thread, use `loop.call_soon_threadsafe`.
        """
        self._run.state.ask_to_end("the run was aborted", CancelLevel.IN_FLIGHT)

    def __await__(self) -> Generator[object, object, StopReport]:
        return self._run_to_its_end().__await__()

    def send(self, value: object) -> object:
        """Resume the run: the coroutine protocol of `asyncio.create_task`."""
        return self._coroutine().send(value)

    def throw(self, *error: Any) -> object:  # noqa: ANN401 - old and new signatures.
        """Raise an exception in the run, as the cancellation of a task does."""
        return self._coroutine().throw(*error)

    def close(self) -> None:
        """Close the coroutine of a run that `send` has started."""
        self._has_started = True
        if self._whole_run is not None:
            self._whole_run.close()

    def _coroutine(self) -> Coroutine[object, object, StopReport]:
        self._has_started = True
        if self._whole_run is None:
            self._whole_run = self._run_to_its_end()
        return self._whole_run

    def __del__(self) -> None:
        if not self._has_started:
            warnings.warn(
                "a bulk stop was never awaited or entered: nothing was stopped",
                RuntimeWarning,
                stacklevel=1,
                source=self,
            )
        if self._runner is not None and not self._runner.done():
            # The handle was garbage-collected inside its block, perhaps by another
            # thread or after the loop closed.
            with suppress(RuntimeError):
                self._runner.get_loop().call_soon_threadsafe(self._runner.cancel)

    async def __aenter__(self) -> Self:
        self._start()
        self._run.receivers.append(self._outcomes.put)
        # The task does not refer to this handle: dropping the handle ends the task.
        self._runner = asyncio.create_task(self._run.feed())
        self._runner.add_done_callback(partial(_end, self._run, self._outcomes))
        # The event loop keeps only weak references to tasks.
        _runners.add(self._runner)
        self._runner.add_done_callback(_runners.discard)
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if self._runner is not None:  # pragma: no branch - it was entered.
            self._runner.cancel()
            await wait_shielded(self._runner)
        # An ended run may have left outcomes, which can only be read within the block.
        self._outcomes.discard()
        if exc_type is None:
            self._raise_error_if_any()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StopOutcome:
        if self._runner is None:
            raise BctrlConfigError(
                "the bulk stop was not entered",
                advice="Iterate within `async with … as batch`",
            )
        outcome = await self._outcomes.get()
        if outcome is not None:
            return outcome
        self._raise_error_if_any()
        raise StopAsyncIteration

    def _raise_error_if_any(self) -> None:
        """Raise the error of the run, if any, once."""
        error = self._run.error
        self._run.error = None
        if error is not None:
            raise error

    def _start(self) -> None:
        self._has_started = True
        if self._run.ledger.started_at is not None:
            raise BctrlConfigError(
                "the bulk stop has started already",
                advice="Iterate over it or read its .report; "
                "for another run, make a new one",
            )
        self._run.open()
        self._run.ledger.started_at = time.monotonic()

    async def _run_to_its_end(self) -> StopReport:
        self._start()
        await self._run.execute()
        return self.report


def _end(run: Run, outcomes: OutcomeBuffer, runner: asyncio.Task[None]) -> None:
    """End the buffer of a run that is over."""
    if runner.cancelled():
        # A task that is cancelled before its first step cannot cancel the run. No more
        # outcomes are delivered.
        run.state.cancel()
        outcomes.discard()
    outcomes.end()
