"""The lanes: a throttled workspace slows down alone, in virtual time."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from support import virtual_time
from support.helpers import await_batch
from support.simulated import ANSWER, Request, Simulate, targets_in, with_quotas
from support.throttling import (
    fixed_window,
    past_start,
    release,
    show_limit,
    throttled,
    token_bucket,
)
from support.virtual_time import in_virtual_time, now

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlRateLimitError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    StopReport,
    StopResult,
)
from bctrl_async._kinds import Failure
from bctrl_async._limiter.evidence import History
from bctrl_async._limiter.limiter import _MAX_LANES, Limiter, RecalledError
from bctrl_async._limiter.queues import Priority, Waiter

STOPPED, NOT_SENT, REJECTED = (
    StopResult.STOPPED,
    StopResult.NOT_SENT,
    StopResult.REJECTED,
)
LATENCY = 0.02
OVER_QUOTA, ALLOWED = "ws-over", "ws-allowed"


def throttling(
    workspace: str, retry_after: float | None = None, until: float = float("inf")
) -> Callable[[Request], Runtime | BctrlError]:
    """Make a server that throttles a workspace until a time."""
    return lambda request: (
        throttled(retry_after)
        if request.workspace == workspace and request.at < until
        else ANSWER
    )


async def stop_each(
    session: BctrlSession,
    targets: list[tuple[str, str]],
    policy: RetryPolicy | None = None,
) -> list[Runtime | BaseException]:
    """Stop all at once, by single calls."""
    stops = (session.stop_runtime(*target, retry=policy) for target in targets)
    return await asyncio.gather(*stops, return_exceptions=True)


async def stop_in_bulk(
    session: BctrlSession, targets: list[tuple[str, str]]
) -> StopReport:
    return await session.stop_runtimes(targets, verify=False)


async def seconds_of_calls(session: BctrlSession, count: int) -> list[float]:
    """Return what each of these single calls takes, one after the other."""
    seconds = []
    for target in targets_in(ALLOWED, count):
        start = now()
        await session.stop_runtime(*target)
        seconds.append(now() - start)
    return seconds


async def use(limiter: Limiter, workspace: str, answer: object) -> None:
    history = History(workspace=workspace)
    await limiter.acquire(60.0, history=history)
    release(limiter, answer, history)


class TestOthers:
    """Fault: in a service, a tenant over its quota made all others wait for minutes."""

    def test_single_calls_in_other_workspaces_wait_for_nothing(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(throttling(OVER_QUOTA), LATENCY)

        async def main(session: BctrlSession) -> list[float]:
            over_quota = asyncio.create_task(
                stop_each(
                    session, targets_in(OVER_QUOTA, 50), RetryPolicy(patience=10.0)
                )
            )
            # The start of a session is paced.
            await asyncio.sleep(1.0)
            seconds = await seconds_of_calls(session, 200)
            assert not over_quota.done()
            assert {type(end) for end in await over_quota} == {BctrlRateLimitError}
            return seconds

        assert max(simulation.run(main)) == pytest.approx(LATENCY)

    def test_a_bulk_stop_ends_with_the_throttled_workspace_alone(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(throttling(OVER_QUOTA), LATENCY)
        report = simulation.stop(
            targets_in(OVER_QUOTA, 300) + targets_in(ALLOWED, 1000),
            concurrency=10,
            retry=RetryPolicy(patience=20.0),
        )
        ended_at = simulation.ended_at
        assert report.counts[STOPPED] == 1000
        # All ten workers stop 500 in a second.
        assert max(ended_at[alias] for _, alias in targets_in(ALLOWED, 1000)) < 3.5
        assert min(ended_at[alias] for _, alias in targets_in(OVER_QUOTA, 300)) > 10.0


class TestQuotas:
    @pytest.mark.parametrize("is_sorted", [True, False])
    def test_each_workspace_is_paced_by_its_own(
        self, simulate: Simulate, *, is_sorted: bool
    ) -> None:
        """Faults: all had the slowest rate; a sorted list used them in turn."""
        simulation = simulate(with_quotas(20.0, 10), LATENCY)
        targets = [
            target for number in range(6) for target in targets_in(f"ws-{number}", 200)
        ]
        if not is_sorted:
            random.Random(0).shuffle(targets)
        report = simulation.stop(targets)

        assert report.counts == {STOPPED: 1200}
        # Each quota allows its targets in 9.5 s.
        assert simulation.seconds < 1.3 * 9.5
        assert len(simulation.requests) < 1.3 * 1200

    def test_single_calls_that_wait_are_sent_once_and_in_their_order(
        self, simulate: Simulate
    ) -> None:
        """Fault: each that waited at the first throttled answers was sent in vain."""
        simulation = simulate(with_quotas(50.0, 20), LATENCY)
        targets = targets_in("ws-1", 2000)
        ends = simulation.run(lambda session: stop_each(session, targets))

        assert all(isinstance(end, Runtime) for end in ends)
        assert simulation.seconds < 1.1 * 2000 / 50
        assert len(simulation.requests) < 1.05 * 2000
        firsts = [
            request.alias for request in simulation.requests if request.number == 1
        ]
        assert firsts == [alias for _, alias in targets]

    def test_a_small_one_by_the_minute_is_not_flooded_by_retries(
        self, simulate: Simulate
    ) -> None:
        """Fault: 55 requests were sent for each target, and one in nine given up."""
        serve = fixed_window(20, 60.0)
        simulation = simulate(lambda request: serve(request.at) or ANSWER, LATENCY)
        report = simulation.stop(targets_in("ws-1", 180), concurrency=20)

        assert report.counts == {STOPPED: 180}
        assert len(simulation.requests) < 10 * 180


@in_virtual_time
class TestLimitForAll:
    def test_several_workspaces_show_it_and_it_takes_the_place_of_theirs(
        self, simulate: Simulate, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "bctrl_async")
        serve = token_bucket(lambda _: 100.0, 20)
        simulation = simulate(lambda request: serve(request.at) or ANSWER, LATENCY)
        targets = [(f"ws-{number % 20}", f"r{number}") for number in range(1000)]
        report = simulation.stop(targets)

        assert report.counts == {STOPPED: 1000}
        assert simulation.seconds < 1.2 * 9.8
        lines = [record.getMessage() for record in caplog.records]
        assert any("the calls of the session slow down" in line for line in lines)

    async def test_it_lifts_their_limits(self) -> None:
        limiter = Limiter(10, past_start())
        show_limit(limiter, 30.0, "ws-1")
        for number in range(2, 9):
            limiter._on_failure(
                Failure.of(throttled()), History(workspace=f"ws-{number}")
            )
        # Lanes in which no call waits are forgotten.
        assert not limiter.has_lane("ws-1")
        await use(limiter, "ws-1", ANSWER)
        assert now() == pytest.approx(0.5)

    async def test_a_call_that_waits_without_a_task_passes_its_lane_again(self) -> None:
        """Fault: a whole lane was let through, and its next limit held none of them."""
        limiter = Limiter(10, past_start())
        show_limit(limiter, 30.0, "ws-1")
        history = History(workspace="ws-1")
        waiter = limiter.enqueue(60.0, Priority.BULK, history)
        assert waiter is not None
        single = asyncio.create_task(use(limiter, "ws-1", ANSWER))
        await asyncio.sleep(0)
        for number in range(2, 9):
            limiter._on_failure(
                Failure.of(throttled()), History(workspace=f"ws-{number}")
            )

        assert waiter.admitted.done()
        limiter.enter_lane(waiter)
        assert history.lane is None
        await single
        assert now() == pytest.approx(0.5)

    async def test_a_sleep_that_is_cancelled_as_it_ends_is_cancelled(self) -> None:
        limiter = Limiter(10, past_start())
        sleeper = limiter.start_sleep(0.0)
        asyncio.get_running_loop().call_soon(sleeper.cancel)
        await asyncio.sleep(0.01)
        assert sleeper.cancelled()

    async def test_what_lanes_explain_shows_none(self) -> None:
        """Fault: quotas in a sorted list took ten times as long."""
        limiter = Limiter(10, past_start())
        workspaces = [f"ws-{number}" for number in range(8)]
        for workspace in workspaces:
            show_limit(limiter, 30.0, workspace)
            for _ in range(2):
                limiter._on_success(History(workspace=ALLOWED))
        show_limit(limiter, 30.0, *workspaces)
        assert not limiter._all.rate.has_limit

    async def test_quotas_of_several_workspaces_show_none(self) -> None:
        """Fault: ten workspaces over their quotas held up all others."""
        limiter = Limiter(10, past_start())
        for number in range(10):
            # What a success makes up for shows no limit for all.
            show_limit(limiter, 30.0, f"ws-{number}")
            for _ in range(8):
                await use(limiter, ALLOWED, ANSWER)
        await use(limiter, ALLOWED, ANSWER)
        assert now() == 0.0
        await use(limiter, "ws-9", ANSWER)
        assert now() == pytest.approx(30.0)


class TestRetryAfter:
    def test_it_holds_its_workspace_alone(self, simulate: Simulate) -> None:
        simulation = simulate(throttling(OVER_QUOTA, 30.0, until=1.0), LATENCY)

        async def main(session: BctrlSession) -> list[float]:
            held = asyncio.create_task(stop_each(session, targets_in(OVER_QUOTA, 20)))
            await asyncio.sleep(0.5)
            later = asyncio.create_task(
                stop_each(session, targets_in(OVER_QUOTA, 20)[:1])
            )
            seconds = await seconds_of_calls(session, 100)
            assert now() < 3.0
            for calls in (held, later):
                assert {type(end) for end in await calls} == {type(ANSWER)}
                assert 30.0 < now() < 33.0
            return seconds

        assert max(simulation.run(main)) == pytest.approx(LATENCY)

    def test_one_above_the_patience_fails_calls_of_its_workspace_alone(
        self, simulate: Simulate
    ) -> None:
        """Fault: a gateway's 600 s for six dead targets ended a run of a thousand."""
        simulation = simulate(throttling(OVER_QUOTA, 600.0), LATENCY)

        async def main(session: BctrlSession) -> None:
            sent = await stop_each(session, targets_in(OVER_QUOTA, 8))
            assert {type(end) for end in sent} == {BctrlRateLimitError}
            with pytest.raises(
                BctrlRateLimitError, match="not sent: rate limited for another 600 s"
            ):
                await session.stop_runtime(OVER_QUOTA, "other")
            assert max(await seconds_of_calls(session, 100)) < 2 * LATENCY
            report = await stop_in_bulk(
                session, targets_in(OVER_QUOTA, 100) + targets_in(ALLOWED, 100)
            )
            assert report.counts == {NOT_SENT: 100, STOPPED: 100}

        simulation.run(main)
        assert simulation.seconds < 10
        assert len(simulation.requests) == 208


class TestPatience:
    SCOPE = f"the server throttled the calls in workspace {OVER_QUOTA!r} for "

    def test_a_target_that_waits_in_its_lane_fails_with_it(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(throttling(OVER_QUOTA), LATENCY)
        report = simulation.stop(targets_in(OVER_QUOTA, 500) + targets_in(ALLOWED, 100))
        assert report.counts[STOPPED] == 100
        assert report.counts[NOT_SENT] > 100
        errors = [
            outcome.error
            for outcome in simulation.outcomes
            if outcome.result is NOT_SENT
        ]
        assert all(
            error is not None and self.SCOPE + "5m" in str(error) for error in errors
        )
        assert 300 < simulation.seconds < 330

    def test_single_calls_that_wait_in_their_lane_fail_with_it(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(throttling(OVER_QUOTA), LATENCY)

        async def main(session: BctrlSession) -> list[Runtime | BaseException]:
            calls = asyncio.create_task(stop_each(session, targets_in(OVER_QUOTA, 500)))
            await seconds_of_calls(session, 100)
            return await calls

        ends = simulation.run(main)
        assert {type(end) for end in ends} == {BctrlRateLimitError}
        assert sum(self.SCOPE + "1m" in str(end) for end in ends) > 100
        assert 60 < simulation.seconds < 75


class TestClose:
    def test_it_fails_those_that_wait_in_lanes(self, simulate: Simulate) -> None:
        simulation = simulate(throttling(OVER_QUOTA, 30.0), LATENCY)

        async def main(session: BctrlSession) -> None:
            calls = asyncio.create_task(stop_each(session, targets_in(OVER_QUOTA, 20)))
            bulk = asyncio.create_task(
                stop_in_bulk(session, targets_in(OVER_QUOTA, 20))
            )
            await asyncio.sleep(1.0)
            later = asyncio.create_task(stop_each(session, targets_in(OVER_QUOTA, 20)))
            await asyncio.sleep(0.0)
            await session.close()
            assert {type(end) for end in await later} == {BctrlConfigError}
            assert {type(end) for end in await calls} <= {
                BctrlConfigError,
                BctrlRateLimitError,
            }
            assert not (await bulk).ok
            assert now() == pytest.approx(1.0)

        simulation.run(main)


WORKSPACES = ["ws-1", "ws-2"]
ANSWERS = [ANSWER, throttled(), throttled(retry_after=1.0), None]


class Users:
    """Calls in two workspaces, in tasks or parked, that hold slots until they end."""

    def __init__(self, slots: int) -> None:
        self.limiter = Limiter(slots, past_start())
        self.tasks: list[asyncio.Task[None]] = []
        self.waiters: list[tuple[Waiter, History]] = []
        self.holding: list[asyncio.Future[object]] = []
        self.most_in_use = 0

    def start(self, workspace: str) -> None:
        self._start(History(workspace=workspace), Priority.SINGLE)

    def _start(self, history: History, priority: Priority) -> None:
        task = asyncio.create_task(self._use(history, priority))
        if history.lane is not None:
            # The task may be cancelled before its first step.
            task.add_done_callback(lambda _: self.limiter.leave_lane(history))
        self.tasks.append(task)

    def start_parked(self, workspace: str) -> None:
        """Start a call that waits in its lane, if it has to, without a task."""
        history = History(workspace=workspace)
        waiter = self.limiter.enqueue(60.0, Priority.BULK, history)
        if waiter is not None:
            self.waiters.append((waiter, history))
        else:
            self._start(history, Priority.BULK)

    def cancel(self, number: int) -> None:
        if self.tasks:
            self.tasks[number % len(self.tasks)].cancel()

    def cancel_parked(self, number: int) -> None:
        if self.waiters:
            self.waiters[number % len(self.waiters)][0].admitted.cancel()

    def finish(self, number: int, answer: object) -> None:
        holding = [end for end in self.holding if not end.done()]
        if holding:
            holding[number % len(holding)].set_result(answer)

    def take_parked(self) -> None:
        """Let those go on whose wait without a task is over."""
        for waiter, history in [*self.waiters]:
            if waiter.admitted.done():
                self.waiters.remove((waiter, history))
                with suppress(BctrlRateLimitError):
                    self.limiter.enter_lane(waiter)
                if history.lane is not None:
                    self._start(history, Priority.BULK)

    async def _use(self, history: History, priority: Priority) -> None:
        try:
            await self.limiter.acquire(60.0, priority, history)
        except (RecalledError, BctrlRateLimitError):
            return
        end: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.holding.append(end)
        self.most_in_use = max(self.most_in_use, self.limiter.in_use)
        answer = None
        try:
            answer = await end
        finally:
            self.holding.remove(end)
            release(self.limiter, answer, history)

    async def finish_all(self) -> None:
        """Let every call end; then so many succeed that nothing is throttled."""
        for _ in range(200):
            await asyncio.sleep(1.0)
            self.take_parked()
            for _ in [*self.holding]:
                self.finish(0, ANSWER)
        assert all(task.done() for task in self.tasks)
        assert self.waiters == []
        for workspace in WORKSPACES * 30:
            await use(self.limiter, workspace, ANSWER)
            await asyncio.sleep(1.0)


@in_virtual_time
class TestSlots:
    numbers = st.integers(0, 20)
    steps = st.lists(
        st.one_of(
            st.tuples(st.just("start"), st.sampled_from(WORKSPACES)),
            st.tuples(st.just("start_parked"), st.sampled_from(WORKSPACES)),
            st.tuples(st.just("cancel"), numbers),
            st.tuples(st.just("cancel_parked"), numbers),
            st.tuples(st.just("finish"), numbers, st.sampled_from(ANSWERS)),
            st.tuples(st.just("limit"), st.sampled_from(WORKSPACES)),
            st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        ),
        max_size=60,
    )

    @settings(max_examples=300, deadline=None)
    @given(slots=st.integers(1, 3), steps=steps)
    def test_no_schedule_exceeds_or_loses_them_and_lanes_are_forgotten(
        self, slots: int, steps: list[tuple[Any, ...]]
    ) -> None:
        async def scenario() -> None:
            users = Users(slots)
            for name, *arguments in steps:
                if name == "sleep":
                    await asyncio.sleep(*arguments)
                    users.take_parked()
                elif name == "limit":
                    show_limit(users.limiter, None, *arguments)
                else:
                    getattr(users, name)(*arguments)
            await users.finish_all()

            assert users.most_in_use <= slots
            assert (users.limiter.in_use, users.limiter.waiting) == (0, 0)
            assert users.limiter._lanes == {}
            assert users.limiter.acquire_nowait()

        virtual_time.run(scenario())

    async def test_a_call_that_is_cancelled_as_its_lane_admits_it_leaves_it(
        self,
    ) -> None:
        limiter = Limiter(1, past_start())
        show_limit(limiter, None, "ws-1")
        history = History(workspace="ws-1")
        call = asyncio.create_task(limiter.acquire(60.0, history=history))
        await asyncio.sleep(0.0)
        lane = limiter._lanes["ws-1"]
        in_use: list[int] = []

        def cancel() -> None:
            in_use.append(lane.in_use)
            call.cancel()

        # It comes in the same step of the loop as the wakeup, after it.
        asyncio.get_running_loop().call_at(lane._wakeup_at + 1e-10, cancel)
        await asyncio.wait([call])
        assert in_use == [1]
        assert call.cancelled()
        assert limiter.in_use == lane.in_use == 0

    @pytest.mark.parametrize("is_admitted", [False, True])
    async def test_a_call_that_is_cancelled_after_its_lane_leaves_it(
        self, *, is_admitted: bool
    ) -> None:
        limiter = Limiter(1, past_start())
        await limiter.acquire(60.0)
        show_limit(limiter, None, "ws-1")
        call = asyncio.create_task(
            limiter.acquire(60.0, history=History(workspace="ws-1"))
        )
        await asyncio.sleep(1.0)
        assert limiter._lanes["ws-1"].in_use == 1
        if is_admitted:
            limiter.release(None)
        call.cancel()
        await asyncio.wait([call])
        assert limiter.in_use == (not is_admitted)
        assert limiter._lanes["ws-1"].in_use == limiter.waiting == 0

    async def test_a_call_behind_its_lane_that_has_to_pass_it_again_leaves_it(
        self,
    ) -> None:
        limiter = Limiter(1, past_start())
        await use(limiter, "ws-1", throttled())
        await limiter.acquire(60.0)
        call = asyncio.create_task(use(limiter, "ws-1", ANSWER))
        await asyncio.sleep(1.0)
        lane = limiter._lanes["ws-1"]
        assert lane.in_use == 1
        show_limit(limiter, None, "ws-1")
        assert lane.in_use == 0
        limiter.release(None)
        await call
        assert limiter.in_use == lane.in_use == 0

    async def test_a_target_that_waits_before_its_lane_is_recalled_to_free_its_worker(
        self,
    ) -> None:
        limiter = Limiter(1, past_start())
        await limiter.acquire(60.0)
        history = History(workspace="ws-1", may_park=True)
        call = asyncio.create_task(limiter.acquire(60.0, Priority.BULK, history))
        await asyncio.sleep(0)
        show_limit(limiter, None, "ws-1")
        with pytest.raises(RecalledError):
            await call
        assert limiter.waiting == 0

    @pytest.mark.parametrize("end", ["stop_reading", "abort"])
    def test_a_target_that_its_lane_admits_before_an_end_leaves_it(
        self, simulate: Simulate, end: str
    ) -> None:
        simulation = simulate(throttling(OVER_QUOTA), LATENCY)
        simulation.before_response = lambda request: asyncio.sleep(
            60.0 if request.workspace == ALLOWED else 0.0
        )

        async def main(session: BctrlSession) -> None:
            targets = targets_in(OVER_QUOTA, 30) + targets_in(ALLOWED, 1)
            batch = session.stop_runtimes(targets, concurrency=1, verify=False)
            run = asyncio.create_task(await_batch(batch))
            await asyncio.sleep(30.0)
            getattr(batch, end)()
            await run
            assert [lane.in_use for lane in session._limiter._gates()] == [0, 0]

        simulation.run(main)


@in_virtual_time
class TestMemory:
    async def test_a_thousand_are_kept_and_those_in_which_a_call_waits(self) -> None:
        limiter = Limiter(10, past_start())
        show_limit(limiter, 30.0, OVER_QUOTA)
        waiting = asyncio.create_task(use(limiter, OVER_QUOTA, ANSWER))
        await asyncio.sleep(0)
        for number in range(3 * _MAX_LANES):
            await use(limiter, f"ws-{number}", throttled())
            for _ in range(2):
                await use(limiter, ALLOWED, ANSWER)
        assert len(limiter._lanes) <= _MAX_LANES + 2
        await waiting
        assert now() == pytest.approx(30.0)
