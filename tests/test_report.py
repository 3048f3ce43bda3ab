"""`StopReport`: its counts, and the errors that it raises."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest
from helpers import add_runtimes

from bctrl_async import (
    BctrlError,
    BctrlNetworkError,
    BctrlNotFoundError,
    BctrlSession,
    BctrlTimeoutError,
    Runtime,
    RuntimeRef,
    RuntimeState,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.emulator import Emulator


def failure(index: int, error: BctrlError | None) -> StopOutcome:
    return StopOutcome(
        index=index,
        target=RuntimeRef("ws-1", str(index)),
        result=StopResult.UNKNOWN,
        state=RuntimeState.UNCONFIRMED,
        error=error,
    )


def report_of(*failures: StopOutcome, ended_early: BctrlError | None = None) -> StopReport:
    counts = Counter({StopResult.STOPPED: 2})
    counts.update(outcome.result for outcome in failures)
    return StopReport(
        total=counts.total(),
        counts=counts,
        failures=failures,
        states=Counter({RuntimeState.NOT_RUNNING: 2, RuntimeState.UNCONFIRMED: len(failures)}),
        elapsed=1.0,
        retries=0,
        throttled=0,
        ended_early=ended_early,
    )


TIMEOUT = BctrlTimeoutError("no answer", workspace_id="ws-1", alias="0", may_have_stopped=True)
NETWORK = BctrlNetworkError("no connection")
ENDED = BctrlError("the deadline of 3 s has passed")


class TestReport:
    def test_it_is_printed_as_the_summary_of_the_command(self) -> None:
        assert str(report_of()) == "2 of 2 no longer running after 1.00 s: 2 stopped"
        assert str(report_of(failure(2, TIMEOUT), failure(3, NETWORK))) == (
            "2 of 4 no longer running, 2 unconfirmed after 1.00 s: 2 stopped, 2 unknown"
        )

    def test_what_is_printed_says_what_was_not_sent_and_why_it_ended(self) -> None:
        report = msgspec.structs.replace(
            report_of(ended_early=ENDED), resumed=1_000, counts=Counter()
        )

        assert str(report) == (
            "2 of 2 no longer running after 1.00 s; 1,000 from an earlier run, not sent again; "
            "ended early: the deadline of 3 s has passed"
        )

    def test_a_report_without_failures_is_ok_and_raises_nothing(self) -> None:
        report = report_of()
        assert report.ok
        report.raise_for_failures()

    @pytest.mark.parametrize(
        ("failures", "ended_early", "message"),
        [
            ([NETWORK, TIMEOUT], None, "2 of 4 runtimes may still be running"),
            ([TIMEOUT], ENDED, "1 of 3 runtimes may still be running, and the run ended early"),
            ([], ENDED, "0 of 2 runtimes may still be running, and the run ended early"),
        ],
    )
    def test_the_errors_of_all_failures_are_raised_as_a_group_after_the_end_of_the_run(
        self, failures: list[BctrlError], ended_early: BctrlError | None, message: str
    ) -> None:
        report = report_of(*(failure(0, error) for error in failures), ended_early=ended_early)
        assert not report.ok
        for _ in range(2):
            with pytest.raises(ExceptionGroup) as caught:
                report.raise_for_failures()
            assert caught.value.message == message
            assert list(caught.value.exceptions) == [*filter(None, [ended_early]), *failures]

    def test_a_result_that_did_not_occur_has_a_count_of_0(self) -> None:
        report = report_of(failure(0, TIMEOUT))

        assert {result: report.counts[result] for result in StopResult} == {
            **dict.fromkeys(StopResult, 0),
            StopResult.STOPPED: 2,
            StopResult.UNKNOWN: 1,
        }
        assert report.counts["rejected"] == 0  # type: ignore[index]
        assert report.counts["stopped"] == 2  # type: ignore[index]

    def test_a_failure_can_be_caught_by_its_class(self) -> None:
        caught: list[Exception] = []
        try:
            report_of(failure(0, TIMEOUT), ended_early=ENDED).raise_for_failures()
        except* TimeoutError as group:
            caught += group.exceptions
        except* BctrlError as group:
            caught += group.exceptions

        assert caught == [TIMEOUT, ENDED]

    def test_a_report_is_immutable(self) -> None:
        with pytest.raises(AttributeError, match="immutable"):
            report_of().total = 5  # type: ignore[misc]


class TestMissing:
    @pytest.mark.parametrize("options", [{}, {"missing_ok": False}])
    async def test_a_target_that_is_not_found_is_a_failure(
        self, emulator: Emulator, session: BctrlSession, options: dict[str, Any]
    ) -> None:
        add_runtimes(emulator, 2)
        report = await session.stop_runtimes([("ws-l", "r0"), ("ws-l", "r1")], **options)

        assert report.counts == {StopResult.NOT_FOUND: 2}
        assert not report.ok
        assert [outcome.result for outcome in report.failures] == [StopResult.NOT_FOUND] * 2
        with pytest.raises(ExceptionGroup, match="2 of 2 runtimes may still be running") as caught:
            report.raise_for_failures()
        assert caught.group_contains(BctrlNotFoundError)
        assert {emulator.status("ws-1", alias) for alias in ("r0", "r1")} == {"active"}

    async def test_missing_ok_makes_it_a_success_and_nothing_else(
        self, session: BctrlSession
    ) -> None:
        targets = [("ws-1", "crm"), ("ws-1", "no")]
        report = await session.stop_runtimes(targets, missing_ok=True)

        assert report.counts == {StopResult.STOPPED: 1, StopResult.NOT_FOUND: 1}
        assert report.states == {RuntimeState.NOT_RUNNING: 2}
        assert report.ok

        report = await session.stop_runtimes([*targets, ("ws-1", "..")], missing_ok=True)
        assert [outcome.target.alias for outcome in report.failures] == [".."]

    @pytest.mark.parametrize("missing_ok", [True, False])
    async def test_a_runtime_that_is_gone_since_it_was_listed_is_not_found_as_well(
        self, emulator: Emulator, session: BctrlSession, *, missing_ok: bool
    ) -> None:
        def delete(runtime: Runtime) -> bool:
            emulator._runtimes.pop(("ws-1", runtime.alias))
            return True

        report = await session.stop_workspace("ws-1", where=delete, missing_ok=missing_ok)

        assert report.counts == {StopResult.NOT_FOUND: 1}
        assert report.ok is missing_ok
