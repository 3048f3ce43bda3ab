"""The result of a stop, decided from its runtime or error, row by row of the design's table."""

import json
import pickle
from collections import Counter
from datetime import UTC, datetime

import msgspec
import pytest
from runtimes import runtime

from bctrl_async.errors import (
    BctrlApiError,
    BctrlAuthenticationError,
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
    ErrorRecord,
    OutcomeRecord,
    RuntimeState,
    StopOutcome,
    StopReport,
    StopResult,
    result_of,
)

NOT_ACTIVE = "runtime.not_active"

ROWS: dict[str, tuple[Runtime | BctrlError, StopResult]] = {
    # 200, status `stopped`
    "200 stopped": (runtime("stopped"), StopResult.STOPPED),
    # 200 with another status, or an unreadable body
    "200 active": (runtime("active"), StopResult.ACCEPTED),
    "200 failed": (runtime("failed"), StopResult.ACCEPTED),
    "200 unknown status": (runtime("stopping"), StopResult.ACCEPTED),
    "200 unreadable": (
        BctrlResponseError("not JSON", status=200, may_have_stopped=True, accepted=True),
        StopResult.ACCEPTED,
    ),
    "202 unreadable": (
        BctrlResponseError("not JSON", status=202, may_have_stopped=True, accepted=True),
        StopResult.ACCEPTED,
    ),
    "200 whose body took too long": (
        BctrlTimeoutError("too slow", status=200, may_have_stopped=True, accepted=True),
        StopResult.ACCEPTED,
    ),
    # 409 `runtime.not_active`
    "409 not active": (
        BctrlConflictError("409", status=409, code=NOT_ACTIVE),
        StopResult.ALREADY_STOPPED,
    ),
    "409 not active after an attempt that may have stopped it": (
        BctrlConflictError("409", status=409, code=NOT_ACTIVE, may_have_stopped=True),
        StopResult.ALREADY_STOPPED,
    ),
    # 404
    "404": (
        BctrlNotFoundError("404", status=404, code="runtime.not_found"),
        StopResult.NOT_FOUND,
    ),
    "404 after an attempt that may have stopped it": (
        BctrlNotFoundError("404", status=404, code="workspace.not_found", may_have_stopped=True),
        StopResult.NOT_FOUND,
    ),
    "404 as JSON without a code": (
        BctrlNotFoundError("404", status=404, body='{"error": "not found"}'),
        StopResult.REJECTED,
    ),
    "404 for an unknown path": (
        BctrlNotFoundError("404", status=404, code="route.not_found", body="{}"),
        StopResult.REJECTED,
    ),
    "404 as a page": (
        BctrlNotFoundError("404", status=404, body="<html>"),
        StopResult.REJECTED,
    ),
    "404 without a body": (BctrlNotFoundError("404", status=404), StopResult.REJECTED),
    "200 as a page": (
        BctrlResponseError("a page", status=200, may_have_stopped=True),
        StopResult.UNKNOWN,
    ),
    "101": (
        BctrlResponseError("says nothing", status=101, may_have_stopped=True),
        StopResult.UNKNOWN,
    ),
    # any other final rejection
    "400": (BctrlValidationError("400", status=400), StopResult.REJECTED),
    "401": (BctrlAuthenticationError("401", status=401), StopResult.REJECTED),
    "403": (BctrlPermissionError("403", status=403), StopResult.REJECTED),
    "408": (BctrlApiError("408", status=408), StopResult.REJECTED),
    "409 for another reason": (
        BctrlConflictError("409", status=409, code="runtime.busy"),
        StopResult.REJECTED,
    ),
    "409 without a reason": (BctrlConflictError("409", status=409), StopResult.REJECTED),
    "418": (BctrlApiError("418", status=418), StopResult.REJECTED),
    "422": (BctrlValidationError("422", status=422), StopResult.REJECTED),
    "not active, but no conflict": (
        BctrlApiError("410", status=410, code=NOT_ACTIVE),
        StopResult.REJECTED,
    ),
    "429 when patience ran out": (BctrlRateLimitError("429", status=429), StopResult.REJECTED),
    "503 when patience ran out": (BctrlServerError("503", status=503), StopResult.REJECTED),
    "307": (BctrlResponseError("307", status=307), StopResult.REJECTED),
    "an invalid target": (
        BctrlConfigError("alias is empty", reason_class="invalid_input"),
        StopResult.REJECTED,
    ),
    # the request never reached the server
    "a session that is closed": (BctrlConfigError("closed"), StopResult.NOT_SENT),
    "connection refused": (BctrlNetworkError("no connection"), StopResult.NOT_SENT),
    "no connection in time": (BctrlTimeoutError("no connection in time"), StopResult.NOT_SENT),
    "an error of the root class": (BctrlError("cancelled before it began"), StopResult.NOT_SENT),
    # sent, and no answer settled it
    "timeout": (BctrlTimeoutError("no answer", may_have_stopped=True), StopResult.UNKNOWN),
    "disconnect": (BctrlNetworkError("it broke", may_have_stopped=True), StopResult.UNKNOWN),
    "not HTTP": (BctrlResponseError("not HTTP", may_have_stopped=True), StopResult.UNKNOWN),
    "500": (BctrlServerError("500", status=500, may_have_stopped=True), StopResult.UNKNOWN),
    "502": (BctrlServerError("502", status=502, may_have_stopped=True), StopResult.UNKNOWN),
    "504": (BctrlServerError("504", status=504, may_have_stopped=True), StopResult.UNKNOWN),
    "302": (BctrlResponseError("302", status=302, may_have_stopped=True), StopResult.UNKNOWN),
    "connection refused after an attempt that may have stopped it": (
        BctrlNetworkError("no connection", may_have_stopped=True),
        StopResult.UNKNOWN,
    ),
    "429 after an attempt that may have stopped it": (
        BctrlRateLimitError("429", status=429, may_have_stopped=True),
        StopResult.UNKNOWN,
    ),
    "401 after an attempt that may have stopped it": (
        BctrlAuthenticationError("401", status=401, may_have_stopped=True),
        StopResult.UNKNOWN,
    ),
    "409 for another reason after an attempt that may have stopped it": (
        BctrlConflictError("409", status=409, code="runtime.busy", may_have_stopped=True),
        StopResult.UNKNOWN,
    ),
    "session closed after an attempt that may have stopped it": (
        BctrlConfigError("the session is closed", may_have_stopped=True),
        StopResult.UNKNOWN,
    ),
}


@pytest.mark.parametrize(("ended", "result"), ROWS.values(), ids=ROWS.keys())
def test_a_runtime_or_error_decides_the_result(
    ended: Runtime | BctrlError, result: StopResult
) -> None:
    assert result_of(ended) is result


def test_the_rows_reach_every_result() -> None:
    assert {result for _, result in ROWS.values()} == set(StopResult)


@pytest.mark.parametrize(
    "ended", [row for row, _ in ROWS.values() if isinstance(row, BctrlError)], ids=str
)
def test_a_stop_that_may_have_taken_effect_is_never_not_sent_or_rejected(
    ended: BctrlError,
) -> None:
    if ended.may_have_stopped:
        assert result_of(ended) not in {StopResult.NOT_SENT, StopResult.REJECTED}


def test_counts_can_be_printed() -> None:
    assert str({StopResult.STOPPED: 3}) == "{'stopped': 3}"


def test_the_results_are_exactly_those_of_the_design() -> None:
    assert [str(result) for result in StopResult] == [
        *("stopped", "accepted", "already_stopped", "not_found"),
        *("rejected", "not_sent", "unknown"),
    ]


def test_an_outcome_survives_pickling_with_its_error() -> None:
    outcome = StopOutcome(
        index=7,
        target=RuntimeRef("ws-1", "crm"),
        result=StopResult.UNKNOWN,
        state=RuntimeState.UNCONFIRMED,
        error=BctrlTimeoutError("no answer", alias="crm", may_have_stopped=True),
        attempts=3,
        elapsed=1.5,
    )

    twin = pickle.loads(pickle.dumps(outcome))  # noqa: S301

    assert vars(twin.error) == vars(outcome.error)
    assert msgspec.structs.replace(twin, error=outcome.error) == outcome


def test_an_outcome_has_the_time_at_which_it_was_made_in_utc() -> None:
    before = datetime.now(UTC)
    outcome = StopOutcome(
        index=0,
        target=RuntimeRef("ws-1", "crm"),
        result=StopResult.STOPPED,
        state=RuntimeState.NOT_RUNNING,
    )

    assert before <= outcome.at <= datetime.now(UTC)
    assert outcome.at.tzinfo is UTC


def test_an_outcome_cannot_be_changed() -> None:
    outcome = StopOutcome(
        index=0,
        target=RuntimeRef("ws-1", "crm"),
        result=StopResult.STOPPED,
        state=RuntimeState.NOT_RUNNING,
    )

    with pytest.raises(AttributeError, match="immutable"):
        outcome.result = StopResult.UNKNOWN  # type: ignore[misc]


def test_the_record_of_an_outcome_has_all_fields_of_its_json() -> None:
    error = BctrlConflictError("409", status=409, code="runtime.busy", request_id="req_7")
    outcome = StopOutcome(
        index=7,
        target=RuntimeRef("ws-1", "crm"),
        result=StopResult.REJECTED,
        state=RuntimeState.UNCONFIRMED,
        runtime=runtime(),
        error=error,
        attempts=3,
        elapsed=0.12345678,
        resumed=True,
    )

    assert OutcomeRecord.of(outcome) == OutcomeRecord(
        index=7,
        workspace_id="ws-1",
        alias="crm",
        result=StopResult.REJECTED,
        state=RuntimeState.UNCONFIRMED,
        at=outcome.at,
        attempts=3,
        resumed=True,
        elapsed=0.123457,
        runtime=runtime(),
        error=ErrorRecord(
            type="BctrlConflictError",
            message="409",
            advice="Check the runtime's status; retrying is safe",
            status=409,
            code="runtime.busy",
            request_id="req_7",
        ),
    )


def test_an_outcome_as_a_dict_has_every_field_as_a_json_value() -> None:
    error = BctrlServerError(
        "the server answered 500", status=500, code="server.error", may_have_stopped=True
    )
    error.operation, error.workspace_id, error.alias = "stop", "ws", "crm"
    target = RuntimeRef("ws", "crm")
    at = datetime(2026, 11, 26, 2, 30, tzinfo=UTC)
    failed = StopOutcome(
        index=3,
        target=target,
        result=StopResult.UNKNOWN,
        state=RuntimeState.UNCONFIRMED,
        error=error,
        at=at,
    )

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
        "attempts": 1,
        "resumed": False,
        "elapsed": 0.0,
        "runtime": None,
        "error": {
            "type": "BctrlServerError",
            "message": "the server answered 500",
            "advice": "Retrying is safe",
            "status": 500,
            "code": "server.error",
            "request_id": None,
            "may_have_stopped": True,
        },
    }
    assert json.loads(json.dumps(fields)) == fields


def test_an_error_has_the_same_json_and_text_after_it_was_recorded() -> None:
    """Fault: a journal had the summary of an error as its message, and the command all its text."""
    error = BctrlServerError(
        "the server answered 500",
        workspace_id="ws",
        alias="crm",
        attempts=2,
        status=500,
        request_id="req_7",
        hint="Look at the status page",
        may_have_stopped=True,
    )
    failed = StopOutcome(
        index=3,
        target=RuntimeRef("ws", "crm"),
        result=StopResult.UNKNOWN,
        state=RuntimeState.UNCONFIRMED,
        error=error,
        attempts=2,
    )

    again = OutcomeRecord.of(failed).outcome()

    assert again.to_dict() == failed.to_dict()
    assert str(again.error) == str(error)
    assert "Look at the status page. Retrying is safe" in str(error)


def test_a_runtime_in_the_dict_of_an_outcome_has_the_names_of_the_api() -> None:
    target = RuntimeRef("ws", "crm")
    outcome = StopOutcome(
        index=0,
        target=target,
        result=StopResult.STOPPED,
        state=RuntimeState.NOT_RUNNING,
        runtime=runtime(),
    )

    fields = outcome.to_dict()

    assert fields["error"] is None
    assert fields["runtime"] == msgspec.to_builtins(runtime())


def test_a_report_as_a_dict_has_its_counts_its_failures_and_its_end() -> None:
    error = BctrlAuthenticationError("the server answered 401", status=401)
    target = RuntimeRef("ws", "crm")
    failed = StopOutcome(
        index=0,
        target=target,
        result=StopResult.REJECTED,
        state=RuntimeState.UNCONFIRMED,
        error=error,
    )
    report = StopReport(
        total=1,
        counts=Counter({StopResult.REJECTED: 1}),
        failures=(failed,),
        states=Counter({RuntimeState.UNCONFIRMED: 1}),
        elapsed=1.23456789,
        retries=0,
        throttled=0,
        ended_early=error,
    )

    fields = report.to_dict()

    assert fields["ok"] is False
    assert fields["counts"] == {result.value: int(result == "rejected") for result in StopResult}
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


def test_a_complete_report_as_a_dict_is_ok() -> None:
    report = StopReport(
        total=0,
        counts=Counter(),
        failures=(),
        states=Counter(),
        elapsed=0.0,
        retries=0,
        throttled=0,
    )

    assert report.to_dict()["ok"] is True
    assert report.to_dict()["ended_early"] is None
