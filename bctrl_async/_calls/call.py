"""One call: its request, its progress, and its back-off between attempts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

from bctrl_async._calls.retry import RetryState, probe_delay
from bctrl_async._http.request import Request
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.queues import Priority
from bctrl_async.errors import BctrlConflictError, BctrlError, log_fields, subject_of
from bctrl_async.observer import CallObserver, StopObserver

_log = logging.getLogger("bctrl_async")

_T = TypeVar("_T")


class Call(Request[_T], Generic[_T], kw_only=True):
    """One call and its progress."""

    retries: RetryState
    headers: Mapping[str, str] = {}
    """Headers of this call alone."""
    first_priority: Priority = Priority.SINGLE
    wait_to_retry: Callable[[Call[_T]], Awaitable[bool]] | None = None
    """Waits after a failed attempt, and returns False to give up; None follows the policy."""
    observer: CallObserver | StopObserver | None = None
    attempts: int = 0
    number: int = 0
    """The last attempt's number among all attempts of the session."""
    in_flight: bool = False
    in_doubt: bool = False
    """True if an attempt that failed may have taken effect."""
    cut_off: bool = False
    """True if the bulk stop ended before a retry that was due."""

    @property
    def priority(self) -> Priority:
        """The priority of the next attempt at the limiter.

        A throttled call has done nothing, so it queues again behind those that wait already.
        """
        if self.in_doubt and self.first_priority is not Priority.POLL:
            return Priority.RETRY
        return self.first_priority

    @property
    def may_be_sent(self) -> bool:
        """True if an attempt is in flight and has its connection."""
        return self.in_flight and self.is_connected

    @property
    def may_be_repeated(self) -> bool:
        """False once an attempt may have taken effect, unless repeating it does no harm."""
        return self.operation.repeat_in_doubt or not self.in_doubt

    def on_failure(self, error: BctrlError) -> None:
        """Record what a failed attempt may have done; only a stop may have stopped a runtime."""
        self.keep_request_id(error.request_id)
        self.in_doubt |= error.may_have_stopped
        error.may_have_stopped &= self.operation.stops
        error.accepted &= self.operation.stops
        if self.operation.stops and isinstance(error, BctrlConflictError) and error.already_stopped:
            error.advice = "Nothing to do: it is not running"

    def annotate(self, error: BctrlError) -> None:
        """Add the call and its earlier attempts to the error that ends it."""
        annotate(error, self.operation.name, self.workspace_id, self.alias)
        error.attempts = self.attempts
        error.may_have_stopped |= self.in_doubt and self.operation.stops
        self.retries.annotate(error)
        if not self.may_be_repeated:
            error.advice = f"The {self.operation.name} may have worked: look before repeating it"

    def aborted(self, reason: str) -> BctrlError:
        """Return the error with which this call ends if it is cancelled now."""
        if self.in_flight:
            when = "before an answer" if self.is_connected else "before it had a connection"
        else:
            when = "before it was sent again" if self.attempts else "while it waited for a slot"
        last = self.retries.last_failure
        earlier = "" if last is None else f"; before that, {last.summary}"
        advice = "Try again: nothing was sent"
        if self.may_be_sent or self.in_doubt or self.retries.status is not None:
            name = self.operation.name
            advice = f"{name.capitalize()} it again: a {name} is safe to repeat"
        error = BctrlError(
            f"aborted {when}: {reason}{earlier}",
            advice=advice,
            may_have_stopped=self.may_be_sent,
        )
        self.on_failure(error)
        self.annotate(error)
        return error

    async def back_off(self, limiter: Limiter, *, waits_for_quota: bool = False) -> bool:
        """Wait before the next attempt as the policy says; return False to give up.

        `waits_for_quota` makes it wait for a token if the quota is exhausted; else it gives up.
        """
        retries, loop = self.retries, asyncio.get_running_loop()
        ends, asked = loop.time() + retries.policy.max_throttle_wait, 0
        delay = retries.delay(loop.time())
        while delay is None:
            is_over = limiter.is_closed() or loop.time() >= ends
            if is_over or not (waits_for_quota and retries.lacks_quota):
                return False
            asked += 1
            await limiter.sleep(probe_delay(retries.policy, asked))
            delay = retries.ask_quota()
        self.log_retry(delay)
        await limiter.sleep(delay)
        return True

    def log_retry(self, delay: float) -> None:
        """Log the failure of the last attempt, and the shortest delay until the next."""
        failed = self.retries.last_failure
        if failed is not None and _log.isEnabledFor(logging.INFO):
            annotate(failed, self.operation.name, self.workspace_id, self.alias)
            _log.info(
                "attempt %d failed: %s%s; the next follows in %.3f s at the earliest",
                self.attempts,
                subject_of(failed),
                failed.summary,
                delay,
                extra={
                    "bctrl.event": "retry",
                    **log_fields(failed),
                    "bctrl.attempts": self.attempts,
                    "bctrl.delay": delay,
                },
            )


def annotate(error: BctrlError, operation: str, workspace_id: object, alias: object) -> None:
    """Name the call that ended with an error; `alias` is None for a whole workspace."""
    error.operation = operation
    error.workspace_id = str(workspace_id)
    error.alias = alias if alias is None else str(alias)


def is_cancelled() -> bool:
    """Return True if the current task was asked to cancel."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def as_failure(raised: BaseException, source: str) -> BctrlError:
    """Return an error for what `source` raised, such as a CancelledError that nobody asked for."""
    error = BctrlError(f"{source} raised {type(raised).__name__}")
    error.__cause__ = raised
    return error
