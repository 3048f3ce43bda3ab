"""The retry policy, the state of a call and the retry quota, without I/O."""

import random
from collections.abc import Callable, Iterable
from copy import copy

import pytest
from aiohttp import ClientTimeout
from hypothesis import given
from hypothesis import strategies as st

from bctrl_async._calls.call import Call
from bctrl_async._calls.retry import RetryPolicy, RetryQuota, RetryState, is_transient
from bctrl_async._http.request import GET, STOP, Operation
from bctrl_async.errors import (
    BctrlApiError,
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNetworkError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlRateLimitError,
    BctrlResponseError,
    BctrlServerError,
    BctrlTimeoutError,
    BctrlValidationError,
)
from bctrl_async.models import Runtime


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


def call_of(operation: Operation[Runtime]) -> Call[Runtime]:
    state = RetryState(RetryPolicy(), RetryQuota())
    return Call(operation, "ws-1", "crm", "/", ClientTimeout(), retries=state)


def delay_after(retries: RetryState, error: BctrlError, now: float) -> float | None:
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

    @pytest.mark.parametrize("attempts", [0, -1, 1.5, True, "3", None])
    def test_invalid_attempts_are_rejected(self, attempts: int) -> None:
        with pytest.raises(BctrlConfigError, match=r"^invalid attempts "):
            RetryPolicy(attempts=attempts)

    @pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "1", None])
    def test_an_invalid_base_or_cap_is_rejected(self, value: float) -> None:
        with pytest.raises(BctrlConfigError, match=r"^invalid base "):
            RetryPolicy(base=value)
        with pytest.raises(BctrlConfigError, match=r"^invalid cap "):
            RetryPolicy(cap=value)

    @pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, "1"])
    def test_an_invalid_patience_is_rejected(self, value: float) -> None:
        with pytest.raises(BctrlConfigError, match=r"^invalid patience "):
            RetryPolicy(patience=value)

    def test_a_patience_of_zero_is_allowed(self) -> None:
        assert RetryPolicy(patience=0).patience == 0

    @pytest.mark.parametrize("status", [200, 302, 400, 401, 403, 404, 409, 422, 499, 600])
    def test_a_permanent_status_cannot_be_chosen(self, status: int) -> None:
        with pytest.raises(BctrlConfigError, match=rf"^invalid statuses {status}: expected 408"):
            RetryPolicy(statuses=frozenset({429, status}))

    @pytest.mark.parametrize("statuses", [frozenset(), frozenset({503}), frozenset({408, 599})])
    def test_any_transient_statuses_can_be_chosen(self, statuses: frozenset[int]) -> None:
        assert RetryPolicy(statuses=statuses).statuses == statuses

    def test_a_policy_is_immutable(self) -> None:
        with pytest.raises(AttributeError, match="immutable"):
            RetryPolicy().attempts = 9  # type: ignore[misc]


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

    def test_jitter_is_random_by_default(self) -> None:
        sampled = [
            delay_after(RetryState(RetryPolicy(), RetryQuota()), disconnected(), now=0.0)
            for _ in range(10)
        ]

        assert len(set(sampled)) == 10
        assert all(delay is not None and 0 <= delay <= 0.5 for delay in sampled)


class TestAttempts:
    def test_a_call_fails_with_its_last_attempt(self) -> None:
        retries = RetryState(RetryPolicy(attempts=4), RetryQuota(), no_jitter)

        assert delays(retries, [disconnected() for _ in range(4)]) == [0.5, 1.0, 2.0, None]

    def test_one_attempt_means_no_retry(self) -> None:
        assert delays(
            RetryState(RetryPolicy(attempts=1), RetryQuota(), no_jitter), [disconnected()]
        ) == [None]

    @pytest.mark.parametrize(
        "error",
        [
            BctrlNetworkError("no connection"),
            BctrlTimeoutError("no answer within 60 s", may_have_stopped=True),
            BctrlTimeoutError("no connection within 54 s"),
            BctrlResponseError("the answer is not HTTP", may_have_stopped=True),
            BctrlApiError("the server answered 408", status=408),
            answered(500),
            answered(502),
            answered(504),
            answered(599),
        ],
        ids=lambda error: error.summary,
    )
    def test_a_transient_error_is_retried(self, error: BctrlError) -> None:
        """Fault: a POST on a connection the server just closed is not resent (aiohttp#6138)."""
        assert (
            delay_after(
                RetryState(RetryPolicy(attempts=2), RetryQuota(), no_jitter), error, now=0.0
            )
            == 0.5
        )

    @pytest.mark.parametrize("retry_after", [None, 0.0, 1.0])
    @pytest.mark.parametrize(
        ("error_class", "status"),
        [
            (BctrlValidationError, 400),
            (BctrlAuthenticationError, 401),
            (BctrlApiError, 402),
            (BctrlPermissionError, 403),
            (BctrlNotFoundError, 404),
            (BctrlConflictError, 409),
            (BctrlApiError, 418),
            (BctrlValidationError, 422),
            (BctrlApiError, 425),
            (BctrlResponseError, 302),
            (BctrlResponseError, 307),
        ],
    )
    def test_a_permanent_error_is_never_retried_whatever_its_headers(
        self, error_class: type[BctrlError], status: int, retry_after: float | None
    ) -> None:
        """Fault: a 400 that carries `Retry-After` is retried, four times (azure-core)."""
        error = error_class("no", status=status, retry_after=retry_after)

        assert (
            delay_after(RetryState(RetryPolicy(), RetryQuota(), no_jitter), error, now=0.0) is None
        )

    @pytest.mark.parametrize("error_class", [BctrlResponseError, BctrlTimeoutError])
    def test_an_unreadable_success_is_not_retried(self, error_class: type[BctrlError]) -> None:
        error = error_class("unreadable", status=200, may_have_stopped=True)

        assert (
            delay_after(RetryState(RetryPolicy(), RetryQuota(), no_jitter), error, now=0.0) is None
        )

    def test_a_config_error_is_not_retried(self) -> None:
        assert not is_transient(BctrlConfigError("the session is closed"), frozenset({503}))

    def test_a_status_that_was_not_chosen_is_not_retried(self) -> None:
        policy = RetryPolicy(statuses=frozenset({503}))

        assert (
            delay_after(RetryState(policy, RetryQuota(), no_jitter), answered(500), now=0.0) is None
        )
        assert (
            delay_after(RetryState(policy, RetryQuota(), no_jitter), throttled(), now=0.0) is None
        )
        assert (
            delay_after(RetryState(policy, RetryQuota(), no_jitter), throttled(status=503), now=0.0)
            == 0.5
        )


class TestPatience:
    @pytest.mark.parametrize("status", [429, 503])
    def test_throttling_costs_no_attempts(self, status: int) -> None:
        retries = RetryState(RetryPolicy(attempts=2), RetryQuota(), no_jitter)

        assert delays(retries, [throttled(status=status) for _ in range(9)]) == [
            *(0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
            *(20.0, 20.0, 20.0),
        ]
        assert delays(retries, [disconnected(), disconnected()]) == [0.5, None]

    def test_patience_counts_from_the_first_throttled_attempt(self) -> None:
        retries = RetryState(RetryPolicy(patience=60.0), RetryQuota(), least_jitter)

        assert delay_after(retries, throttled(), now=1000.0) == 0.0
        assert delay_after(retries, throttled(), now=1059.9) == 0.0
        assert delay_after(retries, throttled(), now=1060.0) is None

    def test_failures_before_throttling_cost_no_patience(self) -> None:
        retries = RetryState(RetryPolicy(patience=60.0), RetryQuota(), least_jitter)

        assert delay_after(retries, disconnected(), now=0.0) == 0.0
        assert delay_after(retries, throttled(), now=500.0) == 0.0
        assert delay_after(retries, throttled(), now=559.0) == 0.0

    def test_without_patience_a_throttled_call_is_given_up_at_once(self) -> None:
        assert (
            delay_after(
                RetryState(RetryPolicy(patience=0), RetryQuota(), no_jitter), throttled(), now=5.0
            )
            is None
        )

    def test_jitter_does_not_exceed_the_patience(self) -> None:
        retries = RetryState(RetryPolicy(base=20.0, patience=5.0), RetryQuota(), no_jitter)

        assert delay_after(retries, throttled(), now=0.0) == 5.0

    @pytest.mark.parametrize("retry_after", [None, 0.0, 7.0, 60.0])
    def test_a_throttled_call_sleeps_only_its_jitter(self, retry_after: float | None) -> None:
        """Fault: it slept for the Retry-After, so it could not become the limiter's probe."""
        retries = RetryState(RetryPolicy(patience=60.0), RetryQuota(), no_jitter)

        assert delay_after(retries, throttled(retry_after=retry_after), now=0.0) == 0.5

    @pytest.mark.parametrize(("retry_after", "delay"), [(None, 0.5), (7.0, 7.0), (90.0, 60.0)])
    def test_the_retry_after_of_a_gateway_holds_its_own_call(
        self, retry_after: float | None, delay: float
    ) -> None:
        retries = RetryState(RetryPolicy(patience=100.0), RetryQuota(), no_jitter)
        unavailable = throttled(status=503, retry_after=retry_after)

        # Longer than a minute, the call may be the limiter's probe.
        assert delay_after(retries, unavailable, now=0.0) == delay

    def test_a_gateways_503_for_its_own_target_costs_an_attempt(self) -> None:
        retries = RetryState(RetryPolicy(attempts=3), RetryQuota(), no_jitter)
        waits = []
        for is_its_own in (False, True, True, False, True):
            retries.record(throttled(status=503), is_its_own=is_its_own)
            waits.append(retries.delay(0.0))

        assert waits == [0.5, 0.5, 1.0, 1.0, None]
        assert (retries.failures, retries.throttled, retries.uncounted) == (3, 5, 0)

    @pytest.mark.parametrize("retry_after", [60.5, 86400.0, 31536000.0])
    def test_a_retry_after_beyond_the_patience_is_given_up_at_once(
        self, retry_after: float
    ) -> None:
        """Fault: a `Retry-After` of days is shortened, or waited out (openai; pi#4991)."""
        retries = RetryState(RetryPolicy(patience=60.0), RetryQuota(), no_jitter)

        assert delay_after(retries, throttled(retry_after=retry_after), now=0.0) is None

    def test_retry_after_is_compared_with_the_remaining_patience(self) -> None:
        retries = RetryState(RetryPolicy(patience=60.0), RetryQuota(), least_jitter)

        assert delay_after(retries, throttled(retry_after=20.0), now=0.0) == 0.0
        assert delay_after(retries, throttled(retry_after=40.0), now=20.0) == 0.0
        assert delay_after(retries, throttled(retry_after=20.0), now=59.0) is None

    @given(
        st.lists(st.tuples(st.none() | st.floats(0, 100), st.floats(0, 30)), max_size=20),
        st.floats(0, 120),
        st.integers(),
    )
    def test_a_throttled_call_gives_up_exactly_when_its_patience_does_not_cover_retry_after(
        self, throttles: list[tuple[float | None, float]], patience: float, seed: int
    ) -> None:
        """Fault: `Retry-After` over a limit is shortened, so the retry is too early (openai)."""
        retries = RetryState(
            RetryPolicy(patience=patience), RetryQuota(), random.Random(seed).uniform
        )
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
    def test_each_earlier_attempt_is_a_note_on_the_last_error(self) -> None:
        retries = RetryState(RetryPolicy(), RetryQuota(), no_jitter)
        first, second, last = throttled(), disconnected(), answered(500)
        delays(retries, [first, second, last])

        retries.annotate(last)

        assert last.__notes__ == [
            "attempt 1: the server answered 429",
            "attempt 2: the connection broke",
        ]

    def test_the_error_of_a_single_attempt_has_no_notes(self) -> None:
        retries = RetryState(RetryPolicy(attempts=1), RetryQuota(), no_jitter)
        error = disconnected()
        delay_after(retries, error, now=0.0)

        retries.annotate(error)

        assert not hasattr(error, "__notes__")

    def test_an_error_outside_the_attempts_notes_all_of_them(self) -> None:
        retries = RetryState(RetryPolicy(), RetryQuota(), no_jitter)
        delay_after(retries, disconnected(), now=0.0)
        closed = BctrlConfigError("the session is closed")

        retries.annotate(closed)

        assert closed.__notes__ == ["attempt 1: the connection broke"]

    @pytest.mark.parametrize(
        ("earlier", "may_have_stopped"),
        [
            ([], False),
            ([throttled()], False),
            ([BctrlNetworkError("refused")], False),
            ([disconnected()], True),
            ([throttled(), disconnected(), throttled()], True),
        ],
    )
    @pytest.mark.parametrize("last", [throttled, lambda: BctrlConfigError("it is closed")])
    def test_a_call_may_have_stopped_if_any_attempt_may_have(
        self,
        earlier: list[BctrlError],
        last: Callable[[], BctrlError],
        *,
        may_have_stopped: bool,
    ) -> None:
        call = call_of(STOP)
        for error in map(copy, earlier):
            call.on_failure(error)

        call.annotate(error := last())

        assert error.may_have_stopped is may_have_stopped

    def test_a_call_that_only_reads_has_stopped_nothing(self) -> None:
        call = call_of(GET)
        call.on_failure(disconnected())

        call.annotate(error := throttled())

        assert not error.may_have_stopped

    def test_earlier_errors_are_not_changed(self) -> None:
        retries = RetryState(RetryPolicy(), RetryQuota(), no_jitter)
        first, last = throttled(), disconnected()
        delays(retries, [first, last])

        retries.annotate(last)

        assert not first.may_have_stopped
        assert not hasattr(first, "__notes__")


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
        assert delay_after(RetryState(RetryPolicy(), quota), error, now=0.0) is None
        assert "Not retried: the retry quota is exhausted" in str(error)

    @pytest.mark.parametrize("status", [404, 409, 422])
    def test_a_permanent_error_refills_the_quota_as_a_success_does(self, status: int) -> None:
        quota = RetryQuota()
        for _ in range(1000):
            RetryState(RetryPolicy(), quota).record(answered(status))
        assert [quota.acquire() for _ in range(112)].count(True) == 111

    @pytest.mark.parametrize("status", [408, 429, 500, 503])
    def test_a_transient_error_does_not_refill_the_quota(self, status: int) -> None:
        quota = RetryQuota()
        for _ in range(1000):
            RetryState(RetryPolicy(statuses=frozenset()), quota).record(answered(status))
        assert [quota.acquire() for _ in range(20)].count(True) == 11

    def test_a_server_error_with_retry_after_beyond_the_patience_is_given_up(self) -> None:
        retries = RetryState(RetryPolicy(patience=10), RetryQuota(), no_jitter)
        error = answered(500)
        error.retry_after = 11.0
        assert delay_after(retries, error, now=0.0) is None

    def test_retry_after_is_a_minimum_for_every_status(self) -> None:
        retries = RetryState(RetryPolicy(patience=10), RetryQuota(), no_jitter)
        error = answered(500)
        error.retry_after = 9.0
        assert delay_after(retries, error, now=0.0) == 9.0


def test_an_error_before_any_attempt_names_only_the_runtime() -> None:
    call = call_of(STOP)
    error = BctrlConfigError("the session is closed")
    call.annotate(error)
    assert (error.workspace_id, error.alias, error.attempts) == ("ws-1", "crm", 0)


def test_the_repr_of_a_policy_has_only_what_differs_from_the_defaults() -> None:
    """Fault: the signature of a session in `help` and editors has a hundred statuses."""
    assert repr(RetryPolicy()) == "RetryPolicy()"
    assert repr(RetryPolicy(attempts=2)) == "RetryPolicy(attempts=2)"
