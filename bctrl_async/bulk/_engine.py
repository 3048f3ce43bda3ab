"""The engine of a bulk stop: it reads the input, and gives each item of it exactly one outcome.

A cancelled worker still records its target, and the rest of a finite input is recorded as
`not_sent`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import msgspec

from bctrl_async import _config
from bctrl_async._calls.call import annotate
from bctrl_async._calls.observing import notify
from bctrl_async._calls.retry import RetryPolicy
from bctrl_async._http import transport
from bctrl_async._http.request import STOP
from bctrl_async.bulk._cancel import CancelLevel, RunState, Worker, wait_shielded
from bctrl_async.bulk._delivery import Deliver, OnOutcome, OutcomeBuffer, in_turn
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._targets import Input, as_target, best_effort_ref, check_first
from bctrl_async.bulk._verify import verify_for
from bctrl_async.errors import BctrlError, log_fields
from bctrl_async.filters import FoundTargets
from bctrl_async.journal import Journal
from bctrl_async.models import RuntimeRef
from bctrl_async.observer import Observer
from bctrl_async.outcomes import StopOutcome, StopResult, outcome_of

_log = logging.getLogger("bctrl_async")

_RUNS_AGAIN = BctrlError("the workspace was listed, and it runs again")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of a bulk stop; BctrlConfigError if one is invalid."""

    concurrency: int | None
    deadline: float | None
    on_outcome: OnOutcome | None
    timeout: float | None
    retry: RetryPolicy | None
    journal: str | os.PathLike[str] | None
    journal_max_age: float | None
    verify: bool | float
    missing_ok: bool

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.concurrency is not None:
            _config.count(self.concurrency, "concurrency")
        for name in ("deadline", "journal_max_age"):
            if (value := getattr(self, name)) is not None:
                _config.seconds(value, name)
        if self.timeout is not None:
            transport.time_limit(self.timeout)
        verify_for(self.verify)
        _config.check_type(self.retry, RetryPolicy | None, "retry", "a RetryPolicy")
        _config.check_type(self.journal, str | os.PathLike | None, "journal", "the path of a file")
        _config.check_flags(missing_ok=self.missing_ok)
        if self.on_outcome is not None and not callable(self.on_outcome):
            raise _config.invalid_type("on_outcome", self.on_outcome, "a function")


class Engine(ABC):
    """A bulk stop, in this process or on a cluster: a subclass says what a worker does.

    The journal is for the server at a base URL.
    """

    def __init__(
        self, source: Input, options: Options, base_url: str, observer: Observer | None
    ) -> None:
        self.source: Input = source
        self.options: Options = options
        self.state: RunState = RunState(source)
        self.ledger: Ledger = Ledger(self.state, missing_ok=options.missing_ok)
        self._base_url = base_url
        self._observer = observer
        self._tasks: list[asyncio.Task[None]] = []
        self._deliver: Deliver | None = None
        self._failure: BaseException | None = None
        self._error: BaseException | None = None
        self._has_read_list = False

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return self.state.in_flight

    @property
    def polling(self) -> int:
        """The number of runtimes that are polled."""
        return 0

    @property
    def is_throttled(self) -> bool:
        """True while the run slows down because of a 429 or 503."""
        return False

    @property
    def retry_after(self) -> float:
        """The seconds for which the server has asked to wait; 0 if it has not."""
        return 0.0

    @property
    def is_unanswered(self) -> bool:
        """True while the server answers no call."""
        return False

    @property
    def retrying(self) -> Counter[str]:
        """The targets that wait for another attempt, by what came of the last one."""
        return Counter()

    @abstractmethod
    def open(self) -> None:
        """Check that the run can start, in its event loop."""

    @abstractmethod
    def _start_work(self) -> None:
        """Start the workers."""

    @abstractmethod
    async def _work(self, worker: Worker) -> None:
        """Take items of the input, and give them their outcomes, until it ends."""

    def cancel(self) -> None:
        """Cancel the run: record the rest, and deliver no more outcomes."""
        self.state.end_early(BctrlError("the run was cancelled"), CancelLevel.DELIVERY)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self.state.end_early(BctrlError(f"the run failed: {error!r}"), CancelLevel.DELIVERY)

    # The whole run, within its journal and its observer.

    def raise_error(self) -> None:
        """Raise the error of `feed`, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def feed(self, outcomes: OutcomeBuffer, on_outcome: Deliver | None) -> None:
        """Execute the run, put its outcomes into a buffer, and end that."""
        deliver = outcomes.put if on_outcome is None else in_turn(on_outcome, outcomes)
        try:
            await self.execute(deliver)
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - raised where the outcomes are read.
            self._error = error
        outcomes.end()

    def end_feed(self, outcomes: OutcomeBuffer, feeding: asyncio.Task[None]) -> None:
        """End the buffer of a task that fed it and was cancelled."""
        if feeding.cancelled():
            # Before its first step, neither the run nor the buffer would have an end.
            self.cancel()
            outcomes.discard()

    async def execute(self, deliver: Deliver | None) -> None:
        """Execute the run; raise the error of the journal, the input or `deliver` at its end."""
        ledger = self.ledger
        if self._observer is not None:
            ledger.observer = notify(self._observer.begin_bulk)
        try:
            await self._run_with_journal(deliver)
        finally:
            ledger.end()
            if (reason := self.state.ended_early) is not None:
                _log.warning(
                    "a bulk stop ended early, with %d targets read and %d failures: %s",
                    self.source.count,
                    len(ledger.tally.failures),
                    reason.summary,
                    extra={
                        "bctrl.event": "ended_early",
                        **log_fields(reason),
                        "bctrl.total": self.source.count,
                        "bctrl.failures": len(ledger.tally.failures),
                    },
                )
            if ledger.observer is not None:
                notify(ledger.observer.end, ledger.report(self.source.count))

    async def _run_with_journal(self, deliver: Deliver | None) -> None:
        path = self.options.journal
        if path is None:
            await self._run_to_end(deliver)
            return
        try:
            journal = await _opened(
                partial(Journal, path, self._base_url, self.options.journal_max_age)
            )
        except BctrlError as error:
            self.state.set_ended_early(error)
            raise
        except asyncio.CancelledError:
            # Nothing was read, so that no target says it.
            self.cancel()
            raise
        self.ledger.use_journal(journal)
        try:
            await self._run_to_end(deliver)
        finally:
            if (failure := await _closed(journal)) is not None:
                self.state.set_ended_early(failure)

    async def _run_to_end(self, deliver: Deliver | None) -> None:
        """Run, and say so if the input has ended before its length."""
        await self.run(deliver)
        source = self.source
        if source.length is not None and not source.exhausted:
            self.state.set_ended_early(
                BctrlError(f"the input ended after {source.count:,} of {source.length:,} targets")
            )

    # The workers, until each target that was read has its outcome.

    async def run(self, deliver: Deliver | None) -> None:
        """Give every target its outcome; then raise the error of the input or of `deliver`."""
        self._deliver = deliver
        self._start_work()
        timer: asyncio.TimerHandle | None = None
        if (deadline := self.options.deadline) is not None:
            passed = BctrlError(f"the deadline of {deadline:g} s has passed")
            timer = asyncio.get_running_loop().call_later(
                deadline, self.state.end_early, passed, CancelLevel.IN_FLIGHT
            )
        try:
            await self._wait_for_tasks()
        finally:
            if timer is not None:
                timer.cancel()
            # Even if cancelled: such an input says nothing of the targets that it did not yield.
            if (failed := self.source.error) is not None:
                raised = BctrlError(f"the input raised {type(failed).__name__}")
                self.state.set_ended_early(failed if isinstance(failed, BctrlError) else raised)
        if (error := self._failure or failed) is not None:
            raise error

    def _add_worker(self, worker: Worker) -> None:
        self.state.workers[worker] = None
        self._tasks.append(self._start(partial(self._work, worker)))

    async def _wait_for_tasks(self) -> None:
        """Wait until all tasks have ended, even if cancelled meanwhile."""
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
        return tasks

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

    # What a worker does with an item, whichever worker it is.

    async def _next(self, worker: Worker) -> tuple[int, object] | None:
        """Wait for the next item of an async input."""
        with worker.scope():
            return await self.source.next()
        return None

    def _checked(self, index: int, item: object) -> RuntimeRef | StopOutcome:
        """Return the target that an item is, or its outcome if it is not to be sent."""
        try:
            if not index:
                check_first(item)
            target = as_target(item)
        except BctrlError as error:
            if error.argument == "targets":
                self._fail(error)
            return self._reject(index, best_effort_ref(item), error)
        found = self.source.found
        if found is None:
            if (known := self.ledger.earlier(target)) is not None:
                return self.ledger.record(msgspec.structs.replace(known, index=index))
        elif not self._has_read_list:
            self._has_read_list = True
            self._write_running_again(found)
        return target

    def _reject(self, index: int, target: RuntimeRef, error: BctrlError) -> StopOutcome:
        rejected = outcome_of(
            target, error.with_traceback(None), index=index, result=StopResult.REJECTED
        )
        return self.ledger.record(self.source.with_listed(rejected))

    def _reject_name(self, index: int, target: RuntimeRef, error: BctrlError) -> StopOutcome:
        """Reject a target whose workspace or alias is invalid."""
        annotate(error, STOP.name, *target)
        return self._reject(index, target, error)

    def _write_running_again(self, found: FoundTargets) -> None:
        """Write to the journal that targets run again which it has as stopped.

        It is done before any of them is sent: after a crash, the journal must not have them as
        stopped.
        """
        for index, item in enumerate(found):
            target = item if isinstance(item, RuntimeRef) else best_effort_ref(item)
            if self.ledger.had_stopped(target) and target.alias in found.running:
                again = outcome_of(target, _RUNS_AGAIN, index=index)
                self.ledger.write(self.source.with_listed(again))

    def _delivered(self, outcome: StopOutcome) -> Awaitable[None] | None:
        """Deliver an outcome; return what to await before the next."""
        if self._deliver is None or self.state.level is CancelLevel.DELIVERY:
            return None
        return self._deliver(outcome)


async def _opened(open_journal: Callable[[], Journal]) -> Journal:
    # In a thread, since it may take long. An opened journal must be closed, so this is shielded.
    opening = asyncio.create_task(asyncio.to_thread(open_journal))
    try:
        await wait_shielded(opening)
    except asyncio.CancelledError:
        if opening.exception() is None:
            with suppress(BctrlError):
                opening.result().close()
        raise
    return opening.result()


async def _closed(journal: Journal) -> BctrlError | None:
    # In a thread, since a disk may take long.
    closing = asyncio.create_task(asyncio.to_thread(journal.close))
    await wait_shielded(closing)
    error = closing.exception()
    return error if isinstance(error, BctrlError) else None
