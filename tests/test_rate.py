"""The rate under throttling, simulated in virtual time."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable

import pytest
import virtual_time
from throttling import Run, Server, fixed_window, throttled, token_bucket

from bctrl_async import BctrlError, BctrlRateLimitError
from bctrl_async._limiter.baseline import Restored, _Hold, _Trial
from bctrl_async._limiter.limiter import Limiter, Priority
from bctrl_async._limiter.rate import AdaptiveRate


def always(rate: float) -> Callable[[float], float]:
    return lambda _: rate


def no_burst(rate: float, retry_after: float | None) -> Server:
    """Make a server that limits like nginx's `limit_req` without a burst."""
    next_start = 0.0

    def serve(now: float) -> BctrlError | None:
        nonlocal next_start
        if now < next_start:
            return throttled(retry_after)
        next_start = now + 1 / rate
        return None

    return serve


def at_random(
    share: float,
    otherwise: Server = lambda _: None,
    retry_after: float | None = None,
    seed: int | None = None,
) -> Server:
    rng = random.Random(share if seed is None else seed)
    return lambda now: throttled(retry_after) if rng.random() < share else otherwise(now)


class TestUnlimited:
    def test_without_throttling_no_attempt_is_delayed(self) -> None:
        run = Run(lambda _: None, latency=lambda _: 0.2)
        virtual_time.run(run.bulk(5000))
        assert run.seconds == pytest.approx(10.0)

    def test_latency_that_grows_with_load_does_not_slow_down(self) -> None:
        run = Run(lambda _: None, latency=lambda in_flight: 0.005 * in_flight)
        virtual_time.run(run.bulk(2000))
        assert run.requests == 2000
        assert run.seconds <= 1.1 * 2000 * 0.005


class TestFixedLimit:
    @pytest.mark.parametrize("latency", [0.002, 0.01, 0.1])
    @pytest.mark.parametrize("gather", [False, True])
    def test_a_token_bucket_is_used_fully_with_little_throttling(
        self, latency: float, *, gather: bool
    ) -> None:
        run = Run(token_bucket(always(200), burst=50), latency=lambda _: latency)
        virtual_time.run(run.gather(2000) if gather else run.bulk(2000))
        assert run.gave_up == 0
        assert run.seconds <= 1.25 * (2000 - 50) / 200
        assert run.throttled <= 0.1 * run.requests

    @pytest.mark.parametrize("retry_after", [1, 2])
    def test_with_retry_after_hardly_any_request_is_throttled(self, retry_after: float) -> None:
        run = Run(token_bucket(always(200), burst=50, retry_after=retry_after))
        virtual_time.run(run.bulk(2000))
        assert run.gave_up == 0
        assert run.throttled <= 0.05 * run.requests

    @pytest.mark.parametrize("retry_after", [None, 1])
    def test_a_server_that_allows_no_burst_is_still_used(self, retry_after: float | None) -> None:
        run = Run(no_burst(200, retry_after), latency=lambda _: 0.002)
        virtual_time.run(run.bulk(2000))
        assert run.gave_up == 0
        assert run.seconds <= 4 * 2000 / 200
        assert run.throttled <= 0.1 * run.requests

    def test_a_fixed_window_limit_is_found(self) -> None:
        run = Run(fixed_window(200))
        virtual_time.run(run.bulk(20_000))
        assert run.gave_up == 0
        assert run.seconds <= 1.1 * 100
        assert run.throttled <= 0.05 * run.requests

    def test_a_concurrency_limit_is_found(self) -> None:
        run = Run(lambda _: None, latency=lambda _: 0.1, server_limit=20)
        virtual_time.run(run.bulk(20_000))
        assert run.gave_up == 0
        assert run.seconds <= 1.25 * 100
        assert run.throttled <= 0.05 * run.requests

    @pytest.mark.parametrize(("latency", "limit"), [(0.4, 20), (1.0, 10), (2.0, 30)])
    def test_a_concurrency_limit_on_slow_requests_is_not_forgotten(
        self, latency: float, limit: int
    ) -> None:
        run = Run(lambda _: None, latency=lambda _: latency, server_limit=limit)
        virtual_time.run(run.bulk(1500))
        assert run.gave_up == 0
        assert run.throttled <= 0.6 * run.requests


class TestChangingLimit:
    def test_the_rate_falls_and_recovers_with_the_limit(self) -> None:
        def rate(now: float) -> float:
            return 50.0 if 10 <= now < 40 else 200.0

        run = Run(token_bucket(rate, burst=50))
        virtual_time.run(run.bulk(20_000))
        assert run.gave_up == 0
        assert run.throttled <= 0.05 * run.requests
        # 10 s at 200, 30 s at 50, and the rest at 200 again.
        assert run.seconds <= 1.15 * (40 + (20_000 - 2_000 - 1_500) / 200)

    @pytest.mark.parametrize("end", [25, 35])
    def test_an_outage_of_429s_costs_few_requests_and_is_forgotten(self, end: float) -> None:
        run = Run(lambda now: throttled() if 5 <= now < end else None, latency=lambda _: 0.1)
        virtual_time.run(run.bulk(20_000))
        assert run.gave_up == 0
        assert run.throttled <= 0.05 * run.requests
        # A thousand per second before and after the outage, and some time to recover.
        assert run.seconds <= 20 + (end - 5) + 15

    @pytest.mark.parametrize("cap", [None, 50.0])
    def test_throttling_when_the_limit_would_be_lifted_begins_anew(self, cap: float | None) -> None:
        """Fault: the limit was lifted by the response that asked for one."""
        rate = AdaptiveRate(cap)
        rate.on_throttled(0.0, None, 1)
        rate.on_start(1.0)
        rate.on_throttled(2.0, None, 1)
        rate.on_throttled(1000.0, None, 1)
        assert rate.is_throttled
        assert rate.delay(1000.0, 1) == pytest.approx(0.5)
        assert rate.delay(1001.0, 100) < math.inf

    def test_a_limit_that_is_gone_is_forgotten(self) -> None:
        rate = AdaptiveRate()
        rate.on_throttled(0.0, None, 1)
        rate.on_start(1.0)
        rate.on_throttled(2.0, None, 1)
        assert not rate.is_unlimited
        rate.on_start(1000.0)
        assert rate.is_unlimited

    def test_a_slow_start_that_meets_no_limit_is_forgotten(self) -> None:
        rate = AdaptiveRate()
        rate.on_throttled(0.0, None, 1)
        rate.on_start(1.0)
        assert not rate.is_unlimited
        rate.on_start(1000.0)
        assert rate.is_unlimited

    def test_a_rate_with_more_samples_than_are_kept_is_still_measured(self) -> None:
        run = Run(token_bucket(always(5000), burst=50), latency=lambda _: 0.005)
        virtual_time.run(run.bulk(20_000))
        assert run.gave_up == 0
        # Until the rate is found, five seconds.
        assert run.seconds <= 5 + 1.05 * 4

    def test_a_rate_with_more_samples_than_are_kept_is_found_after_a_retry_after(self) -> None:
        run = Run(token_bucket(always(5000), burst=50, retry_after=1), latency=lambda _: 0.005)
        virtual_time.run(run.bulk(15_000))
        assert run.gave_up == 0
        assert run.throttled <= 0.05 * run.requests
        assert run.seconds <= 1 + 5 + 1.2 * 3


class TestTargetsOfTheirOwn:
    def test_a_call_that_alone_is_throttled_again_and_again_slows_down_no_other(self) -> None:
        """Fault: a target that was always answered 503 kept a whole session at a crawl."""
        rate = AdaptiveRate()
        rate.on_throttled(0.0, None, 1)
        for repeats in range(1, 30):
            now = 10.0 * repeats
            for _ in range(10):
                rate.on_success(now)
            rate.on_throttled(now, None, 1, repeats)
            rate.on_start(now)
        assert not rate.is_throttled

    def test_one_that_is_throttled_with_others_does(self) -> None:
        rate = AdaptiveRate()
        for repeats in range(30):
            rate.on_success(float(repeats))
            rate.on_throttled(float(repeats), None, 1, repeats)
        assert rate.is_throttled

    def test_its_retry_after_is_kept(self) -> None:
        rate = AdaptiveRate()
        for _ in range(10):
            rate.on_success(0.0)
        rate.on_throttled(0.0, 5.0, 1, 2)
        assert rate.delay(0.0, 0) == 5.0


class TestGrowthAndPauses:
    """The seconds of a pause are no evidence that the server accepts more."""

    @pytest.fixture
    def growing(self) -> AdaptiveRate:
        """A rate in a slow start from 100 per second at 1 s."""
        rate = AdaptiveRate()
        rate.on_throttled(0.0, None, 1)
        rate._restore(Restored(100.0, is_trial=False), 1.0)
        for _ in range(50):
            rate.on_success(1.5)
        return rate

    @pytest.mark.parametrize("reason", ["covered", "of its own", "of another process"])
    def test_a_slow_start_goes_on_after_a_pause_that_is_no_reason_to_slow_down(
        self, growing: AdaptiveRate, reason: str
    ) -> None:
        """Fault: it went on in the pause, and then lifted the limit."""
        if reason == "of another process":
            growing.hold(2.0, 30.0)
        else:
            if reason == "covered":
                growing._baseline._hold = _Hold(0.1, 20.0)
            growing.on_throttled(2.0, 30.0, 1, 2 * (reason == "of its own"))
        growing.on_start(32.0)

        assert growing.is_throttled
        assert growing._current_rate(32.0) == 200.0
        assert growing._current_rate(33.0) == 400.0

    def test_a_probe_that_ends_the_pause_early_lets_it_go_on_then(
        self, growing: AdaptiveRate
    ) -> None:
        growing.hold(2.0, 300.0)
        growing.on_start(62.0)
        growing.on_success(63.0)
        assert growing._current_rate(63.0) == 200.0
        assert growing._current_rate(64.0) == 400.0

    def test_a_step_down_within_a_longer_pause_grows_after_it(self) -> None:
        """Fault: after a Retry-After of 30 s and a shorter one, the rate grew in the pause."""
        rate = AdaptiveRate()
        rate.on_throttled(0.0, 30.0, 10)
        rate.on_throttled(1.0, 10.0, 10)
        rate.on_start(30.0)
        assert rate.is_throttled
        assert rate._current_rate(30.0) == pytest.approx(rate._epoch_rate)

    def test_a_slow_start_in_the_pause_of_another_process_begins_after_it(self) -> None:
        """Fault: the first throttled response there lifted the limit that it showed."""
        rate = AdaptiveRate()
        rate.hold(0.0, 30.0)
        rate.on_throttled(1.0, None, 10)
        rate.on_start(30.0)
        assert rate.is_throttled
        assert rate._current_rate(30.0) == 1.0


class TestRandomThrottling:
    @pytest.mark.parametrize("share", [0.01, 0.06, 0.3])
    def test_slowing_down_that_changes_nothing_is_undone(self, share: float) -> None:
        run = Run(at_random(share), latency=lambda _: 0.03)
        virtual_time.run(run.bulk(3000))
        assert run.gave_up == 0
        # As a sign of congestion, it would bring the rate down to a few per second: many minutes.
        assert run.seconds <= 60

    def test_a_retry_after_does_not_keep_the_rate_low(self) -> None:
        run = Run(at_random(0.1, retry_after=0.01), latency=lambda _: 0.03)
        virtual_time.run(run.bulk(3000))
        assert run.gave_up == 0
        assert run.seconds <= 60

    # All but the first two took twice as long before there was a plateau, and a trial.
    @pytest.mark.parametrize(
        ("share", "seed"), [(0.05, 0), (0.05, 1), (0.05, 12), (0.05, 23), (0.02, 3), (0.02, 13)]
    )
    def test_a_rate_limit_is_still_found(self, share: float, seed: int) -> None:
        """Fault: a comparison that declined by bad luck began again at a tenth of the rate."""
        random.seed(seed)
        run = Run(at_random(share, otherwise=token_bucket(always(200), burst=50), seed=seed))
        virtual_time.run(run.bulk(10_000))
        assert run.gave_up == 0
        assert run.throttled <= 2 * share * run.requests
        assert run.seconds <= 2 * (10_000 - 50) / 200

    @pytest.mark.parametrize("seed", [1, 2])
    def test_throttling_that_ends_in_a_trial_lifts_the_limit(self, seed: int) -> None:
        """Fault: a trial that nothing was throttled in held the rate for ever."""
        random.seed(seed)
        usual = at_random(0.05, seed=seed)
        run = Run(lambda now: usual(now) if now < 10 else None, latency=lambda _: 0.1)
        virtual_time.run(run.bulk(20_000))
        # A thousand per second at most, and ten seconds of throttling.
        assert run.seconds <= 20 + 10 + 10

    def test_a_trial_that_passes_in_a_pause_begins_a_slow_start_after_it(self) -> None:
        """Fault: the pause counted as time of the slow start, which then lifted the limit."""
        rate = AdaptiveRate()
        rate.on_throttled(0.0, None, 1)
        rate._restore(Restored(100.0, is_trial=True), 1.0)
        rate._baseline._trial = trial = _Trial(100.0, 0.1, 1.0)
        rate.on_throttled(1.0, 30.0, 1)
        while rate._baseline._trial is trial:
            rate.on_success(1.1)

        assert rate.delay(1.1, 0) == 29.9
        rate.on_start(31.0)
        assert rate.is_throttled
        assert rate._current_rate(31.0) == 100.0
        assert rate._current_rate(32.0) == 200.0

    def test_an_outage_of_429s_is_not_mistaken_for_it(self) -> None:
        usual = at_random(0.05)
        run = Run(lambda now: throttled() if 20 <= now < 50 else usual(now), latency=lambda _: 0.1)
        virtual_time.run(run.bulk(20_000))
        assert run.gave_up == 0
        assert run.throttled <= (0.05 + 0.05) * run.requests


class TestCap:
    @pytest.mark.parametrize("cap", [1, 10, 300])
    def test_no_second_has_more_starts_than_the_cap(self, cap: int) -> None:
        run = Run(lambda _: None, cap=cap)
        virtual_time.run(run.gather(5 * cap))
        assert run.seconds == pytest.approx((5 * cap - 1) / cap, abs=0.1)
        for start in run.starts:
            started = sum(start <= other < start + 1 for other in run.starts)
            assert started <= cap * 1.02 + 1

    def test_it_also_holds_under_throttling(self) -> None:
        run = Run(token_bucket(always(200), burst=10), cap=100)
        virtual_time.run(run.bulk(1000))
        assert run.throttled == 0
        assert run.seconds == pytest.approx(10, rel=0.05)


class TestLimiter:
    def test_one_retry_after_holds_back_all_attempts(self) -> None:
        async def scenario() -> float:
            limiter = Limiter(10, AdaptiveRate())
            assert limiter.acquire_nowait()
            limiter.release(throttled(30.0))
            assert not limiter.acquire_nowait()
            await limiter.acquire(60.0)
            return asyncio.get_running_loop().time()

        assert virtual_time.run(scenario()) == pytest.approx(30.0)

    def test_retries_are_admitted_before_new_calls_and_polls_last(self) -> None:
        async def scenario() -> list[str]:
            limiter = Limiter(1, AdaptiveRate())
            assert limiter.acquire_nowait()
            admitted = []

            async def use(name: str, priority: Priority) -> None:
                await limiter.acquire(60.0, priority)
                admitted.append(name)
                limiter.release(None)

            async with asyncio.TaskGroup() as group:
                group.create_task(use("poll", Priority.POLL))
                group.create_task(use("new", Priority.BULK))
                group.create_task(use("retry", Priority.RETRY))
                await asyncio.sleep(1)
                limiter.release(None)
            return admitted

        assert virtual_time.run(scenario()) == ["retry", "new", "poll"]

    def test_a_retry_after_beyond_max_wait_fails_current_and_future_waiters(self) -> None:
        """Fault: a days-long Retry-After is waited out (openai family)."""

        async def scenario() -> list[object]:
            limiter = Limiter(1, AdaptiveRate())
            assert limiter.acquire_nowait()
            impatient = asyncio.create_task(limiter.acquire(10.0))
            patient = asyncio.create_task(limiter.acquire(7200.0))
            await asyncio.sleep(1)
            limiter.release(throttled(3600.0))
            with pytest.raises(
                BctrlRateLimitError, match=r"^not sent: rate limited for another 3600 s"
            ):
                await limiter.acquire(60.0)
            results = await asyncio.gather(impatient, patient, return_exceptions=True)
            return [*results, asyncio.get_running_loop().time()]

        first, second, time = virtual_time.run(scenario())
        assert isinstance(first, BctrlRateLimitError)
        assert first.retry_after == pytest.approx(3600)
        assert (first.status, first.may_have_stopped) == (None, False)
        assert second is None
        # Its patience would last for the whole hour, so it waits; a minute later it is the probe.
        assert time == pytest.approx(61)

    def test_a_pause_that_another_process_reports_again_stays_as_it_is(self) -> None:
        rate = AdaptiveRate()
        rate.hold(0.0, 70.0)
        assert rate.delay(59.0, 0) == pytest.approx(1.0)
        rate.on_start(60.0)
        assert rate.is_probed

        rate.hold(60.0, 10.001)

        assert rate.is_probed
        assert rate.retry_after_ends == 70.0

    def test_a_wait_that_becomes_shorter_ends_in_time(self) -> None:
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
