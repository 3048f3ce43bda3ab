"""The state of a runtime after its stop, as the command counts it."""

from __future__ import annotations

import msgspec
import pytest
from runtimes import runtime

from bctrl_async import BctrlNotFoundError, RuntimeRef, StopOutcome, StopResult
from bctrl_async.cli._states import RuntimeState, state_of

NOT_RUNNING, STILL_RUNNING = RuntimeState.NOT_RUNNING, RuntimeState.STILL_RUNNING
UNKNOWN = RuntimeState.UNKNOWN


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
        ("rejected", None, STILL_RUNNING),
        ("not_sent", None, STILL_RUNNING),
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


@pytest.mark.parametrize("result", StopResult)
def test_only_a_settled_outcome_without_a_runtime_is_known_not_to_run(result: StopResult) -> None:
    assert result.settled or state_of(outcome(result, None), missing_ok=True) is not NOT_RUNNING
