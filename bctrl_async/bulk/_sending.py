"""Send the calls of a bulk stop: each within the scope of its worker, while the run allows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bctrl_async._calls.call import Call
from bctrl_async._calls.cancellation import as_failure, is_cancelled
from bctrl_async._calls.retry import is_transient
from bctrl_async._calls.sender import Sender
from bctrl_async.bulk._breaker import CircuitBreaker
from bctrl_async.bulk._cancel import CancelLevel, Ending, Worker
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.errors import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    BctrlRateLimitError,
)
from bctrl_async.models import Runtime


class BulkSender:
    """Sends the calls of one bulk stop, and ends the run after an error that all would meet.

    Args:
        sender: The sender of the session.
        breaker: Decides on retries while the server answers nothing.
        ledger: Counts the throttled answers.
        ending: Tells how much of the run is cancelled.
        end_early: Ends the run, for a reason and up to a level.
    """

    def __init__(
        self,
        sender: Sender,
        breaker: CircuitBreaker,
        ledger: Ledger,
        ending: Ending,
        end_early: Callable[[BctrlError, CancelLevel], None],
    ) -> None:
        self._sender = sender
        self._breaker = breaker
        self._ledger = ledger
        self._ending = ending
        self._end_early = end_early
        # Bound once, and not for each call.
        self._retry_strategy = self._wait_to_retry

    async def send(
        self, worker: Worker, call: Call[Runtime], delay: float = 0.0
    ) -> Runtime | BctrlError:
        """Make a call in a cancel scope, after a delay in seconds."""
        call.wait_to_retry = self._retry_strategy
        ended: Runtime | BctrlError | None = None
        worker.call = call
        try:
            with worker.scope():
                if delay:
                    await self._sender.limiter.sleep(delay)
                ended = await self._sender.request(call)
        except BctrlError as error:
            # The frames that a traceback holds are much for a hundred thousand failures.
            ended = error.with_traceback(None)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            raise as_failure(error, "the call") from error
        finally:
            worker.call = None
            self._breaker.leave(call)
            if call.retries is not None:
                self._ledger.throttled += call.retries.throttled
        if ended is None or call.cut_off:
            return call.aborted(self._ending.reason.summary)
        if isinstance(ended, Runtime):
            self._breaker.on_answer(call)
        else:
            self._end_if_all_will_fail(ended, call)
        return ended

    async def _wait_to_retry(self, call: Call[Runtime]) -> bool:
        """Wait before retrying a call; return False to give up."""
        failure = None if call.retries is None else call.retries.last_failure
        may_retry = self._ending.goes_on() or (
            self._ending.level is CancelLevel.READING
            and call.operation.stops
            and call.may_have_stopped
        )
        if not may_retry and failure is not None and is_transient(failure, call.policy.statuses):
            self._ledger.end_early(self._ending.reason)
            call.cut_off = True
        return may_retry and await self._breaker.wait_to_retry(call)

    def _end_if_all_will_fail(self, error: BctrlError, call: Call[Runtime]) -> None:
        if isinstance(error, BctrlAuthenticationError | BctrlConfigError) or (
            isinstance(error, BctrlRateLimitError)
            and (error.retry_after or 0.0) > call.policy.max_throttle_wait
        ):
            self._end_early(error, CancelLevel.WAITING)
        elif self._breaker.gave_up:
            self._end_early(self._breaker.as_dead(error), CancelLevel.WAITING)
