"""Runtimes, outcomes and reports as return types of FastAPI's path operations."""

from collections.abc import Callable, Mapping
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
from bctrl_async.fastapi._problems import told

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
    resumed: bool


class _Report(msgspec.Struct, frozen=True, rename="camel"):
    total: int
    ok: bool
    counts: dict[StopResult, int]
    failures: list[_Outcome]
    elapsed: float
    retries: int
    throttled: int
    resumed: int
    ended_early: _Error | None


def _error_body(error: BctrlError | None) -> _Error | None:
    if error is None:
        return None
    _, detail = told(error)
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
        resumed=report.resumed,
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
