"""The baseline of throttling that does not depend on the request rate."""

from __future__ import annotations

import random

import pytest

from bctrl_async._limiter.baseline import RefusalBaseline

FALLING = [100.0, 85.0, 72.0, 61.0, 52.0, 44.0]


def record(baseline: RefusalBaseline, successes: int, throttled: int) -> None:
    for _ in range(successes):
        baseline.on_success()
    for _ in range(throttled):
        baseline.on_throttled()


def record_at_random(baseline: RefusalBaseline, share: float, throttled: int, seed: int) -> None:
    rng = random.Random(seed)
    while throttled:
        if rng.random() < share:
            baseline.on_throttled()
            throttled -= 1
        else:
            baseline.on_success()


def step_down(
    baseline: RefusalBaseline, now: float, shares: list[float], rates: list[float], seed: int = 3
) -> list[float]:
    """Step down from each rate, after 4 throttled responses; return the rates to restore."""
    restored = []
    for number, (share, rate) in enumerate(zip(shares, rates, strict=True)):
        record_at_random(baseline, share, 4, seed + number)
        restored.append(baseline.record_step(now, rate))
    return [rate for rate in restored if rate is not None]


@pytest.fixture
def tenth() -> RefusalBaseline:
    """A baseline that has found, at 0 s, that a tenth is throttled at any rate."""
    baseline = RefusalBaseline()
    assert step_down(baseline, 0.0, [0.1] * 6, FALLING) == [100.0]
    baseline._share = 0.1
    return baseline


class TestRecordStep:
    def test_an_unchanged_share_restores_the_rate(self) -> None:
        assert step_down(RefusalBaseline(), 0.0, [0.1] * 6, FALLING) == [100.0]

    def test_a_falling_share_restores_nothing(self) -> None:
        shares = [0.4, 0.4, 0.4, 0.05, 0.05, 0.05]
        assert step_down(RefusalBaseline(), 0.0, shares, FALLING) == []

    def test_a_rate_that_hardly_fell_restores_nothing(self) -> None:
        rates = [100.0, 95.0, 90.0, 85.0, 80.0, 75.0]
        assert step_down(RefusalBaseline(), 0.0, [0.1] * 6, rates) == []

    def test_a_share_of_more_than_half_restores_nothing(self) -> None:
        assert step_down(RefusalBaseline(), 0.0, [0.8] * 6, FALLING) == []

    def test_throttling_in_bursts_restores_nothing(self) -> None:
        """Fault: the load of other clients was taken for throttling at any rate."""
        baseline = RefusalBaseline()
        for rate in [*FALLING, *FALLING]:
            record(baseline, 40, 4)
            assert baseline.record_step(0.0, rate) is None

    def test_a_share_that_rises_and_stays_restores_the_first_rate(self) -> None:
        shares = [0.05] * 3 + [0.3] * 6
        rates = [*FALLING, 37.0, 32.0, 27.0]
        assert step_down(RefusalBaseline(), 0.0, shares, rates) == [100.0]

    def test_a_share_that_fell_and_stays_restores_the_rate_since(self) -> None:
        shares = [0.4] * 3 + [0.05] * 6
        rates = [*FALLING, 37.0, 32.0, 27.0]
        (restored,) = step_down(RefusalBaseline(), 0.0, shares, rates)
        assert 27.0 < restored < 100.0


class TestPlateau:
    def test_there_is_none_without_a_group_of_throttled_responses(self) -> None:
        baseline = RefusalBaseline()
        step_down(baseline, 0.0, [0.05] * 2, [100.0, 85.0])
        assert baseline.plateau == 0.0

    def test_a_comparison_keeps_an_eighth_of_the_rate(self) -> None:
        baseline = RefusalBaseline()
        step_down(baseline, 0.0, [0.05] * 4, [100.0, 85.0, 72.0, 61.0])
        assert baseline.plateau == 100.0 / 8

    def test_a_limit_far_below_the_rate_leaves_none(self) -> None:
        baseline = RefusalBaseline()
        step_down(baseline, 0.0, [0.4] * 4, [100.0, 85.0, 72.0, 61.0])
        assert baseline.plateau == 0.0


class TestCovers:
    def test_nothing_is_covered_without_a_baseline(self) -> None:
        baseline = RefusalBaseline()
        record(baseline, 99, 1)
        assert not baseline.covers(0.0)

    def test_a_baseline_holds_for_ten_seconds(self, tenth: RefusalBaseline) -> None:
        record(tenth, 90, 10)
        assert tenth.covers(9.9)
        assert not tenth.covers(10.0)

    def test_the_hold_doubles_up_to_a_minute(self, tenth: RefusalBaseline) -> None:
        now = 0.0
        for expected in (20.0, 40.0, 60.0, 60.0):
            now += 100.0
            assert step_down(tenth, now, [0.1] * 6, FALLING)[-1] == 100.0
            assert tenth.covers(now + expected - 0.1)
            assert not tenth.covers(now + expected)

    @pytest.mark.parametrize(("throttled", "covered"), [(15, True), (22, True), (24, False)])
    def test_it_allows_for_chance(
        self, tenth: RefusalBaseline, throttled: int, *, covered: bool
    ) -> None:
        # Of 100, 10 are expected with a deviation of 3; 10 + 4 * 3 + 1 = 23 are covered.
        record(tenth, 100 - throttled, throttled)
        assert tenth.covers(1.0) is covered

    def test_throttling_above_the_baseline_does_not_end_it(self, tenth: RefusalBaseline) -> None:
        record(tenth, 50, 50)
        assert not tenth.covers(1.0)
        record(tenth, 90, 10)
        assert tenth.covers(2.0)

    def test_old_successes_do_not_cover_a_burst_of_throttling(self, tenth: RefusalBaseline) -> None:
        record(tenth, 190, 10)
        assert tenth.covers(1.0)
        record(tenth, 0, 15)
        assert not tenth.covers(1.1)
