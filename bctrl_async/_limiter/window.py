"""Bounds on attempts in flight: the window of a server, the capacity of a machine."""

from __future__ import annotations

import math

_KEPT = 0.85
"""The share of the attempts in flight that a step down keeps."""
_BINDING_SECONDS = 5.0
"""Seconds for which a full window counts as the binding limit."""
_GROWTH_INTERVAL = 1.0
"""Seconds after which a capacity grows, if the machine has lacked nothing meanwhile."""


class Window:
    """A bound on attempts in flight: additive increase, multiplicative decrease."""

    def __init__(self) -> None:
        self._size = math.inf
        self._full_at = -math.inf

    def is_full(self, now: float, in_flight: int) -> bool:
        """Return True, and record the time, if no other attempt may start."""
        if in_flight < self._size:
            return False
        self._full_at = now
        return True

    def is_binding(self, now: float) -> bool:
        """Return True if the window, not the rate, has held attempts back lately."""
        return now < self._full_at + _BINDING_SECONDS

    def grow(self) -> None:
        """Grow by one attempt for each window of successes."""
        self._size += 1.0 / self._size

    def shrink(self, in_flight: int) -> None:
        """Shrink below what was in flight when the server throttled."""
        self._size = max(_KEPT * min(self._size, in_flight), 1.0)

    def open(self) -> None:
        """Bound nothing."""
        self._size = math.inf


class Capacity:
    """A bound on attempts in flight: what the machine has lacked has shown it.

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
