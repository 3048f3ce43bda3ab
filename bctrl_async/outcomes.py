"""The outcome of each stop, and the report of a bulk stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial

import msgspec
from msgspec.structs import asdict, replace

from bctrl_async.errors import BctrlError, advice_of
from bctrl_async.models import Runtime, RuntimeRef

__all__ = ["StopOutcome", "StopReport", "StopResult"]


class StopResult(StrEnum):
    """The result of a stop: what the server said to it.

    `StopOutcome.running` says whether the runtime still runs.
    """

    STOPPED = "stopped"
    """The server confirmed that the runtime is stopped."""
    ACCEPTED = "accepted"
    """The server accepted the stop but did not confirm it."""
    ALREADY_STOPPED = "already_stopped"
    """The runtime was not running."""
    NOT_FOUND = "not_found"
    """The workspace or alias is unknown."""
    REJECTED = "rejected"
    """The server's last answer was a refusal, such as throttling."""
    INVALID = "invalid"
    """The target cannot name a runtime, such as an unreadable line of a file."""
    NOT_SENT = "not_sent"
    """No request was sent."""
    UNKNOWN = "unknown"
    """A request was sent but no answer settled it: the runtime may have stopped."""

    @property
    def needs_poll(self) -> bool:
        """True if the server may have taken the stop, and the runtime may still run."""
        return self.is_accepted or self is StopResult.UNKNOWN

    @property
    def is_accepted(self) -> bool:
        """True if the server accepted the stop, but has not confirmed it."""
        return self is StopResult.ACCEPTED

    @property
    def has_no_effect(self) -> bool:
        """True if the stop cannot have stopped the runtime."""
        return self in {StopResult.REJECTED, StopResult.INVALID, StopResult.NOT_SENT}

    @property
    def is_processed(self) -> bool:
        """True if the server has processed the stop, so that the call did not fail."""
        return not (self.has_no_effect or self is StopResult.UNKNOWN)

    def __repr__(self) -> str:
        # Printed counts are shorter without the name of the class.
        return repr(self.value)


now: Callable[[], datetime] = partial(datetime.now, UTC)
"""Return the current time in UTC."""


class StopOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of stopping one target.

    Args:
        index: The target's position in the input, from 0.
        target: The runtime to stop.
        result: What the server said to the stop.
        running: True if the runtime runs, False if it no longer runs, by the server's
            own word; None where nobody knows.
        runtime: The runtime as last described by the server, in the answer, in a poll,
            or in the list of `stop_workspace` if no request can have stopped it since;
            else None.
        error: The error that explains why the outcome is not `ok`; None if it is.
        attempts: The number of stop requests started; polls are not counted.
        elapsed: Seconds from reading the target to this outcome.
        at: The time at which the outcome became known, in UTC; if `runtime` comes from
            a poll or a list, the time of the poll or the list.
        sent_at: The time at which the last request started, in UTC: a stop, or the poll
            that was answered last; None if none started. If the outcome is `ok`, its
            runtime may have been started again since.
        request_id: The server's id of the last stop request that it answered, or None.
        resumed: True if the outcome comes from an earlier run's journal.
    """

    index: int
    target: RuntimeRef
    result: StopResult
    running: bool | None = None
    runtime: Runtime | None = None
    error: BctrlError | None = None
    attempts: int = 1
    elapsed: float = 0.0
    at: datetime = msgspec.field(default_factory=now)
    sent_at: datetime | None = None
    request_id: str | None = None
    resumed: bool = False

    @property
    def ok(self) -> bool:
        """True if the runtime no longer runs, by the server's own word."""
        return self.running is False

    def to_dict(self) -> dict[str, object]:
        """Return the outcome as JSON values, for any encoder.

        The fields are the same as in the output of the command. `error` has the type
        and the facts of the error, and its `summary` as the `message`.
        """
        return {
            "index": self.index,
            "workspace_id": _encodable(self.target.workspace_id),
            "alias": _encodable(self.target.alias),
            "result": str(self.result),
            "at": msgspec.to_builtins(self.at),
            "sent_at": msgspec.to_builtins(self.sent_at),
            "ok": self.ok,
            "running": self.running,
            "attempts": self.attempts,
            "elapsed": round(self.elapsed, 6),
            "request_id": self.request_id,
            "resumed": self.resumed,
            "runtime": msgspec.to_builtins(self.runtime),
            "error": _optional_fields(self.error),
        }


class StopReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of a bulk stop.

    Args:
        total: The number of targets read; the counts add up to it.
        counts: The number of outcomes for each result; 0 if it did not occur.
        running: The number of runtimes that run, by the server's own word.
        not_running: The number of runtimes that no longer run, by the server's word.
        failures: The outcomes that are not `ok`, in order of completion.
        elapsed: The duration of the run in seconds.
        retries: The number of stop requests beyond the first for each target.
        throttled: The number of 429 and 503 answers.
        resumed: The number of outcomes that come from an earlier run's journal.
        ended_early: The reason why the run ended early, such as its deadline, or None.
        started_since: The runtimes that match and run, and were no targets, by a last
            list of the workspace; also a new runtime under the alias of a target, and
            a runtime whose age alone cannot be read. `ok` is not about them. None if
            nobody knows. If `look_error` is None, too, no look was due: it follows
            the outcomes of `stop_workspace`, with `verify`, unless the run ends early
            or has no targets.
        look_error: The reason why this last look failed, or None: the list or a GET of
            it failed or took over a minute, had a runtime that cannot be read, `where`
            raised, or the run was left or ended before.
    """

    total: int
    counts: Counter[StopResult]
    running: int
    not_running: int
    failures: tuple[StopOutcome, ...]
    elapsed: float
    retries: int = 0
    throttled: int = 0
    resumed: int = 0
    ended_early: BctrlError | None = None
    started_since: tuple[Runtime, ...] | None = None
    look_error: BctrlError | None = None

    @property
    def ok(self) -> bool:
        """True if the whole input was read and no runtime in it runs any longer.

        An input without targets is `ok`: check `total` if it may be empty by mistake.
        """
        return not self.failures and self.ended_early is None

    def __str__(self) -> str:
        text = f"{self.not_running:,} of {self.total:,} no longer running"
        if self.running:
            text += f", {self.running:,} still running"
        unconfirmed = self.total - self.not_running - self.running
        if unconfirmed:
            text += f", {unconfirmed:,} unconfirmed"
        text += f" after {self.elapsed:.2f} s"
        results = [result for result in StopResult if self.counts[result]]
        if results:
            counts = (f"{self.counts[result]:,} {result}" for result in results)
            text += f": {', '.join(counts)}"
        return "; ".join([text, *self._notes()])

    def _notes(self) -> Iterator[str]:
        """Yield what the summary says beside the counts."""
        if self.resumed:
            yield f"{self.resumed:,} from an earlier run, not sent again"
        if self.started_since:
            yield f"{len(self.started_since):,} started since"
        if self.look_error is not None:
            reason = self.look_error.summary
            yield f"nobody knows what has started since ({reason})"
        if self.ended_early is not None:
            yield f"ended early: {self.ended_early}"

    def to_dict(self) -> dict[str, object]:
        """Return the report as JSON values, for any encoder.

        `failures` has each failure as `StopOutcome.to_dict` returns it.
        """
        return {
            "ok": self.ok,
            **asdict(self),
            "counts": {result.value: self.counts[result] for result in StopResult},
            "elapsed": round(self.elapsed, 6),
            "ended_early": _optional_fields(self.ended_early),
            "started_since": msgspec.to_builtins(self.started_since),
            "look_error": _optional_fields(self.look_error),
            "failures": [outcome.to_dict() for outcome in self.failures],
        }

    def raise_for_failures(self) -> None:
        """Raise unless the report is `ok`.

        Raises:
            ExceptionGroup: The error of each failure, after `ended_early` if it is set.
        """
        errors = [
            outcome.error or BctrlError("the runtime may still be running")
            for outcome in self.failures
        ]
        summary = f"{len(self.failures)} of {self.total} runtimes may still be running"
        if self.ended_early is not None:
            errors.insert(0, self.ended_early)
            summary += ", and the run ended early"
        if errors:
            raise ExceptionGroup(summary, errors)


def accept_missing(outcome: StopOutcome) -> StopOutcome:
    """Return an outcome, made ok if its runtime does not exist (`missing_ok=`)."""
    if outcome.result is not StopResult.NOT_FOUND:
        return outcome
    return replace(outcome, running=False, error=None)


def error_fields(error: BctrlError) -> dict[str, object]:
    """Return the type and the facts of an error as JSON values."""
    return {
        "type": type(error).__name__,
        "message": error.summary,
        "advice": advice_of(error) or None,
        "status": error.status,
        "code": error.code,
        "request_id": error.request_id,
        "may_have_stopped": error.may_have_stopped,
    }


def _optional_fields(error: BctrlError | None) -> dict[str, object] | None:
    return None if error is None else error_fields(error)


def _encodable(name: str) -> str:
    """Replace the lone surrogates of an invalid name, which UTF-8 cannot encode."""
    return name.encode(errors="replace").decode()
