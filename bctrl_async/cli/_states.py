"""The state of a runtime after its stop, as far as its outcome tells."""

from enum import StrEnum

from bctrl_async import (
    BctrlConfigError,
    Runtime,
    RuntimeStatus,
    StopOutcome,
    StopResult,
)
from bctrl_async.outcomes import has_ended


class RuntimeState(StrEnum):
    """The state of a runtime when its outcome was recorded."""

    NOT_RUNNING = "not running"
    """The server said so: `stopped`, `already_stopped`, or `accepted` and then `failed` or gone."""
    STILL_RUNNING = "still running"
    """The server said so: its last status is `active`."""
    UNKNOWN = "unknown"
    """The server said neither, or does not know the runtime (`not_found`)."""
    INVALID = "invalid"
    """The target cannot be the name of a runtime, such as a line that is not a target."""


def state_of(outcome: StopOutcome, *, missing_ok: bool) -> RuntimeState:
    """Return the state of the runtime of an outcome.

    Args:
        outcome: The outcome.
        missing_ok: Take a runtime that is `not_found` for one that does not run. Otherwise its
            name may be mistyped.
    """
    match outcome.result:
        case StopResult.STOPPED | StopResult.ALREADY_STOPPED:
            return RuntimeState.NOT_RUNNING
        case StopResult.NOT_FOUND:
            return RuntimeState.NOT_RUNNING if missing_ok else RuntimeState.UNKNOWN
    if has_ended(outcome):
        return RuntimeState.NOT_RUNNING
    match outcome.error:
        case BctrlConfigError(reason_class="invalid_input"):
            return RuntimeState.INVALID
    # A later version of the contract may have other statuses.
    match outcome.runtime:
        case Runtime(status=RuntimeStatus.ACTIVE):
            return RuntimeState.STILL_RUNNING
    return RuntimeState.UNKNOWN
