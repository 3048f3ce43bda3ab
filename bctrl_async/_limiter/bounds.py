"""The bounds that are not the server's: of the caller, and of the machine."""

from __future__ import annotations

import logging
import math

from bctrl_async._kinds import Failure

# The command shows the warnings of this logger.
_log = logging.getLogger("bctrl_async.capacity")

_GROWTH_INTERVAL = 1.0
"""Seconds after which a capacity grows, if the machine has lacked nothing meanwhile."""
BURST = 0.02
"""Seconds' worth of attempts that may start at once, to make up for late timers."""


class FixedRate:
    """The rate that the caller gave: at most so many attempts a second."""

    def __init__(self, rate: float) -> None:
        self._interval = 1.0 / rate
        self._next_start = -math.inf

    def delay(self, now: float) -> float:
        """Return the seconds until an attempt may start."""
        return max(self._next_start - BURST - now, 0.0)

    def on_start(self, now: float) -> None:
        """Record the start of an attempt."""
        self._next_start = max(self._next_start, now) + self._interval


class Capacity:
    """The connections of the machine: a bound that comes down if it lacks something.

    It grows by one attempt, then by twice as many each time, until the machine lacks
    something again. So a full machine makes one failed attempt a second.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._size = most
        self._step = 1
        self._changed_at = -math.inf

    def lower(self, now: float, size: int) -> float:
        """Record that the machine can hold no more than this; return the bound."""
        self._size = size
        self._step = 1
        self._changed_at = now
        return self._size

    def grow(self, now: float) -> float:
        """Grow, if the interval has passed; return the bound."""
        if now >= self._changed_at + _GROWTH_INTERVAL:
            self._size = min(self._size + self._step, self._most)
            self._step *= 2
            self._changed_at = now
        return self._size

    def warn(self, failure: Failure, size: int) -> None:
        """Log why attempts wait, and the cure."""
        _log.warning(
            "%s. Fewer attempts are in flight for now (%d, not %d). %s",
            failure.summary,
            size,
            self._most,
            failure.advice,
            extra={"bctrl.event": "machine_full", "bctrl.in_flight": size},
        )
