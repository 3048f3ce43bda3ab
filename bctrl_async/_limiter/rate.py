"""Adapt the request rate to throttling: sans-IO, driven by responses and clock readings.

The rate is controlled like a TCP sender's. The first attempts are paced, and each success raises
their rate, until enough have succeeded: then there is no limit and nothing is computed. Once
several attempts are throttled among few successes, the rate pauses and starts slowly, near what the
server accepted before (RFC 5681 section 3.1). More throttling makes it step down to a share of the
delivered rate (multiplicative decrease, RFC 9438 section 4.6). From there it follows a cubic curve,
slow around the last peak and fast beyond it (section 4.2; botocore's adaptive mode does the same).
For servers that limit concurrency, a window of attempts in flight adapts by additive increase and
multiplicative decrease. Steps down that change nothing are undone (`baseline.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque

from bctrl_async._limiter.baseline import RefusalBaseline

PROBE_INTERVAL = 60.0
"""The longest pause in seconds that is kept exactly. In a longer pause, a probe may start this long
after the last attempt, because a Retry-After may be wrong by years."""
_START_RATE, _START_GROWTH, _START_SUCCESSES = 150.0, 40.0, 200
"""The start: attempts per second at first, how many more after each success, and the number of
successes that ends it. Only answers raise the rate, so a process short of CPU starts slowly."""
_ENOUGH, _DECAY = 3.0, 0.18
"""Throttled responses that show a limit, and how many of them a success makes up for. This CUSUM
test tells a limit, which throttles a third, from a server that throttles a twentieth at random."""
_PAUSE = 0.5
"""Seconds of the pause after the first throttled response, if its Retry-After is not longer."""
_RECOVERY = 0.25
"""Seconds after a step down in which throttling causes no other step (RFC 9002 section 7.3.2)."""
_SPAN = 1.0
"""Seconds over which the delivered rate is measured."""
_BETA = 0.85
"""The share of the delivered rate that a step down keeps."""
_CUBIC = 0.0875
"""The constant C of RFC 9438, in attempts per second to the fourth power. A rate of 200 is back at
its peak after 7 s, and a lower rate sooner, so that many clients on one limit get equal shares."""
_K_MIN, _K_FIRST, _K_MAX = 1.5, 3.0, 8.0
"""Seconds in which the curve returns to its peak (K in RFC 9438): at least, at most on the first
curve, and at most on later curves."""
_K_PAUSES, _K_PAUSED_MAX = 4.0, 60.0
"""K lasts at least this many Retry-Afters, because the next throttled response costs another pause;
the second value is the most seconds to which this rule raises K."""
_GONE = 10.0
"""A rate this many times the last known limit shows that the limit is gone."""
_BURST = 0.02
"""Seconds' worth of attempts that may start at once, to make up for late timers."""
_SLOW_START_MIN, _SLOW_START_SHARE = 20.0, 1.3
"""A slow start's first rate: at least, and in proportion to the successes of the last _PAUSE."""
_DOUBLING = 0.7
"""Seconds in which a slow start doubles the rate."""
_MIN_RATE = 0.5
"""The lowest rate, in attempts per second, however much the server throttles."""
_WINDOW_LIMITED = 5.0
"""Seconds for which a full window counts as the binding limit."""
_MAX_SAMPLES = 1000


class AdaptiveRate:
    """A rate (at most `cap` a second) and a window that adapt; times are of a monotonic clock.

    `last` is the time of a call's last throttled response; inf if there is none.
    """

    def __init__(self, cap: float | None = None) -> None:
        self._cap = math.inf if cap is None else cap
        self._deliveries: deque[float] = deque(maxlen=_MAX_SAMPLES)
        self._baseline = RefusalBaseline()
        self._next_start = -math.inf
        self._epoch_rate = 0.0
        self._epoch_start = -math.inf
        self._peak: float | None = None
        self._burst = 0
        self._burst_seconds = 0.0
        self._evidence = 0.0
        self._k = _K_MIN
        self._throttled_at = self._stepped_at = -math.inf
        self._window = math.inf
        self._window_full_at = -math.inf
        self._is_paused = False
        self._paused_until = -math.inf
        self._asked_at = -math.inf
        self._answered_at = self._recovered_at = -math.inf
        self.refused_since: float = math.inf
        """The time since which all responses were throttled; inf if the last was not."""
        self.is_starting: bool = True
        """True until enough attempts have succeeded, or the server has shown a limit."""
        self.is_probed: bool = False
        """True from the start of a probe until the server answers an attempt."""
        self.retry_after_ends: float = -math.inf
        """The time until which the server has asked to wait."""
        self.is_throttled: bool = False
        """True while throttling limits the rate."""

    @property
    def is_unlimited(self) -> bool:
        """True if attempts may start at any rate."""
        return not (
            self.is_throttled or self.is_starting or self._is_paused or self._cap < math.inf
        )

    def delay(self, now: float, in_flight: int) -> float:
        """Return the seconds until the next attempt may start; inf while the window is full."""
        if now < self._paused_until:
            return max(min(self._paused_until, self._asked_at + PROBE_INTERVAL) - now, 0.0)
        if in_flight >= self._window:
            self._window_full_at = now
            return math.inf
        return max(self._next_start - _BURST - now, 0.0)

    def on_start(self, now: float) -> None:
        """Record the start of an attempt. In a pause, it is a probe."""
        if now < self._paused_until:
            self._asked_at, self.is_probed = now, True
            return
        self._is_paused = False
        rate = min(self._current_rate(now), self._cap)
        if rate < math.inf:
            self._next_start = max(self._next_start, now) + 1.0 / rate

    def on_success(self, now: float, last: float = math.inf) -> None:
        """Record a response that was not throttled; it ends a pause that was probed."""
        if self.is_probed:
            self._end_pause(now)
        self._deliveries.append(now)
        self._answered_at = now
        self.refused_since = math.inf
        if last < math.inf:
            self._recovered_at = now
        else:
            self._evidence = max(self._evidence - _DECAY, 0.0)
        restored = self._baseline.on_success(now)
        if restored is not None:
            self._restore(restored, now)
        if self.is_throttled:
            self._window += 1.0 / self._window

    def answers_others(self, since: float) -> bool:
        """Return True if other calls were answered since a time, and few are throttled."""
        return self._evidence < 1.0 and self._answered_at >= since

    def throttles_alone(self, last: float) -> bool:
        """Return True if only this call's target has been throttled since `last`."""
        # A retry that succeeds shows that load was the reason, and not the target.
        return self.answers_others(last) and self._recovered_at <= last

    def on_throttled(
        self, now: float, retry_after: float | None, in_flight: int, last: float = math.inf
    ) -> None:
        """Record a throttled response."""
        self.refused_since = min(self.refused_since, now)
        is_alone = self.throttles_alone(last)
        if not is_alone:
            self._baseline.on_throttled(now)
            self._evidence = min(self._evidence + 1.0, _ENOUGH)
        elif self._recovered_at < self._throttled_at:
            # The limit comes from dead targets: no throttled call has succeeded under it.
            self._lift_limit()
        if self.is_probed and retry_after is not None:
            # The newer Retry-After replaces the older.
            self._end_pause(now)
        self._asked_at, self.is_probed = now, False
        paused_until = now + (retry_after or 0.0)
        self.retry_after_ends = max(self.retry_after_ends, paused_until)
        # Attempts in flight end within a Retry-After, so throttling right after it is a new event.
        last_event = self._epoch_start if retry_after is None else self._stepped_at
        is_new = now >= last_event + _RECOVERY
        covered = is_alone or self._baseline.covers(now)
        if not covered and not self.is_throttled and retry_after is None:
            covered = self._evidence < _ENOUGH
        if not covered and (
            not self.is_throttled or (is_new and math.isinf(self._current_rate(now)))
        ):
            self._begin_slow_start(now)
            paused_until = max(paused_until, now + _PAUSE)
        elif not covered and is_new:
            self._step_down(now, in_flight, retry_after or 0.0)
        if paused_until > max(now, self._paused_until):
            self._pause(now, paused_until)
            if not covered:
                self._epoch_start = paused_until

    def _pause(self, now: float, ends: float) -> None:
        """Pause until a time; the rate does not grow meanwhile."""
        self._is_paused = True
        self._epoch_start += ends - max(now, self._paused_until)
        # The pause ends without a burst: a server that allows none would throttle all of it.
        self._paused_until, self._next_start = ends, ends + _BURST

    def _end_pause(self, now: float) -> None:
        """End the pause before its time, after an answer to a probe."""
        self.is_probed = False
        if now < self._paused_until:
            self._epoch_start -= self._paused_until - now
            self._paused_until = self.retry_after_ends = now
            # The probe counts towards the cap.
            self._next_start = max(now, self._asked_at + 1.0 / self._cap) + _BURST

    def _begin_slow_start(self, now: float) -> None:
        self.is_throttled, self.is_starting = True, False
        self._peak = None
        self._begin_epoch(now, 0.0)
        self._throttled_at = now

    def _begin_epoch(self, now: float, rate: float) -> None:
        """Start to grow from a rate, after a pause if there is any."""
        self._epoch_rate = rate
        self._epoch_start, self._stepped_at = max(now, self._paused_until), now

    def _step_down(self, now: float, in_flight: int, pause: float) -> None:
        current = self._current_rate(now)
        # In less time than a recovery period, deliveries are too few to measure a rate.
        delivered = self._delivered_rate(now, min(_SPAN, max(now - self._epoch_start, _RECOVERY)))
        peak = delivered
        if self._peak is None:
            peak = min(peak, self._rate_beyond_burst(now))
        peak = max(peak, current / 2, self._baseline.plateau, _MIN_RATE)
        restored = self._baseline.record_step(now, _BETA * peak)
        if restored is not None:
            self._restore(restored, now)
            return
        self._k = self._next_k(peak, pause)
        self._peak = peak
        self._begin_epoch(now, _BETA * peak)
        self._window = max(_BETA * min(self._window, in_flight), 1.0)

    def _next_k(self, peak: float, pause: float) -> float:
        """Return K, the seconds until the rate is back at its peak."""
        k = max(math.cbrt((1.0 - _BETA) * peak / _CUBIC), _K_MIN)
        k = min(k, _K_FIRST if self._peak is None else _K_MAX)
        return max(k, min(_K_PAUSES * pause, _K_PAUSED_MAX))

    def _restore(self, rate: float, now: float) -> None:
        # A trial needs a constant rate. After it, a slow start finds out what the server can do.
        self._peak = rate if self._baseline.is_trying else None
        self._begin_epoch(now, rate)
        self._window = math.inf

    def _rate_beyond_burst(self, now: float) -> float:
        """Return the rate that the server can sustain, at the end of a slow start."""
        # Before the first throttled response, and again after the pause, a token bucket accepts its
        # burst and its refill. Subtracting the earlier count from the later removes the burst.
        rate = 0.0
        for count, time in enumerate(reversed(self._deliveries), 1):
            if time < self._epoch_start:
                break
            seconds = now - time - self._burst_seconds
            if seconds >= _RECOVERY:
                rate = max(rate, (count - self._burst) / seconds)
        # Samples that span less than a recovery period show no rate.
        return rate or math.inf

    def _delivered_rate(self, now: float, span: float) -> float:
        """Return the successes per second in the last `span` seconds."""
        count = len(self._deliveries) - bisect_left(self._deliveries, now - span)
        if count == _MAX_SAMPLES:
            # The samples do not reach back to the start of the span.
            span = now - self._deliveries[0]
        return count / span if span > 0.0 else 0.0

    def _current_rate(self, now: float) -> float:
        """Return the rate at this time; lift the limit if it is gone."""
        if self.is_starting:
            if len(self._deliveries) < _START_SUCCESSES:
                return _START_RATE + _START_GROWTH * len(self._deliveries)
            self.is_starting = False
        if not self.is_throttled:
            return math.inf
        elapsed = max(now - self._epoch_start, 0.0)
        if self._peak is None:
            return self._slow_start_rate(now, elapsed)
        rate = self._peak + (self._peak - self._epoch_rate) * (elapsed / self._k - 1.0) ** 3
        if rate < _GONE * self._peak:
            return rate
        # While the window is the binding limit, a high rate proves nothing.
        window_limited = now < self._window_full_at + _WINDOW_LIMITED
        return _GONE * self._peak if window_limited else self._lift_limit()

    def _slow_start_rate(self, now: float, elapsed: float) -> float:
        if not self._epoch_rate:
            # The rate is computed after the pause, when attempts in flight have been answered.
            since = self._throttled_at - _PAUSE
            burst = [time for time in self._deliveries if time >= since]
            self._burst = len(burst)
            self._burst_seconds = max(self._throttled_at - min(burst, default=math.inf), 0.0)
            self._epoch_rate = max(_SLOW_START_SHARE * self._burst, _SLOW_START_MIN)
        rate: float = self._epoch_rate * 2.0 ** min(elapsed / _DOUBLING, 60.0)
        if rate < _GONE * self._epoch_rate or rate < _GONE * self._delivered_rate(now, _SPAN):
            return rate
        return self._lift_limit()

    def _lift_limit(self) -> float:
        self.is_throttled = False
        self._window = math.inf
        return math.inf
