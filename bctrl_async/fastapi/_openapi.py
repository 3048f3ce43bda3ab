"""Problems in the app's OpenAPI."""

import json
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.constants import REF_PREFIX, REF_TEMPLATE
from pydantic import TypeAdapter

from bctrl_async import (
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlRateLimitError,
    BctrlServerError,
    BctrlTimeoutError,
)
from bctrl_async.errors import THROTTLED
from bctrl_async.fastapi._problems import MEDIA_TYPE, Problem, problem
from bctrl_async.fastapi._validation import ValidationProblem, validation_problem

_TARGET: dict[str, Any] = {"workspace_id": "demo", "alias": "crm"}
_ANSWERED: dict[str, Any] = {**_TARGET, "attempts": 1, "request_id": "req_8f14e45f"}
_GIVEN_UP: dict[str, Any] = {**_TARGET, "attempts": 4, "may_have_stopped": True}
_INVALID_REQUEST = validation_problem(
    [{"loc": ("body",), "msg": "Field required", "type": "missing"}]
)
_PROBLEMS: list[Problem | ValidationProblem] = [
    problem(BctrlNotFoundError("", code="runtime.not_found", **_ANSWERED)),
    problem(BctrlConflictError("", code="runtime.not_active", **_ANSWERED)),
    problem(BctrlConflictError("", **_ANSWERED)),
    problem(
        BctrlConfigError(
            "alias '..' could be taken for a path",
            advice="Remove its '.' or '..' segments",
            reason_class="invalid_input",
            workspace_id="demo",
            alias="..",
        )
    ),
    _INVALID_REQUEST,
    problem(BctrlRateLimitError("", **_ANSWERED)),
    problem(BctrlConfigError("", **_TARGET)),
    problem(BctrlServerError("", status=HTTPStatus.INTERNAL_SERVER_ERROR, **_GIVEN_UP)),
    problem(BctrlPermissionError("", code="auth.forbidden", **_ANSWERED)),
    problem(BctrlServerError("", status=HTTPStatus.SERVICE_UNAVAILABLE, **_ANSWERED)),
    problem(BctrlError("", **_TARGET)),
    problem(BctrlTimeoutError("", **_GIVEN_UP)),
]
"""An example of each type."""

_RETRY_AFTER = {
    "description": "Seconds to wait before retrying, if the bctrl API sent a Retry-After.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 60},
}
_FASTAPIS_CONTENT = {"application/json": {"schema": {"$ref": REF_PREFIX + "HTTPValidationError"}}}
_FASTAPIS_SCHEMAS = ("HTTPValidationError", "ValidationError")


def _response(status: HTTPStatus, examples: list[Problem | ValidationProblem]) -> dict[str, Any]:
    """Describe a response without its schema, which FastAPI or `document_problems` adds."""
    response: dict[str, Any] = {
        "description": ". ".join(example["title"] for example in examples),
        "content": {
            MEDIA_TYPE: {
                "examples": {
                    example["type"].rpartition(":")[2]: {
                        "summary": example["title"],
                        "value": {**example},
                    }
                    for example in examples
                }
            }
        },
    }
    if status in THROTTLED:
        response["headers"] = {"Retry-After": _RETRY_AFTER}
    return response


PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status.value: {
        "model": Problem | ValidationProblem
        if status is HTTPStatus.UNPROCESSABLE_ENTITY
        else Problem,
        **_response(status, [example for example in _PROBLEMS if example["status"] == status]),
    }
    for status in sorted({HTTPStatus(example["status"]) for example in _PROBLEMS})
}
"""The problems for the app's OpenAPI: pass `responses=PROBLEM_RESPONSES` to routes or routers."""


def document_problems(app: FastAPI, *, validation: Callable[[], bool]) -> None:
    """Correct what an app's OpenAPI says of problems.

    FastAPI documents the model of a response as JSON, whatever its media type is, and its own 422
    whatever the handler for it is.

    Args:
        app: The app.
        validation: Returns True if a request with invalid values is answered with a problem.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        # FastAPI keeps the document, so it may be one that is already correct.
        document = generate()
        _correct(document, validation=validation())
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # As FastAPI's documentation does.


def _correct(document: dict[str, Any], *, validation: bool) -> None:
    schemas = document.get("components", {}).get("schemas", {})
    for response in _responses_of(document):
        content = response.get("content", {})
        if "schema" not in content.get(MEDIA_TYPE, {"schema": None}):
            # FastAPI puts the model under the media type of the route; others are the app's own.
            for media_type in [each for each in content if content[each].keys() == {"schema"}]:
                content[MEDIA_TYPE] = {**content.pop(media_type), **content[MEDIA_TYPE]}
        elif validation and content == _FASTAPIS_CONTENT:
            response.update(_response(HTTPStatus.UNPROCESSABLE_ENTITY, [_INVALID_REQUEST]))
            reference = REF_PREFIX + _validation_component(schemas)
            response["content"][MEDIA_TYPE]["schema"] = {"$ref": reference}
    for name in _FASTAPIS_SCHEMAS:
        if name in schemas and f'"{REF_PREFIX}{name}"' not in json.dumps(document):
            del schemas[name]


def _responses_of(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        for operation in path.values():
            if isinstance(operation, dict):  # Not the parameters of a path.
                yield from operation.get("responses", {}).values()


def _validation_component(schemas: dict[str, Any]) -> str:
    """Return the name of the component of `ValidationProblem`, which is added if it is missing."""
    schema = TypeAdapter(ValidationProblem).json_schema(
        mode="serialization", ref_template=REF_TEMPLATE
    )
    for name, other in schemas.items():
        if other == schema:
            return name
    name = ValidationProblem.__name__
    if name in schemas:
        name = f"{ValidationProblem.__module__}.{name}".replace(".", "__")  # As pydantic does.
    schemas[name] = schema
    return name
