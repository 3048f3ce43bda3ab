"""A service that stops runtimes: one, or many with their progress as server-sent events.

    uvicorn --app-dir docs/examples/fastapi app:app --timeout-graceful-shutdown 10

A bulk stop belongs to the process, not to the request that asked for it. When its client leaves, or
the server is told to end, it begins nothing new, waits for what is under way, and logs its report.
"""

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, NamedTuple

import msgspec
from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.alias_generators import to_camel

from bctrl_async import BctrlSession, RuntimeRef, StopBatch, StopReport, StopResult
from bctrl_async.fastapi import (
    PROBLEM_RESPONSES,
    BctrlDep,
    RuntimeBody,
    StopReportBody,
    add_exception_handlers,
    lifespan,
)

PAGE = Path(__file__).with_name("page.html")
IN_FLIGHT = 32
"""Stops under way at most in this process: the answers to a hundred, should they come all at once,
would keep other requests waiting for some 25 ms."""
PROGRESS_EVERY = 0.25
"""Seconds between two events of a bulk stop."""
DRAIN = 5.0
"""Seconds that stops under way have to be answered; less than uvicorn's graceful shutdown."""
MOST_FAILURES = 1000

log = logging.getLogger("uvicorn.error")


class Run(NamedTuple):
    """A bulk stop, and the task that it runs in."""

    batch: StopBatch
    task: asyncio.Task[StopReport]


class Runs:
    """The bulk stops of this process."""

    def __init__(self) -> None:
        self._running: set[Run] = set()
        self._ending = False

    def __len__(self) -> int:
        return len(self._running)

    def start(self, batch: StopBatch) -> Run:
        run = Run(batch, asyncio.create_task(batch))
        self._running.add(run)
        run.task.add_done_callback(lambda _: self._ended(run))
        if self._ending:
            self.wind_up(run)
        return run

    def wind_up(self, run: Run) -> None:
        """Begin nothing new, and wait for what is under way, but not for ever."""
        if run in self._running:
            run.batch.stop_reading()
            asyncio.get_running_loop().call_later(DRAIN, run.batch.abort)

    def wind_all_up(self) -> None:
        self._ending = True
        for run in self._running:
            self.wind_up(run)

    async def wait(self) -> None:
        while self._running:
            await asyncio.wait([run.task for run in self._running])

    def _ended(self, run: Run) -> None:
        self._running.discard(run)
        report = run.batch.report
        counts = " ".join(f"{result}={count}" for result, count in report.counts.items())
        why = f", ended early: {report.ended_early}" if report.ended_early else ""
        log.info("bulk stop: total=%d %s%s", report.total, counts, why)


@contextmanager
def calling_at_the_end(call: Callable[[], None]) -> Iterator[None]:
    """Call it when the server is told to end.

    The lifespan hears of that only after the last answer, which is too late to end a long one.
    """
    loop = asyncio.get_running_loop()
    former: dict[int, Callable[[int, FrameType | None], object]] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(call)
        former[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(server := signal.getsignal(number)):
                former[number] = server
                signal.signal(number, handle)
    try:
        yield
    finally:
        for caught, server in former.items():
            signal.signal(caught, server)


@asynccontextmanager
async def own_lifespan(_: FastAPI) -> AsyncIterator[dict[str, Runs]]:
    runs = Runs()
    with calling_at_the_end(runs.wind_all_up):
        yield {"runs": runs}
        runs.wind_all_up()
        await runs.wait()


async def get_runs(request: Request) -> Runs:
    runs: Runs = request.state.runs
    return runs


RunsDep = Annotated[Runs, Depends(get_runs)]


async def start_run(
    targets: list[RuntimeRef], session: BctrlDep, runs: RunsDep
) -> AsyncIterator[Run]:
    run = runs.start(session.stop_runtimes(targets))
    try:
        yield run
    finally:
        # FastAPI comes here as soon as the client has left, while it leaves the generator of a path
        # operation, which waits at its `yield`, to the garbage collector.
        runs.wind_up(run)


class Health(BaseModel):
    """Whether this process can stop anything, and how many bulk stops it is at."""

    ok: bool
    running: int


class Progress(BaseModel):
    """How far a bulk stop is."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, serialize_by_alias=True
    )

    total: int
    in_flight: int
    is_throttled: bool
    is_unanswered: bool
    counts: dict[StopResult, int]


app = FastAPI(
    title="Stopping runtimes",
    lifespan=lifespan(partial(BctrlSession, max_connections=IN_FLIGHT), inner=own_lifespan),
)
add_exception_handlers(app)
report_body: TypeAdapter[StopReport] = TypeAdapter(StopReportBody)


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(PAGE)


@app.get("/health")
async def health(session: BctrlDep, runs: RunsDep) -> Health:
    """Tell whether the service can be used."""
    return Health(ok=not session.closed, running=len(runs))


@app.post("/workspaces/{workspace_id}/runtimes/{alias}/stop", responses=PROBLEM_RESPONSES)
async def stop_one(workspace_id: str, alias: str, session: BctrlDep) -> RuntimeBody:
    """Stop one runtime."""
    return await session.stop_runtime(workspace_id, alias)


@app.post("/stop", response_class=EventSourceResponse)
async def stop_many(run: Annotated[Run, Depends(start_run)]) -> AsyncIterator[ServerSentEvent]:
    """Stop runtimes, given as pairs of workspace id and alias; who leaves ends the run.

    There is a `progress` event four times a second, and at the end a `report` with the first
    thousand failures.
    """
    batch, task = run
    while not task.done():
        yield ServerSentEvent(
            event="progress",
            data=Progress(
                total=batch.total or 0,
                in_flight=batch.in_flight,
                is_throttled=batch.is_throttled,
                is_unanswered=batch.is_unanswered,
                counts=batch.counts,
            ),
        )
        await asyncio.wait([task], timeout=PROGRESS_EVERY)
    report = task.result()
    # Writing down a hundred thousand failures would keep everybody else waiting.
    report = msgspec.structs.replace(report, failures=report.failures[:MOST_FAILURES])
    yield ServerSentEvent(event="report", raw_data=report_body.dump_json(report).decode())
