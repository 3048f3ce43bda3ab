"""A service that hands bulk stops to workers, so that they outlive it.

    APP_TOKEN=… uvicorn --app-dir docs/examples/docket web:app

Only clients that send the token can stop runtimes. Replace `require_token` by the login
of your app.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated
from uuid import UUID, uuid4

from docket.execution import ExecutionState
from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response, status
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from redis.exceptions import RedisError
from stops import count_outcomes, docket, save_targets, stop_many

from bctrl_async import RuntimeRef, StopResult
from bctrl_async.fastapi import StopReport

TOKEN = os.environ["APP_TOKEN"]


class Accepted(BaseModel):
    """A bulk stop that is in the queue."""

    id: UUID


class Stop(BaseModel):
    """The state of a bulk stop.

    `scheduled` is between two runs. The state is null when the queue has forgotten the
    stop: a day after its end, or if it lost its data.
    """

    id: UUID
    state: ExecutionState | None
    total: int
    counts: dict[StopResult, int]
    report: StopReport | None = None


async def require_token(
    credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())],
) -> None:
    if not secrets.compare_digest(credentials.credentials.encode(), TOKEN.encode()):
        raise HTTPException(status.HTTP_401_UNAUTHORIZED, "The token is wrong.")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with docket:
        yield


app = FastAPI(
    title="Bulk stops in a queue",
    lifespan=lifespan,
    dependencies=[Depends(require_token)],
)


@app.exception_handler(RedisError)
async def queue_is_away(_: Request, __: Exception) -> JSONResponse:
    detail = "The queue is away. Repeat the request with the same Idempotency-Key."
    return JSONResponse(
        {"detail": detail}, status.HTTP_503_SERVICE_UNAVAILABLE, {"Retry-After": "5"}
    )


@app.post("/stops", status_code=status.HTTP_202_ACCEPTED)
async def create_stop(
    targets: list[RuntimeRef],
    request: Request,
    response: Response,
    idempotency_key: Annotated[UUID | None, Header()] = None,
) -> Accepted:
    """Stop runtimes, given as pairs of workspace id and alias, in a worker.

    A repeated request with the same `Idempotency-Key` changes nothing while the stop is
    in the queue. After its end, it tries the failures again.
    """
    stop_id = idempotency_key or uuid4()
    if not await asyncio.to_thread(save_targets, stop_id, dict.fromkeys(targets)):
        raise HTTPException(
            status.HTTP_422_UNPROCESSABLE_CONTENT,
            "This Idempotency-Key was used for other targets.",
        )
    await docket.add(stop_many, key=str(stop_id))(stop_id)
    response.headers["Location"] = request.url_for("show_stop", stop_id=stop_id).path
    return Accepted(id=stop_id)


@app.get("/stops/{stop_id}")
async def show_stop(stop_id: UUID) -> Stop:
    """Show a bulk stop: its counts so far, and in the end its report."""
    execution = await docket.get_execution(str(stop_id))
    state = None if execution is None else execution.state
    try:
        total, counts = await asyncio.to_thread(count_outcomes, stop_id)
    except FileNotFoundError:
        raise HTTPException(
            status.HTTP_404_NOT_FOUND, "There is no such stop."
        ) from None
    report = None
    if execution is not None and state is ExecutionState.COMPLETED:
        report = await execution.get_result()
    return Stop(id=stop_id, state=state, total=total, counts=counts, report=report)
