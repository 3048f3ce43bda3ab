"""The execution of a bulk stop: its run within its journal and its observer, to the end."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol

from bctrl_async._calls.observing import notify
from bctrl_async.bulk._cancel import CancelLevel, wait_shielded
from bctrl_async.bulk._delivery import Deliver, OutcomeBuffer, in_turn
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._targets import Input
from bctrl_async.errors import BctrlError, log_fields
from bctrl_async.journal import Journal
from bctrl_async.observer import Observer

_log = logging.getLogger("bctrl_async")


class BulkRun(Protocol):
    """A run that gives each target its outcome: in this process, or on a cluster.

    Attributes:
        source: The targets.
        ledger: The outcomes so far.
    """

    source: Input
    ledger: Ledger

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""

    @property
    def polling(self) -> int:
        """The number of runtimes that are polled."""

    @property
    def is_throttled(self) -> bool:
        """True while the run slows down because of a 429 or 503."""

    @property
    def retry_after(self) -> float:
        """The seconds for which the server has asked to wait; 0 if it has not."""

    @property
    def is_unanswered(self) -> bool:
        """True while the server answers no call."""

    @property
    def retrying(self) -> Counter[str]:
        """The targets that wait for a further attempt, by what came of the last one."""

    def open(self) -> None:
        """Check that the run can begin, in its event loop."""

    def end_early(self, reason: BctrlError, level: CancelLevel) -> None:
        """Cancel as much of the run as the level says, for this reason."""

    def cancel(self) -> None:
        """Cancel the run: record the rest, and deliver no further outcome."""

    async def run(self, deliver: Deliver | None) -> None:
        """Give every target its outcome."""


class Execution:
    """A run with its journal and its observer.

    Args:
        run: The run.
        open_journal: Opens the journal; None without a journal.
        observer: The observer of the session.
    """

    def __init__(
        self, run: BulkRun, open_journal: Callable[[], Journal] | None, observer: Observer | None
    ) -> None:
        self._run = run
        self._open_journal = open_journal
        self._observer = observer
        self._error: BaseException | None = None

    def raise_error(self) -> None:
        """Raise the error of `feed`, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def feed(self, outcomes: OutcomeBuffer, on_outcome: Deliver | None) -> None:
        """Execute the run, put its outcomes into a buffer, and end that.

        Args:
            outcomes: The buffer.
            on_outcome: Called with each outcome before.
        """
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
            # Perhaps before its first step, so that neither the run nor the buffer has an end.
            self._run.cancel()
            outcomes.discard()

    async def execute(self, deliver: Deliver | None) -> None:
        """Execute the run.

        Args:
            deliver: Called with each outcome, if given.

        Raises:
            BaseException: The error of the journal, the input or `deliver`.
        """
        ledger = self._run.ledger
        if self._observer is not None:
            ledger.observer = notify(self._observer.begin_bulk)
        try:
            await self._run_with_journal(deliver)
        finally:
            ledger.end()
            if ledger.ended_early is not None:
                _log.warning(
                    "a bulk stop ended early, with %d targets read and %d failures: %s",
                    self._run.source.count,
                    len(ledger.failures),
                    ledger.ended_early.summary,
                    extra={
                        "bctrl.event": "ended_early",
                        **log_fields(ledger.ended_early),
                        "bctrl.total": self._run.source.count,
                        "bctrl.failures": len(ledger.failures),
                    },
                )
            if ledger.observer is not None:
                notify(ledger.observer.end, ledger.report(self._run.source.count))

    async def _run_to_end(self, deliver: Deliver | None) -> None:
        """Run, and say so if the input has ended before its length."""
        await self._run.run(deliver)
        source = self._run.source
        if source.length is not None and not source.exhausted:
            self._run.ledger.end_early(
                BctrlError(f"the input ended after {source.count:,} of {source.length:,} targets")
            )

    async def _run_with_journal(self, deliver: Deliver | None) -> None:
        if self._open_journal is None:
            await self._run_to_end(deliver)
            return
        ledger = self._run.ledger
        try:
            journal = await _opened(self._open_journal)
        except BctrlError as error:
            ledger.end_early(error)
            raise
        except asyncio.CancelledError:
            # Nothing was read, so that no target says it.
            self._run.cancel()
            raise
        ledger.use_journal(journal)
        complete = False
        try:
            await self._run_to_end(deliver)
            if self._run.source.found is not None:
                try:
                    journal.mark_listed(self._run.source.found.listed)
                except BctrlError as error:
                    ledger.end_early(error)
            complete = not ledger.failures and ledger.ended_early is None
        finally:
            source = self._run.source
            close = partial(journal.close, complete=complete, unread=not source.exhausted)
            if (failure := await _closed(close)) is not None:
                ledger.end_early(failure)


async def _opened(open_journal: Callable[[], Journal]) -> Journal:
    # In a thread, since it may take long. An opened journal must be closed, so this is shielded.
    opening = asyncio.create_task(asyncio.to_thread(open_journal))
    try:
        await wait_shielded(opening)
    except asyncio.CancelledError:
        if opening.exception() is None:
            with suppress(BctrlError):
                opening.result().close(unread=True)
        raise
    return opening.result()


async def _closed(close: Callable[[], None]) -> BctrlError | None:
    # In a thread, since a disk may take long.
    closing = asyncio.create_task(asyncio.to_thread(close))
    await wait_shielded(closing)
    error = closing.exception()
    return error if isinstance(error, BctrlError) else None
