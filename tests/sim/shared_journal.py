"""Bulk stops that share a journal, while their runtimes are started again."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from bctrl_async import BctrlError, BctrlSession, Runtime, RuntimeRef, StopOutcome
from bctrl_async.emulator import Fault
from bctrl_async.journal import Journal, read_journals
from sim.climate import Climate
from sim.exchange import Target
from sim.loop import SimLoop
from sim.plan import Ending, Kind, Plan
from sim.records import BulkRun, read_lines, settled_in
from sim.rules import Problem, Problems, name
from sim.server import SimulatedServer
from sim.world import World

_WORKSPACE = "ws-1"
_SPAN = 3.0
"""Virtual seconds in which bulk stops begin and runtimes are started again."""


class SharedJournal(World):
    """Bulk stops of a session that begin at any moment, with one `Journal`.

    The `created_at` of a runtime is its generation: how often it was started.

    Attributes:
        listed: The generations that a bulk stop has had in its list as running.
    """

    def __init__(self, plan: Plan, loop: SimLoop, folder: Path) -> None:
        rng = random.Random(f"shared {plan.seed}")
        plan.kind, plan.ending = Kind.BULK, Ending.COMPLETED
        plan.timeout, plan.latency = 5.0, rng.choice([0.0, 0.01, 0.2])
        plan.rate = plan.pace = None
        plan.has_threads, plan.stalls = True, []
        late = rng.choice([0.0, 0.2, 0.5])
        plan.climate = Climate(frozenset(), plan.timeout, late=late)
        super().__init__(plan, loop, folder)
        self._rng = rng
        self._path = folder / "journal.jsonl"
        # Some answers take long, so that much happens before they arrive.
        self.server = SimulatedServer(
            stop_seconds={},
            list_faults={},
            good_lists=0,
            timeout=plan.timeout,
            api_key=self.key,
            faults={Fault.LATENCY: rng.uniform(0.0, 0.6)},
            fault_latency=rng.uniform(0.1, 2.0),
            seed=plan.seed,
            latency=plan.latency,
        )
        count = rng.choice([2, 10])
        self._targets = [(_WORKSPACE, f"r{number}") for number in range(count)]
        self._generations = dict.fromkeys(self._targets, 0)
        self.listed: defaultdict[Target, set[int]] = defaultdict(set)

    async def run(self) -> None:
        """Run the bulk stops, twice: the second time with what the first has left."""
        for target in self._targets:
            self._start_runtime(target)
        async with self.server:
            for _ in range(2):
                async with self.make_session(None, None) as session:
                    with Journal(self._path, base_url=session.base_url) as journal:
                        await self._run_all(session, journal)
                # Connections close, and stops that were aborted may still work.
                await asyncio.sleep(30.0)

    def _start_runtime(self, target: Target) -> None:
        self._generations[target] += 1
        generation = str(self._generations[target])
        self.server.add_runtime(*target, created_at=generation)
        self.network.log(0, f"{name(target)} is started: {generation}")

    async def _run_all(self, session: BctrlSession, journal: Journal) -> None:
        rng = self._rng
        for _ in range(rng.randint(1, 20)):
            start = partial(self._start_runtime, rng.choice(self._targets))
            self.loop.call_later(rng.uniform(0.0, _SPAN), start)
        runs = [self._run_batch(session, journal) for _ in range(rng.randint(2, 8))]
        await asyncio.gather(*runs)

    async def _run_batch(self, session: BctrlSession, journal: Journal) -> None:
        rng = self._rng
        kind = rng.choice(["list", "workspace", "elsewhere"])
        begins_at, writes_after = rng.uniform(0.0, _SPAN), rng.uniform(0.0, _SPAN)
        aborted_after = rng.choice([None, None, rng.uniform(0.0, 2 * _SPAN)])
        items = rng.choices(self._targets, k=rng.randint(1, 6))
        selected = {alias for _, alias in rng.sample(self._targets, rng.randint(0, 1))}
        await asyncio.sleep(begins_at)
        run = BulkRun([], {}, settled_before=settled_in(self._path))
        self.runs.append(run)
        listed: list[Runtime] = []

        def where(runtime: Runtime) -> bool:
            # The last look tells of what it selects alone.
            if batch.total is None:
                listed.append(runtime)
            return runtime.alias in selected

        def deliver(outcome: StopOutcome) -> None:
            text = f"{outcome.result}, resumed: {outcome.resumed}"
            self.network.log(0, f"{kind} {'/'.join(outcome.target)}: {text}")
            run.delivered.append(outcome)
            if kind == "elsewhere":
                # It comes back from another machine.
                self.loop.call_later(writes_after, journal.write, outcome)

        self.network.log(0, f"a bulk stop begins: {kind}")
        if kind == "workspace":
            batch = session.stop_workspace(
                _WORKSPACE, where=where, journal=journal, on_outcome=deliver
            )
        else:
            batch = session.stop_runtimes(
                self._read(items, run),
                journal=None if kind == "elsewhere" else journal,
                on_outcome=deliver,
                verify=self.plan.verify,
            )
        if aborted_after is not None:
            self.loop.call_later(aborted_after, batch.abort)
        # The list may be late.
        with suppress(BctrlError):
            await batch
        run.report = batch.report
        await asyncio.sleep(writes_after)
        if batch.total is not None:
            # The list was used, even if the run ended just after.
            self._note_list(listed)

    def _note_list(self, listed: list[Runtime]) -> None:
        for runtime in listed:
            if not runtime.status.is_final:
                target = _WORKSPACE, runtime.alias
                self.listed[target].add(int(runtime.created_at))

    async def _read(
        self, items: list[Target], run: BulkRun
    ) -> AsyncIterator[RuntimeRef]:
        # The journal is open now.
        run.settled_before |= settled_in(self._path)
        for item in items:
            await asyncio.sleep(self._rng.choice([0.0, 0.1, 0.5]))
            yield RuntimeRef(*item)

    def check(self) -> Problems:
        """Yield what is wrong with the account of all runs."""
        lines, damaged = read_lines(self._path)
        if damaged:
            yield Problem("journal", f"{damaged} lines of the journal are damaged")
        written = {(line["alias"], line["at"], line["result"]) for line in lines}
        for run in self.runs:
            yield from self._check_run(run, written)
        for outcome in read_journals([self._path]):
            target = outcome.target.workspace_id, outcome.target.alias
            generation = self._generations[target]
            runs_on = self.server.status(*target) == "active"
            if outcome.ok and runs_on and generation in self.listed[target]:
                claim = f"{name(target)} is {outcome.result} in the journal"
                yield Problem("listed", f"{claim}, but was listed since, and runs")

    def _check_run(
        self, run: BulkRun, written: set[tuple[object, object, object]]
    ) -> Problems:
        for outcome in run.delivered:
            target = outcome.target.workspace_id, outcome.target.alias
            fields = outcome.to_dict()
            claim = f"{name(target)} is {outcome.result}"
            if outcome.resumed and target not in run.settled_before:
                yield Problem("past", f"{claim} by an entry after its run began")
            line = fields["alias"], fields["at"], fields["result"]
            if not outcome.resumed and line not in written:
                yield Problem("journal", f"{claim}, and not in the journal")
