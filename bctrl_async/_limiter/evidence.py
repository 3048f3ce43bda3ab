"""The evidence of a limit: the throttled responses that show it."""

from __future__ import annotations

import math
from typing import Protocol

import msgspec

_ENOUGH = 8.0
_DECAY = 0.5
"""Throttled responses that show a limit, and how many of them a success makes up for.
This CUSUM test tells a limit, which throttles more than a third, from throttling that
slowing down does not help: at random, or of some targets only."""
_MAX_FAIR = 2
"""Throttled responses of a call after which another is about its target."""


class Slots(Protocol):
    """A gate, as the calls that it admits see it."""

    def take_slot(self) -> None:
        """Take a slot, of a call that was admitted without."""

    def release(self) -> None:
        """Release a slot."""


class History(msgspec.Struct, kw_only=True, gc=False):
    """The earlier throttled responses of a call, and its place in the limiter."""

    workspace: str = ""
    throttled: int = 0
    throttled_at: float = math.inf
    """The time of the last throttled response; inf if there is none."""
    waits_since: float = math.inf
    """The time since which it has waited for a slot, or was throttled; or inf."""
    started_at: float = 0.0
    """The time at which its attempt got a slot; 0 if no rate bounded it."""
    lane: Slots | None = None
    """The lane of its workspace, while it has a slot there."""
    may_park: bool = False
    """True if it waits in a lane without a task, as stops of a bulk stop do."""

    def continue_from(self, history: History) -> None:
        """Take the place in the limiter of an earlier history, of the same call."""
        self.lane = history.lane
        self.waits_since = history.waits_since
        self.started_at = history.started_at

    def follow(self, history: History) -> None:
        """Follow an earlier call about the same target, so that no attempt is first."""
        self.throttled = history.throttled
        self.throttled_at = history.throttled_at

    def count_throttled(self) -> None:
        """Count a throttled response."""
        self.throttled += 1

    def wait_from(self, now: float) -> None:
        """Record the time of a throttled response, after which the call waits."""
        self.throttled_at = now
        self.waits_since = min(self.waits_since, now)

    @property
    def was_throttled(self) -> bool:
        """True if an attempt was throttled, so that a retry is no fair sample."""
        return self.throttled_at < math.inf

    @property
    def is_fair(self) -> bool:
        """True if the next response may tell of a limit, and not only of its target."""
        return self.throttled < _MAX_FAIR


class Evidence:
    """A CUSUM test: throttled responses, less those that successes make up for.

    A limit for all is shown by as many workspaces: each contributes one response.
    """

    def __init__(self, *, is_of_all: bool) -> None:
        self.excess: float = 0.0
        self._is_of_all = is_of_all
        self._contributions: dict[str, float] = {}

    @property
    def shows_limit(self) -> bool:
        """True if there are enough throttled responses."""
        return self.excess >= _ENOUGH

    def on_throttled(self, workspace: str) -> bool:
        """Count a throttled response; return False if it shows its workspace only."""
        if not self.excess:
            # Successes have made up for all, so each workspace may contribute again.
            self._contributions.clear()
        if self._is_of_all and workspace in self._contributions:
            return False
        self._contributions[workspace] = 1.0
        self.excess = min(self.excess + 1.0, _ENOUGH)
        return True

    def on_success(self, workspace: str) -> None:
        """Record the success of a call that was never throttled."""
        if not self.excess:
            return
        self.excess = max(self.excess - _DECAY, 0.0)
        contribution = self._contributions.pop(workspace, 0.0) - _DECAY
        if contribution > 0.0:
            self._contributions[workspace] = contribution
