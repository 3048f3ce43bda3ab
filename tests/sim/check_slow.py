"""The rules of stops that take time: their ends are seen soon, with few lists."""

from __future__ import annotations

from collections import Counter

from bctrl_async import StopResult
from sim.exchange import Exchange
from sim.plan import Ending, Plan
from sim.records import BulkRun
from sim.rules import Problem, Problems, name
from sim.world import World

_SEEN_WITHIN = 15.0
"""Seconds after which the end of a runtime is seen, even where its lists fail."""


def check_slow(world: World, run: BulkRun) -> Problems:
    """Check that each stop is confirmed soon after its runtime has ended."""
    plan = world.plan
    hazards = plan.climate.hazards
    if "slow" not in hazards or hazards - {"slow", "cut"} or run.resumes:
        return
    if plan.ending is not Ending.COMPLETED:
        return
    result = StopResult.STOPPED if plan.verify else StopResult.ACCEPTED
    longest = _SEEN_WITHIN + plan.reader_delay * len(run.items)
    for time, _, outcome, _ in run.recorded:
        target = outcome.target[0], outcome.target[1]
        claim = f"{name(target)} is {outcome.result}"
        if outcome.result is not result or outcome.ok is not plan.verify:
            yield Problem("slow stop", f"{claim}, not {result}: {outcome.error!r}")
        took = time - world.server.ended_at[target]
        if plan.verify and took > longest:
            yield Problem("slow stop", f"{claim} {took:.1f} s after its end")


def check_lists(plan: Plan, run: BulkRun, exchanges: list[Exchange]) -> Problems:
    """Check that a workspace is listed for its stops, and seldom to poll."""
    stops = Counter(exchange.target[0] for exchange in exchanges if exchange.stops)
    served = [exchange for exchange in exchanges if exchange.passed]
    lists = Counter(exchange.target[0] for exchange in served if exchange.lists)
    for workspace, count in lists.items():
        # A list that the input is fetched from may be retried.
        # Polls come as seldom as the longest backoff, with jitter.
        polls = (run.ended - run.began) / min(plan.policy.cap / 2, 1.0)
        # So may the list of the last look.
        most = 2 * plan.policy.attempts + stops[workspace] + polls
        if count > most:
            yield Problem("many lists", f"{workspace} was listed {count} times")
