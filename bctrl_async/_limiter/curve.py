"""The curve: the rate under a limit, from one step down to the next."""

from __future__ import annotations

import math

BETA = 0.85
"""The share of the delivered rate that a step down keeps."""
SLOWEST_START = 20.0
"""The lowest rate of a slow start, in attempts per second."""
MIN_RATE = 0.5
"""The lowest rate, in attempts per second, however much the server throttles."""
_CUBIC = 0.0875
"""The constant C of RFC 9438, in attempts per second to the fourth power. A rate of 200
is back at its peak after 7 s, and a lower rate sooner, so that many clients on one
limit get equal shares."""
_K_MIN = 1.5
_K_FIRST = 3.0
_K_MAX = 8.0
"""Seconds in which the curve returns to its peak (K in RFC 9438): at least, at most on
the first curve, and at most on later curves."""
_K_ROUND_TRIPS = 4.0
"""K lasts at least this many round trips, as an answer tells of an earlier rate."""
_K_PAUSES = 4.0
_K_PAUSED_MAX = 60.0
"""K lasts at least this many Retry-Afters, because the next throttled response costs
another pause; the second value is the most seconds to which this rule raises K."""
_DOUBLING = 0.7
"""Seconds in which a slow start doubles the rate, unless a round trip is longer."""
_FADING = 2.0
"""Seconds in which a slow start halves the rate as long as nothing succeeds."""


class Curve:
    """The curve of CUBIC (RFC 9438): slow around the last peak, and fast beyond it.

    Before the first step down it is a slow start: then `peak` is None. At the time
    `growth_start` the rate starts to grow from `first_rate`.
    """

    def __init__(self) -> None:
        self.peak: float | None = None
        self.first_rate: float = 0.0
        self.growth_start: float = -math.inf
        self.stepped_at: float = -math.inf
        self._k = _K_MIN

    def start(
        self, now: float, growth_start: float, rate: float, peak: float | None
    ) -> None:
        """Grow from a rate, at once or after a pause."""
        self.peak = peak
        self.first_rate = rate
        self.growth_start = max(now, growth_start)
        self.stepped_at = now

    def step_down(
        self, now: float, growth_start: float, peak: float, pause: float
    ) -> None:
        """Grow from below a peak, and be back at it after K seconds."""
        k = max(math.cbrt((1.0 - BETA) * peak / _CUBIC), _K_MIN)
        k_max = _K_FIRST if self.peak is None else _K_MAX
        k = min(k, k_max)
        self._k = max(k, min(_K_PAUSES * pause, _K_PAUSED_MAX))
        self.start(now, growth_start, BETA * peak, peak)

    def rate(self, now: float, round_trip: float) -> float:
        """Return the rate at this time, which grows no faster than answers come."""
        elapsed = max(now - self.growth_start, 0.0)
        if self.peak is None:
            # `exp2` overflows after a long time without attempts.
            doublings = min(elapsed / max(_DOUBLING, round_trip), 60.0)
            return self.first_rate * math.exp2(doublings)
        k = max(self._k, _K_ROUND_TRIPS * round_trip)
        return self.peak + (self.peak - self.first_rate) * (elapsed / k - 1.0) ** 3

    def fade(self, now: float, since: float) -> float:
        """Return the rate while nothing succeeds: it fades, and does not step down."""
        # The start moves along, so that the growth starts with the first success.
        self.growth_start = max(self.growth_start, now)
        halvings = max(now - since, 0.0) / _FADING
        rate = min(self.first_rate, SLOWEST_START)
        return max(rate * math.exp2(-halvings), MIN_RATE)
