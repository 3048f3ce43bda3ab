"""Detect throttling that does not depend on the request rate."""

from __future__ import annotations

import math
from collections import deque

_EVIDENCE = 12
"""Throttled responses in each of the two groups that are compared."""
_SLOWDOWN = 0.5
"""The rate must fall to this share of its old value to show that slowing down is futile."""
_UNCHANGED = 2.0
"""A throttled share that differs by at most this factor is unchanged."""
_SCATTER = 1.3
"""The distances between throttled responses may vary this many times as much as by chance."""
_PLATEAU = 0.125
"""While the groups are compared, the peak of the rate stays at this share of its old value."""
_PLATEAU_SHARE = 0.125
"""If the server throttles a larger share than this, there is no such plateau."""
_MAX_SHARE = 0.5
"""If the server throttles a larger share than this, slowing down is never called futile."""
_HOLD_MIN, _HOLD_MAX = 10.0, 60.0
"""Seconds for which a baseline holds: at first, and at most after doubling."""
_DEVIATIONS = 4.0
"""Standard deviations by which throttling may exceed the baseline."""
_WINDOW = 200
"""Responses after which counting starts again."""


class RefusalBaseline:
    """The share of attempts that the server throttles at any request rate.

    If the rate is halved and the throttled share does not change, the rate is not its cause. For a
    while, throttling up to that share is then no reason to slow down.

    A client with a small part of the load cannot change the share either. But the load of others
    throttles in bursts with long distances between them, and not at random.

    A group of throttled responses takes long to collect at a low rate, and a comparison may decline
    by bad luck. So until it is decided, the rate does not fall below a plateau.
    """

    def __init__(self) -> None:
        self._successes = 0
        self._throttled = 0
        self._last_throttled = 0
        self._before: list[int] = []
        self._after: deque[int] = deque(maxlen=_EVIDENCE)
        self._rates_after: deque[float] = deque(maxlen=_EVIDENCE)
        self._rate_before = self._rate = 0.0
        self._window_start = (0, 0)
        self._share = 0.0
        self._expires = -math.inf
        self._hold = _HOLD_MIN

    def on_success(self) -> None:
        """Record a response that was not throttled."""
        self._successes += 1

    def on_throttled(self) -> None:
        """Record a throttled response."""
        self._throttled += 1
        distance = self._successes - self._last_throttled + 1
        self._last_throttled = self._successes
        if len(self._before) < _EVIDENCE:
            self._before.append(distance)
        else:
            self._after.append(distance)
            self._rates_after.append(self._rate)

    @property
    def successes_in_a_row(self) -> int:
        """The number of responses since the last one that was throttled."""
        return self._successes - self._last_throttled

    def covers(self, now: float) -> bool:
        """Return True if recent throttling is within the baseline."""
        if now >= self._expires:
            return False
        successes, throttled = self._window_start
        throttled = self._throttled - throttled
        responses = self._successes - successes + throttled
        expected = self._share * responses
        deviation = math.sqrt(expected * (1.0 - self._share))
        if throttled > expected + _DEVIATIONS * deviation + 1.0:
            # There is a rate limit as well.
            self._window_start = self._successes, self._throttled
            return False
        if responses >= _WINDOW:
            self._window_start = self._successes, self._throttled
        return True

    @property
    def plateau(self) -> float:
        """The peak that a step down has to leave for the comparison, in attempts per second."""
        recent = [*self._before, *self._after][-_EVIDENCE:]
        if len(recent) < _EVIDENCE or _PLATEAU_SHARE * sum(recent) < _EVIDENCE:
            return 0.0
        return _PLATEAU * self._rate_before

    def record_step(self, now: float, rate: float) -> float | None:
        """Record that throttling leads to a step down from this rate.

        Returns:
            The rate to restore if the last steps turn out to be futile, else None.
        """
        self._rate = rate
        self._rate_before = self._rate_before or rate
        if len(self._after) < _EVIDENCE:
            return None
        before, after = sum(self._before) / _EVIDENCE, sum(self._after) / _EVIDENCE
        if before > _UNCHANGED * after:
            self._compare_from(self._rate_before)
        elif after > _UNCHANGED * before:
            self._compare_from(self._rates_after[0])
        elif rate <= _SLOWDOWN * self._rate_before:
            if self._is_random(before, after):
                return self._begin(now, 2.0 / (before + after))
            self._compare_from(self._rates_after[0])
        return None

    def _compare_from(self, rate: float) -> None:
        """Begin a new comparison with the later group."""
        self._rate_before = rate
        self._before = list(self._after)
        self._after.clear()
        self._rates_after.clear()

    def _is_random(self, before: float, after: float) -> bool:
        """Return True if chance may throttle these shares of the responses."""
        if _MAX_SHARE * min(before, after) < 1.0:
            return False
        # Relative to the mean of each group: the shares may differ, by the rate limit or by luck.
        relative = [distance / before for distance in self._before]
        relative += [distance / after for distance in self._after]
        variance = sum((distance - 1.0) ** 2 for distance in relative) / (len(relative) - 2)
        # Chance gives a geometric distribution.
        return variance <= _SCATTER * (1.0 - 2.0 / (before + after))

    def _begin(self, now: float, share: float) -> float:
        """Begin a baseline; return the rate before the steps down."""
        rate, self._rate_before = self._rate_before, 0.0
        self._before.clear()
        self._after.clear()
        self._rates_after.clear()
        self._share = share
        self._window_start = self._successes, self._throttled
        self._expires = now + self._hold
        self._hold = min(2 * self._hold, _HOLD_MAX)
        return rate
