"""Adapt the request rate to throttling: sans-IO, driven by responses and clock readings.

Until the first 429 or 503 there is no limit and nothing is computed. Then the rate is controlled
like that of a TCP sender. After a pause, it begins a slow start from the rate that the server
accepted before (RFC 5681 section 3.1). Further throttling makes it step down to a share of the
delivered rate (multiplicative decrease, RFC 9438 section 4.6). From there it follows a cubic curve,
slow around the last peak and fast beyond it (section 4.2; botocore's adaptive mode does the same).
For servers that limit concurrency, a window of attempts in flight adapts by additive increase and
multiplicative decrease.

TCP takes each loss as a sign of congestion. A server may throttle a random share at any rate, so
steps down that change nothing are undone (`baseline.py`).
"""

from __future__ import annotations

import math
from collections import deque

from bctrl_async._limiter.baseline import RefusalBaseline, Restored

PROBE_INTERVAL = 60.0
"""The longest pause in seconds that is kept exactly. In a longer one, an attempt may start this
long after the server was last asked: a Retry-After may be wrong by years."""
_PAUSE = 0.5
"""Seconds of the pause after the first throttled response, if its Retry-After is not longer."""
_RECOVERY = 0.25
"""Seconds after a step down in which throttling causes no further one (RFC 9002 section 7.3.2)."""
_SPAN = 1.0
"""Seconds over which the delivered rate is measured."""
_BETA = 0.85
"""The share of the delivered rate that a step down keeps."""
_K_MIN, _K_MAX = 1.5, 8.0
"""Seconds in which the curve returns to its peak (K in RFC 9438): at first, and at most."""
_K_PAUSES, _K_PAUSED_MAX = 4.0, 60.0
"""While the peak stays, K is at least this many times the last Retry-After, the cost of the next
throttled response, but at most so many seconds for that reason."""
_SAME_PEAK = 0.25
"""Peaks that differ by at most this share belong to one stable limit."""
_GONE = 10.0
"""A rate this many times the last known limit shows that the limit is gone."""
_BURST = 0.02
"""Seconds' worth of attempts that may start at once, to make up for late timers."""
_SAME_PAUSE = 0.05
"""Seconds by which a pause that was reported by another process is longer if it is a new one."""
_NOTABLE = 0.5
"""Seconds by which such a pause is longer if it is worth a warning: bursts prolong it a little."""
_MIN_RATE = 0.5
"""The lowest rate, in attempts per second, however much the server throttles."""
_WINDOW_LIMITED = 5.0
"""Seconds for which a full window counts as the binding limit."""
_MAX_SAMPLES = 1000
_REPEATS, _OTHERS = 2, 10
"""A call that was throttled so often before, while so many responses in a row were not throttled,
says nothing about the rate."""


class AdaptiveRate:
    """A rate and a concurrency window that adapt to throttling.

    All times are seconds of one monotonic clock.

    Args:
        cap: The highest rate, in attempts per second; None for no cap.

    Attributes:
        is_probed: True from the start of a probe until the server answers an attempt.
        retry_after_ends: The time until which the server has asked to wait.
        is_throttled: True while throttling limits the rate.
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
        self._k = _K_MIN
        self._throttled_at = -math.inf
        self._stepped_at = -math.inf
        self._window = math.inf
        self._window_full_at = -math.inf
        self._is_paused = False
        self._paused_until = -math.inf
        self._asked_at = -math.inf
        self.is_probed: bool = False
        self.retry_after_ends: float = -math.inf
        self.is_throttled: bool = False

    @property
    def is_unlimited(self) -> bool:
        """True if attempts may start at any rate."""
        return not self.is_throttled and not self._is_paused and self._cap == math.inf

    def delay(self, now: float, in_flight: int) -> float:
        """Return the seconds until the next attempt may start; inf if one must end first."""
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

    def on_success(self, now: float) -> None:
        """Record a response that was not throttled; it ends a pause that was probed."""
        if self.is_probed:
            self._end_pause(now)
        self._deliveries.append(now)
        restored = self._baseline.on_success(now)
        if restored is not None:
            self._restore(restored, now)
        if self.is_throttled:
            self._window += 1.0 / self._window

    def on_throttled(
        self, now: float, retry_after: float | None, in_flight: int, repeats: int = 0
    ) -> None:
        """Record a throttled response: 429 or 503.

        Args:
            now: The current time.
            retry_after: Seconds that the server asks to wait; None if it does not say.
            in_flight: Attempts in flight, including this one.
            repeats: Earlier attempts of the same call that were throttled.
        """
        # Others succeed, so it is the call's own target that the server throttles.
        is_its_own = repeats >= _REPEATS and self._baseline.successes_in_a_row >= _OTHERS
        if not is_its_own:
            self._baseline.on_throttled(now)
        if self.is_probed and retry_after is not None:
            # The newer Retry-After replaces the older one.
            self._end_pause(now)
        self._asked_at, self.is_probed = now, False
        paused_until = now + (retry_after or 0.0)
        self.retry_after_ends = max(self.retry_after_ends, paused_until)
        # A Retry-After outlasts the attempts in flight: throttling right after it is a new event.
        last_event = self._epoch_start if retry_after is None else self._stepped_at
        is_new = now >= last_event + _RECOVERY
        covered = is_its_own or self._baseline.covers(now)
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

    def hold(self, now: float, seconds: float) -> bool:
        """Pause because a server has asked another process to stay away for so long.

        Return True if that is a pause of its own, which makes attempts wait for notably longer.
        """
        ends = now + seconds
        is_new = ends > max(self._paused_until, now) + _NOTABLE
        if ends > self._paused_until + _SAME_PAUSE:
            self._asked_at, self.is_probed = now, False
            self._pause(now, ends)
            self.retry_after_ends = ends
        return is_new

    def _pause(self, now: float, ends: float) -> None:
        """Pause until a time; the rate does not grow meanwhile."""
        self._is_paused = True
        self._epoch_start += ends - max(now, self._paused_until)
        # No burst after the pause: a server that allows none would throttle all of it.
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
        self.is_throttled = True
        self._peak = None
        self._begin_epoch(now, 0.0)
        self._throttled_at = now
        self._window = math.inf
        self._k = _K_MIN

    def _begin_epoch(self, now: float, rate: float) -> None:
        """Begin to grow from a rate, after the pause if there is one."""
        self._epoch_rate = rate
        self._epoch_start, self._stepped_at = max(now, self._paused_until), now

    def _step_down(self, now: float, in_flight: int, pause: float) -> None:
        current = self._current_rate(now)
        # Deliveries of less than a recovery period are too few to measure a rate.
        delivered = self._delivered_rate(now, min(_SPAN, max(now - self._epoch_start, _RECOVERY)))
        peak = delivered
        if self._peak is None and pause:
            peak = min(peak, self._rate_beyond_burst(now))
        peak = max(peak, current / 2, self._baseline.plateau, _MIN_RATE)
        restored = self._baseline.record_step(now, _BETA * peak)
        if restored is not None:
            self._restore(restored, now)
            return
        self._k = self._next_k(delivered, pause)
        self._peak = peak
        self._begin_epoch(now, _BETA * peak)
        self._window = max(_BETA * min(self._window, in_flight), 1.0)

    def _next_k(self, delivered: float, pause: float) -> float:
        """Return the seconds until the rate is probed beyond its peak again."""
        has_moved = self._peak is not None and (
            abs(delivered - self._peak) > _SAME_PEAK * self._peak
        )
        if has_moved:
            return _K_MIN
        k = _K_MIN if self._peak is None else min(self._k * 2, _K_MAX)
        return max(k, min(_K_PAUSES * pause, _K_PAUSED_MAX))

    def _restore(self, restored: Restored, now: float) -> None:
        # A trial needs a constant rate. After it, a slow start finds out what the server can do.
        self._peak = restored.rate if restored.is_trial else None
        self._begin_epoch(now, restored.rate)
        self._window = math.inf

    def _rate_beyond_burst(self, now: float) -> float:
        """Return the rate that the server can sustain, at the end of a slow start.

        After the pause, a token bucket is full again and hides for some time that the rate is too
        high. So deliveries over any span exceed the sustained rate by the burst at most, and over
        the span since the bucket was last full they do so by all of it.
        """
        rate = 0.0
        for count, time in enumerate(reversed(self._deliveries), 1):
            if time < self._epoch_start:
                break
            if now - time >= _RECOVERY:
                rate = max(rate, (count - self._burst) / (now - time))
        # Samples that do not reach so far back say nothing.
        return rate or math.inf

    def _delivered_rate(self, now: float, span: float) -> float:
        """Return the successes per second in the last `span` seconds."""
        count = 0
        for time in reversed(self._deliveries):
            if time < now - span:
                break
            count += 1
        if count == _MAX_SAMPLES:
            # The samples do not reach back to the beginning of the span.
            span = now - self._deliveries[0]
        return count / span if span > 0.0 else 0.0

    def _current_rate(self, now: float) -> float:
        """Return the rate at this time; lift the limit if it is gone."""
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
            # Computed after the pause, when the attempts then in flight have been answered.
            self._burst = sum(time >= self._throttled_at - _PAUSE for time in self._deliveries)
            closed = max(self._paused_until - self._throttled_at - _PAUSE, _PAUSE)
            self._epoch_rate = max(self._burst / closed, 2 * _MIN_RATE)
        rate: float = self._epoch_rate * 2.0 ** min(elapsed, 60.0)
        if rate < _GONE * self._epoch_rate or rate < _GONE * self._delivered_rate(now, _SPAN):
            return rate
        return self._lift_limit()

    def _lift_limit(self) -> float:
        self.is_throttled = False
        self._window = math.inf
        return math.inf
