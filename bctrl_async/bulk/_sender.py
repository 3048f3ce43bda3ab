"""Send the calls of a bulk stop in its workers' scopes; end a run if all will fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from functools import partial

from bctrl_async._calls.bulk_calls import BulkAnswer, BulkCall, BulkCalls
from bctrl_async._calls.call import Call
from bctrl_async._calls.observing import notify, observe_call
from bctrl_async._calls.retry import probe_delay
from bctrl_async._calls.sender import Sender, WaitToRetry
from bctrl_async._http.lists import RuntimeList
from bctrl_async._kinds import Failure
from bctrl_async._limiter.limiter import RecalledError
from bctrl_async.bulk._breaker import CircuitBreaker
from bctrl_async.bulk._cancel import CancelLevel
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._parked import Stop
from bctrl_async.bulk._state import RunState, Worker
from bctrl_async.errors import BctrlError
from bctrl_async.models import Runtime
from bctrl_async.observer import BulkObserver, CallObserver, StopObserver

_MAX_TOKEN_ASKS = 3
"""The number of asks after which a parked stop asks for a token no more seldom."""


class _RunEndedError(Exception):
    """The run ended before a retry that was due."""


class BulkSender:
    """The session's sender, for the calls of one bulk stop."""

    def __init__(
        self,
        sender: Sender,
        calls: BulkCalls,
        breaker: CircuitBreaker,
        ledger: Ledger,
    ) -> None:
        self._sender = sender
        self._policy = calls.policy
        self._breaker = breaker
        self.state: RunState = ledger.state
        self.ledger: Ledger = ledger
        self._limiter = sender.limiter

    async def send_stop(
        self, worker: Worker, stop: Stop
    ) -> Runtime | BctrlError | asyncio.Future[None] | None:
        """Send a stop, unless the run is over; return what it waits for if parked.

        None stands for a stop that is to be sent again at once.
        """
        call = stop.call
        delay = 0.0
        if not stop.is_new or not self.state.goes_on():
            error = await self._take_up(worker, stop)
            if error is not None:
                return error
            # A stop in doubt is woken early if the run is over.
            delay = call.retries.resume(_now())
        if self.ledger.observer is not None:
            self._notify(stop, self.ledger.observer)
        turn = self._turn(stop)
        if turn is not None:
            return turn
        try:
            result = await self.send(worker, call, delay, observer=stop.observer)
        except RecalledError:
            # When it is sent again, it waits in its lane.
            return None
        if call.retries.resumes_at is None:
            return result if isinstance(result, Runtime) else call.error(result)
        if not self.state.goes_on():
            # Nothing is parked any more: `_take_up` decides whether it is retried.
            return None
        return self._limiter.start_sleep(call.retries.resumes_at - _now())

    def _notify(self, stop: Stop, observer: BulkObserver) -> None:
        """Notify the observer that a stop starts, once."""
        if not stop.is_notified:
            stop.is_notified = True
            stop.observer = notify(observer.begin_stop, *stop.target)

    async def _take_up(self, worker: Worker, stop: Stop) -> BctrlError | None:
        """Take up a stop that may have been parked; return its error if it is over."""
        call = stop.call
        failure = None
        if stop.waiter is not None:
            try:
                self._limiter.enter_lane(stop.waiter)
            except BctrlError as error:
                failure = Failure.of(error)
            stop.waiter = None
        elif call.retries.throttled and self._may_retry(call):
            with worker.scope():
                await self._breaker.compare(call)
        if not self._may_retry(call):
            self._limiter.leave_lane(call.retries)
            self.state.set_ended_early(self.state.reason)
            if not call.attempts:
                return self.state.not_sent
            # The other tasks get a turn, however many stops are recorded here.
            await asyncio.sleep(0)
            return call.error(call.aborted(self.state.reason.summary))
        if failure is None:
            return None
        self._end_if_all_will_fail(call, failure)
        return call.error(failure)

    def _turn(self, stop: Stop) -> asyncio.Future[None] | None:
        """Return the turn of a stop that waits for the quota or in a lane, or None."""
        retries = stop.call.retries
        # The delay is dropped, since the stop has waited for its token.
        if retries.lacks_quota and retries.ask_quota() is None:
            stop.token_asks += 1
            delay = probe_delay(self._policy, min(stop.token_asks, _MAX_TOKEN_ASKS))
            return self._limiter.start_sleep(delay)
        if not self.state.goes_on():
            # No stop waits in a lane without its worker any more.
            retries.may_park = False
            return None
        # `enqueue` checks this, too, but costs more, and most workspaces have no lane.
        if not self._limiter.has_lane(retries.workspace):
            return None
        stop.waiter = self._limiter.enqueue(
            retries.policy.max_throttle_wait, stop.call.priority, retries
        )
        if stop.waiter is None:
            return None
        return stop.waiter.admitted

    async def send(
        self,
        worker: Worker,
        call: Call[BulkAnswer],
        delay: float = 0.0,
        observer: CallObserver | StopObserver | None = None,
        wait_to_retry: WaitToRetry[BulkAnswer] | None = None,
    ) -> BulkAnswer | Failure:
        """Make a call in a cancel scope, after a delay; retry it."""
        if wait_to_retry is None:
            wait_to_retry = self._wait_to_retry
        result: BulkAnswer | Failure | None = None
        throttled_before = call.retries.throttled
        worker.call = call
        try:
            with worker.scope():
                if delay:
                    await self._limiter.sleep(delay)
                result = await self._sender.request(call, None, observer, wait_to_retry)
        except RecalledError:
            raise
        except _RunEndedError:
            result = None
        except BaseException as error:
            self.state.end_with(error, "the call")
            raise
        finally:
            worker.call = None
            self._breaker.leave(call)
            # A closed session makes no attempt, whose end would leave the lane.
            self._limiter.leave_lane(call.retries)
            self.ledger.throttled += call.retries.throttled - throttled_before
        if result is None:
            # The scope was cancelled, or the run ended before a retry.
            return call.aborted(self.state.reason.summary)
        if isinstance(result, Failure):
            self._end_if_all_will_fail(call, result)
        else:
            self._breaker.on_answer(call)
        return result

    async def send_poll(
        self,
        worker: Worker,
        call: Call[BulkAnswer],
        deadline: float,
        hold: AbstractContextManager[None],
        observer: CallObserver | StopObserver | None = None,
    ) -> BulkAnswer | Failure:
        """Make a poll; it is in `hold` while it waits in the lane of its workspace.

        If the server is down, it waits until a deadline.
        """
        wait_to_retry = partial(self._wait_to_poll, deadline=deadline)
        send = partial(self.send, worker, call, 0.0, observer, wait_to_retry)
        call.retries.may_park = True
        with suppress(RecalledError):
            return await send()
        call.retries.may_park = False
        with hold:
            return await send()

    async def send_list(
        self,
        call: Call[RuntimeList],
        send: Callable[[CallObserver | None], Awaitable[RuntimeList | Failure]],
    ) -> RuntimeList | Failure:
        """Send a list, as a call of its own for the observer, which `send` takes."""
        observer = self.ledger.observer
        with (
            suppress(BctrlError),
            observe_call(observer, call.operation, call.workspace_id, None) as observed,
        ):
            answer = await send(observed)
            if isinstance(answer, Failure):
                # The observer gets an exception.
                raise call.error(answer)
        return answer

    def has_answered_since(self, call: BulkCall) -> bool:
        """Return True if the server answered an attempt later than the call's last."""
        return self._sender.last_answered > call.attempt_number

    async def _wait_to_poll(
        self, call: BulkCall, failure: Failure, *, deadline: float
    ) -> bool:
        """Wait for a server that is down; return False to give up, as at a deadline.

        A throttled poll does not wait here: it gets a later time.
        """
        if failure.kind.is_throttling:
            self._breaker.on_answer(call, failure)
            return False
        try:
            async with asyncio.timeout_at(deadline):
                return await self._wait_to_retry(call, failure)
        except TimeoutError:
            return False

    async def _wait_to_retry(self, call: BulkCall, failure: Failure) -> bool:
        """Wait before retrying a call; return False to give up.

        A stop that was throttled does not wait here: it is parked.
        """
        if not self._may_retry(call):
            if not call.retries.may_succeed(failure):
                return False
            if call.operation.stops:
                self.state.set_ended_early(self.state.reason)
            raise _RunEndedError
        if failure.kind.is_throttling and call.operation.stops:
            delay = self._breaker.on_throttled(call)
            if delay is not None:
                call.retries.resumes_at = _now() + delay
            return False
        return await self._breaker.wait_to_retry(call, failure)

    def _may_retry(self, call: BulkCall) -> bool:
        """Return True unless the run is over for this call; a stop in doubt goes on."""
        if self.state.goes_on():
            return True
        if self.state.level > CancelLevel.READING:
            return False
        return call.operation.stops and call.retries.in_doubt

    def _end_if_all_will_fail(self, call: BulkCall, failure: Failure) -> None:
        # The Retry-After of a target ends the run only if it holds all.
        wait = self._limiter.retry_after_of_all(call.retries.workspace)
        is_held = wait > self._policy.max_throttle_wait
        # A poll is tried again, so that a run does not end while its stops do.
        is_machine_full = failure.kind.is_local and call.operation.stops
        if is_held or is_machine_full or failure.kind.ends_run:
            self.state.end_early(call.error(failure), CancelLevel.WAITING)
        elif self._breaker.has_given_up:
            self.state.end_early(
                self._breaker.give_up_error(failure), CancelLevel.WAITING
            )


def _now() -> float:
    return asyncio.get_running_loop().time()
