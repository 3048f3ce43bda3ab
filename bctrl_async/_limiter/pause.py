"""The pause: no attempt starts in it, but for a probe a minute."""

from __future__ import annotations

import math

PROBE_INTERVAL = 60.0
"""The longest pause in seconds that is kept exactly. In a longer pause, a probe may
start this long after the last attempt, because a Retry-After may be wrong by years."""


class Pause:
    """A pause until `end_time`, which the answer to a probe may end before its time."""

    def __init__(self) -> None:
        self.is_on: bool = False
        """True from the start of a pause until an attempt starts after it."""
        self.end_time: float = -math.inf
        self.retry_after_ends: float = -math.inf
        """The time until which the server has asked all calls to wait."""
        self.asked_at: float = -math.inf
        """The time of the last probe or throttled response."""
        self.is_probed: bool = False
        """True from the start of a probe until the server answers an attempt."""

    def delay(self, now: float) -> float:
        """Return the seconds until the end, or until the next probe may start."""
        return max(min(self.end_time, self.asked_at + PROBE_INTERVAL) - now, 0.0)

    def on_probe(self, now: float) -> None:
        """Record the start of a probe."""
        self.asked_at = now
        self.is_probed = True

    def on_throttled(self, now: float) -> bool:
        """Record a throttled response; return True if it may answer a probe."""
        was_probed = self.is_probed
        self.is_probed = False
        self.asked_at = now
        return was_probed

    def start(self, end_time: float) -> None:
        """Pause until a time."""
        self.is_on = True
        self.end_time = end_time

    def end(self, now: float) -> float:
        """End the pause; return the seconds by which that is early."""
        self.is_probed = False
        seconds = max(self.end_time - now, 0.0)
        if seconds:
            self.end_time = self.retry_after_ends = now
        return seconds
