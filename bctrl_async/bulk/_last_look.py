"""The last look at a workspace: what runs in it although its runtimes were stopped."""

from __future__ import annotations

import asyncio
from collections import deque

from bctrl_async._calls.bulk_calls import BulkCalls
from bctrl_async._http.lists import RuntimeList
from bctrl_async._kinds import Failure, Kind
from bctrl_async.bulk._cancel import wait_shielded
from bctrl_async.bulk._sender import BulkSender
from bctrl_async.bulk._state import Worker
from bctrl_async.errors import BctrlError
from bctrl_async.filters import Selection
from bctrl_async.models import Runtime, RuntimeRef, RuntimeStatus

_SLICE = 1_000
"""The number of listed runtimes that are filtered before other tasks get a turn."""
_MAX_NAMED = 3
"""The most runtimes that an error names."""


class LastLook:
    """A last list of a workspace, compared with the `first` and with all outcomes.

    There are three cases of a listed runtime that runs and is selected. Its stop
    failed: its outcome says so. The first list did not have it: it has started since.
    Its stop succeeded: the API contradicts itself, and is asked again by a GET.
    """

    def __init__(self, first: Selection, sender: BulkSender, calls: BulkCalls) -> None:
        self._first = first
        self._sender = sender
        self._ledger = sender.ledger
        self._calls = calls
        self._started: list[Runtime] = []
        self._doubted: deque[Runtime] = deque()
        self._contradicted: list[Runtime] = []

    @property
    def doubted(self) -> int:
        """The number of runtimes that are to be got once more."""
        return len(self._doubted)

    async def list_again(self, worker: Worker) -> None:
        """List the workspace once more, and find what runs."""
        call = self._calls.last_list(self._first.workspace_id)
        answer = await self._sender.send_list(worker, call)
        if isinstance(answer, Failure):
            self._ledger.look_error = call.error(answer)
            return
        await self._compare(answer)

    async def _compare(self, items: RuntimeList) -> None:
        again = self._first.anew()
        for start in range(0, len(items), _SLICE):
            await asyncio.sleep(0)
            again.add(items[start : start + _SLICE])
        again.keep_as(self._first)
        listed = {item.id for item in self._first.items if isinstance(item, Runtime)}
        failed = {outcome.target.alias for outcome in self._ledger.tally.failures}
        for item in again.items:
            if not isinstance(item, Runtime) or item.status.is_final:
                continue
            if item.alias in failed:
                continue
            if item.id in listed:
                self._doubted.append(item)
            else:
                self._started.append(item)

    async def confirm(self, worker: Worker) -> None:
        """Get runtimes that were stopped and are listed as running."""
        while self._doubted and self._ledger.state.goes_on():
            listed = self._doubted.popleft()
            call = self._calls.poll(RuntimeRef(self._first.workspace_id, listed.alias))
            answer = await self._sender.send(worker, call)
            if not isinstance(answer, Failure):
                self._add_confirmed(listed, answer)
            elif answer.kind is not Kind.NOT_FOUND:
                self._ledger.look_error = call.error(answer)

    def _add_confirmed(self, listed: Runtime, got: Runtime) -> None:
        if got.status.is_final:
            # The list was late.
            return
        if got.id != listed.id:
            self._started.append(got)
        elif got.status == RuntimeStatus.ACTIVE:
            # A status of a later contract would contradict nothing.
            self._contradicted.append(got)

    async def end(self) -> None:
        """Tell what runs, in the journal, too; a contradiction ends the run early."""
        if self._doubted and self._ledger.look_error is None:
            self._ledger.look_error = self._ledger.state.reason
        if self._ledger.look_error is None:
            self._ledger.started_since = tuple(self._started)
        running = self._first.anew()
        for runtime in (*self._started, *self._contradicted):
            running.running[runtime.alias] = runtime
        await wait_shielded(asyncio.create_task(self._ledger.correct(running)))
        if self._contradicted:
            aliases = [runtime.alias for runtime in self._contradicted]
            self._ledger.state.set_ended_early(_contradiction(aliases))


def _contradiction(aliases: list[str]) -> BctrlError:
    names = ", ".join(repr(alias) for alias in aliases[:_MAX_NAMED])
    others = len(aliases) - _MAX_NAMED
    if others > 0:
        names += f" and {others:,} others"
    return BctrlError(
        f"the API said that these had ended, and says now that they run: {names}",
        advice="Stop them again: a stop is safe to repeat",
    )
