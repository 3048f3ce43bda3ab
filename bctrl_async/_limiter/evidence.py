"""The evidence of a limit: the responses that show it, and whom it does not hold."""

from __future__ import annotations

import math
from collections.abc import Collection
from enum import IntEnum

import msgspec

_ENOUGH = 8.0
_DECAY = 0.5
"""Throttled responses that show a limit, and how many of them a success makes up for.
This CUSUM test tells a limit, which throttles more than a third, from throttling that
slowing down does not help: at random, or of some targets only."""
_PROOF = 4.0
_MAX_PROOF = 2.0
"""The proof that exempts a workspace, and the most that an answer adds to it: minus the
logarithm of how likely its answers are under a limit for all."""
_MAX_WORKSPACES = 1000
"""The number of workspaces above which the least recent is forgotten."""
_MAX_FAIR = 2
"""Throttled responses of a call after which another is about its target."""


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
    has_lane_slot: bool = False
    """True while it has a slot of the lane of its workspace."""
    may_park: bool = False
    """True if it waits in a lane without a task, as stops of a bulk stop do."""

    def continue_from(self, history: History) -> None:
        """Take the place in the limiter of an earlier history, of the same call."""
        self.has_lane_slot = history.has_lane_slot
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


class Standing(IntEnum):
    """Whether the limit for all may hold a workspace, by what it was answered."""

    UNKNOWN = 0
    """It was not asked yet, or there is no limit."""
    THROTTLED = 1
    """Its last response was throttled."""
    ANSWERED = 2
    """Its last response was not throttled."""
    EXEMPT = 3
    """The limit does not hold it: it was answered while others were throttled."""


class _Record(msgspec.Struct):
    """What a workspace has proved, and the responses of all by its last one."""

    responses: int = 0
    throttled: int = 0
    proof: float = 0.0
    standing: Standing = Standing.UNKNOWN


class Standings:
    """The standing of each workspace, under a limit for all.

    A limit for all throttles everybody alike. So an answer proves the more, the more of
    the others were throttled since the last response of its workspace (a sequential
    test, like Wald's).
    """

    def __init__(self) -> None:
        self._responses = 0
        self._throttled = 0
        self._records: dict[str, _Record] = {}
        """By the time of the last response."""

    @property
    def workspaces(self) -> Collection[str]:
        """The workspaces whose standing is known."""
        return self._records.keys()

    def of(self, workspace: str) -> Standing:
        """Return the standing of a workspace."""
        record = self._records.get(workspace)
        return Standing.UNKNOWN if record is None else record.standing

    def on_success(self, workspace: str) -> None:
        """Record the success of a call that was never throttled."""
        record = self._records.get(workspace, _Record())
        self._responses += 1
        throttled = self._throttled - record.throttled
        share = throttled / (self._responses - record.responses)
        proof = record.proof + min(-math.log1p(-share), _MAX_PROOF)
        standing = Standing.EXEMPT if proof >= _PROOF else Standing.ANSWERED
        self._record(workspace, proof, standing)

    def on_throttled(self, workspace: str, *, is_first: bool) -> None:
        """Record a throttled response, of a first attempt or of a later one."""
        self._responses += is_first
        self._throttled += is_first
        self._record(workspace, 0.0, Standing.THROTTLED)

    def _record(self, workspace: str, proof: float, standing: Standing) -> None:
        self._records.pop(workspace, None)
        record = _Record(self._responses, self._throttled, proof, standing)
        self._records[workspace] = record
        if len(self._records) > _MAX_WORKSPACES:
            del self._records[next(iter(self._records))]
