"""The answers: when the server has accepted attempts, of whom, and how late."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque

from bctrl_async._limiter.evidence import History

_MAX_SAMPLES = 1000
_SMOOTHING = 0.125
"""The weight of a new round trip (alpha in RFC 6298 section 2)."""


class Answers:
    """The last successes, which show the rate that the server accepts.

    The successes of calls that were never throttled are a fair sample of the targets;
    those of throttled calls are not, since targets that are throttled again and again
    have more retries.
    """

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_MAX_SAMPLES)
        self._workspaces: deque[str] = deque(maxlen=_MAX_SAMPLES)
        self.round_trip: float = 0.0
        """Seconds from a slot to its answer, smoothed; 0 until a rate bounds them."""
        self.unthrottled_at: float = -math.inf
        """The time of the last success of a call that was never throttled."""
        self.recovered_at: float = -math.inf
        """The time of the last success of a call that was throttled."""

    def add(self, now: float, history: History) -> None:
        """Record when a success came, of whom, and how late."""
        self._times.append(now)
        self._workspaces.append(history.workspace)
        if history.started_at:
            seconds = now - history.started_at
            self.round_trip += _SMOOTHING * (seconds - self.round_trip)

    def of(self, workspace: str) -> Answers:
        """Return a copy of the samples, for one workspace."""
        part = Answers()
        part.round_trip = self.round_trip
        for time, name in zip(self._times, self._workspaces, strict=True):
            if name == workspace:
                part._times.append(time)
                part._workspaces.append(name)
        return part

    @property
    def count(self) -> int:
        """The number of samples, of which there are a thousand at most."""
        return len(self._times)

    def count_since(self, time: float) -> int:
        """Return the number of samples since a time."""
        return len(self._times) - bisect_left(self._times, time)

    def rate(self, now: float, span: float) -> float:
        """Return the successes per second in the last `span` seconds."""
        count = self.count_since(now - span)
        if count == _MAX_SAMPLES:
            # The samples do not reach back to the start of the span.
            span = now - self._times[0]
        return count / span if span > 0.0 else 0.0

    def any_since(self, time: float) -> bool:
        """Return True if any attempt has succeeded since a time."""
        return max(self.unthrottled_at, self.recovered_at) >= time

    def throttles_alone(
        self, throttled_at: float, exempt_at: float = -math.inf
    ) -> bool:
        """Return True if only this target has been throttled since `throttled_at`.

        `exempt_at` is the time of the last success in a workspace that is exempt.
        """
        # Others succeeded at once since then. The success of a retry would show that
        # load was the reason, and not the target.
        answered_at = max(self.unthrottled_at, exempt_at)
        return answered_at >= throttled_at >= self.recovered_at
