"""FastAPI: a session for the life of an app, a dependency that hands it out, errors as problems.

All of an application:

    app = FastAPI(lifespan=lifespan())
    add_exception_handlers(app)

    @app.post("/workspaces/{workspace_id}/runtimes/{alias}/stop")
    async def stop(workspace_id: str, alias: str, session: BctrlDep) -> RuntimeBody:
        return await session.stop_runtime(workspace_id, alias)
"""

import json
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from fastapi import Depends, FastAPI, Response, WebSocket, status
from fastapi.requests import HTTPConnection
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from bctrl_async import (
    BctrlApiError,
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNetworkError,
    BctrlNotFoundError,
    BctrlRateLimitError,
    BctrlServerError,
    BctrlSession,
    BctrlTimeoutError,
    BctrlValidationError,
    LaunchMode,
    Runtime,
    RuntimeKind,
    RuntimeStatus,
    StopOutcome,
    StopReport,
    StopResult,
)

__all__ = [
    "BctrlDep",
    "RuntimeBody",
    "StopOutcomeBody",
    "StopReportBody",
    "add_exception_handlers",
    "get_session",
    "lifespan",
    "problem",
]

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any]]]
PlainLifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
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
        raise BctrlConfigError(
            "the app has no bctrl session",
            cure="Make it with FastAPI(lifespan=lifespan()); in tests use `with TestClient(app)` "
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
        told, detail = _told(error)
        if told >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.warning("%s", error)
        if isinstance(connection, WebSocket):
            code = status.WS_1011_INTERNAL_ERROR
            if told in _MAY_COME_BACK:
                code = status.WS_1013_TRY_AGAIN_LATER
            await connection.close(code, detail)
            return None
        headers = {}
        if error.retry_after is not None and told in _MAY_COME_BACK:
            headers["Retry-After"] = str(math.ceil(error.retry_after))
        return Response(
            # ASCII, as half of a surrogate pair in an alias could not be sent otherwise.
            json.dumps(problem(error)),
            status_code=told,
            headers=headers,
            media_type="application/problem+json",
        )


_MAY_COME_BACK = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})


def problem(error: BctrlError) -> dict[str, str | int | bool]:
    """Describe an error to a caller of the app, in the terms of RFC 9457.

    Nothing of it is the API's own text: neither its body, nor what it says of the app's key.

    Args:
        error: The error.

    Returns:
        `type`, `title`, `status`, `detail`, and what is known of the stop: `workspaceId`, `alias`,
        `attempts` and `mayHaveStopped`.
    """
    told, detail = _told(error)
    body: dict[str, str | int | bool] = {
        "type": "about:blank",
        "title": told.phrase,
        "status": told.value,
        "detail": detail,
        "attempts": error.attempts,
        "mayHaveStopped": error.may_have_stopped,
    }
    if error.workspace_id is not None and error.alias is not None:
        body |= {"workspaceId": error.workspace_id, "alias": error.alias}
    return body


def _told(error: BctrlError) -> tuple[HTTPStatus, str]:  # noqa: C901, PLR0911 - a table.
    match error:
        case BctrlRateLimitError():
            return HTTPStatus.TOO_MANY_REQUESTS, "The bctrl API asks for fewer stops a second."
        case BctrlConflictError(already_stopped=True):
            return HTTPStatus.CONFLICT, "Nothing is running under this alias."
        case BctrlConflictError():
            return HTTPStatus.CONFLICT, "The runtime cannot be stopped in its present state."
        case BctrlNotFoundError(names_runtime=True):
            return HTTPStatus.NOT_FOUND, "There is no such workspace or alias."
        case BctrlValidationError() | BctrlConfigError(reason_class="invalid_input"):
            return HTTPStatus.UNPROCESSABLE_ENTITY, "The workspace id or the alias is not valid."
        case BctrlServerError(status=HTTPStatus.SERVICE_UNAVAILABLE):
            return HTTPStatus.SERVICE_UNAVAILABLE, "The bctrl API is not available at the moment."
        case BctrlTimeoutError() | BctrlServerError(status=HTTPStatus.GATEWAY_TIMEOUT):
            return HTTPStatus.GATEWAY_TIMEOUT, "The bctrl API did not answer in time."
        case BctrlNetworkError() | BctrlServerError():
            return HTTPStatus.BAD_GATEWAY, "The bctrl API gave no usable answer."
        case BctrlApiError():
            return HTTPStatus.BAD_GATEWAY, "The bctrl API does not let this service do that."
        case BctrlConfigError():
            return (
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "This service is not set up to call the bctrl API.",
            )
    return HTTPStatus.SERVICE_UNAVAILABLE, "The run ended before this stop was settled."


class _Error(msgspec.Struct, frozen=True, rename="camel"):
    detail: str
    may_have_stopped: bool


class _Outcome(msgspec.Struct, frozen=True, rename="camel"):
    index: int
    workspace_id: str
    alias: str
    result: StopResult
    runtime: Runtime | None
    error: _Error | None
    attempts: int
    elapsed: float
    resumed: bool


class _Report(msgspec.Struct, frozen=True, rename="camel"):
    total: int
    ok: bool
    counts: dict[StopResult, int]
    failures: list[_Outcome]
    elapsed: float
    retries: int
    throttled: int
    ended_early: _Error | None


def _error_body(error: BctrlError | None) -> _Error | None:
    if error is None:
        return None
    _, detail = _told(error)
    return _Error(detail, error.may_have_stopped)


def _outcome_body(outcome: StopOutcome) -> _Outcome:
    return _Outcome(
        index=outcome.index,
        workspace_id=_sendable(outcome.target.workspace_id),
        alias=_sendable(outcome.target.alias),
        result=outcome.result,
        runtime=outcome.runtime,
        error=_error_body(outcome.error),
        attempts=outcome.attempts,
        elapsed=outcome.elapsed,
        resumed=outcome.resumed,
    )


def _sendable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _report_body(report: StopReport) -> _Report:
    return _Report(
        total=report.total,
        ok=report.ok,
        counts=dict(report.counts),
        failures=[_outcome_body(outcome) for outcome in report.failures],
        elapsed=report.elapsed,
        retries=report.retries,
        throttled=report.throttled,
        ended_early=_error_body(report.ended_early),
    )


def _itself(runtime: Runtime) -> Runtime:
    return runtime


class _Body(Generic[_T]):
    """Lets FastAPI answer with a Struct of ours, and describe it in the app's OpenAPI.

    Args:
        body: The Struct as it stands in the answer.
        made_by: Makes it of ours.
    """

    def __init__(self, body: type[msgspec.Struct], made_by: Callable[[_T], msgspec.Struct]) -> None:
        self._body = body
        self._made_by = made_by

    def __get_pydantic_core_schema__(self, source: type[_T], _: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.is_instance_schema(
            source,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda struct: msgspec.to_builtins(self._made_by(struct), str_keys=True)
            ),
        )

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, __: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schema = msgspec.json.schema(self._body)
        definitions = schema.pop("$defs")
        for kept_as_they_come in (RuntimeKind, RuntimeStatus, LaunchMode):
            definition = definitions.get(kept_as_they_come.__name__, {})
            # What the API will add to them is passed on, so that a list would be a false promise.
            definition |= {"type": "string", "examples": definition.pop("enum", [])}
        inlined: dict[str, Any] = _inlined(schema, definitions)
        return inlined


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:  # noqa: ANN401 - it is JSON.
    """Put what a schema refers to in its place: the app's OpenAPI has definitions of its own."""
    match schema:
        case {"$ref": str(reference)}:
            return _inlined(definitions[reference.removeprefix("#/$defs/")], definitions)
        case dict():
            return {key: _inlined(value, definitions) for key, value in schema.items()}
        case list():
            return [_inlined(value, definitions) for value in schema]
    return schema


RuntimeBody = Annotated[Runtime, _Body(Runtime, _itself)]
"""`Runtime` as a return type of a path operation: the API's own JSON."""

StopOutcomeBody = Annotated[StopOutcome, _Body(_Outcome, _outcome_body)]
"""`StopOutcome` as a return type of a path operation."""

StopReportBody = Annotated[StopReport, _Body(_Report, _report_body)]
"""`StopReport` as a return type of a path operation."""
