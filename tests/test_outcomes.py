"""The result of a stop, decided from its runtime or error, and its JSON."""

import json
import pickle
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from support.runtimes import runtime

from bctrl_async._calls.results import explain, outcome_of, result_of, running_of
from bctrl_async._entries import Entry
from bctrl_async.errors import (
    BctrlApiError,
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNotFoundError,
    BctrlRateLimitError,
    BctrlServerError,
    BctrlValidationError,
)
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.outcomes import StopOutcome, StopResult

NOT_ACTIVE = "runtime.not_active"

RESULTS: dict[StopResult, list[Runtime | BctrlError]] = {
    StopResult.STOPPED: [runtime("stopped")],
    StopResult.ACCEPTED: [runtime("active"), runtime("failed"), runtime("paused")],
    StopResult.ALREADY_STOPPED: [
        BctrlConflictError(
            "then not active", status=409, code=NOT_ACTIVE, may_have_stopped=True
        ),
    ],
    StopResult.NOT_FOUND: [
        BctrlNotFoundError(
            "then not found",
            status=404,
            code="workspace.not_found",
            may_have_stopped=True,
        ),
    ],
    # The server's last word was no.
    StopResult.REJECTED: [
        BctrlNotFoundError(
            "404 for a path", status=404, code="route.not_found", body="{}"
        ),
        BctrlConflictError("409, busy", status=409, code="runtime.busy"),
        BctrlApiError("not active, but no conflict", status=410, code=NOT_ACTIVE),
        # A target that only the server finds invalid may run.
        BctrlValidationError("400", status=400, reason_class="invalid_input"),
    ],
    # It was sent, and no answer settled it.
    StopResult.UNKNOWN: [
        BctrlRateLimitError("then 429", status=429, may_have_stopped=True),
        BctrlConflictError(
            "then busy", status=409, code="runtime.busy", may_have_stopped=True
        ),
        BctrlConfigError("then the session is closed", may_have_stopped=True),
    ],
}
"""Results that `test_kinds.py` lacks: of runtimes, and after another attempt."""


@pytest.mark.parametrize(
    ("ended", "result"),
    [(ended, result) for result, all_ended in RESULTS.items() for ended in all_ended],
    ids=lambda value: str(value.status) if isinstance(value, Runtime) else str(value),
)
def test_a_runtime_or_error_decides_the_result(
    ended: Runtime | BctrlError, result: StopResult
) -> None:
    assert result_of(ended) is result


def test_a_count_of_results_reads_as_one_of_texts() -> None:
    assert str({StopResult.STOPPED: 3}) == "{'stopped': 3}"


@pytest.mark.parametrize(
    ("result", "status", "running"),
    [
        ("stopped", "stopped", False),
        ("stopped", None, False),  # It comes from a journal.
        ("already_stopped", None, False),
        ("accepted", "failed", False),
        ("accepted", "active", True),
        ("accepted", "paused", None),
        ("unknown", None, None),
        ("rejected", "active", True),
        ("rejected", None, None),
        ("invalid", None, None),
        ("invalid", "active", True),
    ],
)
def test_a_result_and_a_status_decide_whether_the_runtime_is_running(
    result: str, status: str | None, *, running: bool | None
) -> None:
    described = None if status is None else runtime(status)
    assert running_of(StopResult(result), described) is running


@pytest.mark.parametrize("status", ["stopped", "failed", "active", "paused"])
def test_an_answer_is_ok_without_an_error_or_has_one_that_says_why(status: str) -> None:
    target = RuntimeRef("ws-1", "crm")
    outcome = explain(outcome_of(target, runtime(status), attempts=1))

    assert outcome.ok is (outcome.error is None) is (status in {"stopped", "failed"})
    if outcome.error is not None:
        assert str(outcome.error) == (
            "stop of 'crm' in workspace 'ws-1': the stop was accepted, and the runtime "
            f"was still {status!r} after it (the runtime may have stopped). Look at it "
            "again, or stop it again: a stop is safe to repeat"
        )


@pytest.mark.parametrize(("own", "expected"), [("req-2", "req-2"), (None, "req-1")])
def test_the_request_id_of_the_last_answer_takes_precedence(
    own: str | None, expected: str
) -> None:
    error = BctrlServerError("500", status=500, request_id=own)

    outcome = outcome_of(RuntimeRef("ws-1", "crm"), error, request_id="req-1")

    assert outcome.request_id == expected


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


def failed_with(error: BctrlError, **fields: Any) -> StopOutcome:  # noqa: ANN401 - any field.
    return StopOutcome(
        index=3,
        target=RuntimeRef("ws", "crm"),
        result=StopResult.UNKNOWN,
        error=error,
        attempts=2,
        **fields,
    )


def test_an_outcome_has_its_time_in_utc_and_survives_pickling_with_its_error() -> None:
    before = datetime.now(UTC)
    outcome = failed_with(ERROR, elapsed=1.5)
    twin = pickle.loads(pickle.dumps(outcome))  # noqa: S301 - our own.

    assert vars(twin.error) == vars(ERROR)
    assert msgspec.structs.replace(twin, error=ERROR) == outcome
    assert before <= outcome.at <= datetime.now(UTC)
    assert outcome.at.tzinfo is UTC


def test_an_outcome_as_a_dict_has_every_field_as_a_json_value() -> None:
    fields = failed_with(
        ERROR, at=AT, sent_at=AT, elapsed=0.12345678, resumed=True
    ).to_dict()

    assert fields == {
        "index": 3,
        "workspace_id": "ws",
        "alias": "crm",
        "result": "unknown",
        "ok": False,
        "running": None,
        "request_id": None,
        "at": "2026-11-26T02:30:00Z",
        "sent_at": "2026-11-26T02:30:00Z",
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
    stopped = outcome_of(RuntimeRef("ws", "crm"), runtime()).to_dict()
    assert (stopped["error"], stopped["runtime"]) == (
        None,
        msgspec.to_builtins(runtime()),
    )


def test_an_error_has_the_same_json_and_text_after_it_was_recorded() -> None:
    failed = failed_with(ERROR, runtime=runtime("active"))
    again = Entry.of(failed).outcome()

    assert again.to_dict() == failed.to_dict()
    assert str(again.error) == str(ERROR)
    assert "Look at the status page. Retrying is safe" in str(ERROR)
