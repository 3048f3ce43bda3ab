"""Whom a limit for all holds: a workspace that is answered passes it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from support.simulated import ANSWER, Answer, Request, Simulate
from support.throttling import past_start, release, show_limit, throttled
from support.virtual_time import in_virtual_time, now

from bctrl_async import BctrlRateLimitError, BctrlServerError, BctrlSession
from bctrl_async._kinds import Failure
from bctrl_async._limiter.bounds import FixedRate
from bctrl_async._limiter.evidence import History, Standing, Standings
from bctrl_async._limiter.limiter import Limiter

HEALTHY = "ws-healthy"
TENANTS = [f"ws-{number}" for number in range(8)]


async def use(limiter: Limiter, workspace: str, answer: object) -> float:
    """Make an attempt that takes no time; return the seconds for which it waited."""
    began = now()
    history = History(workspace=workspace)
    await limiter.acquire(3600.0, history=history)
    release(limiter, answer, history)
    return now() - began


async def exempt(limiter: Limiter, workspace: str = HEALTHY) -> None:
    """Let others be throttled, and a workspace be answered in between."""
    show_limit(limiter, None, *TENANTS)
    for _ in range(3):
        show_limit(limiter, None, *TENANTS)
        limiter._on_success(History(workspace=workspace))


class TestStandings:
    def test_a_workspace_that_alone_is_answered_is_exempt(self) -> None:
        standings = Standings()
        met = []
        for _ in range(3):
            for tenant in TENANTS:
                standings.on_throttled(tenant, is_first=True)
            standings.on_success(HEALTHY)
            met.append(standings.of(HEALTHY))
        assert met == [Standing.ANSWERED, Standing.EXEMPT, Standing.EXEMPT]
        assert standings.of(TENANTS[0]) is Standing.THROTTLED
        assert standings.of("ws-new") is Standing.UNKNOWN

    def test_a_throttled_response_ends_an_exemption(self) -> None:
        standings = Standings()
        for tenant in TENANTS * 3:
            standings.on_throttled(tenant, is_first=True)
            standings.on_success(HEALTHY)
        assert standings.of(HEALTHY) is Standing.EXEMPT
        standings.on_throttled(HEALTHY, is_first=False)
        assert standings.of(HEALTHY) is Standing.THROTTLED
        standings.on_success(HEALTHY)
        assert standings.of(HEALTHY) is Standing.ANSWERED

    def test_answers_after_an_outage_prove_nothing(self) -> None:
        standings = Standings()
        for tenant in TENANTS * 10:
            standings.on_throttled(tenant, is_first=True)
        for tenant in TENANTS * 10:
            standings.on_success(tenant)
        assert {standings.of(tenant) for tenant in TENANTS} == {Standing.ANSWERED}

    def test_throttled_retries_prove_nothing_about_others(self) -> None:
        """A target that is throttled for ever has any number of retries."""
        standings = Standings()
        for _ in range(100):
            standings.on_throttled(TENANTS[0], is_first=False)
            standings.on_success(HEALTHY)
        assert standings.of(HEALTHY) is Standing.ANSWERED

    @pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
    def test_few_are_exempt_where_all_are_throttled_alike(self, share: float) -> None:
        chance = random.Random(share)
        standings = Standings()
        met: Counter[Standing] = Counter()
        for _ in range(10_000):
            workspace = f"ws-{chance.randrange(20)}"
            if chance.random() < share:
                standings.on_throttled(workspace, is_first=True)
            else:
                standings.on_success(workspace)
            met[standings.of(workspace)] += 1
        assert met[Standing.EXEMPT] < 0.05 * met.total()

    def test_the_least_recent_workspace_is_forgotten(self) -> None:
        standings = Standings()
        for number in range(1001):
            standings.on_throttled(f"ws-{number}", is_first=True)
        assert standings.of("ws-0") is Standing.UNKNOWN
        assert len(standings.workspaces) == 1000


@in_virtual_time
class TestGate:
    async def test_those_who_wait_leave_once_their_workspace_is_exempt(self) -> None:
        limiter = Limiter(10, past_start())
        show_limit(limiter, 30.0, *TENANTS)
        waits = [asyncio.create_task(use(limiter, HEALTHY, ANSWER)) for _ in range(5)]
        held = asyncio.create_task(use(limiter, TENANTS[0], ANSWER))
        await asyncio.sleep(1.0)
        assert limiter.waiting == 6
        await exempt(limiter)
        assert await asyncio.gather(*waits) == [1.0] * 5
        assert await use(limiter, HEALTHY, ANSWER) == 0.0
        assert not held.done()
        assert await held == pytest.approx(30.0, abs=0.1)

    async def test_those_who_wait_for_a_connection_join_the_others(self) -> None:
        """A throttled response shows that the limit holds their workspace, too."""
        limiter = Limiter(1, past_start())
        await exempt(limiter)
        history = History(workspace=HEALTHY)
        await limiter.acquire(3600.0, history=history)
        waits = asyncio.create_task(use(limiter, HEALTHY, ANSWER))
        await asyncio.sleep(0)
        release(limiter, throttled(5.0), history)
        assert await waits >= 0.45

    async def test_a_limit_that_is_shown_anew_does_not_hold_the_exempt(self) -> None:
        limiter = Limiter(1, past_start())
        await exempt(limiter)
        limiter._all.rate._lift_limit()
        history = History(workspace="ws-other")
        await limiter.acquire(3600.0, history=history)
        waits = asyncio.create_task(use(limiter, HEALTHY, ANSWER))
        await asyncio.sleep(0)
        show_limit(limiter, 30.0, *TENANTS)
        limiter.release(None, history)
        assert await waits == 0.0

    async def test_the_rate_of_the_caller_holds_the_exempt(self) -> None:
        limiter = Limiter(10, past_start(), FixedRate(1.0))
        await exempt(limiter)
        waits = [await use(limiter, HEALTHY, ANSWER) for _ in range(4)]
        assert sum(waits) == pytest.approx(3.0, abs=0.05)

    async def test_the_exempt_pass_when_the_limit_is_lifted(self) -> None:
        limiter = Limiter(1, past_start())
        await exempt(limiter)
        history = History(workspace=HEALTHY)
        await limiter.acquire(3600.0, history=history)
        waits = asyncio.create_task(use(limiter, HEALTHY, ANSWER))
        await asyncio.sleep(0)
        limiter._all.rate._lift_limit()
        limiter.release(None, history)
        assert await waits == 0.0

    async def test_a_second_503_is_of_its_target_if_the_exempt_are_answered(
        self,
    ) -> None:
        limiter = Limiter(10, past_start())
        await exempt(limiter)
        failure = Failure.of(BctrlServerError("503", status=503, may_have_stopped=True))
        history = History(workspace=TENANTS[0])
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


def test_a_healthy_workspace_waits_for_no_tenants(simulate: Simulate) -> None:
    """Fault: forty throttled tenants let a healthy workspace wait for minutes."""
    tenants = [f"ws-{number}" for number in range(40)]

    def serve(request: Request) -> Answer:
        return ANSWER if request.workspace == HEALTHY else throttled()

    async def main(session: BctrlSession) -> list[tuple[str, float, bool]]:
        chance = random.Random(0)
        calls = [(chance.uniform(0.0, 120.0), tenant) for tenant in tenants * 12]
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
