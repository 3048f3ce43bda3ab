"""Whether what a stop left open has come true: what to ask, when, and what an answer means.

Decisions, without I/O or a clock of their own.
"""

from __future__ import annotations

import msgspec

from bctrl_async._calls.retry import RetryPolicy, is_transient, probe_delay
from bctrl_async.errors import BctrlError, BctrlNotFoundError
from bctrl_async.models import Runtime, RuntimeStatus
from bctrl_async.outcomes import StopOutcome, StopResult, result_of

_OVER = frozenset({RuntimeStatus.STOPPED, RuntimeStatus.FAILED})
"""The statuses in which nothing runs any more."""


def needs_verification(outcome: StopOutcome) -> bool:
    """Whether the server has not yet said that nothing runs any more, although it may be so."""
    if outcome.result is StopResult.ACCEPTED:
        return outcome.runtime is None or outcome.runtime.status not in _OVER
    return outcome.result is StopResult.UNKNOWN


def outcome_after_poll(outcome: StopOutcome, polled: Runtime | BctrlError) -> StopOutcome | None:
    """Return the outcome that a look at the runtime makes of it, None if it says nothing yet.

    The status means what it would have meant in the answer to the stop.
    """
    match polled:
        case Runtime(status=status) if status in _OVER:
            return msgspec.structs.replace(
                outcome, result=result_of(polled), runtime=polled, error=None
            )
        case BctrlNotFoundError(names_runtime=True):
            return msgspec.structs.replace(
                outcome, result=StopResult.NOT_FOUND, runtime=None, error=polled
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

    def delay(self, polled: Runtime | BctrlError | None, now: float) -> float | None:
        """Return how many seconds to wait before the next look, None if there is none.

        Args:
            polled: What the last one came to, None if there was none.
            now: The time.
        """
        if isinstance(polled, BctrlError) and not is_transient(
            polled, self._policy.statuses, reads=True
        ):
            return None
        left = max(self._ends - now, 0.0)
        if polled is not None and not left:
            return None
        self._count += 1
        return min(probe_delay(self._policy, self._count), left)
