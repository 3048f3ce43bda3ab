"""Errors as problem details (RFC 9457), without the API's own text."""

from http import HTTPStatus
from typing import Any, NotRequired, TypedDict

import msgspec

from bctrl_async import (
    BctrlApiError,
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNetworkError,
    BctrlNotFoundError,
    BctrlRateLimitError,
    BctrlServerError,
    BctrlTimeoutError,
    BctrlValidationError,
)
from bctrl_async.errors import THROTTLED

MEDIA_TYPE = "application/problem+json"


class Problem(TypedDict):
    """Problem details (RFC 9457) of an error, extended by facts about the stop."""

    type: str
    title: str
    status: int
    detail: str
    attempts: int
    mayHaveStopped: bool
    workspaceId: NotRequired[str]
    alias: NotRequired[str]


def problem(error: BctrlError) -> Problem:
    """Describe an error to the app's clients as problem details (RFC 9457).

    The API's own text is left out: it is not meant for the app's clients.

    Args:
        error: The error.

    Returns:
        `type`, `title`, `status`, `detail`, `attempts`, `mayHaveStopped`, and `workspaceId` and
        `alias` if the error has them.
    """
    status, detail = classify(error)
    body = Problem(
        type="about:blank",
        title=status.phrase,
        status=status.value,
        detail=detail,
        attempts=error.attempts,
        mayHaveStopped=error.may_have_stopped,
    )
    if error.workspace_id is not None:
        body["workspaceId"] = error.workspace_id
    if error.alias is not None:
        body["alias"] = error.alias
    return body


def classify(error: BctrlError) -> tuple[HTTPStatus, str]:  # noqa: C901, PLR0911 - a table.
    """Return the status and the detail of the problem that an error becomes."""
    match error:
        case BctrlRateLimitError():
            return HTTPStatus.TOO_MANY_REQUESTS, "The rate limit of the bctrl API is exceeded."
        case BctrlConflictError(already_stopped=True):
            return HTTPStatus.CONFLICT, "Nothing is running under this alias."
        case BctrlConflictError():
            return HTTPStatus.CONFLICT, "The runtime cannot be stopped in its current state."
        case BctrlNotFoundError(names_runtime=True):
            return HTTPStatus.NOT_FOUND, "Unknown workspace or alias."
        case BctrlValidationError() | BctrlConfigError(reason_class="invalid_input"):
            return HTTPStatus.UNPROCESSABLE_ENTITY, "Invalid workspace id or alias."
        case BctrlServerError(status=HTTPStatus.SERVICE_UNAVAILABLE):
            return HTTPStatus.SERVICE_UNAVAILABLE, "The bctrl API is temporarily unavailable."
        case (
            BctrlTimeoutError()
            | BctrlServerError(status=HTTPStatus.GATEWAY_TIMEOUT)
            | BctrlApiError(status=HTTPStatus.REQUEST_TIMEOUT)
        ):
            return HTTPStatus.GATEWAY_TIMEOUT, "The bctrl API did not respond in time."
        case BctrlNetworkError() | BctrlServerError():
            return HTTPStatus.BAD_GATEWAY, "The bctrl API sent no usable response."
        case BctrlApiError():
            return HTTPStatus.BAD_GATEWAY, "The bctrl API rejected the request of this service."
        case BctrlConfigError():
            return HTTPStatus.INTERNAL_SERVER_ERROR, "This service cannot call the bctrl API."
    return HTTPStatus.SERVICE_UNAVAILABLE, "The run ended before this stop was settled."


_SCHEMA = msgspec.json.schema(Problem)["$defs"]["Problem"]
_RETRY_AFTER = {
    "description": "Seconds to wait before retrying, if the bctrl API sent a Retry-After.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 60},
}
# FastAPI's own 422 for invalid arguments, which ours would replace in the OpenAPI.
_INVALID = {
    "type": "object",
    "properties": {"detail": {"type": "array", "items": {"type": "object"}}},
}


def _response(status: HTTPStatus, description: str) -> dict[str, Any]:
    content = {MEDIA_TYPE: {"schema": _SCHEMA}}
    if status is HTTPStatus.UNPROCESSABLE_ENTITY:
        content["application/json"] = {"schema": _INVALID}
    response: dict[str, Any] = {"description": description, "content": content}
    if status in THROTTLED:
        response["headers"] = {"Retry-After": _RETRY_AFTER}
    return response


PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status.value: _response(status, description)
    for status, description in {
        HTTPStatus.NOT_FOUND: "Unknown workspace or alias",
        HTTPStatus.CONFLICT: "Nothing is running under this alias, or it cannot be stopped now",
        HTTPStatus.UNPROCESSABLE_ENTITY: "Invalid workspace id, alias or request",
        HTTPStatus.TOO_MANY_REQUESTS: "The rate limit of the bctrl API is exceeded",
        HTTPStatus.INTERNAL_SERVER_ERROR: "This service cannot call the bctrl API",
        HTTPStatus.BAD_GATEWAY: "The bctrl API sent no usable response, or rejected the request",
        HTTPStatus.SERVICE_UNAVAILABLE: "The bctrl API is unavailable, or the run ended early",
        HTTPStatus.GATEWAY_TIMEOUT: "The bctrl API did not respond in time",
    }.items()
}
"""The problems for the app's OpenAPI: pass `responses=PROBLEM_RESPONSES` to routes or routers."""
