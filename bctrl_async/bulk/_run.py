"""The run of a bulk stop: its workers give each item of the input one outcome.

A cancelled worker still records its target, and the rest of a finite input is recorded
as `not_sent`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

from bctrl_async._calls.call import Call
from bctrl_async._calls.observing import notify
from bctrl_async._calls.retry import BULK_PATIENCE, RetryPolicy
from bctrl_async._calls.sender import Sender
from bctrl_async.bulk._breaker import CircuitBreaker
from bctrl_async.bulk._cancel import CancelLevel
from bctrl_async.bulk._input import Input
from bctrl_async.bulk._intake import Intake
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._options import OnOutcome, Options, verify_for
from bctrl_async.bulk._parked import Parked, Stop
from bctrl_async.bulk._sender import BulkSender
from bctrl_async.bulk._state import Progress, RunState, Worker
from bctrl_async.bulk._verify import Polls
from bctrl_async.errors import BctrlError, format_duration
from bctrl_async.models import Runtime
from bctrl_async.observer import Observer
from bctrl_async.outcomes import StopOutcome


class Run:
    """A bulk stop, with its workers, and the pollers beside them.

    `make_call` makes the call of a target, and raises BctrlConfigError if its name is
    invalid; `make_canary` and `make_poll` make a GET of it, with a `policy`. The
    journal belongs to the server at `base_url`.

    Its parts hold neither it nor its methods: a reference cycle would keep failures.
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
        self.source: Input = source
        self.parked: Parked = Parked()
        self.state: RunState = RunState(source, self.parked)
        self.ledger: Ledger = Ledger(self.state, missing_ok=options.missing_ok)
        self.error: BaseException | None = None
        self._options = options
        self._base_url = base_url
        self._observer = observer
        self._concurrency = concurrency
        self._intake = Intake(source, self.ledger, make_call)
        self._sender = sender
        patience = options.deadline or BULK_PATIENCE
        self._breaker = CircuitBreaker(
            sender, policy, patience, make_canary, self.ledger
        )
        self._calls = BulkSender(sender, policy, self._breaker, self.ledger)
        self._polls = Polls(self._calls, make_poll, verify_for(options.verify))
        self.receivers: list[OnOutcome] = []
        if options.on_outcome is not None:
            self.receivers.append(options.on_outcome)
        self._tasks: dict[asyncio.Task[None], Worker] = {}
        self._is_idle = asyncio.Event()
        """Set while there is no task and no parked stop."""
        # A worker that waits for the input has no slot.
        self._slots = asyncio.Semaphore(concurrency)
        self._worker_count = 0

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
            polling=len(self._polls.outcomes),
            is_throttled=self._sender.limiter.is_throttled,
            retry_after=self._sender.limiter.retry_after,
            is_unanswered=self._breaker.is_open,
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
        if self._observer is not None:
            self.ledger.observer = notify(self._observer.begin_bulk)
        try:
            if self._options.journal is not None:
                await self.ledger.open(self._options.journal, self._base_url)
            await self._stop_all()
        except GeneratorExit:
            # The coroutine was closed; the last of its tasks closes the journal.
            self.state.cancel()
            raise
        finally:
            try:
                if not self._tasks:
                    await self.ledger.close()
            finally:
                self.ledger.end(self.source.count)

    async def _stop_all(self) -> None:
        """Give every target its outcome; then raise the error of input or delivery."""
        source = self.source
        for _ in range(self._concurrency):
            self._start(self._work)
        timer = self._start_timer()
        try:
            await self._wait_for_tasks()
        finally:
            if timer is not None:
                timer.cancel()
            # Even if the run is cancelled, the report tells why targets are missing.
            if source.error is not None:
                self._set_input_error(source.error)
        error = self.state.failure or source.error
        if error is not None:
            raise error
        if source.length is not None and not source.is_exhausted:
            counts = f"{source.count:,} of {source.length:,} targets"
            self.state.set_ended_early(BctrlError(f"the input ended after {counts}"))

    def _start_timer(self) -> asyncio.TimerHandle | None:
        """Start the timer of the deadline, if any."""
        deadline = self._options.deadline
        if deadline is None:
            return None
        reason = f"the deadline of {format_duration(deadline)} has passed"
        return asyncio.get_running_loop().call_later(
            deadline, self.state.ask_to_end, reason, CancelLevel.IN_FLIGHT
        )

    def _set_input_error(self, error: BaseException) -> None:
        if not isinstance(error, BctrlError):
            error = BctrlError(f"the input raised {type(error).__name__}")
        self.state.set_ended_early(error)

    async def _wait_for_tasks(self) -> None:
        """Wait until all tasks have ended, even if cancelled meanwhile."""
        cancellation_args: tuple[object, ...] | None = None
        while True:
            if not (self._tasks or self.parked.unsettled):
                # The input has ended, or all workers were cancelled or have failed.
                self._start_for_rest()
                if not self._tasks:
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
            if self.source.can_drain:
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
        if self.parked.ready and not self._tasks:
            # All workers were cancelled from outside.
            self.state.cancel()
            self._start(self._work)
        if self._tasks or self.parked.unsettled:
            return
        self._is_idle.set()
        journal = self.ledger.journal
        if journal is not None and self.ledger.ended_at is not None:
            # The coroutine of `execute` was closed before its tasks ended. `on_end` of
            # the polls may record an outcome, and must come first.
            task.get_loop().call_soon(self.ledger.release, journal)

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
            worker.has_slot = await self._slots.acquire()
            await self._process_all(worker)
        finally:
            self._worker_count -= 1
            if worker.has_slot:
                self._slots.release()

    async def _process_all(self, worker: Worker) -> None:
        source = self.source
        parked = self.parked
        while True:
            # Most items need no coroutine.
            if parked.ready or parked.unsettled or source.is_awaited:
                item = await self._next(worker)
            else:
                item = source.next_nowait()
            if item is None:
                return
            outcome = await self._process(worker, *item)
            if outcome is not None:
                if self.receivers:
                    await self._deliver(worker, outcome)
                if outcome.resumed or not outcome.attempts:
                    # The worker has not waited, so other tasks get a turn here.
                    await asyncio.sleep(0)

    async def _next(self, worker: Worker) -> tuple[int, object] | None:
        """Take a parked stop, or the next item.

        None stands for the end of the input, or for a worker that is not needed now.
        """
        while not self.parked.ready:
            # Nothing is read while `parked` is full; `_settle` starts a worker later.
            # A worker that was started while others waited for an item is surplus.
            if self.parked.is_full or self._worker_count > self._concurrency:
                return None
            if not self.source.is_awaited:
                return self.source.next_nowait()
            if not await self._await_item(worker):
                return None
        return self.parked.ready.popleft()

    async def _await_item(self, worker: Worker) -> bool:
        """Wait without a slot for an item that a worker may take; False at the end."""
        self._slots.release()
        worker.has_slot = False
        # The scope ends without an item if it is cancelled.
        item = None
        with worker.scope():
            item = await self.source.next()
        if item is None:
            return False
        # If this worker is cancelled meanwhile, another takes the item.
        self.parked.ready.append(item)
        worker.has_slot = await self._slots.acquire()
        return True

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
        if not self._polls.needs(outcome):
            return self.ledger.record(outcome, stop.observer)
        return await self._verify(worker, stop, outcome)

    def _on_ready(self, stop: Stop, _: asyncio.Future[None]) -> None:
        self.parked.make_ready(stop)
        self._start_worker()

    def _settle(self, stop: Stop) -> None:
        was_full = self.parked.is_full
        self.parked.settle(stop)
        if was_full:
            self._start_worker()

    async def _verify(
        self, worker: Worker, stop: Stop, outcome: StopOutcome
    ) -> StopOutcome | None:
        """Start a poller; if too many poll, poll here and return the outcome.

        With a poller, the worker goes on: a runtime may take long to end, while targets
        that are not sent yet keep running.
        """
        self._polls.outcomes[stop] = outcome
        if self._polls.is_full:
            return await self._polls.poll(stop, worker)
        poller = self._start(partial(self._poll, stop))
        # If the poller is cancelled before its first step, this callback records the
        # outcome.
        poller.add_done_callback(partial(self._polls.on_end, stop))
        return None

    async def _poll(self, stop: Stop, worker: Worker) -> None:
        await self._deliver(worker, await self._polls.poll(stop, worker))

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
