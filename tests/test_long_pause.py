"""A Retry-After of more than a minute: one attempt a minute is sent all the same, as a probe."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
import virtual_time
from servers import answering, http_answer, raw_server
from test_already_stopped import RUNTIME
from throttling import throttled

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlRateLimitError,
    BctrlServerError,
    BctrlSession,
    RetryPolicy,
    RuntimeStatus,
    StopResult,
)
from bctrl_async._limiter.limiter import Limiter, Priority
from bctrl_async._limiter.rate import PROBE_INTERVAL, AdaptiveRate

YEAR = 365 * 86400.0
PATIENCE = 60.0

_T = TypeVar("_T")


def in_virtual_time(scenario: Callable[[Limiter], Awaitable[_T]], cap: float | None = None) -> _T:
    async def main() -> _T:
        async with asyncio.timeout(10 * YEAR):
            return await scenario(Limiter(10, AdaptiveRate(cap)))

    return virtual_time.run(main())


async def answer(limiter: Limiter, parsed: object) -> None:
    """Make an attempt that takes no time."""
    await limiter.acquire(PATIENCE)
    limiter.release(parsed)


async def attempts_until(limiter: Limiter, end: float) -> list[float]:
    """Call once a second, as an impatient caller would; return the times of those admitted."""
    admitted = []
    loop = asyncio.get_running_loop()
    while loop.time() < end:
        try:
            await limiter.acquire(0.0)
        except BctrlRateLimitError:
            pass
        else:
            admitted.append(loop.time())
            limiter.release(throttled(YEAR))
        await asyncio.sleep(1.0)
    return admitted


class TestProbe:
    def test_a_call_a_minute_after_an_absurd_retry_after_is_sent(self) -> None:
        """Fault: after one Retry-After with an epoch in it, every later call failed for years."""

        async def scenario(limiter: Limiter) -> None:
            await answer(limiter, throttled(YEAR))
            await asyncio.sleep(PROBE_INTERVAL)
            await limiter.acquire(PATIENCE)

        in_virtual_time(scenario)

    def test_calls_in_between_fail_at_once(self) -> None:
        async def scenario(limiter: Limiter) -> float:
            await answer(limiter, throttled(YEAR))
            await asyncio.sleep(PROBE_INTERVAL - 1)
            with pytest.raises(BctrlRateLimitError) as caught:
                await limiter.acquire(PATIENCE)
            assert str(caught.value) == (
                "not sent: rate limited for another 31535941 s (Retry-After). "
                "One call a minute is sent all the same: call again in 1 s"
            )
            assert caught.value.retry_after == YEAR - 59
            return asyncio.get_running_loop().time()

        assert in_virtual_time(scenario) == PROBE_INTERVAL - 1

    def test_the_error_of_a_pause_that_is_kept_exactly_says_nothing_of_probes(self) -> None:
        async def scenario(limiter: Limiter) -> None:
            await answer(limiter, throttled(60.0))
            with pytest.raises(BctrlRateLimitError, match="another 60 s") as caught:
                await limiter.acquire(1.0)
            assert "a minute" not in str(caught.value)

        in_virtual_time(scenario)

    def test_while_each_probe_is_throttled_one_call_a_minute_is_sent(self) -> None:
        async def scenario(limiter: Limiter) -> list[float]:
            await answer(limiter, throttled(YEAR))
            return await attempts_until(limiter, 200.0)

        assert in_virtual_time(scenario) == [60.0, 120.0, 180.0]

    def test_of_many_calls_at_once_one_is_the_probe(self) -> None:
        async def scenario(limiter: Limiter) -> list[BaseException | None]:
            await answer(limiter, throttled(YEAR))
            await asyncio.sleep(PROBE_INTERVAL)
            calls = [limiter.acquire(PATIENCE) for _ in range(5)]
            return await asyncio.gather(*calls, return_exceptions=True)

        first, *others = in_virtual_time(scenario)
        assert first is None
        assert {type(error) for error in others} == {BctrlRateLimitError}

    @pytest.mark.parametrize("retry_after", [1.0, 30.0, 59.9, 60.0])
    def test_a_retry_after_of_up_to_a_minute_is_kept_exactly(self, retry_after: float) -> None:
        async def scenario(limiter: Limiter) -> float:
            await answer(limiter, throttled(retry_after))
            await limiter.acquire(PATIENCE)
            return asyncio.get_running_loop().time()

        assert in_virtual_time(scenario) == pytest.approx(retry_after)

    def test_a_call_whose_patience_exceeds_the_pause_waits_for_a_probe(self) -> None:
        async def scenario(limiter: Limiter) -> list[float]:
            await answer(limiter, throttled(600.0))
            starts = []

            async def call() -> None:
                await limiter.acquire(700.0)
                starts.append(asyncio.get_running_loop().time())

            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(call())
            return starts

        assert in_virtual_time(scenario) == [60.0, 120.0, 180.0]

    def test_a_retry_may_be_the_probe(self) -> None:
        async def scenario(limiter: Limiter) -> None:
            await answer(limiter, throttled(YEAR))
            await asyncio.sleep(PROBE_INTERVAL)
            await limiter.acquire(PATIENCE, Priority.RETRY)

        in_virtual_time(scenario)

    def test_the_minute_begins_at_the_last_throttled_answer(self) -> None:
        async def scenario(limiter: Limiter) -> list[float]:
            await limiter.acquire(PATIENCE)
            await answer(limiter, throttled(YEAR))
            await asyncio.sleep(30.0)
            limiter.release(throttled(45.0))
            return await attempts_until(limiter, 140.0)

        assert in_virtual_time(scenario) == [90.0]


class TestAnswerOfAProbe:
    @pytest.mark.parametrize("parsed", ["a runtime", BctrlServerError("500", status=500)])
    def test_an_answer_that_is_not_throttled_ends_the_pause(self, parsed: object) -> None:
        async def scenario(limiter: Limiter) -> float:
            await answer(limiter, throttled(YEAR))
            await asyncio.sleep(PROBE_INTERVAL)
            await answer(limiter, parsed)
            for _ in range(100):
                await answer(limiter, "a runtime")
            return asyncio.get_running_loop().time() - PROBE_INTERVAL

        # As after any pause, the rate begins at one a second and doubles every second.
        assert 5 < in_virtual_time(scenario) < 9

    def test_calls_that_wait_are_admitted_as_soon_as_the_pause_ends(self) -> None:
        async def scenario(limiter: Limiter) -> list[float]:
            await answer(limiter, throttled(600.0))
            waiting = [asyncio.create_task(limiter.acquire(700.0)) for _ in range(3)]
            await asyncio.sleep(PROBE_INTERVAL + 0.1)
            limiter.release("a runtime")
            starts = []
            for task in waiting[1:]:
                await task
                starts.append(asyncio.get_running_loop().time() - PROBE_INTERVAL)
            return starts

        assert in_virtual_time(scenario) == pytest.approx([0.1, 1.1], abs=0.2)

    def test_a_rate_that_was_asked_for_is_kept_after_the_pause(self) -> None:
        async def scenario(limiter: Limiter) -> float:
            await answer(limiter, throttled(YEAR))
            await asyncio.sleep(PROBE_INTERVAL)
            await answer(limiter, "a runtime")
            await answer(limiter, "a runtime")
            return asyncio.get_running_loop().time() - PROBE_INTERVAL

        assert in_virtual_time(scenario, cap=0.1) == pytest.approx(10.0)

    def test_another_retry_after_replaces_the_first(self) -> None:
        async def scenario(limiter: Limiter) -> float:
            await answer(limiter, throttled(YEAR))
            await asyncio.sleep(PROBE_INTERVAL)
            await answer(limiter, throttled(5.0))
            await limiter.acquire(PATIENCE)
            return asyncio.get_running_loop().time()

        assert in_virtual_time(scenario) == pytest.approx(65.0)

    @pytest.mark.parametrize(
        "parsed",
        [throttled(), BctrlNetworkError("no answer"), BctrlServerError("503", status=503), None],
    )
    def test_no_answer_and_one_without_retry_after_leave_the_pause_as_it_is(
        self, parsed: BctrlError | None
    ) -> None:
        async def scenario(limiter: Limiter) -> list[float]:
            await answer(limiter, throttled(YEAR))
            await asyncio.sleep(PROBE_INTERVAL)
            await answer(limiter, parsed)
            return await attempts_until(limiter, 125.0)

        assert in_virtual_time(scenario) == [120.0]

    def test_an_answer_to_an_earlier_attempt_does_not_end_the_pause(self) -> None:
        async def scenario(limiter: Limiter) -> None:
            await limiter.acquire(PATIENCE)
            await answer(limiter, throttled(YEAR))
            limiter.release("a runtime")
            with pytest.raises(BctrlRateLimitError):
                await limiter.acquire(PATIENCE)

        in_virtual_time(scenario)

    def test_an_answer_after_the_pause_has_passed_changes_nothing(self) -> None:
        async def scenario(limiter: Limiter) -> float:
            await answer(limiter, throttled(90.0))
            await asyncio.sleep(PROBE_INTERVAL)
            await limiter.acquire(PATIENCE)
            await asyncio.sleep(31.0)
            limiter.release("a runtime")
            await answer(limiter, "a runtime")
            return asyncio.get_running_loop().time()

        assert in_virtual_time(scenario) == pytest.approx(91.0)


class TestClose:
    def test_it_fails_a_call_that_waits_for_a_probe(self) -> None:
        async def scenario(limiter: Limiter) -> float:
            await answer(limiter, throttled(600.0))
            waiting = asyncio.create_task(limiter.acquire(700.0))
            await asyncio.sleep(1.0)
            limiter.close()
            with pytest.raises(BctrlConfigError, match="the session is closed"):
                await waiting
            return asyncio.get_running_loop().time()

        assert in_virtual_time(scenario) == 1.0


class TestOwnPause:
    def test_the_sessions_own_pause_is_waited_for_whatever_the_patience(self) -> None:
        """Fault: the session's own pause was reported as a Retry-After beyond the patience."""

        async def scenario(limiter: Limiter) -> float:
            await answer(limiter, throttled())
            await limiter.acquire(0.0)
            return asyncio.get_running_loop().time()

        assert in_virtual_time(scenario) == pytest.approx(0.5)

    def test_throttling_that_does_not_slow_down_pauses_all_the_same(self) -> None:
        """Fault: within the baseline, a Retry-After paused only the call that got it."""
        rate = AdaptiveRate()
        rate._baseline.covers = lambda _: True  # type: ignore[assignment,method-assign]
        rate.on_throttled(0.0, 30.0, 1)
        assert not rate.is_throttled
        assert not rate.is_unlimited
        assert rate.delay(10.0, 0) == pytest.approx(20.0)
        rate.on_start(31.0)
        assert rate.is_unlimited


def let_a_minute_pass(session: BctrlSession) -> None:
    session._limiter._rate._asked_at -= PROBE_INTERVAL


@pytest.mark.parametrize(
    "header",
    [
        "Retry-After: 1795651200",
        "Retry-After: 31536000",
        "Retry-After: Thu, 31 Dec 2099 23:59:59 GMT",
    ],
)
async def test_over_a_socket_a_session_recovers_from_an_absurd_retry_after(header: str) -> None:
    """Fault: one Retry-After with an epoch in it locks a client for years."""
    answers = http_answer("429 X", b"", header), http_answer("200 OK", RUNTIME)
    async with raw_server(answering(*answers)) as url, BctrlSession("k", base_url=url) as session:
        for _ in range(2):
            with pytest.raises(BctrlRateLimitError):
                await session.stop_runtime("ws-1", "crm")
        assert session.stats.attempts == 1

        let_a_minute_pass(session)
        for _ in range(2):
            runtime = await session.stop_runtime("ws-1", "crm")
            assert runtime.status is RuntimeStatus.STOPPED


async def test_a_retry_after_beyond_the_patience_still_ends_a_bulk_stop() -> None:
    answers = answering(http_answer("429 X", b"", "Retry-After: 31536000"))
    policy = RetryPolicy(patience=100)
    async with raw_server(answers) as url, BctrlSession("k", base_url=url) as session:
        targets = [("ws-1", "crm"), ("ws-1", "mail")]
        report = await session.stop_runtimes(targets, retry=policy, concurrency=1)
    assert report.counts == {StopResult.REJECTED: 1, StopResult.NOT_SENT: 1}
    assert isinstance(report.ended_early, BctrlRateLimitError)
