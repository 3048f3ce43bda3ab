"""Verify outcomes: poll the runtimes of stops whose effect the server has not confirmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec
from msgspec.structs import replace

from bctrl_async import _config
from bctrl_async._calls.call import Call
from bctrl_async._calls.retry import RetryPolicy, is_transient, probe_delay
from bctrl_async.bulk._cancel import RunState, Worker
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.errors import BctrlError, BctrlNotFoundError
from bctrl_async.models import Runtime
from bctrl_async.observer import StopObserver
from bctrl_async.outcomes import (
    RuntimeState,
    StopOutcome,
    StopResult,
    now,
    only_accepted,
    result_of,
    state_of,
)

_NOT_RUNNING = RuntimeState.NOT_RUNNING
_TAKEN = frozenset({StopResult.ACCEPTED, StopResult.UNKNOWN})
VERIFY_FOR = 30.0
"""Seconds for which a runtime is polled by default: a stop may have had no effect."""
_MAX_POLLERS = 1000
"""The runtimes that are polled beside the stops: a bound for memory."""


def verify_for(verify: bool | float) -> float | None:  # noqa: FBT001 - the value of `verify=`.
    """Return the seconds for which runtimes are polled, given `verify=`; None for none."""
    if verify is True:
        return VERIFY_FOR
    return None if verify is False else _config.seconds(verify, "verify")


def needs_verification(outcome: StopOutcome) -> bool:
    """Return True if the server took the stop, or may have, and its runtime may still run."""
    return not outcome.ok and outcome.result in _TAKEN


def outcome_after_poll(outcome: StopOutcome, polled: Runtime | BctrlError) -> StopOutcome:
    """Return an outcome with what a poll says.

    A status means what it would have meant in the answer to the stop. A runtime that is gone after
    the answer to its stop described it does not run: its name is not mistyped.
    """
    result = outcome.result
    match polled:
        case Runtime(status=status) if status.is_final:
            return _replace(outcome, result_of(polled), _NOT_RUNNING, polled, None)
        case Runtime():
            error = outcome.error
            if result is StopResult.ACCEPTED:
                error = only_accepted(outcome.target, polled, outcome.attempts)
            return _replace(outcome, result, state_of(result, polled, error), polled, error)
        case BctrlNotFoundError(names_runtime=True):
            if result is StopResult.ACCEPTED and outcome.runtime is not None:
                return _replace(outcome, result, _NOT_RUNNING, None, None)
            polled.may_have_stopped = True
            return _replace(outcome, StopResult.NOT_FOUND, RuntimeState.UNCONFIRMED, None, polled)
    return outcome


def _replace(
    outcome: StopOutcome,
    result: StopResult,
    state: RuntimeState,
    runtime: Runtime | None,
    error: BctrlError | None,
) -> StopOutcome:
    return replace(outcome, result=result, state=state, runtime=runtime, error=error, at=now())


class PollSchedule:
    """The times at which one runtime is polled: at least once, and for so many seconds."""

    __slots__ = ("_count", "_ends", "_policy")

    def __init__(self, policy: RetryPolicy, seconds: float, now: float) -> None:
        self._policy = policy
        self._ends = now + seconds
        self._count = 0

    def delay(self, polled: Runtime | BctrlError | None, now: float) -> float | None:
        """Return the seconds until the next poll, given what came of the last; None to give up."""
        if isinstance(polled, BctrlError) and not is_transient(
            polled, self._policy.statuses, reads=True
        ):
            return None
        left = max(self._ends - now, 0.0)
        if polled is not None and not left:
            return None
        self._count += 1
        return min(probe_delay(self._policy, self._count), left)


class Pending(msgspec.Struct):
    """An outcome to verify before it is recorded; `began` is when its stop began."""

    outcome: StopOutcome
    policy: RetryPolicy
    began: float
    observer: StopObserver | None = None
    recorded: bool = False


class Verifier:
    """Polls runtimes beside the workers of a bulk stop, each for so many `seconds`."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        make_poll: Callable[[str, str], Call[Runtime]],
        send: Callable[[Worker, Call[Runtime], float], Awaitable[Runtime | BctrlError]],
        state: RunState,
        seconds: float,
    ) -> None:
        self._ledger = ledger
        self._make_poll = make_poll
        self._send = send
        self._state = state
        self._seconds = seconds
        self.polling: int = 0
        self._pollers: dict[asyncio.Task[None], tuple[Worker, Pending]] = {}

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """The tasks that poll."""
        return list(self._pollers)

    @property
    def is_full(self) -> bool:
        """True if no further runtime can be polled beside the stops."""
        return len(self._pollers) >= _MAX_POLLERS

    def add(self, task: asyncio.Task[None], worker: Worker, pending: Pending) -> None:
        """Register a task that verifies an outcome."""
        self._pollers[task] = worker, pending
        self._state.workers[worker] = None
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        worker, pending = self._pollers.pop(task)
        del self._state.workers[worker]
        # A task that was cancelled before its first step has recorded nothing.
        self._record(pending)

    def _record(self, pending: Pending) -> None:
        if not pending.recorded:
            pending.recorded = True
            pending.outcome = self._ledger.record(pending.outcome, pending.observer)

    async def verify(self, worker: Worker, pending: Pending) -> StopOutcome:
        """Poll a target until its outcome is settled or time is up, and record the outcome."""
        self.polling += 1
        try:
            await self._poll(worker, pending)
        finally:
            self.polling -= 1
            elapsed = time.monotonic() - pending.began
            pending.outcome = replace(pending.outcome, elapsed=elapsed)
            self._record(pending)
        return pending.outcome

    async def _poll(self, worker: Worker, pending: Pending) -> None:
        loop = asyncio.get_running_loop()
        schedule = PollSchedule(pending.policy, self._seconds, loop.time())
        polled: Runtime | BctrlError | None = None
        while needs_verification(pending.outcome) and self._state.goes_on():
            delay = schedule.delay(polled, loop.time())
            if delay is None:
                break
            call = self._make_poll(*pending.outcome.target)
            call.observer = pending.observer
            polled = await self._send(worker, call, delay)
            pending.outcome = outcome_after_poll(pending.outcome, polled)
