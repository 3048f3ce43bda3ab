"""Outages of the server, on real sockets and in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import random
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
from helpers import add_runtimes, await_batch, free_port, until, unused_url
from simulated import ANSWER, Request, Server, Simulate, disconnected, targets

from bctrl_async import (
    BctrlError,
    BctrlNetworkError,
    BctrlRateLimitError,
    BctrlServerError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async._calls.call import Call
from bctrl_async._calls.sender import Sender
from bctrl_async._limiter.limiter import Limiter
from bctrl_async.bulk import _run
from bctrl_async.emulator import Emulator, Fault

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN
CANARY = "bctrl-async-canary"

Fail = Callable[[], BctrlError]


def connection_refused() -> BctrlError:
    return BctrlNetworkError("no connection: refused")


def bad_gateway() -> BctrlError:
    return BctrlServerError("502", status=502, may_have_stopped=True)


def unavailable(retry_after: float | None = None) -> BctrlError:
    return BctrlServerError("503", status=503, may_have_stopped=True, retry_after=retry_after)


def untrusted() -> BctrlError:
    place = Mock(host="bctrl.test", port=443)
    error = BctrlNetworkError(
        "no connection: the certificate has expired", advice="Renew the certificate"
    )
    error.__cause__ = aiohttp.ClientConnectorCertificateError(place, ssl.CertificateError())
    return error


def down(since: float, until: float, fail: Fail = disconnected) -> Server:
    """Make a server that fails between two times."""
    return lambda each: fail() if since <= each.at < until else ANSWER


def dead(*numbers: int, fail: Fail = disconnected) -> Server:
    """Make a server that never answers some targets, and all others at once."""
    names = {f"r{number}" for number in numbers}
    return lambda each: fail() if each.alias in names else ANSWER


def failing_first(*numbers: int, fail: Fail = disconnected, times: int = 1) -> Server:
    """Make a server that fails the first requests of some targets."""
    server = dead(*numbers, fail=fail)
    return lambda each: server(each) if each.number <= times else ANSWER


def at_random(share: float, since: float, until: float, *fails: Fail) -> Server:
    """Make a server that fails a share of the requests between two times."""

    def answer(each: Request) -> Runtime | BctrlError:
        chance = random.Random(repr(each))
        is_bad = since <= each.at < until and chance.random() < share
        return chance.choice(fails)() if is_bad else ANSWER

    return answer


def dying_once_stopped(each: Request) -> Runtime | BctrlError:
    """Answer nothing of the nodes of all but a few runtimes after half a second."""
    gone = each.alias != CANARY and int(each.alias[1:]) < 95 and each.at > 0.5
    return disconnected() if gone or each.alias == "r99" else ANSWER


def down_after_a_canary(each: Request) -> Runtime | BctrlError:
    return connection_refused() if 0.3 <= each.at < 20 else dead(0)(each)


@dataclass(frozen=True)
class Case:
    """A server, the targets that it gets, how many of them are `unknown` in the end, and when."""

    server: Server
    count: int
    lost: int
    longest: float
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "a gateway answers 502 and 503 in turn for half a minute": Case(
        at_random(1, 2, 32, unavailable, bad_gateway), 5000, 0, 150
    ),
    "a twentieth of the answers are a gateway's 503": Case(
        at_random(0.05, 0, 1000, unavailable), 5000, 0, 40
    ),
    "half of the certificates are untrusted for half a second": Case(
        at_random(0.5, 0, 0.5, untrusted), 5000, 0, 20
    ),
    "a tenth of the certificates are untrusted for half a second": Case(
        at_random(0.1, 0, 0.5, untrusted), 5000, 0, 20
    ),
    "connections are refused nearly as long as the patience lasts": Case(
        down(2, 37, connection_refused), 3000, 0, 45, {"deadline": 45}
    ),
    "requests are cut off nearly as long as the patience lasts": Case(
        down(2, 37), 3000, 0, 45, {"deadline": 45}
    ),
    "a hundred connections are refused in a cold session": Case(
        failing_first(*range(100), fail=connection_refused), 1000, 0, 15
    ),
    "a hundred requests are cut off in a cold session that verifies": Case(
        failing_first(*range(100)), 1000, 0, 15, {"verify": True}
    ),
    "the first target is never answered, and has one attempt": Case(
        dead(0), 300, 1, 60, {"retry": RetryPolicy(attempts=1)}
    ),
    "the first two hundred targets are never answered": Case(dead(*range(200)), 1000, 200, 20),
    # No successes of others add to the quota of their second attempts.
    "the last two hundred targets are never answered": Case(dead(*range(800, 1000)), 1000, 200, 40),
    "the targets that were asked as canaries die": Case(dying_once_stopped, 100, 1, 30),
    "nothing but a canary was answered before an outage": Case(
        down_after_a_canary, 10, 1, 60, {"concurrency": 1}
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_target_that_is_ever_answered_is_stopped_although(
    simulate: Simulate, case: Case
) -> None:
    simulation = simulate(case.server)
    report = simulation.stop(case.count, **case.options)

    assert report.counts == Counter({STOPPED: case.count - case.lost, UNKNOWN: case.lost})
    assert report.ended_early is None
    assert simulation.seconds <= case.longest


class TestNeverAnswered:
    @pytest.mark.parametrize("fail", [connection_refused, disconnected, bad_gateway])
    def test_the_run_ends_early_after_a_few_probes(self, simulate: Simulate, fail: Fail) -> None:
        simulation = simulate(lambda _: fail())
        report = simulation.stop(10_000)

        # One probe of four attempts, a second to confirm, and a new target sent meanwhile.
        assert len(simulation.stops) <= 100 + 5
        assert len(simulation.requests) <= 100 + 5 + 5
        assert isinstance(report.ended_early, BctrlNetworkError)
        assert "does not answer" in str(report.ended_early)
        assert report.counts == (
            {NOT_SENT: 10_000} if fail is connection_refused else {UNKNOWN: 101, NOT_SENT: 9_899}
        )
        assert simulation.seconds < 10

    async def test_with_real_sockets_targets_are_not_sent_if_connections_are_refused(self) -> None:
        with unused_url() as url:
            async with BctrlSession("key", base_url=url, retry=RetryPolicy(base=0.01)) as session:
                report = await session.stop_runtimes(targets(1000), verify=False)

        assert report.counts == {NOT_SENT: 1000}
        assert report.retries <= 0.1 * 1000
        assert report.ended_early is not None

    def test_responses_before_the_run_do_not_count(self, simulate: Simulate) -> None:
        simulation = simulate(lambda each: ANSWER if each.alias == "crm" else disconnected())

        async def scenario(session: BctrlSession) -> StopReport:
            await session.stop_runtime("ws-1", "crm")
            return await session.stop_runtimes(targets(1000), verify=False)

        report = simulation.run(scenario)
        assert report.ended_early is not None
        assert len(simulation.stops) <= 1 + 100 + 5
        assert simulation.seconds < 10

    @pytest.mark.parametrize("status", [429, 500])
    def test_a_response_to_an_earlier_attempt_does_not_count(
        self, simulate: Simulate, status: int
    ) -> None:
        """Fault: it closed the breaker, so patience started anew."""
        error = BctrlRateLimitError if status == 429 else BctrlServerError
        simulation = simulate(
            lambda each: error("first", status=status) if each.at < 0.1 else disconnected()
        )
        assert simulation.stop(30).ended_early is not None
        assert simulation.seconds < 400

    def test_a_server_with_requests_to_answer_is_not_given_up(self, simulate: Simulate) -> None:
        simulation = simulate(dead(0, 1))
        simulation.read_answer = bad_gateway()
        simulation.before_response = lambda each: (
            None if each.alias in {"r0", "r1"} else asyncio.sleep(30)
        )
        report = simulation.stop(20, concurrency=20)

        assert report.counts == {STOPPED: 18, UNKNOWN: 2}
        assert report.ended_early is None
        assert simulation.seconds < 300

    def test_closing_the_session_ends_the_run(self, simulate: Simulate) -> None:
        """Fault: the probe ended with the session, and the other targets waited for it for ever."""
        simulation = simulate(lambda _: disconnected())

        async def scenario(session: BctrlSession) -> StopReport:
            batch = asyncio.ensure_future(session.stop_runtimes(targets(5), verify=False))
            while len(simulation.requests) < 6:
                await asyncio.sleep(0.01)
            await session.close()
            async with asyncio.timeout(60):
                return await batch

        assert simulation.run(scenario).counts == {UNKNOWN: 5}

    async def test_closing_the_session_ends_a_probe_that_may_not_be_sent_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: it asked for ever whether the server is back, and blocked the event loop."""
        asked, ask = 0, _run._ask_canary

        async def ask_at_most_a_hundred_times(*args: Any) -> bool:  # noqa: ANN401 - what it has.
            nonlocal asked
            asked += 1
            assert asked < 100
            return await ask(*args)

        monkeypatch.setattr(_run, "_ask_canary", ask_at_most_a_hundred_times)
        async with Emulator(port=0) as emulator:
            dropped, hanging = add_runtimes(emulator, 2)
            emulator.add_runtime("ws-1", CANARY)
            emulator.poison(*dropped, Fault.DROP_BEFORE)
            emulator.poison("ws-1", CANARY, Fault.DROP_BEFORE)
            emulator.poison(*hanging, Fault.HANG)
            once = RetryPolicy(attempts=1, base=10.0)
            session = BctrlSession("emulator-key", base_url=emulator.url, retry=once)
            running = asyncio.create_task(await_batch(session.stop_runtimes([dropped, hanging])))
            await until(lambda: asked and session.stats.waiting)
            await session.close()
            await asyncio.wait([running])

        assert asked == 1


class TestOutage:
    @pytest.mark.parametrize("fail", [connection_refused, disconnected, bad_gateway, untrusted])
    @pytest.mark.parametrize("concurrency", [1, 100])
    def test_every_target_is_stopped_after_thirty_seconds(
        self, simulate: Simulate, fail: Fail, concurrency: int
    ) -> None:
        simulation = simulate(down(2, 32, fail))
        count = 50 * concurrency
        report = simulation.stop(count, concurrency=concurrency)

        assert report.ok
        assert report.counts == {STOPPED: count}
        assert len(simulation.requests) <= 1.1 * count + 15
        # The run resumes within five seconds of the return of the server.
        assert simulation.seconds <= 32 + 5 + (count / concurrency) * 0.1

    @pytest.mark.parametrize("concurrency", [1, 2, 10, 100])
    def test_four_minutes_cost_two_targets_at_most(
        self, simulate: Simulate, concurrency: int
    ) -> None:
        simulation = simulate(down(2, 242))
        report = simulation.stop(50 * concurrency, concurrency=concurrency)

        assert report.ended_early is None
        assert report.counts[UNKNOWN] <= (2 if concurrency < 100 else 0)

    @pytest.mark.parametrize("fail", [disconnected, untrusted])
    def test_the_run_ends_after_the_patience(self, simulate: Simulate, fail: Fail) -> None:
        simulation = simulate(down(2, 1000, fail))
        report = simulation.stop(10_000)

        assert 302 <= simulation.seconds <= 320
        stopped = report.counts[STOPPED]
        assert 1800 <= stopped <= 2000
        # The requests in flight.
        assert report.counts[UNKNOWN] == (100 if fail is disconnected else 0)
        assert len(simulation.requests) <= stopped + 300
        # A certificate has to be renewed or trusted.
        summary, advice = (
            ("the connection broke", "Run it again once the server is back")
            if fail is disconnected
            else ("no connection: the certificate has expired", "Renew the certificate")
        )
        assert str(report.ended_early) == f"the server answers no more: {summary}. {advice}"

    def test_the_run_ends_at_its_deadline(self, simulate: Simulate) -> None:
        simulation = simulate(down(2, 1000, connection_refused))
        report = simulation.stop(10_000, deadline=20)

        assert simulation.seconds == pytest.approx(20)
        # The probe may have been in flight.
        assert 1800 <= report.counts[STOPPED] <= 2000
        assert report.counts[NOT_SENT] >= 9999 - report.counts[STOPPED]

    @pytest.mark.parametrize("fail", [connection_refused, disconnected])
    def test_stop_reading_waits_only_for_stops_that_may_have_taken_effect(
        self, simulate: Simulate, fail: Fail
    ) -> None:
        simulation = simulate(down(2, 32, fail))

        async def scenario(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(iter(targets(10_000)), verify=False)
            asyncio.get_running_loop().call_later(10, batch.stop_reading)
            return await batch

        report = simulation.run(scenario)
        assert 1900 <= report.total <= 2100
        if fail is connection_refused:
            assert report.counts == {STOPPED: report.total - 100, NOT_SENT: 100}
            assert simulation.seconds == pytest.approx(10)
        else:
            assert report.counts == {STOPPED: report.total}
            assert simulation.seconds > 32

    def test_is_unanswered_is_true_meanwhile(self, simulate: Simulate) -> None:
        async def scenario(session: BctrlSession) -> list[bool]:
            batch = session.stop_runtimes(targets(5000), verify=False)
            stopping = asyncio.create_task(batch)
            states: list[bool] = []
            for _ in range(3):
                await asyncio.sleep(1.5 if not states else 10)
                states.append(batch.is_unanswered)
            await stopping
            return [*states, batch.is_unanswered]

        states = simulate(down(2, 32, connection_refused)).run(scenario)
        assert states == [False, True, True, False]

    def test_it_is_survived_right_after_a_list(self, simulate: Simulate) -> None:
        """Fault: `stop_workspace` gave up, as if the server had never answered."""

        async def scenario(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(targets(10), verify=False)
            await session.get_runtime("ws-1", "r0")
            return await batch

        simulation = simulate(down(0.05, 20, connection_refused))
        assert simulation.run(scenario).counts == {STOPPED: 10}

    def test_an_answered_single_stop_shows_that_the_server_is_up(self, simulate: Simulate) -> None:
        simulation = simulate(dead(*range(3)))

        async def scenario(session: BctrlSession) -> StopReport:
            async with asyncio.TaskGroup() as group:
                others = group.create_task(stop_others(session))
                report = await session.stop_runtimes(targets(3), concurrency=2, verify=False)
                others.cancel()
            return report

        report = simulation.run(scenario)
        assert report.counts == {UNKNOWN: 3}
        assert report.ended_early is None

    def test_a_canary_that_is_not_sent_is_no_answer(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the server counted as up, so that each target used up its attempts."""
        request = Sender.request

        async def send_only_stops(sender: Sender, call: Call[Runtime]) -> Runtime:
            if not call.operation.stops:
                raise BctrlRateLimitError("not sent: rate limited")
            return await request(sender, call)

        monkeypatch.setattr(Sender, "request", send_only_stops)
        report = simulate(down(2, 37)).stop(3_000, deadline=60)

        assert report.counts == {STOPPED: 3_000}

    def test_a_throttled_canary_is_an_answer(self, simulate: Simulate) -> None:
        throttled = BctrlRateLimitError("429", status=429)
        server = down(0, 1)
        simulation = simulate(lambda each: throttled if each.alias == CANARY else server(each))
        report = simulation.stop(5)

        assert report.counts == {STOPPED: 5}
        # Each failure asks once; a canary is never retried.
        assert simulation.received[CANARY] <= 15
        assert simulation.seconds <= 15

    def test_a_throttled_probe_ends_it_for_all_targets(self, simulate: Simulate) -> None:
        probed = set()

        def server(each: Request) -> Runtime | BctrlError:
            if 2 <= each.at < 10:
                if each.at > 4:
                    probed.add(each.alias)
                return connection_refused()
            return unavailable() if each.alias in probed and each.at < 200 else ANSWER

        simulation = simulate(server)
        report = simulation.stop(5000)

        assert report.counts[STOPPED] >= 4900
        assert sum(10 <= each.at < 60 for each in simulation.stops) >= 2000

    def test_failures_of_earlier_attempts_do_not_end_it(self, simulate: Simulate) -> None:
        simulation = simulate(down(2, 40))
        # Requests that arrive as the server goes down fail one by one, seconds later.
        simulation.before_response = lambda each: (
            asyncio.sleep(1 + each.at % 0.1 * 40) if 2 <= each.at < 2.2 else None
        )
        report = simulation.stop(5000)

        assert report.ok
        assert len(simulation.requests) <= 5000 + 200 + 30

    async def test_with_real_sockets_a_restarted_server_is_found(self) -> None:
        port = free_port()
        emulator, restarted = Emulator(port=port), Emulator(port=port)
        await emulator.start()
        add_runtimes(emulator, 500)
        add_runtimes(restarted, 500)
        session = BctrlSession(
            "emulator-key", base_url=emulator.url, retry=RetryPolicy(base=0.05, cap=0.1)
        )

        async def restart(outcome: StopOutcome) -> None:
            if outcome.index == 100:
                await emulator.close()
                await asyncio.sleep(0.2)
                await restarted.start()

        async with session:
            report = await session.stop_runtimes(targets(500), on_outcome=restart, verify=False)
        await restarted.close()

        assert report.ok
        assert report.total == 500


async def stop_others(session: BctrlSession) -> None:
    """Stop one runtime after the other, until cancelled."""
    for number in itertools.count(100):
        await session.stop_runtime("ws-1", f"r{number}")


class TestGateway:
    """A gateway's 503, which says nothing about the server behind it."""

    @pytest.mark.parametrize("concurrency", [1, 100])
    @pytest.mark.parametrize("retry_after", [None, 5.0])
    @pytest.mark.parametrize("since", [0, 2])
    def test_thirty_seconds_cost_no_target(
        self, simulate: Simulate, concurrency: int, retry_after: float | None, since: int
    ) -> None:
        simulation = simulate(down(since, 32, lambda: unavailable(retry_after)))
        count = 50 * concurrency
        report = simulation.stop(count, concurrency=concurrency)

        assert report.counts == {STOPPED: count}
        assert len(simulation.requests) <= 1.1 * count + 100
        to_recover = 15 if retry_after is None else 120
        assert simulation.seconds <= 32 + to_recover + 0.1 * count / concurrency

    @pytest.mark.parametrize("calls", [1, 100])
    def test_thirty_seconds_cost_no_single_call(self, simulate: Simulate, calls: int) -> None:
        stopped = simulate(down(0, 30, unavailable)).run(
            lambda session: asyncio.gather(
                *(session.stop_runtime(*target) for target in targets(calls))
            )
        )
        assert stopped == [ANSWER] * calls

    @pytest.mark.parametrize(
        ("times", "others_answer", "reads"), [(1, None, 0), (2, None, 6), (2, False, 12)]
    )
    def test_only_a_second_one_of_a_target_asks_canaries_which_hold_up_no_retry(
        self,
        simulate: Simulate,
        monkeypatch: pytest.MonkeyPatch,
        times: int,
        reads: int,
        *,
        others_answer: bool | None,
    ) -> None:
        """Fault: sixteen processes on one limit sent a canary for each fifth stop."""
        if others_answer is not None:
            # Other calls of the session may be refused all the time, while no canary is.
            monkeypatch.setattr(Limiter, "answers_others", lambda *_: others_answer)
        simulation = simulate(failing_first(0, fail=unavailable, times=times))

        assert simulation.stop(1).counts == {STOPPED: 1}
        assert len(simulation.reads) == reads

    def test_many_targets_ask_hardly_more_canaries_than_a_single_target(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(
            lambda each: unavailable() if each.stops and each.number <= 2 else ANSWER
        )

        assert simulation.stop(100).counts == {STOPPED: 100}
        assert len(simulation.reads) < 40

    def test_a_canary_without_an_answer_speaks_for_all_that_were_refused(
        self, simulate: Simulate
    ) -> None:
        """Fault: each call asked for itself, one after the other, where GETs get no answer."""
        simulation = simulate(down(10, 15, unavailable), 0.02)
        simulation.read_answer, simulation.read_latency = bad_gateway(), 2

        async def stop_while_it_is_refused(session: BctrlSession) -> StopReport:
            # It is no longer in its slow start.
            await session.stop_runtimes(targets(400), verify=False)
            await asyncio.sleep(10 - asyncio.get_running_loop().time())
            return await session.stop_runtimes(targets(100), verify=False)

        assert simulation.run(stop_while_it_is_refused).counts == {STOPPED: 100}
        assert simulation.seconds < 10 + 20

    def test_a_single_call_that_others_overtake_spends_its_attempts(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(dead(0, fail=unavailable))

        async def scenario(session: BctrlSession) -> None:
            async with asyncio.TaskGroup() as group:
                others = group.create_task(stop_others(session))
                with pytest.raises(BctrlServerError):
                    await session.stop_runtime("ws-1", "r0")
                others.cancel()

        simulation.run(scenario)

        assert simulation.received["r0"] == 1 + RetryPolicy().attempts
        assert simulation.seconds <= 8


class TestPoison:
    """Targets that are never answered, by a server that answers all others."""

    @pytest.mark.parametrize("fail", [connection_refused, disconnected])
    @pytest.mark.parametrize("attempts", [1, 4])
    @pytest.mark.parametrize("lasts", [6, 30])
    def test_an_outage_is_survived_by_all_others(
        self, simulate: Simulate, fail: Fail, attempts: int, lasts: float
    ) -> None:
        outage, poison = down(2, 2 + lasts, fail), dead(*range(17, 5000, 100))
        simulation = simulate(
            lambda each: outage(each) if 2 <= each.at < 2 + lasts else poison(each)
        )
        report = simulation.stop(5000, retry=RetryPolicy(attempts=attempts))

        assert report.counts == {STOPPED: 4950, UNKNOWN: 50}
        assert report.ended_early is None
        assert len(simulation.stops) <= 1.1 * 5000
        assert simulation.seconds <= 2 + lasts + 15

    def test_a_target_that_dies_once_it_is_stopped_is_no_canary_again(
        self, simulate: Simulate
    ) -> None:
        def dying(each: Request) -> Runtime | BctrlError:
            is_dead = each.number > 1 if each.alias == "r0" else each.stops
            return disconnected() if is_dead else ANSWER

        simulation = simulate(dying)

        assert simulation.stop(2, concurrency=1).counts == {STOPPED: 1, UNKNOWN: 1}
        assert simulation.received["r0"] == 2
        assert simulation.seconds <= 10


class TestServerErrors:
    """A server that answers 500 to everything for a while."""

    def failing(self) -> BctrlError:
        return BctrlServerError("500", status=500, may_have_stopped=True)

    @pytest.mark.parametrize(("lasts", "lost"), [(2, 10), (15, 60)])
    def test_nearly_all_targets_are_stopped_before_the_deadline(
        self, simulate: Simulate, lasts: float, lost: int
    ) -> None:
        """Fault: once the quota was exhausted, most targets were given up after an attempt."""
        simulation = simulate(down(0.5, 0.5 + lasts, self.failing))
        report = simulation.stop(3000, deadline=120)

        assert report.counts[UNKNOWN] <= lost
        assert report.counts[STOPPED] == 3000 - report.counts[UNKNOWN]
        assert len(simulation.requests) <= 1.2 * 3000
        assert simulation.seconds <= 60

    def test_a_server_that_never_recovers_is_left_with_few_requests(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda _: self.failing())
        report = simulation.stop(3000, deadline=120)

        assert simulation.seconds == pytest.approx(120)
        assert report.counts[STOPPED] == 0
        assert len(simulation.requests) <= 600

    def test_closing_the_session_ends_the_wait_for_the_quota(self, simulate: Simulate) -> None:
        simulation = simulate(lambda _: self.failing())

        async def scenario(session: BctrlSession) -> StopReport:
            batch = asyncio.ensure_future(session.stop_runtimes(targets(100), verify=False))
            await asyncio.sleep(5)
            await session.close()
            return await batch

        assert simulation.run(scenario).counts == {UNKNOWN: 100}
        assert simulation.seconds <= 6


class TestUnansweredReads:
    """A server that answers stops, and no GET."""

    @pytest.mark.parametrize(
        ("concurrency", "read_latency"), [(1, 0.2), (2, 0.2), (2, 30), (5, 0.2)]
    )
    def test_dead_targets_of_all_workers_hold_up_nobody(
        self, simulate: Simulate, concurrency: int, read_latency: float
    ) -> None:
        simulation = simulate(dead(*range(1, concurrency + 1)))
        simulation.read_answer, simulation.read_latency = bad_gateway(), read_latency
        report = simulation.stop(20, concurrency=concurrency)

        assert report.counts == {STOPPED: 20 - concurrency, UNKNOWN: concurrency}

    def test_a_failed_stop_is_still_retried(self, simulate: Simulate) -> None:
        simulation = simulate(failing_first(0))
        simulation.read_answer = bad_gateway()

        assert simulation.stop(1).counts == {STOPPED: 1}
        assert simulation.seconds <= 5

    @pytest.mark.parametrize("deadline", [None, 100])
    def test_a_silent_canary_holds_up_no_target_that_fails_once(
        self, simulate: Simulate, deadline: float | None
    ) -> None:
        simulation = simulate(failing_first(50, 100, 300))
        simulation.read_answer, simulation.read_latency = bad_gateway(), 60.01

        assert simulation.stop(3000, deadline=deadline).counts == {STOPPED: 3000}
        assert simulation.seconds <= 5

    def test_a_silent_canary_is_abandoned_once_a_stop_is_answered(self, simulate: Simulate) -> None:
        async def main(session: BctrlSession) -> StopReport:
            # The first canary is refused, the second is silent.
            asyncio.get_running_loop().call_later(0.15, setattr, simulation, "read_latency", 60.0)
            return await session.stop_runtimes(targets(3), concurrency=2, verify=False)

        simulation = simulate(failing_first(0))
        simulation.read_answer = bad_gateway()
        simulation.before_response = lambda each: asyncio.sleep(5) if each.at else None

        assert simulation.run(main).counts == {STOPPED: 3}
        assert simulation.seconds <= 12

    def test_a_target_that_is_never_answered_ends_after_a_bounded_number_of_attempts(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(dead(3))
        simulation.read_answer = bad_gateway()
        report = simulation.stop(20_000)

        assert report.counts == {STOPPED: 19_999, UNKNOWN: 1}
        assert simulation.received["r3"] <= RetryPolicy().attempts + 10


class TestUntrustedCertificate:
    def test_from_the_first_attempt_it_ends_the_run_after_a_second_probe(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda _: untrusted())
        report = simulation.stop(10_000)

        assert report.counts == {NOT_SENT: 10_000}
        # Two probes, a canary for each, and a new target sent meanwhile.
        assert len(simulation.requests) <= 100 + 5
        assert simulation.seconds < 3
        assert str(report.ended_early) == (
            "the server does not answer: no connection: the certificate has expired. "
            "Renew the certificate"
        )

    def test_while_the_first_answers_are_slow_it_costs_no_target(self, simulate: Simulate) -> None:
        def is_bad(each: Request) -> bool:
            return each.at < 5 and each.alias in {"r0", "r1", CANARY}

        simulation = simulate(lambda each: untrusted() if is_bad(each) else ANSWER)
        simulation.before_response = lambda each: None if is_bad(each) else asyncio.sleep(10)
        report = simulation.stop(100)

        assert report.counts == {STOPPED: 100}
        assert report.ended_early is None

    def test_it_costs_a_single_target_its_attempts(self, simulate: Simulate) -> None:
        report = simulate(dead(7, fail=untrusted)).stop(1000)

        assert report.counts == {STOPPED: 999, NOT_SENT: 1}
        assert report.failures[0].attempts == 4
        assert report.ended_early is None

    def test_a_single_call_ends_with_it(self, simulate: Simulate) -> None:
        simulation = simulate(lambda _: untrusted())
        with pytest.raises(BctrlNetworkError, match="the certificate has expired"):
            simulation.run(lambda session: session.stop_runtime("ws-1", "crm"))
        assert simulation.received == {"crm": 1}
