"""The start: the first attempts of a session are paced."""

from __future__ import annotations

_RATE = 150.0
_GROWTH = 20.0
_SUCCESSES = 200
"""Attempts per second at first, how many more after each success, and the successes
that end it."""


class Start:
    """The paced start: only answers raise its rate, so a busy process starts slowly."""

    def __init__(self) -> None:
        self.is_over: bool = False
        """True once enough attempts have succeeded, or the server has shown a limit."""

    def rate(self, successes: int) -> float:
        """Return the attempts per second after this many successes."""
        return _RATE + _GROWTH * successes

    def end_after(self, successes: int) -> bool:
        """End the start if there were enough successes; return True if it is over."""
        if successes >= _SUCCESSES:
            self.is_over = True
        return self.is_over
