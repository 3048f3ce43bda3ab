"""The adaptive rate, decision by decision."""

from __future__ import annotations

import math

import pytest

from bctrl_async._limiter.baseline import _Trial
from bctrl_async._limiter.bounds import BURST
from bctrl_async._limiter.curve import _DOUBLING, _FADING
from bctrl_async._limiter.evidence import Evidence, History
from bctrl_async._limiter.rate import AdaptiveRate

FIRST = History(workspace="ws-1")


def rate_of_workspace() -> AdaptiveRate:
    """Make a rate to which all throttling counts, as in a lane."""
    return AdaptiveRate(evidence=Evidence(is_of_all=False))


def refuse(
    rate: AdaptiveRate, times: int = 8, retry_after: float | None = None
) -> None:
    for _ in range(times):
        rate.on_throttled(0.0, retry_after, FIRST)


def first(started_at: float) -> History:
    """Return the history of a first attempt that got its slot at this time."""
    return History(workspace="ws-1", started_at=started_at)


def repeat(throttled_at: float, throttled: int = 1, started_at: float = 0.0) -> History:
    """Return the history of a call that was throttled so many times."""
    return History(
        workspace="ws-1",
        throttled_at=throttled_at,
        throttled=throttled,
        started_at=started_at,
    )


def limited() -> AdaptiveRate:
    """Make a rate whose server has shown at 0 s that it has a limit."""
    rate = rate_of_workspace()
    refuse(rate)
    assert rate.has_limit
    return rate


class TestStart:
    def test_it_is_over_after_200_successes_and_not_by_waiting(self) -> None:
        """Fault: a session that listed its runtimes first started at full speed."""
        rate = AdaptiveRate()
        for now in range(200):
            rate.on_start(now)
            assert not rate.is_unlimited
            assert rate._current_rate(now) == 150.0 + 20.0 * now
            rate.on_success(now, FIRST)
        rate.on_start(200.0)
        assert rate.is_unlimited


@pytest.mark.parametrize(("times", "delay"), [(7, 0.0), (8, 0.5)])
def test_the_eighth_throttled_response_slows_down_other_calls(
    times: int, delay: float
) -> None:
    rate = rate_of_workspace()
    refuse(rate, times)
    assert rate.has_limit is (times == 8)
    assert rate.delay(0.0) == pytest.approx(delay)


def test_a_limit_is_not_gone_while_all_are_refused() -> None:
    """Fault: with the last first attempts, the rate outgrew a limit that held.

    Twelve tenants over their quotas then got 8,500 requests in a minute.
    """
    rate = limited()
    rate.on_success(1.0, FIRST)
    for number in range(8):
        rate.on_throttled(1.1 + number / 10, None, repeat(0.9))
    assert rate._current_rate(1000.0) == 200.0
    rate.on_success(1000.0, FIRST)
    assert rate._current_rate(1000.0) == math.inf
    assert not rate.has_limit


def test_while_nothing_succeeds_the_rate_fades_to_an_attempt_in_two_seconds() -> None:
    """Fault: each throttled response made it step down, and a success came late."""
    rate = limited()
    assert rate._current_rate(0.5) == 20.0
    for now in (1.0, 2.0, 3.0):
        rate.on_throttled(now, None, FIRST)
    assert rate._current_rate(0.5 + _FADING) == pytest.approx(10.0)
    assert rate._current_rate(1000.0) == 0.5
    rate.on_success(1000.0, FIRST)
    assert rate._current_rate(1000.7) == pytest.approx(40.0)


def stepped_down() -> AdaptiveRate:
    """Make a rate that has stepped down to some 85 a second at 5 s."""
    rate = limited()
    for number in range(100):
        rate.on_success(4.0 + number / 100, FIRST)
    rate._restore(100.0, 4.5)
    rate.on_throttled(5.0, None, first(started_at=4.9))
    assert 80.0 < rate._current_rate(5.0) < 90.0
    return rate


def refuse_for(rate: AdaptiveRate, start: float, seconds: float) -> None:
    """Throttle eight calls once more in so many seconds."""
    for number in range(8):
        rate.on_throttled(start + seconds * number / 7, None, repeat(start - 1.0))


class TestRefusal:
    def test_a_rate_at_which_nothing_succeeds_any_more_fades(self) -> None:
        """Fault: of 600 a minute, most were asked for in vain, and targets given up."""
        rate = stepped_down()
        refuse_for(rate, 5.1, 0.9)
        assert rate._current_rate(6.0) > 80.0
        rate.on_throttled(6.2, None, repeat(5.05))
        assert rate._current_rate(6.2) == 20.0
        assert rate._current_rate(8.2) == pytest.approx(10.0)

    def test_a_slow_start_in_which_nothing_succeeds_any_more_fades(self) -> None:
        rate = limited()
        rate.on_success(1.0, FIRST)
        refuse_for(rate, 1.1, 0.9)
        assert rate._current_rate(2.0) > 50.0
        rate.on_throttled(2.2, None, repeat(1.05))
        assert rate._current_rate(2.2) == 20.0

    def test_the_fewer_calls_are_refused_the_longer_it_takes(self) -> None:
        """Fault: the last four targets of a list were asked for until they gave up.

        Five dead targets in a workspace of sixty held up the others for a minute.
        """
        rate = stepped_down()
        for number in range(79):
            rate.on_throttled(5.1 + number / 10, None, repeat(5.05, 2))
        assert rate._current_rate(12.9) > 80.0
        rate.on_throttled(13.1, None, repeat(5.05, 2))
        assert rate._current_rate(13.1) == 20.0

    def test_it_grows_from_there_once_an_attempt_succeeds(self) -> None:
        rate = stepped_down()
        rate._restore(8.0, 5.0)
        rate.on_throttled(5.5, None, first(started_at=5.4))
        refuse_for(rate, 5.6, 1.4)
        assert rate._current_rate(9.0) < 5.0
        rate.on_success(9.1, repeat(4.0))
        assert 5.0 < rate._current_rate(9.1) < 8.0
        assert rate._current_rate(10.5) > 16.0

    def test_a_step_down_is_given_two_round_trips(self) -> None:
        rate = stepped_down()
        for number in range(100):
            rate.on_success(5.0 + number / 100, first(started_at=2.0))
        refuse_for(rate, 7.0, 7.0)
        assert rate._current_rate(14.0) > 20.0
        rate.on_throttled(15.5, None, repeat(6.5))
        assert rate._current_rate(15.5) == 20.0

    def test_a_server_that_was_slow_is_fast_as_soon_as_its_answers_are(self) -> None:
        """Fault: one slow minute kept the rate low for five."""
        rate = stepped_down()
        for number in range(50):
            rate.on_success(5.0 + number / 100, first(started_at=-25.0))
        rate.on_throttled(6.0, None, first(started_at=5.9))
        assert rate._current_rate(20.0) < 90.0
        for number in range(50):
            now = 20.0 + number / 100
            rate.on_success(now, first(started_at=now - 0.1))
        assert rate._current_rate(21.0) > 100.0

    def test_in_a_slow_start_a_retry_of_a_dead_target_does_not_count(self) -> None:
        """Fault: twenty dead targets slowed down 480 for twice as long."""
        rate = limited()
        rate.on_success(1.0, FIRST)
        before = rate._current_rate(1.5)
        rate.on_throttled(1.5, None, repeat(0.9, 1, started_at=1.4))
        assert rate._current_rate(1.5) == before

    def test_in_a_slow_start_a_retry_makes_it_step_down(self) -> None:
        """Fault: after an outage of 429s, all calls were retries, and none counted."""
        rate = limited()
        rate.on_success(0.6, repeat(0.0))
        before = rate._current_rate(1.5)
        rate.on_throttled(1.5, None, repeat(1.4, 5, started_at=1.4))
        assert rate._current_rate(1.5) < before

    def test_in_a_slow_start_no_retry_counts_while_first_attempts_are_answered(
        self,
    ) -> None:
        """Fault: five dead targets in a workspace of sixty held up the others."""
        rate = limited()
        rate.on_success(0.6, repeat(0.0))
        rate.on_success(1.4, FIRST)
        before = rate._current_rate(1.5)
        rate.on_throttled(1.5, None, repeat(0.5, 5, started_at=1.45))
        assert rate._current_rate(1.5) == before


class TestEvidence:
    """First attempts are a fair sample of all, and repeats of their target."""

    @pytest.mark.parametrize("retry_after", [None, 30.0])
    def test_repeats_of_targets_show_no_limit(self, retry_after: float | None) -> None:
        """Fault: thirty targets over their quota stopped 3,000 behind them."""
        rate = rate_of_workspace()
        for number in range(100):
            rate.on_throttled(1.0 + number, retry_after, repeat(number, 2))
        assert not rate.has_limit
        assert rate.retry_after_ends < 0.0

    def test_under_a_limit_the_second_response_of_a_call_makes_the_rate_step_down(
        self,
    ) -> None:
        """Fault: of eight processes on one limit, one had twice what another had."""
        rate = stepped_down()
        rate.on_success(5.5, repeat(4.0))
        for throttled, is_slower in ((2, False), (1, True)):
            before = rate._current_rate(6.0)
            rate.on_throttled(6.0, None, repeat(5.4, throttled, 5.9))
            assert (rate._current_rate(6.0) < before) is is_slower

    def test_attempts_that_started_before_a_step_down_cause_no_other(self) -> None:
        """Fault: answers after 4 s took nine times the ideal time."""
        rate = limited()
        for now in (1.0, 2.0, 3.0, 4.0):
            rate.on_success(now, first(started_at=now - 4.5))
        rate._restore(100.0, 4.0)
        rate.on_throttled(5.0, None, first(started_at=4.1))
        stepped = rate._current_rate(5.0)
        assert stepped < 100.0
        rate.on_throttled(8.0, None, first(started_at=4.9))
        assert rate._current_rate(8.0) >= stepped
        before = rate._current_rate(9.0)
        rate.on_throttled(9.0, None, first(started_at=5.1))
        assert rate._current_rate(9.0) < before

    def test_two_successes_make_up_for_a_throttled_response(self) -> None:
        rate = rate_of_workspace()
        for _ in range(100):
            refuse(rate, 1)
            rate.on_success(0.0, FIRST)
            rate.on_success(0.0, FIRST)
        refuse(rate, 7)
        assert not rate.has_limit
        refuse(rate, 1)
        assert rate.has_limit

    def test_a_workspace_adds_one_to_a_limit_for_all(self) -> None:
        """Fault: two workspaces over their quotas held up all others."""
        evidence = Evidence(is_of_all=True)
        for number in range(7):
            assert evidence.on_throttled(f"ws-{number}")
            assert not evidence.on_throttled(f"ws-{number}")
        assert not evidence.shows_limit
        assert evidence.on_throttled("ws-7")
        assert evidence.shows_limit

    def test_once_successes_have_made_up_for_it_a_workspace_may_add_another(
        self,
    ) -> None:
        evidence = Evidence(is_of_all=True)
        evidence.on_throttled("ws-1")
        evidence.on_throttled("ws-2")
        for _ in range(2):
            assert not evidence.on_throttled("ws-1")
            evidence.on_success("ws-1")
        assert evidence.on_throttled("ws-1")

    def test_what_a_limit_of_its_workspace_explains_shows_no_limit_for_all(
        self,
    ) -> None:
        """Fault: a handful of workspaces over their quotas held up all others."""
        rate = AdaptiveRate()
        for number in range(100):
            history = History(workspace=f"ws-{number}")
            rate.on_throttled(0.0, 30.0, history, is_explained=True)
        assert not rate.has_limit
        assert not rate.excess

    @pytest.mark.parametrize(
        ("others", "is_alone"),
        [([], False), ([FIRST], True), ([FIRST, repeat(9.0)], False)],
    )
    def test_what_others_are_answered_tells_whether_a_target_is_throttled_alone(
        self, others: list[History], *, is_alone: bool
    ) -> None:
        rate = AdaptiveRate()
        rate.on_throttled(10.0, None, FIRST)
        for history in others:
            rate.on_success(11.0, history)

        assert rate.answers.throttles_alone(10.0) is is_alone
        # Nobody has been answered since its next attempt, and of a first nothing is
        # known.
        assert not rate.answers.throttles_alone(12.0)
        assert not rate.answers.throttles_alone(math.inf)


class TestGrowthAndPauses:
    """The seconds of a pause are no evidence that the server accepts more."""

    def test_the_rate_grows_after_a_pause_and_not_in_it(self) -> None:
        """Fault: after a Retry-After of 30 s, then 10 s, it grew in the pause."""
        rate = rate_of_workspace()
        refuse(rate, retry_after=30.0)
        rate.on_throttled(1.0, 10.0, FIRST)
        rate.on_success(29.0, FIRST)
        rate.on_start(30.0)
        assert rate.has_limit
        assert rate._current_rate(30.0) == pytest.approx(20.0)
        assert rate._current_rate(30.7) == pytest.approx(40.0)

    def test_a_limit_that_was_lifted_leaves_no_pause_behind(self) -> None:
        """Fault: the next limit paused for the rest of an old Retry-After."""
        rate = rate_of_workspace()
        for _ in range(8):
            rate.on_throttled(1.0, 600.0, FIRST)
        for _ in range(20):
            rate.on_success(1.1, FIRST)
        rate.on_throttled(1.2, 600.0, repeat(1.05))
        assert not rate.has_limit
        for _ in range(8):
            rate.on_throttled(5.0, None, FIRST)

        assert rate.delay(5.0) == pytest.approx(0.5)

    def test_a_trial_that_passes_in_a_pause_starts_slowly_after_it(self) -> None:
        """Fault: the pause counted as slow start, which then lifted the limit."""
        rate = limited()
        rate._baseline._phase = trial = _Trial(0.1, 61.0)
        rate._baseline._old_rate = 100.0
        rate._restore(100.0, 1.0)
        rate._pause_ends = 31.0
        rate._next_start = 31.0 + BURST
        while rate._baseline._phase is trial:
            rate.on_success(1.1, FIRST)

        assert rate.delay(1.1) == pytest.approx(29.9)
        rate.on_start(31.0)
        assert rate.has_limit
        assert rate._current_rate(31.0) == 100.0
        assert rate._current_rate(32.0) == pytest.approx(100.0 * 2 ** (1 / _DOUBLING))
