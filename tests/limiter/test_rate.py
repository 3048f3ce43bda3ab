"""The rate under throttling, simulated in virtual time."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable

import pytest
import virtual_time
from pacing import MemoryPace
from throttling import Fleet, Run, Server, fixed_window, past_start, throttled, token_bucket
from virtual_time import in_virtual_time

from bctrl_async import BctrlError, BctrlRateLimitError
from bctrl_async._limiter.baseline import _Hold, _Trial
from bctrl_async._limiter.limiter import Limiter, Priority
from bctrl_async._limiter.rate import _DOUBLING, AdaptiveRate


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


def refuse(rate: AdaptiveRate, now: float, times: int = 3) -> None:
    for _ in range(times):
        rate.on_throttled(now, None, 1)


def limited(cap: float | None = None) -> AdaptiveRate:
    """Make a rate whose server has shown at 0 s that it has a limit."""
    rate = AdaptiveRate(cap)
    refuse(rate, 0.0)
    assert rate.is_throttled
    return rate


class TestStart:
    def test_calls_in_a_row_hardly_wait(self) -> None:
        run = Run(lambda _: None, latency=lambda _: 0.02, limit=1)
        virtual_time.run(run.bulk(100))
        assert run.seconds == pytest.approx(100 * 0.02, abs=0.02)

    def test_until_an_attempt_succeeds_150_a_second_start(self) -> None:
        run = Run(lambda _: None, latency=lambda _: 0.4)
        virtual_time.run(run.gather(200))
        # With the burst that makes up for late timers.
        assert sum(start < 0.4 for start in run.starts) == pytest.approx(60, abs=4)

    @pytest.mark.parametrize(("latency", "seconds"), [(0.01, 0.12), (1.0, 0.65)])
    def test_it_costs_a_hundred_calls_some_tenths_of_a_second(
        self, latency: float, seconds: float
    ) -> None:
        run = Run(lambda _: None, latency=lambda _: latency)
        virtual_time.run(run.gather(100))
        assert 0.0 < run.seconds - latency <= seconds

    def test_twenty_thousand_calls_pass_it_once(self) -> None:
        run = Run(lambda _: None, latency=lambda _: 0.01)
        virtual_time.run(run.gather(20_000))
        assert 2.0 < run.seconds <= 2.0 + 0.15

    def test_it_is_over_after_200_successes(self) -> None:
        rate = AdaptiveRate()
        for _ in range(200):
            rate.on_start(0.0)
            assert not rate.is_unlimited
            rate.on_success(0.0)
        rate.on_start(0.0)
        assert rate.is_unlimited

    def test_it_does_not_end_by_waiting(self) -> None:
        """A session that lists its runtimes first, for seconds, knows no more by that."""
        rate = AdaptiveRate()
        rate.on_start(0.0)
        rate.on_success(5.0)
        rate.on_start(60.0)
        assert not rate.is_unlimited
        assert rate._current_rate(60.0) == 190.0

    def test_with_a_shared_pace_there_is_none(self) -> None:
        rate = AdaptiveRate()
        Limiter(100, rate, MemoryPace(rate=1000))
        assert rate.is_unlimited

    def test_eight_processes_learn_of_a_limit_by_few_throttled_requests(self) -> None:
        """Fault: each sent a hundred at once, and a quarter of all requests was throttled."""
        fleet = Fleet(token_bucket(always(200), burst=50), [n / 100 for n in range(8)])
        fleet.run(60.0, 250)
        assert fleet.throttled_share(0.0, 60.0) <= 0.06
        assert fleet.fairness(0.0, min(fleet.ended)) >= 0.85


class TestEvidence:
    """What shows a limit where none is known: several throttled among few others."""

    @pytest.fixture(params=[AdaptiveRate, past_start])
    def rate(self, request: pytest.FixtureRequest) -> AdaptiveRate:
        make: Callable[[], AdaptiveRate] = request.param
        return make()

    def test_one_or_two_throttled_responses_slow_down_no_other_call(
        self, rate: AdaptiveRate
    ) -> None:
        refuse(rate, 0.0, 2)
        assert not rate.is_throttled
        assert rate.delay(0.0, 1) == 0.0

    def test_three_do(self, rate: AdaptiveRate) -> None:
        refuse(rate, 0.0)
        assert rate.is_throttled
        assert not rate.is_starting
        assert rate.delay(0.0, 1) == pytest.approx(0.5)

    def test_successes_in_between_make_up_for_them(self, rate: AdaptiveRate) -> None:
        for _ in range(10):
            refuse(rate, 0.0, 2)
            for _ in range(12):
                rate.on_success(0.0)
        assert not rate.is_throttled

    def test_a_retry_after_needs_no_other(self, rate: AdaptiveRate) -> None:
        rate.on_throttled(0.0, 5.0, 1)
        assert rate.is_throttled
        assert rate.delay(0.0, 0) == 5.0

    def test_two_percent_at_random_cost_hardly_anything(self) -> None:
        """Fault: each was taken for a limit: five times as long, and fifty in bad luck."""
        run = Run(at_random(0.02), latency=lambda _: 0.03)
        virtual_time.run(run.bulk(10_000))
        assert run.seconds <= 2 * 10_000 * 0.03 / 100


class TestUnlimited:
    def test_after_the_start_no_attempt_is_delayed(self) -> None:
        run = Run(lambda _: None, latency=lambda _: 0.2)
        virtual_time.run(run.bulk(10_000))
        later = [start for start in run.starts if start >= 2.0]
        assert len(later) / (max(later) - min(later)) == pytest.approx(100 / 0.2, rel=0.02)

    def test_latency_that_grows_with_load_does_not_slow_down(self) -> None:
        run = Run(lambda _: None, latency=lambda in_flight: 0.005 * in_flight)
        virtual_time.run(run.bulk(2000))
        assert run.requests == 2000
        assert run.seconds <= 1.1 * 2000 * 0.005


class TestFixedLimit:
    @pytest.mark.parametrize(("latency", "gather"), [(0.002, False), (0.1, False), (0.01, True)])
    def test_a_token_bucket_is_used_fully_with_little_throttling(
        self, latency: float, *, gather: bool
    ) -> None:
        run = Run(token_bucket(always(200), burst=50), latency=lambda _: latency)
        virtual_time.run(run.gather(2000) if gather else run.bulk(2000))
        assert run.gave_up == 0
        assert run.seconds <= 1.25 * (2000 - 50) / 200
        assert run.throttled <= 0.1 * run.requests

    def test_with_retry_after_hardly_any_request_is_throttled(self) -> None:
        run = Run(token_bucket(always(200), burst=50, retry_after=1))
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

    @pytest.mark.parametrize(("latency", "limit"), [(1.0, 10), (2.0, 30)])
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

    def test_an_outage_of_429s_costs_few_requests_and_is_forgotten(self) -> None:
        run = Run(lambda now: throttled() if 5 <= now < 35 else None, latency=lambda _: 0.1)
        virtual_time.run(run.bulk(20_000))
        assert run.gave_up == 0
        assert run.throttled <= 0.05 * run.requests
        # A thousand per second before and after the outage, and some time to recover.
        assert run.seconds <= 20 + 30 + 15

    @pytest.mark.parametrize("cap", [None, 50.0])
    def test_throttling_when_the_limit_would_be_lifted_begins_anew(self, cap: float | None) -> None:
        """Fault: the limit was lifted by the response that asked for one."""
        rate = limited(cap)
        rate.on_start(1.0)
        rate.on_throttled(2.0, None, 1)
        rate.on_throttled(1000.0, None, 1)
        assert rate.is_throttled
        assert rate.delay(1000.0, 1) == pytest.approx(0.5)
        assert rate.delay(1001.0, 100) < math.inf

    @pytest.mark.parametrize("steps_down", [True, False])
    def test_a_limit_that_is_gone_is_forgotten(self, *, steps_down: bool) -> None:
        rate = limited()
        rate.on_start(1.0)
        if steps_down:
            rate.on_throttled(2.0, None, 1)
        assert not rate.is_unlimited
        rate.on_start(1000.0)
        assert rate.is_unlimited

    def test_a_rate_with_more_samples_than_are_kept_is_still_measured(self) -> None:
        run = Run(token_bucket(always(5000), burst=50), latency=lambda _: 0.005)
        virtual_time.run(run.bulk(20_000))
        assert run.gave_up == 0
        # At the full rate four seconds; some eight if it is taken to be that of the samples.
        assert run.seconds <= 7


REFUSED, ANSWERED, RECOVERED, REFUSED_AGAIN = "refused", "answered", "recovered", "refused again"


class TestTargetsOfTheirOwn:
    @pytest.mark.parametrize(
        ("others", "is_alone"),
        [
            ([], False),
            ([ANSWERED], True),
            ([REFUSED, ANSWERED], False),
            ([REFUSED] * 9 + [ANSWERED] * 11, False),
            ([REFUSED] * 9 + [ANSWERED] * 12, True),
            ([ANSWERED] + [REFUSED_AGAIN] * 9, True),
            ([REFUSED_AGAIN] * 9 + [ANSWERED], False),
            ([RECOVERED, *[ANSWERED] * 99], False),
        ],
    )
    def test_what_others_are_answered_tells_whether_a_target_is_throttled_alone(
        self, *, others: list[str], is_alone: bool
    ) -> None:
        rate = AdaptiveRate()
        rate.on_throttled(10.0, None, 1)
        for answer in others:
            if answer in {REFUSED, REFUSED_AGAIN}:
                rate.on_throttled(11.0, None, 1, math.inf if answer is REFUSED else 9.0)
            else:
                rate.on_success(11.0, math.inf if answer is ANSWERED else 9.0)

        assert rate.throttles_alone(10.0) is is_alone
        # Nobody has been answered since its next attempt, and of a first nothing is known.
        assert not rate.throttles_alone(12.0)
        assert not rate.throttles_alone(math.inf)

    def test_a_call_that_alone_is_throttled_again_and_again_slows_down_no_other(self) -> None:
        """Fault: a target that was always answered 503 kept a whole session at a crawl."""
        rate = limited()
        last = 0.0
        for now in map(float, range(10, 300, 10)):
            for _ in range(12):
                rate.on_success(now)
            rate.on_throttled(now, None, 1, last)
            rate.on_start(now)
            last = now
        assert not rate.is_throttled

    @pytest.mark.parametrize("recovered", [False, True])
    def test_a_limit_that_only_the_dead_have_shown_is_lifted(self, *, recovered: bool) -> None:
        """Fault: a cluster of dead targets kept the others at a crawl, each slower by a step."""
        rate = limited()
        if recovered:
            rate.on_success(1.0, 0.0)
        for _ in range(12):
            rate.on_success(1.5)
        rate.on_throttled(2.0, None, 1, 1.0)
        assert rate.is_throttled is recovered

    def test_one_that_is_throttled_with_others_does(self) -> None:
        rate = AdaptiveRate()
        for now in map(float, range(30)):
            rate.on_success(now)
            rate.on_throttled(now, None, 1)
            rate.on_throttled(now, None, 1, now - 1.0)
        assert rate.is_throttled

    def test_its_retry_after_is_kept(self) -> None:
        rate = AdaptiveRate()
        for _ in range(10):
            rate.on_success(0.0)
        rate.on_throttled(0.0, 5.0, 1, 0.0)
        assert rate.delay(0.0, 0) == 5.0


class TestGrowthAndPauses:
    """The seconds of a pause are no evidence that the server accepts more."""

    @pytest.fixture
    def growing(self) -> AdaptiveRate:
        """A rate in a slow start from 100 per second at 1 s."""
        rate = limited()
        # A retry that succeeds shows that load was the reason.
        rate.on_success(0.5, 0.0)
        rate._restore(100.0, 1.0)
        for _ in range(50):
            rate.on_success(1.5)
        return rate

    @pytest.mark.parametrize("reason", ["covered", "of its own"])
    def test_a_slow_start_goes_on_after_a_pause_that_is_no_reason_to_slow_down(
        self, growing: AdaptiveRate, reason: str
    ) -> None:
        """Fault: it went on in the pause, and then lifted the limit."""
        if reason == "covered":
            growing._baseline._phase = _Hold(0.1, 20.0)
        growing.on_throttled(2.0, 30.0, 1, 1.0 if reason == "of its own" else math.inf)
        growing.on_start(32.0)

        assert growing.is_throttled
        assert growing._current_rate(32.0) == pytest.approx(100.0 * 2 ** (1 / _DOUBLING))
        assert growing._current_rate(33.0) == pytest.approx(100.0 * 2 ** (2 / _DOUBLING))

    def test_a_probe_that_ends_the_pause_early_lets_it_go_on_then(
        self, growing: AdaptiveRate
    ) -> None:
        growing.on_throttled(2.0, 300.0, 1, 1.0)
        growing.on_start(62.0)
        growing.on_success(63.0)
        assert growing._current_rate(63.0) == pytest.approx(100.0 * 2 ** (1 / _DOUBLING))
        assert growing._current_rate(64.0) == pytest.approx(100.0 * 2 ** (2 / _DOUBLING))

    def test_a_step_down_within_a_longer_pause_grows_after_it(self) -> None:
        """Fault: after a Retry-After of 30 s and a shorter one, the rate grew in the pause."""
        rate = AdaptiveRate()
        rate.on_throttled(0.0, 30.0, 10)
        rate.on_throttled(1.0, 10.0, 10)
        rate.on_start(30.0)
        assert rate.is_throttled
        assert rate._current_rate(30.0) == pytest.approx(rate._epoch_rate)


class TestRandomThrottling:
    @pytest.mark.parametrize(("share", "seconds"), [(0.01, 5), (0.06, 30), (0.3, 120)])
    def test_slowing_down_that_changes_nothing_is_undone(
        self, share: float, seconds: float
    ) -> None:
        run = Run(at_random(share), latency=lambda _: 0.03)
        virtual_time.run(run.bulk(3000))
        assert run.gave_up == 0
        # As a sign of congestion, it would bring the rate down to a few per second: many minutes.
        assert run.seconds <= seconds

    def test_a_retry_after_does_not_keep_the_rate_low(self) -> None:
        run = Run(at_random(0.1, retry_after=0.01), latency=lambda _: 0.03)
        virtual_time.run(run.bulk(3000))
        assert run.gave_up == 0
        assert run.seconds <= 60

    # All but the first took twice as long before there was a plateau, and a trial.
    @pytest.mark.parametrize(("share", "seed"), [(0.05, 1), (0.05, 12), (0.02, 13)])
    def test_a_rate_limit_is_still_found(self, share: float, seed: int) -> None:
        """Fault: a comparison that declined by bad luck began again at a tenth of the rate."""
        random.seed(seed)
        run = Run(at_random(share, otherwise=token_bucket(always(200), burst=50), seed=seed))
        virtual_time.run(run.bulk(10_000))
        assert run.gave_up == 0
        assert run.throttled <= 2 * share * run.requests
        assert run.seconds <= 2 * (10_000 - 50) / 200

    def test_throttling_that_ends_in_a_trial_lifts_the_limit(self) -> None:
        """Fault: a trial that nothing was throttled in held the rate for ever."""
        random.seed(1)
        usual = at_random(0.05, seed=1)
        run = Run(lambda now: usual(now) if now < 10 else None, latency=lambda _: 0.1)
        virtual_time.run(run.bulk(20_000))
        # A thousand per second at most, and ten seconds of throttling.
        assert run.seconds <= 20 + 10 + 10

    def test_a_trial_that_passes_in_a_pause_begins_a_slow_start_after_it(self) -> None:
        """Fault: the pause counted as time of the slow start, which then lifted the limit."""
        rate = limited()
        rate._baseline._phase = trial = _Trial(0.1, 61.0)
        rate._baseline._rate_before = 100.0
        rate._restore(100.0, 1.0)
        rate.on_throttled(1.0, 30.0, 1)
        while rate._baseline._phase is trial:
            rate.on_success(1.1)

        assert rate.delay(1.1, 0) == 29.9
        rate.on_start(31.0)
        assert rate.is_throttled
        assert rate._current_rate(31.0) == 100.0
        assert rate._current_rate(32.0) == pytest.approx(100.0 * 2 ** (1 / _DOUBLING))

    def test_an_outage_of_429s_is_not_mistaken_for_it(self) -> None:
        usual = at_random(0.05)
        run = Run(lambda now: throttled() if 20 <= now < 50 else usual(now), latency=lambda _: 0.1)
        virtual_time.run(run.bulk(20_000))
        assert run.gave_up == 0
        assert run.throttled <= (0.05 + 0.05) * run.requests


class TestCap:
    @pytest.mark.parametrize("cap", [1, 300])
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


@in_virtual_time
class TestLimiter:
    async def test_retries_are_admitted_before_new_calls_and_polls_last(self) -> None:
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

        assert admitted == ["retry", "new", "poll"]

    async def test_a_retry_after_beyond_max_wait_fails_current_and_future_waiters(self) -> None:
        """Fault: a days-long Retry-After is waited out (openai family)."""
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
        first, second = await asyncio.gather(impatient, patient, return_exceptions=True)

        assert isinstance(first, BctrlRateLimitError)
        assert first.retry_after == pytest.approx(3600)
        assert (first.status, first.may_have_stopped) == (None, False)
        assert second is None
        # Its patience would last for the whole hour, so it waits; a minute later it is the probe.
        assert virtual_time.now() == pytest.approx(61)

    async def test_a_wait_that_becomes_shorter_ends_in_time(self) -> None:
        limiter = Limiter(2, AdaptiveRate(cap=0.1))
        assert limiter.acquire_nowait()
        cancelled = asyncio.create_task(limiter.acquire(60.0))
        waiting = asyncio.create_task(limiter.acquire(60.0))
        await asyncio.sleep(1)
        cancelled.cancel()
        limiter.release("a runtime")
        await waiting

        assert virtual_time.now() == pytest.approx(10, rel=0.01)
