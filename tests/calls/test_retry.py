"""The retry policy, the state of a call and the retry quota, without I/O."""

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bctrl_async._calls.retry import RetryPolicy, RetryQuota, RetryState
from bctrl_async.errors import (
    BctrlApiError,
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlRateLimitError,
    BctrlResponseError,
    BctrlServerError,
    BctrlTimeoutError,
)


def no_jitter(low: float, high: float) -> float:
    """Return the longest delay, so that each delay is one number."""
    assert low == 0.0
    return high


def least_jitter(low: float, high: float) -> float:
    assert low <= high
    return low


def disconnected() -> BctrlNetworkError:
    return BctrlNetworkError("the connection broke", may_have_stopped=True)


def throttled(retry_after: float | None = None, status: int = 429) -> BctrlError:
    error_class = BctrlRateLimitError if status == 429 else BctrlServerError
    return error_class(f"the server answered {status}", status=status, retry_after=retry_after)


def answered(status: int, retry_after: float | None = None) -> BctrlApiError:
    return BctrlServerError(
        f"the server answered {status}",
        status=status,
        may_have_stopped=True,
        retry_after=retry_after,
    )


def state(
    *,
    jitter: Callable[[float, float], float] = no_jitter,
    **policy: Any,  # noqa: ANN401 - each field has a type of its own.
) -> RetryState:
    """Return the state of a call with a policy of these arguments, and a full quota."""
    return RetryState(RetryPolicy(**policy), RetryQuota(), jitter)


def delay_after(retries: RetryState, error: BctrlError, now: float = 0.0) -> float | None:
    retries.record(error)
    return retries.delay(now)


def delays(retries: RetryState, errors: Iterable[BctrlError]) -> list[float | None]:
    return [delay_after(retries, error, now=0.0) for error in errors]


class TestPolicy:
    def test_the_defaults_are_as_documented(self) -> None:
        policy = RetryPolicy()

        assert (policy.attempts, policy.base, policy.cap) == (4, 0.5, 20.0)
        assert (policy.patience, policy.max_throttle_wait) == (None, 60.0)
        assert policy.statuses == {408, 429, *range(500, 600)}

    @pytest.mark.parametrize("name", ["attempts", "base", "cap", "patience"])
    @pytest.mark.parametrize("value", [-1, float("inf"), True])
    def test_an_invalid_number_is_rejected(self, name: str, value: float) -> None:
        with pytest.raises(BctrlConfigError, match=f"^invalid {name} "):
            RetryPolicy(**{name: value})  # type: ignore[arg-type]  # mypy does not know the field.

    def test_only_patience_may_be_zero(self) -> None:
        assert RetryPolicy(patience=0).patience == 0
        for name in ("attempts", "base", "cap"):
            with pytest.raises(BctrlConfigError, match=f"^invalid {name} 0"):
                RetryPolicy(**{name: 0})  # type: ignore[arg-type]  # mypy does not know the field.

    @pytest.mark.parametrize("status", [200, 400, 409, 499, 600])
    def test_a_permanent_status_cannot_be_chosen(self, status: int) -> None:
        with pytest.raises(BctrlConfigError, match=rf"^invalid statuses {status}: expected 408"):
            RetryPolicy(statuses=frozenset({429, status}))


class TestBackoff:
    @pytest.mark.parametrize(
        ("failures", "maximum"), [(1, 0.5), (2, 1.0), (3, 2.0), (6, 16.0), (7, 20.0), (8, 20.0)]
    )
    def test_the_maximum_delay_doubles_up_to_the_cap(self, failures: int, maximum: float) -> None:
        assert RetryPolicy().backoff(failures, no_jitter) == maximum

    @given(
        failures=st.integers(1, 10**6),
        base=st.floats(1e-9, 1e308),
        cap=st.floats(1e-9, 1e308),
        seed=st.integers(),
    )
    def test_a_delay_is_between_zero_and_the_cap(
        self, failures: int, base: float, cap: float, seed: int
    ) -> None:
        policy = RetryPolicy(base=base, cap=cap)

        delay = policy.backoff(failures, random.Random(seed).uniform)

        assert 0 <= delay <= min(cap, base * 2.0 ** min(failures - 1, 1000))

    def test_jitter_is_full(self) -> None:
        uniform = random.Random(1).uniform

        sampled = [RetryPolicy().backoff(3, uniform) for _ in range(1000)]

        assert min(sampled) < 0.1
        assert max(sampled) > 1.9
        assert 0.9 < sum(sampled) / len(sampled) < 1.1


class TestAttempts:
    @pytest.mark.parametrize(("attempts", "waits"), [(1, [None]), (4, [0.5, 1.0, 2.0, None])])
    def test_a_call_fails_with_its_last_attempt(
        self, attempts: int, waits: list[float | None]
    ) -> None:
        retries = state(attempts=attempts)

        assert delays(retries, [disconnected() for _ in range(attempts)]) == waits

    @pytest.mark.parametrize(
        "error",
        [
            BctrlNetworkError("no connection"),
            BctrlTimeoutError("no answer within 60 s", may_have_stopped=True),
            BctrlResponseError("the answer is not HTTP", may_have_stopped=True),
            BctrlApiError("the server answered 408", status=408),
            answered(500),
            answered(599),
        ],
        ids=lambda error: error.summary,
    )
    def test_a_transient_error_is_retried(self, error: BctrlError) -> None:
        assert delay_after(state(attempts=2), error) == 0.5

    @pytest.mark.parametrize(
        "error",
        [
            *(
                BctrlApiError(f"{status}", status=status, retry_after=1.0)
                for status in (400, 401, 403, 404, 409, 422, 425)
            ),
            BctrlResponseError("a redirect", status=307),
            BctrlResponseError("unreadable", status=200, may_have_stopped=True),
            BctrlTimeoutError("it drips", status=200, may_have_stopped=True),
            BctrlConfigError("the session is closed"),
        ],
        ids=lambda error: error.summary,
    )
    def test_a_permanent_error_is_never_retried_whatever_its_headers(
        self, error: BctrlError
    ) -> None:
        assert delay_after(state(), error) is None

    def test_a_status_that_was_not_chosen_is_not_retried(self) -> None:
        chosen = frozenset({503})

        assert delay_after(state(statuses=chosen), answered(500)) is None
        assert delay_after(state(statuses=chosen), throttled()) is None
        assert delay_after(state(statuses=chosen), throttled(status=503)) == 0.5


class TestPatience:
    @pytest.mark.parametrize("status", [429, 503])
    def test_throttling_costs_no_attempts(self, status: int) -> None:
        retries = state(attempts=2)

        assert delays(retries, [throttled(status=status) for _ in range(9)]) == [
            *(0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
            *(20.0, 20.0, 20.0),
        ]
        assert delays(retries, [disconnected(), disconnected()]) == [0.5, None]

    @pytest.mark.parametrize(
        ("throttles", "waits"),
        [
            ([(None, 1000.0), (None, 1059.9), (None, 1060.0)], [0.0, 0.0, None]),
            ([(20.0, 0.0), (40.0, 20.0), (20.0, 59.0)], [0.0, 0.0, None]),
        ],
        ids=[
            "patience counts from the first throttled attempt",
            "a Retry-After is compared with what is left of it",
        ],
    )
    def test_a_call_gives_up_when_its_patience_ends_or_does_not_cover_a_retry_after(
        self, throttles: list[tuple[float | None, float]], waits: list[float | None]
    ) -> None:
        retries = state(patience=60.0, jitter=least_jitter)
        assert delay_after(retries, disconnected(), now=-500.0) == 0.0

        assert [delay_after(retries, throttled(after), now) for after, now in throttles] == waits

    def test_without_patience_a_throttled_call_is_given_up_at_once(self) -> None:
        assert delay_after(state(patience=0), throttled(), now=5.0) is None

    def test_jitter_does_not_exceed_the_patience(self) -> None:
        assert delay_after(state(base=20.0, patience=5.0), throttled()) == 5.0

    @pytest.mark.parametrize(
        ("status", "retry_after", "delay"),
        [(429, None, 0.5), (429, 60.0, 0.5), (503, None, 0.5), (503, 7.0, 7.0), (503, 90.0, 60.0)],
    )
    def test_a_throttled_call_waits_itself_only_for_the_retry_after_of_a_gateway(
        self, status: int, retry_after: float | None, delay: float
    ) -> None:
        """Fault: it slept for the Retry-After, so it could not become the limiter's probe."""
        error = throttled(status=status, retry_after=retry_after)

        # Longer than a minute, the call may be the limiter's probe.
        assert delay_after(state(patience=100.0), error) == delay

    def test_a_gateways_503_for_its_own_target_costs_an_attempt(self) -> None:
        retries = state(attempts=3)
        waits = []
        for is_its_own in (False, True, True, False, True):
            retries.record(throttled(status=503), is_its_own=is_its_own)
            waits.append(retries.delay(0.0))

        assert waits == [0.5, 0.5, 1.0, 1.0, None]
        assert (retries.failures, retries.throttled, retries.uncounted) == (3, 5, 0)

    @pytest.mark.parametrize(("retry_after", "delay"), [(9.0, 9.0), (11.0, None)])
    def test_the_retry_after_of_any_status_is_kept_or_gives_up(
        self, retry_after: float, delay: float | None
    ) -> None:
        assert delay_after(state(patience=10), answered(500, retry_after)) == delay

    @given(
        st.lists(st.tuples(st.none() | st.floats(0, 100), st.floats(0, 30)), max_size=20),
        st.floats(0, 120),
        st.integers(),
    )
    def test_a_throttled_call_gives_up_exactly_when_its_patience_does_not_cover_retry_after(
        self, throttles: list[tuple[float | None, float]], patience: float, seed: int
    ) -> None:
        """Fault: `Retry-After` over a limit is shortened, so the retry is too early (openai)."""
        retries = state(patience=patience, jitter=random.Random(seed).uniform)
        now = 0.0
        for retry_after, elapsed in throttles:
            delay = delay_after(retries, throttled(retry_after), now)
            if delay is None:
                assert now >= patience or (retry_after or 0.0) > patience - now
                return
            assert (retry_after or 0.0) <= patience - now
            assert now + delay <= patience or delay == pytest.approx(patience - now)
            now += delay + elapsed


class TestAnnotate:
    def test_each_earlier_attempt_is_a_note_on_the_last_error_alone(self) -> None:
        retries = state()
        first, second, last = throttled(), disconnected(), answered(500)
        delays(retries, [first, second, last])

        retries.annotate(last)

        assert last.__notes__ == [
            "attempt 1: the server answered 429",
            "attempt 2: the connection broke",
        ]
        assert not hasattr(first, "__notes__")

    def test_an_error_outside_the_attempts_notes_all_of_them(self) -> None:
        retries = state()
        delay_after(retries, disconnected())
        closed = BctrlConfigError("the session is closed")

        retries.annotate(closed)

        assert closed.__notes__ == ["attempt 1: the connection broke"]


class TestQuota:
    def test_in_an_outage_retries_add_a_tenth_to_the_load(self) -> None:
        """Fault: retry storms in an outage (apache/opendal#7376)."""
        quota = RetryQuota()
        retried = sum(quota.acquire() for _ in range(1000))
        assert 100 <= retried <= 1000 * 0.1 + 12

    def test_successes_refill_the_quota_up_to_a_limit(self) -> None:
        quota = RetryQuota()
        for _ in range(1000):
            quota.release()
        assert [quota.acquire() for _ in range(112)].count(True) == 111

    def test_a_call_is_given_up_with_a_reason_if_the_quota_is_exhausted(self) -> None:
        quota = RetryQuota()
        while quota.acquire():
            pass
        error = disconnected()
        assert delay_after(RetryState(RetryPolicy(), quota), error) is None
        assert "Not retried: the retry quota is exhausted" in str(error)

    @pytest.mark.parametrize("status", [404, 409])
    def test_a_permanent_error_refills_the_quota_as_a_success_does(self, status: int) -> None:
        quota = RetryQuota()
        for _ in range(1000):
            RetryState(RetryPolicy(), quota).record(answered(status))
        assert [quota.acquire() for _ in range(112)].count(True) == 111

    @pytest.mark.parametrize("status", [408, 503])
    def test_a_transient_error_does_not_refill_the_quota(self, status: int) -> None:
        quota = RetryQuota()
        for _ in range(1000):
            RetryState(RetryPolicy(statuses=frozenset()), quota).record(answered(status))
        assert [quota.acquire() for _ in range(20)].count(True) == 11


def test_the_repr_of_a_policy_has_only_what_differs_from_the_defaults() -> None:
    """Fault: the signature of a session in `help` and editors has a hundred statuses."""
    assert repr(RetryPolicy()) == "RetryPolicy()"
    assert repr(RetryPolicy(attempts=2)) == "RetryPolicy(attempts=2)"
