"""Counters of the attempts of a session."""

from __future__ import annotations

from collections import Counter

import msgspec
from msgspec.structs import asdict

from bctrl_async.errors import THROTTLED, BctrlApiError, BctrlError

__all__ = ["SessionStats"]


class SessionStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the counters of a session.

    An attempt is one request. Each attempt has succeeded, failed, been cancelled, or is in flight.

    Args:
        attempts: Attempts started.
        retries: Attempts that were not the first of their call.
        succeeded: Attempts answered with a success status and a valid body.
        failed: Failed attempts by HTTP status (`"429"`), or by error class
            (`"BctrlTimeoutError"`) if there was no usable answer.
        cancelled: Attempts whose call was cancelled, so that no answer was waited for.
        in_flight: Attempts in flight.
        waiting: Calls that wait for a slot or for their next attempt.
    """

    attempts: int
    retries: int
    succeeded: int
    failed: dict[str, int]
    cancelled: int
    in_flight: int
    waiting: int

    @property
    def throttled(self) -> int:
        """The number of attempts that were answered with 429 or 503."""
        return sum(self.failed.get(str(int(status)), 0) for status in THROTTLED)


class Tally(msgspec.Struct):
    """The counters behind `SessionStats`, updated by the sender."""

    attempts: int = 0
    retries: int = 0
    succeeded: int = 0
    failed: Counter[str] = msgspec.field(default_factory=Counter)
    cancelled: int = 0

    def record(self, error: BctrlError) -> None:
        """Count a failed attempt."""
        has_status = isinstance(error, BctrlApiError) and error.status is not None
        self.failed[str(error.status) if has_status else type(error).__name__] += 1

    def stats(self, in_flight: int, waiting: int) -> SessionStats:
        """Return a snapshot."""
        counters = asdict(self) | {"failed": dict(self.failed)}
        return SessionStats(**counters, in_flight=in_flight, waiting=waiting)
