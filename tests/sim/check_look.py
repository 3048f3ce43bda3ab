"""The rules of the last look: what runs once all targets have their outcomes."""

from __future__ import annotations

from bctrl_async import StopReport
from bctrl_async.journal import read_journals
from sim.exchange import Target
from sim.plan import Ending
from sim.records import BulkRun
from sim.rules import Problem, Problems, name
from sim.starts import Started
from sim.world import World

_REACHABLE = frozenset(
    {
        "starts",
        "slow",
        "cut",
        "late",
        "page",
        "foreign_404",
        "denied",
        "stray",
        "server",
    }
)
"""The hazards that keep no request from being written."""


def check_look(world: World, run: BulkRun) -> Problems:
    """Check that a last look tells of all that runs, and of nothing else."""
    plan, report = world.plan, run.report
    if report is None or not plan.starts:
        return
    yield from _check_existence(world, run, report)
    found = [(runtime.alias, str(runtime.id)) for runtime in report.started_since or ()]
    known = {(start.target[1], start.id) for start in world.other.started}
    for alias, runtime_id in found:
        if (alias, runtime_id) not in known:
            yield Problem("never started", f"{alias} is said to have started since")
    runs = _running_before_look(world, run)
    if report.started_since is None or not runs:
        return
    for start in runs.values():
        if (start.target[1], start.id) in found:
            continue
        if start.id not in run.ids:
            yield Problem("not seen", f"{name(start.target)} runs, and is not found")
        elif report.ok:
            yield Problem(
                "taken back", f"{name(start.target)} runs again, and the report is ok"
            )
    yield from _check_journal(run, runs)


def _check_existence(world: World, run: BulkRun, report: StopReport) -> Problems:
    plan = world.plan
    looks = report.started_since is not None, report.look_error is not None
    if all(looks):
        yield Problem("look", "there is a look, and an error of it")
    if report.total and not plan.verify and any(looks):
        yield Problem("look", "there was a last look without polls")
    # A run that is ended once all is read has not ended early if all is settled.
    was_ended = run.ended_at is not None or run.raised is not None
    was_ended |= report.ended_early is not None or plan.ending is Ending.LEFT_EARLY
    is_due = report.total > 0 and plan.verify and not was_ended
    if is_due and not any(looks):
        yield Problem("look", "nobody looked, and no error says why")
    # Elsewhere the list may be given up before it is written.
    is_written = looks[0] or not plan.climate.hazards - _REACHABLE
    if is_due and is_written and not _has_list(world, run):
        yield Problem("look", "no list was asked for after the last outcome")


def _has_list(world: World, run: BulkRun) -> bool:
    """Return True if there was a list after the last outcome, by the observer."""
    last = max((record.time for record in run.recorded), default=run.began)
    exchanges = world.network.exchanges[run.first_exchange : run.last_exchange]
    return any(exchange.lists and exchange.written >= last for exchange in exchanges)


def _running_before_look(world: World, run: BulkRun) -> dict[Target, Started]:
    """Return what ran at the time of the first list after all outcomes, and on."""
    if not world.plan.observed:
        # Nothing tells the time of the last outcome.
        return {}
    last = max((record.time for record in run.recorded), default=0.0)
    looked = min((time for time in world.other.lists if time > last), default=last)
    return {
        start.target: start
        for start in world.other.started
        if start.time <= looked
        and run.runs_on.get(start.target) == start.id
        and not any(
            later.target == start.target and later.time > looked
            for later in world.other.started
        )
    }


def _check_journal(run: BulkRun, runs: dict[Target, Started]) -> Problems:
    """Check that a journal calls nothing stopped that a last look has found."""
    if run.journal is None or not run.journal.exists():
        return
    for outcome in read_journals([run.journal]):
        target = outcome.target.workspace_id, outcome.target.alias
        if outcome.ok and target in runs:
            claim = f"{name(target)} is {outcome.result} in the journal"
            yield Problem("look in journal", f"{claim}, and runs by the last look")
