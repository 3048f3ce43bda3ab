"""A lifespan with a session, the dependency that returns it, and the exception handlers."""

import json
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from http import HTTPStatus
from typing import Annotated, Any

try:
    from fastapi import Depends, FastAPI, Response, WebSocket, WebSocketDisconnect, status
    from fastapi.requests import HTTPConnection
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        "bctrl_async.fastapi needs FastAPI: python -m pip install 'bctrl-async[fastapi]'",
        name=_error.name,
    ) from _error

from bctrl_async import BctrlConfigError, BctrlError, BctrlSession
from bctrl_async.errors import THROTTLED
from bctrl_async.fastapi._problems import MEDIA_TYPE, problem, told

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any]]]
PlainLifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_log = logging.getLogger("bctrl_async.fastapi")  # Documented, so not this file's name.
_KEY = "bctrl_session"


def lifespan(
    make_session: Callable[[], BctrlSession] = BctrlSession,
    *,
    inner: Lifespan | PlainLifespan | None = None,
) -> Lifespan:
    """Make a lifespan that opens a session with the app and closes it with the app.

    Args:
        make_session: Makes the session, each time the app starts; from the environment as it is.
            With fewer `max_connections` a bulk stop keeps other requests waiting for less long.
        inner: The app's own lifespan. It starts when the session is open
            (`app.state.bctrl_session`) and ends before it is closed, and the state that it yields
            is kept.

    Returns:
        What to pass as `FastAPI(lifespan=…)`.
    """

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(make_session())
            app.state.bctrl_session = session
            own: Mapping[str, Any] | None = None
            if inner is not None:
                own = await stack.enter_async_context(inner(app))
            # The server hands the state to every request, also to those of mounted applications.
            yield {**(own or {}), _KEY: session}

    return run


# FastAPI runs a plain function in a thread, which a busy loop keeps waiting.
async def get_session(connection: HTTPConnection) -> BctrlSession:
    """Return the app's session; it outlives the request, so background tasks may use it.

    In tests, `app.dependency_overrides[get_session]` puts another one in its place; an application
    that is mounted has overrides of its own.

    Args:
        connection: The request, or the WebSocket.

    Raises:
        BctrlConfigError: The app runs without its lifespan.
    """
    session: BctrlSession | None = getattr(connection.state, _KEY, None)
    if session is None:
        # Not every server hands the state on, nor do all that run an app in tests.
        session = getattr(connection.app.state, _KEY, None)
    if session is None:
        raise BctrlConfigError(
            "the app has no bctrl session",
            advice="Make it with FastAPI(lifespan=lifespan()); in tests use `with TestClient(app)` "
            "or override get_session",
        )
    return session


BctrlDep = Annotated[BctrlSession, Depends(get_session)]
"""The app's session as a parameter: `session: BctrlDep`."""


def add_exception_handlers(app: FastAPI) -> None:
    """Answer every BctrlError with a problem (RFC 9457), and close a WebSocket with its text.

    What the caller is not told, the log `bctrl_async.fastapi` is where it is not the caller's
    fault. An application that is mounted has handlers of its own, so call it for each.

    Args:
        app: The application.
    """

    @app.exception_handler(BctrlError)
    async def answer(connection: HTTPConnection, error: BctrlError) -> Response | None:
        stands_for, detail = told(error)
        if stands_for >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.warning("%s", error)
        if isinstance(connection, WebSocket):
            code = status.WS_1011_INTERNAL_ERROR
            if stands_for in THROTTLED:
                code = status.WS_1013_TRY_AGAIN_LATER
            with suppress(WebSocketDisconnect, RuntimeError):  # Its client may have left.
                await connection.close(code, detail)
            return None
        headers = {}
        if error.retry_after is not None and stands_for in THROTTLED:
            headers["Retry-After"] = str(math.ceil(error.retry_after))
        return Response(
            # ASCII, as half of a surrogate pair in an alias could not be sent otherwise.
            json.dumps(problem(error)),
            status_code=stands_for,
            headers=headers,
            media_type=MEDIA_TYPE,
        )
