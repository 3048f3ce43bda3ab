"""The rules that decide the result and the outcome of a stop."""

from __future__ import annotations

from bctrl_async._kinds import Kind, kind_of
from bctrl_async.errors import BctrlError
from bctrl_async.models import Runtime, RuntimeRef, RuntimeStatus
from bctrl_async.outcomes import StopOutcome, StopResult, running_of

_SETTLED = frozenset({Kind.NOT_RUNNING.result, Kind.NOT_FOUND.result, Kind.INVALID_TARGET.result})


def result_of(answer: Runtime | BctrlError) -> StopResult:
    """Return the result of a stop whose call returned a runtime or raised an error."""
    if isinstance(answer, Runtime):
        # Any other status means that the stop was accepted, but not confirmed.
        is_stopped = answer.status == RuntimeStatus.STOPPED
        return StopResult.STOPPED if is_stopped else StopResult.ACCEPTED
    result = kind_of(answer).result
    if result in _SETTLED:
        return result
    # The rest depends on all attempts of the call.
    if answer.accepted:
        return StopResult.ACCEPTED
    if answer.may_have_stopped:
        return StopResult.UNKNOWN
    # The status is from the last answer, a refusal, even if a later attempt had no answer.
    return StopResult.NOT_SENT if answer.status is None else StopResult.REJECTED


def outcome_of(
    target: RuntimeRef,
    answer: Runtime | BctrlError,
    *,
    index: int = 0,
    result: StopResult | None = None,
    attempts: int = 0,
    elapsed: float = 0.0,
    request_id: str | None = None,
) -> StopOutcome:
    """Return the outcome of a stop whose call ended with a runtime or an error."""
    result = result or result_of(answer)
    runtime: Runtime | None = None
    error: BctrlError | None = None
    if isinstance(answer, Runtime):
        runtime = answer
    else:
        error = answer
        request_id = error.request_id or request_id
    running = running_of(result, runtime)
    if running is False:
        error = None
    elif runtime is not None:
        error = only_accepted(target, runtime, attempts)
    return StopOutcome(
        index=index,
        target=target,
        result=result,
        running=running,
        runtime=runtime,
        error=error,
        attempts=attempts,
        elapsed=elapsed,
        request_id=request_id,
    )


def only_accepted(target: RuntimeRef, runtime: Runtime, attempts: int) -> BctrlError:
    """Return the error of a stop that was accepted, whose runtime may still run."""
    return BctrlError(
        f"the stop was accepted, and the runtime was still {runtime.status.value!r:.50} after it",
        advice="Look at it again, or stop it again: a stop is safe to repeat",
        workspace_id=target.workspace_id,
        alias=target.alias,
        attempts=attempts,
        may_have_stopped=True,
    )
