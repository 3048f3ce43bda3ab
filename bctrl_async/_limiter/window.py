"""The window: how many attempts a server that limits concurrency may have in flight."""

from __future__ import annotations

import math

_KEPT = 0.85
"""The share of the attempts in flight that a step down keeps."""
_BINDING_SECONDS = 5.0
"""Seconds for which a full window counts as the binding limit."""


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
