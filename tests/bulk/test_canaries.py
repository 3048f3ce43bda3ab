"""Canaries, which tell a dead target from a dead server, and answers with errors."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
from support.simulated import (
    ANSWER,
    Fail,
    Request,
    Simulate,
    bad_gateway,
    dead,
    disconnected,
    down,
    failing_first,
    server_error,
    targets,
    unanswered,
    unavailable,
)

from bctrl_async import (
    BctrlError,
    BctrlServerError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    StopReport,
    StopResult,
)
from bctrl_async._calls.call import Call
from bctrl_async._calls.sender import Sender
from bctrl_async._kinds import Failure, Kind
from bctrl_async._limiter.limiter import Limiter

STOPPED, UNKNOWN = StopResult.STOPPED, StopResult.UNKNOWN
busy = partial(unavailable, retry_after=5.0)


async def stop_others(session: BctrlSession) -> None:
    """Stop one runtime after the other, until cancelled."""
    for number in itertools.count(100):
        await session.stop_runtime("ws-1", f"r{number}")


def test_an_answered_single_stop_shows_that_the_server_is_up(
    simulate: Simulate,
) -> None:
    async def scenario(session: BctrlSession) -> StopReport:
        others = asyncio.create_task(stop_others(session))
        report = await session.stop_runtimes(targets(3), concurrency=2, verify=False)
        others.cancel()
        return report

    report = simulate(dead(*range(3))).run(scenario)
    assert report.counts == {UNKNOWN: 3}
    assert report.ended_early is None


def test_a_canary_not_sent_is_no_answer(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the server counted as up, so that each target used up its attempts."""
    request = Sender.request

    async def send_only_stops(
        sender: Sender,
        call: Call[Runtime],
        *arguments: Any,  # noqa: ANN401 - passed on.
        **options: Any,  # noqa: ANN401 - passed on.
    ) -> Runtime | Failure:
        if not call.operation.stops:
            return Failure(kind=Kind.NOT_ADMITTED, summary="not sent: rate limited")
        return await request(sender, call, *arguments, **options)

    monkeypatch.setattr(Sender, "request", send_only_stops)
    report = simulate(down(2, 37)).stop(3_000, deadline=60)

    assert report.counts == {STOPPED: 3_000}


def test_a_target_that_dies_once_it_is_stopped_is_no_canary_again(
    simulate: Simulate,
) -> None:
    def dying(request: Request) -> Runtime | BctrlError:
        is_dead = request.number > 1 if request.alias == "r0" else request.stops
        return disconnected() if is_dead else ANSWER

    simulation = simulate(dying)

    assert simulation.stop(2, concurrency=1).counts == {STOPPED: 1, UNKNOWN: 1}
    assert simulation.received["r0"] == 2


class TestGateway:
    """A gateway's 503, which says nothing about the server behind it."""

    @pytest.mark.parametrize(
        ("times", "others_answer", "reads"),
        [(1, None, 0), (2, None, 1), (2, False, 12)],
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
            # Other calls of the session may be refused all the time, while no canary
            # is.
            monkeypatch.setattr(Limiter, "answers_others", lambda *_: others_answer)
        simulation = simulate(failing_first(0, fail=unavailable, times=times))

        assert simulation.stop(1).counts == {STOPPED: 1}
        assert len(simulation.reads) == reads

    def test_many_targets_ask_for_less_than_a_canary_each(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(failing_first(*range(100), fail=unavailable, times=2))

        assert simulation.stop(100).counts == {STOPPED: 100}
        assert len(simulation.reads) < 60

    def test_a_canary_without_an_answer_speaks_for_all_refused(
        self, simulate: Simulate
    ) -> None:
        """Fault: each call asked for itself, in turn, where GETs get no answer."""
        simulation = simulate(down(10, 15, unavailable), 0.02)
        simulation.read_answer, simulation.read_latency = bad_gateway(), 2

        async def stop_while_it_is_refused(session: BctrlSession) -> StopReport:
            # It is no longer in its slow start.
            await session.stop_runtimes(targets(400), verify=False)
            await asyncio.sleep(10 - asyncio.get_running_loop().time())
            return await session.stop_runtimes(targets(100), verify=False)

        assert simulation.run(stop_while_it_is_refused).counts == {STOPPED: 100}
        assert simulation.seconds < 10 + 20

    def test_a_single_call_that_others_pass_spends_its_attempts(
        self, simulate: Simulate
    ) -> None:
        async def scenario(session: BctrlSession) -> None:
            others = asyncio.create_task(stop_others(session))
            with pytest.raises(BctrlServerError):
                await session.stop_runtime("ws-1", "r0")
            others.cancel()

        simulation = simulate(dead(0, fail=unavailable))
        simulation.run(scenario)

        assert simulation.received["r0"] == 1 + RetryPolicy().attempts
        assert simulation.seconds <= 8


DEAD: dict[str, tuple[int, Iterable[int], Fail, int, float, float]] = {
    # They say how many targets there are, which of them are dead, how these fail, how
    # many are stopped at once, and the most seconds until the others have ended, and
    # until all have.
    "one of many has a bad gateway": (1000, [500], bad_gateway, 100, 1.5, 8),
    "one of many breaks its connection": (1000, [500], disconnected, 100, 1.5, 8),
    "one of many never answers": (1000, [500], unanswered, 100, 1.5, 14),
    "the first never answers": (30, [0], unanswered, 1, 20, 20),
    "the first breaks its connection": (30, [0], disconnected, 2, 20, 20),
    "the last has a bad gateway": (30, [29], bad_gateway, 1, 20, 20),
    "the last never answers": (30, [29], unanswered, 2, 20, 20),
    "a fifth have a bad gateway": (500, range(2, 500, 5), bad_gateway, 100, 20, 20),
    "a fifth never answer": (500, range(2, 500, 5), unanswered, 100, 20, 20),
    "one of many has no upstream": (1000, [500], unavailable, 100, 5, 12),
    "the first has no upstream": (1000, [0], unavailable, 100, 5, 12),
    "the last has no upstream": (1000, [999], unavailable, 100, 5, 12),
    "a twentieth have no upstream": (
        1000,
        range(25, 1000, 50),
        unavailable,
        100,
        5,
        20,
    ),
    "some ask to wait, which holds no other": (
        1000,
        range(100, 1000, 200),
        busy,
        100,
        5,
        30,
    ),
    "the last fifth has no upstream": (100, range(80, 100), unavailable, 100, 12, 12),
    "the first three have no upstream": (100, range(3), unavailable, 1, 36, 36),
    # Fault: they passed for a limit, and each dead target after them slowed the others:
    # 20 s.
    "a cluster has no upstream": (
        *(500, [*range(100, 110), *range(115, 500, 10)], unavailable, 100, 8, 60),
    ),
}


class TestDeadTargets:
    """Some runtimes are behind a dead node; silence takes a second."""

    @pytest.mark.parametrize("case", DEAD)
    def test_they_spend_their_attempts_and_all_others_are_stopped_although(
        self, simulate: Simulate, case: str
    ) -> None:
        """Fault: a dead upstream passed for throttling, and cost 300 s of patience."""
        count, numbers, fail, concurrency, seconds, longest = DEAD[case]
        names = {f"r{number}" for number in numbers}
        simulation = simulate(dead(*numbers, fail=fail), 0.01)
        simulation.before_response = lambda request: asyncio.sleep(
            1.0 if fail is unanswered and request.alias in names else 0.0
        )
        report = simulation.stop(count, concurrency=concurrency)

        assert report.counts == {STOPPED: count - len(names), UNKNOWN: len(names)}
        assert {outcome.target.alias for outcome in report.failures} == names
        attempts = Counter(request.alias for request in simulation.stops)
        # Whether a first 503 is throttling is not known.
        most = RetryPolicy().attempts + (2 if fail in {unavailable, busy} else 0)
        assert max(attempts[name] for name in names) <= most
        assert report.ended_early is None
        assert simulation.seconds <= longest
        others = simulation.ended_at.keys() - names
        assert max(simulation.ended_at[alias] for alias in others) <= seconds

    def test_what_is_read_to_find_out_has_been_stopped_before(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(dead(*range(80, 100)), 0.01)
        assert simulation.stop(100).counts == {STOPPED: 80, UNKNOWN: 20}

        stopped = {f"r{number}" for number in range(80)}
        assert {request.alias for request in simulation.reads} <= stopped

    def test_what_the_api_itself_answers_costs_patience(
        self, simulate: Simulate
    ) -> None:
        own = partial(unavailable, code="server.unavailable", may_have_stopped=False)
        simulation = simulate(dead(50, fail=own), 0.01)

        assert simulation.stop(100).counts == {STOPPED: 99, StopResult.REJECTED: 1}
        assert simulation.seconds >= 300

    @pytest.mark.parametrize("fail", [bad_gateway, unanswered])
    def test_a_good_one_that_fails_once_is_retried_meanwhile(
        self, simulate: Simulate, fail: Fail
    ) -> None:
        poison, once = dead(20, fail=fail), failing_first(29)
        simulation = simulate(
            lambda request: (once if request.alias == "r29" else poison)(request), 0.01
        )

        assert simulation.stop(30).counts == {STOPPED: 29, UNKNOWN: 1}
        assert simulation.ended_at["r29"] < simulation.ended_at["r20"]
        assert [request.alias for request in simulation.stops].count("r29") == 2


class TestServerErrors:
    """A server that answers 500 to everything for a while."""

    @pytest.mark.parametrize(("lasts", "lost"), [(2, 10), (15, 60)])
    def test_nearly_all_targets_are_stopped(
        self, simulate: Simulate, lasts: float, lost: int
    ) -> None:
        """Fault: once the quota was exhausted, most had only one attempt."""
        simulation = simulate(down(0.5, 0.5 + lasts, server_error))
        report = simulation.stop(3000, deadline=120)

        assert report.counts[UNKNOWN] <= lost
        assert report.counts[STOPPED] == 3000 - report.counts[UNKNOWN]
        assert len(simulation.requests) <= 1.2 * 3000
        assert simulation.seconds <= 60

    def test_a_server_that_never_recovers_gets_few_requests(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda _: server_error())
        report = simulation.stop(3000, deadline=120)

        assert simulation.seconds == pytest.approx(120)
        assert report.counts[STOPPED] == 0
        assert len(simulation.requests) <= 610
