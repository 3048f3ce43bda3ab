"""The engine of a bulk stop: it reads the input, and gives each item exactly one outcome.

A cancelled worker still records its target, and the rest of a finite input is recorded as
`not_sent`.
"""

from __future__ import annotations

import asyncio
import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

import msgspec

from bctrl_async._calls.observing import notify
from bctrl_async.bulk._cancel import CancelLevel, RunState, Worker
from bctrl_async.bulk._delivery import OnOutcome
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._options import Options, Progress
from bctrl_async.bulk._parked import Parked
from bctrl_async.bulk._targets import Input, as_target, best_effort_ref, check_first
from bctrl_async.errors import BctrlError, BctrlResponseError, format_duration
from bctrl_async.models import RuntimeRef
from bctrl_async.observer import Observer
from bctrl_async.outcomes import StopOutcome, StopResult, outcome_of


class Engine(ABC):
    """A bulk stop, in this process or on a cluster: a subclass says what a worker does.

    The journal belongs to the server at `base_url`.
    """

    def __init__(
        self, source: Input, options: Options, base_url: str, observer: Observer | None
    ) -> None:
        self.source: Input = source
        self.options: Options = options
        self.parked: Parked = Parked()
        self.state: RunState = RunState(source, self.parked)
        self.ledger: Ledger = Ledger(self.state, missing_ok=options.missing_ok)
        self.error: BaseException | None = None
        self._base_url = base_url
        self._observer = observer
        self._tasks: dict[asyncio.Task[None], Worker] = {}
        self._has_no_task = asyncio.Event()
        self._deliveries: tuple[OnOutcome, ...] = ()

    @property
    @abstractmethod
    def progress(self) -> Progress:
        """The progress so far."""

    @abstractmethod
    def open(self) -> None:
        """Check that the run can start, in its event loop."""

    @abstractmethod
    def _start_work(self) -> None:
        """Start the workers."""

    @abstractmethod
    async def _process(self, worker: Worker, index: int, item: object) -> StopOutcome | None:
        """Process one item and return its outcome; None if it is recorded later."""

    # These methods execute the run as a whole, with its journal and its observer.

    async def feed(self, deliver: OnOutcome) -> None:
        """Execute the run, and keep its error for the reader of the outcomes."""
        try:
            # The caller enters its block first, even if tasks are eager.
            await asyncio.sleep(0)
            await self.execute(deliver)
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - raised where the outcomes are read.
            self.error = error

    async def execute(self, *deliveries: OnOutcome) -> None:
        """Execute the run; raise the error of the journal, the input or a delivery at its end."""
        on_outcome = self.options.on_outcome
        self._deliveries = deliveries if on_outcome is None else (on_outcome, *deliveries)
        if self._observer is not None:
            self.ledger.observer = notify(self._observer.begin_bulk)
        try:
            if self.options.journal is not None:
                await self.ledger.open(self.options.journal, self._base_url)
            await self._stop_all()
        except GeneratorExit:
            # The coroutine was closed; its tasks end without it, and the last closes the journal.
            self.state.cancel()
            raise
        finally:
            try:
                if not self._tasks:
                    await self.ledger.close()
            finally:
                self.ledger.end(self.source.count)

    async def _stop_all(self) -> None:
        """Give every target its outcome; then raise the error of the input or of a delivery."""
        source = self.source
        self._start_work()
        timer: asyncio.Handle | None = None
        if (deadline := self.options.deadline) is not None:
            passed = f"the deadline of {format_duration(deadline)} has passed"
            timer = asyncio.get_running_loop().call_later(
                deadline, self.state.ask_to_end, passed, CancelLevel.IN_FLIGHT
            )
        try:
            await self._wait_for_tasks()
        finally:
            if timer is not None:
                timer.cancel()
            # The report names the error even if the run is cancelled, since targets may be missing.
            if (failed := source.error) is not None:
                raised = BctrlError(f"the input raised {type(failed).__name__}")
                self.state.set_ended_early(failed if isinstance(failed, BctrlError) else raised)
        if (error := self.state.failure or failed) is not None:
            raise error
        if source.length is not None and not source.exhausted:
            self.state.set_ended_early(
                BctrlError(f"the input ended after {source.count:,} of {source.length:,} targets")
            )

    # These methods run tasks: each has a worker, and the run ends with the last task.

    async def _wait_for_tasks(self) -> None:
        """Wait until all tasks have ended, even if cancelled meanwhile."""
        cancelled: tuple[object, ...] | None = None
        while self._tasks or self.parked.count or self._starts_for_rest():
            try:
                # In a cancelled scope, anyio cancels this wait at every turn of the loop.
                await self._has_no_task.wait()
            except asyncio.CancelledError as error:
                cancelled = error.args
                self.state.cancel()
        if cancelled is not None:
            raise asyncio.CancelledError(*cancelled)

    def _starts_for_rest(self) -> bool:
        """Start a worker for the remaining items, if all workers were cancelled from outside."""
        if not self.source.closed:
            self.state.cancel()
            if self.source.can_drain:
                self._start(self._work)
        return bool(self._tasks)

    def _start(self, work: Callable[[Worker], Awaitable[None]]) -> asyncio.Task[None]:
        worker = Worker()
        # An eager task takes its first step within `create_task`.
        self.state.workers[worker] = None
        task = asyncio.create_task(self._guard(work, worker))
        self._tasks[task] = worker
        self._has_no_task.clear()
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        del self.state.workers[self._tasks.pop(task)]
        if self.parked.ready and not self._tasks:
            # All workers were cancelled from outside.
            self.state.cancel()
            self._start(self._work)
        if self._tasks or self.parked.count:
            return
        self._has_no_task.set()
        journal = self.ledger.journal
        if journal is not None and self.ledger.ended is not None:
            # The task's other callback may record an outcome, and must come first.
            task.get_loop().call_soon(self.ledger.release, journal)

    async def _guard(self, work: Callable[[Worker], Awaitable[None]], worker: Worker) -> None:
        """Do the work of a task; an exception ends the run, which raises it."""
        try:
            await work(worker)
        except BaseException as error:
            self.state.end_with(error, "on_outcome")
            if isinstance(error, asyncio.CancelledError | GeneratorExit):
                raise

    # These methods handle an item, whichever worker has it.

    async def _work(self, worker: Worker) -> None:
        """Take items of the input, and give them their outcomes, until it ends."""
        source, parked = self.source, self.parked
        while True:
            if parked.count or source.is_awaited:
                item = await self._next(worker)
            else:
                item = source.next_nowait()
            if item is None:
                return
            outcome = await self._process(worker, *item)
            if outcome is not None:
                await self._deliver_from(worker, outcome)
                if outcome.resumed or not outcome.attempts:
                    # The worker has not waited, so other tasks get a turn here.
                    await asyncio.sleep(0)

    async def _next(self, worker: Worker) -> tuple[int, object] | None:
        """Wait for the next item of an async or slow input."""
        with worker.scope():
            return await self.source.next()
        return None

    def _checked(self, index: int, item: object) -> RuntimeRef | StopOutcome:
        """Return an item as a target, or its outcome if it is not to be sent."""
        try:
            if not index:
                check_first(item)
            target = as_target(item)
        except BctrlError as error:
            if error.argument == "targets":
                self.state.fail(error)
            return self._reject(index, best_effort_ref(item), error)
        # If the input is the list of a workspace, it decides what is sent, not the journal.
        if self.source.found is None and (known := self.ledger.earlier(target)) is not None:
            return self.ledger.record(msgspec.structs.replace(known, index=index))
        return target

    def _reject(self, index: int, target: RuntimeRef, error: BctrlError) -> StopOutcome:
        result = StopResult.INVALID
        if isinstance(error, BctrlResponseError):
            # A listed runtime that cannot be read is a target, but what to do is not known.
            result = StopResult.REJECTED
        rejected = outcome_of(target, error.with_traceback(None), index=index, result=result)
        return self.ledger.record(self.source.with_listed(rejected))

    async def _deliver_from(self, worker: Worker, outcome: StopOutcome) -> None:
        """Deliver an outcome to all receivers, and wait until the worker may go on."""
        for deliver in self._deliveries:
            if self.state.level is CancelLevel.DELIVERY:
                return
            waits = deliver(outcome)
            # Most callbacks return None, which is checked in a tenth of the time of `isawaitable`.
            if waits is not None and inspect.isawaitable(waits):
                with worker.scope(CancelLevel.DELIVERY):
                    await waits
