"""Detect throttling that does not depend on the request rate."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from typing import NamedTuple

import msgspec

_EVIDENCE = 12
"""The fewest throttled responses in each of the two groups that are compared."""
_SPAN = 3.0
"""The fewest seconds that the later group spans. While other clients adapt to a limit,
the throttled share changes within this time."""
_SLOWDOWN = 0.5
"""The rate must fall to this share of its old value to show that it is futile."""
_UNCHANGED = 2.0
"""A throttled share that differs by at most this factor is unchanged."""
_BURSTINESS = 0.75
"""The highest burstiness of random throttling; its mean is at most 0.58, its deviation
0.16."""
_PLATEAU = 0.45
"""The lowest peak after a step down, as a share of the rate before the comparison."""
_PLATEAU_SHARE = 0.125
"""Above this throttled share, the rate is not held at a plateau."""
_MAX_SHARE = 0.5
"""If the server throttles a larger share than this, slowing down is not futile."""
_ODDS = math.log(50.0)
"""A trial ends when one result is this much more likely than the other."""
_TRIAL_MAX = 60.0
"""Seconds after which a trial ends with the likelier result."""
_TRIALS_APART_MIN = 10.0
_TRIALS_APART_MAX = 60.0
"""Seconds between a failed trial and the next: at first, and at most after doubling."""
_HOLD_MIN = 20.0
_HOLD_MAX = 60.0
"""Seconds for which a baseline holds: at first, and at most after doubling."""
_DEVIATIONS = 3.0
"""Standard deviations by which throttling may exceed the baseline."""
_WINDOW = 1000
"""Responses of a hold after which they are counted from 0 again."""


class _Throttled(NamedTuple):
    """A throttled response: its time, the responses since the last, and the rate."""

    time: float
    distance: int
    rate: float


class _Phase(msgspec.Struct):
    """A period in which the throttled share is compared with an earlier share."""

    share: float
    end_time: float
    responses: int = 0
    throttled: int = 0


class _Trial(_Phase):
    """Wald's sequential probability ratio test: does the old rate double the share?"""

    @property
    def _odds(self) -> float:
        """The logarithm of the odds that the share has grown."""
        growth = (_UNCHANGED - 1.0) * self.share * self.responses
        return self.throttled * math.log(_UNCHANGED) - growth

    @property
    def has_grown(self) -> bool:
        """True if the share is more likely to have grown than not."""
        return self._odds > 0.0

    def covers(self, now: float) -> bool:
        """Return True until one result is much more likely, or the time is over."""
        return abs(self._odds) < _ODDS and now < self.end_time


class _Hold(_Phase):
    """A period in which throttling up to the share is no reason to slow down."""

    def covers(self, now: float) -> bool:
        """Return True if recent throttling is within the share."""
        if now >= self.end_time:
            return False
        mean = self.share * self.responses
        deviation = math.sqrt(mean * (1.0 - self.share))
        # More throttling than this points to a rate limit on top of the baseline.
        is_covered = self.throttled <= mean + _DEVIATIONS * deviation + 1.0
        if not is_covered or self.responses >= _WINDOW:
            self.responses = self.throttled = 0
        return is_covered


class ThrottlingBaseline:
    """The share of attempts that the server throttles at any request rate.

    If the rate is halved and the throttled share stays, the old rate is restored for a
    trial. If the share does not grow then, it becomes the baseline: for a while,
    throttling up to it is no reason to slow down. `docs/contributing/limiter.md` gives
    the reasons.
    """

    def __init__(self) -> None:
        self._successes = 0
        self._last_throttled = 0
        self._before: list[_Throttled] = []
        self._after: deque[_Throttled] = deque()
        self._rate_before = self._rate = 0.0
        self._phase: _Trial | _Hold | None = None
        self._next_trial = -math.inf
        self._apart = _TRIALS_APART_MIN
        self._hold_seconds = _HOLD_MIN

    def on_success(self, now: float) -> float | None:
        """Record a success; return the rate to restore if it ends a trial."""
        self._successes += 1
        phase = self._phase
        if phase is not None:
            phase.responses += 1
            # A trial must end here as well: without throttling, no step down ends it.
            if isinstance(phase, _Trial) and not phase.has_grown and not phase.covers(now):
                return self._pass_trial(phase, now)
        return None

    def on_throttled(self, now: float) -> None:
        """Record a throttled response."""
        if self._phase is not None:
            self._phase.responses += 1
            self._phase.throttled += 1
        distance = self._successes - self._last_throttled + 1
        self._last_throttled = self._successes
        if self.is_trying or not self._rate_before:
            # Throttling before the first step down comes from a burst or a slow start.
            return
        throttled = _Throttled(now, distance, self._rate)
        if len(self._before) < _EVIDENCE:
            self._before.append(throttled)
            return
        self._after.append(throttled)
        while len(self._after) > _EVIDENCE and self._after[1].time <= now - _SPAN:
            self._after.popleft()

    @property
    def is_trying(self) -> bool:
        """True during a trial, which needs a constant rate."""
        return isinstance(self._phase, _Trial)

    def covers(self, now: float) -> bool:
        """Return True if throttling is within the baseline, or a trial is undecided."""
        return self._phase is not None and self._phase.covers(now)

    @property
    def plateau(self) -> float:
        """The lowest peak after a step down, in attempts per second; 0 for no bound."""
        recent = [*self._before, *self._after][-_EVIDENCE:]
        if len(recent) < _EVIDENCE or _PLATEAU_SHARE * _mean_distance(recent) < 1.0:
            return 0.0
        return _PLATEAU * self._rate_before

    def record_step(self, now: float, rate: float) -> float | None:
        """Record a step down to a rate, or end a trial; return the rate to restore."""
        if isinstance(self._phase, _Trial):
            return self._end_trial(self._phase, now)
        self._rate = rate
        if not self._rate_before:
            self._rate_before = rate
        after = self._after
        if len(after) < _EVIDENCE or after[-1].time - after[0].time < _SPAN:
            return None
        distance_before = _mean_distance(self._before)
        distance_after = _mean_distance(after)
        if distance_before > _UNCHANGED * distance_after:
            self._compare_from(self._rate_before)
        elif distance_after > _UNCHANGED * distance_before:
            self._compare_from(after[0].rate)
        elif rate <= _SLOWDOWN * self._rate_before:
            if not _is_random(self._before, after):
                self._compare_from(after[0].rate)
            elif now >= self._next_trial:
                share = 2.0 / (distance_before + distance_after)
                self._phase = _Trial(share, now + _TRIAL_MAX)
                return self._rate_before
        return None

    def _compare_from(self, rate: float) -> None:
        """Start a new comparison, with the later group as its earlier group."""
        self._rate_before = rate
        self._before = list(self._after)
        self._after.clear()

    def _end_trial(self, trial: _Trial, now: float) -> float | None:
        if not trial.has_grown:
            return self._pass_trial(trial, now)
        self._begin_anew(None)
        self._next_trial = now + self._apart
        self._apart = min(2 * self._apart, _TRIALS_APART_MAX)
        return None

    def _pass_trial(self, trial: _Trial, now: float) -> float:
        groups = len(self._before) + len(self._after)
        share = (groups + trial.throttled) / (groups / trial.share + trial.responses)
        rate = self._rate_before
        self._begin_anew(_Hold(share, now + self._hold_seconds))
        self._hold_seconds = min(2 * self._hold_seconds, _HOLD_MAX)
        self._apart = _TRIALS_APART_MIN
        return rate

    def _begin_anew(self, phase: _Hold | None) -> None:
        self._phase = phase
        self._rate_before = 0.0
        self._before.clear()
        self._after.clear()


def _mean_distance(group: Collection[_Throttled]) -> float:
    return sum(response.distance for response in group) / len(group)


def _is_random(*groups: Collection[_Throttled]) -> bool:
    """Return True if these responses may have been throttled at random.

    The burstiness is the logarithm of the mean distance minus the mean logarithm
    (Moran's statistic) in each group, because a rate limit or chance may make the
    groups' shares differ.
    """
    if min(_mean_distance(group) for group in groups) < 1.0 / _MAX_SHARE:
        return False
    burstiness = 0.0
    for group in groups:
        mean = _mean_distance(group)
        burstiness -= sum(math.log(response.distance / mean) for response in group)
    return burstiness <= _BURSTINESS * sum(len(group) for group in groups)
