"""Adapt the request rate to throttling. Sans-IO: responses and clock readings drive it.

The rate is controlled like a TCP sender's, and each idea has its class. The first
attempts are paced; then nothing is computed until enough throttled responses show a
limit (`evidence.py`). The rate pauses and starts slowly, near what the
server accepted before (RFC 5681 section 3.1; `answers.py`). More throttling makes it
step down to a share of the delivered rate (multiplicative decrease, RFC 9438 section
4.6). From there it follows a cubic curve (section 4.2; botocore's adaptive mode does
the same; `curve.py`). Steps down that change nothing are undone (`baseline.py`).
"""

from __future__ import annotations

import math

from bctrl_async._limiter.answers import Answers
from bctrl_async._limiter.baseline import ThrottlingBaseline
from bctrl_async._limiter.bounds import BURST
from bctrl_async._limiter.curve import BETA, MIN_RATE, SLOWEST_START, Curve
from bctrl_async._limiter.evidence import Evidence, History

_START_RATE = 150.0
_START_GROWTH = 20.0
_START_SUCCESSES = 200
"""Attempts per second at first, how many more after each success, and the successes
that end the start. Only answers raise its rate, so a busy process starts slowly."""
_PAUSE = 0.5
"""Seconds of the pause after a limit is shown, if a Retry-After is not longer."""
_RECOVERY = 0.25
"""Seconds after a step down in which throttling causes no other step, and no attempt
that started before it does later (RFC 9002 section 7.3.2)."""
_REFUSED = 1.0
"""Seconds without a success, or two round trips if they are longer, after which the
rate starts anew (the retransmission timeout of RFC 6298 section 5)."""
_REFUSALS = 8
"""Calls that must have been throttled by then; fewer for a longer time, because a few
dead targets are throttled for as long."""
_SPAN = 1.0
"""Seconds over which the delivered rate is measured."""
_SLOW_START_SHARE = 1.3
"""A slow start's first rate, in proportion to the successes of the last _PAUSE."""
_GONE_RATIO = 10.0
"""A rate this many times the last known limit shows that the limit is gone."""


class AdaptiveRate:
    """A rate that adapts, on a monotonic clock.

    Throttling is about its target until enough different targets show a limit for all.
    """

    def __init__(self, evidence: Evidence | None = None) -> None:
        self.is_starting: bool = True
        """True until enough have succeeded, or the server has shown a limit."""
        self.retry_after_ends: float = -math.inf
        """The time until which the server has asked all calls to wait."""
        self.answers: Answers = Answers()
        self.has_limit: bool = False
        """True from the evidence of a limit of the server until the limit is gone."""
        self.all_throttled_since: float = math.inf
        """The time since which all responses were throttled, or inf."""
        self._refusals = 0
        """The calls that were throttled since the last success."""
        self._evidence = evidence or Evidence(is_of_all=True)
        self._curve = Curve()
        self._baseline = ThrottlingBaseline()
        self._pause_ends = -math.inf
        self._next_start = -math.inf
        self._limited_at = self._fades_from = -math.inf

    @classmethod
    def of_workspace(cls, answers: Answers) -> AdaptiveRate:
        """Make the rate of a workspace, given its answers; it limits nothing yet."""
        rate = cls(evidence=Evidence(is_of_all=False))
        rate.answers = answers
        rate.is_starting = False
        return rate

    @property
    def excess(self) -> float:
        """The throttled responses for which no successes have made up."""
        return self._evidence.excess

    @property
    def is_unlimited(self) -> bool:
        """True if attempts may start at any rate."""
        return not self.has_limit and not self.is_starting

    @property
    def refuses_first(self) -> bool:
        """True if no first attempt has succeeded since the limit was shown."""
        return self.has_limit and self.answers.unthrottled_at < self._limited_at

    def asks_to_wait(self, now: float) -> bool:
        """Return True until a Retry-After has passed."""
        return now < self.retry_after_ends

    def delay(self, now: float, *, is_held: bool = True) -> float:
        """Return the seconds until an attempt may start.

        A Retry-After holds only calls that are held.
        """
        start = self._next_start - BURST
        if is_held:
            start = max(start, self.retry_after_ends)
        return max(start - now, 0.0)

    def on_start(self, now: float) -> None:
        """Record the start of an attempt."""
        rate = self._current_rate(now)
        if rate < math.inf:
            self._next_start = max(self._next_start, now) + 1.0 / rate

    def on_success(self, now: float, history: History) -> None:
        """Record a response that was not throttled."""
        self.answers.add(now, history)
        self.all_throttled_since = math.inf
        self._refusals = 0
        if history.was_throttled:
            self.answers.recovered_at = now
        else:
            self.answers.unthrottled_at = now
            self._evidence.on_success(history.workspace)
        old_rate = self._baseline.on_success(now)
        if old_rate is not None:
            self._restore(old_rate, now)

    def on_throttled(
        self,
        now: float,
        retry_after: float | None,
        history: History,
        *,
        is_explained: bool = False,
    ) -> None:
        """Record a throttled response; `retry_after` is the API's, in seconds.

        `is_explained` is True if a limit of its workspace is the reason.
        """
        self.all_throttled_since = min(self.all_throttled_since, now)
        if not self.all_throttled_since <= history.throttled_at < math.inf:
            # It counts each call once, as a dead target is retried again and again.
            self._refusals += 1
        if is_explained:
            return
        if self._is_refused_throughout(now):
            self._fade(now)
        if self.answers.throttles_alone(history.throttled_at):
            # The response is about its target.
            if self._was_shown_by_dead_targets():
                self._lift_limit()
            return
        if history.was_throttled and not self._tells_of_limit(now, history):
            return
        if self._evidence.on_throttled(history.workspace):
            self._on_evidence(now, retry_after, history)

    def _on_evidence(
        self, now: float, retry_after: float | None, history: History
    ) -> None:
        self._baseline.on_throttled(now)
        wait = 0.0
        if self._evidence.shows_limit and retry_after is not None:
            # A Retry-After holds all once a limit is shown.
            wait = retry_after
        is_limited = self.has_limit or self._evidence.shows_limit
        if is_limited and not self._baseline.covers(now):
            self._slow_down(now, wait, history)

    def _tells_of_limit(self, now: float, history: History) -> bool:
        """Return True if a throttled retry counts as evidence of the limit.

        If no retry counted, a limit of few attempts a second would throttle many.
        """
        if self._curve.peak is None:
            # After an outage of 429s, all calls may be retries. While other calls are
            # answered, these tell enough.
            is_sampled = self.answers.unthrottled_at >= now - self._longest_silence
            return self.has_limit and not is_sampled
        has_recovered = self.answers.recovered_at >= history.throttled_at
        return self.has_limit and history.is_fair and has_recovered

    def _was_shown_by_dead_targets(self) -> bool:
        """Return True if a target that is throttled alone may have shown the limit."""
        has_recovered = self.answers.recovered_at >= self._limited_at
        return not has_recovered and self._evidence.excess < 1.0

    def _slow_down(self, now: float, wait: float, history: History) -> None:
        """Start slowly under a new limit, or step down; pause as the server asks."""
        pause_ends = now + wait
        last_event = self._curve.growth_start
        if wait:
            # Attempts in flight end within a Retry-After, so throttling right after it
            # is a new event. Without it, the pause belongs to the event.
            last_event = self._curve.stepped_at
        # An attempt that started before the last step down tells nothing of it.
        is_later = not self.has_limit or history.started_at > self._curve.stepped_at
        if is_later and now < self._pause_ends:
            # The attempt passed the Retry-After, which was not asked of it.
            return
        self.retry_after_ends = max(self.retry_after_ends, pause_ends)
        is_new_event = is_later and now >= last_event + _RECOVERY
        if not self.has_limit:
            self._start_slowly(now)
            pause_ends = max(pause_ends, now + _PAUSE)
            self._fades_from = pause_ends
            self._next_start = now + _PAUSE + BURST
        elif is_new_event and self._is_answered():
            self._step_down(now, wait)
        if pause_ends > max(now, self._pause_ends):
            self._pause_ends = self._curve.growth_start = pause_ends

    def _is_refused_throughout(self, now: float) -> bool:
        """Return True if attempts have succeeded under the limit, and none does now."""
        if not self.has_limit or not self._is_answered() or self.asks_to_wait(now):
            return False
        since = max(self.all_throttled_since, self._curve.stepped_at)
        share = min(self._refusals / _REFUSALS, 1.0)
        return share * (now - since) > self._longest_silence

    @property
    def _longest_silence(self) -> float:
        """The seconds for which a server that accepts attempts may accept none."""
        return max(_REFUSED, 2.0 * self.answers.round_trip)

    def _fade(self, now: float) -> None:
        """Let the rate fade, from 20 a second at most; start slowly with a success."""
        rate = min(self._current_rate(now), SLOWEST_START)
        self._start_slowly(now)
        self._curve.first_rate = rate
        self._fades_from = now

    def _is_answered(self) -> bool:
        """Return True if any attempt has succeeded since the limit was shown."""
        return self.answers.any_since(self._limited_at)

    def _start_slowly(self, now: float) -> None:
        self.has_limit = True
        self.is_starting = False
        self._limited_at = now
        # The first rate is computed after the pause.
        self._curve.start(now, self._pause_ends, 0.0, None)

    def _step_down(self, now: float, pause: float) -> None:
        curve = self._curve
        current = self._current_rate(now)
        # In less time than a recovery period, answers are too few to measure a rate.
        peak = self.answers.rate(
            now, min(_SPAN, max(now - curve.growth_start, _RECOVERY))
        )
        # However few the answers were, the peak is at least half of the rate.
        peak = max(peak, current / 2, self._baseline.plateau, MIN_RATE)
        old_rate = self._baseline.record_step(now, BETA * peak)
        if old_rate is not None:
            self._restore(old_rate, now)
            return
        curve.step_down(now, self._pause_ends, peak, pause)

    def _restore(self, rate: float, now: float) -> None:
        # A trial needs a constant rate. After it, a slow start finds out what the
        # server can do.
        peak = rate if self._baseline.is_trying else None
        self._curve.start(now, self._pause_ends, rate, peak)

    def _current_rate(self, now: float) -> float:
        """Return the rate at this time; lift the limit if it is gone."""
        if self.is_starting:
            successes = self.answers.count
            if successes < _START_SUCCESSES:
                return _START_RATE + _START_GROWTH * successes
            self.is_starting = False
        if not self.has_limit:
            return math.inf
        curve = self._curve
        peak = curve.peak
        if peak is None:
            self._set_first_rate()
            if not self._is_answered():
                return curve.fade(now, self._fades_from)
            peak = max(curve.first_rate, self.answers.rate(now, _SPAN))
        max_rate = _GONE_RATIO * peak
        rate = curve.rate(now, self.answers.round_trip)
        # Where all are refused, the limit is not gone, however fast they are sent.
        if rate < max_rate or self.all_throttled_since < math.inf:
            return min(rate, max_rate)
        return self._lift_limit()

    def _set_first_rate(self) -> None:
        """Let a slow start begin near what was accepted, once its pause is over."""
        if not self._curve.first_rate:
            # Those in flight were answered meanwhile.
            accepted = self.answers.count_since(self._limited_at - _PAUSE)
            self._curve.first_rate = max(_SLOW_START_SHARE * accepted, SLOWEST_START)

    def _lift_limit(self) -> float:
        """Lift the limit, with its pause; return the rate without it."""
        self.has_limit = False
        self.retry_after_ends = self._pause_ends = self._next_start = -math.inf
        return math.inf
