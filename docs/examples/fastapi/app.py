"""A service that stops one runtime, or many with progress as server-sent events.

    APP_TOKEN=… uvicorn --app-dir docs/examples/fastapi app:app --timeout-graceful-shutdown 20

Only clients that send the token can stop runtimes. Replace `require_token` by the login of your
app.

A bulk stop is a task of the process, not of its request: a client that lost its connection can come
back to it. If none does, if it is cancelled, or when the server shuts down, it sends nothing new,
waits for the requests in flight, and logs its report.
"""

import asyncio
import os
import pathlib
import re
import secrets
import signal
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from hashlib import sha256
from types import FrameType
from typing import Annotated, Any

from events import REPORT, Event, events
from fastapi import (
    Body,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Path,
    Request,
    Response,
    Security,
    status,
)
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.sse import EventSourceResponse
from pydantic import BaseModel, Field
from runs import MAX_RUNNING, Run, Runs

from bctrl_async import BctrlSession, BctrlTimeoutError, RetryPolicy, RuntimeRef
from bctrl_async.fastapi import (
    PROBLEM_RESPONSES,
    BctrlDep,
    Runtime,
    add_exception_handlers,
    lifespan,
)

PAGE = pathlib.Path(__file__).with_name("page.html").read_text("utf-8")
IN_FLIGHT = 32
"""The most stops in flight in this process. If the responses to a hundred arrived at once, other
requests would wait for some 25 ms."""
ATTEMPT = 8.0
"""Seconds for each of the two attempts of a single stop."""
LIMIT = 18.0
"""Seconds for a single stop with all that comes on top: waits while it is throttled, and a look-up
of the runtime after a conflict. It is over before uvicorn's graceful shutdown is, so the client
gets a problem and not a bare 500."""
WHILE_A_CLIENT_WAITS = RetryPolicy(attempts=2, patience=ATTEMPT)
UNAUTHORIZED = "The token is wrong."
FORBIDDEN = "Refused: the request is from another site."
NOT_CONFIGURED = "APP_TOKEN is not set, so nothing can be stopped."
NO_RUN = "There is no such run: it ended too long ago, or the service was restarted."
TOO_MANY = f"{MAX_RUNNING} bulk stops are running. Wait until one has ended."


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
) -> str:
    """Require the token in `APP_TOKEN`; refuse every request if it is not set.

    Replace this by the login of your app: it protects all that the app's API key can stop.

    Returns:
        The name of the user, to whom the runs belong that they start. All who have the token are
        one user.
    """
    token = os.environ.get("APP_TOKEN", "")
    if not token:
        raise HTTPException(status.HTTP_403_FORBIDDEN, NOT_CONFIGURED)
    given = "" if credentials is None else credentials.credentials
    if not secrets.compare_digest(given.encode(), token.encode()):
        raise HTTPException(
            status.HTTP_401_UNAUTHORIZED, UNAUTHORIZED, {"WWW-Authenticate": "Bearer"}
        )
    return "token"


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
        raise HTTPException(status.HTTP_403_FORBIDDEN, FORBIDDEN)


MAY_STOP = [Depends(refuse_other_sites), Depends(require_token)]


async def get_runs(request: Request) -> Runs:
    runs: Runs = request.state.runs
    return runs


RunsDep = Annotated[Runs, Depends(get_runs)]
UserDep = Annotated[str, Depends(require_token)]


async def start_run(
    *,
    targets: Annotated[list[RuntimeRef], Body(examples=[[["demo", "runtime-0001"]]])],
    user: UserDep,
    session: BctrlDep,
    runs: RunsDep,
    request: Request,
    response: Response,
) -> AsyncIterator[Run]:
    if runs.is_full:
        raise HTTPException(status.HTTP_429_TOO_MANY_REQUESTS, TOO_MANY, {"Retry-After": "10"})
    run = runs.start(user, session.stop_runtimes(targets))
    response.headers["Content-Location"] = request.url_for("follow", run_id=run.id).path
    # FastAPI leaves a dependency as soon as the client disconnects. The generator of a path
    # operation would stay at its `yield` until it is garbage-collected.
    with run.followed():
        yield run


async def find_run(
    run_id: Annotated[str, Path(description="The end of the run's `Content-Location`.")],
    user: UserDep,
    runs: RunsDep,
) -> Run:
    run = runs.find(run_id, user)
    if run is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, NO_RUN)
    return run


RunDep = Annotated[Run, Depends(find_run)]


async def join_run(
    run: RunDep,
    last_event_id: Annotated[
        str | None, Header(description="With `report`, the answer is 204: there is no more.")
    ] = None,
) -> AsyncIterator[Run]:
    if last_event_id == REPORT:
        # An EventSource connects again when a response ends, unless it gets this one.
        raise HTTPException(status.HTTP_204_NO_CONTENT)
    with run.followed():
        yield run


def refusals(details: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """Describe what FastAPI makes of an HTTPException of the app, as its OpenAPI does not."""
    detail = {
        "type": "object",
        "properties": {"detail": {"type": "string"}},
        "required": ["detail"],
    }
    content = {"application/json": {"schema": detail}}
    details = {401: UNAUTHORIZED, 403: f"{FORBIDDEN} Or: {NOT_CONFIGURED}"} | details
    return {code: {"description": text, "content": content} for code, text in details.items()}


class Health(BaseModel):
    """The health of this process, and the number of its bulk stops."""

    ok: Annotated[bool, Field(description="False if the session is closed.")]
    running: Annotated[int, Field(description="The number of bulk stops that run.", ge=0)]


app = FastAPI(
    title="Stopping runtimes",
    version="1.0.0",
    description="Stops runtimes of bctrl: one, or many with progress as server-sent events. "
    "Errors of calls of the bctrl API are problem details (RFC 9457).",
    openapi_tags=[
        {"name": "runtimes", "description": "Stop one runtime, or many."},
        {"name": "runs", "description": "Bulk stops: come back to one, or cancel it."},
        {"name": "service", "description": "The service itself."},
    ],
    # The default has the path in it, which makes long names in generated clients.
    generate_unique_id_function=lambda route: route.name,
    lifespan=lifespan(partial(BctrlSession, max_connections=IN_FLIGHT), inner=own_lifespan),
)
app.openapi_version = "3.2.0"  # The first with `itemSchema`, by which FastAPI describes events.
add_exception_handlers(app)


def hash_of(element: str) -> str:
    """Return the source expression that lets a browser run this inline element of the page."""
    [text] = re.findall(f"<{element}.*?>(.*?)</{element}>", PAGE, re.DOTALL)
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


# The page keeps the token, so no script runs there but its own.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {hash_of('script')}; style-src {hash_of('style')}; "
        "img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}


@app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE, headers=PAGE_HEADERS)


@app.get("/health", tags=["service"], summary="Report the health of the service")
async def health(session: BctrlDep, runs: RunsDep) -> Health:
    return Health(ok=not session.closed, running=len(runs.running))


@app.post(
    # An alias may have a slash, which servers decode before they pass on the path.
    "/workspaces/{workspace_id}/runtimes/{alias:path}/stop",
    dependencies=MAY_STOP,
    tags=["runtimes"],
    summary="Stop one runtime",
    response_description=(
        "The runtime as the server described it; `status` says whether it is stopped."
    ),
    responses=PROBLEM_RESPONSES | refusals({}),
)
async def stop_one(
    workspace_id: Annotated[str, Path(description="The id of the workspace.", examples=["demo"])],
    alias: Annotated[str, Path(description="The alias of the runtime.", examples=["runtime-0001"])],
    session: BctrlDep,
) -> Runtime:
    """Stop a runtime, or return it if it was not running: it is safe to repeat.

    `status` is `active` if the stop was accepted and is not finished, or if the runtime was started
    anew before the call read it.
    """
    try:
        async with asyncio.timeout(LIMIT):
            return await session.stop_runtime(
                workspace_id, alias, stopped_ok=True, timeout=ATTEMPT, retry=WHILE_A_CLIENT_WAITS
            )
    except BctrlTimeoutError:
        raise
    except TimeoutError as error:
        # The attempts of a cancelled call are not known, so at least one is assumed.
        raise BctrlTimeoutError(
            f"not settled within {LIMIT:g} s",
            operation="stop",
            workspace_id=workspace_id,
            alias=alias,
            attempts=1,
            may_have_stopped=True,
        ) from error


PATH_OF_RUN = {
    "Content-Location": {
        "description": "The path of the run, to come back to it.",
        "schema": {"type": "string", "examples": ["/runs/dXuC2u4ZbKzO8n0YyQ0mXw"]},
    }
}
UNKNOWN_RUN = refusals({404: NO_RUN})


@app.post(
    "/stop",
    dependencies=MAY_STOP,
    tags=["runtimes"],
    summary="Stop many runtimes",
    response_class=EventSourceResponse,
    response_description="The events of the run.",
    responses=refusals({429: TOO_MANY}) | {200: {"headers": PATH_OF_RUN}},
)
async def stop_many(run: Annotated[Run, Depends(start_run)]) -> AsyncIterator[Event]:
    """Stop runtimes, given as pairs of workspace id and alias.

    Sends a `progress` event four times a second, then a `report` with the first thousand failures.
    A client that lost the connection has 30 seconds to come back, with a GET of the
    `Content-Location`: after that nothing new is sent.
    """
    async for event in events(run):
        yield event


@app.get(
    "/runs/{run_id}",  # noqa: FAST003 - find_run has the parameter.
    dependencies=MAY_STOP,
    tags=["runs"],
    summary="Come back to a run",
    response_class=EventSourceResponse,
    response_description="The events of the run from now on.",
    responses=UNKNOWN_RUN | {204: {"description": "The client has the report already."}},
)
async def follow(run: Annotated[Run, Depends(join_run)]) -> AsyncIterator[Event]:
    """Join a run again, or get its report, which is kept for ten minutes."""
    async for event in events(run):
        yield event


@app.post(
    "/runs/{run_id}/cancel",  # noqa: FAST003 - find_run has the parameter.
    status_code=status.HTTP_204_NO_CONTENT,
    dependencies=MAY_STOP,
    tags=["runs"],
    summary="Cancel a run",
    response_description="The run ends.",
    responses=UNKNOWN_RUN,
)
async def cancel(run: RunDep) -> None:
    """End a run: nothing new is sent. Its report follows when requests in flight have ended."""
    run.drain()
