"""What an app's callers are told of an error: a problem (RFC 9457), without a word of the API's."""

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
    """A problem in the terms of RFC 9457, and what is known of the stop."""

    type: str
    title: str
    status: int
    detail: str
    attempts: int
    mayHaveStopped: bool
    workspaceId: NotRequired[str]
    alias: NotRequired[str]


def problem(error: BctrlError) -> Problem:
    """Describe an error to a caller of the app, in the terms of RFC 9457.

    Nothing of it is the API's own text: neither its body, nor what it says of the app's key.

    Args:
        error: The error.

    Returns:
        `type`, `title`, `status`, `detail`, and what is known of the stop: `attempts`,
        `mayHaveStopped`, and `workspaceId` and `alias` where the error names them.
    """
    status, detail = told(error)
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


def told(error: BctrlError) -> tuple[HTTPStatus, str]:  # noqa: C901, PLR0911 - a table.
    """Return the status that stands for an error, and what its cause is."""
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
        case (
            BctrlTimeoutError()
            | BctrlServerError(status=HTTPStatus.GATEWAY_TIMEOUT)
            | BctrlApiError(status=HTTPStatus.REQUEST_TIMEOUT)
        ):
            return HTTPStatus.GATEWAY_TIMEOUT, "The bctrl API did not answer in time."
        case BctrlNetworkError() | BctrlServerError():
            return HTTPStatus.BAD_GATEWAY, "The bctrl API gave no usable answer."
        case BctrlApiError():
            return HTTPStatus.BAD_GATEWAY, "The bctrl API does not let this service do that."
        case BctrlConfigError():
            return (
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "This service cannot make this call of the bctrl API.",
            )
    return HTTPStatus.SERVICE_UNAVAILABLE, "The run ended before this stop was settled."


_SCHEMA = msgspec.json.schema(Problem)["$defs"]["Problem"]
_RETRY_AFTER = {
    "description": "Seconds after which to try again, if the bctrl API named a time.",
    "schema": {"type": "integer", "minimum": 0},
}
# FastAPI's own answer to arguments that do not fit, which a description of 422 would displace.
_INVALID = {
    "type": "object",
    "properties": {"detail": {"type": "array", "items": {"type": "object"}}},
}


def _described(status: HTTPStatus, description: str) -> dict[str, Any]:
    content = {MEDIA_TYPE: {"schema": _SCHEMA}}
    if status is HTTPStatus.UNPROCESSABLE_ENTITY:
        content["application/json"] = {"schema": _INVALID}
    described: dict[str, Any] = {"description": description, "content": content}
    if status in THROTTLED:
        described["headers"] = {"Retry-After": _RETRY_AFTER}
    return described


PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status.value: _described(status, description)
    for status, description in {
        HTTPStatus.NOT_FOUND: "There is no such workspace or alias",
        HTTPStatus.CONFLICT: "Nothing is running under the alias, or it cannot be stopped now",
        HTTPStatus.UNPROCESSABLE_ENTITY: "The workspace id, the alias or the request is not valid",
        HTTPStatus.TOO_MANY_REQUESTS: "The bctrl API asks for fewer stops a second",
        HTTPStatus.INTERNAL_SERVER_ERROR: "The service cannot make this call of the bctrl API",
        HTTPStatus.BAD_GATEWAY: "The bctrl API gave no usable answer, or refuses this service",
        HTTPStatus.SERVICE_UNAVAILABLE: "The bctrl API is not available, or the run has ended",
        HTTPStatus.GATEWAY_TIMEOUT: "The bctrl API did not answer in time",
    }.items()
}
"""The problems for the app's OpenAPI: `responses=PROBLEM_RESPONSES` of a route or a router."""
