"""The run of a bulk stop: workers that pull targets, and the ways in which they end early.

Every item that is read gets exactly one outcome. A cancelled worker still records its target, and
the rest of a finite input is recorded as `not_sent`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

import msgspec

from bctrl_async._calls.call import Call, annotate
from bctrl_async._calls.observing import notify
from bctrl_async._calls.retry import BULK_PATIENCE, RetryPolicy
from bctrl_async._calls.sender import Sender
from bctrl_async._http.operations import STOP
from bctrl_async._limiter.limiter import Priority
from bctrl_async.bulk._breaker import CircuitBreaker
from bctrl_async.bulk._canary import Canary, MakeRead
from bctrl_async.bulk._cancel import CancelLevel, Ending, Worker
from bctrl_async.bulk._delivery import Deliver
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._sending import BulkSender
from bctrl_async.bulk._targets import Input, as_target, best_effort_ref
from bctrl_async.bulk._verify import Pending, Verifier, needs_verification
from bctrl_async.errors import BctrlConfigError, BctrlError, error_type
from bctrl_async.filters import FoundTargets
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.observer import StopObserver
from bctrl_async.outcomes import StopOutcome, StopResult, outcome_of

_RUNS_AGAIN = BctrlError("the workspace was listed, and it runs again")


class Run:
    """One bulk stop.

    Args:
        source: The targets.
        sender: Sends the calls.
        make_call: Makes the call of a target; raises BctrlConfigError if the target is invalid.
        make_read: Makes a GET of a target.
        verify: True to poll the targets whose runtimes may still be running.
        policy: The retry policy.
        concurrency: The number of workers.
        deadline: Seconds until the run is aborted, or None.
        missing_ok: Do not count `not_found` as a failure.

    Attributes:
        source: The targets.
        sender: The sender.
        ledger: The outcomes so far.
    """

    def __init__(
        self,
        source: Input,
        sender: Sender,
        *,
        make_call: Callable[[str, str], Call[Runtime]],
        make_read: MakeRead,
        verify: bool,
        policy: RetryPolicy,
        concurrency: int,
        deadline: float | None,
        missing_ok: bool,
    ) -> None:
        self.source: Input = source
        self.sender: Sender = sender
        self._make_call = make_call
        self._ending = Ending()
        self.ledger: Ledger = Ledger(
            lambda error: self.end_early(error, CancelLevel.WAITING), missing_ok=missing_ok
        )
        self._breaker = CircuitBreaker(
            sender,
            policy,
            deadline or BULK_PATIENCE,
            is_answered=Canary(sender, make_read, policy, self.ledger).is_answered,
            in_flight=lambda: self.in_flight,
        )
        self._bulk_sender = BulkSender(
            sender, self._breaker, self.ledger, self._ending, self.end_early
        )
        self._deadline = deadline
        self._workers = [Worker() for _ in range(concurrency)]
        self._tasks: list[asyncio.Task[None]] = []
        self._deliver: Deliver | None = None
        self._failure: BaseException | None = None
        self._has_read_list = False
        self._verifier: Verifier | None = None
        if verify:
            self._verifier = Verifier(
                self.ledger,
                make_poll=partial(make_read, policy=policy, priority=Priority.POLL),
                send=self._bulk_sender.send,
                may_send=self._ending.goes_on,
                deadline=deadline,
            )

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return sum(worker.call is not None and worker.call.in_flight for worker in self._active())

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
        """The targets that wait for a further attempt, by what came of the last one."""
        calls = (worker.call for worker in self._workers if worker.is_stopping)
        failures = (
            call.retries.last_failure
            for call in calls
            if call and call.retries and not call.in_flight
        )
        return Counter(error_type(failure) for failure in failures if failure is not None)

    def _active(self) -> Iterator[Worker]:
        yield from self._workers
        if self._verifier is not None:
            yield from self._verifier.workers

    def open(self) -> None:
        """Open the connection pool, in the current event loop."""
        self.sender.open_pool()

    def end_early(self, reason: BctrlError, level: CancelLevel) -> None:
        """Cancel as much of the run as the level says, for this reason."""
        leaves_stops = level is not CancelLevel.READING and any(
            worker.is_stopping for worker in self._workers
        )
        if leaves_stops or not self.source.exhausted:
            self.ledger.end_early(reason)
        self.source.end()
        self._ending.raise_to(level, reason)
        if level is CancelLevel.DELIVERY:
            self._deliver = None
        for worker in list(self._active()):
            if worker.cancel(level):
                self.ledger.end_early(reason)

    def cancel(self) -> None:
        """Cancel the run: record the rest, and deliver no further outcome."""
        self.end_early(BctrlError("the run was cancelled"), CancelLevel.DELIVERY)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self.end_early(BctrlError(f"the run failed: {error!r}"), CancelLevel.DELIVERY)

    async def run(self, deliver: Deliver | None) -> None:
        """Give every target its outcome.

        Args:
            deliver: Called with each outcome, if given.

        Raises:
            BaseException: The error of the input or of `deliver`, once every target that was read
                has its outcome.
        """
        self._deliver = deliver
        for worker in self._workers:
            self._tasks.append(self._start(partial(self._work, worker)))
        timer: asyncio.TimerHandle | None = None
        if self._deadline is not None:
            passed = BctrlError(f"the deadline of {self._deadline:g} s has passed")
            timer = asyncio.get_running_loop().call_later(
                self._deadline, self.end_early, passed, CancelLevel.IN_FLIGHT
            )
        try:
            await self._wait_for_tasks()
        finally:
            if timer is not None:
                timer.cancel()
            # Also if cancelled: such an input says nothing of the targets that it did not yield.
            if (failed := self.source.error) is not None:
                raised = BctrlError(f"the input raised {type(failed).__name__}")
                self.ledger.end_early(failed if isinstance(failed, BctrlError) else raised)
        if (error := self._failure or failed) is not None:
            raise error

    async def _wait_for_tasks(self) -> None:
        """Wait until all tasks have ended, also if cancelled meanwhile."""
        cancelled: asyncio.CancelledError | None = None
        while pending := self._pending_tasks():
            try:
                await asyncio.wait(pending)
            except asyncio.CancelledError as error:
                cancelled = error
                self.cancel()
            except GeneratorExit:
                # The coroutine was closed; the tasks end without it.
                self.cancel()
                raise
        if cancelled is not None:
            raise cancelled

    def _pending_tasks(self) -> list[asyncio.Task[None]]:
        tasks = [task for task in self._tasks if not task.done()]
        if not tasks and not self.source.closed:
            # All workers were cancelled from outside: another one records the rest.
            self.cancel()
            if self.source.can_drain:
                self._tasks = tasks = [self._start(partial(self._work, Worker()))]
        return tasks + ([] if self._verifier is None else self._verifier.tasks)

    def _start(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        return asyncio.create_task(self._guard(work))

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work of a task; an exception ends the run, which raises it."""
        try:
            await work()
        except BaseException as error:
            self._end_with(error)
            if isinstance(error, asyncio.CancelledError | GeneratorExit):
                raise

    def _end_with(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            self.cancel()
        elif not isinstance(error, GeneratorExit):
            self._fail(error)

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

    async def _next(self, worker: Worker) -> tuple[int, object] | None:
        with worker.scope():
            return await self.source.next()
        return None

    def _delivered(self, outcome: StopOutcome) -> Awaitable[None] | None:
        """Deliver an outcome; return what to await before the next."""
        return None if self._deliver is None else self._deliver(outcome)

    async def _process(self, worker: Worker, index: int, item: object) -> StopOutcome | None:
        """Process one item and return its outcome; None if it is recorded later."""
        began = time.monotonic()
        try:
            target = as_target(item)
        except BctrlError as error:
            return self._reject(index, best_effort_ref(item), error)
        try:
            call = self._make_call(*target)
        except BctrlConfigError as error:
            annotate(error, STOP.name, *target)
            return self._reject(index, target, error)
        if self.source.found is not None and not self._has_read_list:
            self._has_read_list = True
            self._write_running_again(self.source.found)
        if (known := self.ledger.not_running.get(target)) is not None:
            return self.ledger.record(msgspec.structs.replace(known, index=index))
        return await self._stop_target(worker, index, target, call, began)

    def _write_running_again(self, found: FoundTargets) -> None:
        """Forget the earlier outcomes of targets that the list has as running, in the journal too.

        It is done before any of them is sent: after a crash, the journal must not have them as
        stopped.
        """
        known, may_run = self.ledger.not_running, found.listed.may_run
        for index, target in enumerate(found if known else ()):
            if isinstance(target, RuntimeRef) and target in known and may_run(target):
                again = outcome_of(target, _RUNS_AGAIN, index=index)
                self.ledger.write(self.source.with_listed(again))
        self.ledger.not_running = {
            target: outcome for target, outcome in known.items() if not may_run(target)
        }

    def _reject(self, index: int, target: RuntimeRef, error: BctrlError) -> StopOutcome:
        error = error.with_traceback(None)
        rejected = outcome_of(target, error, index=index, result=StopResult.REJECTED)
        return self.ledger.record(self.source.with_listed(rejected))

    async def _stop_target(
        self, worker: Worker, index: int, target: RuntimeRef, call: Call[Runtime], began: float
    ) -> StopOutcome | None:
        observer: StopObserver | None = None
        ended: Runtime | BctrlError = self._ending.not_begun
        try:
            if self._ending.level is None:
                if self.ledger.observer is not None:
                    observer = notify(self.ledger.observer.begin_stop, *target)
                    call.observer = observer
                ended = await self._bulk_sender.send(worker, call)
        except BaseException as error:
            try:
                self._end_with(error)
            finally:
                # Also in a loop that is closed, where no task can be cancelled.
                aborted = call.aborted(self._ending.reason.summary)
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
            outcome_of(target, ended, index=index, attempts=call.attempts, elapsed=elapsed)
        )

    async def _verify_or_record(self, worker: Worker, pending: Pending) -> StopOutcome | None:
        """Record an outcome, or leave it to a poller if it must be verified first.

        The worker goes on meanwhile: a runtime may take its time, and what is not begun goes on
        running. Only beyond the limit of pollers does it poll its own target.
        """
        verifier = self._verifier
        if (
            verifier is None
            or not self._ending.goes_on()
            or not needs_verification(pending.outcome)
        ):
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
