"""The lifespan, the dependency that returns its session, and the exception handler."""

import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from functools import partial
from http import HTTPStatus
from operator import attrgetter
from typing import Annotated, Any

from bctrl_async._config import check_type, invalid_type, missing_extra, per_second

try:
    from fastapi import (
        Depends,
        FastAPI,
        Response,
        WebSocket,
        WebSocketDisconnect,
        status,
    )
    from fastapi.requests import HTTPConnection
except ModuleNotFoundError as _error:
    raise missing_extra(_error, "fastapi") from _error

from bctrl_async import BctrlConfigError, BctrlError, BctrlSession
from bctrl_async.errors import THROTTLED, log_fields
from bctrl_async.fastapi._problems import MEDIA_TYPE, classify, problem
from bctrl_async.pace import Pace

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any]]]
PlainLifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_log = logging.getLogger("bctrl_async.fastapi")  # The docs name this logger.
_STATE_KEY = "bctrl_session"
_MAX_RETRY_AFTER = 60
"""The most seconds of our Retry-After: those of the API may be a mistake."""


def lifespan(
    make_session: Callable[[], BctrlSession] = BctrlSession,
    *,
    rate: float | Pace | None = None,
    inner: Lifespan | PlainLifespan | None = None,
) -> Lifespan:
    """Make a lifespan that opens a session at startup and closes it at shutdown.

    Args:
        make_session: Called at each startup; by default the environment configures the
            session. With fewer `max_connections` a bulk stop delays the app's other
            requests less.
        rate: The most attempts a second of each worker process, or of all together if
            it is a pace, such as `bctrl_async.pace.FilePace`. A `make_session` of your
            own passes it to the session instead.
        inner: The app's own lifespan. It starts after the session is open
            (`app.state.bctrl_session`) and ends before it is closed; the state it
            yields is kept.

    Returns:
        The lifespan to pass as `FastAPI(lifespan=…)`.

    Raises:
        BctrlConfigError: An argument is invalid, or both `make_session` and `rate` are
            given.
    """
    # These checks would come late, and far from the call, if they were made at startup.
    if not callable(make_session):
        raise invalid_type(
            "make_session", type(make_session), "a function that makes sessions"
        )
    if inner is not None and not callable(inner):
        raise invalid_type("inner", type(inner), "a lifespan, which takes the app")
    if rate is not None:
        if not isinstance(rate, Pace):
            per_second(rate, "rate")
        if make_session is not BctrlSession:
            raise BctrlConfigError(
                "rate= would not reach the session of make_session=",
                advice="Pass it to the BctrlSession that is made there",
                argument="rate",
            )
        make_session = partial(BctrlSession, rate=rate)

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(make_session())
            app.state.bctrl_session = session
            state: Mapping[str, Any] | None = None
            if inner is not None:
                state = await stack.enter_async_context(inner(app))
            # The server passes the state to every request, mounted apps included.
            yield {**(state or {}), _STATE_KEY: session}

    return run


# FastAPI would run a plain function in a thread, which is slow under load.
async def get_session(connection: HTTPConnection) -> BctrlSession:
    """Return the app's session.

    It outlives the request, so background tasks may use it. Tests can replace it with
    `app.dependency_overrides[get_session]`. A mounted app has overrides of its own.

    Args:
        connection: The request or WebSocket.

    Raises:
        BctrlConfigError: The app runs without its lifespan.
    """
    # Some servers and test clients do not pass the lifespan state to requests.
    fallback = getattr(connection.app.state, _STATE_KEY, None)
    session: BctrlSession | None = getattr(connection.state, _STATE_KEY, fallback)
    if session is None:
        raise BctrlConfigError(
            "the app has no bctrl session",
            advice="Create it with FastAPI(lifespan=lifespan()); in tests use "
            "`with TestClient(app)` or override get_session",
        )
    return session


BctrlDep = Annotated[BctrlSession, Depends(get_session)]
"""The app's session as a parameter: `session: BctrlDep`."""


def add_exception_handlers(app: FastAPI) -> None:
    """Answer every BctrlError with a problem (RFC 9457).

    The app's own errors stay as they are. An ExceptionGroup of BctrlErrors alone, as a
    `TaskGroup` or `raise_for_failures` raises it, is answered with the problem of its
    first error that leaves a stop in doubt, or else of its first, unless the app has
    its own handler of groups.

    The response hides the API's own text, so groups, and errors that become a 5xx, are
    logged in full under `bctrl_async.fastapi`. A WebSocket is closed with the problem's
    detail.

    A mounted app has handlers of its own: call this for each.

    Args:
        app: The app.

    Raises:
        BctrlConfigError: The app is not a FastAPI app; a router has no handlers.
    """
    check_type(app, FastAPI, "app", "a FastAPI app")
    app.exception_handler(BctrlError)(_respond)
    # FastAPI's type of handlers leaves out those of WebSockets, which return None.
    handlers: dict[Any, Any] = app.exception_handlers
    handlers.setdefault(ExceptionGroup, _respond)


def _leaves(exception: Exception) -> list[Exception]:
    """Return the errors of a group, or the error itself."""
    if not isinstance(exception, ExceptionGroup):
        return [exception]
    return [leaf for error in exception.exceptions for leaf in _leaves(error)]


async def _respond(connection: HTTPConnection, exception: Exception) -> Response | None:
    leaves = _leaves(exception)
    errors = [error for error in leaves if isinstance(error, BctrlError)]
    if len(errors) < len(leaves):
        # The group has other errors, which the app answers itself.
        raise exception
    # This is the first error in doubt, or else the first: a stop that may have worked
    # must not be hidden by another that has not.
    error = max(errors, key=attrgetter("may_have_stopped"))
    problem_type = classify(error)
    is_group = isinstance(exception, ExceptionGroup)
    if is_group or problem_type.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        # The line has one error; `exc_info` adds the group that is being handled.
        _log.warning(
            "%s",
            error,
            exc_info=is_group,
            extra={"bctrl.event": "request_failed", **log_fields(error)},
        )
    if isinstance(connection, WebSocket):
        close_code = status.WS_1011_INTERNAL_ERROR
        if problem_type.status in THROTTLED:
            close_code = status.WS_1013_TRY_AGAIN_LATER
        # The client may have disconnected.
        with suppress(WebSocketDisconnect, RuntimeError):
            await connection.close(close_code, problem_type.detail)
        return None
    headers = {}
    if error.retry_after is not None and problem_type.status in THROTTLED:
        headers["Retry-After"] = str(
            math.ceil(min(error.retry_after, _MAX_RETRY_AFTER))
        )
    body = problem(error).model_dump_json(exclude_none=True)
    return Response(body, problem_type.status, headers, MEDIA_TYPE)
