"""The run of a bulk stop: its workers give each item of the input one outcome.

A cancelled worker still records its target, and the rest of a finite input is recorded
as `not_sent`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

from bctrl_async._calls.bulk_calls import BulkCalls
from bctrl_async._calls.observing import notify
from bctrl_async._calls.retry import BULK_PATIENCE
from bctrl_async._calls.sender import Sender
from bctrl_async.bulk._breaker import CircuitBreaker
from bctrl_async.bulk._cancel import CancelLevel
from bctrl_async.bulk._input import Input
from bctrl_async.bulk._intake import Intake
from bctrl_async.bulk._last_look import LastLook
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._options import OnOutcome, Options, verify_for
from bctrl_async.bulk._parked import Parked, Stop
from bctrl_async.bulk._poller import Poller
from bctrl_async.bulk._polls import Poll, Polls, Workspace
from bctrl_async.bulk._sender import BulkSender
from bctrl_async.bulk._state import Progress, RunState, Worker
from bctrl_async.errors import BctrlError, format_duration, session_closed
from bctrl_async.filters import Selection
from bctrl_async.observer import Observer
from bctrl_async.outcomes import StopOutcome

_JOBS_IN_A_ROW = 10
"""The number of outcomes that a poller records before other tasks get a turn."""


class Run:
    """A bulk stop, with its workers, and a few pollers beside them.

    The journal belongs to the server at `base_url`. The run is one of `open_runs` from
    its start until it is over.

    Its parts hold neither it nor its methods: a reference cycle would keep failures.
    """

    def __init__(
        self,
        source: Input,
        options: Options,
        sender: Sender,
        calls: BulkCalls,
        *,
        concurrency: int,
        base_url: str,
        observer: Observer | None,
        open_runs: dict[Run, None],
    ) -> None:
        self.source: Input = source
        self.parked: Parked = Parked()
        self.polls: Polls = Polls(calls.policy, verify_for(options.verify))
        self.state: RunState = RunState(source, self.parked, self.polls)
        self.ledger: Ledger = Ledger(self.state, missing_ok=options.missing_ok)
        self.error: BaseException | None = None
        self._ends_at = math.inf
        """The time of the deadline, once the run has started."""
        self._options = options
        self._base_url = base_url
        self._observer = observer
        self._concurrency = concurrency
        self._intake = Intake(source, self.ledger, calls)
        self._sender = sender
        patience = options.deadline or BULK_PATIENCE
        self._breaker = CircuitBreaker(sender, calls, patience, self.ledger)
        self._calls = BulkSender(sender, calls, self._breaker, self.ledger)
        self._make = calls
        self._poller = Poller(self.polls, self._calls, calls)
        self._poller_count = 0
        self._is_poller_starting = False
        self._is_looking = False
        """True once a last look has started."""
        self.receivers: list[OnOutcome] = []
        if options.on_outcome is not None:
            self.receivers.append(options.on_outcome)
        self._tasks: dict[asyncio.Task[None], Worker] = {}
        self._is_idle = asyncio.Event()
        """Set while nothing `is_busy`."""
        self._open_runs = open_runs
        self._is_over = asyncio.Event()
        """Set once every outcome is recorded, in the journal, too."""
        # A worker that waits for the input has no slot.
        self._slots = asyncio.Semaphore(concurrency)
        self._slots_in_use = 0
        self._worker_count = 0
        self._paused_workers = 0
        """The number of workers that ended because too many targets wait."""

    @property
    def is_busy(self) -> bool:
        """True while there are tasks, or targets that wait without a task."""
        return bool(self._tasks or self.parked.unsettled or self.polls.count)

    @property
    def progress(self) -> Progress:
        """The progress so far."""
        calls = [worker.call for worker in self.state.workers if worker.sends_stop]
        calls += self.parked.calls
        failures = (
            call.retries.last_failure for call in calls if call and not call.in_flight
        )
        return Progress(
            in_flight=self.state.in_flight,
            polling=self.polls.count,
            polling_for=self.polls.seconds_left(self._ends_at),
            # A count of 0 stays in the Counter.
            polling_failures=+self.polls.failures,
            is_full=self.polls.is_full,
            is_throttled=self._sender.limiter.is_throttled,
            retry_after=self._sender.limiter.retry_after,
            is_unanswered=self._breaker.is_open,
            is_looking=self._is_looking and self.is_busy,
            retrying=Counter(
                failure.type for failure in failures if failure is not None
            ),
        )

    def open(self) -> None:
        """Open the connection pool, in the current event loop."""
        self._sender.open_pool()

    async def feed(self) -> None:
        """Execute the run, and keep its error for the reader of the outcomes."""
        try:
            # The caller enters its block first, even if tasks are eager.
            await asyncio.sleep(0)
            await self.execute()
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - raised where outcomes are read.
            self.error = error

    async def execute(self) -> None:
        """Execute the run; then raise the error of journal, input or delivery."""
        self._open_runs[self] = None
        if self._observer is not None:
            self.ledger.observer = notify(self._observer.begin_bulk)
        try:
            try:
                if self._options.journal is not None:
                    await self.ledger.open(self._options.journal, self._base_url)
                await self._stop_all()
            finally:
                await self._close_journal()
        except (asyncio.CancelledError, GeneratorExit):
            self.state.cancel()
            raise
        except BctrlError as error:
            self.state.set_ended_early(error)
            raise
        except BaseException as error:
            self.state.set_ended_early(BctrlError(f"the run failed: {error!r}"))
            raise
        finally:
            if not self.source.is_exhausted:
                self._set_unread()
            if self._first_list is not None and not self.state.goes_on():
                # The run was left, or ended, before its last look had ended.
                self.ledger.set_look_error(self.state.reason)
            self.ledger.end(self.source.count)
            self._set_over()

    def _set_over(self) -> None:
        # If the coroutine was closed, the last of its tasks ends the run.
        if not self.is_busy:
            self._open_runs.pop(self, None)
            self._is_over.set()

    def end(self) -> None:
        """End the run early, as its session is closed."""
        self.state.end_early(session_closed(), CancelLevel.WAITING)

    async def wait_until_over(self) -> None:
        """Wait until the run is over, unless its user may be what waits."""
        is_delivering = self.receivers and self.state.level < CancelLevel.DELIVERY
        # An input, such as a generator, may close the session within a worker.
        if is_delivering or asyncio.current_task() in self._tasks:
            return
        await self._is_over.wait()

    async def _close_journal(self) -> None:
        # If the coroutine was closed, the last of its tasks closes the journal.
        if not self.is_busy:
            await self.ledger.close()

    async def _stop_all(self) -> None:
        """Give every target its outcome; then raise the error of input or delivery."""
        source = self.source
        for _ in range(self._concurrency):
            self._start(self._work)
        timer = self._start_timer()
        try:
            await self._wait_for_tasks()
            await self._look_again()
        finally:
            if timer is not None:
                timer.cancel()
            # Even if the run is cancelled, the report tells why targets are missing.
            if source.error is not None:
                self._set_input_error(source.error)
        error = self.state.failure or source.error
        if error is not None:
            raise error

    async def _look_again(self) -> None:
        """List a workspace once more, if all of its targets have their outcomes."""
        first = self._first_list
        if first is None or not self.state.goes_on():
            return
        self._is_looking = True
        look = LastLook(first, self._calls, self._make)
        self._start(partial(look.run, self._start))
        await self._wait_for_tasks()

    @property
    def _first_list(self) -> Selection | None:
        """The list that is to be compared with a last list; None if none is due."""
        if self.state.ended_early is not None or not self.polls.are_made:
            return None
        if not self.source.count:
            return None
        return self.source.selection

    def _start_timer(self) -> asyncio.TimerHandle | None:
        """Start the timer of the deadline, if any."""
        deadline = self._options.deadline
        if deadline is None:
            return None
        seconds_left = deadline
        if self.source.selection is not None:
            seconds_left = max(deadline - self.source.selection.seconds, 0.0)
        self._ends_at = _now() + seconds_left
        reason = f"the deadline of {format_duration(deadline)} has passed"
        return asyncio.get_running_loop().call_later(
            seconds_left, self.state.ask_to_end, reason, CancelLevel.IN_FLIGHT
        )

    def _set_unread(self) -> None:
        """Set why targets were not read, unless the reason is known."""
        source = self.source
        reason = "the input was not read to its end"
        if source.length is not None:
            counts = f"{source.count:,} of {source.length:,} targets"
            reason = f"the input ended after {counts}"
        self.state.set_ended_early(BctrlError(reason))

    def _set_input_error(self, error: BaseException) -> None:
        if not isinstance(error, BctrlError):
            error = BctrlError(f"the input raised {type(error).__name__}")
        self.state.set_ended_early(error)

    async def _wait_for_tasks(self) -> None:
        """Wait until all tasks have ended, even if cancelled meanwhile."""
        cancellation_args: tuple[object, ...] | None = None
        while True:
            if not self.is_busy:
                # The input has ended, or all workers were cancelled or have failed.
                self._start_for_rest()
                if not self.is_busy:
                    break
            try:
                # In a cancelled scope, anyio cancels this wait again and again.
                await self._is_idle.wait()
            except asyncio.CancelledError as error:
                cancellation_args = error.args
                self.state.cancel()
        if cancellation_args is not None:
            raise asyncio.CancelledError(*cancellation_args)

    def _start_for_rest(self) -> None:
        """Cancel a run whose input is open, and start a worker for the rest of it."""
        if not self.source.is_closed:
            self.state.cancel()
            # An input that is still open then has a length, and is drained.
            self._start(self._work)

    def _start(self, work: Callable[[Worker], Awaitable[None]]) -> asyncio.Task[None]:
        worker = Worker()
        # An eager task takes its first step within `create_task`.
        self.state.workers[worker] = None
        task = asyncio.create_task(self._guard(work, worker))
        self._tasks[task] = worker
        self._is_idle.clear()
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        del self.state.workers[self._tasks.pop(task)]
        if task.cancelled():
            # It was cancelled from outside, perhaps before its first step.
            self.state.cancel()
        if self.parked.ready and not self._tasks:
            self._start(self._work)
        self._start_poller()
        if self.is_busy:
            return
        self._is_idle.set()
        if self.ledger.ended_at is not None:
            # The coroutine of `execute` was closed before its tasks ended.
            if self.ledger.journal is not None:
                self.ledger.release(self.ledger.journal)
            self._set_over()

    async def _guard(
        self, work: Callable[[Worker], Awaitable[None]], worker: Worker
    ) -> None:
        """Do the work of a task; an exception ends the run, which raises it."""
        try:
            await work(worker)
        except BaseException as error:
            self.state.end_with(error, canceller="on_outcome")
            if isinstance(error, asyncio.CancelledError | GeneratorExit):
                raise

    def _start_worker(self) -> None:
        """Start another worker, unless every slot is taken."""
        if not self._slots.locked():
            self._start(self._work)

    async def _work(self, worker: Worker) -> None:
        """Take items of the input, and give them their outcomes, until it ends."""
        with worker.scope():
            await self.source.prepare(self._intake.write_running)
        self._worker_count += 1
        try:
            await self._take_slot(worker)
            await self._process_all(worker)
        finally:
            self._worker_count -= 1
            self._leave_slot(worker)

    async def _process_all(self, worker: Worker) -> None:
        source = self.source
        while True:
            # Most items need no coroutine.
            if self._reads_freely:
                item = source.next_nowait()
            else:
                item = await self._next(worker)
            if item is None:
                return
            outcome = await self._process(worker, *item)
            if outcome is not None:
                if self.receivers:
                    await self._deliver(worker, outcome)
                if outcome.resumed or not outcome.attempts:
                    # The worker has not waited, so other tasks get a turn here.
                    await asyncio.sleep(0)

    @property
    def _reads_freely(self) -> bool:
        """True if nothing comes before the next item, which needs no wait."""
        parked = self.parked
        if parked.unsettled or parked.ready or self.polls.is_full:
            return False
        return not self.source.is_awaited

    async def _next(self, worker: Worker) -> tuple[int, object] | None:
        """Take a parked stop, or the next item.

        None stands for the end of the input, or for a worker that is not needed now.
        """
        while not self.parked.ready:
            # A worker that was started while others waited for an item is surplus.
            if self._worker_count > self._concurrency:
                return None
            if self._is_full:
                self._paused_workers += 1
                return None
            if not self.source.is_awaited:
                return self.source.next_nowait()
            if not await self._await_item(worker):
                return None
        return self.parked.ready.popleft()

    async def _await_item(self, worker: Worker) -> bool:
        """Wait without a slot for an item that a worker may take; False at the end."""
        self._leave_slot(worker)
        # The scope ends without an item if it is cancelled.
        item = None
        with worker.scope():
            item = await self.source.next()
        if item is None:
            return False
        # If this worker is cancelled meanwhile, another takes the item.
        self.parked.ready.append(item)
        await self._take_slot(worker)
        return True

    async def _take_slot(self, worker: Worker) -> None:
        worker.has_slot = await self._slots.acquire()
        self._slots_in_use += 1

    def _leave_slot(self, worker: Worker) -> None:
        if worker.has_slot:
            worker.has_slot = False
            self._slots_in_use -= 1
            self._slots.release()

    async def _process(
        self, worker: Worker, index: int, item: object
    ) -> StopOutcome | None:
        """Process one item and return its outcome; None if it is recorded later."""
        stop = self._intake.stop(index, item)
        if isinstance(stop, StopOutcome):
            return stop
        try:
            result = None
            # None is a stop that is to be sent again.
            while result is None:
                result = await self._calls.send_stop(worker, stop)
        except BaseException:
            error = stop.call.error(stop.call.aborted(self.state.reason.summary))
            self.ledger.record(self._intake.outcome(stop, error), stop.observer)
            self._settle(stop)
            raise
        if isinstance(result, asyncio.Future):
            self.parked.add(stop, result)
            result.add_done_callback(partial(self._on_ready, stop))
            return None
        self._settle(stop)
        outcome = self._intake.outcome(stop, result)
        if not self.polls.needs(outcome):
            return self.ledger.record(outcome, stop.observer)
        if not self.state.goes_on():
            self.state.set_ended_early(self.state.reason)
            return self.ledger.record(outcome, stop.observer)
        history = stop.call.retries
        self.polls.add(outcome, stop.started, stop.observer, _now(), history)
        self._start_poller()
        return None

    def _on_ready(self, stop: Stop, _: asyncio.Future[None]) -> None:
        self.parked.make_ready(stop)
        self._start_worker()

    def _settle(self, stop: Stop) -> None:
        self.parked.settle(stop)
        self._resume_worker()

    @property
    def _is_full(self) -> bool:
        """True while nothing is read, because too many targets wait."""
        return self.parked.is_full or self.polls.is_full

    def _resume_worker(self) -> None:
        """Start a worker in place of a paused worker, unless too many targets wait."""
        if self._paused_workers and not self._is_full:
            self._paused_workers -= 1
            # An eager worker would take its item within this settling, and so on.
            asyncio.get_running_loop().call_soon(self._start_worker)

    def _start_poller(self) -> None:
        """Start a poller if a poll is due, or else wait for the next.

        A new poller takes its job at its first step, and then asks for another poller.
        """
        polls = self.polls
        next_at = polls.next_at
        # If the session is closed, the next is due now, but there may be none.
        if next_at == math.inf:
            return
        if next_at > self._poll_time():
            if next_at < polls.timer_at:
                timer = self._sender.limiter.start_sleep(next_at - _now())
                polls.set_timer(timer, next_at)
                timer.add_done_callback(self._on_poll_timer)
            return
        if self._is_poller_starting or self._poller_count >= self._max_pollers:
            return
        self._is_poller_starting = True
        self._poller_count += 1
        self._start(self._poll).add_done_callback(self._on_poller_done)

    @property
    def _max_pollers(self) -> int:
        """The slots that the workers leave, and at least a tenth of all."""
        free = self._concurrency - self._slots_in_use
        return max(free, self._concurrency // 10, 1)

    def _poll_time(self) -> float:
        """Return the time until which polls are due; all are if the session closed."""
        return math.inf if self._sender.limiter.is_closed() else _now()

    def _on_poll_timer(self, timer: asyncio.Future[None]) -> None:
        self.polls.forget_timer(timer)
        self._start_poller()

    def _on_poller_done(self, _: asyncio.Task[None]) -> None:
        self._is_poller_starting = False
        self._poller_count -= 1
        self._start_poller()

    async def _poll(self, worker: Worker) -> None:
        """Make polls that are due, and record what is settled, until nothing is due."""
        self._is_poller_starting = False
        jobs = 0
        while True:
            job = self.polls.take(self._poll_time())
            if job is None:
                return
            asyncio.get_running_loop().call_soon(self._start_poller)
            outcome = await self._poller.work(worker, job, self._hold(job))
            if outcome is not None:
                self._resume_worker()
                if self.receivers:
                    await self._deliver(worker, outcome)
            if self._poller_count > self._max_pollers:
                return
            jobs += 1
            if jobs % _JOBS_IN_A_ROW == 0:
                await asyncio.sleep(0)

    @contextmanager
    def _hold(self, job: Poll | Workspace) -> Iterator[None]:
        """Let another poller take its place while a job waits for its turn."""
        self._poller_count -= 1
        try:
            with self.polls.hold(job):
                # An eager poller may hold its job at once, too, and so on.
                asyncio.get_running_loop().call_soon(self._start_poller)
                yield
        finally:
            self._poller_count += 1

    async def _deliver(self, worker: Worker, outcome: StopOutcome) -> None:
        """Deliver an outcome to all receivers, and wait until the worker may go on."""
        for deliver in self.receivers:
            if self.state.level is CancelLevel.DELIVERY:
                return
            return_value = deliver(outcome)
            # Most callbacks return None; `isawaitable` would take ten times as long.
            if return_value is not None and inspect.isawaitable(return_value):
                with worker.scope(CancelLevel.DELIVERY):
                    await return_value


def _now() -> float:
    return asyncio.get_running_loop().time()
