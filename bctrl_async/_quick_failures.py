"""The switch that makes failures quick in tests, and the limits of such a test."""

from __future__ import annotations

from bctrl_async._kinds import Failure
from bctrl_async.errors import BctrlTimeoutError

is_on: bool = False
"""True while no call waits between its attempts; `testing.set_testing` sets it."""
TIME_LIMIT = 0.4
"""Seconds for one attempt; a bulk stop spends three limits on a runtime that hangs."""
ADVICE = "It is a limit of tests: set_testing(False) of bctrl_async.testing keeps yours"
POLL_DELAY = 0.1
"""Seconds between two polls of a runtime that runs: to take time is no failure."""
_TRIES = 10


def is_enough(tries: int) -> bool:
    """Return True if this is a test, where so many tries end a patience."""
    return is_on and tries >= _TRIES


def hangs(failure: Failure) -> bool:
    """Return True if an attempt had no answer in a test's time limit."""
    return is_on and failure.kind.raises is BctrlTimeoutError
