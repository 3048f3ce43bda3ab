"""The work of a bulk stop: a fixed number of workers, exactly one outcome for every target read.

What ends a run early reaches only so far: see `Reach`. A worker that is interrupted goes on, so
that the target it was at gets its outcome, and what is left of a list is accounted for.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from enum import IntEnum
from typing import TypeVar

import msgspec

from bctrl_async._admission import Gate
from bctrl_async._call import Call
from bctrl_async._outage import Outage
from bctrl_async._targets import Input, as_target, named
from bctrl_async._verify import Looks, is_open, settled_by
from bctrl_async._watch import tell
from bctrl_async.errors import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlRateLimitError,
    BctrlResponseError,
)
from bctrl_async.journal import Journal
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.observer import BulkObserver, StopObserver
from bctrl_async.outcomes import StopOutcome, StopResult, result_of

HandOver = Callable[[StopOutcome], Awaitable[None]]

_T = TypeVar("_T")
_OVER = BctrlError("the run has ended")


class Reach(IntEnum):
    """How much of a run is ended early; each includes those before it."""

    READING = 0
    """No further target is begun; those that were begun are stopped as usual."""
    WAITING = 1
    """No further request is sent; those that are under way may still be answered."""
    IN_FLIGHT = 2
    """No answer is waited for; what has an outcome is still handed over."""
    HANDING_OVER = 3
    """Nobody wants the outcomes any more; they are still accounted for."""


_CODE = {
    Reach.READING: "the input",
    Reach.WAITING: "the call",
    Reach.HANDING_OVER: "on_outcome",
}


class _InterruptedError(Exception):
    """What a worker was waiting for has been cut off."""


class _Worker:
    """One of those who pull targets from the input, and what the others must know of it.

    Attributes:
        call: The stop that it is at.
        task: What it runs in.
        cancelled: Whether somebody else has cancelled that task.
    """

    __slots__ = ("_cut_off", "_doing", "call", "cancelled", "task")

    def __init__(self) -> None:
        self.call: Call[Runtime] | None = None
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False
        self._doing: Reach | None = None
        self._cut_off = False

    async def wait(self, doing: Reach, work: Awaitable[_T]) -> _T:
        """Wait for something that can be interrupted.

        Args:
            doing: The least reach that ends it.
            work: What is waited for.

        Raises:
            _InterruptedError: It was ended.
        """
        self._doing = doing
        try:
            return await work
        except asyncio.CancelledError as error:
            if not self._cut_off and self.task is not None:
                if not self.task.cancelling():
                    # It is nobody's cancellation of this run, but what the user's own code raised.
                    raise BctrlError(f"{_CODE[doing]} raised CancelledError") from error
                self.cancelled = True
            raise _InterruptedError from None
        finally:
            self._doing = None
            if self._cut_off and self.task is not None:
                self._cut_off = False
                self.task.uncancel()

    def interrupt(self, reach: Reach) -> None:
        """End what it waits for, if that is within reach."""
        doing = self._doing
        if doing is Reach.WAITING and self.call is not None and self.call.in_flight:
            doing = Reach.IN_FLIGHT
        # Whoever calls for the end, as an input may, waits for nothing.
        if (
            doing is None
            or doing > reach
            or self._cut_off
            or self.task in {None, asyncio.current_task()}
        ):
            return
        self._cut_off = True
        self.task.cancel()


class Run:
    """One bulk stop.

    Args:
        source: The targets.
        make_call: Makes the call of a target; raises BctrlConfigError if there can be none.
        make_attempts: Makes the attempts of a call.
        gate: The gate that they pass.
        outage: Decides what follows upon a request that was not answered.
        concurrency: How many workers there are.
        deadline: Seconds until everything is cut off.
        make_look: Makes the call that looks at a target, if what its stop left open is to be
            verified.

    Attributes:
        counts: How many outcomes there are so far, by result.
        failures: The outcomes so far that are not settled.
        retries: Requests beyond the first, of the targets that have their outcome.
        throttled: Answers to them that were 429 or 503.
        resumed: How many outcomes are those of an earlier run.
        ended_early: Why it ended before its input did.
        watch: Who is told of it.
    """

    def __init__(
        self,
        source: Input,
        *,
        make_call: Callable[[RuntimeRef], Call[Runtime]],
        make_attempts: Callable[[Call[Runtime]], Awaitable[Runtime]],
        gate: Gate,
        outage: Outage,
        concurrency: int,
        deadline: float | None,
        make_look: Callable[[RuntimeRef], Call[Runtime]] | None = None,
    ) -> None:
        self._input = source
        self._make_call = make_call
        self._make_attempts = make_attempts
        self._gate = gate
        self._outage = outage
        self._deadline = deadline
        self._make_look = make_look
        self._workers = [_Worker() for _ in range(concurrency)]
        self._journal: Journal | None = None
        self._settled: Mapping[RuntimeRef, StopOutcome] = {}
        self._reach: Reach | None = None
        self._why = self._not_begun = _OVER
        self._failed: BaseException | None = None
        self.counts: Counter[StopResult] = Counter()
        self.failures: list[StopOutcome] = []
        self.retries: int = 0
        self.throttled: int = 0
        self.resumed: int = 0
        self.ended_early: BctrlError | None = None
        self.watch: BulkObserver | None = None

    @property
    def in_flight(self) -> int:
        """How many requests are under way."""
        return sum(1 for worker in self._workers if worker.call and worker.call.in_flight)

    @property
    def is_unanswered(self) -> bool:
        """Whether the server answers nobody at the moment."""
        return self._outage.lasts

    def end_early(self, why: BctrlError, reach: Reach) -> None:
        """End as much of the run as the reach says."""
        cuts_off = reach is not Reach.READING and any(worker.call for worker in self._workers)
        if self.ended_early is None and (cuts_off or not self._input.exhausted):
            self.ended_early = why
        if not self._input.finite:
            self._input.ended = True
        if self._reach is None or reach > self._reach:
            self._reach, self._why = reach, why
            # One for all: there may be a million of them.
            self._not_begun = BctrlError(f"not sent: {why.summary}")
        for worker in self._workers:
            if worker.call is not None and reach is not Reach.READING:
                worker.call.is_last = True
            worker.interrupt(reach)

    async def work_through(self, hand_over: HandOver | None, journal: Journal | None) -> None:
        """Give every target its outcome.

        Args:
            hand_over: Called with each one, if anybody wants them.
            journal: Where they are written, and what need not be done again.

        Raises:
            BaseException: What the input or `hand_over` raised, after all targets that were read
                have their outcomes.
        """
        if journal is not None:
            self._journal, self._settled = journal, journal.settled
        for worker in self._workers:
            worker.task = asyncio.create_task(self._work(worker, hand_over))
        tasks = [worker.task for worker in self._workers if worker.task is not None]
        timer: asyncio.TimerHandle | None = None
        if self._deadline is not None:
            passed = BctrlError(f"the deadline of {self._deadline:g} s has passed")
            timer = asyncio.get_running_loop().call_later(
                self._deadline, self.end_early, passed, Reach.IN_FLIGHT
            )
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            self._cancel()
            await until_done(tasks)
            raise
        except GeneratorExit:
            # Nobody runs this any more; the workers end by themselves.
            self._cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        failed = self._input.error
        if failed is not None and self.ended_early is None:
            raised = BctrlError(f"the input raised {type(failed).__name__}")
            self.ended_early = failed if isinstance(failed, BctrlError) else raised
        if (error := self._failed or failed) is not None:
            raise error

    async def _work(self, worker: _Worker, hand_over: HandOver | None) -> None:
        while (item := await self._next(worker)) is not None:
            try:
                outcome = await self._outcome_of(worker, *item)
                if hand_over is not None and self._reach is not Reach.HANDING_OVER:
                    await worker.wait(Reach.HANDING_OVER, hand_over(outcome))
                if outcome.resumed or not outcome.attempts:
                    # Nothing was waited for, and without a pause nobody else would get a turn.
                    await worker.wait(Reach.HANDING_OVER, asyncio.sleep(0))
            except _InterruptedError:
                self._heed(worker)
            except GeneratorExit:
                raise
            except BaseException as error:  # noqa: BLE001 - it is the caller's, who gets it back.
                self._fail(error)

    async def _next(self, worker: _Worker) -> tuple[int, object] | None:
        if not self._input.awaited:
            return self._input.next_nowait()
        try:
            return await worker.wait(Reach.READING, self._input.next())
        except _InterruptedError:
            self._heed(worker)
            return None

    async def _outcome_of(self, worker: _Worker, index: int, item: object) -> StopOutcome:
        began = time.monotonic()
        try:
            target = as_target(item)
        except BctrlConfigError as refused:
            if type(item) is BctrlResponseError:
                # What stands for a listed runtime that cannot be read.
                unread = RuntimeRef(item.workspace_id or "", item.alias or "")
                return self._refuse(index, unread, item)
            return self._refuse(index, named(item), refused)
        try:
            call = self._make_call(target)
        except BctrlConfigError as refused:
            refused.workspace_id, refused.alias = target
            return self._refuse(index, target, refused)
        if self._settled and (settled := self._settled.get(target)) is not None:
            self.counts[settled.result] += 1
            self.resumed += 1
            return msgspec.structs.replace(settled, index=index)
        ended: Runtime | BctrlError = self._not_begun
        watch: StopObserver | None = None
        try:
            if self._reach is None:
                if self.watch is not None:
                    call.watch = watch = tell(self.watch.begin_stop, *target)
                ended = await self._call(worker, call)
            outcome = self._outcome(index, target, call, ended, began)
            if self._make_look is not None and is_open(outcome):
                outcome = await self._verify(worker, outcome, call, self._make_look)
                outcome = msgspec.structs.replace(outcome, elapsed=time.monotonic() - began)
        except BaseException:
            outcome = self._outcome(index, target, call, self._cut_off(call), began)
            raise
        finally:
            if watch is not None:
                tell(watch.end, outcome)
        return self._account_for(outcome)

    def _outcome(
        self,
        index: int,
        target: RuntimeRef,
        call: Call[Runtime],
        ended: Runtime | BctrlError,
        began: float,
    ) -> StopOutcome:
        return StopOutcome(
            index=index,
            target=target,
            result=self._result_of(ended),
            runtime=ended if isinstance(ended, Runtime) else None,
            error=None if isinstance(ended, Runtime) else ended,
            attempts=call.attempts,
            elapsed=time.monotonic() - began,
        )

    async def _verify(
        self,
        worker: _Worker,
        outcome: StopOutcome,
        stop: Call[Runtime],
        make_look: Callable[[RuntimeRef], Call[Runtime]],
    ) -> StopOutcome:
        """Look at a target until what its stop left open is settled; else leave its outcome."""
        loop = asyncio.get_running_loop()
        patience = self._deadline or stop.policy.longest_refusal
        looks = Looks(stop.policy, patience, loop.time())
        seen: Runtime | BctrlError | None = None
        while self._reach in {None, Reach.READING}:
            delay = looks.delay(seen, loop.time())
            if delay is None:
                break
            look = make_look(outcome.target)
            look.watch = stop.watch
            seen = await self._call(worker, look, delay)
            if (settled := settled_by(outcome, seen)) is not None:
                return settled
        return outcome

    def _refuse(self, index: int, target: RuntimeRef, error: BctrlError) -> StopOutcome:
        """Account for an item that is no target."""
        return self._account_for(
            StopOutcome(
                index=index,
                target=target,
                result=StopResult.REJECTED,
                error=error.with_traceback(None),
                attempts=0,
            )
        )

    def _account_for(self, outcome: StopOutcome) -> StopOutcome:
        self.counts[outcome.result] += 1
        self.retries += max(outcome.attempts - 1, 0)
        if not outcome.result.settled:
            self.failures.append(outcome)
        if self.watch is not None:
            tell(self.watch.outcome, outcome)
        if self._journal is not None:
            try:
                self._journal.write(outcome)
            except BctrlError as error:
                # What follows a line that was cut short would make the journal unreadable.
                self._journal = None
                self.end_early(error, Reach.WAITING)
        return outcome

    async def _call(
        self, worker: _Worker, call: Call[Runtime], delay: float = 0.0
    ) -> Runtime | BctrlError:
        worker.call = call
        try:
            ended = await worker.wait(Reach.WAITING, self._attempts(call, delay))
        except _InterruptedError:
            self._heed(worker)
            ended = self._cut_off(call)
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised at the end.
            self._fail(error)
            ended = self._cut_off(call)
        finally:
            worker.call = None
            if call.retries is not None:
                self.throttled += call.retries.throttles
        if isinstance(ended, Runtime):
            return ended
        if isinstance(ended, BctrlAuthenticationError | BctrlConfigError):
            # So will every other call end.
            self.end_early(ended, Reach.WAITING)
        elif isinstance(ended, BctrlRateLimitError) and (
            (ended.retry_after or 0.0) > call.policy.longest_refusal
        ):
            self.end_early(ended, Reach.WAITING)
        elif self._outage.given_up:
            silent = BctrlNetworkError(f"the server does not answer: {ended.summary}")
            self.end_early(silent, Reach.WAITING)
        return ended

    async def _attempts(self, call: Call[Runtime], delay: float) -> Runtime | BctrlError:
        if delay:
            await self._gate.pause(delay)
        while True:
            answers = self._gate.answers
            call.unanswered = False
            ended: Runtime | BctrlError
            try:
                ended = await self._make_attempts(call)
            except BctrlError as error:
                # The frames that its traceback holds are much for a hundred thousand failures.
                ended = error.with_traceback(None)
                if call.unanswered:
                    if not call.is_last and await self._outage.may_retry(call, answers):
                        continue
                    return ended
            self._outage.end()
            return ended

    def _result_of(self, ended: Runtime | BctrlError) -> StopResult:
        result = result_of(ended)
        if (
            isinstance(ended, BctrlConfigError)
            and ended.status is None
            and result is StopResult.REJECTED
        ):
            # The target is a good one: it is the session that cannot be used.
            return StopResult.NOT_SENT
        return result

    def _cut_off(self, call: Call[Runtime]) -> BctrlError:
        if call.in_flight:
            when = "before an answer"
        else:
            when = "before it was sent again" if call.attempts else "while it waited for its turn"
        last = None if call.retries is None else call.retries.last_failure
        before = f"; before that, {last.summary}" if last is not None else ""
        error = BctrlError(
            f"cut off {when}: {self._why.summary}{before}",
            cure="Stop it again: a stop is safe to repeat",
            may_have_stopped=call.in_flight,
        )
        call.describe(error)
        return error

    def _heed(self, worker: _Worker) -> None:
        """See who interrupted a worker: if it was somebody else, all are to end."""
        if worker.cancelled:
            self._cancel()

    def _cancel(self) -> None:
        self.end_early(BctrlError("the run was cancelled"), Reach.HANDING_OVER)

    def _fail(self, error: BaseException) -> None:
        self._failed = self._failed or error
        self.end_early(BctrlError(f"the run failed: {error!r}"), Reach.HANDING_OVER)


async def until_done(tasks: Iterable[asyncio.Task[_T]]) -> None:
    """Wait for tasks, and be cancelled only then."""
    pending = tasks
    cancelled: asyncio.CancelledError | None = None
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
