"""The run of a bulk stop in one process: workers that stop targets, and polls beside them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from bctrl_async._calls.call import Call, as_failure, is_cancelled
from bctrl_async._calls.observing import notify
from bctrl_async._calls.retry import BULK_PATIENCE, RetryPolicy, is_transient
from bctrl_async._calls.sender import Sender
from bctrl_async._limiter.limiter import Priority
from bctrl_async.bulk._breaker import Canary, CircuitBreaker, MakeRead
from bctrl_async.bulk._cancel import CancelLevel, Worker
from bctrl_async.bulk._engine import Engine, Options
from bctrl_async.bulk._targets import Input
from bctrl_async.bulk._verify import Pending, Verifier, needs_verification, verify_for
from bctrl_async.errors import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    BctrlRateLimitError,
    error_type,
)
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.observer import Observer, StopObserver
from bctrl_async.outcomes import StopOutcome, outcome_of


class Run(Engine):
    """A bulk stop in this process.

    `make_call` makes the call of a target, and raises BctrlConfigError if its name is invalid;
    `make_read` makes a GET of it.
    """

    def __init__(
        self,
        source: Input,
        options: Options,
        sender: Sender,
        *,
        make_call: Callable[[str, str], Call[Runtime]],
        make_read: MakeRead,
        policy: RetryPolicy,
        concurrency: int,
        base_url: str,
        observer: Observer | None,
    ) -> None:
        super().__init__(source, options, base_url, observer)
        self.sender: Sender = sender
        self._make_call = make_call
        self._concurrency = concurrency
        self._breaker = CircuitBreaker(
            sender,
            policy,
            options.deadline or BULK_PATIENCE,
            Canary(sender, make_read, policy, self.ledger),
            self.state,
        )
        # Bound once, and not for each call.
        self._retry_strategy = self._wait_to_retry
        self._verifier: Verifier | None = None
        if (seconds := verify_for(options.verify)) is not None:
            self._verifier = Verifier(
                self.ledger,
                make_poll=partial(make_read, policy=policy, priority=Priority.POLL),
                send=self._send,
                state=self.state,
                seconds=seconds,
            )

    @property
    def polling(self) -> int:
        """The number of runtimes that are polled."""
        return 0 if self._verifier is None else self._verifier.polling

    @property
    def is_throttled(self) -> bool:
        """True while the session slows down because of a 429 or 503."""
        return self.sender.limiter.is_throttled

    @property
    def retry_after(self) -> float:
        """The seconds for which the server has asked to wait; 0 if it has not."""
        return self.sender.limiter.retry_after

    @property
    def is_unanswered(self) -> bool:
        """True while the server answers no call."""
        return self._breaker.is_open

    @property
    def retrying(self) -> Counter[str]:
        """The targets that wait for another attempt, by what came of the last one."""
        calls = (worker.call for worker in self.state.workers if worker.is_stopping)
        failures = (call.retries.last_failure for call in calls if call and not call.in_flight)
        return Counter(error_type(failure) for failure in failures if failure is not None)

    def open(self) -> None:
        """Open the connection pool, in the current event loop."""
        self.sender.open_pool()

    def _start_work(self) -> None:
        for _ in range(self._concurrency):
            self._add_worker(Worker())

    def _pending_tasks(self) -> list[asyncio.Task[None]]:
        return super()._pending_tasks() + ([] if self._verifier is None else self._verifier.tasks)

    async def _work(self, worker: Worker) -> None:
        source = self.source
        while True:
            item = await self._next(worker) if source.is_async else source.next_nowait()
            if item is None:
                return
            outcome = await self._process(worker, *item)
            if outcome is not None and (waits := self._delivered(outcome)) is not None:
                with worker.scope(CancelLevel.DELIVERY):
                    await waits
            if outcome is None or outcome.resumed or not outcome.attempts:
                # Nothing was waited for: give other tasks a turn.
                await asyncio.sleep(0)

    async def _process(self, worker: Worker, index: int, item: object) -> StopOutcome | None:
        """Process one item and return its outcome; None if it is recorded later."""
        began = time.monotonic()
        target = self._checked(index, item)
        if isinstance(target, StopOutcome):
            return target
        try:
            call = self._make_call(*target)
        except BctrlConfigError as error:
            return self._reject_name(index, target, error)
        return await self._stop_target(worker, index, target, call, began)

    async def _stop_target(
        self, worker: Worker, index: int, target: RuntimeRef, call: Call[Runtime], began: float
    ) -> StopOutcome | None:
        observer: StopObserver | None = None
        ended: Runtime | BctrlError = self.state.not_begun
        try:
            if self.state.level is None:
                if self.ledger.observer is not None:
                    observer = notify(self.ledger.observer.begin_stop, *target)
                    call.observer = observer
                ended = await self._send(worker, call)
        except BaseException as error:
            try:
                self._end_with(error)
            finally:
                # Even in a loop that is closed, where no task can be cancelled.
                aborted = call.aborted(self.state.reason.summary)
                self.ledger.record(self._outcome(index, target, call, began, aborted), observer)
            raise
        outcome = self._outcome(index, target, call, began, ended)
        if self._verifier is None:
            return self.ledger.record(outcome, observer)
        pending = Pending(outcome, call.policy, began, observer)
        return await self._verify_or_record(worker, pending)

    def _outcome(
        self,
        index: int,
        target: RuntimeRef,
        call: Call[Runtime],
        began: float,
        ended: Runtime | BctrlError,
    ) -> StopOutcome:
        elapsed = time.monotonic() - began
        return self.source.with_listed(
            outcome_of(
                target,
                ended,
                index=index,
                attempts=call.attempts,
                elapsed=elapsed,
                request_id=call.request_id,
            )
        )

    async def _verify_or_record(self, worker: Worker, pending: Pending) -> StopOutcome | None:
        """Record an outcome, or leave it to a poller if it must be verified first.

        The worker goes on meanwhile: a runtime may take its time, and what is not sent goes on
        running. Only beyond the limit of pollers does it poll its own target.
        """
        verifier = self._verifier
        if verifier is None or not self.state.goes_on() or not needs_verification(pending.outcome):
            return self.ledger.record(pending.outcome, pending.observer)
        if verifier.is_full:
            return await verifier.verify(worker, pending)
        poller = Worker()
        verifier.add(self._start(partial(self._poll, verifier, poller, pending)), poller, pending)
        return None

    async def _poll(self, verifier: Verifier, poller: Worker, pending: Pending) -> None:
        if (waits := self._delivered(await verifier.verify(poller, pending))) is not None:
            with poller.scope(CancelLevel.DELIVERY):
                await waits

    async def _send(
        self, worker: Worker, call: Call[Runtime], delay: float = 0.0
    ) -> Runtime | BctrlError:
        """Make a call in a cancel scope, after a delay in seconds."""
        call.wait_to_retry = self._retry_strategy
        ended: Runtime | BctrlError | None = None
        worker.call = call
        try:
            with worker.scope():
                if delay:
                    await self.sender.limiter.sleep(delay)
                ended = await self.sender.request(call)
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
            self.ledger.throttled += call.retries.throttled
        if ended is None or call.cut_off:
            return call.aborted(self.state.reason.summary)
        if isinstance(ended, Runtime):
            self._breaker.on_answer(call)
        else:
            self._end_if_all_will_fail(ended, call)
        return ended

    async def _wait_to_retry(self, call: Call[Runtime]) -> bool:
        """Wait before retrying a call; return False to give up."""
        failure = call.retries.last_failure
        may_retry = self.state.goes_on() or (
            self.state.level is CancelLevel.READING
            and call.operation.stops
            and call.retries.may_have_stopped
        )
        if not may_retry and failure is not None and is_transient(failure, call.policy.statuses):
            self.state.set_ended_early(self.state.reason)
            call.cut_off = True
        return may_retry and await self._breaker.wait_to_retry(call)

    def _end_if_all_will_fail(self, error: BctrlError, call: Call[Runtime]) -> None:
        if isinstance(error, BctrlAuthenticationError | BctrlConfigError) or (
            isinstance(error, BctrlRateLimitError)
            and (error.retry_after or 0.0) > call.policy.max_throttle_wait
        ):
            self.state.end_early(error, CancelLevel.WAITING)
        elif self._breaker.gave_up:
            self.state.end_early(self._breaker.as_dead(error), CancelLevel.WAITING)
