"""`StopReport`: its counts, the errors that it raises, and whether it is `ok`."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from conftest import KEY
from pydantic import TypeAdapter
from support.helpers import unused_url

from bctrl_async import (
    BctrlError,
    BctrlNetworkError,
    BctrlSession,
    BctrlTimeoutError,
    RetryPolicy,
    Runtime,
    RuntimeRef,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.fastapi import StopReport as ReportBody


def report_of(
    *errors: BctrlError | None, ended: BctrlError | None = None
) -> StopReport:
    """Make a report of two stopped targets, and of a failure for each error."""
    failures = tuple(
        StopOutcome(
            index=index,
            target=RuntimeRef("ws-1", str(index)),
            result=StopResult.UNKNOWN,
            error=error,
        )
        for index, error in enumerate(errors)
    )
    return StopReport(
        total=2 + len(failures),
        counts=Counter({StopResult.STOPPED: 2, StopResult.UNKNOWN: len(failures)}),
        failures=failures,
        running=0,
        not_running=2,
        elapsed=1.23456789,
        resumed=0 if ended is None else 1000,
        ended_early=ended,
    )


HALF_STOPPED = "2 stopped, 2 unknown"
TIMEOUT = BctrlTimeoutError(
    "no answer", workspace_id="ws-1", alias="0", may_have_stopped=True
)
NETWORK = BctrlNetworkError("no connection")
ENDED = BctrlError("the deadline of 3 s has passed")


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (
            StopReport(
                total=0,
                counts=Counter(),
                failures=(),
                running=0,
                not_running=0,
                elapsed=0.0,
            ),
            "0 of 0 no longer running after 0.00 s",
        ),
        (
            report_of(TIMEOUT, NETWORK),
            f"2 of 4 no longer running, 2 unconfirmed after 1.23 s: {HALF_STOPPED}",
        ),
        (
            report_of(ended=ENDED),
            (
                "2 of 2 no longer running after 1.23 s: 2 stopped; 1,000 from an "
                "earlier run, not sent again; ended early: the deadline of 3 s has "
                "passed"
            ),
        ),
    ],
)
def test_it_is_printed_as_the_summary_of_the_command(
    report: StopReport, text: str
) -> None:
    assert str(report) == text


@pytest.mark.parametrize(
    ("errors", "ended", "message"),
    [
        ([NETWORK, TIMEOUT], None, "2 of 4 runtimes may still be running"),
        (
            [TIMEOUT],
            ENDED,
            "1 of 3 runtimes may still be running, and the run ended early",
        ),
        ([], ENDED, "0 of 2 runtimes may still be running, and the run ended early"),
    ],
)
def test_the_errors_of_all_failures_are_raised_as_a_group_after_the_end_of_the_run(
    errors: list[BctrlError], ended: BctrlError | None, message: str
) -> None:
    report = report_of(*errors, ended=ended)

    assert not report.ok
    for _ in range(2):
        with pytest.raises(ExceptionGroup) as caught:
            report.raise_for_failures()
        assert caught.value.message == message
        assert list(caught.value.exceptions) == [*filter(None, [ended]), *errors]


def test_a_failure_without_an_error_is_raised_as_well() -> None:
    with pytest.raises(ExceptionGroup):
        report_of(None).raise_for_failures()


def test_as_a_dict_it_has_its_counts_its_failures_and_its_end() -> None:
    report = report_of(TIMEOUT, ended=ENDED)
    fields = report.to_dict()

    assert (fields["ok"], fields["elapsed"]) == (False, 1.234568)
    counts = dict.fromkeys(StopResult, 0) | {
        StopResult.STOPPED: 2,
        StopResult.UNKNOWN: 1,
    }
    assert fields["counts"] == {str(result): count for result, count in counts.items()}
    assert (fields["running"], fields["not_running"]) == (0, 2)
    assert fields["failures"] == [report.failures[0].to_dict()]
    ended = {"type": "BctrlError", "message": ENDED.summary, "may_have_stopped": False}
    unset = dict.fromkeys(("advice", "status", "code", "request_id"))
    assert fields["ended_early"] == ended | unset
    assert set(fields) == {"ok", *StopReport.__struct_fields__}
    assert json.loads(json.dumps(fields)) == fields


class TestMissing:
    async def test_missing_ok_makes_it_a_success_and_nothing_else(
        self, session: BctrlSession
    ) -> None:
        targets = [("ws-1", "crm"), ("ws-1", "no")]
        outcomes: list[StopOutcome] = []
        report = await session.stop_runtimes(
            targets, missing_ok=True, on_outcome=outcomes.append
        )

        assert [(outcome.ok, outcome.error) for outcome in outcomes] == [
            (True, None)
        ] * 2
        assert report.counts == {StopResult.STOPPED: 1, StopResult.NOT_FOUND: 1}
        assert (report.running, report.not_running) == (0, 2)
        assert report.ok

        report = await session.stop_runtimes(
            [*targets, ("ws-1", "..")], missing_ok=True
        )
        assert [outcome.target.alias for outcome in report.failures] == [".."]

    @pytest.mark.parametrize("missing_ok", [True, False])
    async def test_a_runtime_that_is_gone_since_it_was_listed_is_not_found_as_well(
        self, emulator: Emulator, session: BctrlSession, *, missing_ok: bool
    ) -> None:
        def delete(runtime: Runtime) -> bool:
            emulator._runtimes.pop(("ws-1", runtime.alias))
            return True

        report = await session.stop_workspace(
            "ws-1", where=delete, missing_ok=missing_ok
        )
        assert report.counts == {StopResult.NOT_FOUND: 1}
        assert report.ok is missing_ok


TARGET = ("ws-1", "crm")
ONCE = RetryPolicy(attempts=1, base=0.001, cap=0.001, patience=0)

ROWS: dict[str, tuple[list[Fault | Reply], str, bool, bool]] = {
    # What the server does, the result without verify, ok without and with verify.
    "stopped": ([], "stopped", True, True),
    "accepted": ([Fault.ACCEPTED], "accepted", False, True),
    "no effect": (
        [Reply(200, body="OK", takes_effect=False)],
        "accepted",
        False,
        False,
    ),
    "failed": ([Fault.FAILED], "accepted", True, True),
    "already stopped": ([], "already_stopped", True, True),
    "not found": ([], "not_found", False, False),
    "rejected": ([Reply(403, code="workspace.forbidden")], "rejected", False, False),
    "throttled": ([Fault.RATE_LIMITED], "rejected", False, False),
    "not sent": ([], "not_sent", False, False),
    "answer lost": ([Fault.DROP_AFTER], "unknown", False, True),
    "request lost": ([Fault.DROP_BEFORE], "unknown", False, False),
}


async def stop_one(
    emulator: Emulator, name: str, verify: float
) -> tuple[StopOutcome, StopReport]:
    """Stop the target of a row; return its outcome and the report."""
    emulator.add_runtime(
        *TARGET, status="stopped" if name == "already stopped" else "active"
    )
    emulator.inject(*ROWS[name][0], method="POST")
    target = ("ws-1", "nobody") if name == "not found" else TARGET
    outcomes: list[StopOutcome] = []
    with unused_url() as unused:
        url = unused if name == "not sent" else emulator.url
        async with BctrlSession(KEY, base_url=url, retry=ONCE) as session:
            report = await session.stop_runtimes(
                [target], verify=verify, on_outcome=outcomes.append
            )
    [outcome] = outcomes
    return outcome, report


@pytest.mark.parametrize("verify", [False, 0.05])
@pytest.mark.parametrize("name", ROWS)
async def test_a_report_is_ok_only_if_no_runtime_runs(
    emulator: Emulator, name: str, *, verify: float
) -> None:
    _, result, ok, ok_if_verified = ROWS[name]
    expected = ok_if_verified if verify else ok
    outcome, report = await stop_one(emulator, name, verify)

    assert verify or outcome.result == result
    assert not expected or emulator.status(*TARGET) in {"stopped", "failed"}
    forms = {
        "outcome": outcome.ok,
        "no error": outcome.error is None,
        "report": report.ok,
        "JSON of the outcome": outcome.to_dict()["ok"],
        "JSON of the report": report.to_dict()["ok"],
        "FastAPI": TypeAdapter(ReportBody).dump_python(report)["ok"],
    }
    assert forms == dict.fromkeys(forms, expected)
    if expected:
        report.raise_for_failures()
        return
    assert report.failures == (outcome,)
    with pytest.raises(ExceptionGroup, match="1 of 1 runtimes may still be running"):
        report.raise_for_failures()
