"""The account of a bulk stop: every outcome once, in counts, journal and observer."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, defaultdict

from bctrl_async._calls.observing import notify
from bctrl_async._calls.results import explain
from bctrl_async.bulk._cancel import CancelLevel, wait_shielded
from bctrl_async.bulk._state import RunState
from bctrl_async.errors import BctrlError, log_fields, quote
from bctrl_async.filters import Selection
from bctrl_async.journal import Journal, JournalFile, open_journal
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.observer import BulkObserver, StopObserver
from bctrl_async.outcomes import StopOutcome, StopReport, StopResult, accept_missing

_log = logging.getLogger("bctrl_async")

_MAX_NAMED = 10
"""The most runtimes that have started since and are named in the log."""
_NOT_RUN = BctrlError("the bulk stop was not run")
_NOT_ENDED = BctrlError("the bulk stop has not ended")


class OutcomeTally:
    """Counts of outcomes, and the outcomes that are not ok."""

    def __init__(self) -> None:
        # Adding 1 in a Counter would cost twice as much.
        self.counts: dict[StopResult, int] = defaultdict(int)
        self.running: int = 0
        self.failures: list[StopOutcome] = []
        self.retries: int = 0
        self.resumed: int = 0

    def add(self, outcome: StopOutcome) -> None:
        """Count an outcome."""
        self.counts[outcome.result] += 1
        # `running` is None if it is not known.
        if outcome.running is not False:
            self.failures.append(outcome)
        if outcome.running:
            self.running += 1
        if outcome.resumed:
            self.resumed += 1
        elif outcome.attempts > 1:
            self.retries += outcome.attempts - 1


class Ledger:
    """The outcomes of a bulk stop so far, its journal, its observer and its clock."""

    def __init__(self, state: RunState, *, missing_ok: bool) -> None:
        self.state: RunState = state
        self._missing_ok = missing_ok
        self._has_borrowed_journal = False
        self._past_end = 0
        """The offset in the journal after its last entry when the run began."""
        self.journal: JournalFile | None = None
        self.observer: BulkObserver | None = None
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.tally: OutcomeTally = OutcomeTally()
        self.throttled: int = 0
        self.started_since: tuple[Runtime, ...] | None = None
        """The runtimes that the last look found; None if nobody looked."""
        self.look_error: BctrlError | None = None
        """The reason why the last look failed."""

    async def open(
        self, journal: Journal | str | os.PathLike[str], base_url: str
    ) -> None:
        """Open a journal of the server at `base_url`, and read its entries."""
        self._has_borrowed_journal = isinstance(journal, Journal)
        # Reading a long journal takes time, so a thread does it.
        task = asyncio.create_task(asyncio.to_thread(open_journal, journal, base_url))
        try:
            await wait_shielded(task)
            self.journal = task.result()
            self._past_end = self.journal.end
        except BctrlError as error:
            self.state.set_ended_early(error)
            raise
        except asyncio.CancelledError:
            # No target was read, so no outcome would show the cancellation.
            self.state.cancel()
            # The thread opened the journal nevertheless, so `close` must release it.
            if task.exception() is None:
                self.journal = task.result()
            raise

    async def close(self) -> None:
        """Release the journal, if any."""
        if self.journal is None:
            return
        # A flush to disk takes time, so a thread does it.
        task = asyncio.create_task(asyncio.to_thread(self.release, self.journal))
        try:
            await wait_shielded(task)
        finally:
            # It is not done if the coroutine was closed.
            if task.done() and (task.cancelled() or task.exception() is not None):
                # No thread could start, or the loop ends before one could.
                self.release(self.journal)

    def release(self, journal: JournalFile) -> None:
        """Flush the journal to disk, and close it unless it is the caller's.

        Whatever goes wrong ends the run early.
        """
        try:
            if self._has_borrowed_journal:
                journal.flush()
            else:
                journal.close()
        except Exception as error:  # noqa: BLE001 - it is in the report.
            self.state.set_ended_early(_journal_error(error))

    async def correct(self, selection: Selection) -> None:
        """Correct the journal, if any, by a list; an error ends the run early."""
        if self.journal is None:
            return
        try:
            await asyncio.to_thread(self.journal.correct, selection)
        except Exception as error:  # noqa: BLE001 - it is in the report.
            self._end_unwritten(_journal_error(error))

    def set_look_error(self, reason: BctrlError) -> None:
        """Set why the last look failed, unless it has not; the first reason stays."""
        if self.started_since is None and self.look_error is None:
            self.look_error = reason

    def end(self, total: int) -> None:
        """Stop the clock, log an early end, and notify the observer."""
        self.ended_at = time.monotonic()
        reason = self.state.ended_early
        if reason is not None and not self._is_wrong_call(reason):
            self._log_early_end(reason, total)
        if self.started_since:
            self._log_started_since(self.started_since)
        if self.observer is not None:
            notify(self.observer.end, self.report(total))

    def _is_wrong_call(self, reason: BctrlError) -> bool:
        """Return True if the run raises that its targets are of a wrong type."""
        error = self.state.failure or reason
        return getattr(error, "argument", None) == "targets"

    def _log_early_end(self, reason: BctrlError, total: int) -> None:
        level = logging.WARNING
        if reason in self.state.caller_reasons:
            level = logging.INFO
        failures = len(self.tally.failures)
        _log.log(
            level,
            "a bulk stop ended early, with %d targets read and %d failures: %s",
            total,
            failures,
            reason.summary,
            extra={
                "bctrl.event": "ended_early",
                **log_fields(reason),
                "bctrl.total": total,
                "bctrl.failures": failures,
            },
        )

    def _log_started_since(self, runtimes: tuple[Runtime, ...]) -> None:
        _log.warning(
            "started since the workspace was listed, and not stopped: %d (%s)",
            len(runtimes),
            ", ".join(quote(runtime.alias) for runtime in runtimes[:_MAX_NAMED]),
            extra={
                "bctrl.event": "started_since",
                "bctrl.started_since": len(runtimes),
            },
        )

    def earlier_outcome(self, target: RuntimeRef) -> StopOutcome | None:
        """Return an earlier run's outcome if the runtime no longer ran, or None."""
        if self.journal is None:
            return None
        outcome = self.journal.done(target, self._past_end)
        # Only the first resumed outcome warns.
        if outcome is not None and not self.tally.resumed:
            self.journal.warn_if_old()
        return outcome

    def record(
        self, outcome: StopOutcome, observer: StopObserver | None = None
    ) -> StopOutcome:
        """Record the outcome of a target, once, and return it as it is recorded."""
        if self._missing_ok:
            outcome = accept_missing(outcome)
        if outcome.error is None and not outcome.ok:
            outcome = explain(outcome)
        self.tally.add(outcome)
        if not outcome.resumed:
            if self.observer is not None:
                notify(self.observer.outcome, outcome)
            # Resumed outcomes are in the journal already.
            self._write(outcome)
        if observer is not None:
            notify(observer.end, outcome)
        return outcome

    def _write(self, outcome: StopOutcome) -> None:
        """Write an outcome to the journal, if any."""
        if self.journal is None:
            return
        try:
            self.journal.write(outcome)
        except BctrlError as error:
            self._end_unwritten(error)

    def _end_unwritten(self, error: BctrlError) -> None:
        """End the run, whose journal cannot be written."""
        # The journal misses an outcome, even if no target is left to cancel.
        self.state.set_ended_early(error)
        # All later outcomes fail, too; only the first has something to cancel.
        if self.state.level < CancelLevel.WAITING:
            self.state.end_early(error, CancelLevel.WAITING)

    def report(self, total: int) -> StopReport:
        """Return the report so far; `total` is the number of targets that were read."""
        counts = Counter(self.tally.counts)
        ended_early = self.state.ended_early
        if self.started_at is None:
            ended_early = _NOT_RUN
        elif ended_early is None and (self.ended_at is None or counts.total() < total):
            ended_early = _NOT_ENDED
        return StopReport(
            total=total,
            counts=counts,
            running=self.tally.running,
            not_running=counts.total() - len(self.tally.failures),
            failures=tuple(self.tally.failures),
            elapsed=self._elapsed(),
            retries=self.tally.retries,
            throttled=self.throttled,
            resumed=self.tally.resumed,
            ended_early=ended_early,
            started_since=self.started_since,
            look_error=self.look_error,
        )

    def _elapsed(self) -> float:
        if self.started_at is None:
            return 0.0
        if self.ended_at is None:
            return time.monotonic() - self.started_at
        return self.ended_at - self.started_at


def _journal_error(error: Exception) -> BctrlError:
    """Return what the journal raised as an error of this package."""
    if isinstance(error, BctrlError):
        return error
    # Its traceback refers to the ledger, which keeps the error: a reference cycle.
    return BctrlError(f"the journal cannot be used: {error!r}")
