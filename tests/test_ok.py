"""`ok` in every form of a report: false wherever a runtime runs or may run."""

from __future__ import annotations

from collections import Counter

import pytest
from conftest import KEY
from helpers import unused_url
from pydantic import TypeAdapter

from bctrl_async import (
    BctrlSession,
    RetryPolicy,
    RuntimeRef,
    RuntimeState,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.fastapi import StopReport as ReportBody

TARGET = ("ws-1", "crm")
ONCE = RetryPolicy(attempts=1, base=0.001, cap=0.001, patience=0)

ROWS: list[tuple[str, list[Fault | Reply], str, bool, bool]] = [
    # Name, what the server does, result without verify, ok without and with verify.
    ("stopped", [], "stopped", True, True),
    ("accepted", [Fault.ACCEPTED], "accepted", False, True),
    ("no effect", [Reply(200, body="OK", takes_effect=False)], "accepted", False, False),
    ("failed", [Fault.FAILED], "accepted", True, True),
    ("already stopped", [], "already_stopped", True, True),
    ("not found", [], "not_found", False, False),
    ("rejected", [Reply(403, code="workspace.forbidden")], "rejected", False, False),
    ("throttled", [Fault.RATE_LIMITED], "rejected", False, False),
    ("not sent", [], "not_sent", False, False),
    ("answer lost", [Fault.DROP_AFTER], "unknown", False, True),
    ("request lost", [Fault.DROP_BEFORE], "unknown", False, False),
]


async def stop_one(
    emulator: Emulator,
    name: str,
    faults: list[Fault | Reply],
    *,
    verify: float = False,
    missing_ok: bool = False,
) -> tuple[StopOutcome, StopReport]:
    """Stop the target of a row; return its outcome and the report."""
    emulator.add_runtime(*TARGET, status="stopped" if name == "already stopped" else "active")
    emulator.inject(*faults, method="POST")
    target = ("ws-1", "nobody") if name == "not found" else TARGET
    outcomes: list[StopOutcome] = []
    with unused_url() as unused:
        url = unused if name == "not sent" else emulator.url
        async with BctrlSession(KEY, base_url=url, retry=ONCE) as session:
            report = await session.stop_runtimes(
                [target], verify=verify, missing_ok=missing_ok, on_outcome=outcomes.append
            )
    [outcome] = outcomes
    return outcome, report


@pytest.mark.parametrize("verify", [False, 0.05])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row[0]))
async def test_a_report_is_ok_only_if_no_runtime_runs(
    emulator: Emulator, *, row: tuple[str, list[Fault | Reply], str, bool, bool], verify: float
) -> None:
    name, faults, result, ok, ok_if_verified = row
    expected = ok_if_verified if verify else ok
    outcome, report = await stop_one(emulator, name, faults, verify=verify)
    if not verify:
        assert outcome.result == result
    if expected:
        assert emulator.status(*TARGET) in {"stopped", "failed"}
    body = TypeAdapter(ReportBody).validate_python(report)
    forms = {
        "outcome": outcome.ok,
        "no error": outcome.error is None,
        "report": report.ok,
        "JSON of the outcome": outcome.to_dict()["ok"],
        "JSON of the report": report.to_dict()["ok"],
        "FastAPI": body.ok,
    }
    assert forms == dict.fromkeys(forms, expected)
    if expected:
        report.raise_for_failures()
        return
    assert report.failures == (outcome,)
    with pytest.raises(ExceptionGroup, match="1 of 1 runtimes may still be running"):
        report.raise_for_failures()


@pytest.mark.parametrize("missing_ok", [False, True])
async def test_a_target_that_is_not_found_has_an_error_unless_that_is_ok(
    emulator: Emulator, *, missing_ok: bool
) -> None:
    outcome, _ = await stop_one(emulator, "not found", [], missing_ok=missing_ok)
    assert outcome.ok is missing_ok
    assert (outcome.error is None) is missing_ok


def test_a_failure_without_an_error_is_raised_as_well() -> None:
    failure = StopOutcome(
        index=0,
        target=RuntimeRef("ws-1", "crm"),
        result=StopResult.UNKNOWN,
        state=RuntimeState.UNCONFIRMED,
    )
    report = StopReport(
        total=1,
        counts=Counter([failure.result]),
        states=Counter([failure.state]),
        failures=(failure,),
        elapsed=0.0,
    )
    with pytest.raises(ExceptionGroup):
        report.raise_for_failures()
