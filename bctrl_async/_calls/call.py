"""One call: its request, its progress, and its back-off between attempts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Generic, TypeVar

from bctrl_async._calls.retry import RetryState, probe_delay
from bctrl_async._http.request import Request
from bctrl_async._kinds import Failure, Kind, Repeat
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.queues import Priority
from bctrl_async.errors import BctrlError, log_fields, subject_of
from bctrl_async.outcomes import StopResult

_log = logging.getLogger("bctrl_async")

_T = TypeVar("_T")


class Call(Request[_T], Generic[_T], kw_only=True):
    """One call: its request, its retries, and its last attempt."""

    retries: RetryState
    headers: Mapping[str, str] = {}
    """Headers of this call alone."""
    first_priority: Priority = Priority.SINGLE
    attempts: int = 0
    attempt_number: int = 0
    """The last attempt's number among all attempts of the session."""
    in_flight: bool = False
    sent_time: float | None = None
    """The Unix time of the last attempt's start."""

    def start_attempt(self, number: int) -> None:
        """Record the start of an attempt."""
        self.attempts += 1
        self.attempt_number = number
        self.in_flight = True
        self.sent_time = time.time()
        self.is_connected = False

    @property
    def sent_at(self) -> datetime | None:
        """The time of the last attempt's start."""
        # A single stop needs no `datetime`, which costs as much as its `Call`.
        if self.sent_time is None:
            return None
        return datetime.fromtimestamp(self.sent_time, UTC)

    def end_attempt(self) -> None:
        """Record the end of the attempt in flight."""
        self.in_flight = False

    def forget_attempt(self) -> None:
        """Forget the attempt in flight: the machine could not make its connection."""
        self.end_attempt()
        self.attempts -= 1

    @property
    def priority(self) -> Priority:
        """The priority of the next attempt at the limiter.

        What may have taken effect goes first. A throttled call has done nothing, so it
        queues again behind those that wait already. A poll has no effect, and stays
        last.
        """
        if self.retries.in_doubt and self.first_priority is not Priority.POLL:
            return Priority.RETRY
        return self.first_priority

    @property
    def may_have_been_sent(self) -> bool:
        """True if an attempt is in flight and has its connection."""
        return self.in_flight and self.is_connected

    def attempt_error(self, failure: Failure) -> BctrlError:
        """Return the exception of a failed attempt, for observers and the log."""
        return self._error(failure, in_doubt=self.retries.leaves_doubt(failure))

    def error(self, failure: Failure) -> BctrlError:
        """Return the exception of this call, which ends with a failure."""
        retries = self.retries
        error = self._error(
            failure,
            in_doubt=retries.leaves_doubt(failure) or retries.in_doubt,
            attempts=self.attempts,
            status=failure.status or retries.status,
        )
        # The first failures are dropped if there are many, so these attempts have no
        # notes.
        first_number = retries.failed_attempts - len(retries.last_failures) + 1
        for number, past_failure in enumerate(retries.last_failures, first_number):
            if past_failure is not failure:
                error.add_note(f"attempt {number}: {past_failure.summary}")
        return error

    def _advice(self, failure: Failure, *, in_doubt: bool) -> str | None:
        operation = self.operation
        if in_doubt and operation.repeat is Repeat.ONCE:
            return f"The {operation.name} may have worked: look before repeating it"
        if failure.kind is Kind.NOT_RUNNING and operation.stops:
            return "Nothing to do: it is not running"
        if failure is self.retries.last_failure and self.retries.advice is not None:
            return self.retries.advice
        return failure.advice

    def _error(
        self, failure: Failure, *, in_doubt: bool, **facts: object
    ) -> BctrlError:
        operation = self.operation
        return failure.error(
            operation=operation.name,
            workspace_id=self.workspace_id,
            alias=self.alias,
            may_have_worked=in_doubt and operation.repeat is not Repeat.READ,
            may_have_stopped=in_doubt and operation.stops,
            accepted=operation.stops and failure.kind.result is StopResult.ACCEPTED,
            advice=self._advice(failure, in_doubt=in_doubt),
            **facts,
        )

    @property
    def _stage(self) -> str:
        """The progress of the call, for the text of its cancellation."""
        if self.may_have_been_sent:
            return "before an answer"
        if self.in_flight:
            return "before it had a connection"
        if self.attempts:
            return "before its next attempt"
        return "while it waited for a slot"

    def aborted(self, reason: str) -> Failure:
        """Return the failure with which this call ends if it is cancelled now."""
        retries = self.retries
        summary = f"aborted {self._stage} because {reason}"
        if retries.last_failure is not None:
            summary += f"; before that, {retries.last_failure.summary}"
        # The text of an error has its colon after the subject.
        summary = summary.replace(": ", ", ")
        name = self.operation.name
        has_answer = retries.status is not None
        if not (self.may_have_been_sent or retries.in_doubt or has_answer):
            advice = "Try again: nothing was sent"
        elif self.operation.repeat is Repeat.ONCE:
            # The error has other advice if the call is in doubt.
            advice = f"{name.capitalize()} it again: it has had no effect"
        else:
            advice = f"{name.capitalize()} it again: a {name} is safe to repeat"
        return Failure(
            kind=Kind.ABORTED,
            summary=summary,
            advice=advice,
            in_doubt=self.may_have_been_sent,
        )

    async def back_off(
        self, limiter: Limiter, *, waits_for_quota: bool = False
    ) -> bool:
        """Wait before the next attempt as the policy says; return False to give up.

        If only the quota keeps the call from the attempt, `waits_for_quota` makes it
        ask again and again, for as long as its patience.
        """
        retries = self.retries
        loop = asyncio.get_running_loop()
        deadline = loop.time() + retries.policy.max_throttle_wait
        token_asks = 0
        delay = retries.delay(loop.time())
        while delay is None:
            if not waits_for_quota or not retries.lacks_quota:
                return False
            if limiter.is_closed() or loop.time() >= deadline:
                return False
            token_asks += 1
            await limiter.sleep(probe_delay(retries.policy, token_asks))
            delay = retries.ask_quota()
        self.log_retry(delay)
        await limiter.sleep(delay)
        return True

    def log_retry(self, delay: float) -> None:
        """Log the failure of the last attempt, and the shortest delay to the next."""
        failure = self.retries.last_failure
        if failure is not None and _log.isEnabledFor(logging.INFO):
            error = self.attempt_error(failure)
            _log.info(
                "attempt %d failed: %s%s; the next follows in %.3f s at the earliest",
                self.attempts,
                subject_of(error),
                failure.summary,
                delay,
                extra={
                    "bctrl.event": "retry",
                    **log_fields(error),
                    "bctrl.attempts": self.attempts,
                    "bctrl.delay": delay,
                },
            )


def annotate(
    error: BctrlError, operation: str, workspace_id: object, alias: object
) -> None:
    """Name the call that ended with an error; `alias` is None for a whole workspace."""
    error.operation = operation
    error.workspace_id = str(workspace_id)
    error.alias = None if alias is None else str(alias)


def as_error(cause: BaseException, source: str) -> BctrlError:
    """Return an error for what `source` raised, such as an unasked CancelledError."""
    error = BctrlError(f"{source} raised {type(cause).__name__}")
    error.__cause__ = cause
    return error
