"""Detect throttling that does not depend on the request rate."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from typing import NamedTuple

import msgspec

_GROUP_MIN = 12
"""The fewest throttled responses in each of the two groups that are compared."""
_SPAN_MIN = 3.0
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
_LOG_ODDS = math.log(50.0)
"""A trial ends when one result is this much more likely than the other."""
_TRIAL_MAX = 60.0
"""Seconds after which a trial ends with the likelier result."""
_TRIAL_INTERVAL_MIN = 10.0
_TRIAL_INTERVAL_MAX = 60.0
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
    """The earlier share."""
    end_time: float
    responses: int = 0
    throttled: int = 0


class _Trial(_Phase):
    """Wald's sequential probability ratio test: does the old rate double the share?"""

    @property
    def _log_odds(self) -> float:
        """The logarithm of the odds that the share has grown."""
        # The count of throttled responses is taken to be Poisson distributed.
        growth = (_UNCHANGED - 1.0) * self.share * self.responses
        return self.throttled * math.log(_UNCHANGED) - growth

    @property
    def has_grown(self) -> bool:
        """True if the share is more likely to have grown than not."""
        return self._log_odds > 0.0

    def covers(self, now: float) -> bool:
        """Return True until one result is much more likely, or the time is over."""
        return abs(self._log_odds) < _LOG_ODDS and now < self.end_time


class _Hold(_Phase):
    """A period in which throttling up to the share is no reason to slow down."""

    def covers(self, now: float) -> bool:
        """Return True if throttling since the last count anew is within the share."""
        if now >= self.end_time:
            return False
        mean = self.share * self.responses
        deviation = math.sqrt(mean * (1.0 - self.share))
        # More throttling than this points to a rate limit on top of the baseline. The
        # 1 is for the first response, which would exceed a mean near 0.
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
        self._successes_at_throttled = 0
        self._earlier: list[_Throttled] = []
        self._later: deque[_Throttled] = deque()
        self._old_rate = 0.0
        """The rate that a trial restores; 0 before the first step down."""
        self._rate = 0.0
        self._phase: _Trial | _Hold | None = None
        self._next_trial = -math.inf
        self._trial_interval = _TRIAL_INTERVAL_MIN
        self._hold_seconds = _HOLD_MIN

    def on_success(self, now: float) -> float | None:
        """Record a success; return the rate to restore if it ends a trial."""
        self._successes += 1
        phase = self._phase
        if phase is not None:
            phase.responses += 1
            # A trial must end here as well: without throttling, no step down ends it.
            if (
                isinstance(phase, _Trial)
                and not phase.has_grown
                and not phase.covers(now)
            ):
                return self._pass_trial(phase, now)
        return None

    def on_throttled(self, now: float) -> None:
        """Record a throttled response."""
        if self._phase is not None:
            self._phase.responses += 1
            self._phase.throttled += 1
        distance = self._successes - self._successes_at_throttled + 1
        self._successes_at_throttled = self._successes
        if self.is_trying or not self._old_rate:
            # A trial has its own counts. Throttling before the first step down comes
            # from a burst or a slow start.
            return
        throttled = _Throttled(now, distance, self._rate)
        if len(self._earlier) < _GROUP_MIN:
            self._earlier.append(throttled)
            return
        self._later.append(throttled)
        # The later group is as recent as its least size and its least span allow.
        while len(self._later) > _GROUP_MIN and self._later[1].time <= now - _SPAN_MIN:
            self._later.popleft()

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
        recent = [*self._earlier, *self._later][-_GROUP_MIN:]
        if len(recent) < _GROUP_MIN or _share(recent) > _PLATEAU_SHARE:
            return 0.0
        return _PLATEAU * self._old_rate

    def record_step(self, now: float, rate: float) -> float | None:
        """Record a step down to a rate, or end a trial; return the rate to restore."""
        if isinstance(self._phase, _Trial):
            return self._end_trial(self._phase, now)
        self._rate = rate
        if not self._old_rate:
            self._old_rate = rate
        later = self._later
        if len(later) < _GROUP_MIN or later[-1].time - later[0].time < _SPAN_MIN:
            return None
        earlier_share = _share(self._earlier)
        later_share = _share(later)
        if later_share > _UNCHANGED * earlier_share:
            # A lower rate cannot be the cause of growth, so the old rate is kept.
            self._compare_from(self._old_rate)
        elif earlier_share > _UNCHANGED * later_share:
            # Slowing down helps.
            self._compare_from(later[0].rate)
        elif rate <= _SLOWDOWN * self._old_rate:
            # Slowing down has changed nothing.
            if not _is_random(self._earlier, later):
                # Bursts, or a large share, come from a limit: slowing down goes on.
                self._compare_from(later[0].rate)
            elif now >= self._next_trial:
                # The mean is the share of groups of one size, taken together.
                harmonic_mean = 2.0 / (1.0 / earlier_share + 1.0 / later_share)
                self._phase = _Trial(harmonic_mean, now + _TRIAL_MAX)
                return self._old_rate
        return None

    def _compare_from(self, rate: float) -> None:
        """Start a new comparison, with the later group as its earlier group."""
        self._old_rate = rate
        self._earlier = list(self._later)
        self._later.clear()

    def _end_trial(self, trial: _Trial, now: float) -> float | None:
        if not trial.has_grown:
            return self._pass_trial(trial, now)
        self._restart(None)
        self._next_trial = now + self._trial_interval
        self._trial_interval = min(2 * self._trial_interval, _TRIAL_INTERVAL_MAX)
        return None

    def _pass_trial(self, trial: _Trial, now: float) -> float:
        # The share is measured in the two groups and the trial together.
        throttled = len(self._earlier) + len(self._later)
        responses = throttled / trial.share
        share = (throttled + trial.throttled) / (responses + trial.responses)
        rate = self._old_rate
        self._restart(_Hold(share, now + self._hold_seconds))
        self._hold_seconds = min(2 * self._hold_seconds, _HOLD_MAX)
        self._trial_interval = _TRIAL_INTERVAL_MIN
        return rate

    def _restart(self, phase: _Hold | None) -> None:
        self._phase = phase
        self._old_rate = 0.0
        self._earlier.clear()
        self._later.clear()


def _share(group: Collection[_Throttled]) -> float:
    return len(group) / sum(response.distance for response in group)


def _is_random(*groups: Collection[_Throttled]) -> bool:
    """Return True if these responses may have been throttled at random.

    The burstiness is the logarithm of the mean distance (1 / share) minus the mean
    logarithm (Moran's statistic) in each group, because a rate limit or chance may make
    the groups' shares differ.
    """
    if max(_share(group) for group in groups) > _MAX_SHARE:
        return False
    burstiness = 0.0
    for group in groups:
        share = _share(group)
        burstiness -= sum(math.log(response.distance * share) for response in group)
    return burstiness <= _BURSTINESS * sum(len(group) for group in groups)
