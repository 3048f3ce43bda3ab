"""`verify=True`: what a stop left open is looked at, in virtual time and on real sockets."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar
from unittest import mock

import msgspec
import pytest
import virtual_time
from runtimes import runtime

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
    RuntimeStatus,
    StopBatch,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async._calls.call import Call
from bctrl_async._calls.sender import Sender
from bctrl_async.bulk._verify import PollSchedule, needs_verification, outcome_after_poll
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.journal import Journal

_T = TypeVar("_T")
Connect = Callable[..., BctrlSession]
Server = Callable[[float, str], Runtime | BctrlError]
"""Decides what becomes of a `stop` or `get` that arrives at this time."""

STOPPED, ACCEPTED, UNKNOWN = StopResult.STOPPED, StopResult.ACCEPTED, StopResult.UNKNOWN
NOT_FOUND, NOT_SENT = StopResult.NOT_FOUND, StopResult.NOT_SENT


def lost() -> BctrlError:
    return BctrlNetworkError("the connection broke", may_have_stopped=True)


def gone() -> BctrlError:
    return BctrlNotFoundError("404", status=404, code="runtime.not_found")


def outcome(result: StopResult, seen: Runtime | None = None) -> StopOutcome:
    return StopOutcome(index=0, target=RuntimeRef("ws-1", "crm"), result=result, runtime=seen)


class TestRules:
    @pytest.mark.parametrize(
        ("ended", "is_so"),
        [
            (outcome(UNKNOWN), True),
            (outcome(ACCEPTED), True),
            (outcome(ACCEPTED, runtime("active")), True),
            (outcome(ACCEPTED, runtime("stopping")), True),
            (outcome(ACCEPTED, runtime("failed")), False),
            (outcome(STOPPED, runtime("stopped")), False),
            (outcome(NOT_FOUND), False),
            (outcome(StopResult.ALREADY_STOPPED), False),
            (outcome(StopResult.REJECTED), False),
            (outcome(NOT_SENT), False),
        ],
    )
    def test_what_is_open_is_what_may_still_run(self, ended: StopOutcome, *, is_so: bool) -> None:
        assert needs_verification(ended) is is_so

    @pytest.mark.parametrize("before", [UNKNOWN, ACCEPTED])
    def test_a_status_means_what_it_means_in_the_answer_to_a_stop(self, before: StopResult) -> None:
        left = msgspec.structs.replace(outcome(before), error=lost(), attempts=3)
        stopped = outcome_after_poll(left, runtime("stopped"))
        failed = outcome_after_poll(left, runtime("failed"))

        assert stopped == msgspec.structs.replace(
            left, result=STOPPED, runtime=runtime("stopped"), error=None
        )
        assert failed is not None
        assert (failed.result, failed.error, failed.attempts) == (ACCEPTED, None, 3)
        assert failed.runtime is not None
        assert failed.runtime.status is RuntimeStatus.FAILED

    def test_what_is_gone_is_not_found(self) -> None:
        error = gone()
        settled = outcome_after_poll(outcome(ACCEPTED, runtime("active")), error)
        assert settled is not None
        assert (settled.result, settled.error, settled.runtime) == (NOT_FOUND, error, None)

    @pytest.mark.parametrize(
        "seen",
        [
            runtime("active"),
            runtime("stopping"),
            lost(),
            BctrlNotFoundError("a proxy's 404", status=404),
            BctrlServerError("500", status=500),
        ],
    )
    def test_what_says_nothing_settles_nothing(self, seen: Runtime | BctrlError) -> None:
        assert outcome_after_poll(outcome(UNKNOWN), seen) is None

    def test_the_waits_grow_up_to_a_few_seconds_and_end_with_the_patience(self) -> None:
        looks = PollSchedule(RetryPolicy(), 60, now=100)
        now, waits = 100.0, []
        seen: Runtime | None = None
        while (delay := looks.delay(seen, now)) is not None:
            waits.append(delay)
            now += delay
            seen = runtime("active")

        assert 0.25 <= waits[0] <= 0.5
        assert 0.5 <= waits[1] <= 1
        assert max(waits) == 5
        assert now == pytest.approx(160)

    def test_without_patience_there_is_one_look(self) -> None:
        looks = PollSchedule(RetryPolicy(patience=0), 0, now=100)
        assert looks.delay(None, 100) == 0
        assert looks.delay(runtime("active"), 100) is None

    @pytest.mark.parametrize(
        "seen",
        [
            BctrlPermissionError("403", status=403),
            BctrlResponseError("not JSON", status=200),
            BctrlError("cut off"),
        ],
    )
    def test_an_error_that_will_come_again_ends_the_looks(self, seen: BctrlError) -> None:
        looks = PollSchedule(RetryPolicy(), 60, now=0)
        assert looks.delay(None, 0) is not None
        assert looks.delay(seen, 1) is None
        assert looks.delay(lost(), 1) is not None


def pollers(batch: StopBatch) -> list[asyncio.Task[None]]:
    verifier = batch._run._verifier
    assert verifier is not None
    return verifier.tasks


class Simulation:
    """A session whose requests go to a server that exists only in virtual time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
        self.requests: Counter[str] = Counter()
        self.seconds = 0.0
        self.outcomes: list[StopOutcome] = []
        self.sent: list[float] = []
        self.received: Counter[str] = Counter()
        self.stuck = 0
        """How many of the first ones stay active for ever."""

        async def attempt(_: Sender, call: Call[Runtime], *__: object) -> Runtime | BctrlError:
            loop = asyncio.get_running_loop()
            self.requests[call.operation.name] += 1
            if call.operation.stops:
                self.sent.append(loop.time())
                self.received[call.alias or ""] += 1
            await asyncio.sleep(0.1)
            if int((call.alias or "")[1:]) < self.stuck:
                return runtime("active")
            return server(loop.time(), call.operation.name)

        monkeypatch.setattr(Sender, "_attempt", attempt)

    def run(
        self, main: Callable[[BctrlSession], Awaitable[_T]], *, rate: float | None = None
    ) -> _T:
        async def scenario() -> _T:
            async with BctrlSession("key", base_url="http://127.0.0.1:9", rate=rate) as session:
                ended = await main(session)
            self.seconds = asyncio.get_running_loop().time()
            return ended

        return virtual_time.run(scenario())

    def stop(
        self,
        count: int = 1,
        *,
        concurrency: int | None = None,
        deadline: float | None = None,
        retry: RetryPolicy | None = None,
        rate: float | None = None,
    ) -> StopReport:
        async def main(session: BctrlSession) -> StopReport:
            return await session.stop_runtimes(
                [("ws-1", f"r{number}") for number in range(count)],
                concurrency=concurrency,
                deadline=deadline,
                retry=retry,
                on_outcome=self.outcomes.append,
                verify=True,
            )

        report = self.run(main, rate=rate)
        assert report.counts.total() == report.total == len(self.outcomes) == count
        return report


Simulate = Callable[[Server], Simulation]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Simulate:
    return lambda server: Simulation(monkeypatch, server)


def slowly(until: float) -> Server:
    """Take a minute over it."""
    return lambda now, _: runtime("active" if now < until else "stopped")


class TestWaiting:
    def test_what_was_accepted_is_looked_at_until_it_is_stopped(self, simulate: Simulate) -> None:
        simulation = simulate(slowly(60))
        report = simulation.stop()

        assert report.counts == {STOPPED: 1}
        assert 60 <= simulation.seconds <= 66
        assert simulation.requests["stop"] == 1
        assert simulation.requests["get"] <= 20
        [ended] = simulation.outcomes
        assert ended.runtime is not None
        assert ended.runtime.status is RuntimeStatus.STOPPED
        assert (ended.attempts, ended.error, report.retries) == (1, None, 0)

    def test_many_are_looked_at_at_once(self, simulate: Simulate) -> None:
        simulation = simulate(slowly(60))
        assert simulation.stop(100).counts == {STOPPED: 100}
        assert simulation.seconds <= 70

    def test_what_is_stopped_at_once_is_not_looked_at(self, simulate: Simulate) -> None:
        simulation = simulate(lambda *_: runtime("stopped"))
        assert simulation.stop(100).counts == {STOPPED: 100}
        assert simulation.requests == {"stop": 100}

    @pytest.mark.parametrize(("status", "result"), [("stopped", STOPPED), ("failed", ACCEPTED)])
    def test_what_was_unknown_is_settled_by_a_status_in_which_nothing_runs(
        self, simulate: Simulate, status: str, result: StopResult
    ) -> None:
        simulation = simulate(lambda _, name: lost() if name == "stop" else runtime(status))
        report = simulation.stop(retry=RetryPolicy(attempts=1))

        assert report.ok
        assert report.counts == {result: 1}
        [ended] = simulation.outcomes
        assert ended.runtime == runtime(status)
        assert ended.error is None
        assert simulation.requests["get"] == 1

    @pytest.mark.parametrize("patience", [None, 60, 0])
    def test_without_a_deadline_it_ends_with_the_patience_of_the_policy(
        self, simulate: Simulate, patience: float | None
    ) -> None:
        simulation = simulate(slowly(10_000))
        report = simulation.stop(retry=RetryPolicy(patience=patience))

        assert report.ok
        assert report.counts == {ACCEPTED: 1}
        longest = 300 if patience is None else patience
        assert longest <= simulation.seconds <= longest + 1
        assert simulation.requests["get"] >= 1

    def test_a_deadline_ends_it_and_the_outcome_is_what_it_was(self, simulate: Simulate) -> None:
        simulation = simulate(slowly(10_000))
        report = simulation.stop(150, deadline=30)

        assert simulation.seconds == pytest.approx(30)
        assert report.counts == {ACCEPTED: 150}
        # All of the input was worked off.
        assert (report.ok, report.ended_early) == (True, None)

    def test_what_takes_its_time_keeps_nothing_else_from_being_stopped(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda *_: runtime("stopped"))
        simulation.stuck = 100
        report = simulation.stop(300, deadline=30)

        assert report.counts == {ACCEPTED: 100, STOPPED: 200}
        assert max(simulation.sent) < 1

    def test_with_a_limit_on_the_rate_the_stops_come_first(self, simulate: Simulate) -> None:
        simulation = simulate(slowly(10_000))
        report = simulation.stop(800, concurrency=10, deadline=120, rate=10)

        assert report.counts == {ACCEPTED: 800}
        assert max(simulation.sent) <= 81
        assert simulation.requests["get"] > 300

    @pytest.mark.parametrize("at_once", [0, 1000])
    def test_a_deadline_that_ends_nothing_but_looks_ends_nothing_early(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch, at_once: int
    ) -> None:
        monkeypatch.setattr("bctrl_async.bulk._verify._MAX_POLLERS", at_once)
        report = simulate(slowly(10_000)).stop(3, deadline=30)

        assert report.counts == {ACCEPTED: 3}
        assert (report.ok, report.ended_early) == (True, None)

    def test_a_look_whose_answer_breaks_off_is_an_answer_and_no_outage(
        self, simulate: Simulate
    ) -> None:
        def answer(_: float, name: str) -> Runtime | BctrlError:
            return runtime("active") if name == "stop" else BctrlNetworkError("half", status=200)

        async def main(session: BctrlSession) -> StopReport:
            async def targets() -> AsyncIterator[tuple[str, str]]:
                for number in range(4):
                    yield "ws-1", f"r{number}"
                    await asyncio.sleep(400)

            return await session.stop_runtimes(targets(), verify=True)

        report = simulate(answer).run(main)
        assert report.counts == {ACCEPTED: 4}
        assert report.ok

    def test_those_that_are_looked_at_are_in_flight(self, simulate: Simulate) -> None:
        simulation = simulate(slowly(10_000))

        async def main(session: BctrlSession) -> set[int]:
            batch = session.stop_runtimes([("ws-1", "r0"), ("ws-1", "r1")], verify=True)
            running = asyncio.create_task(batch)
            seen = set()
            await asyncio.sleep(0.15)
            assert batch.counts == {}
            while simulation.requests["get"] < 10:
                await asyncio.sleep(0.01)
                seen.add(batch.in_flight)
            running.cancel()
            await asyncio.wait([running])
            assert not pollers(batch)
            return seen

        assert {0, 1} <= simulation.run(main) <= {0, 1, 2}

    def test_while_very_many_are_polled_no_more_are_begun(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bctrl_async.bulk._verify._MAX_POLLERS", 5)
        simulation = simulate(slowly(60))
        report = simulation.stop(50, concurrency=3)

        assert report.counts == {STOPPED: 50}
        assert sum(sent < 30 for sent in simulation.sent) == 5 + 3

    def test_an_input_that_comes_slowly_keeps_no_outcome_waiting(self, simulate: Simulate) -> None:
        simulation = simulate(slowly(5))

        async def main(session: BctrlSession) -> None:
            async def trickle() -> AsyncIterator[tuple[str, str]]:
                yield "ws-1", "r1"
                await asyncio.sleep(1000)

            seen_at: list[float] = []
            loop = asyncio.get_running_loop()
            await session.stop_runtimes(
                trickle(), on_outcome=lambda _: seen_at.append(loop.time()), verify=True
            )
            assert seen_at[0] < 15

        simulation.run(main)

    def test_one_whose_polling_is_cancelled_before_it_began_is_accounted_for(
        self, simulate: Simulate
    ) -> None:
        def answer(*_: object) -> Runtime:
            asyncio.get_running_loop().call_soon(cancel)
            return runtime("active")

        def cancel() -> None:
            assert pollers(batches[0])
            for task in pollers(batches[0]):
                task.cancel()

        async def main(session: BctrlSession) -> StopReport:
            batches.append(session.stop_runtimes([("ws-1", "r0")], verify=True))
            return await batches[0]

        batches: list[StopBatch] = []
        assert simulate(answer).run(main).counts == {ACCEPTED: 1}

    def test_a_deadline_that_is_longer_than_the_patience_counts(self, simulate: Simulate) -> None:
        simulation = simulate(slowly(100))
        report = simulation.stop(deadline=200, retry=RetryPolicy(patience=10))
        assert report.counts == {STOPPED: 1}

    def test_what_was_unknown_stays_so_as_long_as_nothing_is_said(self, simulate: Simulate) -> None:
        simulation = simulate(
            lambda _, name: BctrlServerError("500", status=500, may_have_stopped=name == "stop")
        )
        report = simulation.stop(retry=RetryPolicy(attempts=2))

        assert report.counts == {UNKNOWN: 1}
        [ended] = simulation.outcomes
        assert ended.error is not None
        assert ended.error.operation == "stop"
        assert (ended.attempts, ended.error.may_have_stopped) == (2, True)

    def test_a_look_is_tried_again_by_the_policy(self, simulate: Simulate) -> None:
        answers: list[Runtime | BctrlError] = [
            runtime("active"),
            BctrlServerError("503", status=503, retry_after=20),
            runtime("stopped"),
        ]
        simulation = simulate(lambda *_: answers.pop(0))
        report = simulation.stop()

        assert report.counts == {STOPPED: 1}
        assert simulation.seconds >= 20
        assert (report.throttled, report.retries) == (1, 0)

    def test_an_outage_while_it_looks_costs_a_request_now_and_then(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(
            lambda now, _: lost() if 2 <= now < 32 else runtime("active" if now < 2 else "stopped")
        )
        report = simulation.stop(100)

        assert report.counts == {STOPPED: 100}
        assert simulation.requests["get"] <= 100 * 4 + 120
        assert simulation.seconds <= 45


class TestEnds:
    """However it ends, each target has one outcome, and never a better one than was seen."""

    @pytest.mark.parametrize("end", ["abort", "stop_reading", "cancel"])
    @pytest.mark.parametrize("at", [3, 3.05])
    def test_it_can_be_interrupted(self, simulate: Simulate, end: str, at: float) -> None:
        simulation = simulate(slowly(60))

        async def main(session: BctrlSession) -> StopReport:
            targets = [("ws-1", f"r{number}") for number in range(10)]
            batch = session.stop_runtimes(targets, concurrency=3, verify=True)
            running = asyncio.create_task(batch)
            loop = asyncio.get_running_loop()
            loop.call_later(at, getattr(running if end == "cancel" else batch, end))
            await asyncio.wait([running])
            assert batch.in_flight == 0
            return batch.report

        report = simulation.run(main)
        # Who begins nothing new still waits for what was begun, and all was begun.
        assert report.counts == {STOPPED if end == "stop_reading" else ACCEPTED: 10}
        assert (report.ok, report.ended_early) == (True, None)
        assert (simulation.seconds > 60) is (end == "stop_reading")

    @pytest.mark.parametrize("end", ["abort", "stop_reading", "cancel", "close"])
    def test_whenever_it_is_ended_every_target_has_its_one_outcome(
        self, simulate: Simulate, end: str
    ) -> None:
        def end_at(moment: float) -> None:
            answers = iter(range(1000))

            def answer(now: float, name: str) -> Runtime | BctrlError:
                if name == "stop" and next(answers) % 3 == 0:
                    return lost()
                return runtime("stopped" if now > 1 else "active")

            async def main(session: BctrlSession) -> StopReport:
                batch = session.stop_runtimes(
                    [("ws-1", f"r{number}") for number in range(9)],
                    concurrency=2,
                    on_outcome=simulation.outcomes.append,
                    verify=True,
                )
                running = asyncio.create_task(batch)
                ways: dict[str, Callable[[], object]] = {
                    "abort": batch.abort,
                    "stop_reading": batch.stop_reading,
                    "cancel": running.cancel,
                    "close": lambda: closing.append(asyncio.create_task(session.close())),
                }
                asyncio.get_running_loop().call_later(moment, ways[end])
                await asyncio.wait([running])
                assert batch.in_flight == 0
                assert not pollers(batch)
                return batch.report

            simulation = simulate(answer)
            closing: list[asyncio.Task[None]] = []
            report = simulation.run(main)
            assert report.counts.total() == report.total == 9
            outcomes = {ended.index: ended for ended in simulation.outcomes}
            assert len(outcomes) == len(simulation.outcomes)
            for ended in [*outcomes.values(), *report.failures]:
                was_sent = simulation.received[ended.target.alias] > 0
                assert was_sent is (ended.result is not NOT_SENT)

        for step in range(80):
            end_at(step * 0.02)

    def test_a_key_that_is_refused_meanwhile_ends_the_run(self, simulate: Simulate) -> None:
        simulation = simulate(
            lambda _, name: (
                runtime("active") if name == "stop" else BctrlAuthenticationError("401", status=401)
            )
        )
        report = simulation.stop(2000)

        assert isinstance(report.ended_early, BctrlAuthenticationError)
        assert report.counts == {ACCEPTED: simulation.requests["stop"], NOT_SENT: mock.ANY}
        assert simulation.requests["get"] <= 100
        assert simulation.requests["stop"] <= 1000

    def test_what_was_cut_off_is_not_looked_at(self, simulate: Simulate) -> None:
        simulation = simulate(slowly(60))
        report = simulation.stop(deadline=0.05)
        assert report.counts == {UNKNOWN: 1}
        assert simulation.requests == {"stop": 1}

    def test_a_server_that_is_given_up_is_not_asked_any_more(self, simulate: Simulate) -> None:
        simulation = simulate(lambda *_: lost())
        report = simulation.stop(1000)
        assert report.counts[UNKNOWN] + report.counts[NOT_SENT] == 1000
        assert simulation.requests.total() <= 120


class TestOnTheWire:
    async def test_each_open_outcome_is_settled_by_what_the_server_says(
        self, emulator: Emulator, connect: Connect, tmp_path: Path
    ) -> None:
        emulator.inject(Fault.OVERSIZED, alias="crm")
        emulator.add_runtime("ws-1", "accepted")
        emulator.inject(Fault.ACCEPTED, alias="accepted")
        emulator.add_runtime("ws-1", "broken")
        emulator.inject(Fault.MALFORMED_JSON, alias="broken")
        emulator.add_runtime("ws-1", "failed")
        emulator.inject(Fault.FAILED, alias="failed")
        emulator.add_runtime("ws-1", "lost")
        emulator.inject(Fault.SERVER_ERROR, alias="lost")
        once = RetryPolicy(attempts=1, base=0.001, cap=0.001, patience=0.2)
        async with connect(retry=once) as session:
            outcomes: dict[str, StopOutcome] = {}
            report = await session.stop_workspace(
                "ws-1",
                on_outcome=lambda ended: outcomes.update({ended.target.alias: ended}),
                journal=tmp_path / "journal.jsonl",
                verify=True,
            )

        assert {alias: ended.result for alias, ended in outcomes.items()} == {
            "crm": STOPPED,
            "accepted": STOPPED,
            "broken": STOPPED,
            "failed": ACCEPTED,
            "lost": UNKNOWN,
        }
        assert [ended.target.alias for ended in report.failures] == ["lost"]
        assert all(ended.attempts == 1 for ended in outcomes.values())
        assert emulator.received.total() == 5
        lines = (tmp_path / "journal.jsonl").read_text().splitlines()[1:]
        assert sorted(line.count('"result":"stopped"') for line in lines) == [0, 0, 1, 1, 1]

    async def test_what_a_journal_calls_accepted_is_looked_at_by_the_next_run(
        self, emulator: Emulator, session: BctrlSession, tmp_path: Path
    ) -> None:
        emulator.inject(Fault.ACCEPTED)
        journal = tmp_path / "journal.jsonl"
        for verify, result in [(False, ACCEPTED), (True, STOPPED), (True, STOPPED)]:
            report = await session.stop_runtimes([("ws-1", "crm")], journal=journal, verify=verify)
            assert (report.counts, report.ok) == ({result: 1}, True)

        assert (report.resumed, report.retries) == (1, 0)
        # What it was found to be is in the journal, and not looked at again.
        assert [request.method for request in emulator.requests] == ["POST", "GET"]
        assert journal.read_text().splitlines()[-1].count('"result":"stopped"') == 1

    async def test_the_time_of_an_outcome_is_the_time_until_it_was_settled(
        self, emulator: Emulator, connect: Connect, tmp_path: Path
    ) -> None:
        emulator.inject(Fault.ACCEPTED)
        outcomes: list[StopOutcome] = []
        async with connect(retry=RetryPolicy(base=0.1, cap=0.1)) as session:
            for verify in (False, True):
                await session.stop_runtimes(
                    [("ws-1", "crm")],
                    journal=tmp_path / "journal.jsonl",
                    on_outcome=outcomes.append,
                    verify=verify,
                )
            emulator.add_runtime("ws-1", "crm")
            emulator.inject(Fault.ACCEPTED)
            await session.stop_runtimes([("ws-1", "crm")], on_outcome=outcomes.append, verify=True)
        stopped, resumed, verified = outcomes
        assert resumed.resumed
        assert resumed.elapsed == pytest.approx(stopped.elapsed, abs=1e-5)
        assert verified.elapsed >= 0.05

    async def test_a_journal_that_fails_while_nothing_but_looks_is_left_is_said(
        self, emulator: Emulator, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
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

    async def test_without_it_nothing_is_looked_at(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(Fault.ACCEPTED)
        report = await session.stop_runtimes([("ws-1", "crm")])
        assert report.counts == {ACCEPTED: 1}
        assert [request.method for request in emulator.requests] == ["POST"]

    async def test_a_session_that_is_closed_meanwhile_ends_it(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.inject(Fault.ACCEPTED)
        async with connect(retry=RetryPolicy(base=60, cap=60)) as session:
            running = asyncio.create_task(session.stop_runtimes([("ws-1", "crm")], verify=True))
            while not emulator.requests:
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            await session.close()
            async with asyncio.timeout(5):
                report = await running
        assert report.counts == {ACCEPTED: 1}
