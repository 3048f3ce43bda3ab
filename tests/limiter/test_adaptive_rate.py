"""The adaptive rate, decision by decision."""

from __future__ import annotations

import math

import pytest
from pacing import MemoryPace

from bctrl_async._limiter.baseline import _Hold, _Trial
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.rate import _DOUBLING, AdaptiveRate


def refuse(rate: AdaptiveRate, times: int = 3) -> None:
    for _ in range(times):
        rate.on_throttled(0.0, None, 1)


def limited() -> AdaptiveRate:
    """Make a rate whose server has shown at 0 s that it has a limit."""
    rate = AdaptiveRate()
    refuse(rate)
    assert rate.is_throttled
    return rate


class TestStart:
    def test_it_is_over_after_200_successes_and_not_by_waiting(self) -> None:
        """Fault: a session that listed its runtimes first, for seconds, started at full speed."""
        rate = AdaptiveRate()
        for now in range(200):
            rate.on_start(now)
            assert not rate.is_unlimited
            assert rate._current_rate(now) == 150.0 + 40.0 * now
            rate.on_success(now)
        rate.on_start(200.0)
        assert rate.is_unlimited

    def test_with_a_shared_pace_there_is_none(self) -> None:
        rate = AdaptiveRate()
        Limiter(100, rate, MemoryPace(rate=1000))
        assert rate.is_unlimited


@pytest.mark.parametrize(("times", "delay"), [(2, 0.0), (3, 0.5)])
def test_the_third_throttled_response_slows_down_other_calls(times: int, delay: float) -> None:
    rate = AdaptiveRate()
    refuse(rate, times)
    assert rate.is_throttled is (times == 3)
    assert rate.delay(0.0, 1) == pytest.approx(delay)


class TestLifting:
    def test_throttling_when_the_limit_would_be_lifted_starts_anew(self) -> None:
        """Fault: the limit was lifted by the response that asked for one."""
        rate = limited()
        rate.on_start(1.0)
        rate.on_throttled(2.0, None, 1)
        rate.on_throttled(1000.0, None, 1)
        assert rate.is_throttled
        assert rate.delay(1000.0, 1) == pytest.approx(0.5)
        assert rate.delay(1001.0, 100) < math.inf

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

    @pytest.mark.parametrize("reason", ["covered", "of its own", "probed"])
    def test_a_slow_start_goes_on_after_a_pause_that_is_no_reason_to_slow_down(
        self, growing: AdaptiveRate, reason: str
    ) -> None:
        """Fault: it went on in the pause, and then lifted the limit."""
        if reason == "covered":
            growing._baseline._phase = _Hold(0.1, 20.0)
        growing.on_throttled(
            2.0, 300.0 if reason == "probed" else 30.0, 1, math.inf if reason == "covered" else 1.0
        )
        growing.on_start(32.0)
        if reason == "probed":
            growing.on_success(32.0)

        assert growing.is_throttled
        assert growing._current_rate(32.0) == pytest.approx(100.0 * 2 ** (1 / _DOUBLING))
        assert growing._current_rate(33.0) == pytest.approx(100.0 * 2 ** (2 / _DOUBLING))

    def test_a_step_down_within_a_longer_pause_grows_after_it(self) -> None:
        """Fault: after a Retry-After of 30 s and a shorter one, the rate grew in the pause."""
        rate = AdaptiveRate()
        rate.on_throttled(0.0, 30.0, 10)
        rate.on_throttled(1.0, 10.0, 10)
        rate.on_start(30.0)
        assert rate.is_throttled
        assert rate._current_rate(30.0) == pytest.approx(rate._epoch_rate)

    def test_a_trial_that_passes_in_a_pause_starts_slowly_after_it(self) -> None:
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
