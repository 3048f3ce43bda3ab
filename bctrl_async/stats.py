"""What a session has done so far, in numbers."""

from __future__ import annotations

from collections import Counter

import msgspec

from bctrl_async.errors import THROTTLED, BctrlApiError, BctrlError

__all__ = ["SessionStats"]


class SessionStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a session had done when it was asked.

    An attempt is one request. Those begun are those that succeeded, failed, are in flight, or were
    cut off by cancellation.

    Args:
        attempts: Attempts begun.
        retries: Those of them that were not the first of their stop.
        succeeded: Those that the server answered with a runtime.
        failed: How many failed, by the HTTP status (`"429"`) that said no, or by the error
            (`"BctrlTimeoutError"`) where there was no usable answer.
        in_flight: Those under way.
        waiting: Stops that wait for their turn, or for their next attempt.
    """

    attempts: int
    retries: int
    succeeded: int
    failed: dict[str, int]
    in_flight: int
    waiting: int

    @property
    def throttled(self) -> int:
        """How many attempts the server refused with 429 or 503."""
        return sum(self.failed.get(str(int(status)), 0) for status in THROTTLED)


class Tally:
    """The counts behind the stats, kept by whoever makes the attempts."""

    __slots__ = ("attempts", "failed", "retries", "succeeded")

    def __init__(self) -> None:
        self.attempts: int = 0
        self.retries: int = 0
        self.succeeded: int = 0
        self.failed: Counter[str] = Counter()

    def record(self, error: BctrlError) -> None:
        """Count an attempt that failed."""
        said_no = isinstance(error, BctrlApiError) and error.status is not None
        self.failed[str(error.status) if said_no else type(error).__name__] += 1

    def stats(self, in_flight: int, waiting: int) -> SessionStats:
        """Return the counts as they are."""
        return SessionStats(
            attempts=self.attempts,
            retries=self.retries,
            succeeded=self.succeeded,
            failed=dict(self.failed),
            in_flight=in_flight,
            waiting=waiting,
        )
