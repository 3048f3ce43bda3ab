"""Patience: how long a call waits while it is throttled."""

from __future__ import annotations

import asyncio

import pytest
from simulated import ANSWER, Request, Simulate, targets
from throttling import answer, throttled
from virtual_time import in_virtual_time, now

from bctrl_async import (
    BctrlError,
    BctrlNetworkError,
    BctrlRateLimitError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    StopResult,
)
from bctrl_async._limiter.limiter import Limiter, Priority
from bctrl_async._limiter.rate import AdaptiveRate

STOPPED, NOT_SENT, REJECTED = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.REJECTED


@in_virtual_time
class TestPatience:
    async def test_a_retry_waits_for_a_pause_that_ends_with_its_patience(self) -> None:
        limiter = Limiter(10, AdaptiveRate())
        await answer(limiter, throttled(50.1))
        await asyncio.sleep(0.3)
        await limiter.acquire(60.0, Priority.RETRY, patience_ends=50.1)

        assert now() == pytest.approx(50.1)

    async def test_the_sessions_own_pause_is_waited_for_without_any(self) -> None:
        """Fault: the session's own pause was reported as a Retry-After beyond the patience."""
        limiter = Limiter(10, AdaptiveRate())
        for _ in range(3):
            await answer(limiter, throttled())
        await limiter.acquire(0.0)

        assert now() == pytest.approx(0.5)


def test_a_retry_gives_up_in_time_when_another_call_prolongs_the_pause(simulate: Simulate) -> None:
    simulation = simulate(lambda each: throttled(30.0 if each.at else 50.0))
    simulation.before_response = lambda each: asyncio.sleep(40.0) if each.at else None

    async def scenario(session: BctrlSession) -> BctrlRateLimitError:
        retried = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await asyncio.sleep(0.01)
        with pytest.raises(BctrlRateLimitError):
            await session.stop_runtime("ws-1", "mail", retry=RetryPolicy(patience=0))
        with pytest.raises(BctrlRateLimitError, match="for another 30 s") as caught:
            await retried
        return caught.value

    error = simulation.run(scenario)
    assert (error.attempts, error.status) == (1, 429)
    assert simulation.seconds < 41


class TestEverythingIsThrottled:
    """Fault: a patience of 2 s ended after 272 s, when the last call had had its turn."""

    POLICY = RetryPolicy(patience=2.0)

    def test_a_single_call_ends_with_its_patience(self, simulate: Simulate) -> None:
        async def stop_all(session: BctrlSession) -> list[BaseException | Runtime]:
            stops = (session.stop_runtime(*each, retry=self.POLICY) for each in targets(50))
            return await asyncio.gather(*stops, return_exceptions=True)

        simulation = simulate(lambda _: throttled())
        ends = simulation.run(stop_all)

        assert {type(end) for end in ends} == {BctrlRateLimitError}
        assert simulation.seconds < 8

    @pytest.mark.parametrize("accepted", [0, 20])
    def test_a_bulk_stop_ends_with_its_patience_although_others_were_answered_before(
        self, simulate: Simulate, accepted: int
    ) -> None:
        answers = iter([ANSWER] * accepted)
        simulation = simulate(lambda _: next(answers, throttled()))
        report = simulation.stop(60, retry=self.POLICY)

        assert report.counts[STOPPED] == accepted
        assert report.counts[REJECTED] > 0
        # Without others that are answered, most wait for their first attempt.
        assert (report.counts[NOT_SENT] > 20) is (accepted < 20)
        # The next answer after the two seconds shows that nothing has changed.
        assert simulation.seconds < 10

    def test_a_throttled_answer_after_a_silence_ends_no_call(self, simulate: Simulate) -> None:
        """Fault: all others failed as if the server had throttled them as long as it was silent."""
        answers = iter([BctrlNetworkError("lost")] * 2 + [throttled()])
        simulation = simulate(lambda _: next(answers, ANSWER), 3.0)
        # The answers come one after the other.
        simulation.before_response = lambda _: asyncio.sleep(0.01 * len(simulation.requests))

        async def stop_all(session: BctrlSession) -> list[Runtime]:
            stops = (session.stop_runtime(*each, retry=self.POLICY) for each in targets(300))
            return await asyncio.gather(*stops)

        assert len(simulation.run(stop_all)) == 300

    def test_while_others_are_answered_a_call_waits_for_its_turn(self, simulate: Simulate) -> None:
        accepted = [-1.0]

        def one_in_a_second(each: Request) -> Runtime | BctrlError:
            if each.at < accepted[-1] + 1.0:
                return throttled()
            accepted.append(each.at)
            return ANSWER

        simulation = simulate(one_in_a_second)
        report = simulation.stop(20, retry=RetryPolicy(patience=5.0))

        assert report.counts[STOPPED] > 10
        assert report.counts[NOT_SENT] == 0
        assert simulation.seconds > 15
