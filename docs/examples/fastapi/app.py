"""A service with a page that stops many runtimes and shows their progress.

APP_TOKEN=… uvicorn --app-dir docs/examples/fastapi app:app
"""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Security
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel

from bctrl_async import BctrlSession, RuntimeRef, StopBatch, StopResult
from bctrl_async.fastapi import BctrlDep, StopReport, lifespan

PAGE = Path(__file__).with_name("page.html").read_text("utf-8")
BEARER = HTTPBearer(auto_error=False)
KEEP = 600.0  # Seconds for which a report is kept.
RUNS: dict[str, tuple[StopBatch, asyncio.Task[StopReport]]] = {}


@asynccontextmanager
async def drain_at_shutdown(_: FastAPI) -> AsyncIterator[None]:
    yield
    for end in (StopBatch.stop_reading, StopBatch.abort):
        if running := {task: batch for batch, task in RUNS.values() if not task.done()}:
            for batch in running.values():
                end(batch)
            await asyncio.wait(running, timeout=5.0)


async def require_token(
    authorization: Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)],
) -> None:
    token = os.environ.get("APP_TOKEN")
    if not token:
        raise HTTPException(403, "APP_TOKEN is not set, so nothing can be stopped.")
    credentials = "" if authorization is None else authorization.credentials
    if not secrets.compare_digest(credentials.encode(), token.encode()):
        raise HTTPException(401, "The token is wrong.", {"WWW-Authenticate": "Bearer"})


class Progress(BaseModel):
    total: int
    in_flight: int
    is_throttled: bool
    is_unanswered: bool
    counts: dict[StopResult, int]
    report: StopReport | None


MAY_STOP = [Depends(require_token)]  # Replace it by the login of your app.
# A hundred answers at once would hold up other requests.
app = FastAPI(
    lifespan=lifespan(lambda: BctrlSession(max_connections=32), inner=drain_at_shutdown)
)


@app.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    # The page keeps the token, so no other script runs there.
    nonce = secrets.token_urlsafe()
    policy = f"default-src 'nonce-{nonce}'; connect-src 'self'; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy}
    return HTMLResponse(PAGE.replace("NONCE", nonce), headers=headers)


@app.post("/runs", status_code=202, dependencies=MAY_STOP)
async def start(targets: list[RuntimeRef], session: BctrlDep) -> str:
    """Start to stop pairs of workspace and alias, and return the id of the run."""

    async def run() -> StopReport:
        report = await batch
        logging.getLogger("uvicorn.error").info("bulk stop: %s", report)
        asyncio.get_running_loop().call_later(KEEP, RUNS.pop, run_id, None)
        # A hundred thousand failures would hold up other requests.
        return msgspec.structs.replace(report, failures=report.failures[:1000])

    run_id, batch = secrets.token_urlsafe(), session.stop_runtimes(targets)
    RUNS[run_id] = (batch, asyncio.create_task(run()))
    return run_id


async def find(run_id: str) -> tuple[StopBatch, asyncio.Task[StopReport]]:
    if run_id not in RUNS:
        raise HTTPException(
            404, "There is no such run: it ended long ago, or the app restarted."
        )
    return RUNS[run_id]


RunDep = Annotated[tuple[StopBatch, asyncio.Task[StopReport]], Depends(find)]


@app.get("/runs/{run_id}", dependencies=MAY_STOP)  # noqa: FAST003 - `find` has it.
async def progress(run: RunDep) -> Progress:
    batch, task = run
    report = task.result() if task.done() else None
    fields = msgspec.structs.asdict(batch.progress)
    fields |= {"total": batch.total, "counts": batch.counts, "report": report}
    return Progress(**fields)


@app.post("/runs/{run_id}/cancel", dependencies=MAY_STOP)  # noqa: FAST003 - as above.
async def cancel(run: RunDep) -> None:
    """Send nothing new; the requests in flight get their answers."""
    run[0].stop_reading()
