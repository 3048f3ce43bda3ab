"""The world of one run: the server, the network, and the use of the client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import anyio
from support.leaks import bulk_tasks
from support.pacing import MemoryPace

from bctrl_async import BctrlSession, Observer, Runtime
from bctrl_async._limiter.limiter import Limiter
from sim import climate as climates
from sim.bulk_stop import BulkStop
from sim.exchange import Target
from sim.loop import SimLoop
from sim.network import Network
from sim.plan import Ending, Kind, Plan
from sim.records import (
    BulkRun,
    SingleCall,
    is_correction,
    read_lines,
    settled_in,
    tear,
)
from sim.server import SimulatedServer
from sim.starts import OtherProgram

_KEY = "a-key-that-must-not-be-written"


class World:
    """The world of one run: the server, the network, and the use of the client.

    Args:
        plan: The plan.
        loop: The loop.
        folder: The folder of the journal.

    Attributes:
        runs: The bulk stops, in order.
        calls: The single calls.
        limiters: The limiters of the sessions.
        other: Another program, which starts runtimes.
        statuses: The statuses of the runtimes at the end.
    """

    def __init__(self, plan: Plan, loop: SimLoop, folder: Path) -> None:
        self.plan = plan
        self.loop = loop
        self.network = loop.network = Network(loop, plan.seed, plan.climate)
        loop.thread_delay = plan.thread_delay
        loop.has_threads = plan.has_threads
        loop.starve(plan.stalls)
        self._folder = folder
        self.runs: list[BulkRun] = []
        self.calls: list[SingleCall] = []
        self.limiters: list[Limiter] = []
        self.key = _KEY
        self.server = SimulatedServer(
            stop_seconds=plan.stop_seconds,
            list_faults=plan.list_faults,
            list_trouble=plan.list_trouble,
            # The list that a bulk stop takes its targets from is as planned.
            good_lists=plan.input == "workspace",
            timeout=plan.timeout,
            host=plan.host,
            api_key=_KEY,
            faults=plan.climate.server_faults,
            seed=plan.seed,
            latency=plan.latency,
        )

        self.other = OtherProgram(
            plan.starts, plan.workspace, plan.targets, self.server
        )
        if plan.starts:
            self.server.other = self.other

    def statuses(self) -> dict[Target, str | None]:
        """Return the true statuses."""
        return {target: self.server.status(*target) for target in self.plan.targets}

    async def run(self) -> None:
        """Use the client as planned, and wait until the network is quiet."""
        plan = self.plan
        for target, status in plan.status.items():
            if status is not None:
                self.server.add_runtime(*target, status=status)
        async with self.server:
            for span in plan.climate.outages:
                self.loop.call_at(span.start, self.network.crash)
            if plan.kind is Kind.CALLS:
                await self._make_calls()
            else:
                await self._bulk_runs()

    async def _bulk_runs(self) -> None:
        plan = self.plan
        path = self._folder / "journal.jsonl" if plan.journal else None
        first = self._new_run(path)
        await self._run_bulk(first, plan.ending)
        if path is None or not plan.resume or not path.exists():
            return
        tear(path, plan.torn)
        self.key = _KEY
        if plan.calm_resume:
            self.network.conditions = climates.Climate(frozenset(), plan.timeout)
            self.network.log(0, "the network is calm from here on")
        second = self._new_run(path)
        second.resumes = True
        second.settled_before = settled_in(path)
        await self._run_bulk(second, Ending.COMPLETED)

    def _new_run(self, path: Path | None) -> BulkRun:
        run = BulkRun(self.plan.items, self.statuses(), journal=path)
        run.ids = {
            self.server.id_of(target)
            for target, status in run.before.items()
            if status == "active"
        }
        run.first_exchange = len(self.network.exchanges)
        self.runs.append(run)
        return run

    def make_session(
        self, observer: Observer | None, http: aiohttp.ClientSession | None
    ) -> BctrlSession:
        """Make a session as planned."""
        plan = self.plan

        async def key() -> str:
            await asyncio.sleep(0.001)
            return self.key

        functions: dict[str | None, Any] = {
            None: self.key,
            "plain": lambda: self.key,
            "async": key,
        }
        session = BctrlSession(
            functions[plan.key_function],
            base_url=self.server.url,
            timeout=plan.timeout,
            max_connections=plan.max_connections,
            retry=plan.policy,
            rate=self._rate(),
            http=http,
            observer=observer,
        )
        self.limiters.append(session._sender.limiter)
        return session

    def _rate(self) -> float | MemoryPace | None:
        plan = self.plan
        if plan.pace is None:
            return plan.rate
        pace = MemoryPace(rate=plan.pace, latency=plan.store_latency)
        pace.outage = plan.store_outage
        return pace

    # Bulk stops

    async def _run_bulk(self, run: BulkRun, ending: Ending) -> None:
        self.network.log(0, f"a bulk stop begins, to be {ending}")
        run.began = self.loop.time()
        await BulkStop(self, run, ending).run()
        run.ended = self.loop.time()
        run.tasks_left = len(bulk_tasks())
        run.connections_left = sum(
            connection.client.protocol is not None
            for connection in self.network.connections
        )
        if run.journal is not None and run.journal.exists():
            lines, run.damaged = read_lines(run.journal)
            # A last look corrects a journal by lines that are no outcomes.
            run.lines = [line for line in lines if not is_correction(line)]
        run.last_exchange = len(self.network.exchanges)
        self.network.log(0, f"the bulk stop has ended: {run.raised!r}")
        # Stops that are on their way still take effect.
        await asyncio.sleep(30.0)
        run.after = self.statuses()
        run.restarted = {start.target for start in self.other.started}
        run.runs_on = {
            target: self.server.id_of(target)
            for target in run.restarted
            if self.server.status(*target) == "active"
        }

    # Single calls

    async def _make_calls(self) -> None:
        plan, rng = self.plan, self.plan.rng
        before = self.statuses()
        for target in plan.targets:
            cancel_after = 10 ** rng.uniform(-3.0, 1.0) if rng.random() < 0.15 else None
            reads, stopped_ok = rng.random() < 0.15, rng.random() < 0.3
            self.calls.append(
                SingleCall(target, reads, stopped_ok, before[target], cancel_after)
            )
        async with self.make_session(None, None) as session:
            tasks = [
                asyncio.create_task(
                    self._make_call(session, call, number * plan.spacing)
                )
                for number, call in enumerate(self.calls)
            ]
            await asyncio.wait(tasks)
            for task in tasks:
                task.result()
        await asyncio.sleep(30.0)

    async def _make_call(
        self, session: BctrlSession, call: SingleCall, delay: float
    ) -> None:
        await asyncio.sleep(delay)
        call.began = self.loop.time()
        extra: dict[str, Any] = {"stopped_ok": True} if call.stopped_ok else {}
        scope = anyio.CancelScope()
        if call.cancel_after is not None:
            scope.deadline = self.loop.time() + call.cancel_after
        try:
            with scope:
                if call.reads:
                    call.result = await session.get_runtime(*call.target)
                else:
                    call.result = await session.stop_runtime(*call.target, **extra)
        except Exception as error:  # noqa: BLE001 - the checks look at it.
            call.result = error
        call.ended = self.loop.time()
        result = (
            call.result.status
            if isinstance(call.result, Runtime)
            else repr(call.result)
        )
        self.network.log(0, f"call {'/'.join(call.target)}: {result}")
