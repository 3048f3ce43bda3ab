"""Detect throttling that does not depend on the request rate."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

_STEPS = 3
"""Steps down in each of the two groups that are compared."""
_MIN_SLOWDOWN = 0.7
"""The rate must fall below this share of its old value to show that slowing down is futile."""
_UNCHANGED = 0.8
"""A throttled share above this part of its old value has not fallen."""
_MAX_SHARE = 0.5
"""If the server throttles a larger share than this, slowing down is never called futile."""
_HOLD_MIN, _HOLD_MAX = 10.0, 60.0
"""Seconds for which a baseline holds: at first, and at most after doubling."""
_DEVIATIONS = 4.0
"""Standard deviations by which throttling may exceed the baseline."""
_WINDOW = 200
"""Responses after which counting starts again."""


class _Step(NamedTuple):
    rate: float
    responses: int
    throttled: int


class RefusalBaseline:
    """The share of attempts that the server throttles at any request rate.

    If several steps down leave the throttled share unchanged, the rate is not its cause. For a
    while, throttling up to that share is then no reason to slow down.
    """

    def __init__(self) -> None:
        self._responses = 0
        self._throttled = 0
        self._steps: deque[_Step] = deque(maxlen=2 * _STEPS)
        self._share = 0.0
        self._expires = -math.inf
        self._hold = _HOLD_MIN

    def on_success(self) -> None:
        """Record a response that was not throttled."""
        self._responses += 1

    def on_throttled(self) -> None:
        """Record a throttled response."""
        self._responses += 1
        self._throttled += 1

    def covers(self, now: float) -> bool:
        """Return True if recent throttling is within the baseline."""
        if now >= self._expires:
            return False
        expected = self._share * self._responses
        deviation = math.sqrt(expected * (1.0 - self._share))
        if self._throttled > expected + _DEVIATIONS * deviation + 1.0:
            self._expires = now
            return False
        if self._responses >= _WINDOW:
            self._responses = self._throttled = 0
        return True

    def record_step(self, now: float, rate: float) -> float | None:
        """Record that throttling leads to a step down from this rate.

        Returns:
            The rate to restore if the last steps turn out to be futile, else None.
        """
        self._steps.append(_Step(rate, self._responses, self._throttled))
        self._responses = self._throttled = 0
        if len(self._steps) < 2 * _STEPS:
            return None
        steps = list(self._steps)
        before, after = _throttled_share(steps[:_STEPS]), _throttled_share(steps[_STEPS:])
        if rate > _MIN_SLOWDOWN * steps[0].rate or not _UNCHANGED * before <= after <= _MAX_SHARE:
            return None
        self._steps.clear()
        self._share = _throttled_share(steps)
        self._expires = now + self._hold
        self._hold = min(2 * self._hold, _HOLD_MAX)
        return steps[0].rate


def _throttled_share(steps: list[_Step]) -> float:
    return sum(step.throttled for step in steps) / sum(step.responses for step in steps)
