"""The rules of throttling: it slows down its target or workspace, nobody else."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from operator import itemgetter

from bctrl_async import BctrlError, Runtime, StopResult
from sim.exchange import Exchange, Target
from sim.plan import Ending, Plan
from sim.records import BulkRun, SingleCall
from sim.rules import REFUSED, Problem, Problems, name
from sim.scenes import THROTTLING
from sim.world import World

_SHOWN, _DECAY = 8.0, 0.5
"""Throttled first attempts that show a workspace's limit; a success's part of it."""
_PAUSE = 0.5
"""Seconds of the pause after a limit is shown."""
_FADES = 80
"""Attempts that a workspace gets at most while nothing succeeds and its rate fades."""
SLOWEST = 0.5
"""The attempts per second to which it fades."""


def check_throttling(plan: Plan, run: BulkRun) -> Problems:
    """Check that throttled targets hold up no other, and that none is lost."""
    hazards = plan.climate.hazards - {"starved"}
    has_rule = len(hazards) == 1 and hazards <= THROTTLING and not plan.is_paced
    if not has_rule or plan.ending is not Ending.COMPLETED or run.resumes:
        return
    bound = _longest(plan, len(run.items))
    for time, _, outcome, _ in run.recorded:
        if not _is_other(plan, outcome.target):
            continue
        # A short patience may end in bad luck.
        is_patient = plan.policy.patience is None or plan.climate.over_quota
        is_lost = outcome.result in {StopResult.REJECTED, StopResult.NOT_SENT}
        # A starved process may see no answer in time.
        if is_patient and is_lost and not plan.stalls:
            yield Problem(
                "throttled others", f"{name(outcome.target)} is {outcome.result}"
            )
        # A stop that a starved process saw no answer to is polled for as long as
        # `verify` says.
        is_polled = plan.stalls and outcome.result is StopResult.UNKNOWN
        if time - run.began > bound and not (waits_itself(plan) or is_polled):
            took = f"had its outcome after {time - run.began:.0f} s"
            yield Problem("throttled others", f"{name(outcome.target)} {took}")


def waits_itself(plan: Plan) -> bool:
    """Return True if the only worker sends throttled stops before more input."""
    return plan.worker_count == 1 and plan.input in {"async", "generator"}


def _longest(plan: Plan, count: int) -> float:
    """Return the seconds within which all other targets have their outcomes."""
    seconds = len(plan.stalls) + count * plan.input_delay + plan.idle
    seconds += -(-count // plan.slot_count) * plan.latency
    if not plan.ideal and "gateway_retry_after" not in plan.climate.hazards:
        return 20.0 + seconds + count * 0.2
    slack = 10.0
    if "quotas" in plan.climate.hazards:
        # The last targets of a quota may sleep for some back-offs after it has room.
        slack = 20.0
    elif "gateway_retry_after" in plan.climate.hazards:
        # Dead targets may show a limit, whose curve takes some ten seconds.
        slack = 12.0 + plan.seconds_in_turn(count)
    return slack + seconds + 1.5 * plan.ideal


def _is_other(plan: Plan, target: Target) -> bool:
    climate = plan.climate
    is_bad = target[0] in climate.over_quota or target in climate.dead
    return not is_bad and target in plan.targets


def check_retries(run: BulkRun, sent: dict[Target, list[Exchange]]) -> Problems:
    """Check that no throttled stop waits on once it is due, whatever the input does."""
    copies = Counter(run.items)
    times: defaultdict[Target, list[float]] = defaultdict(list)
    for time, _, outcome, _ in run.recorded:
        times[outcome.target[0], outcome.target[1]].append(time)
    for due in run.due:
        times_sent = [exchange.written for exchange in sent.get(due.target, ())]
        is_late = not any(
            due.sent_at < time <= due.time for time in times[due.target] + times_sent
        )
        if is_late and copies[due.target] == 1:
            since = f"{due.time - due.sent_at:.1f} s after it was throttled"
            yield Problem("late retry", f"{name(due.target)} waits on {since}")


def check_service(world: World, call: SingleCall) -> Problems:
    """Check that a call neither waits for a throttled workspace nor fails."""
    plan = world.plan
    if "service" not in plan.climate.hazards or not _is_other(plan, call.target):
        return
    took = call.ended - call.began
    longest = 2.0 + len(plan.stalls) + len(world.calls) * plan.latency
    # Where the machine lacks connections, calls wait for those before them.
    longest += max(len(world.calls) * 0.05, plan.seconds_in_turn(len(world.calls)))
    if took > longest:
        yield Problem(
            "throttled others", f"the call of {name(call.target)} took {took:.1f} s"
        )
    is_failed = not isinstance(call.result, Runtime | None)
    if isinstance(call.result, BctrlError) and is_failed and not plan.stalls:
        yield Problem("throttled others", f"{name(call.target)}: {call.result!r}")


def check_flood(plan: Plan, exchanges: list[Exchange]) -> Problems:
    """Check that a workspace that is throttled for ever is asked seldom."""
    if "service" not in plan.climate.hazards:
        return
    for workspace in plan.climate.over_quota:
        own = [exchange for exchange in exchanges if exchange.target[0] == workspace]
        yield from _check_flood_of(plan, own, exchanges[-1].written)


def _check_flood_of(plan: Plan, own: list[Exchange], ended: float) -> Problems:
    shown = _limit_shown_at(own)
    if shown is None:
        return
    since = [exchange.written for exchange in own if exchange.written > shown]
    # Those that are admitted may still be connecting.
    early = bisect_left(since, shown + _PAUSE)
    if early > plan.max_connections:
        yield Problem(
            "flood", f"{early} requests of a workspace were sent in its pause"
        )
    most = _FADES + plan.max_connections + SLOWEST * (ended - shown)
    if len(since) > most:
        yield Problem(
            "flood", f"{len(since)} requests of a throttled workspace were sent"
        )


def _limit_shown_at(exchanges: list[Exchange]) -> float | None:
    """Return when the first attempts have shown the limit of a workspace, if ever."""
    firsts: dict[Target, Exchange] = {}
    for exchange in exchanges:
        firsts.setdefault(exchange.target, exchange)
    excess = 0.0
    answers = [
        (exchange.answered, exchange)
        for exchange in firsts.values()
        if exchange.answered is not None
    ]
    for time, exchange in sorted(answers, key=itemgetter(0)):
        excess = (
            excess + 1.0 if exchange.status in REFUSED else max(excess - _DECAY, 0.0)
        )
        if excess >= _SHOWN:
            return time
    return None


def check_rate(plan: Plan, exchanges: list[Exchange]) -> Problems:
    """Check that no second has more attempts than the rate allows."""
    # A shared pace is the only rate of its session.
    is_paced = plan.pace is not None
    if plan.rate is None or is_paced or plan.climate.hazards - {"starved", *THROTTLING}:
        return
    times = [exchange.written for exchange in exchanges]
    # An attempt that waits for its connection is written later than it was admitted.
    most = 1.3 * plan.rate + 3.0
    for start, time in enumerate(times):
        count = bisect_left(times, time + 1.0) - start
        if count > most:
            yield Problem("rate", f"{count} attempts in a second from {time:.2f} s")
            return
