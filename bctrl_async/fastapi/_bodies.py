"""Runtimes, outcomes and reports as return types of path operations."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Generic, TypeVar, cast

import msgspec
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from bctrl_async import BctrlError, Runtime, RuntimeState, StopOutcome, StopReport
from bctrl_async.fastapi import _schemas
from bctrl_async.fastapi._problems import classify, explain, identifiers

_T = TypeVar("_T")


def _runtime_body(runtime: Runtime) -> _schemas.Runtime:
    # A Struct within a body is converted with it, in one pass.
    return cast("_schemas.Runtime", runtime)


# Literals, because a call of a TypedDict takes longer, and a report may have many failures.
def _error_body(error: BctrlError) -> _schemas.StopError:
    kind = classify(error)
    body: _schemas.StopError = {
        "type": kind.uri,
        "detail": explain(error, kind),
        "mayHaveStopped": error.may_have_stopped,
    }
    code, request_id = identifiers(error)
    if code is not None:
        body["code"] = code
    if request_id is not None:
        body["requestId"] = request_id
    return body


def _outcome_body(outcome: StopOutcome) -> _schemas.StopOutcome:
    return {
        "index": outcome.index,
        "workspaceId": outcome.target.workspace_id,
        "alias": outcome.target.alias,
        "result": outcome.result,
        "runtime": None if outcome.runtime is None else _runtime_body(outcome.runtime),
        "error": None if outcome.error is None else _error_body(outcome.error),
        "attempts": outcome.attempts,
        "elapsed": outcome.elapsed,
        "at": outcome.at,
        "resumed": outcome.resumed,
    }


def _report_body(report: StopReport) -> _schemas.StopReport:
    return _schemas.StopReport(
        total=report.total,
        ok=report.ok,
        allStopped=report.all_stopped,
        counts=dict(report.counts),
        states={state: report.states[state] for state in RuntimeState},
        failures=[_outcome_body(outcome) for outcome in report.failures],
        elapsed=report.elapsed,
        retries=report.retries,
        throttled=report.throttled,
        resumed=report.resumed,
        endedEarly=None if report.ended_early is None else _error_body(report.ended_early),
    )


class _Body(Generic[_T]):
    """An annotation by which pydantic serializes a Struct and documents it as a component.

    Args:
        schema: The TypedDict of the response body.
        convert: Converts the annotated type to `schema`.
    """

    def __init__(self, schema: type[object], convert: Callable[[_T], object]) -> None:
        self._schema = schema
        self._convert = convert

    def __get_pydantic_core_schema__(self, source: type[_T], _: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.is_instance_schema(
            source,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: _to_builtins(self._convert(value))
            ),
        )

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        # Within definitions, it becomes a component, with a longer name if the app has a model of
        # the same one.
        return handler(core_schema.definitions_schema(TypeAdapter(self._schema).core_schema, []))


def _to_builtins(body: object) -> Any:  # noqa: ANN401 - JSON.
    """Return a body as JSON values, with lone surrogates replaced: UTF-8 cannot encode them."""
    builtins = msgspec.to_builtins(body, str_keys=True)
    try:
        msgspec.json.encode(builtins)
    except UnicodeEncodeError:
        return json.loads(json.dumps(builtins, ensure_ascii=False).encode(errors="replace"))
    return builtins


RuntimeBody = Annotated[Runtime, _Body(_schemas.Runtime, _runtime_body)]
"""`Runtime` as a return type of a path operation: the API's own JSON."""

StopOutcomeBody = Annotated[StopOutcome, _Body(_schemas.StopOutcome, _outcome_body)]
"""`StopOutcome` as a return type of a path operation."""

StopReportBody = Annotated[StopReport, _Body(_schemas.StopReport, _report_body)]
"""`StopReport` as a return type of a path operation."""
