"""The last look at a workspace: what runs in it although its runtimes were stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from bctrl_async._calls.bulk_calls import BulkCalls
from bctrl_async._http.lists import RuntimeList
from bctrl_async._http.redaction import detached
from bctrl_async._kinds import Failure, Kind
from bctrl_async.bulk._cancel import CancelLevel, wait_shielded
from bctrl_async.bulk._sender import BulkSender
from bctrl_async.bulk._state import Worker
from bctrl_async.errors import BctrlConfigError, BctrlError
from bctrl_async.filters import Selection
from bctrl_async.models import Runtime, RuntimeRef, RuntimeStatus

_SLICE = 1_000
"""The number of listed runtimes that are filtered before other tasks get a turn."""
_MAX_SECONDS = 60.0
"""The most seconds for the list and all GETs, the patience of a single call: all is
stopped by then, so a dead server does not get the patience of a bulk stop."""
_TIME_IS_UP = BctrlError(f"a last look takes {_MAX_SECONDS:.0f}s at most")
_MAX_GETS = 10
"""The most runtimes that are got at once."""
_MAX_NAMED = 3
"""The most runtimes that an error names."""


class LastLook:
    """A last list of a workspace, compared with the `first` and with all outcomes.

    There are four cases of a listed runtime that runs and is selected. Its stop failed:
    its outcome says so. The first list did not have it: it has started since. Its stop
    succeeded: the API contradicts itself. Or it cannot be read. In the last two cases,
    the API is asked again by a GET.
    """

    def __init__(self, first: Selection, sender: BulkSender, calls: BulkCalls) -> None:
        self._first = first
        self._sender = sender
        self._ledger = sender.ledger
        self._state = sender.state
        self._calls = calls
        self._list_call = calls.last_list(first.workspace_id)
        self._targets = {
            item.alias: first.running.get(item.alias or "") or first.runtime_of(item)
            for item in first.items
        }
        failures = self._ledger.tally.failures
        self._failed = {outcome.target.alias for outcome in failures}
        self._found = first.anew()
        """It has what runs, and what may run as long as no GET has denied it."""
        self._doubted: dict[str, None] = {}
        self._contradicted: list[str] = []

    async def run(
        self,
        start: Callable[[Callable[[Worker], Awaitable[None]]], asyncio.Task[None]],
        worker: Worker,
    ) -> None:
        """Find what runs, and tell it, in the journal, too; `start` starts a task.

        A contradiction ends the run early.
        """
        if not self._state.goes_on():
            # The run has ended since this task was made.
            return
        timer = asyncio.get_running_loop().call_later(
            _MAX_SECONDS, self._state.end_early, _TIME_IS_UP, CancelLevel.READING
        )
        try:
            await self._list(worker)
            count = min(len(self._doubted), _MAX_GETS)
            gets = [start(self._get) for _ in range(count)]
            if gets:
                await asyncio.wait(gets)
        finally:
            timer.cancel()
        self._tell()
        await wait_shielded(asyncio.create_task(self._ledger.correct(self._found)))

    async def _list(self, worker: Worker) -> None:
        call = self._list_call
        send = partial(self._sender.send, worker, call, 0.0)
        answer = await self._sender.send_list(call, send)
        if isinstance(answer, Failure):
            self._ledger.set_look_error(call.error(answer))
            return
        again = self._first.anew()
        # What another run has stopped since then is not as listed.
        again.at = self._found.at = call.sent_at or again.at
        for first in range(0, len(answer), _SLICE):
            await asyncio.sleep(0)
            if not self._select(again, answer[first : first + _SLICE]):
                return
        again.keep_as(self._first)
        self._compare(again)

    def _select(self, selection: Selection, items: RuntimeList) -> bool:
        """Add items to a selection; return False if the user's function raised."""
        try:
            selection.add(items)
        # The run has stopped all, so the report tells of an error in `where`.
        except (Exception, asyncio.CancelledError) as cause:  # noqa: BLE001 - told.
            problem = f"where raised {cause!r:.500}"
            # The traceback's frames refer to the ledger, which keeps the error.
            self._fail(Kind.ABORTED, problem, detached(cause))
            return False
        return True

    def _compare(self, again: Selection) -> None:
        # The outcomes tell of those that the first list had.
        nameless = again.nameless - self._first.nameless
        if nameless > 0:
            self._fail(
                Kind.UNREADABLE, f"{nameless:,} of the listed runtimes cannot be read"
            )
        for item in again.items:
            runtime = again.runtime_of(item)
            has_ended = runtime is not None and runtime.status.is_final
            if item.alias is not None and not has_ended:
                self._add(item.alias, runtime)

    def _add(self, alias: str, runtime: Runtime | None) -> None:
        is_new = self._is_new(alias, runtime)
        if alias in self._failed and not is_new:
            return
        self._found.running[alias] = runtime
        if runtime is None or not is_new:
            self._doubted[alias] = None

    def _is_new(self, alias: str, runtime: Runtime | None) -> bool:
        """Return True if a runtime is not what the first list had under its alias."""
        if alias not in self._targets:
            return True
        target = self._targets[alias]
        if target is None or runtime is None:
            return False
        return target.id != runtime.id

    async def _get(self, worker: Worker) -> None:
        """Get runtimes that were stopped and listed as running, or cannot be read."""
        while self._doubted and self._state.goes_on():
            alias, _ = self._doubted.popitem()
            try:
                call = self._calls.poll(RuntimeRef(self._first.workspace_id, alias))
            except BctrlConfigError as error:
                self._fail(Kind.UNREADABLE, error.summary)
                continue
            answer = await self._sender.send(worker, call)
            if not isinstance(answer, Failure):
                self._on_answer(alias, answer)
            elif answer.kind is Kind.NOT_FOUND:
                del self._found.running[alias]
            else:
                self._ledger.set_look_error(call.error(answer))

    def _on_answer(self, alias: str, runtime: Runtime) -> None:
        # If it has ended, the list was late.
        del self._found.running[alias]
        if runtime.status.is_final:
            return
        if self._is_new(alias, runtime):
            selection = self._first.anew()
            if self._select(selection, [runtime]) and selection.items:
                self._found.running[alias] = runtime
        elif runtime.status == RuntimeStatus.ACTIVE:
            # A status of a later contract would contradict nothing.
            self._found.running[alias] = runtime
            self._contradicted.append(alias)

    def _fail(
        self, kind: Kind, summary: str, cause: BaseException | None = None
    ) -> None:
        failure = Failure(kind=kind, summary=summary, cause=cause)
        self._ledger.set_look_error(self._list_call.error(failure))

    def _tell(self) -> None:
        """Set in the ledger what runs, or why nobody knows."""
        if self._contradicted:
            error = _contradiction(self._contradicted)
            self._state.set_ended_early(error)
        if self._doubted:
            self._ledger.set_look_error(self._state.reason)
        if self._ledger.look_error is None:
            self._ledger.started_since = tuple(
                runtime
                for alias, runtime in self._found.running.items()
                if runtime is not None and self._is_new(alias, runtime)
            )


def _contradiction(aliases: list[str]) -> BctrlError:
    names = ", ".join(repr(alias) for alias in aliases[:_MAX_NAMED])
    others = len(aliases) - _MAX_NAMED
    if others > 0:
        names += f" and {others:,} others"
    return BctrlError(
        f"the API said that these had ended, and says now that they run: {names}",
        advice="Stop them again: a stop is safe to repeat",
    )
