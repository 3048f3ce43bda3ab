"""The state of a bulk stop: its workers, its cancellation and its progress."""

from __future__ import annotations

import asyncio
from collections import Counter

import msgspec

from bctrl_async._calls.bulk_calls import BulkCall
from bctrl_async._calls.call import as_error
from bctrl_async._lifetime import is_cancelled
from bctrl_async.bulk._cancel import CancelLevel, CancelScope
from bctrl_async.bulk._input import Input
from bctrl_async.bulk._parked import Parked
from bctrl_async.bulk._polls import Polls
from bctrl_async.errors import BctrlError

_ENDED = BctrlError("the run has ended")


class Progress(msgspec.Struct, frozen=True):
    """The activity of a bulk stop at one moment, as `StopBatch.progress` returns it.

    Args:
        in_flight: The number of requests in flight.
        polling: The number of runtimes that were asked to stop, and are polled until
            they end (`verify=`).
        polling_for: The seconds after which the time of all that are polled is up, or
            that of the run (`deadline=`); 0 once polls have ended.
        polling_failures: The number of them whose last poll failed, by its result as in
            `retrying`: nobody knows whether they have ended.
        is_full: True while a hundred thousand are polled, so that no target is read
            until some have ended.
        is_throttled: True while the session slows down because of a 429 or 503.
        retry_after: The seconds for which the server has asked to wait (Retry-After); 0
            if it has not.
        is_unanswered: True while the server answers nothing and is only probed.
        is_looking: True while the workspace is listed once more, at the end.
        retrying: The number of targets that wait for another attempt, by the result of
            their last: a status such as `"500"`, or an error's class such as
            `"BctrlTimeoutError"`.
    """

    in_flight: int
    polling: int = 0
    polling_for: float = 0.0
    polling_failures: Counter[str] = msgspec.field(default_factory=Counter)
    is_full: bool = False
    is_throttled: bool = False
    retry_after: float = 0.0
    is_unanswered: bool = False
    is_looking: bool = False
    retrying: Counter[str] = msgspec.field(default_factory=Counter)


class Worker:
    """A task of a bulk stop, for stops or for polls, and its current call."""

    __slots__ = ("_min_level", "_scope", "call", "has_slot")

    def __init__(self) -> None:
        self.has_slot: bool = False
        self.call: BulkCall | None = None
        self._min_level = CancelLevel.READING
        self._scope = CancelScope()

    @property
    def sends_stop(self) -> bool:
        """True while its call is a stop, not a poll."""
        return self.call is not None and self.call.operation.stops

    def scope(self, level: CancelLevel = CancelLevel.READING) -> CancelScope:
        """Return the worker's scope, to be cancelled at this level and above."""
        self._min_level = level
        return self._scope

    def cancel(self, level: CancelLevel) -> bool:
        """Cancel the scope that the worker is in; return True if that ends a stop."""
        if level < self._min_level:
            return False
        if self.call is not None and level < _min_level_of(self.call):
            return False
        self._scope.cancel()
        # The stop of a target that is polled was sent already.
        return self.sends_stop


def _min_level_of(call: BulkCall) -> CancelLevel:
    """Return the lowest level that cancels a call."""
    if not call.operation.stops:
        return CancelLevel.READING
    if call.may_have_been_sent:
        return CancelLevel.IN_FLIGHT
    if call.retries.in_doubt:
        return CancelLevel.WAITING
    return CancelLevel.READING


class RunState:
    """The state of a run that its parts share: its workers and its cancellation.

    `level` and `reason` say how far and why it is cancelled, `not_sent` is the error of
    targets that are not sent, `ended_early` the reason for an early end. The run's
    caller gave `caller_reasons`. `failure` is an exception that the run is to raise.
    """

    def __init__(self, source: Input, parked: Parked, polls: Polls) -> None:
        self._source = source
        self._parked = parked
        self._polls = polls
        # A dict keeps the order: a set would be cancelled in another order each time.
        self.workers: dict[Worker, None] = {}
        self.level: CancelLevel = CancelLevel.NONE
        # Both stand if a worker ends although nothing has cancelled the run.
        self.reason: BctrlError = _ENDED
        self.not_sent: BctrlError = _ENDED
        self.ended_early: BctrlError | None = None
        self.caller_reasons: list[BctrlError] = []
        self.failure: BaseException | None = None

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return sum(
            worker.call is not None and worker.call.in_flight for worker in self.workers
        )

    def goes_on(self) -> bool:
        """Return True if nothing is cancelled."""
        return not self.level

    def set_ended_early(self, reason: BctrlError) -> None:
        """Set why the run ended early; the first reason stays."""
        if self.ended_early is None:
            self.ended_early = reason

    def cancel(self) -> None:
        """Cancel the run: record the other targets, and deliver no more outcomes."""
        self.ask_to_end("the run was cancelled", CancelLevel.DELIVERY)

    def fail(self, error: BaseException) -> None:
        """End the run with an exception; the first is raised."""
        if self.failure is None:
            self.failure = error
        self.end_early(BctrlError(f"the run failed: {error!r}"), CancelLevel.DELIVERY)

    def end_with(self, error: BaseException, canceller: str) -> None:
        """End the run with the error of a task.

        `canceller` names what may raise a CancelledError that nobody asked for.
        """
        if isinstance(error, asyncio.CancelledError):
            if is_cancelled():
                self.cancel()
            else:
                self.fail(as_error(error, canceller))
        elif not isinstance(error, GeneratorExit):
            self.fail(error)

    def ask_to_end(self, summary: str, level: CancelLevel) -> None:
        """End the run early at its caller's request, without logging a warning."""
        if level <= self.level:
            # In a cancelled scope, anyio asks again at every turn of the loop.
            return
        reason = BctrlError(summary)
        self.caller_reasons.append(reason)
        self.end_early(reason, level)

    def end_early(self, reason: BctrlError, level: CancelLevel) -> None:
        """Cancel as much of the run as the level says, for this reason."""
        if self._leaves_targets(level):
            self.set_ended_early(reason)
        if self.goes_on():
            self._source.end()
        if level > self.level:
            self.level = level
            self.reason = reason
            self.not_sent = BctrlError(f"not sent: {reason.summary}")
        for worker in list(self.workers):
            if worker.cancel(level):
                self.set_ended_early(reason)
        self._parked.wake_all()
        self._polls.end()

    def _leaves_targets(self, level: CancelLevel) -> bool:
        """Return True if this level leaves targets unread, polled or not retried."""
        if not (self._source.is_exhausted and self._polls.are_over):
            return True
        if level is CancelLevel.READING:
            # At this level, `BulkSender` sets `ended_early` when it gives up a stop.
            return False
        if self._parked.unsettled:
            return True
        return any(worker.sends_stop for worker in self.workers)
