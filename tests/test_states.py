"""The state of a runtime after its stop, as far as its outcome tells."""

from __future__ import annotations

import msgspec
import pytest
from runtimes import runtime

from bctrl_async import (
    BctrlConfigError,
    BctrlNotFoundError,
    BctrlValidationError,
    RuntimeRef,
    RuntimeState,
    StopOutcome,
    StopResult,
)
from bctrl_async.outcomes import state_of

NOT_RUNNING, STILL_RUNNING = RuntimeState.NOT_RUNNING, RuntimeState.STILL_RUNNING
UNKNOWN, INVALID = RuntimeState.UNCONFIRMED, RuntimeState.INVALID


def outcome(result: str, status: str | None) -> StopOutcome:
    return StopOutcome(
        index=0,
        target=RuntimeRef("ws-1", "crm"),
        result=StopResult(result),
        runtime=None if status is None else runtime(status),
    )


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
        ("not_found", None, UNKNOWN),
        ("rejected", None, UNKNOWN),
        ("not_sent", None, UNKNOWN),
    ],
)
def test_every_outcome_has_a_state(result: str, status: str | None, state: RuntimeState) -> None:
    assert state_of(outcome(result, status), missing_ok=False) is state
    if result != "not_found":
        assert state_of(outcome(result, status), missing_ok=True) is state


def test_a_missing_runtime_does_not_run_if_it_may_be_missing() -> None:
    assert state_of(outcome("not_found", None), missing_ok=True) is NOT_RUNNING


def test_a_runtime_that_is_gone_after_it_accepted_its_stop_does_not_run() -> None:
    gone = BctrlNotFoundError("404", status=404, code="runtime.not_found")
    accepted = msgspec.structs.replace(outcome("accepted", None), error=gone)
    assert state_of(accepted, missing_ok=False) is NOT_RUNNING


def test_a_404_that_does_not_name_the_runtime_tells_nothing_of_an_accepted_stop() -> None:
    gateway = BctrlNotFoundError("404", status=404)
    accepted = msgspec.structs.replace(outcome("accepted", None), error=gateway)
    assert state_of(accepted, missing_ok=False) is UNKNOWN


def test_a_listed_runtime_that_cannot_be_addressed_runs() -> None:
    """Fault: it was counted as invalid."""
    invalid = BctrlConfigError("invalid alias", reason_class="invalid_input")
    rejected = msgspec.structs.replace(outcome("rejected", "active"), error=invalid)
    assert state_of(rejected, missing_ok=False) is STILL_RUNNING


def test_an_invalid_target_is_not_a_runtime() -> None:
    """Fault: a line that is not a target was counted as still running."""
    invalid = BctrlConfigError("invalid target", reason_class="invalid_input")
    rejected = msgspec.structs.replace(outcome("rejected", None), error=invalid)
    assert state_of(rejected, missing_ok=False) is INVALID


def test_a_target_that_only_the_server_finds_invalid_is_unknown() -> None:
    error = BctrlValidationError("400", status=400, reason_class="invalid_input")
    rejected = msgspec.structs.replace(outcome("rejected", None), error=error)
    assert state_of(rejected, missing_ok=False) is UNKNOWN


@pytest.mark.parametrize("result", StopResult)
def test_a_runtime_of_which_the_server_said_nothing_is_not_still_running(
    result: StopResult,
) -> None:
    """Fault: every `rejected` and `not_sent` target was counted as still running."""
    assert state_of(outcome(result, None), missing_ok=False) is not STILL_RUNNING


@pytest.mark.parametrize("result", StopResult)
def test_only_a_settled_outcome_without_a_runtime_is_known_not_to_run(result: StopResult) -> None:
    assert result.settled or state_of(outcome(result, None), missing_ok=True) is not NOT_RUNNING
