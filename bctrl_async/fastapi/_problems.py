"""Errors as problem details (RFC 9457), without the API's own text."""

import re
from enum import Enum
from http import HTTPStatus
from typing import Annotated, Any, ClassVar

from fastapi.openapi.utils import (
    validation_error_definition,
    validation_error_response_definition,
)
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

from bctrl_async import BctrlConfigError, BctrlError
from bctrl_async._kinds import kind_of
from bctrl_async.errors import THROTTLED

MEDIA_TYPE = "application/problem+json"

_EXAMPLE = BctrlError(
    "", workspace_id="demo", alias="crm", attempts=1, request_id="req_8f14e45f"
)

_is_identifier = re.compile(r"[\w.:/+=-]{1,100}", re.ASCII).fullmatch


class ProblemType(Enum):
    """The types of problems, each with its status, its title and its detail."""

    NOT_FOUND = 404, "Runtime not found", "The workspace or the alias does not exist."
    NOT_RUNNING = 409, "Runtime not running", "Nothing is running under this alias."
    NOT_STOPPABLE = (
        409,
        "Runtime cannot be stopped",
        "Its current state does not allow a stop.",
    )
    INVALID_TARGET = 422, "Invalid target", "Invalid workspace id or alias."
    RATE_LIMITED = (
        429,
        "Rate limit exceeded",
        "The rate limit of the bctrl API is exceeded.",
    )
    MISCONFIGURED = (
        500,
        "Service misconfigured",
        "This service cannot call the bctrl API.",
    )
    NO_USABLE_RESPONSE = (
        502,
        "No usable response",
        "The bctrl API sent no usable response.",
    )
    REJECTED = (
        502,
        "Service rejected",
        "The bctrl API rejected the request of this service.",
    )
    UNAVAILABLE = (
        503,
        "bctrl API unavailable",
        "The bctrl API is temporarily unavailable.",
    )
    NOT_SETTLED = (
        503,
        "Stop not settled",
        "The run was ended before all its stops were settled.",
    )
    TIMEOUT = 504, "bctrl API timed out", "The bctrl API did not respond in time."

    def __init__(self, status: int, title: str, detail: str) -> None:
        self.status = status
        self.title = title
        self.detail = detail

    @property
    def slug(self) -> str:
        return self.name.lower().replace("_", "-")

    @property
    def uri(self) -> str:
        return f"urn:bctrl-async:problem:{self.slug}"


_TYPES = {problem_type.slug: problem_type for problem_type in ProblemType}


def _encodable(text: object) -> object:
    """Replace the lone surrogates of a text, which UTF-8 cannot encode."""
    return text.encode(errors="replace").decode() if isinstance(text, str) else text


Text = Annotated[str, BeforeValidator(_encodable)]


def _remove_titles(schema: dict[str, Any]) -> None:
    """Remove the titles of fields: pydantic makes `Workspaceid` of `workspaceId`."""
    for field in schema["properties"].values():
        field.pop("title", None)


class Body(BaseModel):
    """A model of the app's OpenAPI, made of the attributes of an object."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        from_attributes=True, json_schema_extra=_remove_titles
    )

    def __init_subclass__(cls) -> None:
        # If the app has a model of the same name, the OpenAPI adds the modules.
        cls.__module__ = "bctrl_async.fastapi"


class CamelBody(Body):
    """A model with the API's own spelling of names."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, serialize_by_alias=True
    )


class Problem(CamelBody):
    """Problem details (RFC 9457) of a failed call of the bctrl API."""

    type: str = Field(
        description="The type of the problem: a URN that does not change."
    )
    title: str = Field(description="The summary of the type.")
    status: int = Field(description="The status of the response.")
    detail: Text = Field(description="An explanation for people.")
    attempts: int = Field(
        description="The number of requests started; some may not have arrived."
    )
    may_have_stopped: bool = Field(
        description="True if a request may have stopped the runtime."
    )
    workspace_id: Text | None = Field(
        None, description="The workspace as requested; absent if the call had none."
    )
    alias: Text | None = Field(
        None,
        description="The alias of the runtime as requested; absent if there was none.",
    )
    code: str | None = Field(
        None, description="The API's error code; absent if it sent none."
    )
    request_id: str | None = Field(
        None,
        description="The API's id of the request, for its support; absent if none.",
    )


def problem(error: BctrlError) -> Problem:
    """Describe an error to the app's clients as problem details (RFC 9457).

    It includes only two identifiers of the API's answer, its error code and the id of
    the request: the API's text is not meant for the app's clients.

    Args:
        error: The error.

    Returns:
        The problem. What the error does not have is None, and absent from the response.
    """
    return _problem(classify(error), error)


def _problem(problem_type: ProblemType, error: BctrlError) -> Problem:
    return Problem(
        type=problem_type.uri,
        title=problem_type.title,
        status=problem_type.status,
        detail=explain(error, problem_type),
        attempts=error.attempts,
        may_have_stopped=error.may_have_stopped,
        workspace_id=error.workspace_id,
        alias=error.alias,
        code=identifier(error.code),
        request_id=identifier(error.request_id),
    )


def explain(error: BctrlError, problem_type: ProblemType) -> str:
    """Return the `detail` of a problem: of an invalid target, what is wrong."""
    # The text of a BctrlConfigError is this package's own, never the API's.
    if (
        isinstance(error, BctrlConfigError)
        and problem_type is ProblemType.INVALID_TARGET
        and error.summary
    ):
        text = ". ".join(part for part in (error.summary, error.advice) if part)
        return f"{text[0].upper()}{text[1:].rstrip('.')}."
    if problem_type is ProblemType.NOT_SETTLED and error.may_have_stopped:
        return "The bctrl API did not confirm that the runtime stopped."
    return problem_type.detail


def identifier(text: str | None) -> str | None:
    """Return an error code or an id of the API; None for other text."""
    return text if text is not None and _is_identifier(text) else None


def classify(error: BctrlError) -> ProblemType:
    """Return the type of the problem that an error becomes."""
    return _TYPES[kind_of(error).problem]


class _Content(dict[str, Any]):
    """The content of a response with a problem.

    FastAPI would add the schema of `Problem` under the media type of the route.
    """

    def setdefault(self, _: str, default: Any = None) -> Any:  # noqa: ANN401 - as dict.
        return super().setdefault(MEDIA_TYPE, default)


_RETRY_AFTER = {
    "description": "Seconds to wait before retrying, if the API sent a Retry-After.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 60},
}


def _response(status: int) -> dict[str, Any]:
    types = [
        problem_type for problem_type in ProblemType if problem_type.status == status
    ]
    examples = {
        problem_type.slug: {
            "summary": problem_type.title,
            "value": _problem(problem_type, _EXAMPLE).model_dump(exclude_none=True),
        }
        for problem_type in types
    }
    response: dict[str, Any] = {
        "model": Problem,
        "description": ". ".join(problem_type.title for problem_type in types),
        "content": _Content({MEDIA_TYPE: {"examples": examples}}),
    }
    if status in THROTTLED:
        response["headers"] = {"Retry-After": _RETRY_AFTER}
    if status == HTTPStatus.UNPROCESSABLE_ENTITY:
        # FastAPI documents its own 422 only where a route has no other.
        errors = {"type": "array", "items": validation_error_definition}
        schema = {
            **validation_error_response_definition,
            "properties": {"detail": errors},
        }
        response["description"] += ". Invalid request"
        response["content"]["application/json"] = {"schema": schema}
    return response


PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: _response(status)
    for status in sorted({problem_type.status for problem_type in ProblemType})
}
"""The problems for the app's OpenAPI: pass it as `responses` to routes or routers."""
