"""The work of a bulk stop: a fixed number of workers, exactly one outcome for every target read.

What ends a run early reaches only so far: see `Reach`. A worker that is interrupted goes on, so
that the target it was at gets its outcome, and what is left of a list is accounted for. What is to
be verified is polled beside the workers.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeVar

import msgspec

from bctrl_async._calls.call import Call
from bctrl_async._calls.observing import notify
from bctrl_async._calls.retry import RetryPolicy
from bctrl_async._limiter.limiter import Limiter
from bctrl_async.bulk._breaker import CircuitBreaker
from bctrl_async.bulk._cancel import CutOffError, Reach, Worker
from bctrl_async.bulk._targets import Input, as_target, best_effort_ref
from bctrl_async.bulk._verify import PollSchedule, needs_verification, outcome_after_poll
from bctrl_async.errors import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlRateLimitError,
    BctrlResponseError,
    is_unanswered,
)
from bctrl_async.journal import Journal
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.observer import BulkObserver, ReadObserver, StopObserver
from bctrl_async.outcomes import StopOutcome, StopResult, result_of

HandOver = Callable[[StopOutcome], Awaitable[None]]

_T = TypeVar("_T")
_OVER = BctrlError("the run has ended")
_MOST_POLLERS = 1000
"""Runtimes that are polled beside the stops: enough for many, and a bound for memory."""


class _Pending(msgspec.Struct):
    """An outcome that is verified before it counts.

    Args:
        outcome: Its outcome as it stands.
        policy: How long and how often it is polled.
        began: When its stop began.
        watch: Who is told of it.
        poller: Who polls it.
        concluded: Whether it is accounted for.
    """

    outcome: StopOutcome
    policy: RetryPolicy
    began: float
    watch: StopObserver | None
    poller: Worker
    concluded: bool = False


class Run:
    """One bulk stop.

    Args:
        source: The targets.
        make_call: Makes the call of a target; raises BctrlConfigError if there can be none.
        request: Makes the attempts of a call.
        limiter: The limiter that they pass.
        breaker: Decides what follows upon a request that was not answered.
        concurrency: How many workers there are.
        deadline: Seconds until everything is cut off.
        make_poll: Makes the call that looks at a target, if what its stop left open is to be
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
        request: Callable[[Call[Runtime]], Awaitable[Runtime]],
        limiter: Limiter,
        breaker: CircuitBreaker,
        concurrency: int,
        deadline: float | None,
        make_poll: Callable[[RuntimeRef], Call[Runtime]] | None = None,
    ) -> None:
        self._input = source
        self._make_call = make_call
        self._request = request
        self._limiter = limiter
        self._breaker = breaker
        self._deadline = deadline
        self._make_poll = make_poll
        self._workers = [Worker() for _ in range(concurrency)]
        self._polling: dict[asyncio.Task[None], _Pending] = {}
        self._hand_over: HandOver | None = None
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
        self.observer: BulkObserver | None = None

    @property
    def in_flight(self) -> int:
        """How many requests are under way."""
        return sum(1 for worker in self._everybody() if worker.call and worker.call.in_flight)

    @property
    def is_unanswered(self) -> bool:
        """Whether the server answers nobody at the moment."""
        return self._breaker.is_open

    def end_early(self, why: BctrlError, reach: Reach) -> None:
        """End as much of the run as the reach says."""
        cuts_off = reach is not Reach.READING and any(worker.stops for worker in self._workers)
        if self.ended_early is None and (cuts_off or not self._input.exhausted):
            self.ended_early = why
        if not self._input.can_drain:
            self._input.closed = True
        if self._reach is None or reach > self._reach:
            self._reach, self._why = reach, why
            # One for all: there may be a million of them.
            self._not_begun = BctrlError(f"not sent: {why.summary}")
        for worker in self._everybody():
            worker.interrupt(reach)

    def _everybody(self) -> list[Worker]:
        return [*self._workers, *(pending.poller for pending in self._polling.values())]

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
        self._hand_over = hand_over
        for worker in self._workers:
            worker.task = asyncio.create_task(self._work(worker))
        tasks = [worker.task for worker in self._workers if worker.task is not None]
        timer: asyncio.TimerHandle | None = None
        if self._deadline is not None:
            passed = BctrlError(f"the deadline of {self._deadline:g} s has passed")
            timer = asyncio.get_running_loop().call_later(
                self._deadline, self.end_early, passed, Reach.IN_FLIGHT
            )
        try:
            await asyncio.wait(tasks)
            while self._polling:
                await asyncio.wait(self._polling)
        except asyncio.CancelledError:
            self._cancel()
            await until_done([*tasks, *self._polling])
            raise
        except GeneratorExit:
            # Nobody runs this any more; the workers end by themselves.
            self._cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        self._explain_rest()
        if (error := self._failed or self._input.error) is not None:
            raise error

    def _explain_rest(self) -> None:
        """Say why not all was read, where it is not yet said."""
        failed = self._input.error
        if failed is not None and self.ended_early is None:
            raised = BctrlError(f"the input raised {type(failed).__name__}")
            self.ended_early = failed if isinstance(failed, BctrlError) else raised
        elif self._reach is None and not self._input.exhausted:
            # Somebody has cancelled the workers before they could begin.
            self._cancel()

    async def _work(self, worker: Worker) -> None:
        while (item := await self._next(worker)) is not None:
            await self._see_through(worker, self._outcome_of(worker, *item))

    async def _see_through(self, worker: Worker, work: Awaitable[StopOutcome | None]) -> None:
        """Let a worker do its work and hand over what comes of it."""
        try:
            outcome = await work
            if (
                outcome is not None
                and self._hand_over is not None
                and self._reach is not Reach.HANDING_OVER
            ):
                await worker.wait(Reach.HANDING_OVER, self._hand_over(outcome))
            if outcome is None or outcome.resumed or not outcome.attempts:
                # Nothing was waited for, and without a pause nobody else would get a turn.
                await worker.wait(Reach.HANDING_OVER, asyncio.sleep(0))
        except CutOffError:
            self._heed(worker)
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - it is the caller's, who gets it back.
            self._fail(error)

    async def _next(self, worker: Worker) -> tuple[int, object] | None:
        if not self._input.is_async:
            return self._input.next_nowait()
        try:
            return await worker.wait(Reach.READING, self._input.next())
        except CutOffError:
            self._heed(worker)
            return None

    async def _outcome_of(self, worker: Worker, index: int, item: object) -> StopOutcome | None:
        """Return what became of a target; None if that is left to a poller."""
        began = time.monotonic()
        try:
            target = as_target(item)
        except BctrlConfigError as refused:
            if type(item) is BctrlResponseError:
                # What stands for a listed runtime that cannot be read.
                unread = RuntimeRef(item.workspace_id or "", item.alias or "")
                return self._refuse(index, unread, item)
            return self._refuse(index, best_effort_ref(item), refused)
        try:
            call = self._make_call(target)
        except BctrlConfigError as refused:
            refused.workspace_id, refused.alias = target
            return self._refuse(index, target, refused)
        if self._settled and (settled := self._settled.get(target)) is not None:
            outcome = msgspec.structs.replace(settled, index=index)
            return await self._conclude(worker, outcome, call.policy, began)
        ended: Runtime | BctrlError = self._not_begun
        watch: StopObserver | None = None
        try:
            if self._reach is None:
                if self.observer is not None:
                    call.observer = watch = notify(self.observer.begin_stop, *target)
                ended = await self._call(worker, call)
        except BaseException:
            self._end(self._outcome(index, target, call, self._cut_off(call), began), watch)
            raise
        outcome = self._outcome(index, target, call, ended, began)
        if self._make_poll is None:
            return self._end(outcome, watch)
        return await self._conclude(worker, outcome, call.policy, began, watch)

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

    async def _conclude(
        self,
        worker: Worker,
        outcome: StopOutcome,
        policy: RetryPolicy,
        began: float,
        watch: StopObserver | None = None,
    ) -> StopOutcome | None:
        """Account for an outcome, after it was verified if it is to be.

        A worker leaves that to a poller and goes on, for a runtime may take its time, and what is
        not begun goes on running. Only if very many are polled already does it wait for its own.
        """
        if self._make_poll is None or not needs_verification(outcome) or not self._may_send:
            return self._end(outcome, watch)
        pending = _Pending(outcome, policy, began, watch, worker)
        if len(self._polling) >= _MOST_POLLERS:
            return await self._verify(pending, self._make_poll)
        pending.poller = Worker()
        pending.poller.task = asyncio.create_task(self._poll(pending, self._make_poll))
        self._polling[pending.poller.task] = pending
        pending.poller.task.add_done_callback(self._end_polling)
        return None

    async def _poll(
        self, pending: _Pending, make_poll: Callable[[RuntimeRef], Call[Runtime]]
    ) -> None:
        await self._see_through(pending.poller, self._verify(pending, make_poll))

    @property
    def _may_send(self) -> bool:
        """True while attempts may begin."""
        return self._reach in {None, Reach.READING}

    async def _verify(
        self, pending: _Pending, make_poll: Callable[[RuntimeRef], Call[Runtime]]
    ) -> StopOutcome:
        """Poll a target until what its stop left open is settled; else leave its outcome."""
        loop = asyncio.get_running_loop()
        patience = self._deadline or pending.policy.max_throttle_wait
        polls = PollSchedule(pending.policy, patience, loop.time())
        polled: Runtime | BctrlError | None = None
        settled: StopOutcome | None = None
        read: ReadObserver | None = None
        if self.observer is not None and pending.outcome.resumed:
            # There is no stop that the polls would belong to.
            read = notify(self.observer.begin_read, *pending.outcome.target)
        try:
            while settled is None and self._may_send:
                delay = polls.delay(polled, loop.time())
                if delay is None:
                    break
                poll = make_poll(pending.outcome.target)
                poll.observer = pending.watch or read
                polled = await self._call(pending.poller, poll, delay)
                settled = outcome_after_poll(pending.outcome, polled)
        finally:
            pending.outcome = settled or pending.outcome
            if not pending.outcome.resumed:
                elapsed = time.monotonic() - pending.began
                pending.outcome = msgspec.structs.replace(pending.outcome, elapsed=elapsed)
            self._account_once(pending)
            if read is not None:
                notify(read.end, None)
        return pending.outcome

    def _end_polling(self, task: asyncio.Task[None]) -> None:
        # One that was cancelled before its first step has done nothing at all.
        self._account_once(self._polling.pop(task))

    def _account_once(self, pending: _Pending) -> None:
        if not pending.concluded:
            pending.concluded = True
            self._end(pending.outcome, pending.watch)

    def _end(self, outcome: StopOutcome, watch: StopObserver | None) -> StopOutcome:
        """Account for an outcome, then tell who watched its stop."""
        self._account_for(outcome)
        if watch is not None:
            notify(watch.end, outcome)
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
        if not outcome.result.settled:
            self.failures.append(outcome)
        if outcome.resumed:
            self.resumed += 1
            if self._settled[outcome.target].result is outcome.result:
                return outcome
        else:
            self.retries += max(outcome.attempts - 1, 0)
            if self.observer is not None:
                notify(self.observer.outcome, outcome)
        if self._journal is not None:
            try:
                self._journal.write(outcome)
            except BctrlError as error:
                # What follows a line that was cut short would make the journal unreadable.
                self._journal = None
                self.ended_early = self.ended_early or error
                self.end_early(error, Reach.WAITING)
        return outcome

    async def _call(
        self, worker: Worker, call: Call[Runtime], delay: float = 0.0
    ) -> Runtime | BctrlError:
        call.wait_to_retry = self._wait_to_retry
        worker.call = call
        try:
            ended = await worker.wait(Reach.WAITING, self._attempts(call, delay))
        except CutOffError:
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
                self.throttled += call.retries.throttled
        if isinstance(ended, Runtime):
            return ended
        if isinstance(ended, BctrlAuthenticationError | BctrlConfigError):
            # So will every other call end.
            self.end_early(ended, Reach.WAITING)
        elif isinstance(ended, BctrlRateLimitError) and (
            (ended.retry_after or 0.0) > call.policy.max_throttle_wait
        ):
            self.end_early(ended, Reach.WAITING)
        elif self._breaker.gave_up:
            silent = BctrlNetworkError(f"the server does not answer: {ended.summary}")
            self.end_early(silent, Reach.WAITING)
        return ended

    async def _attempts(self, call: Call[Runtime], delay: float) -> Runtime | BctrlError:
        if delay:
            await self._limiter.sleep(delay)
        try:
            runtime = await self._request(call)
        except BctrlError as error:
            if not is_unanswered(error):
                self._breaker.reset()
            # The frames that its traceback holds are much for a hundred thousand failures.
            return error.with_traceback(None)
        self._breaker.reset()
        return runtime

    async def _wait_to_retry(self, call: Call[Runtime]) -> bool:
        return self._may_send and await self._breaker.wait_to_retry(call)

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
            advice="Stop it again: a stop is safe to repeat",
            may_have_stopped=call.in_flight,
        )
        call.annotate(error)
        return error

    def _heed(self, worker: Worker) -> None:
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
