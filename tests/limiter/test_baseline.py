"""The baseline of throttling that does not depend on the request rate."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bctrl_async._limiter.baseline import ThrottlingBaseline

STEADY = [0.1] * 7
FALLING = [100.0, 85.0, 72.0, 61.0, 52.0, 44.0, 40.0]
RATE = 100.0
"""The first of them, which is restored for a trial and after a trial that passed."""


def record(
    baseline: ThrottlingBaseline, now: float, successes: int, throttled: int
) -> None:
    for _ in range(successes):
        baseline.on_success(now)
    for _ in range(throttled):
        baseline.on_throttled(now)


def record_at_random(
    baseline: ThrottlingBaseline, now: float, share: float, seed: int
) -> None:
    """Record responses at random, up to the fourth that is throttled."""
    rng = random.Random(seed)
    throttled = 0
    while throttled < 4:
        if rng.random() < share:
            baseline.on_throttled(now)
            throttled += 1
        else:
            baseline.on_success(now)


def step_down(
    baseline: ThrottlingBaseline,
    shares: list[float],
    rates: list[float] = FALLING,
    *,
    now: float = -10.0,
    apart: float = 1.5,
    in_bursts: bool = False,
) -> list[float]:
    """Step down to each rate, 4 throttled after the last; return what is restored.

    The throttled responses before the first step are as many, but their share is not
    recorded.
    """
    restored = []
    for number, (share, rate) in enumerate(zip(shares, rates, strict=True)):
        time = now + apart * number
        if in_bursts:
            record(baseline, time, round(4 / share), 4)
        else:
            record_at_random(baseline, time, share, 1 + number)
        restored.append(baseline.record_step(time, rate))
    return [rate for rate in restored if rate is not None]


def end_trial(baseline: ThrottlingBaseline, now: float, share: float) -> float | None:
    """Record responses until the trial is decided; return what is restored."""
    rng = random.Random(0)
    while True:
        if rng.random() >= share:
            restored = baseline.on_success(now)
            if restored is not None:
                return restored
        else:
            baseline.on_throttled(now)
            if not baseline.covers(now):
                return baseline.record_step(now, RATE)


@pytest.fixture
def tried() -> ThrottlingBaseline:
    """A baseline that tries 100 per second, where a tenth was throttled, since -1 s."""
    baseline = ThrottlingBaseline()
    assert step_down(baseline, STEADY) == [RATE]
    assert baseline.is_trying
    return baseline


@pytest.fixture
def tenth(tried: ThrottlingBaseline) -> ThrottlingBaseline:
    """A baseline that has found, at 0 s, that a tenth is throttled at any rate."""
    assert end_trial(tried, 0.0, 0.1) == RATE
    assert tried._phase is not None
    tried._phase.share = 0.1
    tried._phase.responses = tried._phase.throttled = 0
    return tried


COMPARISONS: dict[str, tuple[list[float], list[float], dict[str, Any], list[float]]] = {
    "unchanged": (STEADY, FALLING, {}, [RATE]),
    "rises and stays": (
        [0.05] * 4 + [0.3] * 6,
        [*FALLING, 37.0, 32.0, 27.0],
        {},
        [RATE],
    ),
    "falls": ([0.4] * 4 + [0.05] * 3, FALLING, {}, []),
    "over a half": ([0.8] * 7, FALLING, {}, []),
    "the rate hardly fell": (
        STEADY,
        [100.0, 95.0, 90.0, 85.0, 80.0, 75.0, 70.0],
        {},
        [],
    ),
    # Fault: the load of other clients was taken for throttling at any rate.
    "in bursts": (STEADY * 2, FALLING * 2, {"in_bursts": True}, []),
    # Fault: while others adapted to a limit, their load was taken for random
    # throttling.
    "unchanged for two seconds only": (STEADY, FALLING, {"apart": 0.5}, []),
}


class TestComparison:
    """A share that stays while the rate falls starts a trial at the old rate."""

    @pytest.mark.parametrize("case", COMPARISONS)
    def test_a_trial_is_started_if_the_share_is(self, case: str) -> None:
        shares, rates, options, restored = COMPARISONS[case]
        assert step_down(ThrottlingBaseline(), shares, rates, **options) == restored

    def test_a_burst_before_the_first_step_counts_for_nothing(self) -> None:
        """Fault: a server's first burst was compared with what followed."""
        baseline = ThrottlingBaseline()
        record(baseline, -11.0, 0, 50)
        assert step_down(baseline, STEADY) == [RATE]

    def test_a_share_that_fell_and_stays_tries_the_rate_since(self) -> None:
        rates = [*FALLING, 37.0, 32.0, 27.0]
        (tried,) = step_down(ThrottlingBaseline(), [0.4] * 4 + [0.05] * 6, rates)
        assert 27.0 < tried < RATE

    @pytest.mark.parametrize(
        ("shares", "plateau"),
        [([0.05] * 5, 45.0), ([0.05] * 3, 0.0), ([0.4] * 5, 0.0)],
        ids=[
            "less than half of the rate",
            "too few responses",
            "a limit far below the rate",
        ],
    )
    def test_meanwhile_a_rate_is_kept(
        self, shares: list[float], plateau: float
    ) -> None:
        baseline = ThrottlingBaseline()
        step_down(baseline, shares, FALLING[: len(shares)])
        assert baseline.plateau == plateau


class TestTrial:
    # Fault: a trial that nothing was throttled in held the rate for ever.
    @pytest.mark.parametrize("share", [0.1, 0.0])
    def test_if_the_share_stays_so_does_the_rate(
        self, tried: ThrottlingBaseline, share: float
    ) -> None:
        record(tried, 0.0, 20, 4)
        assert tried.covers(0.0)
        assert end_trial(tried, 0.0, share) == RATE
        record(tried, 0.1, 9, 1)
        assert tried.covers(0.1)

    def test_a_share_that_grows_with_the_rate_does_not(
        self, tried: ThrottlingBaseline
    ) -> None:
        """Fault: each client on one limit ignored the throttling by the others."""
        assert end_trial(tried, 0.0, 0.3) is None
        assert not tried.covers(0.1)

    def test_after_a_minute_the_likelier_result_is_taken(
        self, tried: ThrottlingBaseline
    ) -> None:
        record(tried, 58.0, 20, 1)
        assert tried.covers(58.9)
        tried.on_throttled(59.0)
        assert not tried.covers(59.0)
        assert tried.record_step(59.0, RATE) == RATE

    def test_if_it_fails_the_baseline_before_it_ends(
        self, tenth: ThrottlingBaseline
    ) -> None:
        """Fault: the share that a trial had found to depend on the rate was covered."""
        assert step_down(tenth, STEADY, now=1.0) == [RATE]
        assert end_trial(tenth, 11.0, 0.3) is None
        # The first count of a baseline would include the trial.
        for now in (12.0, 12.1):
            record(tenth, now, 9, 1)
            assert not tenth.covers(now)

    def test_the_next_is_later_each_time_up_to_a_minute(
        self, tried: ThrottlingBaseline
    ) -> None:
        now = 0.0
        for apart in (10.0, 20.0, 40.0, 60.0, 60.0):
            assert end_trial(tried, now, 0.3) is None
            assert step_down(tried, STEADY, now=now) == []
            # The same evidence serves when it is time.
            now += apart
            assert tried.record_step(now - 0.1, 40.0) is None
            assert tried.record_step(now, 40.0) == RATE


class TestCovers:
    def test_a_baseline_holds_for_twenty_seconds_then_twice_as_long_up_to_a_minute(
        self, tenth: ThrottlingBaseline
    ) -> None:
        now = 0.0
        for holds in (20.0, 40.0, 60.0, 60.0):
            if now:
                assert step_down(tenth, STEADY, now=now - 12.0) == [RATE]
                assert end_trial(tenth, now, 0.1) == RATE
            record(tenth, now, 9, 1)
            assert tenth.covers(now + holds - 0.1)
            assert not tenth.covers(now + holds)
            now += 100.0

    @pytest.mark.parametrize(("throttled", "covered"), [(20, True), (21, False)])
    def test_it_allows_for_chance_and_is_not_ended_by_more(
        self, tenth: ThrottlingBaseline, throttled: int, *, covered: bool
    ) -> None:
        # The share allows 10 of 100, with a deviation of 3; 10 + 3 * 3 + 1 = 20 are
        # covered.
        record(tenth, 1.0, 100 - throttled, throttled)
        assert tenth.covers(1.0) is covered
        record(tenth, 2.0, 90, 10)
        assert tenth.covers(2.0)

    def test_old_successes_do_not_cover_a_burst_of_throttling(
        self, tenth: ThrottlingBaseline
    ) -> None:
        record(tenth, 1.0, 990, 10)
        assert tenth.covers(1.0)
        record(tenth, 1.1, 0, 15)
        assert not tenth.covers(1.1)
