"""`verify=True`: poll runtimes that may still be running, mostly in virtual time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import pytest
from helpers import Connect, wait_for_requests
from journal_lines import read_lines
from runtimes import runtime
from simulated import Request, Server, Simulate, disconnected, targets

from bctrl_async import (
    BctrlAuthenticationError,
    BctrlError,
    BctrlNetworkError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlResponseError,
    BctrlServerError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    RuntimeRef,
    RuntimeState,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.bulk._verify import needs_verification, outcome_after_poll
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.journal import Journal
from bctrl_async.outcomes import state_of

STOPPED, ACCEPTED, UNKNOWN = StopResult.STOPPED, StopResult.ACCEPTED, StopResult.UNKNOWN
NOT_FOUND, NOT_SENT = StopResult.NOT_FOUND, StopResult.NOT_SENT


def not_found() -> BctrlError:
    return BctrlNotFoundError("404", status=404, code="runtime.not_found")


def make_outcome(result: StopResult, polled: Runtime | None = None) -> StopOutcome:
    return StopOutcome(
        index=0,
        target=RuntimeRef("ws-1", "crm"),
        result=result,
        state=state_of(result, polled, None),
        runtime=polled,
    )


class TestRules:
    @pytest.mark.parametrize(
        ("before", "result"),
        [
            (make_outcome(UNKNOWN), NOT_FOUND),
            # A gateway may say 200 to anything.
            (make_outcome(ACCEPTED), NOT_FOUND),
            # The server knew it, and accepted the stop: its name is not mistyped.
            (make_outcome(ACCEPTED, runtime("active")), ACCEPTED),
        ],
    )
    def test_a_runtime_that_no_longer_exists_is_not_found_unless_it_was_described(
        self, before: StopOutcome, result: StopResult
    ) -> None:
        error = not_found()
        settled = outcome_after_poll(before, error)
        is_gone = result is ACCEPTED
        assert (settled.result, settled.ok, settled.runtime) == (result, is_gone, None)
        assert settled.error is (None if is_gone else error)
        assert not needs_verification(settled)


def active_until(until: float, ended: str = "stopped") -> Server:
    """Report every runtime as active until this time, and as ended from then on."""
    return lambda each: runtime("active" if each.at < until else ended)


def answering(stop: Runtime | BctrlError, polled: Runtime | BctrlError) -> Server:
    """Answer every stop and every poll alike."""
    return lambda each: stop if each.stops else polled


class TestPolling:
    @pytest.mark.parametrize(("ended", "result"), [("stopped", STOPPED), ("failed", ACCEPTED)])
    @pytest.mark.parametrize("count", [1, 100])
    def test_accepted_stops_are_polled_until_the_runtimes_have_ended(
        self, simulate: Simulate, count: int, ended: str, result: StopResult
    ) -> None:
        simulation = simulate(active_until(20, ended))
        report = simulation.stop(count, verify=True)

        assert (report.ok, report.counts, report.retries) == (True, {result: count}, 0)
        assert 20 <= simulation.seconds <= 26
        assert len(simulation.stops) == count
        assert len(simulation.reads) <= 20 * count
        for outcome in simulation.outcomes:
            assert outcome.runtime == runtime(ended)
            assert (outcome.attempts, outcome.error) == (1, None)

    def test_the_delays_between_polls_grow_to_five_seconds(self, simulate: Simulate) -> None:
        simulation = simulate(active_until(10_000))
        simulation.stop(verify=60)

        # A stop and each poll take 0.1 s.
        at = [0.0, *(each.at for each in simulation.reads)]
        delays = [later - earlier - 0.1 for earlier, later in itertools.pairwise(at)]
        assert 0.25 <= delays[0] <= 0.5
        assert 0.5 <= delays[1] <= 1
        assert max(delays) == pytest.approx(5)
        assert at[-1] == pytest.approx(60.1)

    @pytest.mark.parametrize(
        "polled",
        [
            BctrlPermissionError("403", status=403),
            BctrlNotFoundError("a proxy's 404", status=404),
            BctrlResponseError("not JSON", status=200),
            BctrlError("cut off"),
        ],
    )
    def test_an_error_that_will_not_pass_ends_the_polls(
        self, simulate: Simulate, polled: BctrlError
    ) -> None:
        simulation = simulate(answering(runtime("active"), polled))
        report = simulation.stop(verify=True)

        assert report.counts == {ACCEPTED: 1}
        assert len(simulation.reads) == 1

    def test_a_runtime_that_stops_at_once_is_not_polled(self, simulate: Simulate) -> None:
        simulation = simulate(lambda _: runtime("stopped"))
        assert simulation.stop(verify=True).counts == {STOPPED: 1}
        assert simulation.reads == []

    def test_a_poll_does_not_wait_to_be_retried(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bctrl_async.bulk._run._MAX_POLLERS", 0)
        simulation = simulate(answering(runtime("active"), BctrlServerError("500", status=500)))

        async def main(session: BctrlSession) -> None:
            async with session.stop_runtimes([("ws-1", "r0")], verify=True) as batch:
                while len(simulation.reads) < 3:
                    await asyncio.sleep(0.01)
                    assert batch.retrying == {}
                batch.abort()

        simulation.run(main)

    @pytest.mark.parametrize(
        "polled",
        [
            runtime("active"),
            BctrlServerError("500", status=500),
            BctrlServerError("503", status=503, code="server.unavailable"),
        ],
    )
    def test_a_stop_that_no_answer_confirms_is_polled_for_half_a_minute(
        self, simulate: Simulate, polled: Runtime | BctrlError
    ) -> None:
        simulation = simulate(answering(disconnected(), polled))
        report = simulation.stop(verify=True, retry=RetryPolicy(attempts=2))

        assert report.counts == {UNKNOWN: 1}
        assert 30 <= simulation.seconds <= 40
        [outcome] = simulation.outcomes
        assert outcome.runtime == (polled if isinstance(polled, Runtime) else None)
        assert isinstance(outcome.error, BctrlNetworkError)
        assert (outcome.attempts, outcome.error.operation) == (2, "stop")

    @pytest.mark.parametrize("verify", [True, 60.0, 0.001])
    def test_polling_ends_half_a_minute_after_the_answer_or_as_the_caller_says(
        self, simulate: Simulate, verify: float
    ) -> None:
        simulation = simulate(active_until(10_000))
        report = simulation.stop(verify=verify)

        assert (report.ok, report.counts) == (False, {ACCEPTED: 1})
        assert report.states == {RuntimeState.STILL_RUNNING: 1}
        expected = 30 if verify is True else verify
        assert expected <= simulation.seconds <= expected + 1
        assert len(simulation.reads) >= 1
        with pytest.raises(ExceptionGroup) as caught:
            report.raise_for_failures()
        assert "the runtime was still 'active' after it" in str(caught.value.exceptions[0])

    def test_slow_runtimes_do_not_delay_other_stops(self, simulate: Simulate) -> None:
        stuck = {f"r{number}" for number in range(100)}
        simulation = simulate(lambda each: runtime("active" if each.alias in stuck else "stopped"))
        report = simulation.stop(300, verify=True, deadline=30)

        assert report.counts == {ACCEPTED: 100, STOPPED: 200}
        assert simulation.stops[-1].at < 1

    def test_stops_come_before_polls_if_the_rate_is_limited(self, simulate: Simulate) -> None:
        simulation = simulate(active_until(10_000))
        report = simulation.stop(800, verify=True, concurrency=10, deadline=120, rate=10)

        assert report.counts == {ACCEPTED: 800}
        assert simulation.stops[-1].at <= 81
        assert len(simulation.reads) > 300

    def test_a_truncated_response_to_a_poll_is_not_an_outage(self, simulate: Simulate) -> None:
        async def main(session: BctrlSession) -> StopReport:
            async def slowly() -> AsyncIterator[tuple[str, str]]:
                for target in targets(4):
                    yield target
                    await asyncio.sleep(400)

            return await session.stop_runtimes(slowly(), verify=True)

        simulation = simulate(answering(runtime("active"), BctrlNetworkError("half", status=200)))
        report = simulation.run(main)
        assert report.counts == {ACCEPTED: 4}
        assert report.ended_early is None

    def test_no_target_is_begun_while_all_pollers_are_busy(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bctrl_async.bulk._run._MAX_POLLERS", 5)
        simulation = simulate(active_until(20))
        report = simulation.stop(50, verify=True, concurrency=3)

        assert report.counts == {STOPPED: 50}
        assert sum(each.at < 15 for each in simulation.stops) == 5 + 3

    def test_a_slow_input_does_not_delay_outcomes(self, simulate: Simulate) -> None:
        simulation = simulate(active_until(5))

        async def main(session: BctrlSession) -> None:
            async def trickle() -> AsyncIterator[tuple[str, str]]:
                yield "ws-1", "r1"
                await asyncio.sleep(1000)

            delivered_at: list[float] = []
            loop = asyncio.get_running_loop()
            await session.stop_runtimes(
                trickle(), on_outcome=lambda _: delivered_at.append(loop.time()), verify=True
            )
            assert delivered_at[0] < 15

        simulation.run(main)

    @pytest.mark.parametrize("max_pollers", [0, 1000])
    def test_a_poll_that_raises_cancelled_error_is_named_as_what_failed(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch, max_pollers: int
    ) -> None:
        def answer(each: Request) -> Runtime:
            if not each.stops:
                raise asyncio.CancelledError
            return runtime("active")

        monkeypatch.setattr("bctrl_async.bulk._run._MAX_POLLERS", max_pollers)
        with pytest.raises(BctrlError, match="the call raised CancelledError"):
            simulate(answer).stop(verify=True)

    def test_polls_do_not_depend_on_the_patience_of_the_policy(self, simulate: Simulate) -> None:
        simulation = simulate(active_until(20))
        report = simulation.stop(verify=True, deadline=200, retry=RetryPolicy(patience=10))
        assert report.counts == {STOPPED: 1}

    def test_a_failed_poll_is_repeated_as_the_policy_says(self, simulate: Simulate) -> None:
        answers: list[Runtime | BctrlError] = [
            runtime("active"),
            BctrlServerError("503", status=503, code="server.unavailable", retry_after=20),
            runtime("stopped"),
        ]
        simulation = simulate(lambda _: answers.pop(0))
        report = simulation.stop(verify=True)

        assert report.counts == {STOPPED: 1}
        assert simulation.seconds >= 20
        assert (report.throttled, report.retries) == (1, 0)

    def test_an_outage_during_polling_costs_few_requests(self, simulate: Simulate) -> None:
        simulation = simulate(
            lambda each: disconnected() if 2 <= each.at < 32 else active_until(2)(each)
        )
        report = simulation.stop(100, verify=True)

        assert report.counts == {STOPPED: 100}
        assert len(simulation.reads) <= 100 * 4 + 120
        assert simulation.seconds <= 45


class TestEnding:
    """However a run ends, each target has one outcome, no better than the last poll showed."""

    @pytest.mark.parametrize(("max_pollers", "count"), [(0, 3), (1000, 150)])
    @pytest.mark.parametrize("ending", ["abort", "stop_reading", "cancel", "deadline"])
    def test_an_end_of_polls_alone_is_not_early(
        self,
        simulate: Simulate,
        monkeypatch: pytest.MonkeyPatch,
        ending: str,
        max_pollers: int,
        count: int,
    ) -> None:
        monkeypatch.setattr("bctrl_async.bulk._run._MAX_POLLERS", max_pollers)
        simulation = simulate(active_until(10_000))

        async def main(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(targets(count), deadline=20, verify=True)
            running = asyncio.create_task(batch)
            if ending != "deadline":
                end = getattr(running if ending == "cancel" else batch, ending)
                asyncio.get_running_loop().call_later(19, end)
            await asyncio.wait([running])
            assert batch.in_flight == 0
            return batch.report

        report = simulation.run(main)
        assert simulation.seconds == pytest.approx(20 if ending == "deadline" else 19)
        assert report.counts == {ACCEPTED: count}
        assert (report.ok, report.ended_early) == (False, None)

    def test_a_key_rejected_during_polling_ends_the_run(self, simulate: Simulate) -> None:
        simulation = simulate(
            answering(runtime("active"), BctrlAuthenticationError("401", status=401))
        )
        report = simulation.stop(2000, verify=True)

        assert isinstance(report.ended_early, BctrlAuthenticationError)
        assert report.counts == {ACCEPTED: len(simulation.stops), NOT_SENT: mock.ANY}
        assert len(simulation.reads) <= 100
        assert len(simulation.stops) <= 1000

    def test_an_aborted_stop_is_not_polled(self, simulate: Simulate) -> None:
        simulation = simulate(active_until(60))
        report = simulation.stop(verify=True, deadline=0.05)
        assert report.counts == {UNKNOWN: 1}
        assert simulation.reads == []


# Over real sockets


async def test_each_unverified_outcome_is_settled_by_the_polled_status(
    emulator: Emulator, connect: Connect, tmp_path: Path
) -> None:
    emulator.inject(Fault.OVERSIZED, alias="crm")
    for alias, fault in (
        ("accepted", Fault.ACCEPTED),
        ("broken", Fault.MALFORMED_JSON),
        ("failed", Fault.FAILED),
        ("lost", Fault.SERVER_ERROR),
    ):
        emulator.add_runtime("ws-1", alias)
        emulator.inject(fault, alias=alias)
    once = RetryPolicy(attempts=1, base=0.001, cap=0.001, patience=0.2)
    async with connect(retry=once) as session:
        outcomes: dict[str, StopOutcome] = {}
        report = await session.stop_workspace(
            "ws-1",
            on_outcome=lambda outcome: outcomes.update({outcome.target.alias: outcome}),
            journal=tmp_path / "journal.jsonl",
            verify=0.2,
        )

    assert {alias: outcome.result for alias, outcome in outcomes.items()} == {
        "crm": STOPPED,
        "accepted": STOPPED,
        "broken": STOPPED,
        "failed": ACCEPTED,
        "lost": UNKNOWN,
    }
    assert [outcome.target.alias for outcome in report.failures] == ["lost"]
    assert all(outcome.attempts == 1 for outcome in outcomes.values())
    assert emulator.received.total() == 5
    entries = read_lines((tmp_path / "journal.jsonl").read_bytes()).entries
    assert sorted(each["result"] == "stopped" for each in entries) == [False] * 2 + [True] * 3


async def test_the_batch_counts_the_runtimes_that_are_polled(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.add_runtime("ws-1", "mail")
    emulator.inject(Fault.ACCEPTED, alias="crm")
    emulator.inject(Fault.HANG, alias="crm", method="GET")
    async with session.stop_runtimes([("ws-1", "crm"), ("ws-1", "mail")], verify=True) as batch:
        assert batch.polling == 0
        await wait_for_requests(emulator, 3)
        assert (batch.polling, batch.in_flight) == (1, 1)
        batch.abort()
    assert (batch.polling, batch.in_flight) == (0, 0)


async def test_elapsed_includes_the_polls(emulator: Emulator, connect: Connect) -> None:
    emulator.inject(Fault.ACCEPTED)
    outcomes: list[StopOutcome] = []
    async with connect(retry=RetryPolicy(base=0.1, cap=0.1)) as session:
        await session.stop_runtimes([("ws-1", "crm")], on_outcome=outcomes.append, verify=True)
    assert [outcome.elapsed >= 0.05 for outcome in outcomes] == [True]


async def test_the_time_of_an_outcome_is_that_of_the_last_poll(
    emulator: Emulator, connect: Connect
) -> None:
    emulator.inject(Fault.ACCEPTED)
    active = {**emulator.runtimes["ws-1", "crm"], "status": "active"}
    emulator.inject(Reply(200, body=active), Fault.HANG, method="GET")
    async with (
        connect(retry=RetryPolicy(base=0.001)) as session,
        session.stop_runtimes([("ws-1", "crm")], verify=True) as batch,
    ):
        await wait_for_requests(emulator, 2)
        stopped_at = datetime.now(UTC)
        await wait_for_requests(emulator, 3)
        polled_at = datetime.now(UTC)
        batch.abort()
        outcomes = [outcome async for outcome in batch]
    assert [outcome.result for outcome in outcomes] == [ACCEPTED]
    assert stopped_at <= outcomes[0].at <= polled_at


async def test_a_journal_error_during_the_last_polls_is_reported(
    emulator: Emulator, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BctrlError("the journal cannot be written")

    emulator.inject(Fault.ACCEPTED)
    monkeypatch.setattr(Journal, "write", fail)
    async with connect() as session:
        report = await session.stop_runtimes(
            [("ws-1", "crm")], journal=tmp_path / "journal.jsonl", verify=True
        )
    assert report.counts == {STOPPED: 1}
    assert str(report.ended_early) == "the journal cannot be written"
    assert not report.ok
