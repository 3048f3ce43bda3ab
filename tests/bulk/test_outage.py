"""Outages of the server, in virtual time: what they cost, and when a run gives up."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

import pytest
from support.runtimes import runtime
from support.simulated import (
    ANSWER,
    CANARY,
    Answer,
    Fail,
    Request,
    Server,
    Simulate,
    bad_gateway,
    dead,
    disconnected,
    down,
    failing_first,
    refused,
    server_error,
    targets,
    unavailable,
)
from support.throttling import throttled

from bctrl_async import (
    BctrlSession,
    RetryPolicy,
    StopReport,
    StopResult,
)
from bctrl_async._kinds import Failure, Kind
from bctrl_async.bulk._breaker import CircuitBreaker
from bctrl_async.testing import set_testing

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN
ACCEPTED = StopResult.ACCEPTED
asks_to_wait = partial(unavailable, retry_after=5.0)


def untrusted() -> Failure:
    return Failure(
        kind=Kind.UNTRUSTED,
        summary="no connection: the certificate has expired",
        advice="Renew the certificate",
    )


def no_resources() -> Failure:
    return Failure(
        kind=Kind.NO_RESOURCES,
        summary="no connection: Too many open files",
        advice="Raise the limit",
    )


def at_random(share: float, since: float, until: float, *fails: Fail) -> Server:
    """Make a server that fails a share of the requests between two times."""

    def answer(request: Request) -> Answer:
        chance = random.Random(repr(request))
        is_bad = since <= request.at < until and chance.random() < share
        return chance.choice(fails)() if is_bad else ANSWER

    return answer


def in_an_outage(outage: Server, poison: Server) -> Server:
    """Make a server with dead targets that is down for a while."""
    return lambda request: (
        poison(request) if outage(request) is ANSWER else outage(request)
    )


def dying_once_stopped(request: Request) -> Answer:
    """Answer nothing of the nodes of all but a few runtimes after half a second."""
    gone = request.alias != CANARY and int(request.alias[1:]) < 95 and request.at > 0.5
    return disconnected() if gone or request.alias == "r99" else ANSWER


def throttling_canaries(request: Request) -> Answer:
    return throttled() if request.alias == CANARY else down(0, 1)(request)


@dataclass(frozen=True)
class Case:
    """A bulk stop of so many targets at a server, and the most that it takes.

    `lost` targets are `unknown` in the end; all others are stopped. `reads` is the
    answer to every GET and its seconds, if the server answers none, and `slow` makes
    some answers late.
    """

    server: Server
    count: int
    _: KW_ONLY
    seconds: float
    lost: int = 0
    requests: int | None = None
    reads: tuple[Fail, float] | None = None
    slow: Callable[[Request], float] = lambda _: 0.0
    options: dict[str, Any] = field(default_factory=dict)


ONE, TWO, ONE_ATTEMPT = (
    {"concurrency": 1},
    {"concurrency": 2},
    {"retry": RetryPolicy(attempts=1)},
)
DEAD_AMONG_MANY = range(17, 5000, 100)

CASES = {
    # An outage of half a minute. The run resumes within five seconds of its end.
    "connections are refused": Case(
        down(2, 32, refused), 5000, requests=5515, seconds=42
    ),
    "requests are cut off": Case(down(2, 32), 5000, requests=5515, seconds=42),
    "one at a time is cut off": Case(
        down(2, 32), 50, requests=70, seconds=42, options=ONE
    ),
    "a gateway answers 502": Case(
        down(2, 32, bad_gateway), 5000, requests=5515, seconds=42
    ),
    "the certificate is untrusted": Case(
        down(2, 32, untrusted), 5000, requests=5515, seconds=42
    ),
    "a gateway answers 503": Case(
        down(2, 32, unavailable), 5000, requests=5600, seconds=52
    ),
    "503 from the start": Case(
        down(0, 32, unavailable), 50, requests=155, seconds=52, options=ONE
    ),
    "a gateway asks to wait": Case(
        down(0, 32, asks_to_wait), 5000, requests=5600, seconds=157
    ),
    "the machine makes no connection": Case(
        down(2, 32, no_resources), 5000, seconds=60, options=ONE_ATTEMPT
    ),
    "502 and 503 alternate": Case(
        at_random(1, 2, 32, unavailable, bad_gateway), 5000, seconds=150
    ),
    # These last for another time.
    "a twentieth of answers are 503": Case(
        at_random(0.05, 0, 1000, unavailable), 5000, seconds=40
    ),
    "half of the certificates are wrong": Case(
        at_random(0.5, 0, 0.5, untrusted), 5000, seconds=20
    ),
    "connections are refused nearly as long as the patience lasts": Case(
        down(2, 37, refused), 3000, seconds=45, options={"deadline": 45}
    ),
    "a cold session is refused": Case(
        failing_first(*range(100), fail=refused), 1000, seconds=15
    ),
    "requests that arrive as the server goes down fail one by one": Case(
        down(2, 40),
        5000,
        slow=lambda request: 1 + request.at % 0.1 * 40 if 2 <= request.at < 2.2 else 0,
        requests=5230,
        seconds=60,
    ),
    "canaries are throttled": Case(throttling_canaries, 5, requests=25, seconds=15),
    "nothing but a canary was answered before an outage": Case(
        in_an_outage(down(0.3, 20, refused), dead(0)),
        10,
        lost=1,
        seconds=60,
        options=ONE,
    ),
    # Dead targets, with and without an outage.
    "the first is dead at one attempt": Case(
        dead(0), 300, lost=1, seconds=60, options=ONE_ATTEMPT
    ),
    "the first two hundred are dead": Case(
        dead(*range(200)), 1000, lost=200, seconds=20
    ),
    # No successes of others add to the quota of their second attempts.
    "the last two hundred are dead": Case(
        dead(*range(800, 1000)), 1000, lost=200, seconds=40
    ),
    "the targets that were canaries die": Case(
        dying_once_stopped, 100, lost=1, seconds=30
    ),
    "dead targets are in a short outage, and have one attempt": Case(
        in_an_outage(down(2, 8, refused), dead(*DEAD_AMONG_MANY)),
        5000,
        lost=50,
        requests=5700,
        seconds=23,
        options=ONE_ATTEMPT,
    ),
    "dead targets are in a long outage": Case(
        in_an_outage(down(2, 32), dead(*DEAD_AMONG_MANY)),
        5000,
        lost=50,
        requests=5700,
        seconds=47,
    ),
    "others are slow while two targets are dead and no GET is answered": Case(
        dead(0, 1),
        20,
        lost=2,
        reads=(bad_gateway, 0.1),
        slow=lambda request: 0 if request.alias in {"r0", "r1"} else 30,
        seconds=300,
        options={"concurrency": 20},
    ),
    # No GET is answered.
    "all workers have dead targets, and GETs hang": Case(
        dead(1, 2), 20, lost=2, reads=(bad_gateway, 30), seconds=600, options=TWO
    ),
    "a stop fails once": Case(failing_first(0), 1, reads=(bad_gateway, 0.1), seconds=5),
    "some stops fail once, and GETs hang": Case(
        failing_first(50, 100, 300), 3000, reads=(bad_gateway, 60.01), seconds=5
    ),
    "a dead target is in a long run": Case(
        dead(3), 20_000, lost=1, requests=20_050, reads=(bad_gateway, 0.1), seconds=60
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_target_that_has_an_answer_is_stopped_although(
    simulate: Simulate, case: Case
) -> None:
    simulation = simulate(case.server)
    simulation.before_response = lambda request: asyncio.sleep(case.slow(request))
    if case.reads is not None:
        fail, simulation.read_latency = case.reads
        simulation.read_answer = fail()
    report = simulation.stop(case.count, **case.options)

    assert report.counts == Counter(
        {STOPPED: case.count - case.lost, UNKNOWN: case.lost}
    )
    assert report.ended_early is None
    assert case.requests is None or len(simulation.requests) <= case.requests
    assert simulation.seconds <= case.seconds


EXPIRED = "no connection: the certificate has expired. Renew the certificate"
BROKE, BACK = "the connection broke", "Run it again once the server is back"
GIVEN_UP: dict[str, tuple[Fail, int, int, int, tuple[int, int], str]] = {
    # They say how it fails and from which second on, how many targets are in flight
    # then, how many requests it gets meanwhile, when the run ends, and why.
    "refuses connections": (
        refused,
        0,
        0,
        110,
        (0, 10),
        "does not answer: no connection: refused",
    ),
    "cuts off requests": (
        disconnected,
        0,
        101,
        110,
        (0, 10),
        f"does not answer: {BROKE}",
    ),
    "is behind a dead gateway": (
        bad_gateway,
        0,
        101,
        110,
        (0, 10),
        "does not answer: 502",
    ),
    "is not trusted": (untrusted, 0, 0, 105, (0, 3), f"does not answer: {EXPIRED}"),
    "goes down": (
        disconnected,
        2,
        100,
        300,
        (302, 320),
        f"answers no more: {BROKE}. {BACK}",
    ),
    "is no longer trusted": (
        untrusted,
        2,
        0,
        300,
        (302, 320),
        f"answers no more: {EXPIRED}",
    ),
}


@pytest.mark.parametrize("case", GIVEN_UP)
def test_the_run_ends_after_few_requests_if_the_server(
    simulate: Simulate, case: str
) -> None:
    fail, since, in_flight, requests, (shortest, longest), why = GIVEN_UP[case]
    simulation = simulate(down(since, math.inf, fail))
    report = simulation.stop(10_000)

    stopped = report.counts[STOPPED]
    assert 900 * since <= stopped <= 1000 * since
    assert report.counts[UNKNOWN] == in_flight
    assert report.counts[NOT_SENT] == 10_000 - stopped - in_flight
    assert len(simulation.requests) <= stopped + requests
    assert shortest <= simulation.seconds <= longest
    assert str(report.ended_early).startswith(f"the server {why}")


class TestMachineWithoutConnections:
    """No canary asks whether the server is up: the machine could not send it."""

    @pytest.mark.parametrize(
        ("since", "shortest", "longest"), [(0.0, 0, 10), (0.05, 300, 320)]
    )
    def test_the_run_ends_as_if_the_server_did_not_answer(
        self, simulate: Simulate, since: float, shortest: float, longest: float
    ) -> None:
        simulation = simulate(down(since, math.inf, no_resources), latency=0.001)
        report = simulation.stop(1000)

        assert report.counts[NOT_SENT] >= 900
        assert (report.counts[STOPPED] > 0) is (since > 0)
        assert shortest <= simulation.seconds <= longest
        why = "no connection: Too many open files"
        assert report.ended_early is not None
        assert (report.ended_early.summary, simulation.reads) == (why, [])

    def test_it_ends_soon_in_a_test(self, simulate: Simulate) -> None:
        simulation = simulate(down(0.05, math.inf, no_resources), latency=0.001)
        with set_testing(True):
            report = simulation.stop(1000, concurrency=1)

        assert report.ended_early is not None
        assert len(simulation.requests) <= report.counts[STOPPED] + 10

    def test_a_poll_does_not_end_the_run(self, simulate: Simulate) -> None:
        simulation = simulate(lambda _: runtime("active"))
        simulation.read_answer = no_resources()
        report = simulation.stop(1, verify=5)

        assert report.counts == {ACCEPTED: 1}
        assert report.ended_early is None
        assert len(simulation.reads) > 2


class TestNeverAnswered:
    def test_responses_before_the_run_do_not_count(self, simulate: Simulate) -> None:
        simulation = simulate(
            lambda request: ANSWER if request.alias == "crm" else disconnected()
        )

        async def scenario(session: BctrlSession) -> StopReport:
            await session.stop_runtime("ws-1", "crm")
            return await session.stop_runtimes(targets(1000), verify=False)

        assert simulation.run(scenario).ended_early is not None
        assert len(simulation.stops) <= 1 + 100 + 5

    @pytest.mark.parametrize("first", [throttled, server_error])
    def test_earlier_attempts_do_not_count(
        self, simulate: Simulate, first: Fail
    ) -> None:
        """Fault: it closed the breaker, so patience started anew."""
        simulation = simulate(
            lambda request: first() if request.at < 0.1 else disconnected()
        )

        assert simulation.stop(30).ended_early is not None
        assert simulation.seconds < 400

    # A probe with one attempt asked for ever whether the server is back.
    @pytest.mark.parametrize(
        ("fail", "attempts"), [(disconnected, 4), (disconnected, 1), (server_error, 4)]
    )
    def test_closing_the_session_ends_the_run(
        self,
        simulate: Simulate,
        monkeypatch: pytest.MonkeyPatch,
        fail: Fail,
        attempts: int,
    ) -> None:
        """Fault: the probe ended with the session; others waited for it for ever."""
        asked, ask = 0, CircuitBreaker._send_canary

        async def ask_a_few_times(*args: Any) -> bool:  # noqa: ANN401 - passed on.
            nonlocal asked
            asked += 1
            assert asked < 100
            return await ask(*args)

        monkeypatch.setattr(CircuitBreaker, "_send_canary", ask_a_few_times)
        simulation = simulate(lambda _: fail())
        simulation.before_response = lambda request: asyncio.sleep(
            20 if request.alias == "r1" else 0
        )

        async def scenario(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(
                targets(5), retry=RetryPolicy(attempts=attempts), verify=False
            )
            running = asyncio.ensure_future(batch)
            await asyncio.sleep(2)
            await session.close()
            return await running

        report = simulation.run(scenario)
        assert report.counts[UNKNOWN] == report.total
        assert simulation.seconds <= 21


class TestOutage:
    @pytest.mark.parametrize("concurrency", [2, 100])
    def test_four_minutes_cost_at_most_two_stops(
        self, simulate: Simulate, concurrency: int
    ) -> None:
        simulation = simulate(down(2, 242))
        report = simulation.stop(50 * concurrency, concurrency=concurrency)

        assert report.ended_early is None
        assert report.counts[UNKNOWN] <= (2 if concurrency < 100 else 0)

    @pytest.mark.parametrize("fail", [refused, disconnected])
    def test_stop_reading_waits_for_stops_that_may_have_worked(
        self, simulate: Simulate, fail: Fail
    ) -> None:
        simulation = simulate(down(2, 32, fail))

        async def scenario(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(iter(targets(10_000)), verify=False)
            asyncio.get_running_loop().call_later(10, batch.stop_reading)
            return await batch

        report = simulation.run(scenario)
        assert 1900 <= report.total <= 2100
        if fail is refused:
            assert report.counts == {STOPPED: report.total - 100, NOT_SENT: 100}
            assert simulation.seconds == pytest.approx(10)
        else:
            assert report.counts == {STOPPED: report.total}
            assert simulation.seconds > 32

    def test_is_unanswered_is_true_meanwhile(self, simulate: Simulate) -> None:
        async def scenario(session: BctrlSession) -> list[bool]:
            batch = session.stop_runtimes(targets(5000), verify=False)
            stopping = asyncio.create_task(batch)
            await asyncio.sleep(1.5)
            states = [batch.progress.is_unanswered]
            await asyncio.sleep(10)
            states.append(batch.progress.is_unanswered)
            await stopping
            return [*states, batch.progress.is_unanswered]

        assert simulate(down(2, 32, refused)).run(scenario) == [False, True, False]

    def test_it_is_survived_right_after_a_list(self, simulate: Simulate) -> None:
        """Fault: `stop_workspace` gave up, as if the server had never answered."""

        async def scenario(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(targets(10), verify=False)
            await session.get_runtime("ws-1", "r0")
            return await batch

        simulation = simulate(down(0.05, 20, refused))
        assert simulation.run(scenario).counts == {STOPPED: 10}

    def test_a_throttled_probe_ends_it_for_all_targets(
        self, simulate: Simulate
    ) -> None:
        probed = set()

        def server(request: Request) -> Answer:
            if 2 <= request.at < 10:
                if request.at > 4:
                    probed.add(request.alias)
                return refused()
            return (
                unavailable()
                if request.alias in probed and request.at < 200
                else ANSWER
            )

        simulation = simulate(server)
        report = simulation.stop(5000)

        assert report.counts[STOPPED] >= 4900
        assert sum(10 <= request.at < 60 for request in simulation.stops) >= 2000


def test_an_untrusted_certificate_costs_a_single_target_its_attempts(
    simulate: Simulate,
) -> None:
    report = simulate(dead(7, fail=untrusted)).stop(1000)

    assert report.counts == {STOPPED: 999, NOT_SENT: 1}
    assert report.failures[0].attempts == 4
    assert report.ended_early is None
