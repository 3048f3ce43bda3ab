"""Polls of many runtimes: one list of a workspace answers for all, in virtual time."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
from msgspec.structs import replace
from support.runtimes import runtime
from support.simulated import (
    Answer,
    Request,
    Server,
    Simulate,
    bad_gateway,
    dead,
    disconnected,
    server_error,
    targets,
    unanswered,
    unavailable,
)
from support.throttling import throttled, token_bucket

from bctrl_async import (
    BctrlError,
    BctrlPermissionError,
    BctrlResponseError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    RuntimeRef,
    StopReport,
    StopResult,
)
from bctrl_async._calls.results import outcome_of
from bctrl_async._http.lists import RuntimeList
from bctrl_async._limiter.evidence import History
from bctrl_async.bulk._polls import Poll, Polls, Workspace
from bctrl_async.observer import BulkObserver, CallObserver, Observer

STOPPED, ACCEPTED = StopResult.STOPPED, StopResult.ACCEPTED
ACTIVE, ENDED = runtime("active"), runtime("stopped")


def active_until(until: float) -> Server:
    """Report every runtime as active until this time, and as stopped from then on."""
    return lambda request: ACTIVE if request.at < until else ENDED


def listed(*items: Runtime | BctrlResponseError) -> Callable[[Request], RuntimeList]:
    return lambda _: list(items)


class TestOneListForMany:
    @pytest.mark.parametrize("takes", [0.2, 20.0, 100.0])
    def test_it_takes_a_few_lists_however_many_runtimes_end(
        self, simulate: Simulate, takes: float
    ) -> None:
        simulation = simulate(active_until(takes))
        report = simulation.stop(3000, verify=True)

        assert report.counts == {STOPPED: 3000}
        assert simulation.stops[-1].at < 1.06 * 3
        assert len(simulation.reads) == len(simulation.lists) <= 6 + takes / 4
        assert simulation.seconds < 3 + takes + 5.5

    def test_fewer_than_ten_runtimes_are_got_one_by_one(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(active_until(20))
        simulation.stop(9, verify=True)
        assert simulation.lists == []

    def test_each_workspace_has_a_list_of_its_own(self, simulate: Simulate) -> None:
        simulation = simulate(active_until(20))
        report = simulation.stop(
            [(f"ws-{number % 40}", f"r{number}") for number in range(800)], verify=True
        )

        assert report.counts == {STOPPED: 800}
        assert Counter(request.workspace for request in simulation.lists).total() < 400
        assert len(simulation.requests) < 1.5 * 800

    def test_observers_see_a_list_in_place_of_the_polls(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: Counter[str] = Counter()

        class Counting(BulkObserver):
            def begin_call(self, operation: str, *_: object) -> CallObserver:
                calls[operation] += 1
                return CallObserver()

        monkeypatch.setattr(Observer, "begin_bulk", lambda _: Counting())
        simulation = simulate(active_until(4))

        async def main(session: BctrlSession) -> StopReport:
            session._observer = Observer()
            return await session.stop_runtimes(targets(100))

        assert simulation.run(main).ok
        assert calls == {"list": len(simulation.lists)}

    def test_a_list_says_nothing_of_a_stop_that_was_answered_after_it_was_sent(
        self, simulate: Simulate
    ) -> None:
        async def items() -> AsyncIterator[tuple[str, str]]:
            for target in targets(12):
                yield target
            await asyncio.sleep(5)
            yield "ws-1", "r12"

        simulation = simulate(lambda _: ACTIVE)
        simulation.list_answer = listed(
            *[replace(ENDED, alias=f"r{number}") for number in range(13)]
        )
        simulation.before_response = lambda request: (
            None if request.alias else asyncio.sleep(10)
        )
        report = simulation.stop(items(), verify=60.0)

        assert report.counts == {STOPPED: 12, ACCEPTED: 1}
        assert len(simulation.lists) == 1


class TestWithoutAList:
    """A GET of each answers where no list does."""

    @pytest.mark.parametrize(
        ("failure", "most_lists"),
        [
            (server_error(), 12),
            (BctrlPermissionError("403", status=403), 1),
            (BctrlResponseError("a page of a longer list", status=200), 1),
            # A list that is too much for the gateway or for its time limit.
            (bad_gateway(), 4),
            (unanswered(), 4),
        ],
        ids=["500", "403", "page", "502", "timeout"],
    )
    def test_each_is_got_if_the_list_fails(
        self, simulate: Simulate, failure: Answer, most_lists: int
    ) -> None:
        simulation = simulate(active_until(20))
        simulation.list_answer = lambda _: failure
        report = simulation.stop(30, verify=True)

        assert report.counts == {STOPPED: 30}
        assert 1 <= len(simulation.lists) <= most_lists
        assert simulation.seconds < 30

    @pytest.mark.parametrize(
        "failure",
        [
            bad_gateway(),
            disconnected(),
            unanswered(),
            server_error(),
            throttled(2.0),
        ],
        ids=["502", "lost", "timeout", "500", "429"],
    )
    def test_a_list_that_fails_once_is_tried_again(
        self, simulate: Simulate, failure: Answer
    ) -> None:
        """Fault: it was the last, so each runtime was got ten times."""
        simulation = simulate(active_until(40))
        simulation.list_answer = lambda request: (
            failure if request.number == 1 else None
        )
        report = simulation.stop(3000, verify=True)

        assert report.counts == {STOPPED: 3000}
        gets = [request for request in simulation.reads if request.alias]
        # The canary shows whether the server is down.
        assert len(gets) <= 1
        assert simulation.seconds < 3 + 40 + 5.5

    def test_no_list_is_tried_again_for_the_few_that_are_left_by_then(
        self, simulate: Simulate
    ) -> None:
        def server(request: Request) -> Answer:
            until = 60 if request.alias == "r0" else 5
            return ACTIVE if request.at < until else ENDED

        simulation = simulate(server)
        simulation.list_answer = lambda _: server_error()
        report = simulation.stop(30, verify=True)

        assert report.counts == {STOPPED: 30}
        # After three, the next would be due some seconds later.
        assert len(simulation.lists) == 3

    def test_each_is_got_at_once_after_a_list_that_hangs(
        self, simulate: Simulate
    ) -> None:
        """Fault: nobody was asked, and all of them had ended."""
        simulation = simulate(active_until(3))
        simulation.before_response = lambda request: (
            None if request.alias else asyncio.sleep(60)
        )
        report = simulation.stop(30, verify=10.0)

        assert report.counts == {STOPPED: 30}
        assert simulation.seconds < 15

    def test_each_is_got_at_once_if_its_time_is_up_when_a_list_fails(
        self, simulate: Simulate
    ) -> None:
        """Fault: another list was tried before."""
        simulation = simulate(active_until(2))
        simulation.before_response = lambda request: asyncio.sleep(
            0.0 if request.alias else 1.0
        )
        simulation.list_answer = lambda _: server_error()
        report = simulation.stop(30, verify=2.0)

        assert report.counts == {STOPPED: 30}
        assert simulation.lists[-1].at < simulation.stops[-1].at + 2.2

    @pytest.mark.parametrize("retry_after", [None, 200.0, 400.0])
    def test_each_is_got_if_the_lists_alone_are_throttled(
        self, simulate: Simulate, retry_after: float | None
    ) -> None:
        """Faults: the first GET came after five minutes, or none after 400 s."""
        simulation = simulate(active_until(3))
        simulation.list_answer = lambda _: throttled(retry_after)
        report = simulation.stop(30, verify=True)

        assert report.counts == {STOPPED: 30}
        assert simulation.seconds < 20

    @pytest.mark.parametrize(
        "item",
        [
            [],
            [replace(ENDED, alias="r0"), replace(ACTIVE, alias="r0")],
            [BctrlResponseError("unreadable", status=200, alias="r0")],
        ],
        ids=["missing", "twice", "unreadable"],
    )
    def test_a_runtime_is_got_if_the_list_does_not_tell_of_it(
        self, simulate: Simulate, item: RuntimeList
    ) -> None:
        simulation = simulate(active_until(8))
        others = [replace(ENDED, alias=f"r{number}") for number in range(1, 30)]
        simulation.list_answer = listed(*item, *others)
        report = simulation.stop(30, verify=True)

        assert report.counts == {STOPPED: 30}
        got = {request.alias for request in simulation.reads if request.alias}
        assert got == {"r0"}

    def test_each_is_got_if_the_list_has_mostly_others(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(active_until(20))
        simulation.list_answer = listed(
            *[replace(ENDED, alias=f"other-{number}") for number in range(401)],
            *[replace(ACTIVE, alias=f"r{number}") for number in range(20)],
        )
        report = simulation.stop(20, verify=True)

        assert report.counts == {STOPPED: 20}
        assert len(simulation.lists) == 1

    def test_an_outage_costs_no_get_for_each(self, simulate: Simulate) -> None:
        def server(request: Request) -> Answer:
            return disconnected() if 2 <= request.at < 60 else active_until(30)(request)

        simulation = simulate(server)
        report = simulation.stop(1000, verify=True)

        assert report.counts == {STOPPED: 1000}
        assert len(simulation.reads) < 100


class TestSchedule:
    """Faults: found by reading, before they were met."""

    def test_a_poll_has_one_time_however_often_its_workspace_is_listed(self) -> None:
        polls = Polls(RetryPolicy(), 120.0)
        target = RuntimeRef("ws-1", "r0")
        for _ in range(10):
            polls.add(outcome_of(target, ACTIVE), 0.0, None, 0.0, History())
        workspace = polls.take(10.0)
        assert isinstance(workspace, Workspace)
        workspace.list_size = 1000
        polls.end_list(workspace, 10.0)

        due = []
        while (job := polls.take(20.0)) is not None:
            due.append(job)
        assert len(due) == len(set(map(id, due))) == 10
        assert polls.take(math.inf) is None

    def test_a_workspace_is_listed_once_the_time_of_a_poll_is_up(self) -> None:
        """Fault: its next list was as late as between any two."""
        polls = Polls(RetryPolicy(), 3.0)
        for number in range(20):
            target = RuntimeRef("ws-1", f"r{number}")
            polls.add(outcome_of(target, ACTIVE), 0.0, None, number / 100, History())
        workspace = polls.take(2.0)
        assert isinstance(workspace, Workspace)
        workspace.on_list(20)
        workspace.lists = 10

        polls.end_list(workspace, 2.0)
        assert polls.next_at == 3.0
        assert polls.take(3.0) is workspace

        polls.end_list(workspace, 3.0)
        assert polls.next_at == 3.5

    def test_the_end_of_a_run_takes_each_poll_once(self) -> None:
        polls = Polls(RetryPolicy(), 120.0)
        for number in range(10):
            target = RuntimeRef("ws-1", f"r{number}")
            polls.add(outcome_of(target, ACTIVE), 0.0, None, 0.0, History())
        workspace = polls.take(10.0)
        assert isinstance(workspace, Workspace)
        for poll in workspace.polls:
            polls.get(poll)
        got = polls.take(10.0)
        assert isinstance(got, Poll)
        polls.end()
        polls.on_answer(got, outcome_of(got.outcome.target, ENDED), 10.0)

        assert not got.outcome.ok
        ends = [polls.take(10.0) for _ in range(10)]
        assert len(set(map(id, ends))) == 10
        assert polls.take(10.0) is None

    def test_a_workspace_is_not_listed_while_each_of_its_runtimes_is_got(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda request: ACTIVE if request.stops else ENDED)
        simulation.list_answer = listed()
        simulation.before_response = lambda request: asyncio.sleep(
            20.0 if request.alias and not request.stops else 0.0
        )
        assert simulation.stop(20, verify=True).counts == {STOPPED: 20}
        assert len(simulation.lists) == 1

    def test_an_end_while_a_list_is_read_leaves_each_one_outcome(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bctrl_async.bulk._poller._SLICE", 1)
        simulation = simulate(lambda _: ACTIVE)
        aborts: list[asyncio.Task[None]] = []

        async def main(session: BctrlSession) -> StopReport:
            async def abort() -> None:
                await asyncio.sleep(0.1)
                for _ in range(60):
                    await asyncio.sleep(0)
                batch.abort()

            def answer(_: Request) -> None:
                aborts.append(asyncio.create_task(abort()))

            simulation.list_answer = answer
            batch = session.stop_runtimes(targets(50))
            return await batch

        report = simulation.run(main)
        assert report.counts == {ACCEPTED: 50}
        assert len(aborts) == 1


class TestThrottled:
    """Faults: an unanswered poll counted as a look, so what had ended still ran."""

    @pytest.mark.parametrize("refuse", [throttled, unavailable], ids=["429", "503"])
    @pytest.mark.parametrize(("count", "per_second"), [(400, 10), (3000, 50)])
    def test_what_has_ended_is_not_running_for_want_of_a_poll(
        self,
        simulate: Simulate,
        count: int,
        per_second: float,
        refuse: Callable[[], BctrlError],
    ) -> None:
        limit = token_bucket(lambda _: per_second, per_second)
        asked: dict[tuple[str, str], float] = {}

        def server(request: Request) -> Answer:
            if limit(request.at) is not None:
                return refuse()
            target = request.workspace, request.alias
            if request.stops:
                asked.setdefault(target, request.at)
            return ACTIVE if request.at < asked[target] + 3 else ENDED

        simulation = simulate(server)
        report = simulation.stop(
            # Nine in each workspace are got one by one.
            [(f"ws-{number // 9}", f"r{number}") for number in range(count)],
            verify=30.0,
            deadline=3600,
        )

        assert report.counts == {STOPPED: count}

    @pytest.mark.parametrize("is_got", [True, False], ids=["GET", "list"])
    @pytest.mark.parametrize("connections", [10, 100])
    def test_a_throttled_workspace_holds_up_no_other(
        self, simulate: Simulate, connections: int, *, is_got: bool
    ) -> None:
        """Fault: each of its polls kept a poller for its patience."""
        ended = active_until(3)

        def server(request: Request) -> Answer:
            if request.stops or request.workspace == "healthy":
                return ended(request)
            return throttled(60.0)

        simulation = simulate(server)
        busy = [f"busy-{number}" for number in range(5)]
        count = 9 if is_got else 30
        report = simulation.stop(
            [
                (workspace, f"{workspace}/{number}")
                for workspace in [*busy, "healthy"]
                for number in range(count)
            ],
            verify=60.0,
            deadline=600,
            max_connections=connections,
        )

        assert report.counts == {STOPPED: count, ACCEPTED: 5 * count}
        last_stop = simulation.stops[-1].at
        for number in range(count):
            assert simulation.ended_at[f"healthy/{number}"] < last_stop + 10

    def test_dead_runtimes_slow_down_their_workspace_once(
        self, simulate: Simulate
    ) -> None:
        """Fault: polls counted as first attempts, and held up the others for 25 s."""
        gone = dead(*range(20), fail=partial(unavailable, retry_after=600.0))
        simulation = simulate(gone, 0.01)
        report = simulation.stop(120, verify=True, max_connections=100)

        assert report.counts == {STOPPED: 100, StopResult.UNKNOWN: 20}
        assert simulation.stops[-1].at < 10

    def test_nobody_knows_if_what_is_throttled_for_ever_runs(
        self, simulate: Simulate
    ) -> None:
        def server(request: Request) -> Answer:
            return ACTIVE if request.stops else throttled()

        report = simulate(server).stop(30, verify=5.0, deadline=60)

        assert report.counts == {ACCEPTED: 30}
        assert report.running == report.not_running == 0
        assert "no poll was answered" in str(report.failures[0].error)
