"""The baseline of throttling that does not depend on the request rate."""

from __future__ import annotations

import pytest

from bctrl_async._limiter.baseline import RefusalBaseline


def record(baseline: RefusalBaseline, successes: int, throttled: int) -> None:
    for _ in range(successes):
        baseline.on_success()
    for _ in range(throttled):
        baseline.on_throttled()


def step_down(
    baseline: RefusalBaseline, now: float, shares: list[float], rates: list[float]
) -> list[float | None]:
    """Step down from each rate, after 100 responses with its throttled share."""
    restored = []
    for share, rate in zip(shares, rates, strict=True):
        record(baseline, round(100 * (1 - share)), round(100 * share))
        restored.append(baseline.record_step(now, rate))
    return restored


FALLING = [100.0, 85.0, 72.0, 61.0, 52.0, 44.0]


@pytest.fixture
def tenth() -> RefusalBaseline:
    """A baseline that has found, at 0 s, that a tenth is throttled at any rate."""
    baseline = RefusalBaseline()
    assert step_down(baseline, 0.0, [0.1] * 6, FALLING)[-1] == 100.0
    return baseline


class TestRecordStep:
    def test_an_unchanged_share_restores_the_rate(self) -> None:
        restored = step_down(RefusalBaseline(), 0.0, [0.1] * 6, FALLING)
        assert restored == [None] * 5 + [100.0]

    def test_a_falling_share_restores_nothing(self) -> None:
        shares = [0.2, 0.2, 0.2, 0.1, 0.1, 0.1]
        assert step_down(RefusalBaseline(), 0.0, shares, FALLING) == [None] * 6

    def test_a_rate_that_hardly_fell_restores_nothing(self) -> None:
        rates = [100.0, 95.0, 90.0, 85.0, 80.0, 75.0]
        assert step_down(RefusalBaseline(), 0.0, [0.1] * 6, rates) == [None] * 6

    @pytest.mark.parametrize(("share", "restored"), [(0.5, 100.0), (0.6, None), (1.0, None)])
    def test_a_share_of_more_than_half_restores_nothing(
        self, share: float, restored: float | None
    ) -> None:
        assert step_down(RefusalBaseline(), 0.0, [share] * 6, FALLING)[-1] == restored

    def test_only_the_last_six_steps_count(self) -> None:
        baseline = RefusalBaseline()
        assert step_down(baseline, 0.0, [0.9], [500.0]) == [None]
        assert step_down(baseline, 0.0, [0.1] * 6, FALLING)[-1] == 100.0

    def test_the_next_comparison_takes_six_further_steps(self, tenth: RefusalBaseline) -> None:
        assert step_down(tenth, 20.0, [0.1] * 6, FALLING) == [None] * 5 + [100.0]


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

    def test_throttling_above_the_baseline_ends_it(self, tenth: RefusalBaseline) -> None:
        record(tenth, 50, 50)
        assert not tenth.covers(1.0)
        record(tenth, 1000, 0)
        assert not tenth.covers(2.0)

    def test_old_successes_do_not_cover_a_burst_of_throttling(self, tenth: RefusalBaseline) -> None:
        record(tenth, 190, 10)
        assert tenth.covers(1.0)
        record(tenth, 0, 15)
        assert not tenth.covers(1.1)
