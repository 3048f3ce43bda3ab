"""The engine of a bulk stop: it reads the input, and gives each item exactly one outcome.

A cancelled worker still records its target, and the rest of a finite input is recorded as
`not_sent`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable

import msgspec

from bctrl_async import _config
from bctrl_async._calls.call import as_failure, is_cancelled
from bctrl_async._calls.observing import notify
from bctrl_async._calls.retry import RetryPolicy
from bctrl_async._http import transport
from bctrl_async.bulk._cancel import CancelLevel, RunState, Worker, wait_shielded
from bctrl_async.bulk._delivery import OnOutcome
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._parked import Parked
from bctrl_async.bulk._targets import Input, as_target, best_effort_ref, check_first
from bctrl_async.bulk._verify import verify_for
from bctrl_async.errors import BctrlError, BctrlResponseError, format_duration, log_fields
from bctrl_async.journal import Journal, open_journal
from bctrl_async.models import RuntimeRef
from bctrl_async.observer import Observer
from bctrl_async.outcomes import StopOutcome, StopResult, outcome_of

_log = logging.getLogger("bctrl_async")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of a bulk stop; raises BctrlConfigError if any is invalid."""

    concurrency: int | None
    deadline: float | None
    on_outcome: OnOutcome | None
    timeout: float | None
    retry: RetryPolicy | None
    journal: Journal | str | os.PathLike[str] | None
    verify: bool | float
    missing_ok: bool

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.concurrency is not None:
            _config.count(self.concurrency, "concurrency")
        if self.deadline is not None:
            _config.seconds(self.deadline, "deadline")
        if self.timeout is not None:
            transport.time_limit(self.timeout)
        verify_for(self.verify)
        _config.check_type(self.retry, RetryPolicy | None, "retry", "a RetryPolicy")
        expected = "the path of a file, or a Journal"
        _config.check_type(self.journal, Journal | str | os.PathLike | None, "journal", expected)
        _config.check_type(self.missing_ok, bool, "missing_ok", "a bool")
        if self.on_outcome is not None and not callable(self.on_outcome):
            raise _config.invalid_type("on_outcome", type(self.on_outcome), "a function")


class Progress(msgspec.Struct, frozen=True):
    """The activity of a bulk stop at one moment, as `StopBatch.progress` returns it.

    Args:
        in_flight: The number of requests in flight.
        polling: The number of runtimes that are polled until they have stopped (`verify=`).
        is_throttled: True while the session slows down because of a 429 or 503.
        retry_after: The seconds for which the server has asked to wait (Retry-After); 0 if it has
            not. In a pause of more than a minute, one attempt a minute is made as a probe.
        is_unanswered: True while the server answers nothing and is only probed.
        retrying: The number of targets that wait for another attempt, by the result of their last:
            a status such as `"500"`, or an error's class such as `"BctrlTimeoutError"`.
    """

    in_flight: int
    polling: int = 0
    is_throttled: bool = False
    retry_after: float = 0.0
    is_unanswered: bool = False
    retrying: Counter[str] = msgspec.field(default_factory=Counter)


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
        self._failure: BaseException | None = None

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

    def cancel(self) -> None:
        """Cancel the run: record the other targets, and deliver no more outcomes."""
        self.state.ask_to_end("the run was cancelled", CancelLevel.DELIVERY)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self.state.end_early(BctrlError(f"the run failed: {error!r}"), CancelLevel.DELIVERY)

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
                await self._open_journal(self.options.journal)
            await self._stop_all()
        except GeneratorExit:
            # The coroutine was closed; its tasks end without it, and the last closes the journal.
            self.cancel()
            raise
        finally:
            try:
                if self.ledger.journal is not None and not self._tasks:
                    await self._close_journal(self.ledger.journal)
            finally:
                self._finish()

    async def _open_journal(self, journal: Journal | str | os.PathLike[str]) -> None:
        # Reading a long journal takes time, so a thread does it.
        opening = asyncio.create_task(asyncio.to_thread(open_journal, journal, self._base_url))
        try:
            await wait_shielded(opening)
            self.ledger.journal = opening.result()
        except BctrlError as error:
            self.state.set_ended_early(error)
            raise
        except asyncio.CancelledError:
            # No target was read, so no outcome would show the cancellation.
            self.cancel()
            if opening.exception() is None:
                self.ledger.journal = opening.result()
            raise

    async def _close_journal(self, journal: Journal) -> None:
        # A flush to disk takes time, so a thread does it.
        closing = asyncio.create_task(asyncio.to_thread(self._release_journal, journal))
        try:
            await wait_shielded(closing)
        finally:
            if closing.done() and isinstance(error := closing.exception(), BctrlError):
                self.state.set_ended_early(error)

    def _release_journal(self, journal: Journal) -> None:
        """Flush the journal to disk, and close it unless it is the caller's."""
        if journal is self.options.journal:
            journal.flush()
        else:
            journal.close()

    def _finish(self) -> None:
        """Stop the clock, log an early end, and notify the observer."""
        ledger, read = self.ledger, self.source.count
        ledger.ended = time.monotonic()
        if (reason := self.state.ended_early) is not None:
            counts = {"bctrl.total": read, "bctrl.failures": len(ledger.tally.failures)}
            _log.log(
                logging.INFO if reason in self.state.asked else logging.WARNING,
                "a bulk stop ended early, with %d targets read and %d failures: %s",
                read,
                counts["bctrl.failures"],
                reason.summary,
                extra={"bctrl.event": "ended_early", **log_fields(reason), **counts},
            )
        if ledger.observer is not None:
            notify(ledger.observer.end, ledger.report(read))

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
        if (error := self._failure or failed) is not None:
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
                self.cancel()
        if cancelled is not None:
            raise asyncio.CancelledError(*cancelled)

    def _starts_for_rest(self) -> bool:
        """Start a worker for the remaining items, if all workers were cancelled from outside."""
        if not self.source.closed:
            self.cancel()
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
            self.cancel()
            self._start(self._work)
        if self._tasks or self.parked.count:
            return
        self._has_no_task.set()
        journal = self.ledger.journal
        if journal is not None and self.ledger.ended is not None:
            # The task's other callback may record an outcome, and must come first.
            task.get_loop().call_soon(self._release_journal, journal)

    async def _guard(self, work: Callable[[Worker], Awaitable[None]], worker: Worker) -> None:
        """Do the work of a task; an exception ends the run, which raises it."""
        try:
            await work(worker)
        except BaseException as error:
            self._end_with(error, "on_outcome")
            if isinstance(error, asyncio.CancelledError | GeneratorExit):
                raise

    def _end_with(self, error: BaseException, source: str) -> None:
        """End the run with the error of a task; `source` names the code that raised it."""
        if isinstance(error, asyncio.CancelledError):
            if is_cancelled():
                self.cancel()
            else:
                self._fail(as_failure(error, source))
        elif not isinstance(error, GeneratorExit):
            self._fail(error)

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
                self._fail(error)
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
