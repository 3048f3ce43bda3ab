"""Whether what a stop left open has come true: what to ask, when, and what an answer means.

Decisions, without I/O or a clock of their own.
"""

from __future__ import annotations

import msgspec

from bctrl_async._calls.retry import RetryPolicy, is_transient, wait_to_ask_again
from bctrl_async.errors import BctrlError, BctrlNotFoundError
from bctrl_async.models import Runtime, RuntimeStatus
from bctrl_async.outcomes import StopOutcome, StopResult, result_of

_OVER = frozenset({RuntimeStatus.STOPPED, RuntimeStatus.FAILED})
"""The statuses in which nothing runs any more."""


def is_open(outcome: StopOutcome) -> bool:
    """Whether the server has not yet said that nothing runs any more, although it may be so."""
    if outcome.result is StopResult.ACCEPTED:
        return outcome.runtime is None or outcome.runtime.status not in _OVER
    return outcome.result is StopResult.UNKNOWN


def settled_by(outcome: StopOutcome, seen: Runtime | BctrlError) -> StopOutcome | None:
    """Return the outcome that a look at the runtime makes of it, None if it says nothing yet.

    The status means what it would have meant in the answer to the stop.
    """
    match seen:
        case Runtime(status=status) if status in _OVER:
            return msgspec.structs.replace(
                outcome, result=result_of(seen), runtime=seen, error=None
            )
        case BctrlNotFoundError(names_runtime=True):
            return msgspec.structs.replace(
                outcome, result=StopResult.NOT_FOUND, runtime=None, error=seen
            )
    return None


class PollSchedule:
    """When to poll one runtime.

    Args:
        policy: How long the waits are, and which errors are worth another look.
        patience: Seconds after which there is no further look; there is one in any case.
        now: The time of a monotonic clock, in seconds.
    """

    __slots__ = ("_count", "_ends", "_policy")

    def __init__(self, policy: RetryPolicy, patience: float, now: float) -> None:
        self._policy = policy
        self._ends = now + patience
        self._count = 0

    def delay(self, seen: Runtime | BctrlError | None, now: float) -> float | None:
        """Return how many seconds to wait before the next look, None if there is none.

        Args:
            seen: What the last one came to, None if there was none.
            now: The time.
        """
        if isinstance(seen, BctrlError) and not is_transient(
            seen, self._policy.statuses, reads=True
        ):
            return None
        left = max(self._ends - now, 0.0)
        if seen is not None and not left:
            return None
        self._count += 1
        return min(wait_to_ask_again(self._policy, self._count), left)
