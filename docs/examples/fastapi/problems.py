"""The app's own errors as problem details (RFC 9457), like those of `bctrl_async.fastapi`.

So a client needs one parser for all errors.
"""

from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from bctrl_async.fastapi import PROBLEM_RESPONSES, Problem

MEDIA_TYPE = "application/problem+json"


class PlainProblem(BaseModel):
    """Problem details (RFC 9457) that say no more than the status of the response and a reason."""

    # Without this, OpenAPI would call a field with a default optional.
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    detail: str

    @classmethod
    def of(cls, status: int, detail: str) -> "PlainProblem":
        return cls(title=HTTPStatus(status).phrase, status=status, detail=detail)


def add_problem_handler(app: FastAPI) -> None:
    """Answer each HTTPException with a problem; the router raises those of 404 and 405."""

    @app.exception_handler(HTTPException)
    async def answer(_: Request, error: HTTPException) -> Response:
        if error.status_code < HTTPStatus.BAD_REQUEST:
            return Response(status_code=error.status_code, headers=error.headers)
        return Response(
            PlainProblem.of(error.status_code, error.detail).model_dump_json(),
            error.status_code,
            error.headers,
            MEDIA_TYPE,
        )


def own_problems(details: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """Describe answers of the app itself in its OpenAPI.

    Args:
        details: The detail of the problem for each status.
    """
    return {
        status: {
            "model": PlainProblem,
            "description": detail,
            "content": {MEDIA_TYPE: {"examples": {"own": _example(status, detail)}}},
        }
        for status, detail in details.items()
    }


def and_problems_of_calls(
    responses: dict[int | str, dict[str, Any]],
) -> dict[int | str, dict[str, Any]]:
    """Add the problems of calls of the API to the app's own."""
    both = {**PROBLEM_RESPONSES, **responses}
    for status in PROBLEM_RESPONSES.keys() & responses.keys():
        call, own = PROBLEM_RESPONSES[status], responses[status]
        examples = [each["content"][MEDIA_TYPE]["examples"] for each in (call, own)]
        both[status] = {
            **call,
            "model": Problem | PlainProblem,
            "description": f"{call['description']}. {own['description']}",
            "content": {MEDIA_TYPE: {"examples": {**examples[0], **examples[1]}}},
        }
    return both


def _example(status: int, detail: str) -> dict[str, Any]:
    return {"summary": detail, "value": PlainProblem.of(status, detail).model_dump()}
