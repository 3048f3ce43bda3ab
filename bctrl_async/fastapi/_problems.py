"""Errors as problem details (RFC 9457), without the API's own text."""

import re
from enum import Enum
from http import HTTPStatus
from typing import Annotated, NotRequired

from pydantic import Field

# pydantic takes that of `typing` only from Python 3.12 on.
from typing_extensions import TypedDict

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
from bctrl_async.fastapi._component import component

MEDIA_TYPE = "application/problem+json"

_is_identifier = re.compile(r"[\w.:/+=-]{1,100}", re.ASCII).fullmatch


class ProblemType(Enum):
    """The types of problems. `docs/reference/problems.md` explains each.

    Args:
        slug: The end of the type's URI.
        status: The status of the response.
        title: The summary of the type.
        detail: The explanation of an occurrence: it must not have the API's own text.
    """

    NOT_FOUND = (
        "not-found",
        HTTPStatus.NOT_FOUND,
        "Runtime not found",
        "There is no such workspace or alias.",
    )
    NOT_RUNNING = (
        "not-running",
        HTTPStatus.CONFLICT,
        "Runtime not running",
        "Nothing is running under this alias.",
    )
    NOT_STOPPABLE = (
        "not-stoppable",
        HTTPStatus.CONFLICT,
        "Runtime cannot be stopped",
        "The runtime cannot be stopped in its current state.",
    )
    INVALID_TARGET = (
        "invalid-target",
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "Invalid target",
        "Invalid workspace id or alias.",
    )
    INVALID_REQUEST = (
        "invalid-request",
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "Invalid request",
        "The request has invalid values.",
    )
    RATE_LIMITED = (
        "rate-limited",
        HTTPStatus.TOO_MANY_REQUESTS,
        "Rate limit exceeded",
        "The rate limit of the bctrl API is exceeded.",
    )
    MISCONFIGURED = (
        "misconfigured",
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "Service misconfigured",
        "This service cannot call the bctrl API.",
    )
    NO_USABLE_RESPONSE = (
        "no-usable-response",
        HTTPStatus.BAD_GATEWAY,
        "No usable response",
        "The bctrl API sent no usable response.",
    )
    REJECTED = (
        "rejected",
        HTTPStatus.BAD_GATEWAY,
        "Service rejected",
        "The bctrl API rejected the request of this service.",
    )
    UNAVAILABLE = (
        "unavailable",
        HTTPStatus.SERVICE_UNAVAILABLE,
        "bctrl API unavailable",
        "The bctrl API is temporarily unavailable.",
    )
    NOT_SETTLED = (
        "not-settled",
        HTTPStatus.SERVICE_UNAVAILABLE,
        "Stop not settled",
        "The run ended before this stop was settled.",
    )
    TIMEOUT = (
        "timeout",
        HTTPStatus.GATEWAY_TIMEOUT,
        "bctrl API timed out",
        "The bctrl API did not respond in time.",
    )

    def __init__(self, slug: str, status: HTTPStatus, title: str, detail: str) -> None:
        self.slug = slug
        self.uri = f"urn:bctrl-async:problem:{slug}"
        self.status = status
        self.title = title
        self.detail = detail


Type = Annotated[
    str,
    Field(
        description="The type of the problem: a URN that does not change.",
        json_schema_extra={"format": "uri"},
        examples=[ProblemType.NOT_FOUND.uri],
    ),
]
Title = Annotated[
    str,
    Field(description="The summary of the type.", examples=[ProblemType.NOT_FOUND.title]),
]
Status = Annotated[
    int,
    Field(description="The status of the response.", ge=400, le=599, examples=[404]),
]
Detail = Annotated[
    str,
    Field(description="An explanation for people.", examples=[ProblemType.NOT_FOUND.detail]),
]
Attempts = Annotated[
    int,
    Field(
        description="The number of requests begun; the API may not have received all of them.",
        ge=0,
        examples=[1],
    ),
]
MayHaveStopped = Annotated[
    bool,
    Field(description="True if a request may have stopped the runtime.", examples=[False]),
]
Code = Annotated[
    str, Field(description="The API's error code, if it sent one.", examples=["runtime.not_found"])
]
RequestId = Annotated[
    str,
    Field(
        description="The API's id of the request, for its support, if it sent one.",
        examples=["req_8f14e45f"],
    ),
]
WorkspaceId = Annotated[str, Field(description="The workspace as requested.", examples=["demo"])]
Alias = Annotated[
    str, Field(description="The alias of the runtime as requested.", examples=["crm"])
]


@component
class Problem(TypedDict):
    """Problem details (RFC 9457) of a failed call of the bctrl API."""

    type: Type
    title: Title
    status: Status
    detail: Detail
    attempts: Attempts
    mayHaveStopped: MayHaveStopped
    workspaceId: NotRequired[WorkspaceId]
    alias: NotRequired[Alias]
    code: NotRequired[Code]
    requestId: NotRequired[RequestId]


def problem(error: BctrlError) -> Problem:
    """Describe an error to the app's clients as problem details (RFC 9457).

    Of the API's answer only two identifiers are included, its error code and the id of the request:
    its text is not meant for the app's clients.

    Args:
        error: The error.

    Returns:
        `type`, `title`, `status`, `detail`, `attempts`, `mayHaveStopped`, and `workspaceId`,
        `alias`, `code` and `requestId` if the error has them.
    """
    kind = classify(error)
    body = Problem(
        type=kind.uri,
        title=kind.title,
        status=kind.status.value,
        detail=explain(error, kind),
        attempts=error.attempts,
        mayHaveStopped=error.may_have_stopped,
    )
    if error.workspace_id is not None:
        body["workspaceId"] = error.workspace_id
    if error.alias is not None:
        body["alias"] = error.alias
    code, request_id = identifiers(error)
    if code is not None:
        body["code"] = code
    if request_id is not None:
        body["requestId"] = request_id
    return body


def explain(error: BctrlError, kind: ProblemType) -> str:
    """Return the explanation of an occurrence.

    It is that of the type, but for invalid input: the client sent that, and the text of its error
    is this package's own, which says what rule is broken.
    """
    if isinstance(error, BctrlConfigError) and kind is ProblemType.INVALID_TARGET and error.summary:
        text = ". ".join(part for part in (error.summary, error.advice) if part)
        return f"{text[0].upper()}{text[1:].rstrip('.')}."
    return kind.detail


def identifiers(error: BctrlError) -> tuple[str | None, str | None]:
    """Return the API's error code and the id of the request, or None for each that is missing.

    Anything else in their place, such as a sentence of a gateway, is left out.
    """
    code, request_id = error.code, error.request_id
    return (
        code if code is not None and _is_identifier(code) else None,
        request_id if request_id is not None and _is_identifier(request_id) else None,
    )


def classify(error: BctrlError) -> ProblemType:  # noqa: C901, PLR0911 - a table.
    """Return the type of the problem that an error becomes."""
    match error:
        case BctrlRateLimitError():
            return ProblemType.RATE_LIMITED
        case BctrlConflictError(already_stopped=True):
            return ProblemType.NOT_RUNNING
        case BctrlConflictError():
            return ProblemType.NOT_STOPPABLE
        case BctrlNotFoundError(names_runtime=True):
            return ProblemType.NOT_FOUND
        case BctrlValidationError() | BctrlConfigError(reason_class="invalid_input"):
            return ProblemType.INVALID_TARGET
        case BctrlServerError(status=HTTPStatus.SERVICE_UNAVAILABLE):
            return ProblemType.UNAVAILABLE
        case (
            BctrlTimeoutError()
            | BctrlServerError(status=HTTPStatus.GATEWAY_TIMEOUT)
            | BctrlApiError(status=HTTPStatus.REQUEST_TIMEOUT)
        ):
            return ProblemType.TIMEOUT
        case BctrlNetworkError() | BctrlServerError():
            return ProblemType.NO_USABLE_RESPONSE
        case BctrlApiError():
            return ProblemType.REJECTED
        case BctrlConfigError():
            return ProblemType.MISCONFIGURED
    return ProblemType.NOT_SETTLED
