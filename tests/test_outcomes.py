"""The result and the state of a stop, decided from its runtime or error, and their JSON."""

import json
import pickle
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from runtimes import runtime

from bctrl_async.errors import (
    BctrlApiError,
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNetworkError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlRateLimitError,
    BctrlResponseError,
    BctrlServerError,
    BctrlTimeoutError,
    BctrlValidationError,
)
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.outcomes import (
    OutcomeRecord,
    RuntimeState,
    StopOutcome,
    StopReport,
    StopResult,
    outcome_of,
    result_of,
    state_of,
)

NOT_ACTIVE = "runtime.not_active"

RESULTS: dict[StopResult, list[Runtime | BctrlError]] = {
    StopResult.STOPPED: [runtime("stopped")],
    StopResult.ACCEPTED: [
        runtime("active"),
        runtime("failed"),
        BctrlResponseError("200, not JSON", status=200, may_have_stopped=True, accepted=True),
    ],
    StopResult.ALREADY_STOPPED: [
        BctrlConflictError("not active", status=409, code=NOT_ACTIVE),
        BctrlConflictError("then not active", status=409, code=NOT_ACTIVE, may_have_stopped=True),
    ],
    StopResult.NOT_FOUND: [
        BctrlNotFoundError(
            "then not found", status=404, code="workspace.not_found", may_have_stopped=True
        ),
    ],
    # The server's last word was no, or the target is invalid.
    StopResult.REJECTED: [
        BctrlNotFoundError("404 for a path", status=404, code="route.not_found", body="{}"),
        BctrlNotFoundError("404 as a page", status=404, body="<html>"),
        BctrlPermissionError("403", status=403),
        BctrlConflictError("409, busy", status=409, code="runtime.busy"),
        BctrlApiError("not active, but no conflict", status=410, code=NOT_ACTIVE),
        BctrlServerError("503 after all patience", status=503),
        BctrlResponseError("307", status=307),
        BctrlConfigError("the alias is empty", reason_class="invalid_input"),
    ],
    # The request never reached the server.
    StopResult.NOT_SENT: [
        BctrlConfigError("the session is closed"),
        BctrlNetworkError("connection refused"),
    ],
    # It was sent, and no answer settled it.
    StopResult.UNKNOWN: [
        BctrlTimeoutError("no answer", may_have_stopped=True),
        BctrlResponseError("200 as a page", status=200, may_have_stopped=True),
        BctrlServerError("500", status=500, may_have_stopped=True),
        BctrlRateLimitError("then 429", status=429, may_have_stopped=True),
        BctrlConflictError("then busy", status=409, code="runtime.busy", may_have_stopped=True),
        BctrlConfigError("then the session is closed", may_have_stopped=True),
    ],
}
"""What decides each result; an error that begins with "then" is of a later attempt."""


@pytest.mark.parametrize(
    ("ended", "result"),
    [(ended, result) for result, all_ended in RESULTS.items() for ended in all_ended],
    ids=lambda value: (
        str(getattr(value, "status", value)) if isinstance(value, Runtime) else str(value)
    ),
)
def test_a_runtime_or_error_decides_the_result(
    ended: Runtime | BctrlError, result: StopResult
) -> None:
    assert result_of(ended) is result


def test_the_results_are_exactly_those_of_the_design() -> None:
    assert list(StopResult) == list(RESULTS)
    assert str({StopResult.STOPPED: 3}) == "{'stopped': 3}"


NOT_RUNNING, STILL_RUNNING = RuntimeState.NOT_RUNNING, RuntimeState.STILL_RUNNING
UNCONFIRMED, INVALID = RuntimeState.UNCONFIRMED, RuntimeState.INVALID


@pytest.mark.parametrize(
    ("result", "status", "state"),
    [
        ("stopped", "stopped", NOT_RUNNING),
        ("stopped", None, NOT_RUNNING),  # From a journal.
        ("already_stopped", None, NOT_RUNNING),
        ("accepted", "failed", NOT_RUNNING),
        ("accepted", "active", STILL_RUNNING),
        ("accepted", "paused", UNCONFIRMED),
        ("unknown", None, UNCONFIRMED),
        ("rejected", "active", STILL_RUNNING),
    ],
)
def test_every_outcome_has_a_state(result: str, status: str | None, state: RuntimeState) -> None:
    described = None if status is None else runtime(status)
    assert state_of(StopResult(result), described, None) is state


@pytest.mark.parametrize(
    ("error", "described", "state"),
    [
        (BctrlConfigError("invalid", reason_class="invalid_input"), None, INVALID),
        (
            BctrlConfigError("invalid", reason_class="invalid_input"),
            runtime("active"),
            STILL_RUNNING,
        ),
        # A target that only the server finds invalid may run.
        (BctrlValidationError("400", status=400, reason_class="invalid_input"), None, UNCONFIRMED),
    ],
)
def test_an_invalid_target_is_not_a_runtime(
    error: BctrlError, described: Runtime | None, state: RuntimeState
) -> None:
    assert state_of(StopResult.REJECTED, described, error) is state


@pytest.mark.parametrize("status", ["stopped", "failed", "active", "paused"])
def test_an_answer_is_ok_without_an_error_or_has_one_that_says_why(status: str) -> None:
    outcome = outcome_of(RuntimeRef("ws-1", "crm"), runtime(status), attempts=1)
    assert outcome.ok is (status in {"stopped", "failed"})
    assert (outcome.error is None) is outcome.ok
    if outcome.error is not None:
        assert str(outcome.error) == (
            "stop of 'crm' in workspace 'ws-1': the stop was accepted, and the runtime was still "
            f"{status!r} after it (the runtime may have stopped). Look at it again, or stop it "
            "again: a stop is safe to repeat"
        )


def outcome_with(error: BctrlError | None = None, **fields: Any) -> StopOutcome:  # noqa: ANN401
    known = {"result": StopResult.UNKNOWN, "state": RuntimeState.UNCONFIRMED}
    if error is None:
        known = {"result": StopResult.STOPPED, "state": RuntimeState.NOT_RUNNING}
    return StopOutcome(
        **{"index": 3, "target": RuntimeRef("ws", "crm"), "error": error, **known, **fields}
    )


def test_an_outcome_survives_pickling_with_its_error() -> None:
    error = BctrlTimeoutError("no answer", alias="crm", may_have_stopped=True)
    outcome = outcome_with(error, attempts=3, elapsed=1.5)

    twin = pickle.loads(pickle.dumps(outcome))  # noqa: S301

    assert vars(twin.error) == vars(outcome.error)
    assert msgspec.structs.replace(twin, error=outcome.error) == outcome


def test_an_outcome_has_the_time_at_which_it_was_made_in_utc() -> None:
    before = datetime.now(UTC)
    outcome = outcome_with()

    assert before <= outcome.at <= datetime.now(UTC)
    assert outcome.at.tzinfo is UTC


ERROR = BctrlServerError(
    "the server answered 500",
    operation="stop",
    workspace_id="ws",
    alias="crm",
    attempts=2,
    status=500,
    code="server.error",
    request_id="req_7",
    hint="Look at the status page",
    may_have_stopped=True,
)
AT = datetime(2026, 11, 26, 2, 30, tzinfo=UTC)


def test_an_outcome_as_a_dict_has_every_field_as_a_json_value() -> None:
    failed = outcome_with(ERROR, at=AT, attempts=2, elapsed=0.12345678, resumed=True)

    fields = failed.to_dict()

    assert fields == {
        "index": 3,
        "workspace_id": "ws",
        "alias": "crm",
        "result": "unknown",
        "ok": False,
        "state": "unconfirmed",
        "request_id": None,
        "at": "2026-11-26T02:30:00Z",
        "attempts": 2,
        "resumed": True,
        "elapsed": 0.123457,
        "runtime": None,
        "error": {
            "type": "BctrlServerError",
            "message": "the server answered 500",
            "advice": "Look at the status page. Retrying is safe",
            "status": 500,
            "code": "server.error",
            "request_id": "req_7",
            "may_have_stopped": True,
        },
    }
    assert json.loads(json.dumps(fields)) == fields
    stopped = outcome_with(runtime=runtime()).to_dict()
    assert (stopped["error"], stopped["runtime"]) == (None, msgspec.to_builtins(runtime()))


def test_an_error_has_the_same_json_and_text_after_it_was_recorded() -> None:
    failed = outcome_with(ERROR, attempts=2, runtime=runtime("active"))

    again = OutcomeRecord.of(failed).outcome()

    assert again.to_dict() == failed.to_dict()
    assert str(again.error) == str(ERROR)
    assert "Look at the status page. Retrying is safe" in str(ERROR)


def test_a_report_as_a_dict_has_its_counts_its_failures_and_its_end() -> None:
    failed = outcome_with(ERROR)
    report = StopReport(
        total=1,
        counts=Counter({StopResult.UNKNOWN: 1}),
        failures=(failed,),
        states=Counter({RuntimeState.UNCONFIRMED: 1}),
        elapsed=1.23456789,
        ended_early=ERROR,
    )

    fields = report.to_dict()

    assert fields["ok"] is False
    assert fields["counts"] == {result.value: int(result == "unknown") for result in StopResult}
    assert fields["states"] == {
        "not_running": 0,
        "still_running": 0,
        "unconfirmed": 1,
        "invalid": 0,
    }
    assert fields["elapsed"] == 1.234568
    assert fields["failures"] == [failed.to_dict()]
    assert fields["ended_early"] == failed.to_dict()["error"]
    assert set(fields) == {"ok", *StopReport.__struct_fields__}
    assert json.loads(json.dumps(fields)) == fields
