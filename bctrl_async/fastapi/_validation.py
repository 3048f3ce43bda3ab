"""FastAPI's own errors about a request as problem details (RFC 9457)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

# pydantic takes that of `typing` only from Python 3.12 on.
from typing_extensions import TypedDict

from bctrl_async.fastapi._component import component
from bctrl_async.fastapi._problems import Detail, ProblemType, Status, Title, Type

_KIND = ProblemType.INVALID_REQUEST
_MAX_ERRORS = 20
_MAX_LOCATION = 20
_MAX_TEXT = 200
"""The most characters of a text: a location may contain a key of the request, a message a value."""

_ERROR = {
    "type": "object",
    "properties": {
        "loc": {
            "type": "array",
            "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            "description": "The place of the value.",
            "examples": [["path", "workspace_id"]],
        },
        "msg": {"type": "string", "description": "What is wrong.", "examples": ["Field required"]},
        "type": {"type": "string", "description": "The kind of error.", "examples": ["missing"]},
    },
    "required": ["loc", "msg", "type"],
}


@component
class ValidationProblem(TypedDict):
    """Problem details (RFC 9457) of a request with missing or invalid values."""

    type: Annotated[Type, Field(examples=[_KIND.uri])]
    title: Annotated[Title, Field(examples=[_KIND.title])]
    status: Annotated[Status, Field(examples=[_KIND.status.value])]
    detail: Annotated[Detail, Field(examples=[_KIND.detail])]
    errors: Annotated[
        list[Annotated[dict[str, Any], WithJsonSchema(_ERROR)]],
        Field(description=f"The first {_MAX_ERRORS} errors."),
    ]


def validation_problem(errors: Sequence[object]) -> ValidationProblem:
    """Describe the errors of FastAPI about a request as problem details.

    The input and the context of each error are left out: they repeat what was sent, at any length.

    Args:
        errors: The errors, as `RequestValidationError.errors()` returns them. The app may raise it
            with its own.
    """
    values = "value" if len(errors) == 1 else "values"
    return ValidationProblem(
        type=_KIND.uri,
        title=_KIND.title,
        status=_KIND.status.value,
        detail=f"{len(errors)} missing or invalid {values} in the request.",
        errors=[_error(error) for error in errors[:_MAX_ERRORS]],
    )


def _error(error: object) -> dict[str, object]:
    # An app may put anything into a RequestValidationError of its own.
    fields = error if isinstance(error, Mapping) else {"msg": error}
    location = fields.get("loc") or ()
    parts = location if isinstance(location, list | tuple) else (location,)
    message = fields.get("msg", "")
    if fields.get("type") == "json_invalid" and len(parts) > 1:
        # FastAPI puts the position there, which looks like the index of an item.
        message, parts = f"{message} at character {parts[1]}", parts[:1]
    return {
        "loc": [_shorten(part) for part in parts[:_MAX_LOCATION]],
        "msg": _shorten(message),
        "type": _shorten(fields.get("type", "")),
    }


def _shorten(part: object) -> str | int:
    if isinstance(part, int):
        return part
    text = str(part)
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"
