"""The rules of stops that take time: their ends are seen soon, at a low cost."""

from __future__ import annotations

import math
from collections import Counter

from bctrl_async import StopResult
from bctrl_async.emulator import Fault
from sim.exchange import Exchange, Target
from sim.plan import Ending, Plan
from sim.records import BulkRun, Recorded
from sim.rules import Problem, Problems, name, posts
from sim.world import World

_SEEN_WITHIN = 15.0
"""Seconds after which the end of a runtime is seen, even where its lists fail."""
_SLACK = 0.5
"""Seconds that an outcome may take beyond a poll's delay and its list."""
_ROUND_TRIP = 0.3
"""The most seconds for a GET without faults."""
_MAX_GOT = 9
"""The most runtimes of a workspace that are got and not listed."""
_MAX_LIST = 15.0
_MIN_LIST = 5.0
"""The most and the least seconds that are left to a list, or half of all polls."""
_PAUSES = 4.0
"""How many times as long as a list that has failed its runtimes are got."""
_LOOK_SECONDS = 60.0
"""The most seconds for a last look."""
_FAILED_LISTS = 6
"""The most lists that fail before they are as seldom as a minute."""


def check_slow(world: World, run: BulkRun, exchanges: list[Exchange]) -> Problems:
    """Check that each stop is confirmed soon after its runtime has ended."""
    plan = world.plan
    if not _is_calm(plan, run) or plan.ending is not Ending.COMPLETED:
        return
    stopped_at = {
        target: group[-1].answered or run.ended
        for target, group in posts(exchanges).items()
    }
    for record in run.recorded:
        target = record.outcome.target[0], record.outcome.target[1]
        ended_at = world.server.ended_at[target]
        if not plan.verify:
            yield from _check_result(record, StopResult.ACCEPTED, is_ok=False)
            continue
        polled_until = stopped_at[target] + plan.verify_seconds
        yield from _check_time(plan, run, record, ended_at, polled_until)
        if not plan.list_faults and not _is_asked(exchanges, record, target):
            claim = f"{name(target)} is {record.outcome.result}"
            yield Problem("unasked", f"{claim}, and no poll of it was answered")


def _is_calm(plan: Plan, run: BulkRun) -> bool:
    """Return True in a world whose only trouble is with stops and lists."""
    hazards = plan.climate.hazards
    return "slow" in hazards and not hazards - {"slow", "cut"} and not run.resumes


def _check_result(record: Recorded, result: StopResult, *, is_ok: bool) -> Problems:
    outcome = record.outcome
    if outcome.result is not result or outcome.ok is not is_ok:
        claim = f"{name((outcome.target[0], outcome.target[1]))} is {outcome.result}"
        yield Problem("slow stop", f"{claim}, not {result}: {outcome.error!r}")


def _check_time(
    plan: Plan, run: BulkRun, record: Recorded, ended_at: float, polled_until: float
) -> Problems:
    """Check that an end is seen soon, and that no poll outlasts its time."""
    # Without faults, an end is seen by the next list.
    longest = plan.policy.cap + min(plan.timeout, 2.0) + _SLACK
    if plan.list_faults:
        longest = _SEEN_WITHIN
    # A list that fails is followed by a GET of each.
    after_list = _list_seconds(plan) + _seconds_of_gets(plan, len(run.items))
    delivery = plan.reader_delay * len(run.items)
    if ended_at + longest + after_list <= polled_until:
        yield from _check_result(record, StopResult.STOPPED, is_ok=True)
    claim = f"{name((record.outcome.target[0], record.outcome.target[1]))} is"
    claim += f" {record.outcome.result}"
    took = record.time - ended_at
    if record.outcome.ok and took > longest + after_list + delivery:
        yield Problem("late outcome", f"{claim} {took:.1f} s after its end")
    late = record.time - polled_until
    if late > _SLACK + after_list + delivery:
        yield Problem("late outcome", f"{claim} {late:.1f} s after its last poll")


def _list_seconds(plan: Plan) -> float:
    """Return the seconds for which a list may keep its runtimes from being got."""
    if plan.list_trouble is None or plan.list_trouble.fault is not Fault.HANG:
        return 0.0
    limit = min(max(plan.verify_seconds / 2, _MIN_LIST), _MAX_LIST)
    return min(plan.timeout, limit)


def _seconds_of_gets(plan: Plan, count: int) -> float:
    """Return the seconds in which each runtime is got after a list that failed."""
    if plan.list_trouble is None:
        return 0.0
    return _ROUND_TRIP * math.ceil(count / plan.slot_count)


def _is_asked(exchanges: list[Exchange], record: Recorded, target: Target) -> bool:
    """Return True if a GET or a list said in time what became of a stop."""
    return any(
        exchange.status == 200
        and exchange.answered is not None
        and exchange.answered <= record.time
        and not exchange.stops
        and exchange.target in {target, (target[0], "")}
        and exchange.written >= stop.written
        for stop in exchanges
        if stop.stops and stop.target == target
        for exchange in exchanges
    )


def check_polls(plan: Plan, run: BulkRun, exchanges: list[Exchange]) -> Problems:
    """Check that lists answer for a workspace of many: few runtimes are got."""
    if not _is_calm(plan, run) or plan.list_faults:
        return
    # Few are polled at a time if the input or the bound of polls holds up the others.
    is_slow = plan.idle or plan.input_delay > 0.001 or plan.rate or plan.pace
    if is_slow or plan.max_polls <= _MAX_GOT:
        return
    served = [exchange for exchange in exchanges if exchange.passed]
    gets = sum(not exchange.stops and not exchange.lists for exchange in served)
    seconds = min(max(plan.stop_seconds.values()), plan.verify_seconds)
    most = _MAX_GOT * (3 + seconds / (plan.policy.cap / 2))
    most += _gets_after_lists(plan, seconds) * len(run.items)
    if gets > most:
        yield Problem("many polls", f"{gets} GETs polled {len(run.items)} runtimes")
    if plan.list_trouble is not None and plan.list_trouble.lists == math.inf:
        yield from _check_failed_lists(plan, plan.list_trouble.fault, served)


def _check_failed_lists(plan: Plan, fault: Fault, served: list[Exchange]) -> Problems:
    """Check that lists are tried seldom if all but the first fail."""
    looks = _looks(plan, served)
    polls = sum(exchange.lists for exchange in served) - looks
    # aiohttp itself sends a GET again, once, if its connection closes.
    per_list = 2 if fault is Fault.DROP_BEFORE else 1
    lists = 1 + (polls - 1) / per_list
    # A list that the input is fetched from may be retried.
    if lists > plan.policy.attempts + _FAILED_LISTS:
        tried = f"{lists:.0f} lists were tried"
        yield Problem("many lists", f"{tried}, and all but one failed")
    most: float = plan.policy.attempts
    if fault is Fault.RATE_LIMITED:
        # Throttling costs it no attempts, and its patience is a minute.
        most = _LOOK_SECONDS / (plan.policy.cap / 4)
    if looks / per_list > most:
        yield Problem("many lists", f"a last look tried {looks / per_list:.0f} lists")


def _looks(plan: Plan, served: list[Exchange]) -> int:
    """Return the number of lists of a last look, which comes after all else."""
    if plan.input != "workspace":
        return 0
    others = [exchange.written for exchange in served if not exchange.lists]
    last = max(others, default=math.inf)
    return sum(exchange.lists and exchange.written > last for exchange in served)


def _gets_after_lists(plan: Plan, seconds: float) -> float:
    """Return how often each runtime may be got because lists have failed."""
    trouble = plan.list_trouble
    if trouble is None:
        return 0.0
    if trouble.lists < math.inf:
        # After a list that failed at once, another is tried.
        seconds = min(seconds, _PAUSES * _list_seconds(plan) * trouble.lists)
    if not seconds:
        return 1.0
    # The first polls are quick, and the later as seldom as the longest delay.
    return 4.0 + seconds / (plan.policy.cap / 2)


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
