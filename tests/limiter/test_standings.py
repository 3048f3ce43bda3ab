"""Whom a limit for all holds: a workspace that is answered passes it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from support.simulated import ANSWER, Answer, Request, Simulate
from support.throttling import past_start, release, show_limit, throttled
from support.virtual_time import in_virtual_time, now

from bctrl_async import BctrlError, BctrlRateLimitError, BctrlServerError, BctrlSession
from bctrl_async._kinds import Failure
from bctrl_async._limiter.bounds import FixedRate
from bctrl_async._limiter.evidence import History
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.standings import Standing, Standings

HEALTHY = "ws-healthy"
OTHERS = [f"ws-{number}" for number in range(8)]
UNAVAILABLE = BctrlServerError("503", status=503, may_have_stopped=True)


def standings_under_limit() -> Standings:
    """Make the standings under a limit that has refused every first attempt so far."""
    rate = past_start()
    for workspace in OTHERS:
        rate.on_throttled(0.0, None, History(workspace=workspace))
    assert rate.refuses_first
    return Standings(rate)


def throttle(standings: Standings, *workspaces: str, is_first: bool = True) -> None:
    for workspace in workspaces:
        standings.on_throttled(workspace, is_first=is_first)


def answer(standings: Standings, workspace: str, *, is_first: bool = True) -> None:
    standings.on_success(workspace, 1.0, is_first=is_first)


class TestStandings:
    def test_a_workspace_that_alone_is_answered_is_exempt(self) -> None:
        standings = standings_under_limit()
        met = []
        for _ in range(3):
            throttle(standings, *OTHERS)
            answer(standings, HEALTHY)
            met.append(standings.of(HEALTHY, 1.0))
        assert met == [Standing.ANSWERED, Standing.EXEMPT, Standing.EXEMPT]
        assert standings.of(OTHERS[0], 1.0) is Standing.HELD
        assert standings.of("ws-new", 1.0) is Standing.UNKNOWN

    def test_one_answer_exempts_nobody(self) -> None:
        standings = standings_under_limit()
        throttle(standings, *OTHERS * 100)
        answer(standings, HEALTHY)
        assert standings.of(HEALTHY, 1.0) is Standing.ANSWERED

    def test_a_throttled_response_ends_an_exemption(self) -> None:
        standings = standings_under_limit()
        for workspace in OTHERS * 3:
            throttle(standings, workspace)
            answer(standings, HEALTHY)
        assert standings.exempts(HEALTHY)
        throttle(standings, HEALTHY, is_first=False)
        assert standings.of(HEALTHY, 1.0) is Standing.HELD
        answer(standings, HEALTHY)
        assert standings.of(HEALTHY, 1.0) is Standing.ANSWERED

    def test_answers_after_an_outage_prove_nothing(self) -> None:
        standings = standings_under_limit()
        throttle(standings, *OTHERS * 10)
        for workspace in OTHERS * 10:
            answer(standings, workspace)
        assert {standings.of(workspace, 1.0) for workspace in OTHERS} == {
            Standing.ANSWERED
        }

    def test_throttled_retries_prove_nothing_about_others(self) -> None:
        """A target that is throttled for ever has any number of retries."""
        standings = standings_under_limit()
        for _ in range(100):
            throttle(standings, OTHERS[0], is_first=False)
            answer(standings, HEALTHY)
        assert standings.of(HEALTHY, 1.0) is Standing.ANSWERED

    def test_retries_that_are_answered_prove_nothing(self) -> None:
        standings = standings_under_limit()
        for _ in range(10):
            throttle(standings, *OTHERS)
            answer(standings, HEALTHY, is_first=False)
        assert standings.of(HEALTHY, 1.0) is Standing.UNKNOWN

    @pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
    def test_few_are_exempt_where_all_are_throttled_alike(self, share: float) -> None:
        chance = random.Random(share)
        standings = standings_under_limit()
        met: Counter[bool] = Counter()
        for _ in range(10_000):
            workspace = f"ws-{chance.randrange(20)}"
            if chance.random() < share:
                throttle(standings, workspace)
            else:
                answer(standings, workspace)
            met[standings.exempts(workspace)] += 1
        assert met[True] < 0.05 * met.total()

    def test_nobody_queues_by_a_standing_where_first_attempts_succeed(self) -> None:
        """They would take turns, and each workspace has the same share without."""
        rate = past_start()
        standings = Standings(rate)
        for workspace in OTHERS:
            rate.on_throttled(0.0, None, History(workspace=workspace))
            throttle(standings, workspace)
        answer(standings, HEALTHY)
        rate.on_success(1.0, History(workspace=HEALTHY))
        met = {standings.of(workspace, 1.0) for workspace in [*OTHERS, HEALTHY]}
        assert met == {Standing.HELD}

    def test_nobody_is_exempt_where_there_is_no_limit(self) -> None:
        standings = Standings(past_start())
        for _ in range(3):
            throttle(standings, *OTHERS)
            answer(standings, HEALTHY)
        assert not standings.exempts(HEALTHY)

    def test_the_least_recent_workspace_is_forgotten(self) -> None:
        standings = standings_under_limit()
        throttle(standings, *(f"ws-{number}" for number in range(1001)))
        assert standings.of("ws-0", 1.0) is Standing.UNKNOWN
        assert standings.of("ws-1", 1.0) is Standing.HELD


async def use(limiter: Limiter, workspace: str, response: object) -> float:
    """Make an attempt that takes no time; return the seconds for which it waited."""
    began = now()
    history = History(workspace=workspace)
    await limiter.acquire(3600.0, history=history)
    release(limiter, response, history)
    return now() - began


async def exempt(limiter: Limiter, workspace: str = HEALTHY) -> None:
    """Let others be throttled, and a workspace be answered in between."""
    show_limit(limiter, None, *OTHERS)
    for _ in range(3):
        show_limit(limiter, None, *OTHERS)
        limiter._on_success(History(workspace=workspace))


Queued = asyncio.Task[float]


class Busy:
    """A limiter whose only connection is in use, by a call in a workspace."""

    def __init__(self) -> None:
        self.limiter = Limiter(1, past_start())
        self.history = History()
        self.ended: list[str] = []
        """The workspaces of the calls that have ended, in order."""

    async def occupy(self, workspace: str) -> None:
        """Exempt the healthy workspace, and let a call in this one have the slot."""
        await exempt(self.limiter)
        self.history.workspace = workspace
        await self.limiter.acquire(3600.0, history=self.history)

    async def queue(self, workspace: str, response: object = ANSWER) -> Queued:
        """Let another call wait for the slot."""
        task = asyncio.create_task(use(self.limiter, workspace, response))
        task.add_done_callback(lambda _: self.ended.append(workspace))
        await asyncio.sleep(0)
        return task

    def release(self, response: object) -> None:
        """Let the call that has the slot be answered."""
        release(self.limiter, response, self.history)


@in_virtual_time
class TestGate:
    async def test_those_who_wait_leave_once_their_workspace_is_exempt(self) -> None:
        limiter = Limiter(10, past_start())
        show_limit(limiter, 30.0, *OTHERS)
        limiter._on_failure(Failure.of(throttled()), History(workspace=HEALTHY))
        waits = [asyncio.create_task(use(limiter, HEALTHY, ANSWER)) for _ in range(5)]
        held = asyncio.create_task(use(limiter, OTHERS[0], ANSWER))
        await asyncio.sleep(1.0)
        assert limiter.waiting == 6
        await exempt(limiter)
        assert await asyncio.gather(*waits) == [1.0] * 5
        assert await use(limiter, HEALTHY, ANSWER) == 0.0
        assert not held.done()
        assert await held == pytest.approx(30.0, abs=0.1)

    async def test_those_who_wait_join_the_others_if_the_limit_holds_them_again(
        self,
    ) -> None:
        busy = Busy()
        await busy.occupy(HEALTHY)
        waits = await busy.queue(HEALTHY)
        show_limit(busy.limiter, 5.0, HEALTHY)
        busy.release(throttled(5.0))
        assert await waits >= 0.45

    async def test_a_limit_that_is_shown_anew_does_not_hold_the_exempt(self) -> None:
        busy = Busy()
        await busy.occupy("ws-other")
        busy.limiter._all.rate._lift_limit()
        waits = await busy.queue(HEALTHY)
        # The lanes of those that were throttled before explain their responses.
        show_limit(busy.limiter, 30.0, *(f"ws-more-{number}" for number in range(8)))
        assert busy.limiter._all.rate.has_limit
        busy.limiter.release(None, busy.history)
        assert await waits == 0.0

    async def test_a_retry_after_of_others_does_not_fail_the_exempt(self) -> None:
        """Fault: a call with a patience of a minute failed, and was not held."""
        busy = Busy()
        await busy.occupy("ws-other")
        history = History(workspace=HEALTHY)
        waits = asyncio.create_task(busy.limiter.acquire(60.0, history=history))
        await asyncio.sleep(0)
        busy.release(throttled(600.0))
        await waits
        busy.limiter.release(None, history)
        with pytest.raises(BctrlRateLimitError):
            await busy.limiter.acquire(60.0, history=History(workspace=OTHERS[0]))

    async def test_the_rate_of_the_caller_holds_the_exempt(self) -> None:
        limiter = Limiter(10, past_start(), FixedRate(1.0))
        await exempt(limiter)
        waits = [await use(limiter, HEALTHY, ANSWER) for _ in range(4)]
        assert sum(waits) == pytest.approx(3.0, abs=0.05)

    async def test_the_exempt_pass_when_the_limit_is_lifted(self) -> None:
        """They have waited for the connection, and the others for the limit, too."""
        busy = Busy()
        await busy.occupy(HEALTHY)
        tasks = [await busy.queue(workspace) for workspace in (OTHERS[0], HEALTHY)]
        busy.limiter._all.rate._lift_limit()
        busy.limiter.release(None, busy.history)
        assert await asyncio.gather(*tasks) == [0.0, 0.0]
        assert busy.ended == [HEALTHY, OTHERS[0]]

    async def test_answers_of_the_exempt_do_not_raise_the_limit(self) -> None:
        limiter = Limiter(10, past_start())
        await exempt(limiter)
        answers = limiter._all.rate.answers
        count = answers.count
        for _ in range(100):
            assert await use(limiter, HEALTHY, ANSWER) == 0.0
        assert answers.count == count

    async def test_those_who_were_answered_take_turns_once_nobody_is(self) -> None:
        """Fault: a healthy workspace waited behind its tenants for minutes."""
        limiter = Limiter(100, past_start())
        show_limit(limiter, None, *OTHERS)
        limiter._on_success(History(workspace=HEALTHY))
        tenants = [
            asyncio.create_task(use(limiter, f"ws-tenant-{number}", throttled()))
            for number in range(60)
        ]
        await asyncio.sleep(0)
        assert await use(limiter, HEALTHY, ANSWER) < 10.0
        assert not all(tenant.done() for tenant in tenants)
        await asyncio.gather(*tenants)

    @pytest.mark.parametrize("error", [throttled(20.0), UNAVAILABLE])
    async def test_one_dead_target_ends_no_exemption(self, error: BctrlError) -> None:
        """Fault: with a dead target, a healthy workspace waited for half a minute."""
        limiter = Limiter(10, past_start())
        await exempt(limiter)
        for _ in range(10):
            history = History(workspace=HEALTHY)
            for _ in range(5):
                limiter._on_failure(Failure.of(error), history)
                history.wait_from(now())
            limiter._on_success(History(workspace=HEALTHY))
            limiter._on_success(History(workspace=HEALTHY))
        assert limiter._standings.exempts(HEALTHY)

    async def test_an_exemption_ends_if_first_attempts_are_throttled_again(
        self,
    ) -> None:
        limiter = Limiter(10, past_start())
        await exempt(limiter)
        met = []
        for _ in range(2):
            limiter._on_failure(Failure.of(throttled()), History(workspace=HEALTHY))
            met.append(limiter._standings.exempts(HEALTHY))
        assert met == [True, False]

    async def test_a_retry_after_of_all_holds_only_those_that_were_throttled(
        self,
    ) -> None:
        """Fault: the calls of healthy workspaces waited for those over their quota."""
        limiter = Limiter(10, past_start())
        limiter._on_failure(Failure.of(throttled()), History(workspace="ws-other"))
        limiter._on_success(History(workspace=HEALTHY))
        show_limit(limiter, 600.0, *OTHERS)
        assert limiter.retry_after_of_all(OTHERS[0]) == pytest.approx(600.0)
        for workspace in ("ws-new", HEALTHY):
            assert limiter.retry_after_of_all(workspace) == 0.0
            assert await use(limiter, workspace, ANSWER) < 1.0
        with pytest.raises(BctrlRateLimitError):
            await limiter.acquire(60.0, history=History(workspace=OTHERS[0]))

    async def test_a_workspace_asks_once_whether_a_retry_after_is_for_it(self) -> None:
        """The calls that wait with the first do not pass the Retry-After, too."""
        limiter = Limiter(10, past_start())
        show_limit(limiter, 30.0, *OTHERS)
        began = now()
        first = asyncio.create_task(use(limiter, "ws-new", throttled(30.0)))
        await asyncio.sleep(0)
        waits = [use(limiter, "ws-new", ANSWER) for _ in range(5)]
        assert min(await asyncio.gather(*waits)) > 29.0
        assert await first < 1.0
        assert now() - began < 32.0

    async def test_a_call_that_waits_no_more_holds_up_no_other(self) -> None:
        busy = Busy()
        await busy.occupy(HEALTHY)
        cancelled = await busy.queue(HEALTHY)
        cancelled.cancel()
        waits = await busy.queue(HEALTHY)
        busy.limiter.release(None, busy.history)
        assert await waits == 0.0
        assert busy.limiter.acquire_nowait() is False
        assert await use(busy.limiter, HEALTHY, ANSWER) == 0.0

    async def test_a_second_503_is_of_its_target_if_the_exempt_are_answered(
        self,
    ) -> None:
        limiter = Limiter(10, past_start())
        await exempt(limiter)
        failure = Failure.of(UNAVAILABLE)
        history = History(workspace=OTHERS[0])
        await asyncio.sleep(1.0)
        history.wait_from(now())
        assert not limiter._on_failure(failure, history)
        await asyncio.sleep(1.0)
        limiter._on_success(History(workspace=HEALTHY))
        assert limiter.answers_others(now())
        assert limiter._on_failure(failure, history)


async def call_at(
    session: BctrlSession, workspace: str, alias: str, at: float
) -> tuple[str, float, bool]:
    """Make a single call at a time; return how long it took, and whether it failed."""
    await asyncio.sleep(at)
    try:
        await session.stop_runtime(workspace, alias)
    except BctrlRateLimitError:
        return workspace, now() - at, True
    return workspace, now() - at, False


@pytest.mark.parametrize("count", [40, 150])
@pytest.mark.parametrize("retry_after", [None, 20.0])
def test_a_healthy_workspace_waits_for_no_tenants(
    simulate: Simulate, retry_after: float | None, count: int
) -> None:
    """Fault: forty throttled tenants let a healthy workspace wait for minutes."""
    tenants = [f"ws-{number}" for number in range(count)]

    def serve(request: Request) -> Answer:
        return ANSWER if request.workspace == HEALTHY else throttled(retry_after)

    async def main(session: BctrlSession) -> list[tuple[str, float, bool]]:
        chance = random.Random(0)
        calls = [
            (chance.uniform(0.0, 120.0), chance.choice(tenants)) for _ in range(480)
        ]
        calls += [(float(second), HEALTHY) for second in range(1, 120)]
        return await asyncio.gather(
            *(
                call_at(session, workspace, f"r{number}", at)
                for number, (at, workspace) in enumerate(calls)
            )
        )

    calls = simulate(serve, 0.02).run(main)
    waits = sorted(seconds for workspace, seconds, _ in calls if workspace == HEALTHY)
    assert len(waits) == 119
    assert waits[int(0.95 * len(waits))] < 1.0
    # All calls under the limit were throttled for as long as they are patient.
    assert all(failed is (workspace != HEALTHY) for workspace, _, failed in calls)


def test_retries_are_sent_where_first_attempts_are_refused(
    simulate: Simulate,
) -> None:
    """Fault: a server that refuses each workspace once was asked for eleven minutes."""
    received: Counter[str] = Counter()

    def serve(request: Request) -> Answer:
        received[request.workspace] += 1
        return throttled() if received[request.workspace] == 1 else ANSWER

    targets = [(f"ws-{number % 400}", f"r{number}") for number in range(1200)]
    simulation = simulate(serve, 0.02)
    report = simulation.stop(targets, deadline=7200.0)
    assert report.ok
    assert simulation.seconds < 120.0
