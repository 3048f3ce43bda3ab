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
from bctrl_async._limiter.limiter import RecalledError
from bctrl_async.bulk._breaker import CircuitBreaker
from bctrl_async.bulk._cancel import CancelLevel, Worker, wait_shielded
from bctrl_async.bulk._engine import Engine
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._options import Options, Progress
from bctrl_async.bulk._parked import Stop
from bctrl_async.bulk._targets import Input
from bctrl_async.bulk._verify import needs_verification, outcome_after_poll, verify_for
from bctrl_async.errors import (
    THROTTLED,
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
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
_MAX_TOKEN_ASKS = 3
"""The number of asks after which a parked stop asks for a token no more seldom."""
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
        # A worker that waits for the input has none of them.
        self._slots = asyncio.Semaphore(concurrency)
        self._working = 0

    @property
    def progress(self) -> Progress:
        """The progress so far."""
        calls = [worker.call for worker in self.state.workers if worker.is_stopping]
        calls += self.parked.calls
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
        self._working += 1
        try:
            worker.has_slot = await self._slots.acquire()
            await super()._work(worker)
        finally:
            self._working -= 1
            if worker.has_slot:
                self._slots.release()

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

    async def _next(self, worker: Worker) -> tuple[int, object] | None:
        """Take a stop that was parked, or the next item; None if another worker will."""
        if self.parked.ready:
            return self.parked.ready.popleft()
        if self.parked.is_full or self._working > self._concurrency:
            return None
        if not self.source.is_awaited:
            return self.source.next_nowait()
        return await self._next_of_awaited(worker)

    async def _next_of_awaited(self, worker: Worker) -> tuple[int, object] | None:
        self._slots.release()
        worker.has_slot = False
        item = await super()._next(worker)
        if item is None:
            return None
        try:
            worker.has_slot = await self._slots.acquire()
        except asyncio.CancelledError:
            self.parked.ready.append(item)
            raise
        return item

    async def _process(self, worker: Worker, index: int, item: object) -> StopOutcome | None:
        stop = self._as_stop(index, item)
        if isinstance(stop, StopOutcome):
            return stop
        try:
            result = await self._send_stop(worker, stop)
        except BaseException:
            aborted = stop.call.aborted(self.state.reason.summary)
            self.ledger.record(self._outcome(stop, aborted), stop.observer)
            self._settle(stop)
            raise
        if result is None:
            return None
        self._settle(stop)
        outcome = self._outcome(stop, result)
        if not self._verify_for or not self.state.goes_on() or not needs_verification(outcome):
            return self.ledger.record(outcome, stop.observer)
        return await self._verify(worker, Unverified(outcome, stop.started, stop.observer))

    def _as_stop(self, index: int, item: object) -> Stop | StopOutcome:
        """Return the stop of an item, or its outcome if it is not to be sent."""
        if isinstance(item, Stop):
            return item
        started = time.monotonic()
        target = self._checked(index, item)
        if isinstance(target, StopOutcome):
            return target
        try:
            call = self._make_call(*target)
        except BctrlConfigError as error:
            annotate(error, STOP.name, *target)
            return self._reject(index, target, error)
        return Stop(index, target, call, started)

    async def _send_stop(self, worker: Worker, stop: Stop) -> Runtime | BctrlError | None:
        """Send a stop, unless the run is over; None if it is parked."""
        call = stop.call
        error = await self._take_up(worker, stop)
        if error is not None:
            return error
        if self.ledger.observer is not None and not stop.is_notified:
            stop.is_notified = True
            stop.observer = call.observer = notify(self.ledger.observer.begin_stop, *stop.target)
        # A stop in doubt is woken early if the run is over.
        delay = call.retries.resume(_now())
        if self._waits_for_token(stop) or self._waits_in_lane(stop):
            return None
        result = await self._send(worker, call, delay)
        if isinstance(result, RecalledError):
            return await self._send_stop(worker, stop)
        if call.retries.resumes_at is None:
            return result
        if not self.state.goes_on():
            return await self._send_stop(worker, stop)
        self._park(stop, self.sender.limiter.start_sleep(call.retries.resumes_at - _now()))
        return None

    async def _take_up(self, worker: Worker, stop: Stop) -> BctrlError | None:
        """Take up a stop that may have been parked; return its error if it is not to be sent."""
        limiter = self.sender.limiter
        call = stop.call
        error = None
        if stop.waiter is not None:
            error = limiter.enter_lane(stop.waiter)
            stop.waiter = None
        elif call.retries.throttled and self._may_retry(call):
            with worker.scope():
                await self.breaker.compare(call)
        if not self._may_retry(call):
            limiter.leave_lane(call.retries)
            return await self._give_up(call)
        if error is not None:
            call.annotate(error)
            self._end_if_all_will_fail(error)
        return error

    async def _give_up(self, call: Call[Runtime]) -> BctrlError:
        """Return the error of a stop that is not sent, or not again, as the run is over."""
        self.state.set_ended_early(self.state.reason)
        if not call.attempts:
            return self.state.not_begun
        # The other tasks get a turn, however many stops are recorded here.
        await asyncio.sleep(0)
        return call.aborted(self.state.reason.summary)

    def _waits_for_token(self, stop: Stop) -> bool:
        """Park a stop while the retry quota is exhausted."""
        retries = stop.call.retries
        if not retries.lacks_quota or retries.ask_quota() is not None:
            return False
        stop.token_asks += 1
        delay = probe_delay(self._policy, min(stop.token_asks, _MAX_TOKEN_ASKS))
        self._park(stop, self.sender.limiter.start_sleep(delay))
        return True

    def _waits_in_lane(self, stop: Stop) -> bool:
        """Park a stop in the lane of its workspace; return False if it need not wait."""
        retries = stop.call.retries
        if not self.state.goes_on():
            # Nothing is parked any more, so it waits in the lane with its worker.
            retries.may_park = False
            return False
        stop.waiter = self.sender.limiter.enqueue(
            retries.policy.max_throttle_wait, stop.call.priority, retries
        )
        if stop.waiter is None:
            return False
        self._park(stop, stop.waiter.admitted)
        return True

    def _park(self, stop: Stop, future: asyncio.Future[None]) -> None:
        self.parked.add(stop, future)
        future.add_done_callback(lambda _: self._on_ready(stop))

    def _on_ready(self, stop: Stop) -> None:
        self.parked.make_ready(stop)
        self._start_worker()

    def _settle(self, stop: Stop) -> None:
        was_full = self.parked.is_full
        self.parked.settle(stop)
        if was_full:
            self._start_worker()

    def _start_worker(self) -> None:
        """Start another worker, unless as many as may are at work."""
        if not self._slots.locked():
            self._start(self._work)

    def _outcome(self, stop: Stop, result: Runtime | BctrlError) -> StopOutcome:
        return self.source.with_listed(
            outcome_of(
                stop.target,
                result,
                index=stop.index,
                attempts=stop.call.attempts,
                elapsed=time.monotonic() - stop.started,
                request_id=stop.call.request_id,
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
        throttled = call.retries.throttled
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
            self.state.end_with(error, "the call")
            raise
        finally:
            worker.call = call.wait_to_retry = None
            self.breaker.leave(call)
            self.sender.limiter.leave_lane(call.retries)
            self.ledger.throttled += call.retries.throttled - throttled
        if ended is None or call.cut_off:
            return call.aborted(self.state.reason.summary)
        if isinstance(ended, Runtime):
            self.breaker.on_answer(call)
        else:
            self._end_if_all_will_fail(ended)
        return ended

    async def _wait_to_retry(self, call: Call[Runtime], until: float | None = None) -> bool:
        """Wait before retrying a call; return False to give up, at the latest at a time.

        A stop that was throttled does not wait here: it is parked.
        """
        failure = call.retries.last_failure
        if not self._may_retry(call):
            if failure is not None and is_transient(failure, self._policy.statuses):
                self.state.set_ended_early(self.state.reason)
                call.cut_off = True
            return False
        if failure is not None and failure.status in THROTTLED and call.operation.stops:
            delay = self.breaker.delay_of_throttled(call)
            if delay is not None:
                call.retries.resumes_at = asyncio.get_running_loop().time() + delay
            return False
        try:
            async with asyncio.timeout_at(until):
                return await self.breaker.wait_to_retry(call)
        except TimeoutError:
            return False

    def _may_retry(self, call: Call[Runtime]) -> bool:
        """Return True unless the run is over for this call; a stop in doubt goes on for longer."""
        is_in_doubt = call.operation.stops and call.in_doubt
        return self.state.goes_on() or (self.state.level is CancelLevel.READING and is_in_doubt)

    def _end_if_all_will_fail(self, error: BctrlError) -> None:
        # The Retry-After of a target ends the run only if it holds all.
        is_held = self.sender.limiter.retry_after_of_all > self._policy.max_throttle_wait
        if is_held or isinstance(error, BctrlAuthenticationError | BctrlConfigError):
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


def _now() -> float:
    return asyncio.get_running_loop().time()
