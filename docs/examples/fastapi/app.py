"""A service that stops one runtime, or many with progress as server-sent events.

    APP_TOKEN=… uvicorn --app-dir docs/examples/fastapi app:app --timeout-graceful-shutdown 10

Only clients that send the token can stop runtimes. Replace `require_token` by the login of your
app.

A bulk stop is a task of the process, not of its request. When the client disconnects or the server
shuts down, it sends nothing new, waits for the requests in flight, and logs its report.
"""

import asyncio
import logging
import os
import secrets
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, NamedTuple

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Request, Security, status
from fastapi.responses import FileResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
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
"""The most stops in flight in this process. If the responses to a hundred arrived at once, other
requests would wait for some 25 ms."""
PROGRESS_EVERY = 0.25
"""Seconds between two progress events."""
DRAIN = 5.0
"""Seconds to wait for stops in flight; less than uvicorn's graceful shutdown."""
MAX_FAILURES = 1000

log = logging.getLogger("uvicorn.error")


class Run(NamedTuple):
    """A bulk stop and its task."""

    batch: StopBatch
    task: asyncio.Task[StopReport]


class Runs:
    """The bulk stops of this process."""

    def __init__(self) -> None:
        self._running: set[Run] = set()
        self._shutting_down = False

    def __len__(self) -> int:
        return len(self._running)

    def start(self, batch: StopBatch) -> Run:
        run = Run(batch, asyncio.create_task(batch))
        self._running.add(run)
        run.task.add_done_callback(lambda _: self._log_report(run))
        if self._shutting_down:
            self.drain(run)
        return run

    def drain(self, run: Run) -> None:
        """Send nothing new, and abandon requests still in flight after `DRAIN` seconds."""
        if run in self._running:
            run.batch.stop_reading()
            asyncio.get_running_loop().call_later(DRAIN, run.batch.abort)

    def shut_down(self) -> None:
        self._shutting_down = True
        for run in self._running:
            self.drain(run)

    async def wait(self) -> None:
        while self._running:
            await asyncio.wait([run.task for run in self._running])

    def _log_report(self, run: Run) -> None:
        self._running.discard(run)
        report = run.batch.report
        counts = " ".join(f"{result}={count}" for result, count in report.counts.items())
        reason = f", ended early: {report.ended_early}" if report.ended_early else ""
        log.info("bulk stop: total=%d %s%s", report.total, counts, reason)


@contextmanager
def on_shutdown_signal(callback: Callable[[], None]) -> Iterator[None]:
    """Call back when the server receives SIGINT or SIGTERM.

    The lifespan ends only after the last response, which is too late to end a long one.
    """
    loop = asyncio.get_running_loop()
    previous: dict[int, Callable[[int, FrameType | None], object]] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(callback)
        previous[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(server := signal.getsignal(number)):
                previous[number] = server
                signal.signal(number, handle)
    try:
        yield
    finally:
        for caught, server in previous.items():
            signal.signal(caught, server)


@asynccontextmanager
async def own_lifespan(_: FastAPI) -> AsyncIterator[dict[str, Runs]]:
    runs = Runs()
    with on_shutdown_signal(runs.shut_down):
        yield {"runs": runs}
        runs.shut_down()
        await runs.wait()


bearer = HTTPBearer(auto_error=False, description="The token in APP_TOKEN.")


async def require_token(
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
) -> None:
    """Require the token in `APP_TOKEN`; refuse every request if it is not set.

    Replace this by the login of your app: it protects all that the app's API key can stop.
    """
    token = os.environ.get("APP_TOKEN", "")
    if not token:
        raise HTTPException(
            status.HTTP_503_SERVICE_UNAVAILABLE,
            "APP_TOKEN is not set, so nothing can be stopped.",
        )
    given = "" if credentials is None else credentials.credentials
    if not secrets.compare_digest(given.encode(), token.encode()):
        raise HTTPException(
            status.HTTP_401_UNAUTHORIZED, "The token is wrong.", {"WWW-Authenticate": "Bearer"}
        )


async def refuse_other_sites(request: Request) -> None:
    """Refuse a request that a page of another site makes in a visitor's browser.

    A browser sends forms to any site, with the visitor's cookies and from inside their network. It
    says so in `Sec-Fetch-Site`, or over plain http in `Origin`; other clients send neither.
    """
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is not None:
        is_own = site in {"same-origin", "none"}
    else:
        is_own = origin is None or origin.partition("://")[2] == request.headers.get("Host")
    if not is_own:
        raise HTTPException(status.HTTP_403_FORBIDDEN, "Refused: the request is from another site.")


MAY_STOP = [Depends(refuse_other_sites), Depends(require_token)]


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
        # FastAPI leaves a dependency as soon as the client disconnects. The generator of a path
        # operation would stay at its `yield` until it is garbage-collected.
        runs.drain(run)


class Health(BaseModel):
    """The health of this process, and the number of its bulk stops."""

    ok: bool
    running: int


class Progress(BaseModel):
    """The progress of a bulk stop."""

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
    """Report the health of the service."""
    return Health(ok=not session.closed, running=len(runs))


@app.post(
    "/workspaces/{workspace_id}/runtimes/{alias}/stop",
    dependencies=MAY_STOP,
    responses=PROBLEM_RESPONSES,
)
async def stop_one(workspace_id: str, alias: str, session: BctrlDep) -> RuntimeBody:
    """Stop one runtime."""
    return await session.stop_runtime(workspace_id, alias, stopped_ok=True)


@app.post("/stop", dependencies=MAY_STOP, response_class=EventSourceResponse)
async def stop_many(run: Annotated[Run, Depends(start_run)]) -> AsyncIterator[ServerSentEvent]:
    """Stop runtimes, given as pairs of workspace id and alias. Disconnecting ends the run.

    Sends a `progress` event four times a second, then a `report` with the first thousand failures.
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
    # Serializing a hundred thousand failures would block other requests.
    report = msgspec.structs.replace(report, failures=report.failures[:MAX_FAILURES])
    yield ServerSentEvent(event="report", raw_data=report_body.dump_json(report).decode())
