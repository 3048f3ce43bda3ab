"""How fast attempts start under a server's refusals: simulated, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
import virtual_time
from simulation import Run, Server, fixed_window, refusal, token_bucket

from bctrl_async import BctrlError, BctrlRateLimitError
from bctrl_async._limiter.limiter import Limiter, Priority
from bctrl_async._limiter.rate import AdaptiveRate


def always(rate: float) -> Callable[[float], float]:
    return lambda _: rate


def no_burst(rate: float, retry_after: float | None) -> Server:
    """Nginx's `limit_req` without a burst: one in each 1/rate seconds, and no credit."""
    free = 0.0

    def serve(now: float) -> BctrlError | None:
        nonlocal free
        if now < free:
            return refusal(retry_after)
        free = now + 1 / rate
        return None

    return serve


def at_random(
    share: float, otherwise: Server = lambda _: None, retry_after: float | None = None
) -> Server:
    chance = random.Random(share)
    return lambda now: refusal(retry_after) if chance.random() < share else otherwise(now)


class TestUnlimited:
    def test_a_server_that_never_refuses_is_never_waited_for(self) -> None:
        run = Run(lambda _: None, latency=lambda _: 0.2)
        virtual_time.run(run.by_workers(5000))
        assert run.seconds == pytest.approx(10.0)

    def test_latency_that_grows_with_load_is_no_refusal(self) -> None:
        run = Run(lambda _: None, latency=lambda in_flight: 0.005 * in_flight)
        virtual_time.run(run.by_workers(2000))
        assert run.requests == 2000
        assert run.seconds <= 1.1 * 2000 * 0.005


class TestFixedLimit:
    @pytest.mark.parametrize("latency", [0.002, 0.01, 0.1])
    @pytest.mark.parametrize("at_once", [False, True])
    def test_a_bucket_is_used_to_the_full_with_few_refusals(
        self, latency: float, *, at_once: bool
    ) -> None:
        run = Run(token_bucket(always(200), burst=50), latency=lambda _: latency)
        virtual_time.run(run.all_at_once(2000) if at_once else run.by_workers(2000))
        assert run.lost == 0
        assert run.seconds <= 1.25 * (2000 - 50) / 200
        assert run.refused <= 0.1 * run.requests

    @pytest.mark.parametrize("retry_after", [1, 2])
    def test_with_retry_after_hardly_anything_is_refused(self, retry_after: float) -> None:
        run = Run(token_bucket(always(200), burst=50, retry_after=retry_after))
        virtual_time.run(run.by_workers(2000))
        assert run.lost == 0
        assert run.refused <= 0.05 * run.requests

    @pytest.mark.parametrize("retry_after", [None, 1])
    def test_a_server_that_bears_no_burst_is_still_used(self, retry_after: float | None) -> None:
        run = Run(no_burst(200, retry_after), latency=lambda _: 0.002)
        virtual_time.run(run.by_workers(2000))
        assert run.lost == 0
        assert run.seconds <= 4 * 2000 / 200
        assert run.refused <= 0.1 * run.requests

    def test_a_limit_for_each_second_is_found(self) -> None:
        run = Run(fixed_window(200))
        virtual_time.run(run.by_workers(20_000))
        assert run.lost == 0
        assert run.seconds <= 1.1 * 100
        assert run.refused <= 0.05 * run.requests

    def test_a_limit_on_requests_in_flight_is_found(self) -> None:
        run = Run(lambda _: None, latency=lambda _: 0.1, most_in_flight=20)
        virtual_time.run(run.by_workers(20_000))
        assert run.lost == 0
        assert run.seconds <= 1.25 * 100
        assert run.refused <= 0.05 * run.requests

    @pytest.mark.parametrize(("latency", "limit"), [(0.4, 20), (1.0, 10), (2.0, 30)])
    def test_a_limit_on_slow_requests_in_flight_is_not_forgotten(
        self, latency: float, limit: int
    ) -> None:
        run = Run(lambda _: None, latency=lambda _: latency, most_in_flight=limit)
        virtual_time.run(run.by_workers(1500))
        assert run.lost == 0
        assert run.refused <= 0.6 * run.requests


class TestChangingLimit:
    def test_it_goes_down_and_comes_back_with_the_limit(self) -> None:
        def rate(now: float) -> float:
            return 50.0 if 10 <= now < 40 else 200.0

        run = Run(token_bucket(rate, burst=50))
        virtual_time.run(run.by_workers(20_000))
        assert run.lost == 0
        assert run.refused <= 0.05 * run.requests
        # 10 s at 200, 30 s at 50, and the rest at 200 again.
        assert run.seconds <= 1.15 * (40 + (20_000 - 2_000 - 1_500) / 200)

    @pytest.mark.parametrize("end", [25, 35])
    def test_an_outage_of_refusals_costs_few_requests_and_is_forgotten(self, end: float) -> None:
        run = Run(lambda now: refusal() if 5 <= now < end else None, latency=lambda _: 0.1)
        virtual_time.run(run.by_workers(20_000))
        assert run.lost == 0
        assert run.refused <= 0.05 * run.requests
        # A thousand a second before and after it, and a while to find that out.
        assert run.seconds <= 20 + (end - 5) + 15

    def test_a_limit_that_is_gone_is_forgotten(self) -> None:
        rate = AdaptiveRate()
        rate.on_throttled(0.0, None, 1)
        rate.on_start(1.0)
        rate.on_throttled(2.0, None, 1)
        assert not rate.unlimited
        rate.on_start(1000.0)
        assert rate.unlimited

    def test_a_slow_start_that_meets_no_limit_is_forgotten(self) -> None:
        rate = AdaptiveRate()
        rate.on_throttled(0.0, None, 1)
        rate.on_start(1.0)
        assert not rate.unlimited
        rate.on_start(1000.0)
        assert rate.unlimited

    def test_more_answers_than_are_remembered_still_give_the_rate(self) -> None:
        run = Run(token_bucket(always(5000), burst=50), latency=lambda _: 0.005)
        virtual_time.run(run.by_workers(50_000))
        assert run.lost == 0
        assert run.seconds <= 1.6 * 10


class TestRefusalsAtRandom:
    @pytest.mark.parametrize("share", [0.01, 0.06, 0.3])
    def test_a_pace_that_changes_nothing_is_not_kept(self, share: float) -> None:
        run = Run(at_random(share), latency=lambda _: 0.03)
        virtual_time.run(run.by_workers(3000))
        assert run.lost == 0
        # Taken for a sign of the pace they bring it down to a few a second: many minutes.
        assert run.seconds <= 60

    def test_a_retry_after_among_them_does_not_hold_the_rate_down(self) -> None:
        run = Run(at_random(0.1, retry_after=0.01), latency=lambda _: 0.03)
        virtual_time.run(run.by_workers(3000))
        assert run.lost == 0
        assert run.seconds <= 60

    def test_a_limit_is_found_among_them(self) -> None:
        run = Run(at_random(0.05, otherwise=token_bucket(always(200), burst=50)))
        virtual_time.run(run.by_workers(10_000))
        assert run.lost == 0
        assert run.refused <= 2 * 0.05 * run.requests
        assert run.seconds <= 2 * (10_000 - 50) / 200

    def test_they_are_no_excuse_once_everything_is_refused(self) -> None:
        some = at_random(0.05)
        run = Run(lambda now: refusal() if 20 <= now < 50 else some(now), latency=lambda _: 0.1)
        virtual_time.run(run.by_workers(20_000))
        assert run.lost == 0
        assert run.refused <= (0.05 + 0.05) * run.requests


class TestCap:
    @pytest.mark.parametrize("cap", [1, 10, 300])
    def test_no_more_than_the_cap_start_in_a_second(self, cap: int) -> None:
        run = Run(lambda _: None, cap=cap)
        virtual_time.run(run.all_at_once(5 * cap))
        assert run.seconds == pytest.approx((5 * cap - 1) / cap, abs=0.1)
        for start in run.starts:
            started = sum(start <= other < start + 1 for other in run.starts)
            assert started <= cap * 1.02 + 1

    def test_it_also_holds_while_the_server_refuses(self) -> None:
        run = Run(token_bucket(always(200), burst=10), cap=100)
        virtual_time.run(run.by_workers(1000))
        assert run.refused == 0
        assert run.seconds == pytest.approx(10, rel=0.05)


class TestGate:
    def test_a_retry_after_of_one_keeps_everybody_away(self) -> None:
        async def scenario() -> float:
            limiter = Limiter(10, AdaptiveRate())
            assert limiter.acquire_nowait()
            limiter.release(refusal(30.0))
            assert not limiter.acquire_nowait()
            await limiter.acquire(60.0)
            return asyncio.get_running_loop().time()

        assert virtual_time.run(scenario()) == pytest.approx(30.0)

    def test_who_returns_comes_before_who_is_new_and_who_polls_is_last(self) -> None:
        async def scenario() -> list[str]:
            limiter = Limiter(1, AdaptiveRate())
            assert limiter.acquire_nowait()
            entered = []

            async def enter(name: str, priority: Priority) -> None:
                await limiter.acquire(60.0, priority)
                entered.append(name)
                limiter.release(None)

            async with asyncio.TaskGroup() as group:
                group.create_task(enter("polling", Priority.POLL))
                group.create_task(enter("new", Priority.NEW))
                group.create_task(enter("returning", Priority.RETRY))
                await asyncio.sleep(1)
                limiter.release(None)
            return entered

        assert virtual_time.run(scenario()) == ["returning", "new", "polling"]

    def test_a_retry_after_beyond_the_patience_sends_away_who_waits_and_who_comes(self) -> None:
        """Fault: a days-long Retry-After is waited out (openai family)."""

        async def scenario() -> list[object]:
            limiter = Limiter(1, AdaptiveRate())
            assert limiter.acquire_nowait()
            impatient = asyncio.create_task(limiter.acquire(10.0))
            patient = asyncio.create_task(limiter.acquire(7200.0))
            await asyncio.sleep(1)
            limiter.release(refusal(3600.0))
            with pytest.raises(BctrlRateLimitError, match=r"not sent: .* another 3600 s"):
                await limiter.acquire(60.0)
            ended = await asyncio.gather(impatient, patient, return_exceptions=True)
            return [*ended, asyncio.get_running_loop().time()]

        first, second, time = virtual_time.run(scenario())
        assert isinstance(first, BctrlRateLimitError)
        assert first.retry_after == pytest.approx(3600)
        assert (first.status, first.may_have_stopped) == (None, False)
        assert second is None
        assert time == pytest.approx(3601)

    def test_a_wait_that_becomes_shorter_is_not_overslept(self) -> None:
        async def scenario() -> float:
            limiter = Limiter(2, AdaptiveRate(cap=0.1))
            assert limiter.acquire_nowait()
            cancelled = asyncio.create_task(limiter.acquire(60.0))
            waiting = asyncio.create_task(limiter.acquire(60.0))
            await asyncio.sleep(1)
            cancelled.cancel()
            limiter.release("a runtime")
            await waiting
            return asyncio.get_running_loop().time()

        assert virtual_time.run(scenario()) == pytest.approx(10, rel=0.01)
