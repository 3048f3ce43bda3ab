"""The rules of a bulk stop: one true outcome for each target, and an end in time."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict

from bctrl_async import BctrlConfigError, BctrlError, StopReport, StopResult
from bctrl_async._calls.retry import BULK_PATIENCE
from sim.check_look import check_look
from sim.check_slow import check_lists, check_polls, check_slow
from sim.check_throttling import (
    SLOWEST,
    check_retries,
    check_throttling,
    waits_itself,
)
from sim.exchange import Exchange, Fate, Target
from sim.loop import STALL
from sim.plan import Ending, Kind, Plan
from sim.records import REACTION, BulkRun, PlannedError
from sim.rules import (
    CLAIMS_NO_EFFECT,
    CLAIMS_STOPPED,
    NOT_RUNNING,
    PATIENCE,
    Problem,
    Problems,
    is_decisive,
    may_have_stopped,
    name,
    posts,
)
from sim.scenes import THROTTLING
from sim.world import World

_UNDELIVERED = frozenset(
    {
        Ending.CANCELLED,
        Ending.MOVE_ON_AFTER,
        Ending.FAIL_AFTER,
        Ending.SCOPE_CANCELLED,
        Ending.LEFT_EARLY,
        Ending.CALLBACK_RAISES,
        Ending.INPUT_RAISES,
        Ending.SESSION_CLOSED,
    }
)
"""Endings after which outcomes are recorded, and perhaps not delivered."""
_RAISES: dict[Ending, tuple[type[BaseException], ...]] = {
    Ending.CANCELLED: (asyncio.CancelledError,),
    Ending.FAIL_AFTER: (TimeoutError,),
    Ending.CALLBACK_RAISES: (PlannedError,),
    Ending.INPUT_RAISES: (PlannedError,),
    Ending.SESSION_CLOSED: (BctrlConfigError,),
}
_AT_ONCE = frozenset(
    {
        Ending.DEADLINE,
        Ending.CANCELLED,
        Ending.MOVE_ON_AFTER,
        Ending.FAIL_AFTER,
        Ending.SCOPE_CANCELLED,
        Ending.ABORT,
        Ending.CTRL_C_TWICE,
    }
)
"""Endings that wait for no answer."""
_UNANSWERED = frozenset(
    {"refuse", "connect_silence", "lookup", "lost", "half_open", "late", "partition"}
)
"""The hazards in which every request may fail for a while, as in an outage."""
_UNCOUNTED = 10
"""The most attempts that cost a stop nothing while nobody is answered."""
_PROBE_DELAY = 5.0
"""The most seconds before each of them."""
_Results = dict[Target, list[tuple[StopResult, int]]]
"""Result and attempts of every copy of a target."""


def check_run(world: World, run: BulkRun) -> Problems:
    """Yield what is wrong with a bulk stop."""
    if run.tasks_left:
        yield Problem("task left", f"{run.tasks_left} tasks of the run are left")
    if run.connections_left:
        yield Problem(
            "connection left", f"{run.connections_left} connections are left open"
        )
    if run.report is None:
        # A batch that was dropped has no report; what it leaves behind is checked
        # elsewhere.
        if world.plan.ending is not Ending.DROPPED:
            yield Problem("no report", "there is no report")
        return
    yield from _check_raised(world.plan, run)
    yield from _check_account(world.plan, run, run.report)
    exchanges = world.network.exchanges[run.first_exchange : run.last_exchange]
    outcomes = _outcomes(run, run.report)
    results: _Results = defaultdict(list)
    for index, outcome in outcomes.items():
        item = run.items[index]
        if isinstance(item, tuple) and item in world.plan.status:
            results[item].append(outcome)
        elif outcome[0] is not StopResult.INVALID:
            yield Problem(
                "invalid target", f"item {index} is {outcome[0]}, but it is invalid"
            )
    sent = posts(exchanges)
    for target, group in results.items():
        yield from _check_target(run, target, group, sent[target])
    yield from _check_ok(run)
    yield from _check_precision(world, run, results, sent)
    if run.ended_at is not None:
        yield from _check_end(world.plan, run, exchanges)
    yield from _check_duration(world.plan, run)
    yield from _check_dead_targets(world.plan, run, run.report, exchanges)
    yield from _check_outage(world.plan, run.report, exchanges)
    yield from check_throttling(world.plan, run)
    yield from check_retries(run, sent)
    yield from check_slow(world, run, exchanges)
    yield from check_lists(world.plan, run, exchanges)
    yield from check_polls(world.plan, run, exchanges)
    yield from check_look(world, run)


def _check_raised(plan: Plan, run: BulkRun) -> Problems:
    expected = () if run.resumes else _RAISES.get(plan.ending, ())
    if plan.input == "workspace":
        # The list cannot be had.
        expected += (BctrlError,)
    if plan.journal and not plan.has_threads:
        expected += (BctrlError, RuntimeError)
    if run.raised is not None and not isinstance(run.raised, expected):
        yield Problem("raised", f"it raised {run.raised!r}")
    interrupted = run.ended_at is not None
    if (
        plan.kind is Kind.COMMAND
        and run.raised is None
        and run.interrupted != interrupted
    ):
        yield Problem(
            "interrupted", f"the command says that interrupted is {run.interrupted}"
        )


# The account: every outcome once


def _check_account(plan: Plan, run: BulkRun, report: StopReport) -> Problems:
    if report.counts.total() != report.total:
        yield Problem(
            "counts", f"the counts add up to {report.counts.total()} of {report.total}"
        )
    seen = Counter(
        (record.outcome.index, record.outcome.result) for record in run.recorded
    )
    if plan.observed and not run.resumes:
        yield from _compare("the observer", seen, report)
    if run.lines and not run.resumes:
        written = Counter(
            (line["index"], StopResult(line["result"])) for line in run.lines
        )
        yield from _compare("the journal", written, report)
    if run.damaged:
        yield Problem("journal", f"{run.damaged} lines of the journal are damaged")
    if len({outcome.index for outcome in report.failures}) != len(report.failures):
        yield Problem("twice", "a failure is reported twice")
    delivered = Counter(outcome.index for outcome in run.delivered)
    if max(delivered.values(), default=1) > 1:
        yield Problem("twice", "an outcome was delivered twice")
    delivers_all = run.resumes or plan.ending not in _UNDELIVERED
    if plan.callback and delivers_all and len(delivered) != report.total:
        yield Problem(
            "delivery", f"{len(delivered)} of {report.total} outcomes were delivered"
        )
    yield from _check_reading(plan, run, report)


def _check_reading(plan: Plan, run: BulkRun, report: StopReport) -> Problems:
    was_begun = not isinstance(run.raised, BctrlError) and report.total > 0
    read = f"{report.total} of {len(run.items)} items were read"
    if plan.is_whole and was_begun and report.total != len(run.items):
        yield Problem("list not read", read)
    if report.ok and report.total != len(run.items):
        yield Problem("ok, but not all read", f"the report is ok, but {read}")


def _compare(
    source: str, found: Counter[tuple[int, StopResult]], report: StopReport
) -> Problems:
    """Compare the outcomes that a source has with the report."""
    counts: Counter[StopResult] = Counter()
    for (_, result), number in found.items():
        counts[result] += number
    indices = Counter(index for index, _ in found.elements())
    if max(indices.values(), default=1) > 1:
        yield Problem("twice", f"{source} has two outcomes of one item")
    if sorted(indices) != list(range(report.total)):
        yield Problem(
            "lost outcome", f"{source} has {len(indices)} outcomes of {report.total}"
        )
    elif counts != +report.counts:
        yield Problem("counts", f"{source} has {counts}, the report {+report.counts}")


def _outcomes(run: BulkRun, report: StopReport) -> dict[int, tuple[StopResult, int]]:
    """Return result and attempts by index, wherever they were told."""
    everything = (
        [record.outcome for record in run.recorded] + run.delivered + [*report.failures]
    )
    found = {
        outcome.index: (outcome.result, outcome.attempts)
        for outcome in everything
        if not outcome.resumed
    }
    if not run.resumes:
        for line in run.lines:
            found[line["index"]] = StopResult(line["result"]), line.get("attempts", 0)
    return found


# Every outcome true


def _check_target(
    run: BulkRun,
    target: Target,
    group: list[tuple[StopResult, int]],
    sent: list[Exchange],
) -> Problems:
    copies = run.items.count(target)
    for result, _ in group:
        claim = f"{name(target)} is {result}"
        now, before = run.after[target], run.before[target]
        if target in run.restarted:
            # Another program has changed its status since.
            continue
        if result in CLAIMS_STOPPED and now not in NOT_RUNNING:
            yield Problem("runs on", f"{claim}, but its status is {now}")
        if result is StopResult.NOT_FOUND and now is not None:
            yield Problem("is there", f"{claim}, but its status is {now}")
        # Each copy is a stop of its own.
        if result in CLAIMS_NO_EFFECT and copies == 1:
            if now != before:
                yield Problem("had an effect", f"{claim}, but {before} became {now}")
            yield from _check_not_sent(claim, result, sent)
    if len(group) == copies and sum(attempts for _, attempts in group) < len(sent):
        yield Problem(
            "attempts", f"{name(target)} has {group}, but {len(sent)} stops were sent"
        )
    if target in run.settled_before and sent:
        yield Problem(
            "settled", f"{name(target)} was settled in the journal, but was sent again"
        )


def _check_ok(run: BulkRun) -> Problems:
    for _, _, outcome, status in run.recorded:
        claim = f"{name(outcome.target)} is ok"
        was_active = status is not None and status not in NOT_RUNNING
        if outcome.ok and was_active and outcome.target not in run.restarted:
            yield Problem("not ok", f"{claim}, but its status was {status}")
        if outcome.ok != (outcome.error is None):
            yield Problem("not ok", f"{name(outcome.target)}: {outcome}")


def _check_not_sent(claim: str, result: StopResult, sent: list[Exchange]) -> Problems:
    """Check that a stop that is said to have had no effect cannot have had any."""
    if result is StopResult.NOT_SENT and sent:
        yield Problem("was sent", f"{claim}, but the server may have received it")
    if result is StopResult.REJECTED and any(map(may_have_stopped, sent)):
        yield Problem(
            "may have stopped", f"{claim}, but an attempt may have stopped it"
        )


def _check_precision(
    world: World, run: BulkRun, results: _Results, sent: dict[Target, list[Exchange]]
) -> Problems:
    """Check that a result is as exact as the answers."""
    plan = world.plan
    if (
        not plan.climate.hazards - {"cut"}
        and plan.ending is Ending.COMPLETED
        and not run.resumes
    ):
        exact = {"active": "stopped", "stopped": "already_stopped", None: "not_found"}
        for target, group in results.items():
            expected = exact[run.before[target]]
            if run.items.count(target) == 1 and group[0][0] != expected:
                yield Problem(
                    "calm", f"{name(target)} is {group[0][0]}, not {expected}"
                )
            attempts = sum(attempts for _, attempts in group)
            if attempts != len(sent[target]):
                counts = f"{attempts} attempts, but {len(sent[target])} requests"
                yield Problem("calm", f"{name(target)} has {counts}")
    if plan.climate.hazards & {"stray", "server", "starved"}:
        return
    for time, _, outcome, _ in run.recorded:
        target = outcome.target[0], outcome.target[1]
        answers = sent.get(target, [])
        if not answers or run.items.count(target) > 1 or outcome.resumed:
            continue
        claim = f"{name(target)} is {outcome.result}"
        last = max(exchange.answered or time for exchange in answers)
        if (
            outcome.result is StopResult.UNKNOWN
            and all(map(is_decisive, answers))
            and len(answers) == outcome.attempts
            and last + 0.01 < time
        ):
            yield Problem(
                "needless unknown", f"{claim}, but every attempt was answered"
            )


# The end in time


def _check_end(plan: Plan, run: BulkRun, exchanges: list[Exchange]) -> Problems:
    """Check that nothing new is sent after the end, and that it does not take long."""
    moment = run.ended_at
    assert moment is not None
    begun = {
        exchange.target
        for exchange in exchanges
        if exchange.step <= moment.step + REACTION
    }
    first = {
        exchange.target
        for exchange in exchanges
        if exchange.stops and exchange.target not in begun
    }
    # An attempt in flight may still be connecting. A stall delays the moment from which
    # a deadline counts, and attempts that are not written yet.
    is_known = plan.ending is not Ending.KEY_REVOKED and not plan.stalls
    if is_known and len(first) > moment.in_flight:
        yield Problem(
            "begun after the end", f"{len(first)} targets were first sent after the end"
        )
    took = run.ended - moment.time
    # A hundred workers end in some three steps each, and a busy step takes 1 ms.
    slow = plan.reader_delay * (len(run.items) + 100) + plan.thread_delay * 2 + 0.3
    slow += STALL * len(plan.stalls)
    slow += plan.twice_after if plan.ending is Ending.CTRL_C_TWICE else 0.0
    if plan.ending in _AT_ONCE and took > slow:
        yield Problem("late end", f"it ended {took:.2f} s after {plan.ending}")
    stops_reading = plan.ending in {Ending.STOP_READING, Ending.CTRL_C}
    if (
        stops_reading
        and not plan.climate.hazards - {"cut"}
        and took > slow + 3.0
        and not plan.is_paced
    ):
        yield Problem(
            "late end", f"it ended {took:.2f} s after {plan.ending}, without faults"
        )


def _check_duration(plan: Plan, run: BulkRun) -> Problems:
    workers = plan.worker_count
    longest = PATIENCE + plan.longest(len(run.items), workers)
    if plan.stop_seconds:
        # At the bound of polls, what is polled holds up the next targets.
        rounds = -(-len(run.items) // plan.max_polls)
        seen_after = max(plan.stop_seconds.values()) + plan.policy.cap + plan.timeout
        longest += rounds * seen_after
    # So does each runtime that still runs once its polls have had their time.
    failures = run.report.failures if run.report is not None else ()
    running = sum(outcome.running is True for outcome in failures)
    longest += plan.verify_seconds * -(-running // plan.max_polls)
    climate = plan.climate
    if climate.hazards & _UNANSWERED:
        # While nobody is answered, the last stop fails at no cost, and is probed for.
        longest += _UNCOUNTED * (_PROBE_DELAY + 2.0 * plan.timeout)
    if climate.hazards - {"poison", "cut"}:
        # While canaries are not answered either, a gateway's 503 costs the whole
        # patience.
        busy = [target for target, fate in climate.poison.items() if fate == 503]
        longest += BULK_PATIENCE * -(-sum(map(run.items.count, busy)) // workers)
    if climate.hazards & THROTTLING:
        throttled = [
            target for target in plan.targets if target[0] in climate.over_quota
        ]
        # The only worker of a slow input waits for each throttled stop.
        rounds = sum(map(run.items.count, throttled)) if waits_itself(plan) else 1
        longest += PATIENCE + 2 * BULK_PATIENCE * rounds
    took = run.ended - run.began
    if took > longest:
        yield Problem("slow", f"it took {took:.0f} s")


def _check_dead_targets(
    plan: Plan, run: BulkRun, report: StopReport, exchanges: list[Exchange]
) -> Problems:
    """Check that dead targets hold up no other."""
    climate = plan.climate
    alive = [target for target in plan.targets if target not in climate.poison]
    if (
        not climate.poison
        or climate.hazards - {"poison", "cut"}
        or plan.ending is not Ending.COMPLETED
        or run.resumes
        or not alive
    ):
        return
    # Nothing tells a dead target from a dead server if none is answered.
    if report.ended_early is not None and any(
        exchange.target in alive for exchange in exchanges
    ):
        yield Problem("dead targets", f"it ended early: {report.ended_early.summary}")
    workspaces = {workspace for workspace, _ in climate.poison}
    # The stops that workers have taken share the connections of the machine.
    turns = -(-min(len(run.items), plan.worker_count) // plan.slot_count)
    held = turns * plan.latency + _seconds_of_silence(plan, run)
    for record in run.recorded:
        outcome = record.outcome
        longest = 4.0 * plan.timeout + held
        if outcome.target[0] in workspaces:
            # The lane of a workspace with dead targets may have its slowest rate.
            longest += 1.0 / SLOWEST
        if outcome.target in alive and not plan.is_paced and outcome.elapsed > longest:
            took = f"took {outcome.elapsed:.1f} s beside dead targets"
            yield Problem("dead targets", f"{name(outcome.target)} {took}")
    workers = min(plan.max_connections, plan.concurrency or 100)
    rounds = -(-sum(run.items.count(target) for target in climate.poison) // workers)
    bound = 14.0 * plan.timeout + rounds * plan.policy.attempts * (
        plan.timeout + plan.policy.cap
    )
    bound += len(run.items) * (plan.input_delay + plan.latency + 0.2) + plan.idle
    took_all = run.ended - run.began
    if not plan.is_paced and not plan.verify and took_all > bound:
        yield Problem("dead targets", f"dead targets held the run for {took_all:.1f} s")


def _seconds_of_silence(plan: Plan, run: BulkRun) -> float:
    """Return the seconds for which dead targets hold connections that others lack."""
    if plan.slot_count == plan.worker_count:
        return 0.0
    poison = plan.climate.poison
    silent = [target for target, fate in poison.items() if fate is Fate.SILENCE]
    attempts = plan.policy.attempts * sum(map(run.items.count, silent))
    return -(-attempts // plan.slot_count) * plan.timeout


def _check_outage(
    plan: Plan, report: StopReport, exchanges: list[Exchange]
) -> Problems:
    """Check that a run survives a server that dies and comes back."""
    if (
        "outage" not in plan.climate.hazards
        or plan.climate.hazards - {"outage", "cut", "poison"}
        or plan.ending is not Ending.COMPLETED
        or plan.policy.patience is not None
        or plan.policy.attempts == 1
    ):
        return
    start = min(span.start for span in plan.climate.outages)
    if not any(
        exchange.answered and exchange.answered < start and not exchange.page
        for exchange in exchanges
    ):
        return
    lost = [
        outcome
        for outcome in report.failures
        if not outcome.ok
        and outcome.result not in {StopResult.ACCEPTED, StopResult.NOT_FOUND}
        and outcome.target in plan.status
        and outcome.target not in plan.climate.poison
    ]
    if lost:
        yield Problem(
            "outage", f"{len(lost)} stops did not survive an outage: {lost[0].error}"
        )
