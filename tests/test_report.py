"""`StopReport`: its counts, and the errors that it raises."""

from __future__ import annotations

import re
from collections import Counter

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

    def test_a_report_with_a_failure_is_not_ok(self) -> None:
        assert not report_of(failure(0, TIMEOUT)).ok

    def test_the_report_of_a_run_that_ended_early_is_not_ok(self) -> None:
        assert not report_of(ended_early=ENDED).ok

    def test_a_result_that_did_not_occur_has_a_count_of_0(self) -> None:
        report = report_of(failure(0, TIMEOUT))

        assert {result: report.counts[result] for result in StopResult} == {
            **dict.fromkeys(StopResult, 0),
            StopResult.STOPPED: 2,
            StopResult.UNKNOWN: 1,
        }
        assert report.counts["rejected"] == 0  # type: ignore[index]
        assert report.counts["stopped"] == 2  # type: ignore[index]

    def test_the_errors_of_all_failures_are_raised_as_a_group_in_order(self) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            report_of(failure(1, NETWORK), failure(0, TIMEOUT)).raise_for_failures()

        assert caught.value.message == "2 of 4 runtimes may still be running"
        assert list(caught.value.exceptions) == [NETWORK, TIMEOUT]
        assert "stop of '0' in workspace 'ws-1'" in str(caught.value.exceptions[1])

    def test_ended_early_is_the_first_error_of_the_group(self) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            report_of(failure(0, TIMEOUT), ended_early=ENDED).raise_for_failures()

        assert caught.value.message == (
            "1 of 3 runtimes may still be running, and the run ended early"
        )
        assert list(caught.value.exceptions) == [ENDED, TIMEOUT]

    def test_a_run_that_ended_early_without_failures_raises_ended_early(self) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            report_of(ended_early=ENDED).raise_for_failures()

        assert caught.value.message == (
            "0 of 2 runtimes may still be running, and the run ended early"
        )
        assert list(caught.value.exceptions) == [ENDED]

    def test_a_failure_can_be_caught_by_its_class(self) -> None:
        caught: list[Exception] = []
        try:
            report_of(failure(0, TIMEOUT), ended_early=ENDED).raise_for_failures()
        except* TimeoutError as group:
            caught += group.exceptions
        except* BctrlError as group:
            caught += group.exceptions

        assert caught == [TIMEOUT, ENDED]

    def test_raising_does_not_change_the_report(self) -> None:
        report = report_of(failure(0, TIMEOUT), ended_early=ENDED)
        for _ in range(2):
            with pytest.raises(ExceptionGroup) as caught:
                report.raise_for_failures()
            assert len(caught.value.exceptions) == 2
        assert len(report.failures) == 1

    def test_a_report_is_immutable(self) -> None:
        with pytest.raises(AttributeError, match="immutable"):
            report_of().total = 5  # type: ignore[misc]

    async def test_the_report_of_a_run_matches_the_server(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        targets = add_runtimes(emulator, 3)
        report = await session.stop_runtimes([*targets, ("ws-1", "gone"), ("ws-1", "")])

        assert report.total == 5
        assert report.counts == {
            StopResult.STOPPED: 3,
            StopResult.NOT_FOUND: 1,
            StopResult.REJECTED: 1,
        }
        assert report.counts[StopResult.UNKNOWN] == report.retries == report.throttled == 0
        assert sorted(outcome.index for outcome in report.failures) == [3, 4]
        assert emulator.received.total() == 4
        with pytest.raises(ExceptionGroup, match=re.escape("2 of 5 runtimes may still be running")):
            report.raise_for_failures()


class TestMissing:
    """Fault: with a mistyped workspace every runtime runs on, and the report is `ok`."""

    @pytest.mark.parametrize("missing_ok", [None, False])
    async def test_a_target_that_is_not_found_is_a_failure(
        self, emulator: Emulator, session: BctrlSession, *, missing_ok: bool | None
    ) -> None:
        add_runtimes(emulator, 2)
        mistyped = [("ws-l", "r0"), ("ws-l", "r1")]
        if missing_ok is None:
            report = await session.stop_runtimes(mistyped)
        else:
            report = await session.stop_runtimes(mistyped, missing_ok=missing_ok)

        assert report.counts == {StopResult.NOT_FOUND: 2}
        assert not report.ok
        assert [outcome.result for outcome in report.failures] == [StopResult.NOT_FOUND] * 2
        with pytest.raises(ExceptionGroup, match="2 of 2 runtimes may still be running") as caught:
            report.raise_for_failures()
        assert caught.group_contains(BctrlNotFoundError)
        assert {emulator.status("ws-1", alias) for alias in ("r0", "r1")} == {"active"}

    async def test_missing_ok_makes_it_a_success(self, session: BctrlSession) -> None:
        report = await session.stop_runtimes([("ws-1", "crm"), ("ws-1", "no")], missing_ok=True)

        assert report.counts == {StopResult.STOPPED: 1, StopResult.NOT_FOUND: 1}
        assert report.states == {RuntimeState.NOT_RUNNING: 2}
        assert report.ok
        assert report.failures == ()
        report.raise_for_failures()

    async def test_missing_ok_accepts_nothing_else(self, session: BctrlSession) -> None:
        report = await session.stop_runtimes([("ws-1", ".."), ("ws-1", "no")], missing_ok=True)

        assert report.counts == {StopResult.REJECTED: 1, StopResult.NOT_FOUND: 1}
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
