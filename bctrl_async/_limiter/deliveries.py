"""The deliveries: how fast the server has accepted attempts."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque

_MAX_SAMPLES = 1000
_SHORTEST = 0.25
"""Seconds below which samples show no rate."""


class Deliveries:
    """The last successes, which show the rate that the server accepts."""

    def __init__(self) -> None:
        self.times: deque[float] = deque(maxlen=_MAX_SAMPLES)
        self.burst: int = 0
        """The successes since shortly before the limit was shown, as measured."""
        self._workspaces: deque[str] = deque(maxlen=_MAX_SAMPLES)
        self._burst_seconds = 0.0

    def add(self, now: float, workspace: str) -> None:
        """Record a success."""
        self.times.append(now)
        self._workspaces.append(workspace)

    def of(self, workspace: str) -> Deliveries:
        """Return a copy of the record, for one workspace."""
        part = Deliveries()
        for time, name in zip(self.times, self._workspaces, strict=True):
            if name == workspace:
                part.add(time, name)
        return part

    def rate(self, now: float, span: float) -> float:
        """Return the successes per second in the last `span` seconds."""
        count = len(self.times) - bisect_left(self.times, now - span)
        if count == _MAX_SAMPLES:
            # The samples do not reach back to the start of the span.
            span = now - self.times[0]
        return count / span if span > 0.0 else 0.0

    def measure_burst(self, since: float, until: float) -> None:
        """Count the successes since a time; throttling started at `until`."""
        burst = [time for time in self.times if time >= since]
        self.burst = len(burst)
        self._burst_seconds = max(until - min(burst, default=math.inf), 0.0)

    def rate_beyond_burst(self, now: float, start: float) -> float:
        """Return the rate that the server can sustain, by the samples of a slow start.

        It is inf if these are too few.
        """
        # Before the first throttled response, and again after the pause, a token bucket
        # accepts its burst and its refill. Subtracting the earlier count from the later
        # removes the burst. The rate is the highest of all spans that end now.
        rate = 0.0
        for count, time in enumerate(reversed(self.times), 1):
            if time < start:
                break
            seconds = now - time - self._burst_seconds
            if seconds >= _SHORTEST:
                rate = max(rate, (count - self.burst) / seconds)
        if not rate:
            # There is no bound without samples.
            return math.inf
        return rate
