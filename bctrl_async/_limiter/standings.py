"""The standings: how a limit for all holds each workspace, by its answers."""

from __future__ import annotations

import math
from enum import IntEnum

import msgspec

from bctrl_async._limiter.rate import AdaptiveRate

_PROOF = 4.0
_MAX_PROOF = 2.0
"""The proof that exempts a workspace, and the most that an answer adds to it: minus the
logarithm of how likely its answers are under a limit for all."""
_MAX_WORKSPACES = 1000
"""The number of workspaces above which the least recent is forgotten."""


class Standing(IntEnum):
    """The standing of a workspace: how a limit for all holds it."""

    HELD = 0
    """Its last response was throttled, or there is no reason to tell it from others.
    Only these wait for a Retry-After."""
    UNKNOWN = 1
    """It was not asked yet."""
    ANSWERED = 2
    """Its last response was not throttled."""
    EXEMPT = 3
    """No limit for all holds it: it was answered while others were throttled."""


class _Record(msgspec.Struct):
    """The proof of a workspace, and the responses of all until its last response."""

    responses: int = 0
    throttled: int = 0
    proof: float = 0.0
    standing: Standing = Standing.HELD


class Standings:
    """The standing of each workspace under the limit for all.

    A limit for all throttles everybody alike. So an answer proves the more, the more of
    the others were throttled since the last response of its workspace (a sequential
    test, like Wald's).
    """

    def __init__(self, rate: AdaptiveRate) -> None:
        self.exempt_answered_at: float = -math.inf
        """The time of the last success in a workspace that is exempt."""
        self._rate = rate
        self._responses = 0
        self._throttled = 0
        self._records: dict[str, _Record] = {}
        """By the time of the last response."""

    def of(self, workspace: str, now: float) -> Standing:
        """Return the standing by which a workspace queues."""
        standing = self._recorded(workspace)
        rate = self._rate
        is_told_apart = rate.refuses_first or rate.asks_to_wait(now)
        if is_told_apart or standing is Standing.EXEMPT:
            return standing
        return Standing.HELD

    def exempts(self, workspace: str) -> bool:
        """Return True if the limit does not hold a workspace."""
        return self._recorded(workspace) is Standing.EXEMPT

    def _recorded(self, workspace: str) -> Standing:
        if not self._rate.has_limit:
            return Standing.HELD
        record = self._records.get(workspace)
        return Standing.UNKNOWN if record is None else record.standing

    def on_success(self, workspace: str, now: float, *, is_first: bool) -> None:
        """Record a success, of a call that was never throttled or of another."""
        if is_first:
            self._add_proof(workspace)
        if self.exempts(workspace):
            self.exempt_answered_at = now

    def _add_proof(self, workspace: str) -> None:
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
        self._record(workspace, 0.0, Standing.HELD)

    def _record(self, workspace: str, proof: float, standing: Standing) -> None:
        self._records.pop(workspace, None)
        record = _Record(self._responses, self._throttled, proof, standing)
        self._records[workspace] = record
        if len(self._records) > _MAX_WORKSPACES:
            del self._records[next(iter(self._records))]
