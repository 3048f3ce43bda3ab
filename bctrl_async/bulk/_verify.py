"""Verify outcomes: poll the runtimes of stops whose effect the server has not confirmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec

from bctrl_async._calls.call import Call
from bctrl_async._calls.retry import RetryPolicy, is_transient, probe_delay
from bctrl_async.bulk._cancel import RunState, Worker
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.errors import THROTTLED, BctrlError, BctrlNotFoundError, is_unanswered
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.observer import StopObserver
from bctrl_async.outcomes import StopOutcome, StopResult, is_only_accepted, now, result_of

_UNCONFIRMED_PATIENCE = 30.0
"""Seconds for which a runtime is polled whose stop is `unknown`, or whose polls are unanswered: the
stop may have had no effect, and the polls no end."""
_MAX_POLLERS = 1000
"""The runtimes that are polled beside the stops: a bound for memory."""


def needs_verification(outcome: StopOutcome) -> bool:
    """Return True if the runtime may still be running."""
    return outcome.result is StopResult.UNKNOWN or is_only_accepted(outcome)


def outcome_after_poll(outcome: StopOutcome, polled: Runtime | BctrlError) -> StopOutcome | None:
    """Return the outcome that a poll settles, or None if it does not settle it.

    A status means what it would have meant in the answer to the stop. A runtime that is gone after
    the answer to its stop described it does not run: its name is not mistyped.
    """
    match polled:
        case Runtime(status=status) if status.is_final:
            return msgspec.structs.replace(
                outcome, result=result_of(polled), runtime=polled, error=None
            )
        case BctrlNotFoundError(names_runtime=True):
            is_gone = outcome.result is StopResult.ACCEPTED and outcome.runtime is not None
            result = StopResult.ACCEPTED if is_gone else StopResult.NOT_FOUND
            return msgspec.structs.replace(outcome, result=result, runtime=None, error=polled)
    return None


class PollSchedule:
    """The times at which one runtime is polled.

    Args:
        policy: Sets the delays, and the errors after which to poll again.
        patience: Seconds after which there is no further poll; the first is made in any case.
        now: The time of a monotonic clock, in seconds.
    """

    __slots__ = ("_count", "_ends", "_policy", "_silent_since")

    def __init__(self, policy: RetryPolicy, patience: float, now: float) -> None:
        self._policy = policy
        self._ends = now + patience
        self._count = 0
        self._silent_since: float | None = None

    def end_by(self, time: float) -> None:
        """Make no poll after this time."""
        self._ends = min(self._ends, time)

    def delay(self, polled: Runtime | BctrlError | None, now: float) -> float | None:
        """Return the seconds until the next poll, or None to give up.

        Args:
            polled: The result of the last poll, None before the first.
            now: The time.
        """
        if isinstance(polled, BctrlError) and not is_transient(
            polled, self._policy.statuses, reads=True
        ):
            return None
        if isinstance(polled, BctrlError) and is_unanswered(polled):
            # Only this target is unanswered: in an outage the breaker would hold the poll.
            self._silent_since = now if self._silent_since is None else self._silent_since
            if now - self._silent_since >= _UNCONFIRMED_PATIENCE:
                return None
        else:
            self._silent_since = None
        left = max(self._ends - now, 0.0)
        if polled is not None and not left:
            return None
        self._count += 1
        return min(probe_delay(self._policy, self._count), left)


class Pending(msgspec.Struct):
    """An outcome to verify before it is recorded.

    Args:
        outcome: The outcome as it stands.
        policy: The policy of the polls.
        began: The time at which its stop began.
        observer: The observer of its stop.
        recorded: True once it is recorded.
    """

    outcome: StopOutcome
    policy: RetryPolicy
    began: float
    observer: StopObserver | None = None
    recorded: bool = False


class Verifier:
    """Polls runtimes beside the workers of a bulk stop.

    Args:
        ledger: Records each outcome once it is verified.
        make_poll: Makes the call that polls a target.
        send: Sends such a call for a worker, after a delay in seconds.
        state: Tells whether more requests may be sent.
        deadline: Seconds until a run ends, None without a deadline.

    Attributes:
        polling: The number of runtimes that are polled.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        make_poll: Callable[[RuntimeRef], Call[Runtime]],
        send: Callable[[Worker, Call[Runtime], float], Awaitable[Runtime | BctrlError]],
        state: RunState,
        deadline: float | None,
    ) -> None:
        self._ledger = ledger
        self._make_poll = make_poll
        self._send = send
        self._state = state
        self._deadline = deadline
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
            settled = await self._poll(worker, pending)
            if settled is not None:
                pending.outcome = msgspec.structs.replace(settled, at=now())
        finally:
            self.polling -= 1
            elapsed = time.monotonic() - pending.began
            pending.outcome = msgspec.structs.replace(pending.outcome, elapsed=elapsed)
            self._record(pending)
        return pending.outcome

    async def _poll(self, worker: Worker, pending: Pending) -> StopOutcome | None:
        loop = asyncio.get_running_loop()
        patience = self._deadline or pending.policy.max_throttle_wait
        schedule = PollSchedule(pending.policy, patience, loop.time())
        polled: Runtime | BctrlError | None = None
        while self._state.goes_on():
            delay = schedule.delay(polled, loop.time())
            if delay is None:
                break
            call = self._make_poll(pending.outcome.target)
            call.observer = pending.observer
            polled = await self._send(worker, call, delay)
            if (settled := outcome_after_poll(pending.outcome, polled)) is not None:
                return settled
            if isinstance(polled, Runtime):
                # News also if it still runs: another journal may have it as stopped since.
                pending.outcome = msgspec.structs.replace(pending.outcome, runtime=polled, at=now())
            if pending.outcome.result is StopResult.UNKNOWN and not _is_throttled(polled):
                schedule.end_by(loop.time() + _UNCONFIRMED_PATIENCE)
        return None


def _is_throttled(polled: Runtime | BctrlError) -> bool:
    return isinstance(polled, BctrlError) and polled.status in THROTTLED
