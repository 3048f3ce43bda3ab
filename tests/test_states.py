"""The state of a runtime after its stop, as far as its outcome tells."""

from __future__ import annotations

import pytest
from runtimes import runtime

from bctrl_async import (
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlValidationError,
    Runtime,
    RuntimeRef,
    RuntimeState,
    StopResult,
)
from bctrl_async.outcomes import outcome_of, state_of

NOT_RUNNING, STILL_RUNNING = RuntimeState.NOT_RUNNING, RuntimeState.STILL_RUNNING
UNKNOWN, INVALID = RuntimeState.UNCONFIRMED, RuntimeState.INVALID


@pytest.mark.parametrize(
    ("result", "status", "state"),
    [
        ("stopped", "stopped", NOT_RUNNING),
        ("stopped", None, NOT_RUNNING),  # From a journal.
        ("already_stopped", None, NOT_RUNNING),
        ("accepted", "failed", NOT_RUNNING),
        ("accepted", "active", STILL_RUNNING),
        ("accepted", "paused", UNKNOWN),
        ("accepted", None, UNKNOWN),
        ("unknown", None, UNKNOWN),
        ("unknown", "active", STILL_RUNNING),
        ("rejected", "active", STILL_RUNNING),
        ("not_found", None, UNKNOWN),
        ("rejected", None, UNKNOWN),
        ("not_sent", None, UNKNOWN),
    ],
)
def test_every_outcome_has_a_state(result: str, status: str | None, state: RuntimeState) -> None:
    described = None if status is None else runtime(status)
    assert state_of(StopResult(result), described, None) is state


@pytest.mark.parametrize(
    ("error", "described", "state"),
    [
        # Fault: a line that is not a target was counted as still running.
        (BctrlConfigError("invalid", reason_class="invalid_input"), None, INVALID),
        # Fault: a listed runtime that cannot be addressed was counted as invalid.
        (
            BctrlConfigError("invalid", reason_class="invalid_input"),
            runtime("active"),
            STILL_RUNNING,
        ),
        # A target that only the server finds invalid may run.
        (BctrlValidationError("400", status=400, reason_class="invalid_input"), None, UNKNOWN),
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


def test_a_conflict_that_says_that_nothing_runs_is_no_error() -> None:
    conflict = BctrlConflictError("409", status=409, code="runtime.not_active", request_id="r-1")
    outcome = outcome_of(RuntimeRef("ws-1", "crm"), conflict, attempts=1)
    assert (outcome.ok, outcome.error, outcome.request_id) == (True, None, "r-1")
