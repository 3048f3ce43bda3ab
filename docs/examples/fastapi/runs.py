"""The bulk stops of this process, which a client can leave and join again."""

import asyncio
import json
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from fastapi.encoders import jsonable_encoder

from bctrl_async import StopBatch

DRAIN = 5.0
"""Seconds to wait for stops in flight; less than uvicorn's graceful shutdown."""
REJOIN = 30.0
"""Seconds in which a client can come back to a run, as a reloaded page does; then it is drained."""
KEEP = 600.0
"""Seconds for which a report is kept."""
MAX_RUNNING = 16
MAX_FINISHED = 32
MAX_FAILURES = 1000

log = logging.getLogger("uvicorn.error")


class Run:
    """A bulk stop, and in the end its report.

    Attributes:
        id: Names the run in URLs. It gives no access: that is for the owner only.
        owner: The user who started the run.
        batch: The bulk stop. It has all targets, so it is deleted when the run has ended.
        task: The task of the bulk stop.
        report: The report as JSON, with the first thousand failures; None while the run goes on.
    """

    batch: StopBatch
    task: asyncio.Task[None]

    def __init__(self, owner: str) -> None:
        self.id = secrets.token_urlsafe(16)
        self.owner = owner
        self.report: str | None = None
        self._clients = 0
        self._leaving: asyncio.TimerHandle | None = None

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Count a client; the run is drained if the last one has left and none comes back."""
        self._clients += 1
        if self._leaving is not None:
            self._leaving.cancel()
        try:
            yield
        finally:
            self._clients -= 1
            if self._clients == 0 and self.report is None:
                self._leaving = asyncio.get_running_loop().call_later(REJOIN, self.drain)

    def drain(self) -> None:
        """Send nothing new, and abandon requests still in flight after `DRAIN` seconds."""
        if self.report is None:
            self.batch.stop_reading()
            asyncio.get_running_loop().call_later(DRAIN, self.batch.abort)


class Runs:
    """The bulk stops that run, and those that ended lately."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._shutting_down = False

    @property
    def running(self) -> list[Run]:
        return [run for run in self._runs.values() if run.report is None]

    @property
    def is_full(self) -> bool:
        return len(self.running) >= MAX_RUNNING

    def start(self, owner: str, batch: StopBatch) -> Run:
        run = Run(owner)
        run.batch = batch
        run.task = asyncio.create_task(self._work(run))
        self._runs[run.id] = run
        if self._shutting_down:
            run.drain()
        return run

    def find(self, run_id: str, owner: str) -> Run | None:
        """Return a run of this owner, or None: another's run is as unknown as a forgotten one."""
        run = self._runs.get(run_id)
        return run if run is not None and run.owner == owner else None

    def shut_down(self) -> None:
        self._shutting_down = True
        for run in self.running:
            run.drain()

    async def wait(self) -> None:
        while running := self.running:
            await asyncio.wait([run.task for run in running])

    async def _work(self, run: Run) -> None:
        try:
            await run.batch
        finally:
            self._finish(run)

    def _finish(self, run: Run) -> None:
        report = run.batch.report
        del run.batch
        counts = " ".join(f"{result}={count}" for result, count in report.counts.items())
        reason = f", ended early: {report.ended_early}" if report.ended_early else ""
        log.info("bulk stop: total=%d %s%s", report.total, counts, reason)
        # Serializing a hundred thousand failures would block other requests. As JSON, a report
        # holds neither errors nor their tracebacks.
        report = msgspec.structs.replace(report, failures=report.failures[:MAX_FAILURES])
        run.report = json.dumps(jsonable_encoder(report))
        # The oldest are those that ended first, not those that began first.
        self._runs[run.id] = self._runs.pop(run.id)
        asyncio.get_running_loop().call_later(KEEP, self._runs.pop, run.id, None)
        finished = [each.id for each in self._runs.values() if each.report is not None]
        for oldest in finished[:-MAX_FINISHED]:
            del self._runs[oldest]
