"""The rules that decide the result and the outcome of a stop."""

from __future__ import annotations

from datetime import datetime

from msgspec.structs import replace

from bctrl_async._kinds import Failure, Kind, kind_of
from bctrl_async.errors import BctrlError
from bctrl_async.filters import parse_time
from bctrl_async.models import Runtime, RuntimeRef, RuntimeStatus
from bctrl_async.outcomes import StopOutcome, StopResult, now

_STOPPED_OR_ALREADY = frozenset({StopResult.STOPPED, StopResult.ALREADY_STOPPED})
_SETTLED = frozenset(
    {Kind.NOT_RUNNING.result, Kind.NOT_FOUND.result, Kind.INVALID_TARGET.result}
)
"""Results that the last attempt of a call decides, whatever happened before."""


def result_of(answer: Runtime | BctrlError) -> StopResult:
    """Return the result of a stop whose call returned a runtime or raised an error."""
    if isinstance(answer, Runtime):
        # Any other status means that the stop was accepted, but not confirmed.
        is_stopped = answer.status == RuntimeStatus.STOPPED
        return StopResult.STOPPED if is_stopped else StopResult.ACCEPTED
    error = answer
    result = kind_of(error).result
    if result in _SETTLED:
        return result
    # The rest depends on all attempts of the call.
    if error.accepted:
        return StopResult.ACCEPTED
    if error.may_have_stopped:
        return StopResult.UNKNOWN
    if error.status is None:
        return StopResult.NOT_SENT
    # The server rejected it; later attempts may have had no answer.
    return StopResult.REJECTED


def running_of(result: StopResult, runtime: Runtime | None) -> bool | None:
    """Return True if a runtime runs, False if it does not, None if nobody knows."""
    if result in _STOPPED_OR_ALREADY:
        return False
    if runtime is None:
        return None
    if runtime.status.is_final:
        return False
    # A status of a later contract confirms nothing; `active` alone shows that it runs.
    if runtime.status == RuntimeStatus.ACTIVE:
        return True
    return None


def outcome_of(
    target: RuntimeRef,
    answer: Runtime | BctrlError,
    *,
    index: int = 0,
    result: StopResult | None = None,
    attempts: int = 0,
    elapsed: float = 0.0,
    request_id: str | None = None,
    sent_at: datetime | None = None,
) -> StopOutcome:
    """Return the outcome of a stop whose call ended with a runtime or an error."""
    if result is None:
        result = result_of(answer)
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
    return StopOutcome(
        index=index,
        target=target,
        result=result,
        running=running,
        runtime=runtime,
        error=error,
        attempts=attempts,
        elapsed=elapsed,
        sent_at=sent_at,
        request_id=request_id,
    )


def explain(outcome: StopOutcome) -> StopOutcome:
    """Return an outcome with the error of a stop that was accepted, if that is all."""
    runtime = outcome.runtime
    if outcome.ok or outcome.error is not None or runtime is None:
        return outcome
    status = f"{runtime.status.value!r:.50}"
    problem = f"and the runtime was still {status} after it"
    return replace(outcome, error=_accepted_error(outcome, problem))


def _accepted_error(outcome: StopOutcome, problem: str) -> BctrlError:
    return BctrlError(
        f"the stop was accepted, {problem}",
        advice="Look at it again, or stop it again: a stop is safe to repeat",
        workspace_id=outcome.target.workspace_id,
        alias=outcome.target.alias,
        attempts=outcome.attempts,
        may_have_stopped=True,
    )


def outcome_without_answer(outcome: StopOutcome, failure: Failure) -> StopOutcome:
    """Return the outcome of a stop if no poll was answered; the last had a failure."""
    if outcome.error is not None:
        return outcome
    problem = f"and no poll was answered: {failure.summary}"
    return replace(outcome, running=None, error=_accepted_error(outcome, problem))


def outcome_with_runtime(
    outcome: StopOutcome, runtime: Runtime, sent_at: datetime | None
) -> StopOutcome:
    """Return an outcome updated by a polled status, which counts like the stop's.

    A later runtime has taken the alias, so the runtime has ended. An earlier runtime
    is the answer of a server that is behind, which says nothing.
    """
    known = outcome.runtime
    if known is not None and known.id != runtime.id:
        if not _is_later(runtime, known):
            return outcome
        return _ended(outcome, sent_at)
    result = outcome.result
    error = outcome.error
    if runtime.status.is_final:
        result = result_of(runtime)
        error = None
        if result.is_accepted and not outcome.result.is_accepted:
            # The runtime has failed, and nothing says that the server accepted this
            # stop: another stop would find the runtime not running.
            result = StopResult.ALREADY_STOPPED
    elif result.is_accepted:
        # `explain` gives the reason once it is final.
        error = None
    running = running_of(result, runtime)
    return _polled(
        outcome, sent_at, result, running=running, runtime=runtime, error=error
    )


def _is_later(runtime: Runtime, known: Runtime) -> bool:
    """Return True if a runtime was created after another, by their readable times."""
    created = parse_time(runtime.created_at)
    known_created = parse_time(known.created_at)
    if created is None or known_created is None:
        return False
    return created > known_created


def _polled(
    outcome: StopOutcome,
    sent_at: datetime | None,
    result: StopResult,
    *,
    running: bool | None,
    runtime: Runtime | None = None,
    error: BctrlError | None = None,
) -> StopOutcome:
    """Return an outcome with what a poll says, which was sent at this time."""
    return replace(
        outcome,
        result=result,
        running=running,
        runtime=runtime,
        error=error,
        at=now(),
        sent_at=sent_at,
    )


def _ended(outcome: StopOutcome, sent_at: datetime | None) -> StopOutcome:
    """Return the outcome of a stop whose runtime was shown before, and is gone."""
    result = outcome.result
    if not result.is_accepted:
        # Nothing says that the server accepted this stop.
        result = StopResult.ALREADY_STOPPED
    return _polled(outcome, sent_at, result, running=False)


def outcome_without_runtime(
    outcome: StopOutcome, error: BctrlError, sent_at: datetime | None
) -> StopOutcome:
    """Return an outcome updated by a poll that found no runtime of this name.

    If an earlier answer described the runtime, the name is right, so it no longer runs.
    Else the name may be wrong.
    """
    if outcome.runtime is not None:
        return _ended(outcome, sent_at)
    # The poll can have done nothing, but the stop before it may have worked.
    error.may_have_worked = error.may_have_stopped = True
    return _polled(outcome, sent_at, StopResult.NOT_FOUND, running=None, error=error)
