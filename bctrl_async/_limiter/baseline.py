"""Whether slowing down helps: the refusals that come at whatever pace, told from the others."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

_COMPARED = 3
"""Steps down on either side of the comparison."""
_SLOWER = 0.7
"""Only a rate that fell below this share of what it was can show that slowing down is in vain."""
_AS_MANY = 0.8
"""A share of refusals that is still above this part of what it was has not fallen."""
_MOST = 0.5
"""A server that refuses more than this is slowed down for in any case."""
_HOLD_MIN, _HOLD_MAX = 10.0, 60.0
"""Seconds until it is tried again whether slowing down helps: at first, and in the end."""
_DEVIATIONS = 4.0
"""By so many standard deviations may the refusals exceed what was found before."""
_CHUNK = 200


class _Step(NamedTuple):
    rate: float
    answers: int
    refusals: int


class RefusalBaseline:
    """The share of attempts that the server refuses however slowly they come.

    If several steps down have left the share of refusals where it was, the pace is not what the
    server objects to. Then refusals up to that share are no reason to slow down, for a while.
    """

    __slots__ = ("_answers", "_hold", "_refusals", "_share", "_steps", "_until")

    def __init__(self) -> None:
        self._answers = 0
        self._refusals = 0
        self._steps: deque[_Step] = deque(maxlen=2 * _COMPARED)
        self._share = 0.0
        self._until = -math.inf
        self._hold = _HOLD_MIN

    def on_success(self) -> None:
        """Note an answer that was no refusal."""
        self._answers += 1

    def on_throttled(self) -> None:
        """Note a refusal."""
        self._answers += 1
        self._refusals += 1

    def covers(self, now: float) -> bool:
        """Whether what was refused of late is no more than what is refused at any pace."""
        if now >= self._until:
            return False
        expected = self._share * self._answers
        spread = math.sqrt(expected * (1.0 - self._share))
        if self._refusals > expected + _DEVIATIONS * spread + 1.0:
            self._until = now
            return False
        if self._answers >= _CHUNK:
            self._answers = self._refusals = 0
        return True

    def record_step(self, now: float, rate: float) -> float | None:
        """Note that refusals lead to a step down from this rate.

        Returns:
            The rate to go back to, if the last steps have turned out to be in vain.
        """
        self._steps.append(_Step(rate, self._answers, self._refusals))
        self._answers = self._refusals = 0
        if len(self._steps) < 2 * _COMPARED:
            return None
        steps = list(self._steps)
        before, after = _share(steps[:_COMPARED]), _share(steps[_COMPARED:])
        if rate > _SLOWER * steps[0].rate or not _AS_MANY * before <= after <= _MOST:
            return None
        self._steps.clear()
        self._share = _share(steps)
        self._until = now + self._hold
        self._hold = min(2 * self._hold, _HOLD_MAX)
        return steps[0].rate


def _share(steps: list[_Step]) -> float:
    return sum(step.refusals for step in steps) / sum(step.answers for step in steps)
