"""Verify outcomes: poll the runtimes of stops whose effect the server has not confirmed."""

from __future__ import annotations

from msgspec.structs import replace

from bctrl_async import _config
from bctrl_async.errors import BctrlError, BctrlNotFoundError
from bctrl_async.models import Runtime
from bctrl_async.outcomes import (
    StopOutcome,
    StopResult,
    now,
    only_accepted,
    result_of,
    running_of,
)

_TAKEN = frozenset({StopResult.ACCEPTED, StopResult.UNKNOWN})
VERIFY_FOR = 30.0
"""Seconds of polling by default, because a stop without effect would be polled for ever."""


def verify_for(verify: bool | float) -> float | None:  # noqa: FBT001 - the value of `verify=`.
    """Return the seconds of polling for a value of `verify=`; None for no polling."""
    if verify is True:
        return VERIFY_FOR
    return None if verify is False else _config.seconds(verify, "verify")


def needs_verification(outcome: StopOutcome) -> bool:
    """Return True if the server took the stop, or may have, and its runtime may still run."""
    return not outcome.ok and outcome.result in _TAKEN


def outcome_after_poll(outcome: StopOutcome, polled: Runtime | BctrlError) -> StopOutcome:
    """Return an outcome updated by a poll.

    A polled status counts like a status in the answer to the stop. A runtime that is gone
    does not run if the answer to its stop described it, since its name cannot be mistyped then.
    """
    result = outcome.result
    match polled:
        case Runtime(status=status) if status.is_final:
            ending = result_of(polled)
            if result is StopResult.UNKNOWN and ending is StopResult.ACCEPTED:
                # Nobody accepted the stop, but another would find the runtime not running.
                ending = StopResult.ALREADY_STOPPED
            return _replace(outcome, ending, polled, None, running=False)
        case Runtime():
            error = outcome.error
            if result is StopResult.ACCEPTED:
                error = only_accepted(outcome.target, polled, outcome.attempts)
            return _replace(outcome, result, polled, error, running=running_of(result, polled))
        case BctrlNotFoundError(names_runtime=True):
            if result is StopResult.ACCEPTED and outcome.runtime is not None:
                return _replace(outcome, result, None, None, running=False)
            polled.may_have_stopped = True
            return _replace(outcome, StopResult.NOT_FOUND, None, polled, running=None)
    return outcome


def _replace(
    outcome: StopOutcome,
    result: StopResult,
    runtime: Runtime | None,
    error: BctrlError | None,
    *,
    running: bool | None,
) -> StopOutcome:
    return replace(outcome, result=result, running=running, runtime=runtime, error=error, at=now())
