"""The bulk stop as users hold it: to be awaited for its report, or entered and iterated over."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from bctrl_async._calls.observing import notify
from bctrl_async.bulk._cancel import Reach
from bctrl_async.bulk._run import HandOver, Run, until_done
from bctrl_async.bulk._targets import Input
from bctrl_async.errors import BctrlConfigError, BctrlError
from bctrl_async.journal import Journal
from bctrl_async.observer import Observer
from bctrl_async.outcomes import StopOutcome, StopReport, StopResult

_log = logging.getLogger("bctrl_async")

_NEVER = BctrlError("the bulk stop was not run")
_BUFFERED = 100
"""Outcomes that may wait to be read before the workers wait as well."""

OnOutcome = Callable[[StopOutcome], Awaitable[object] | object]


class StopBatch(Coroutine[object, object, StopReport]):
    """A bulk stop, made by `BctrlSession.stop_runtimes`; it runs once.

    Await it for its `StopReport`, or enter it and iterate over its outcomes as they come:

        async with session.stop_runtimes(targets) as batch:
            async for outcome in batch:
                ...

    Leaving the block ends the run if it has not ended; what is in flight is then cut off. The
    attributes can be read at any time, and after the run they cover the whole of it, also where
    it ended with an exception.
    """

    _runner: asyncio.Task[None]

    def __init__(
        self,
        source: Input,
        run: Run,
        *,
        check: Callable[[], object],
        is_throttled: Callable[[], bool],
        open_journal: Callable[[], Journal] | None,
        on_outcome: OnOutcome | None,
        observer: Observer | None,
    ) -> None:
        self._input = source
        self._run = run
        self._check = check
        self._is_throttled = is_throttled
        self._open_journal = open_journal
        self._observer = observer
        self._call_back = None if on_outcome is None else _called(on_outcome)
        self._whole: Coroutine[object, object, StopReport] | None = None
        self._outcomes: asyncio.Queue[StopOutcome | None] | None = None
        self._taken_up = False
        self._began: float | None = None
        self._ended: float | None = None
        self._error: BaseException | None = None

    @property
    def counts(self) -> Counter[StopResult]:
        """How many outcomes there are so far, by result."""
        return Counter(self._run.counts)

    @property
    def read(self) -> int:
        """How many targets were read so far."""
        return self._input.count

    @property
    def total(self) -> int | None:
        """How many targets there are, None where the input has no length."""
        return self._input.length

    @property
    def in_flight(self) -> int:
        """How many requests are under way."""
        return self._run.in_flight

    @property
    def retries(self) -> int:
        """Requests beyond the first of each target, of the outcomes so far."""
        return self._run.retries

    @property
    def is_throttled(self) -> bool:
        """Whether the server's refusals hold the stops back at the moment."""
        return self._is_throttled()

    @property
    def is_unanswered(self) -> bool:
        """Whether the server answers nobody at the moment, and is asked now and then."""
        return self._run.is_unanswered

    @property
    def report(self) -> StopReport:
        """What became of the targets so far."""
        elapsed = 0.0
        if self._began is not None:
            elapsed = (self._ended or time.monotonic()) - self._began
        return StopReport(
            total=self._input.count,
            counts=self.counts,
            failures=tuple(self._run.failures),
            elapsed=elapsed,
            retries=self._run.retries,
            throttled=self._run.throttled,
            resumed=self._run.resumed,
            ended_early=_NEVER if self._began is None else self._run.ended_early,
        )

    def stop_reading(self) -> None:
        """Begin no further targets; those that were begun get their outcome as usual.

        What is left of an input with a length becomes `not_sent`; another one is read no further.
        """
        self._run.end_early(BctrlError("the run was asked to begin nothing new"), Reach.READING)

    def abort(self) -> None:
        """Wait for no answer any more: what is in flight becomes `unknown`, the rest `not_sent`.

        Unlike cancellation it ends with the report, and every outcome is still handed over.
        """
        self._run.end_early(BctrlError("the run was cut off"), Reach.IN_FLIGHT)

    def __await__(self) -> Generator[object, object, StopReport]:
        return self._run_to_its_end().__await__()

    def send(self, value: object) -> object:
        """Run on, as `asyncio.create_task` does with a coroutine."""
        return self._coroutine().send(value)

    def throw(self, *error: Any) -> object:  # noqa: ANN401 - any of the signatures it has had.
        """Raise an exception inside, as a task does that is cancelled."""
        return self._coroutine().throw(*error)

    def close(self) -> None:
        """Give it up, as a task does that never started."""
        self._taken_up = True
        if self._whole is not None:
            self._whole.close()

    def _coroutine(self) -> Coroutine[object, object, StopReport]:
        self._taken_up = True
        if self._whole is None:
            self._whole = self._run_to_its_end()
        return self._whole

    def __del__(self) -> None:
        # Without it where the constructor was not reached.
        if not getattr(self, "_taken_up", True):
            warnings.warn(
                "a bulk stop was never awaited or entered: nothing was stopped",
                RuntimeWarning,
                stacklevel=1,
                source=self,
            )

    async def __aenter__(self) -> Self:
        self._begin()
        self._outcomes = asyncio.Queue(_BUFFERED)
        self._runner = asyncio.create_task(self._run_and_tell(self._outcomes))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._runner.cancel()
        await until_done([self._runner])
        if exc is None:
            self._raise_error()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StopOutcome:
        if self._outcomes is None:
            raise BctrlConfigError(
                "the bulk stop was not entered", advice="Iterate inside `async with … as batch`"
            )
        outcome = await self._outcomes.get()
        if outcome is not None:
            return outcome
        self._outcomes.put_nowait(None)  # For whoever asks again.
        self._raise_error()
        raise StopAsyncIteration

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _begin(self) -> None:
        self._taken_up = True
        if self._began is not None:
            raise BctrlConfigError(
                "the bulk stop has run already",
                advice="Read its .report, or call stop_runtimes again for another run",
            )
        self._check()
        self._began = time.monotonic()

    async def _run_to_its_end(self) -> StopReport:
        self._begin()
        await self._work(self._call_back)
        return self.report

    async def _run_and_tell(self, outcomes: asyncio.Queue[StopOutcome | None]) -> None:
        call_back = self._call_back
        hand_over: HandOver = outcomes.put
        if call_back is not None:

            async def hand_over(outcome: StopOutcome) -> None:
                await call_back(outcome)
                await outcomes.put(outcome)

        try:
            try:
                await self._work(hand_over)
            except (asyncio.CancelledError, GeneratorExit):
                raise
            except BaseException as error:  # noqa: BLE001 - raised where the outcomes are read.
                self._error = error
            await outcomes.put(None)
        except asyncio.CancelledError:
            while not outcomes.empty():
                outcomes.get_nowait()
            outcomes.put_nowait(None)
            raise

    async def _work(self, hand_over: HandOver | None) -> None:
        if self._observer is not None:
            self._run.observer = notify(self._observer.begin_bulk)
        try:
            await self._work_through(hand_over)
        finally:
            self._log_early_end()
            if self._run.observer is not None:
                notify(self._run.observer.end, self.report)

    async def _work_through(self, hand_over: HandOver | None) -> None:
        journal: Journal | None = None
        try:
            if self._open_journal is not None:
                try:
                    journal = await _opened(self._open_journal)
                except BctrlError as error:
                    self._run.ended_early = error
                    raise
            await self._run.work_through(hand_over, journal)
        finally:
            self._ended = time.monotonic()
            if journal is not None:
                await self._close(journal)

    def _log_early_end(self) -> None:
        if self._run.ended_early is not None:
            _log.warning(
                "a bulk stop ended early, with %d targets read and %d of them not settled: %s",
                self._input.count,
                len(self._run.failures),
                self._run.ended_early.summary,
            )

    async def _close(self, journal: Journal) -> None:
        # In a thread: a disk may take its time.
        closing = asyncio.create_task(asyncio.to_thread(journal.close))
        await until_done([closing])
        if isinstance(error := closing.exception(), BctrlError):
            self._run.ended_early = self._run.ended_early or error


def _called(on_outcome: OnOutcome) -> HandOver:
    async def call(outcome: StopOutcome) -> None:
        called = on_outcome(outcome)
        if inspect.isawaitable(called):
            await called

    return call


async def _opened(open_journal: Callable[[], Journal]) -> Journal:
    # In a thread, as it may be long. What is opened must be closed, so this cannot be cancelled.
    opening = asyncio.create_task(asyncio.to_thread(open_journal))
    try:
        await until_done([opening])
    except asyncio.CancelledError:
        if opening.exception() is None:
            with suppress(BctrlError):
                opening.result().close()
        raise
    return opening.result()
