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
_SLACK = 0.5
"""Seconds that an outcome may take beyond a poll's delay and its list."""
_MAX_GOT = 9
"""The most runtimes of a workspace that are got and not listed."""


def check_slow(world: World, run: BulkRun) -> Problems:
    """Check that each stop is confirmed soon after its runtime has ended."""
    plan = world.plan
    hazards = plan.climate.hazards
    if "slow" not in hazards or hazards - {"slow", "cut"} or run.resumes:
        return
    if plan.ending is not Ending.COMPLETED:
        return
    result = StopResult.STOPPED if plan.verify else StopResult.ACCEPTED
    # Without faults, an end is seen by the next list.
    seen_within = plan.policy.cap + plan.timeout + _SLACK
    if plan.list_faults:
        seen_within = _SEEN_WITHIN
    longest = seen_within + plan.reader_delay * len(run.items)
    for time, _, outcome, _ in run.recorded:
        target = outcome.target[0], outcome.target[1]
        claim = f"{name(target)} is {outcome.result}"
        if outcome.result is not result or outcome.ok is not plan.verify:
            yield Problem("slow stop", f"{claim}, not {result}: {outcome.error!r}")
        took = time - world.server.ended_at[target]
        if plan.verify and took > longest:
            yield Problem("late outcome", f"{claim} {took:.1f} s after its end")


def check_polls(plan: Plan, run: BulkRun, exchanges: list[Exchange]) -> Problems:
    """Check that lists answer for a workspace of many: few runtimes are got."""
    hazards = plan.climate.hazards
    if "slow" not in hazards or hazards - {"slow", "cut"} or plan.list_faults:
        return
    # Few are polled at a time if the input or the bound of polls holds up the others.
    is_slow = plan.idle or plan.input_delay > 0.001 or plan.rate or plan.pace
    if run.resumes or is_slow or plan.max_polls <= _MAX_GOT:
        return
    gets = sum(
        exchange.passed and not exchange.stops and not exchange.lists
        for exchange in exchanges
    )
    seconds = max(plan.stop_seconds.values())
    most = _MAX_GOT * (3 + seconds / (plan.policy.cap / 2))
    if gets > most:
        yield Problem("many polls", f"{gets} GETs polled {len(run.items)} runtimes")


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
