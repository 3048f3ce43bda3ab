"""The outcome of each stop, the report of a bulk stop, and the rules that decide a result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Annotated, Self

import msgspec
from msgspec.structs import asdict

from bctrl_async.errors import (
    BctrlApiError,
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNotFoundError,
    BctrlResponseError,
)
from bctrl_async.models import Runtime, RuntimeRef, RuntimeStatus

__all__ = ["RuntimeState", "StopOutcome", "StopReport", "StopResult"]


class StopResult(StrEnum):
    """The result of a stop.

    `stopped`, `accepted`, `already_stopped` and `not_found` are settled: the server has taken or
    answered the stop. After `accepted`, the runtime may still run.
    """

    STOPPED = "stopped"
    """The server confirmed that the runtime is stopped."""
    ACCEPTED = "accepted"
    """The server accepted the stop but did not confirm it. A run that resumes from a journal sends
    it again, unless the runtime is known to have ended."""
    ALREADY_STOPPED = "already_stopped"
    """The runtime was not running."""
    NOT_FOUND = "not_found"
    """The workspace or alias is unknown. A failure, unless `missing_ok` was given."""
    REJECTED = "rejected"
    """The server rejected or throttled the stop to the end, or the target is invalid."""
    NOT_SENT = "not_sent"
    """This run did nothing: the server received no request of it, or throttled all of them."""
    UNKNOWN = "unknown"
    """A request was sent but no answer settled it: the runtime may have stopped."""

    def __repr__(self) -> str:
        # Keeps printed counts short.
        return repr(self.value)

    @property
    def settled(self) -> bool:
        """True if the server has taken or answered the stop, but not rejected or throttled it."""
        return self in _SETTLED


class RuntimeState(StrEnum):
    """The state of a runtime when its outcome was recorded."""

    NOT_RUNNING = "not_running"
    """The server said so: `stopped`, `already_stopped`, or `accepted` and then `failed` or gone;
    with `missing_ok`, also `not_found`."""
    STILL_RUNNING = "still_running"
    """The server said so: its last status is `active`, in the answer, in a poll, or in the list of
    `stop_workspace`."""
    UNCONFIRMED = "unconfirmed"
    """The server said neither, or does not know the runtime (`not_found` without `missing_ok`)."""
    INVALID = "invalid"
    """The target cannot be the name of a runtime, such as a line that is not a target."""

    @property
    def text(self) -> str:
        """The state in words, such as `still running`."""
        return self.value.replace("_", " ")


now: Callable[[], datetime] = partial(datetime.now, UTC)
"""Return the current time in UTC."""

_SETTLED = frozenset(
    {StopResult.STOPPED, StopResult.ACCEPTED, StopResult.ALREADY_STOPPED, StopResult.NOT_FOUND}
)
_RESULTS = {RuntimeStatus.STOPPED: StopResult.STOPPED}
"""The results of statuses; the result of any other is `accepted`."""
_ACCEPTED = StopResult.ACCEPTED
_SETTLED_AND_FOUND = _SETTLED - {StopResult.NOT_FOUND}


def has_ended(outcome: StopOutcome) -> bool:
    """Return True if the runtime of an accepted stop no longer runs: it failed, or is gone."""
    match outcome.error:
        case BctrlNotFoundError(names_runtime=True):
            return True
    return outcome.runtime is not None and outcome.runtime.status.is_final


def is_only_accepted(outcome: StopOutcome) -> bool:
    """Return True if a stop was accepted whose runtime may not have ended."""
    return outcome.result is StopResult.ACCEPTED and not has_ended(outcome)


def may_run(outcome: StopOutcome) -> bool:
    """Return True if the server said of the runtime that it runs, or may run.

    So it did if it accepted the stop: that of a runtime that does not run is a conflict. A stop
    that is `unknown`, `rejected` or `not_sent` says nothing of the runtime by itself, but a list or
    a poll may have described it.
    """
    if is_only_accepted(outcome):
        return True
    return outcome.runtime is not None and not outcome.runtime.status.is_final


def successes(*, missing_ok: bool) -> frozenset[StopResult]:
    """Return the results that are not failures of a bulk stop.

    `not_found` is settled, but a mistyped workspace gives nothing else, while everything runs on.
    """
    return _SETTLED if missing_ok else _SETTLED_AND_FOUND


class StopOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of stopping one target.

    Args:
        index: The target's position in the input, from 0.
        target: The runtime to stop.
        result: The result.
        runtime: The runtime as last described by the server, in the answer, in a poll, or in the
            list of `stop_workspace`; None if it was not.
        error: The error that explains the result, or None.
        attempts: The number of stop requests started; polls are not counted.
        elapsed: Seconds from reading the target to this outcome.
        at: The time at which the outcome became known, in UTC. If `runtime` is as polled or listed
            apart from an answer to the stop, that of the poll or the list.
        resumed: True if the outcome comes from an earlier run's journal.
    """

    index: int
    target: RuntimeRef
    result: StopResult
    runtime: Runtime | None = None
    error: BctrlError | None = None
    attempts: int = 1
    elapsed: float = 0.0
    at: datetime = msgspec.field(default_factory=now)
    resumed: bool = False

    def to_dict(self) -> dict[str, object]:
        """Return the outcome as JSON values, which any encoder takes.

        The fields are those of an outcome in the output of the command; `error` has the type, the
        text and the facts of the error.
        """
        record = OutcomeRecord.of(self)
        # Only a field that is not its default is among the builtins.
        fields: dict[str, object] = asdict(record) | msgspec.to_builtins(record)
        fields["error"] = None if self.error is None else _error_dict(self.error)
        return fields


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
            return RuntimeState.NOT_RUNNING if missing_ok else RuntimeState.UNCONFIRMED
    if has_ended(outcome):
        return RuntimeState.NOT_RUNNING
    # A later version of the contract may have other statuses.
    match outcome.runtime:
        case Runtime(status=RuntimeStatus.ACTIVE):
            return RuntimeState.STILL_RUNNING
    match outcome.error:
        case BctrlConfigError(reason_class="invalid_input"):
            return RuntimeState.INVALID
    return RuntimeState.UNCONFIRMED


class StopReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of a bulk stop.

    Args:
        total: The number of targets read; the counts add up to it.
        counts: The number of outcomes for each result; 0 for a result that did not occur.
        failures: The outcomes that are not settled, and those that are `not_found` unless
            `missing_ok` was given, in order of completion.
        states: The number of runtimes by state; the numbers add up to `total`.
        elapsed: The duration of the run in seconds.
        retries: The number of stop requests beyond the first for each target.
        throttled: The number of 429 and 503 answers.
        resumed: The number of outcomes that come from an earlier run's journal.
        ended_early: The reason why the run ended before its input did, or None.
    """

    total: int
    counts: Counter[StopResult]
    failures: tuple[StopOutcome, ...]
    states: Counter[RuntimeState]
    elapsed: float
    retries: int
    throttled: int
    resumed: int = 0
    ended_early: BctrlError | None = None

    @property
    def ok(self) -> bool:
        """True if the whole input was read and there are no failures.

        The runtime of an `accepted` stop may still run: `all_stopped` is the stricter answer.
        """
        return not self.failures and self.ended_early is None

    @property
    def all_stopped(self) -> bool:
        """True if the report is `ok` and no runtime runs any longer, by what the server said.

        So it is of an input without targets: check `total` where a list may have come out empty.
        Pass `verify=True` to a bulk stop: otherwise nothing polls what was `accepted`, and this is
        False though the runtime may have ended.
        """
        return self.ok and self.states[RuntimeState.NOT_RUNNING] == self.total

    def __str__(self) -> str:
        known = [f"{self.states[RuntimeState.NOT_RUNNING]:,} of {self.total:,} no longer running"]
        others = (RuntimeState.STILL_RUNNING, RuntimeState.UNCONFIRMED, RuntimeState.INVALID)
        known += [f"{self.states[state]:,} {state.text}" for state in others if self.states[state]]
        text = f"{', '.join(known)} after {self.elapsed:.2f} s"
        if counts := [f"{self.counts[each]:,} {each}" for each in StopResult if self.counts[each]]:
            text += f": {', '.join(counts)}"
        if self.resumed:
            text += f"; {self.resumed:,} from an earlier run, not sent again"
        if self.ended_early is not None:
            text += f"; ended early: {self.ended_early}"
        return text

    def to_dict(self) -> dict[str, object]:
        """Return the report as JSON values, which any encoder takes.

        `failures` has each failure as `StopOutcome.to_dict` returns it.
        """
        return {
            "ok": self.ok,
            "all_stopped": self.all_stopped,
            "total": self.total,
            "counts": {result.value: self.counts[result] for result in StopResult},
            "states": {state.value: self.states[state] for state in RuntimeState},
            "elapsed": round(self.elapsed, 6),
            "retries": self.retries,
            "throttled": self.throttled,
            "resumed": self.resumed,
            "ended_early": None if self.ended_early is None else _error_dict(self.ended_early),
            "failures": [outcome.to_dict() for outcome in self.failures],
        }

    def raise_for_failures(self) -> None:
        """Raise unless the report is `ok`, which does not mean that it is `all_stopped`.

        Raises:
            ExceptionGroup: The error of each failure, after `ended_early` if it is set.
        """
        errors = [outcome.error for outcome in self.failures if outcome.error is not None]
        summary = f"{len(self.failures)} of {self.total} stops failed"
        if self.ended_early is not None:
            errors.insert(0, self.ended_early)
            summary += ", and the run ended early"
        if errors:
            raise ExceptionGroup(summary, errors)


class ErrorRecord(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """An error as JSON."""

    type: str
    message: str
    status: int | None = None
    code: str | None = None
    request_id: str | None = None
    may_have_stopped: bool = False

    @classmethod
    def of(cls, error: BctrlError) -> Self:
        """Make the record of an error."""
        return cls(
            type=type(error).__name__,
            message=error.summary,
            status=error.status,
            code=error.code,
            request_id=error.request_id,
            may_have_stopped=error.may_have_stopped,
        )


class OutcomeRecord(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """An outcome as JSON: a line of `-o json`, and without its empty fields one of the journal."""

    index: int
    workspace_id: str
    alias: str
    result: StopResult
    at: Annotated[datetime, msgspec.Meta(tz=True)]
    attempts: int = 0
    resumed: bool = False
    elapsed: float = 0.0
    runtime: Runtime | None = None
    error: ErrorRecord | None = None

    @classmethod
    def of(cls, outcome: StopOutcome) -> Self:
        """Make the record of an outcome."""
        return cls(
            index=outcome.index,
            workspace_id=outcome.target.workspace_id,
            alias=outcome.target.alias,
            result=outcome.result,
            at=outcome.at,
            attempts=outcome.attempts,
            resumed=outcome.resumed,
            elapsed=round(outcome.elapsed, 6),
            runtime=outcome.runtime,
            error=None if outcome.error is None else ErrorRecord.of(outcome.error),
        )


def _error_dict(error: BctrlError) -> dict[str, object]:
    # The record has only the summary, without the target and the advice.
    return asdict(ErrorRecord.of(error)) | {"message": str(error)}


def result_of(ended: Runtime | BctrlError) -> StopResult:  # noqa: PLR0911 - a table of rules.
    """Return the result of a stop whose call returned a runtime or raised an error."""
    if isinstance(ended, Runtime):
        return _RESULTS.get(ended.status, _ACCEPTED)
    match ended:
        case BctrlConflictError(already_stopped=True):
            return StopResult.ALREADY_STOPPED
        case BctrlNotFoundError(names_runtime=True):
            return StopResult.NOT_FOUND
        case BctrlError(accepted=True):
            return StopResult.ACCEPTED
        case BctrlError(may_have_stopped=True):
            return StopResult.UNKNOWN
        case (
            BctrlApiError(status=int())
            | BctrlResponseError(status=int())
            | BctrlConfigError(reason_class="invalid_input")
        ):
            return StopResult.REJECTED
    return StopResult.NOT_SENT


def outcome_of(
    target: RuntimeRef,
    ended: Runtime | BctrlError,
    *,
    index: int = 0,
    result: StopResult | None = None,
    attempts: int = 0,
    elapsed: float = 0.0,
) -> StopOutcome:
    """Return the outcome of a stop whose call ended with a runtime or an error."""
    runtime, error = (ended, None) if isinstance(ended, Runtime) else (None, ended)
    return StopOutcome(
        index=index,
        target=target,
        result=result or result_of(ended),
        runtime=runtime,
        error=error,
        attempts=attempts,
        elapsed=elapsed,
    )
