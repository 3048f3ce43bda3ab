"""The way from an item of the input to its stop, and from its result to its outcome."""

from __future__ import annotations

import asyncio
import time

from msgspec.structs import replace

from bctrl_async._calls.bulk_calls import BulkCalls
from bctrl_async._calls.call import annotate
from bctrl_async._calls.results import outcome_of
from bctrl_async._http.request import STOP
from bctrl_async.bulk._cancel import wait_shielded
from bctrl_async.bulk._input import Input, best_effort_ref, check_first, target_of
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._parked import Stop
from bctrl_async.errors import BctrlConfigError, BctrlError, BctrlResponseError
from bctrl_async.filters import Selection
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.outcomes import StopOutcome, StopResult


class Intake:
    """The items of an input as stops, or as outcomes if they are not to be sent."""

    def __init__(self, source: Input, ledger: Ledger, calls: BulkCalls) -> None:
        self._source = source
        self._ledger = ledger
        self._calls = calls

    async def write_running(self, selection: Selection) -> None:
        """Correct the journal's entries of listed runtimes that run, and flush it.

        This comes before any stop is sent: after a crash, none of them may count as
        stopped. An end of the run waits for it.
        """
        await wait_shielded(asyncio.create_task(self._ledger.correct(selection)))

    def stop(self, index: int, item: object) -> Stop | StopOutcome:
        """Return the stop of an item, or its outcome if it is not to be sent."""
        # A stop that was parked is taken again like an item.
        if isinstance(item, Stop):
            return item
        started = time.monotonic()
        try:
            if index == 0:
                check_first(item)
            target = target_of(item)
        except BctrlError as error:
            if error.argument == "targets":
                # The whole input is of a wrong type.
                self._ledger.state.fail(error)
            return self._reject(index, best_effort_ref(item), error)
        # The list of a workspace decides what is sent, not the journal.
        if self._source.selection is None:
            outcome = self._ledger.earlier_outcome(target)
            if outcome is not None:
                return self._ledger.record(replace(outcome, index=index))
        try:
            call = self._calls.stop(target)
        except BctrlConfigError as error:
            annotate(error, STOP.name, *target)
            return self._reject(index, target, error)
        return Stop(index, target, call, started)

    def _reject(self, index: int, target: RuntimeRef, error: BctrlError) -> StopOutcome:
        result = StopResult.INVALID
        if isinstance(error, BctrlResponseError):
            # A listed runtime that cannot be read is a target, but it is not known
            # what to do.
            result = StopResult.REJECTED
        # The ledger keeps the error, and the traceback's frames refer to the ledger.
        error.with_traceback(None)
        outcome = outcome_of(target, error, index=index, result=result)
        return self._ledger.record(self._source.with_listed(outcome))

    def outcome(self, stop: Stop, result: Runtime | BctrlError) -> StopOutcome:
        """Return the outcome of a stop, as `with_listed` completes it."""
        return self._source.with_listed(
            outcome_of(
                stop.target,
                result,
                index=stop.index,
                attempts=stop.call.attempts,
                elapsed=time.monotonic() - stop.started,
                request_id=stop.call.request_id,
                sent_at=stop.call.sent_at,
            )
        )
