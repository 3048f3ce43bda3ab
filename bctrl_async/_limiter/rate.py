"""How fast attempts may start: decisions from answers and a clock's readings, without I/O.

Until the server first says 429 or 503 there is no limit and nothing is computed. Then the rate is
learned like a TCP sender's: a pause, a slow start from what the server took before (RFC 5681
section 3.1), and with each further refusal a step down to just below what was delivered, from
where the rate grows along a cubic curve, slowly around the last peak and fast beyond it (RFC 9438
section 4.1; botocore's adaptive mode does the same). The number of attempts in flight follows by
additive increase and multiplicative decrease, for servers that limit that.

TCP takes every loss for a sign of its own pace. A server may refuse a share at random, however
slowly it is asked; steps down that change nothing are taken back (`_baseline.py`).
"""

from __future__ import annotations

import math
from collections import deque

from bctrl_async._limiter.baseline import RefusalBaseline

_PAUSE = 0.5
"""Seconds that the first refusal closes the limiter for, if the server does not say how long."""
_EPOCH = 0.25
"""Seconds after a step down in which further refusals are news of the time before it."""
_SPAN = 1.0
"""Seconds over which the rate that the server delivers is measured."""
_BACK_TO = 0.85
"""What a step down leaves of the delivered rate."""
_RETURN_MIN, _RETURN_MAX = 1.5, 8.0
"""Seconds until the curve is back at its peak: at first, and while the limit proves steady."""
_STEADY = 0.25
"""Two peaks that differ by no more than this share are the same limit."""
_FORGOTTEN = 10.0
"""A rate this many times the last known limit shows that the limit is gone."""
_BURST = 0.02
"""Seconds' worth of attempts that may start at once, so that a late timer costs nothing."""
_SLOWEST = 0.5
"""Attempts a second that are tried however much the server refuses."""
_BINDS = 5.0
"""Seconds for which a wait for others to end shows that their number is the limit."""
_REMEMBERED = 1000


class AdaptiveRate:
    """The rate and the number in flight that the server seems to bear.

    All times are seconds of one monotonic clock.

    Args:
        cap: Attempts a second that are never exceeded; None is no such limit.
    """

    __slots__ = (
        "_accepted",
        "_base",
        "_baseline",
        "_bound_at",
        "_cap",
        "_due",
        "_learned",
        "_peak",
        "_refused_at",
        "_return_time",
        "_since",
        "_stepped_at",
        "_window",
        "closed_until",
    )

    def __init__(self, cap: float | None = None) -> None:
        self._cap = math.inf if cap is None else cap
        self._accepted: deque[float] = deque(maxlen=_REMEMBERED)
        self._baseline = RefusalBaseline()
        self._due = -math.inf
        self._learned = False
        self._base = 0.0
        self._peak: float | None = None
        self._refused_at = -math.inf
        self._return_time = _RETURN_MIN
        self._since = -math.inf
        self._stepped_at = -math.inf
        self._window = math.inf
        self._bound_at = -math.inf
        self.closed_until: float = -math.inf

    @property
    def unlimited(self) -> bool:
        """Whether attempts may start at any rate."""
        return not self._learned and self._cap == math.inf

    @property
    def is_throttled(self) -> bool:
        """Whether the server's refusals set the pace."""
        return self._learned

    def wait(self, now: float, in_flight: int) -> float:
        """Return the seconds until another attempt may start; inf: not before one has ended."""
        if now < self.closed_until:
            return self.closed_until - now
        if in_flight >= self._window:
            self._bound_at = now
            return math.inf
        return max(self._due - _BURST - now, 0.0)

    def on_start(self, now: float) -> None:
        """Note that an attempt starts."""
        rate = min(self._rate(now), self._cap)
        if rate < math.inf:
            self._due = max(self._due, now) + 1.0 / rate

    def on_success(self, now: float) -> None:
        """Note that the server answered an attempt and did not refuse it."""
        self._accepted.append(now)
        self._baseline.on_success()
        if self._learned:
            self._window += 1.0 / self._window

    def on_throttled(self, now: float, retry_after: float | None, in_flight: int) -> None:
        """Note that the server refused an attempt: 429 or 503.

        Args:
            now: The time.
            retry_after: The seconds that it asks to wait, if it does.
            in_flight: Attempts in flight, this one among them.
        """
        self._baseline.on_throttled()
        closes = now + (retry_after or 0.0)
        covered = self._baseline.covers(now)
        if covered:
            pass
        elif not self._learned:
            self._start_slowly(now)
            closes = max(closes, now + _PAUSE)
        # Who is refused right after a Retry-After has ended was not sent before it.
        elif now >= (self._since if retry_after is None else self._stepped_at) + _EPOCH:
            self._step_down(now, in_flight)
        if closes > max(now, self.closed_until):
            # Without a burst, which would send everybody away again if the server bears none.
            self.closed_until, self._due = closes, closes + _BURST
            if not covered:
                self._since = closes

    def _start_slowly(self, now: float) -> None:
        self._learned = True
        self._peak = None
        self._base = 0.0
        self._refused_at = self._stepped_at = now
        self._window = math.inf
        self._return_time = _RETURN_MIN

    def _step_down(self, now: float, in_flight: int) -> None:
        rate_before = self._baseline.record_step(now, self._rate(now))
        if rate_before is not None:
            self._start_again_from(rate_before, now)
            return
        # What was answered in less than an epoch is too little to judge by.
        delivered = self._delivered(now, min(_SPAN, max(now - self._since, _EPOCH)))
        peak = max(delivered, self._rate(now) / 2, _SLOWEST)
        if self._peak is not None and abs(delivered - self._peak) <= _STEADY * self._peak:
            self._return_time = min(self._return_time * 2, _RETURN_MAX)
        else:
            self._return_time = _RETURN_MIN
        self._peak, self._base = peak, _BACK_TO * peak
        self._since = self._stepped_at = now
        self._window = max(_BACK_TO * min(self._window, in_flight), 1.0)

    def _start_again_from(self, rate: float, now: float) -> None:
        self._peak, self._base = None, rate
        self._since = self._stepped_at = now
        self._window = math.inf

    def _delivered(self, now: float, span: float) -> float:
        """Return how many attempts a second were accepted in the last `span` seconds."""
        count = 0
        for time in reversed(self._accepted):
            if time < now - span:
                break
            count += 1
        if count == _REMEMBERED:
            # The span reaches further back than the memory does.
            span = now - self._accepted[0]
        return count / span if span > 0.0 else 0.0

    def _rate(self, now: float) -> float:
        """Return the rate that has been learned, or forget that there was a limit."""
        if not self._learned:
            return math.inf
        grown = max(now - self._since, 0.0)
        if self._peak is None:
            return self._slow_start(now, grown)
        rate = self._peak + (self._peak - self._base) * (grown / self._return_time - 1.0) ** 3
        if rate < _FORGOTTEN * self._peak:
            return rate
        # While it is the number in flight that holds attempts back, a high rate shows nothing.
        window_binds = now < self._bound_at + _BINDS
        return _FORGOTTEN * self._peak if window_binds else self._forget()

    def _slow_start(self, now: float, grown: float) -> float:
        if not self._base:
            # Only now, when what was in flight has been answered, is it known what was taken.
            taken = sum(time >= self._refused_at - _PAUSE for time in self._accepted)
            closed = max(self.closed_until - self._refused_at, _PAUSE)
            self._base = max(taken / closed, 2 * _SLOWEST)
        rate: float = self._base * 2.0 ** min(grown, 60.0)
        if rate < _FORGOTTEN * self._base or rate < _FORGOTTEN * self._delivered(now, _SPAN):
            return rate
        return self._forget()

    def _forget(self) -> float:
        self._learned = False
        self._window = math.inf
        return math.inf
