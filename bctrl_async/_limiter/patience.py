"""The patience of waiters: how long they wait while the server accepts no attempt."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable

from bctrl_async._limiter.queues import Waiter
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async._limiter.standings import Standing
from bctrl_async.errors import BctrlRateLimitError, format_duration

TIMER_TOLERANCE = 0.01
"""Seconds by which a timer may be early, or late before another takes its place."""
_INTERVAL = 0.25
"""The fewest seconds between two looks at the patience of all waiters."""


def find_error(
    waiter: Waiter, rate: AdaptiveRate, now: float, calls: str
) -> BctrlRateLimitError | None:
    """Return the error of a waiter if no attempt may succeed in its patience."""
    if waiter.standing is Standing.EXEMPT:
        return None
    if waiter.patience and now >= _deadline(waiter, rate) - TIMER_TOLERANCE:
        span = format_duration(waiter.patience)
        return BctrlRateLimitError(f"the server throttled {calls} for {span}")
    wait = rate.retry_after_ends - now
    if wait <= waiter.patience or waiter.standing is not Standing.HELD:
        return None
    return BctrlRateLimitError(
        f"not sent: rate limited for another {wait:.0f} s (Retry-After)",
        retry_after=wait,
    )


def _deadline(waiter: Waiter, rate: AdaptiveRate) -> float:
    """Return when the patience of a waiter ends if all is throttled until then."""
    since = max(waiter.history.waits_since, rate.all_throttled_since)
    return since + waiter.patience


class PatienceTimer:
    """A timer for the earliest end of a patience among the waiters of a gate.

    They share it: a timer for each would take most of the memory of a waiter.
    """

    def __init__(self, on_end: Callable[[float], None]) -> None:
        self._on_end = on_end
        self._timer: asyncio.Handle | None = None
        self._ends_at = math.inf
        self._ended_at = -math.inf

    def watch(self, waiters: Iterable[Waiter], rate: AdaptiveRate) -> None:
        """Call `on_end` when the first patience ends, if all is throttled by then."""
        if rate.all_throttled_since == math.inf:
            return
        deadlines = [
            _deadline(waiter, rate)
            for waiter in waiters
            # A call without patience still waits for its first attempt.
            if waiter.patience and not waiter.admitted.done()
        ]
        ends_at = max(min(deadlines, default=math.inf), self._ended_at + _INTERVAL)
        if ends_at >= self._ends_at:
            return
        self.cancel()
        self._ends_at = ends_at
        self._timer = asyncio.get_running_loop().call_at(ends_at, self._on_timer)

    def _on_timer(self) -> None:
        self._ends_at = math.inf
        self._ended_at = asyncio.get_running_loop().time()
        self._on_end(self._ended_at)

    def cancel(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
