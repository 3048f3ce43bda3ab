"""Which refusals are no reason to slow down: the rules, one by one."""

from __future__ import annotations

import pytest

from bctrl_async._limiter.baseline import RefusalBaseline


def answer(baseline: RefusalBaseline, accepted: int, refused: int) -> None:
    for _ in range(accepted):
        baseline.on_success()
    for _ in range(refused):
        baseline.on_throttled()


def step_down(
    baseline: RefusalBaseline, now: float, shares: list[float], rates: list[float]
) -> list[float | None]:
    """Steps down from these rates, before each of which this share of 100 was refused."""
    found = []
    for share, rate in zip(shares, rates, strict=True):
        answer(baseline, round(100 * (1 - share)), round(100 * share))
        found.append(baseline.record_step(now, rate))
    return found


FALLING = [100.0, 85.0, 72.0, 61.0, 52.0, 44.0]


@pytest.fixture
def in_vain() -> RefusalBaseline:
    """One that has found, at 0 s, that a tenth is refused whatever the pace."""
    baseline = RefusalBaseline()
    assert step_down(baseline, 0.0, [0.1] * 6, FALLING)[-1] == 100.0
    return baseline


class TestJudgement:
    def test_a_share_that_stays_shows_that_slowing_down_is_in_vain(self) -> None:
        found = step_down(RefusalBaseline(), 0.0, [0.1] * 6, FALLING)
        assert found == [None] * 5 + [100.0]

    def test_a_share_that_falls_shows_that_it_helps(self) -> None:
        shares = [0.2, 0.2, 0.2, 0.1, 0.1, 0.1]
        assert step_down(RefusalBaseline(), 0.0, shares, FALLING) == [None] * 6

    def test_a_rate_that_is_kept_shows_nothing(self) -> None:
        rates = [100.0, 95.0, 90.0, 85.0, 80.0, 75.0]
        assert step_down(RefusalBaseline(), 0.0, [0.1] * 6, rates) == [None] * 6

    @pytest.mark.parametrize(("share", "back_to"), [(0.5, 100.0), (0.6, None), (1.0, None)])
    def test_who_refuses_more_than_half_is_slowed_down_for(
        self, share: float, back_to: float | None
    ) -> None:
        assert step_down(RefusalBaseline(), 0.0, [share] * 6, FALLING)[-1] == back_to

    def test_the_last_six_steps_count(self) -> None:
        baseline = RefusalBaseline()
        assert step_down(baseline, 0.0, [0.9], [500.0]) == [None]
        assert step_down(baseline, 0.0, [0.1] * 6, FALLING)[-1] == 100.0

    def test_after_a_judgement_it_takes_six_further_steps(self, in_vain: RefusalBaseline) -> None:
        assert step_down(in_vain, 20.0, [0.1] * 6, FALLING) == [None] * 5 + [100.0]


class TestExplanation:
    def test_nothing_is_explained_before_anything_is_known(self) -> None:
        baseline = RefusalBaseline()
        answer(baseline, 99, 1)
        assert not baseline.covers(0.0)

    def test_the_share_that_was_found_is_explained_for_ten_seconds(
        self, in_vain: RefusalBaseline
    ) -> None:
        answer(in_vain, 90, 10)
        assert in_vain.covers(9.9)
        assert not in_vain.covers(10.0)

    def test_then_for_twice_as_long_but_a_minute_at_most(self, in_vain: RefusalBaseline) -> None:
        now = 0.0
        for expected in (20.0, 40.0, 60.0, 60.0):
            now += 100.0
            assert step_down(in_vain, now, [0.1] * 6, FALLING)[-1] == 100.0
            assert in_vain.covers(now + expected - 0.1)
            assert not in_vain.covers(now + expected)

    @pytest.mark.parametrize(("refused", "covered"), [(15, True), (22, True), (24, False)])
    def test_more_is_explained_only_as_far_as_chance_goes(
        self, in_vain: RefusalBaseline, refused: int, *, covered: bool
    ) -> None:
        # Of a hundred ten are expected, give or take three: four times that, and one.
        answer(in_vain, 100 - refused, refused)
        assert in_vain.covers(1.0) is covered

    def test_what_was_too_much_once_ends_the_explanation(self, in_vain: RefusalBaseline) -> None:
        answer(in_vain, 50, 50)
        assert not in_vain.covers(1.0)
        answer(in_vain, 1000, 0)
        assert not in_vain.covers(2.0)

    def test_long_ago_is_no_excuse_for_a_burst_of_refusals(self, in_vain: RefusalBaseline) -> None:
        answer(in_vain, 190, 10)
        assert in_vain.covers(1.0)
        answer(in_vain, 0, 15)
        assert not in_vain.covers(1.1)
