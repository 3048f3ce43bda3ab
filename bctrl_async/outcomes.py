"""What became of each stop: one outcome for one target, and the rules that decide it."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from http import HTTPStatus
from typing import Self

import msgspec

from bctrl_async.errors import (
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNotFoundError,
)
from bctrl_async.models import Runtime, RuntimeRef, RuntimeStatus

__all__ = ["StopOutcome", "StopReport", "StopResult"]


class StopResult(StrEnum):
    """What became of a stop.

    Settled is what needs no further call: `stopped`, `accepted`, `already_stopped`, `not_found`.
    """

    STOPPED = "stopped"
    """The server answered that it is stopped."""
    ACCEPTED = "accepted"
    """The server took the stop, but did not (readably) say that it is done."""
    ALREADY_STOPPED = "already_stopped"
    """Nothing was running under the alias."""
    NOT_FOUND = "not_found"
    """There is no such workspace or alias."""
    REJECTED = "rejected"
    """The server said no, or the target is none."""
    NOT_SENT = "not_sent"
    """The request never reached the server."""
    UNKNOWN = "unknown"
    """It was sent, and no answer settled it: the runtime may have stopped."""

    def __repr__(self) -> str:
        # Counts by result are printed often, and the value says it all.
        return repr(self.value)

    @property
    def settled(self) -> bool:
        """Whether no further call is needed."""
        return self in _SETTLED


_SETTLED = frozenset(
    {
        StopResult.STOPPED,
        StopResult.ACCEPTED,
        StopResult.ALREADY_STOPPED,
        StopResult.NOT_FOUND,
    }
)


class StopOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one target.

    Args:
        index: The target's position in the input, from 0.
        target: The runtime that was to be stopped.
        result: What became of it.
        runtime: The runtime as the server described it, where it did.
        error: Why it is not plainly stopped, where it is not.
        attempts: How many requests to stop it were begun; looks at it are not counted.
        elapsed: Seconds from taking the target up to this outcome.
        resumed: Whether it is that of an earlier run, as the journal has it.
    """

    index: int
    target: RuntimeRef
    result: StopResult
    runtime: Runtime | None = None
    error: BctrlError | None = None
    attempts: int = 1
    elapsed: float = 0.0
    resumed: bool = False


class StopReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of all the targets of a bulk stop.

    Args:
        total: How many targets were read; the counts add up to it.
        counts: How many outcomes there are of each result; 0 for one that did not occur.
        failures: The outcomes that are not settled, as they came.
        elapsed: Seconds that the run took.
        retries: Requests beyond the first of each target.
        throttled: Answers that were 429 or 503.
        resumed: How many of the outcomes are those of an earlier run, as the journal has them.
        ended_early: Why not all of the input was worked off, where it was not.
    """

    total: int
    counts: Counter[StopResult]
    failures: tuple[StopOutcome, ...]
    elapsed: float
    retries: int
    throttled: int
    resumed: int = 0
    ended_early: BctrlError | None = None

    @property
    def ok(self) -> bool:
        """Whether every target is settled, and none was left unread."""
        return not self.failures and self.ended_early is None

    def raise_for_failures(self) -> None:
        """Raise unless the report is `ok`.

        Raises:
            ExceptionGroup: The error of each failure, and why the run ended early if it did.
        """
        errors = [outcome.error for outcome in self.failures if outcome.error is not None]
        summary = f"{len(self.failures)} of {self.total} stops are not settled"
        if self.ended_early is not None:
            errors.insert(0, self.ended_early)
            summary += ", and the run ended early"
        if errors:
            raise ExceptionGroup(summary, errors)


class ErrorRecord(msgspec.Struct, frozen=True, omit_defaults=True):
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


class OutcomeRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """An outcome as JSON: a line of `--json`, and without its empty fields one of the journal."""

    index: int
    workspace_id: str
    alias: str
    result: StopResult
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
            attempts=outcome.attempts,
            resumed=outcome.resumed,
            elapsed=round(outcome.elapsed, 6),
            runtime=outcome.runtime,
            error=None if outcome.error is None else ErrorRecord.of(outcome.error),
        )


def result_of(ended: Runtime | BctrlError) -> StopResult:  # noqa: PLR0911 - a table of rules.
    """Decide what became of a stop from how its call ended: the first rule that fits."""
    match ended:
        case Runtime(status=RuntimeStatus.STOPPED):
            return StopResult.STOPPED
        case Runtime():
            return StopResult.ACCEPTED
        case BctrlConflictError(already_stopped=True):
            return StopResult.ALREADY_STOPPED
        case BctrlNotFoundError(names_runtime=True):
            return StopResult.NOT_FOUND
        case BctrlError(status=int(status)) if _is_success(status) and not _is_page(ended):
            return StopResult.ACCEPTED
        case BctrlError(may_have_stopped=True):
            return StopResult.UNKNOWN
        case BctrlError(status=int()) | BctrlConfigError(reason_class="invalid_input"):
            return StopResult.REJECTED
    return StopResult.NOT_SENT


def outcome_of(
    target: RuntimeRef,
    ended: Runtime | BctrlError,
    *,
    index: int = 0,
    attempts: int = 0,
    elapsed: float = 0.0,
) -> StopOutcome:
    """Return the outcome of a stop whose call ended with a runtime or an error."""
    return StopOutcome(
        index=index,
        target=target,
        result=result_of(ended),
        runtime=ended if isinstance(ended, Runtime) else None,
        error=None if isinstance(ended, Runtime) else ended,
        attempts=attempts,
        elapsed=elapsed,
    )


def _is_success(status: int) -> bool:
    return HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES


def _is_page(error: BctrlError) -> bool:
    # A login page with status 200 is not the API's answer, whatever its status says.
    return (error.body or "").lstrip().startswith("<")
