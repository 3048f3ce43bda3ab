"""`verify=True`: poll runtimes that may still be running, mostly in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from unittest import mock
from uuid import UUID

import pytest
from msgspec.structs import replace
from support.helpers import (
    BOUND,
    Bulk,
    Connect,
    new_poller,
    pass_time,
    wait_for_requests,
)
from support.runtimes import runtime
from support.simulated import (
    Answer,
    Request,
    Server,
    Simulate,
    disconnected,
    server_error,
    targets,
    unavailable,
)
from support.wire_faults import OVERSIZED

from bctrl_async import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlResponseError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async._kinds import Failure, Kind
from bctrl_async.bulk import Progress, StopBatch
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, ACCEPTED, UNKNOWN = StopResult.STOPPED, StopResult.ACCEPTED, StopResult.UNKNOWN
NOT_FOUND, NOT_SENT = StopResult.NOT_FOUND, StopResult.NOT_SENT
ALREADY = StopResult.ALREADY_STOPPED
ACTIVE = runtime("active")
EARLIER = replace(runtime(), id=UUID(int=7), created_at="2026-12-03T01:00:00Z")
LATER = replace(ACTIVE, id=UUID(int=8), created_at="2026-12-03T03:00:00Z")
OWN = "server.unavailable"
"""The code of the API's own 503; a gateway's has none."""


def active_until(until: float, ended: str = "stopped") -> Server:
    """Report every runtime as active until this time, and as ended from then on."""
    return lambda request: runtime("active" if request.at < until else ended)


def polled(answer: Answer, stop: Answer = ACTIVE) -> Server:
    """Answer every poll, and every stop, alike."""
    return lambda request: stop if request.stops else answer


def behind(request: Request) -> Runtime:
    """Answer polls for some seconds with an earlier runtime, as a late replica does."""
    if not request.stops and request.at < 10:
        return EARLIER
    status = "active" if request.at < 20 else "stopped"
    return replace(runtime(status), created_at="2026-12-03T02:00:00Z")


def active_or_disconnected_until(until: float) -> Server:
    """Answer no stop; report active runtimes until this time, then failed."""
    status = active_until(until, "failed")
    return lambda request: disconnected() if request.stops else status(request)


def gone_after(until: float, stop: Answer) -> Server:
    """Report every runtime as active until this time, and as not found afterwards."""

    def server(request: Request) -> Answer:
        if request.stops:
            return stop
        return ACTIVE if request.at < until else GONE

    return server


def throttled_once(request: Request) -> Answer:
    """Throttle the first poll for twenty seconds."""
    if request.number == 2:
        return unavailable(code=OWN, retry_after=20)
    return runtime("active" if request.stops else "stopped")


def down_for_half_a_minute(request: Request) -> Answer:
    return disconnected() if 2 <= request.at < 32 else active_until(2)(request)


def down_for_ever(request: Request) -> Answer:
    return disconnected() if request.at >= 2 else ACTIVE


TWICE, NO_TIME = {"retry": RetryPolicy(attempts=2)}, {"deadline": 0.05}
HASTY = {"retry": RetryPolicy(base=0.02, cap=0.02)}
IMPATIENT = {"retry": RetryPolicy(patience=10), "deadline": 200}


@dataclass(frozen=True)
class Case:
    """A server, the outcome of each target, the seconds of the run, and most polls."""

    server: Server
    outcome: tuple[StopResult, bool | None]
    seconds: tuple[float, float]
    polls: int = 20
    count: int = 1
    verify: bool | float = True
    options: dict[str, Any] = field(default_factory=dict)


# Each with whether the runtime is running.
DONE, RUNS_ON, UNSEEN = (STOPPED, False), (ACCEPTED, True), (ACCEPTED, None)
ENDED, IS_GONE, IN_DOUBT = (ACCEPTED, False), (NOT_FOUND, None), (UNKNOWN, None)
FORBIDDEN = BctrlPermissionError("403", status=403)
FOREIGN = BctrlNotFoundError("a proxy's 404", status=404)
UNREADABLE = BctrlResponseError("not JSON", status=200)
TRUNCATED = Failure(kind=Kind.CUT_SHORT, summary="half", status=200)
GONE = BctrlNotFoundError("404", status=404, code="runtime.not_found")
UNREAD = BctrlResponseError(
    "not JSON", status=200, accepted=True, may_have_stopped=True
)

CASES = {
    "it stops in time": Case(active_until(20), DONE, (20, 26)),
    "it fails in time": Case(active_until(20, "failed"), ENDED, (20, 26)),
    "a hundred stop in time": Case(active_until(20), DONE, (20, 26), 20, 100),
    "it stops at once": Case(polled(ACTIVE, runtime()), DONE, (0, 1), 0),
    "it runs on": Case(polled(ACTIVE), RUNS_ON, (120, 121), 40),
    "it runs on for a minute": Case(polled(ACTIVE), RUNS_ON, (60, 61), verify=60.0),
    "it runs on for a moment": Case(polled(ACTIVE), RUNS_ON, (0, 1), 1, verify=0.001),
    "polls are truncated": Case(polled(TRUNCATED), UNSEEN, (120, 121), 40),
    # These errors will not pass.
    "polls are forbidden": Case(polled(FORBIDDEN), UNSEEN, (0, 1), 1),
    "a proxy knows no such path": Case(polled(FOREIGN), UNSEEN, (0, 1), 1),
    "polls are not JSON": Case(polled(UNREADABLE), UNSEEN, (0, 1), 1),
    # No answer confirms the stop.
    "it is unknown, and runs": Case(
        polled(ACTIVE, disconnected()), (UNKNOWN, True), (120, 130), 40, options=TWICE
    ),
    "it is unknown, and fails in time": Case(
        active_or_disconnected_until(20), (ALREADY, False), (20, 40), options=TWICE
    ),
    "it is unknown, and polls fail": Case(
        polled(server_error(), disconnected()), IN_DOUBT, (120, 130), 40, options=TWICE
    ),
    # A poll that is throttled waits for five minutes, or until the deadline.
    "it is unknown, and polls are throttled": Case(
        polled(unavailable(code=OWN), disconnected()),
        IN_DOUBT,
        (300, 320),
        60,
        options=TWICE,
    ),
    "polls are throttled": Case(polled(unavailable(code=OWN)), UNSEEN, (300, 310), 60),
    "time is up before an answer": Case(
        polled(ACTIVE), IN_DOUBT, (0, 1), 0, options=NO_TIME
    ),
    # A runtime that is gone is not found, unless the answer to its stop described it.
    "it is gone": Case(polled(GONE), ENDED, (0, 1), 1),
    "it is unknown, and gone": Case(
        polled(GONE, disconnected()), IS_GONE, (0, 5), options=TWICE
    ),
    "it is unknown, runs, and is gone": Case(
        gone_after(2, disconnected()), (ALREADY, False), (2, 10), options=TWICE
    ),
    "another runtime takes its alias": Case(
        polled(LATER, replace(ACTIVE, created_at="2026-12-03T02:00:00Z")),
        ENDED,
        (0, 1),
        1,
    ),
    # Fault: whatever had another id had taken the alias.
    "the polls show an earlier runtime": Case(behind, DONE, (20, 26)),
    "the polls show a runtime of no known age": Case(
        polled(LATER), RUNS_ON, (120, 121), 40
    ),
    # A gateway may say 200 to anything.
    "it is accepted unread, and gone": Case(polled(GONE, UNREAD), IS_GONE, (0, 1), 1),
    "the policy has short delays": Case(
        polled(ACTIVE), RUNS_ON, (120, 121), 40, options=HASTY
    ),
    "the policy has less patience": Case(
        active_until(20), DONE, (20, 26), options=IMPATIENT
    ),
    "a poll is throttled": Case(throttled_once, DONE, (20, 40), 2),
    "there is an outage": Case(
        down_for_half_a_minute, DONE, (32, 45), 6, 100, verify=60.0
    ),
    "the outage is longer": Case(
        down_for_half_a_minute, RUNS_ON, (4, 11), 8, 100, verify=5.0
    ),
    "a minute of polls meets an outage": Case(
        down_for_ever, RUNS_ON, (59, 66), 30, verify=60.0
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_runtime_is_polled_until_it_ends_or_time_is_up_if(
    simulate: Simulate, case: Case
) -> None:
    simulation = simulate(case.server)
    report = simulation.stop(case.count, verify=case.verify, **case.options)

    result, is_running = case.outcome
    assert report.counts == {result: case.count}
    assert report.running == (case.count if is_running else 0)
    assert report.not_running == (case.count if is_running is False else 0)
    assert report.ended_early is None or "deadline" in case.options
    shortest, longest = case.seconds
    assert shortest <= simulation.seconds <= longest
    assert len(simulation.reads) <= case.polls * case.count
    for outcome in simulation.outcomes:
        assert (outcome.error is None) is outcome.ok is (is_running is False)
        assert outcome.runtime is None or outcome.runtime.status.is_final is outcome.ok


class TestPolling:
    def test_the_delays_between_polls_grow_to_five_seconds(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(polled(ACTIVE))
        simulation.stop(verify=60)

        # A stop and each poll take 0.1 s.
        at = [0.0, *(request.at for request in simulation.reads)]
        delays = [later - earlier - 0.1 for earlier, later in itertools.pairwise(at)]
        assert 0.25 <= delays[0] <= 0.5
        assert 0.5 <= delays[1] <= 1
        assert max(delays) == pytest.approx(5)
        assert at[-1] == pytest.approx(60.1)

    def test_stops_come_first_and_slow_runtimes_delay_none(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(polled(ACTIVE))
        report = simulation.stop(
            800, verify=True, concurrency=10, deadline=120, rate=10
        )

        assert report.counts == {ACCEPTED: 800}
        assert simulation.stops[-1].at <= 1.06 * 80
        # Polls get every twentieth slot meanwhile.
        assert simulation.reads[0].at < 10

    def test_no_target_is_read_while_the_most_are_polled(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bctrl_async.bulk._polls._MAX_POLLS", 5)
        simulation = simulate(active_until(20))

        async def main(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(targets(50), concurrency=3)
            asyncio.get_running_loop().call_later(15, note_progress, batch)
            return await batch

        def note_progress(batch: StopBatch) -> None:
            noted.append(batch.progress)

        noted: list[Progress] = []
        report = simulation.run(main)

        assert report.counts == {STOPPED: 50}
        assert 5 <= sum(request.at < 15 for request in simulation.stops) < 5 + 3
        assert [progress.is_full for progress in noted] == [True]

    def test_a_slow_input_does_not_delay_outcomes(self, simulate: Simulate) -> None:
        async def slowly() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "r0"
            await asyncio.sleep(1000)

        async def main(session: BctrlSession) -> None:
            async with session.stop_runtimes(slowly()) as batch:
                assert (await anext(batch)).result is STOPPED

        simulation = simulate(active_until(5))
        simulation.run(main)
        assert simulation.seconds < 15


@pytest.mark.parametrize("verify", [0, -1.0])
def test_a_wrong_time_for_polls_is_an_error_that_names_false(
    simulate: Simulate, verify: float
) -> None:
    expected = "expected a positive number of seconds, or False"
    with pytest.raises(
        BctrlConfigError, match=f"^invalid verify {verify}: {expected}$"
    ):
        simulate(polled(ACTIVE)).stop(verify=verify)


class TestProgress:
    @pytest.mark.parametrize("count", [3, 30], ids=["got", "listed"])
    def test_it_tells_whose_polls_fail_until_they_are_answered(
        self,
        simulate: Simulate,
        caplog: pytest.LogCaptureFixture,
        count: int,
    ) -> None:
        """Fault: polls that failed for two minutes were shown nowhere."""
        caplog.set_level(logging.INFO, "bctrl_async")

        def server(request: Request) -> Answer:
            if request.stops or request.at < 20:
                return ACTIVE if request.stops else server_error()
            return runtime("stopped" if request.at > 40 else "active")

        async def main(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(targets(count), deadline=100)
            loop = asyncio.get_running_loop()
            for at in (10, 30, 99):
                loop.call_later(at, lambda: noted.append(batch.progress))
            await batch
            await asyncio.sleep(60)
            return batch.report

        noted: list[Progress] = []
        report = simulate(server).run(main)

        assert report.counts == {STOPPED: count}
        assert [progress.polling_failures for progress in noted] == [
            {"500": count},
            {},
            {},
        ]
        # The deadline comes before the two minutes.
        assert [round(progress.polling_for) for progress in noted] == [90, 70, 0]
        failures = [text for text in caplog.messages if text.startswith("a poll ")]
        assert len(failures) in range(1, 2 * count)
        assert failures[0].endswith("workspace 'ws-1': 500")


REASONS = {
    "abort": "the run was aborted",
    "stop_reading": "the run was asked to start no more stops",
    "cancel": "the run was cancelled",
    "deadline": "the deadline of 20s has passed",
}


class TestEnding:
    """Each target has one outcome, no better than the last poll showed."""

    @pytest.mark.parametrize(("max_polls", "count"), [(1, 1), (1000, 150)])
    @pytest.mark.parametrize("ending", ["abort", "stop_reading", "cancel", "deadline"])
    def test_an_end_of_polls_is_an_early_end(
        self,
        simulate: Simulate,
        monkeypatch: pytest.MonkeyPatch,
        ending: str,
        max_polls: int,
        count: int,
    ) -> None:
        monkeypatch.setattr("bctrl_async.bulk._polls._MAX_POLLS", max_polls)
        simulation = simulate(polled(ACTIVE))

        async def main(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(targets(count), deadline=20)
            running = asyncio.create_task(batch)
            ends: dict[str, Callable[[], object]] = {
                "abort": batch.abort,
                "stop_reading": batch.stop_reading,
                "cancel": running.cancel,
                "deadline": lambda: None,
            }
            asyncio.get_running_loop().call_later(19, ends[ending])
            await asyncio.wait([running])
            assert batch.progress == Progress(0)
            return batch.report

        report = simulation.run(main)
        assert simulation.seconds == pytest.approx(20 if ending == "deadline" else 19)
        assert report.counts == {ACCEPTED: count}
        assert not report.ok
        assert REASONS[ending] == str(report.ended_early)
        assert "the runtime was still 'active' after it" in str(
            report.failures[0].error
        )

    async def test_an_accepted_stop_that_is_not_polled_any_more_is_an_early_end(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(Fault.ACCEPTED)
        bulk.emulator.hold("ws-1", "r0")
        batch = bulk.stop(1)
        running = await bulk.started(batch, 1)
        batch.stop_reading()
        bulk.emulator.release("ws-1", "r0")
        await running
        assert batch.report.counts == {ACCEPTED: 1}
        assert str(batch.report.ended_early) == REASONS["stop_reading"]

    def test_a_poll_that_raises_cancelled_error_is_named(
        self, simulate: Simulate
    ) -> None:
        def answer(request: Request) -> Runtime:
            if request.stops:
                return ACTIVE
            raise asyncio.CancelledError

        with pytest.raises(BctrlError, match="the call raised CancelledError"):
            simulate(answer).stop(verify=True)

    def test_a_key_rejected_during_polling_ends_the_run(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(polled(BctrlAuthenticationError("401", status=401)))
        report = simulation.stop(2000, verify=True)

        assert isinstance(report.ended_early, BctrlAuthenticationError)
        assert report.counts == {ACCEPTED: len(simulation.stops), NOT_SENT: mock.ANY}
        assert len(simulation.reads) <= 100
        assert len(simulation.stops) <= 1000


@pytest.mark.usefixtures("lazy_only")
async def test_a_poller_cancelled_before_it_starts_leaves_the_outcome(
    bulk: Bulk,
) -> None:
    bulk.emulator.inject(Fault.ACCEPTED)
    batch = bulk.session.stop_runtimes([("ws-1", "crm")], concurrency=1)
    running = asyncio.create_task(batch)
    (await new_poller(batch)).cancel()
    report = await running

    assert report.counts == {ACCEPTED: 1}
    assert not report.ok
    assert bulk.emulator.received == {("ws-1", "crm"): 1}


async def test_over_sockets_each_outcome_is_settled_by_the_polled_status(
    emulator: Emulator, connect: Connect
) -> None:
    faults: dict[str, tuple[Fault | Reply, StopResult]] = {
        "accepted": (Fault.ACCEPTED, STOPPED),
        "broken": (Fault.MALFORMED_JSON, STOPPED),
        "crm": (OVERSIZED, STOPPED),
        "failed": (Fault.FAILED, ACCEPTED),
        "lost": (Fault.SERVER_ERROR, UNKNOWN),
    }
    for alias, (fault, _) in faults.items():
        emulator.add_runtime("ws-1", alias)
        emulator.inject(fault, alias=alias)
    outcomes: dict[str, StopOutcome] = {}
    once = RetryPolicy(attempts=1, base=0.001, cap=0.001, patience=0.2)
    async with connect(retry=once) as session:
        report = await session.stop_workspace(
            "ws-1",
            on_outcome=lambda outcome: outcomes.update({outcome.target.alias: outcome}),
            verify=0.2,
        )

    assert {alias: outcome.result for alias, outcome in outcomes.items()} == {
        alias: result for alias, (_, result) in faults.items()
    }
    assert [outcome.target.alias for outcome in report.failures] == ["lost"]
    assert all(outcome.attempts == 1 for outcome in outcomes.values())
    assert emulator.received.total() == 5


@pytest.mark.moves_clock
async def test_a_poll_that_is_never_answered_takes_no_longer(bulk: Bulk) -> None:
    """Fault: a server that went away kept `verify=10.0` for the minute of a timeout."""
    bulk.emulator.inject(Fault.ACCEPTED)
    bulk.emulator.inject(*[Fault.HANG] * 100, method="GET")

    running = asyncio.ensure_future(
        bulk.session.stop_runtimes([("ws-1", "crm")], verify=10.0)
    )
    await wait_for_requests(bulk.emulator, 2)
    pass_time(10)
    report = await asyncio.wait_for(running, BOUND)

    assert report.counts == {ACCEPTED: 1}


async def test_a_short_verify_still_waits_for_an_answer(bulk: Bulk) -> None:
    bulk.emulator.inject(Fault.ACCEPTED)
    bulk.emulator.inject(Fault.LATENCY, method="GET")

    report = await bulk.session.stop_runtimes([("ws-1", "crm")], verify=0.001)

    assert report.counts == {STOPPED: 1}


async def test_polls_are_counted_and_time_the_outcome(
    emulator: Emulator, connect: Connect
) -> None:
    emulator.inject(Fault.ACCEPTED)
    active = {**emulator.runtimes["ws-1", "crm"], "status": "active"}
    emulator.inject(Reply(200, body=active), Fault.HANG, method="GET")
    async with (
        connect(retry=RetryPolicy(base=0.001)) as session,
        session.stop_runtimes([("ws-1", "crm")]) as batch,
    ):
        assert batch.progress.polling == 0
        await wait_for_requests(emulator, 1)
        sent_at = datetime.now(UTC)
        await wait_for_requests(emulator, 2)
        stopped_at, began = datetime.now(UTC), time.monotonic()
        await wait_for_requests(emulator, 3)
        polled_at, took = datetime.now(UTC), time.monotonic() - began
        progress = batch.progress
        assert progress == Progress(1, polling=1, polling_for=progress.polling_for)
        assert 100 < progress.polling_for <= 120
        batch.abort()
        [outcome] = [outcome async for outcome in batch]
    assert outcome.result is ACCEPTED
    assert outcome.sent_at is not None
    assert sent_at <= outcome.sent_at <= stopped_at <= outcome.at <= polled_at
    assert outcome.elapsed >= took


async def test_over_http_a_poll_that_is_throttled_waits_for_its_answer(
    emulator: Emulator, connect: Connect
) -> None:
    """Fault: a runtime that had stopped still ran, for want of an answered poll."""
    emulator.inject(Fault.ACCEPTED)
    emulator.inject(*[Fault.RATE_LIMITED] * 2, method="GET")
    async with connect(retry=RetryPolicy(base=0.02, patience=30)) as session:
        report = await session.stop_runtimes([("ws-1", "crm")], verify=0.001)

    assert report.counts == {STOPPED: 1}
