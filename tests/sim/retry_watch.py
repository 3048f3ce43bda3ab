"""The moments at which throttled stops are due, and the client is free to send them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sim.exchange import Exchange, Target
from sim.records import BulkRun, Due
from sim.rules import REFUSED

if TYPE_CHECKING:
    from bctrl_async._limiter.limiter import Limiter
    from sim.loop import SimLoop
    from sim.plan import Plan

_HAZARDS = frozenset({"quota", "random", "limit", "quotas", "storm", "cut"})
_SLACK = 1.0
"""Seconds that a retry may take beyond its delay: a connection, and busy steps."""


class RetryWatch:
    """Records the moments by which a throttled stop of a run is to be sent again."""

    def __init__(
        self, plan: Plan, loop: SimLoop, run: BulkRun, limiter: Limiter
    ) -> None:
        self._plan = plan
        self._loop = loop
        self._run = run
        self._limiter = limiter
        # A slow reader holds up the workers that deliver to it.
        self._slack = _SLACK + plan.reader_delay * len(run.items)
        self._refusals: Counter[Target] = Counter()

        # With other hazards, a worker may wait for a connection or an answer. Only an
        # observer sees each outcome.
        is_watched = plan.observed and not plan.is_paced
        self._is_on = is_watched and not plan.climate.hazards - _HAZARDS

    def on_answer(self, exchange: Exchange) -> None:
        """Look at the client once the longest delay after a refusal has passed."""
        is_refusal = exchange.page and exchange.status in REFUSED
        if not (self._is_on and exchange.stops and is_refusal) or exchange.foreign:
            return
        self._refusals[exchange.target] += 1
        refusals = self._refusals[exchange.target]
        backoff = self._plan.policy.backoff(refusals, lambda _, longest: longest)
        delay = max(backoff, float(self._plan.climate.retry_after or 0.0))
        self._loop.call_later(delay, self._on_due, exchange)

    def _on_due(self, exchange: Exchange) -> None:
        if self._is_free():
            self._loop.call_later(self._slack, self._on_late, exchange)

    def _on_late(self, exchange: Exchange) -> None:
        # What holds up the client both times may have held it up between them.
        if self._is_free():
            due = Due(exchange.target, exchange.written, self._loop.time())
            self._run.due.append(due)

    def _is_free(self) -> bool:
        """Return True if neither a limit nor a lack of slots holds up a retry."""
        limiter = self._limiter
        is_held = limiter.is_throttled or limiter.retry_after > 0.0
        has_slot = limiter.in_use < self._plan.slot_count
        return self._run.ended_at is None and has_slot and not is_held
