"""The run of a bulk stop in one process: workers that stop targets, and polls beside them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial

import msgspec
from msgspec.structs import replace

from bctrl_async import _quick
from bctrl_async._calls.call import Call, annotate
from bctrl_async._calls.observing import notify, observe_call
from bctrl_async._calls.retry import BULK_PATIENCE, RetryPolicy, is_transient, probe_delay
from bctrl_async._calls.sender import Sender
from bctrl_async._http.request import STOP
from bctrl_async.bulk._breaker import CircuitBreaker
from bctrl_async.bulk._cancel import CancelLevel, Worker, wait_shielded
from bctrl_async.bulk._engine import Engine, Options, Progress
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._targets import Input
from bctrl_async.bulk._verify import needs_verification, outcome_after_poll, verify_for
from bctrl_async.errors import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    BctrlRateLimitError,
    error_type,
    is_unanswered,
)
from bctrl_async.filters import FoundTargets
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.observer import Observer, StopObserver
from bctrl_async.outcomes import StopOutcome, outcome_of

_RUNS = BctrlError("the workspace was listed, and it runs")
_SLICE = 100
"""The number of journal entries that are corrected before other tasks get a turn."""
_MAX_POLLERS = 1000
"""The most runtimes that are polled beside the stops; more would take too much memory."""


class Unverified(msgspec.Struct, eq=False):
    """An outcome to verify before it is recorded; `began` is when its target was read."""

    outcome: StopOutcome
    began: float
    observer: StopObserver | None


class Run(Engine):
    """A bulk stop in this process.

    `make_call` makes the call of a target, and raises BctrlConfigError if its name is invalid;
    `make_canary` and `make_poll` make a GET of it, with a `policy`.
    """

    def __init__(
        self,
        source: Input,
        options: Options,
        sender: Sender,
        *,
        make_call: Callable[[str, str], Call[Runtime]],
        make_canary: Callable[..., Call[Runtime]],
        make_poll: Callable[..., Call[Runtime]],
        policy: RetryPolicy,
        concurrency: int,
        base_url: str,
        observer: Observer | None,
    ) -> None:
        super().__init__(source, options, base_url, observer)
        self.sender: Sender = sender
        self._make_call = make_call
        self._policy = policy
        self._concurrency = concurrency
        patience = options.deadline or BULK_PATIENCE
        # A bound method would make a reference cycle that keeps the run and all its failures.
        once = replace(policy, attempts=1, statuses=frozenset())
        ask = partial(_ask_canary, sender, partial(make_canary, policy=once), self.ledger)
        self.breaker: CircuitBreaker = CircuitBreaker(sender, policy, patience, ask, self.state)
        self._verify_for = verify_for(options.verify) or 0.0
        patience = min(policy.max_throttle_wait, self._verify_for)
        poll_policy = replace(policy, attempts=1, patience=patience)
        self._make_poll = partial(make_poll, policy=poll_policy)
        self._unverified: set[Unverified] = set()

    @property
    def progress(self) -> Progress:
        """The progress so far."""
        calls = (worker.call for worker in self.state.workers if worker.is_stopping)
        failures = (call.retries.last_failure for call in calls if call and not call.in_flight)
        return Progress(
            in_flight=self.state.in_flight,
            polling=len(self._unverified),
            is_throttled=self.sender.limiter.is_throttled,
            retry_after=self.sender.limiter.retry_after,
            is_unanswered=self.breaker.is_open,
            retrying=Counter(error_type(failure) for failure in failures if failure is not None),
        )

    def open(self) -> None:
        """Open the connection pool, in the current event loop."""
        self.sender.open_pool()

    def _start_work(self) -> None:
        for _ in range(self._concurrency):
            self._start(self._work)

    async def _work(self, worker: Worker) -> None:
        with worker.scope():
            await self.source.prepare(self._write_running)
        await super()._work(worker)

    async def _write_running(self, found: FoundTargets) -> None:
        """Correct the journal's entries of all listed runtimes that run, and flush it to disk.

        This comes before any stop is sent: after a crash, none of them may count as stopped. An end
        of the run waits for it.
        """
        if self.ledger.journal is not None:
            entries = self.ledger.journal.offsets.get(found.workspace_id, {})
            await wait_shielded(asyncio.create_task(self._correct(found, entries)))

    async def _correct(self, found: FoundTargets, entries: Collection[str]) -> None:
        aliases = [alias for alias in found.running if alias in entries]
        for start in range(0, len(aliases), _SLICE):
            await asyncio.sleep(0)
            for alias in aliases[start : start + _SLICE]:
                outcome = outcome_of(RuntimeRef(found.workspace_id, alias), _RUNS)
                self.ledger.write(self.source.with_listed(outcome), flush=alias == aliases[-1])

    async def _process(self, worker: Worker, index: int, item: object) -> StopOutcome | None:
        began = time.monotonic()
        target = self._checked(index, item)
        if isinstance(target, StopOutcome):
            return target
        try:
            call = self._make_call(*target)
        except BctrlConfigError as error:
            annotate(error, STOP.name, *target)
            return self._reject(index, target, error)
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
        except BaseException:
            aborted = call.aborted(self.state.reason.summary)
            self.ledger.record(self._outcome(index, target, call, began, aborted), observer)
            raise
        outcome = self._outcome(index, target, call, began, ended)
        if not self._verify_for or not self.state.goes_on() or not needs_verification(outcome):
            return self.ledger.record(outcome, observer)
        return await self._verify(worker, Unverified(outcome, began, observer))

    def _outcome(
        self,
        index: int,
        target: RuntimeRef,
        call: Call[Runtime],
        began: float,
        ended: Runtime | BctrlError,
    ) -> StopOutcome:
        return self.source.with_listed(
            outcome_of(
                target,
                ended,
                index=index,
                attempts=call.attempts,
                elapsed=time.monotonic() - began,
                request_id=call.request_id,
            )
        )

    async def _verify(self, worker: Worker, unverified: Unverified) -> StopOutcome | None:
        """Start a poller for an outcome; if too many poll, poll here and return the outcome.

        With a poller, the worker goes on: a runtime may take long to end, while targets that are
        not sent yet keep running.
        """
        self._unverified.add(unverified)
        if len(self._unverified) > _MAX_POLLERS:
            return await self._poll(unverified, worker)
        poller = self._start(partial(self._poll_and_deliver, unverified))
        # A poller that is cancelled before its first step records nothing, so this callback does.
        poller.add_done_callback(lambda _: self._record_polled(unverified))
        return None

    async def _poll_and_deliver(self, unverified: Unverified, worker: Worker) -> None:
        await self._deliver_from(worker, await self._poll(unverified, worker))

    async def _poll(self, unverified: Unverified, worker: Worker) -> StopOutcome:
        """Poll a target until its outcome is settled or time is up, and record the outcome."""
        loop = asyncio.get_running_loop()
        target = unverified.outcome.target
        ends, polls = loop.time() + self._verify_for, 0
        try:
            while needs_verification(unverified.outcome) and self.state.goes_on():
                left = max(ends - loop.time(), 0.0)
                if polls and (not left or _quick.is_enough(polls)):
                    break
                polls += 1
                poll = self._make_poll(*target)
                poll.observer = unverified.observer
                delay = min(probe_delay(self._policy, polls), left)
                polled = await self._send(worker, poll, delay, ends)
                unverified.outcome = outcome_after_poll(unverified.outcome, polled)
                if isinstance(polled, BctrlError) and (
                    _quick.hangs(polled)
                    or not is_transient(polled, self._policy.statuses, reads=True)
                ):
                    break
        finally:
            self._record_polled(unverified)
        return unverified.outcome

    def _record_polled(self, unverified: Unverified) -> None:
        """Record an outcome, once, with what its polls have said."""
        if unverified in self._unverified:
            self._unverified.remove(unverified)
            elapsed = time.monotonic() - unverified.began
            outcome = replace(unverified.outcome, elapsed=elapsed)
            unverified.outcome = self.ledger.record(outcome, unverified.observer)

    async def _send(
        self,
        worker: Worker,
        call: Call[Runtime],
        delay: float = 0.0,
        until: float | None = None,
    ) -> Runtime | BctrlError:
        """Make a call in a cancel scope, after a delay in seconds; retry it up to a time."""
        call.wait_to_retry = self._wait_to_retry
        if until is not None:
            call.wait_to_retry = partial(self._wait_to_retry, until=until)
        ended: Runtime | BctrlError | None = None
        worker.call = call
        try:
            with worker.scope():
                if delay:
                    await self.sender.limiter.sleep(delay)
                ended = await self.sender.request(call)
        except BctrlError as error:
            # The frames of a hundred thousand tracebacks would take too much memory.
            ended = error.with_traceback(None)
        except BaseException as error:
            self._end_with(error, "the call")
            raise
        finally:
            worker.call = call.wait_to_retry = None
            self.breaker.leave(call)
            self.ledger.throttled += call.retries.throttled
        if ended is None or call.cut_off:
            return call.aborted(self.state.reason.summary)
        if isinstance(ended, Runtime):
            self.breaker.on_answer(call)
        else:
            self._end_if_all_will_fail(ended)
        return ended

    async def _wait_to_retry(self, call: Call[Runtime], until: float | None = None) -> bool:
        """Wait before retrying a call; return False to give up, at the latest at a time."""
        failure = call.retries.last_failure
        may_retry = self.state.goes_on() or (
            self.state.level is CancelLevel.READING and call.operation.stops and call.in_doubt
        )
        if not may_retry and failure is not None and is_transient(failure, self._policy.statuses):
            self.state.set_ended_early(self.state.reason)
            call.cut_off = True
        try:
            async with asyncio.timeout_at(until):
                return may_retry and await self.breaker.wait_to_retry(call)
        except TimeoutError:
            return False

    def _end_if_all_will_fail(self, error: BctrlError) -> None:
        if isinstance(error, BctrlAuthenticationError | BctrlConfigError) or (
            isinstance(error, BctrlRateLimitError)
            and (error.retry_after or 0.0) > self._policy.max_throttle_wait
        ):
            self.state.end_early(error, CancelLevel.WAITING)
        elif self.breaker.gave_up:
            self.state.end_early(self.breaker.as_dead(error), CancelLevel.WAITING)


async def _ask_canary(
    sender: Sender, make_get: Callable[..., Call[Runtime]], ledger: Ledger, target: RuntimeRef
) -> bool:
    """Send a GET once, before all new calls; return True if the server answers it."""
    call = make_get(*target)
    try:
        with observe_call(ledger.observer, call.operation, *target) as call.observer:
            await sender.request(call)
    except BctrlError as error:
        return error.status is not None and not is_unanswered(error)
    return True
