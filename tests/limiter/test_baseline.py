"""The baseline of throttling that does not depend on the request rate."""

from __future__ import annotations

import random

import pytest

from bctrl_async._limiter.baseline import RefusalBaseline

FALLING = [100.0, 85.0, 72.0, 61.0, 52.0, 44.0, 40.0]
RATE = 100.0
"""The first of them, which is restored for a trial and after one that passed."""


def record(baseline: RefusalBaseline, now: float, successes: int, throttled: int) -> None:
    for _ in range(successes):
        baseline.on_success(now)
    for _ in range(throttled):
        baseline.on_throttled(now)


def record_at_random(
    baseline: RefusalBaseline, now: float, share: float, throttled: int, seed: int
) -> None:
    rng = random.Random(seed)
    while throttled:
        if rng.random() < share:
            baseline.on_throttled(now)
            throttled -= 1
        else:
            baseline.on_success(now)


def step_down(
    baseline: RefusalBaseline,
    shares: list[float],
    rates: list[float] = FALLING,
    *,
    now: float = -10.0,
    seed: int = 1,
) -> list[float]:
    """Step down to each rate, 1.5 s and 4 throttled responses apart; return what is restored.

    The throttled responses before the first step are as many, but their share is not recorded.
    """
    restored = []
    for number, (share, rate) in enumerate(zip(shares, rates, strict=True)):
        time = now + 1.5 * number
        record_at_random(baseline, time, share, 4, seed + number)
        restored.append(baseline.record_step(time, rate))
    return [each for each in restored if each is not None]


def end_trial(baseline: RefusalBaseline, now: float, share: float, seed: int = 0) -> float | None:
    """Record responses until the trial is decided; return what is restored."""
    rng = random.Random(seed)
    for _ in range(10_000):
        if rng.random() >= share:
            restored = baseline.on_success(now)
            if restored is not None:
                return restored
        else:
            baseline.on_throttled(now)
            if not baseline.covers(now):
                return baseline.record_step(now, 100.0)
    pytest.fail("it is not decided")


@pytest.fixture
def tried() -> RefusalBaseline:
    """A baseline that tries, since -1 s, whether a tenth is throttled at 100 per second as well."""
    baseline = RefusalBaseline()
    assert step_down(baseline, [0.1] * 7) == [RATE]
    assert baseline.is_trying
    return baseline


@pytest.fixture
def tenth(tried: RefusalBaseline) -> RefusalBaseline:
    """A baseline that has found, at 0 s, that a tenth is throttled at any rate."""
    assert end_trial(tried, 0.0, 0.1) == RATE
    assert not tried.is_trying
    assert tried._phase is not None
    tried._phase.share = 0.1
    tried._phase.responses = tried._phase.throttled = 0
    return tried


class TestRecordStep:
    @pytest.mark.parametrize(
        ("shares", "rates", "restored"),
        [
            ([0.1] * 7, FALLING, [RATE]),
            ([0.05] * 4 + [0.3] * 6, [*FALLING, 37.0, 32.0, 27.0], [RATE]),
            ([0.4] * 4 + [0.05] * 3, FALLING, []),
            ([0.8] * 7, FALLING, []),
            ([0.1] * 7, [100.0, 95.0, 90.0, 85.0, 80.0, 75.0, 70.0], []),
        ],
        ids=["unchanged", "rises and stays", "falls", "over a half", "the rate hardly fell"],
    )
    def test_a_share_that_stays_while_the_rate_falls_begins_a_trial_at_the_old_rate(
        self, shares: list[float], rates: list[float], restored: list[float]
    ) -> None:
        assert step_down(RefusalBaseline(), shares, rates) == restored

    def test_a_burst_before_the_first_step_counts_for_nothing(self) -> None:
        """Fault: a server's first burst was compared with what followed."""
        baseline = RefusalBaseline()
        record(baseline, -11.0, 0, 50)
        assert step_down(baseline, [0.1] * 7) == [RATE]

    def test_throttling_in_bursts_restores_nothing(self) -> None:
        """Fault: the load of other clients was taken for throttling at any rate."""
        baseline = RefusalBaseline()
        for number, rate in enumerate([*FALLING, *FALLING]):
            record(baseline, 1.5 * number, 40, 4)
            assert baseline.record_step(1.5 * number, rate) is None

    def test_a_share_that_is_the_same_for_two_seconds_only_restores_nothing(self) -> None:
        """Fault: while others adapted to a limit, their load was taken for random throttling."""
        baseline = RefusalBaseline()
        for number, rate in enumerate(FALLING):
            record_at_random(baseline, number / 2, 0.1, 4, 1 + number)
            assert baseline.record_step(number / 2, rate) is None

    def test_a_share_that_fell_and_stays_tries_the_rate_since(self) -> None:
        rates = [*FALLING, 37.0, 32.0, 27.0]
        (tried,) = step_down(RefusalBaseline(), [0.4] * 4 + [0.05] * 6, rates)
        assert 27.0 < tried < 100.0


class TestTrial:
    def test_all_is_covered_until_it_is_decided(self, tried: RefusalBaseline) -> None:
        record(tried, 0.0, 20, 4)
        assert tried.covers(0.0)

    def test_a_share_that_does_not_grow_restores_the_rate(self, tried: RefusalBaseline) -> None:
        assert end_trial(tried, 0.0, 0.1) == RATE
        record(tried, 0.1, 9, 1)
        assert tried.covers(0.1)

    def test_a_share_that_grows_with_the_rate_does_not(self, tried: RefusalBaseline) -> None:
        """Fault: each of many clients on one limit ignored what the others throttled."""
        assert end_trial(tried, 0.0, 0.3) is None
        assert not tried.covers(0.1)

    def test_throttling_that_ends_restores_the_rate(self, tried: RefusalBaseline) -> None:
        """Fault: a trial that nothing was throttled in held the rate for ever."""
        assert end_trial(tried, 0.0, 0.0) == RATE

    def test_after_a_minute_the_likelier_result_is_taken(self, tried: RefusalBaseline) -> None:
        record(tried, 58.0, 10, 0)
        assert tried.on_success(58.9) is None
        assert tried.on_success(59.0) == RATE

    def test_after_a_minute_a_throttled_response_ends_it_as_well(
        self, tried: RefusalBaseline
    ) -> None:
        record(tried, 58.0, 20, 1)
        tried.on_throttled(59.0)
        assert not tried.covers(59.0)
        assert tried.record_step(59.0, 100.0) == RATE

    def test_after_a_minute_a_share_that_seems_to_grow_is_not_covered(
        self, tried: RefusalBaseline
    ) -> None:
        record(tried, 58.0, 10, 4)
        assert tried.covers(58.9)
        assert not tried.covers(59.0)
        assert tried.on_success(59.0) is None
        assert tried.record_step(59.0, 100.0) is None

    def test_one_that_fails_ends_the_baseline_before(self, tenth: RefusalBaseline) -> None:
        """Fault: the share that a trial had found to depend on the rate was covered."""
        assert step_down(tenth, [0.1] * 7, now=1.0) == [RATE]
        assert end_trial(tenth, 11.0, 0.3) is None
        # The first count of a baseline would include the trial.
        for now in (12.0, 12.1):
            record(tenth, now, 9, 1)
            assert not tenth.covers(now)

    def test_the_next_one_is_ten_seconds_later_and_then_twenty_up_to_a_minute(
        self, tried: RefusalBaseline
    ) -> None:
        now = 0.0
        for apart in (10.0, 20.0, 40.0, 60.0, 60.0):
            assert end_trial(tried, now, 0.3) is None
            assert step_down(tried, [0.1] * 7, now=now) == []
            # The same evidence serves when it is time.
            now += apart
            assert tried.record_step(now - 0.1, 40.0) is None
            assert tried.record_step(now, 40.0) == RATE

    def test_a_success_lets_the_next_failure_cost_ten_seconds_again(
        self, tried: RefusalBaseline
    ) -> None:
        for now, share in ((0.0, 0.3), (100.0, 0.1), (200.0, 0.3)):
            if now:
                assert step_down(tried, [0.1] * 7, now=now - 10.0) == [RATE]
            end_trial(tried, now, share)

        assert step_down(tried, [0.1] * 7, now=200.0) == []
        assert tried.record_step(210.0, 40.0) == RATE


class TestPlateau:
    @pytest.mark.parametrize(
        ("shares", "plateau"),
        [([0.05] * 5, 45.0), ([0.05] * 3, 0.0), ([0.4] * 5, 0.0)],
        ids=["less than half of the rate", "too few responses", "a limit far below the rate"],
    )
    def test_a_comparison_keeps_a_rate(self, shares: list[float], plateau: float) -> None:
        baseline = RefusalBaseline()
        step_down(baseline, shares, FALLING[: len(shares)])
        assert baseline.plateau == plateau


class TestCovers:
    def test_nothing_is_covered_without_a_baseline(self) -> None:
        baseline = RefusalBaseline()
        record(baseline, 0.0, 99, 1)
        assert not baseline.covers(0.0)

    def test_a_baseline_holds_for_twenty_seconds(self, tenth: RefusalBaseline) -> None:
        record(tenth, 1.0, 90, 10)
        assert tenth.covers(19.9)
        assert not tenth.covers(20.0)

    def test_the_hold_doubles_up_to_a_minute(self, tenth: RefusalBaseline) -> None:
        now = 0.0
        for expected in (40.0, 60.0, 60.0):
            now += 100.0
            assert step_down(tenth, [0.1] * 7, now=now - 12.0) == [RATE]
            assert end_trial(tenth, now, 0.1) == RATE
            record(tenth, now, 9, 1)
            assert tenth.covers(now + expected - 0.1)
            assert not tenth.covers(now + expected)

    @pytest.mark.parametrize(("throttled", "covered"), [(15, True), (20, True), (21, False)])
    def test_it_allows_for_chance(
        self, tenth: RefusalBaseline, throttled: int, *, covered: bool
    ) -> None:
        # Of 100, 10 are expected with a deviation of 3; 10 + 3 * 3 + 1 = 20 are covered.
        record(tenth, 1.0, 100 - throttled, throttled)
        assert tenth.covers(1.0) is covered

    def test_throttling_above_the_baseline_does_not_end_it(self, tenth: RefusalBaseline) -> None:
        record(tenth, 1.0, 50, 50)
        assert not tenth.covers(1.0)
        record(tenth, 2.0, 90, 10)
        assert tenth.covers(2.0)

    def test_old_successes_do_not_cover_a_burst_of_throttling(self, tenth: RefusalBaseline) -> None:
        record(tenth, 1.0, 990, 10)
        assert tenth.covers(1.0)
        record(tenth, 1.1, 0, 15)
        assert not tenth.covers(1.1)
