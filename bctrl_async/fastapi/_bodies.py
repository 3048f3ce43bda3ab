"""Runtimes, outcomes and reports as return types of path operations."""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from bctrl_async import (
    BctrlError,
    LaunchMode,
    Runtime,
    RuntimeKind,
    RuntimeStatus,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.fastapi._problems import classify

_T = TypeVar("_T")


# The fields of `OutcomeRecord`, declared again because msgspec renames only what a class declares
# itself. An error has fewer: the app's callers get none of the API's own text.
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
    at: datetime
    resumed: bool
    duplicate: bool


class _Report(msgspec.Struct, frozen=True, rename="camel"):
    total: int
    ok: bool
    counts: dict[StopResult, int]
    failures: list[_Outcome]
    elapsed: float
    retries: int
    throttled: int
    resumed: int
    duplicates: int
    ended_early: _Error | None


def _error_body(error: BctrlError | None) -> _Error | None:
    if error is None:
        return None
    _, detail = classify(error)
    return _Error(detail, error.may_have_stopped)


def _outcome_body(outcome: StopOutcome) -> _Outcome:
    return _Outcome(
        index=outcome.index,
        workspace_id=outcome.target.workspace_id,
        alias=outcome.target.alias,
        result=outcome.result,
        runtime=outcome.runtime,
        error=_error_body(outcome.error),
        attempts=outcome.attempts,
        elapsed=outcome.elapsed,
        at=outcome.at,
        resumed=outcome.resumed,
        duplicate=outcome.duplicate,
    )


def _report_body(report: StopReport) -> _Report:
    return _Report(
        total=report.total,
        ok=report.ok,
        counts=dict(report.counts),
        failures=[_outcome_body(outcome) for outcome in report.failures],
        elapsed=report.elapsed,
        retries=report.retries,
        throttled=report.throttled,
        resumed=report.resumed,
        duplicates=report.duplicates,
        ended_early=_error_body(report.ended_early),
    )


def _unchanged(runtime: Runtime) -> Runtime:
    return runtime


class _Body(Generic[_T]):
    """An annotation by which pydantic serializes a Struct and FastAPI documents it.

    Args:
        body: The Struct of the response body.
        convert: Converts the annotated type to `body`.
    """

    def __init__(self, body: type[msgspec.Struct], convert: Callable[[_T], msgspec.Struct]) -> None:
        self._body = body
        self._convert = convert

    def __get_pydantic_core_schema__(self, source: type[_T], _: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.is_instance_schema(
            source,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: _to_builtins(self._convert(value))
            ),
        )

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, __: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schema = msgspec.json.schema(self._body)
        definitions = schema.pop("$defs")
        for open_enum in (RuntimeKind, RuntimeStatus, LaunchMode):
            definition = definitions.get(open_enum.__name__, {})
            # Values that the API adds later are passed on, so the schema must allow any string.
            definition |= {"type": "string", "examples": definition.pop("enum", [])}
        inlined: dict[str, Any] = _inline_refs(schema, definitions)
        return inlined


def _to_builtins(body: msgspec.Struct) -> Any:  # noqa: ANN401 - JSON.
    """Return a body as JSON values, with lone surrogates replaced: UTF-8 cannot encode them."""
    builtins = msgspec.to_builtins(body, str_keys=True)
    try:
        msgspec.json.encode(builtins)
    except UnicodeEncodeError:
        return json.loads(json.dumps(builtins, ensure_ascii=False).encode(errors="replace"))
    return builtins


def _inline_refs(schema: Any, definitions: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON.
    """Replace each `$ref` by its definition: the app's OpenAPI has definitions of its own."""
    match schema:
        case {"$ref": str(reference)}:
            return _inline_refs(definitions[reference.removeprefix("#/$defs/")], definitions)
        case dict():
            return {key: _inline_refs(value, definitions) for key, value in schema.items()}
        case list():
            return [_inline_refs(value, definitions) for value in schema]
    return schema


RuntimeBody = Annotated[Runtime, _Body(Runtime, _unchanged)]
"""`Runtime` as a return type of a path operation: the API's own JSON."""

StopOutcomeBody = Annotated[StopOutcome, _Body(_Outcome, _outcome_body)]
"""`StopOutcome` as a return type of a path operation."""

StopReportBody = Annotated[StopReport, _Body(_Report, _report_body)]
"""`StopReport` as a return type of a path operation."""
