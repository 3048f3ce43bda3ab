"""Cancel a bulk stop level by level: the state of the run, its workers, and their scopes."""

from __future__ import annotations

import asyncio
from enum import IntEnum
from typing import Self

from bctrl_async._calls.call import Call, as_failure
from bctrl_async._lifetime import is_cancelled
from bctrl_async.bulk._parked import Parked
from bctrl_async.bulk._targets import Input
from bctrl_async.errors import BctrlError
from bctrl_async.models import Runtime

_ENDED = BctrlError("the run has ended")


class CancelLevel(IntEnum):
    """The extent of a cancellation. Each level includes the levels before it."""

    READING = 0
    """No new target is sent, and polls end. Requests in flight may still be answered;
    stops that may have taken effect are retried."""
    WAITING = 1
    """No more requests are sent; requests in flight may still be answered."""
    IN_FLIGHT = 2
    """Requests in flight are abandoned; outcomes are still delivered."""
    DELIVERY = 3
    """Outcomes are recorded and no longer delivered."""


class CancelScope:
    """A block of a task that another task can cancel once, like anyio's `CancelScope`.

    Its task may enter it again after leaving it, but may not nest it. `asyncio.timeout` does not
    fit: rescheduled to now, it cancels in the next turn of the loop, when the task may have left
    the block. `cancelled_caught` is True if the block was left because of `cancel`.
    """

    __slots__ = ("_cancel_called", "_cancelling", "_entered", "_task", "cancelled_caught")

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._entered = False
        self._cancelling = 0
        self._cancel_called = False
        self.cancelled_caught: bool = False

    def __enter__(self) -> Self:
        task = self._task
        if task is None:
            self._task = task = asyncio.current_task()
        self._cancelling = 0 if task is None else task.cancelling()
        self._entered = True
        self._cancel_called = self.cancelled_caught = False
        return self

    def cancel(self) -> None:
        """Cancel the block once, if a task is in it."""
        task = self._task
        if task is None or not self._entered or self._cancel_called:
            return
        # The current task would be cancelled at its next await, perhaps after the block.
        if task is not asyncio.current_task():
            self._cancel_called = True
            task.cancel()

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> bool:
        self._entered = False
        if self._cancel_called and self._task is not None:
            # A cancellation from outside the scope remains in the count, and propagates.
            only_ours = self._task.uncancel() <= self._cancelling
            self.cancelled_caught = only_ours and exc_type is asyncio.CancelledError
        return self.cancelled_caught


class Worker:
    """A worker of a bulk stop, or a poller beside the workers, and the call that it is making."""

    __slots__ = ("_level", "_scope", "call", "has_slot")

    def __init__(self) -> None:
        self.has_slot: bool = False
        self.call: Call[Runtime] | None = None
        self._level = CancelLevel.READING
        self._scope = CancelScope()

    @property
    def is_stopping(self) -> bool:
        """True while its call is a stop, not a poll."""
        return self.call is not None and self.call.operation.stops

    def scope(self, level: CancelLevel = CancelLevel.READING) -> CancelScope:
        """Return the worker's scope, to be cancelled at this level and above."""
        self._level = level
        return self._scope

    def cancel(self, level: CancelLevel) -> bool:
        """Cancel the scope that the worker is in; return True if that ends a stop."""
        if level < self._level or (self.call is not None and level < _needed_level(self.call)):
            return False
        self._scope.cancel()
        return self.is_stopping


def _needed_level(call: Call[Runtime]) -> CancelLevel:
    """Return the lowest level that cancels a call."""
    if not call.operation.stops:
        return CancelLevel.READING
    if call.may_be_sent:
        return CancelLevel.IN_FLIGHT
    return CancelLevel.WAITING if call.retries.in_doubt else CancelLevel.READING


class RunState:
    """The state of a run that its parts share: its workers, and how much of it is cancelled.

    `level` and `reason` say how far and why it is cancelled, `not_begun` is the error of targets
    that are not sent, `ended_early` the reason for an early end, and `asked` the caller's reasons.
    `failure` is an exception that the run is to raise.
    """

    def __init__(self, source: Input, parked: Parked) -> None:
        self._source = source
        self._parked = parked
        # A dict keeps the order: a set would be cancelled in another order each time.
        self.workers: dict[Worker, None] = {}
        self.level: CancelLevel | None = None
        self.reason: BctrlError = _ENDED
        self.not_begun: BctrlError = _ENDED
        self.ended_early: BctrlError | None = None
        self.asked: list[BctrlError] = []
        self.failure: BaseException | None = None

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return sum(each.call is not None and each.call.in_flight for each in self.workers)

    def goes_on(self) -> bool:
        """Return True if nothing is cancelled."""
        return self.level is None

    def set_ended_early(self, reason: BctrlError) -> None:
        """Set why the run ended early; the first reason stays."""
        self.ended_early = self.ended_early or reason

    def cancel(self) -> None:
        """Cancel the run: record the other targets, and deliver no more outcomes."""
        self.ask_to_end("the run was cancelled", CancelLevel.DELIVERY)

    def fail(self, error: BaseException) -> None:
        """End the run with an exception; the first is raised."""
        self.failure = self.failure or error
        self.end_early(BctrlError(f"the run failed: {error!r}"), CancelLevel.DELIVERY)

    def end_with(self, error: BaseException, source: str) -> None:
        """End the run with the error of a task; `source` names the code that raised it."""
        if isinstance(error, asyncio.CancelledError):
            if is_cancelled():
                self.cancel()
            else:
                self.fail(as_failure(error, source))
        elif not isinstance(error, GeneratorExit):
            self.fail(error)

    def ask_to_end(self, why: str, level: CancelLevel) -> None:
        """End the run early at its caller's request, without logging a warning."""
        if self.level is not None and level <= self.level:
            # In a cancelled scope, anyio asks again at every turn of the loop.
            return
        self.asked.append(BctrlError(why))
        self.end_early(self.asked[-1], level)

    def end_early(self, reason: BctrlError, level: CancelLevel) -> None:
        """Cancel as much of the run as the level says, for this reason."""
        is_stopping = self._parked.count or any(worker.is_stopping for worker in self.workers)
        leaves_stops = level is not CancelLevel.READING and is_stopping
        if leaves_stops or not self._source.exhausted:
            self.set_ended_early(reason)
        if self.level is None:
            self._source.end()
        if self.level is None or level > self.level:
            self.level, self.reason = level, reason
            self.not_begun = BctrlError(f"not sent: {reason.summary}")
        for worker in list(self.workers):
            if worker.cancel(level):
                self.set_ended_early(reason)
        self._parked.wake_all()


async def wait_shielded(task: asyncio.Task[object]) -> None:
    """Wait for a task to end; a cancellation of the caller takes effect only then."""
    cancelled: asyncio.CancelledError | None = None
    # The wait is repeated: anyio cancels a task at every turn of the loop.
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
