"""Counters of the attempts of a session."""

from __future__ import annotations

from collections import Counter

import msgspec

from bctrl_async.errors import THROTTLED

__all__ = ["SessionStats"]


class SessionStats(msgspec.Struct, kw_only=True):
    """A snapshot of the counters of a session.

    An attempt is one request. It succeeded, failed, was cancelled, or is in flight.

    Args:
        attempts: Attempts started.
        retries: Attempts that were not the first of their call.
        succeeded: Attempts answered with a success status and a valid body.
        failed: Failed attempts by HTTP status (`"429"`), or by error class
            (`"BctrlTimeoutError"`) if there was no usable answer.
        cancelled: Attempts whose call was cancelled, so that no answer was waited for.
        in_flight: Attempts in flight.
        waiting: Calls that wait for the session's limits or for their next attempt; one
            more for each bulk stop while its next poll is not due yet.
    """

    attempts: int = 0
    retries: int = 0
    succeeded: int = 0
    failed: dict[str, int] = msgspec.field(default_factory=Counter)
    cancelled: int = 0
    in_flight: int = 0
    waiting: int = 0

    @property
    def throttled(self) -> int:
        """The number of attempts that were answered with 429 or 503."""
        return sum(self.failed.get(str(int(status)), 0) for status in THROTTLED)
