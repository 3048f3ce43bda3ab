"""The retry policy, the state of a call and the retry quota, without I/O."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from aiohttp import ClientTimeout
from msgspec.structs import replace
from support.virtual_time import now, run

from bctrl_async import (
    BctrlApiError,
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlRateLimitError,
    BctrlResponseError,
    BctrlServerError,
    BctrlTimeoutError,
    RetryPolicy,
    Runtime,
    StopResult,
)
from bctrl_async._calls.call import Call
from bctrl_async._calls.results import result_of
from bctrl_async._calls.retry import RetryQuota, RetryState
from bctrl_async._http.request import STOP
from bctrl_async._kinds import Failure, Kind, Repeat, kind_of_status
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.rate import AdaptiveRate


def longest(low: float, high: float) -> float:
    """Return the longest delay, so that each delay is one number."""
    assert low == 0.0
    return high


def lost() -> BctrlNetworkError:
    return BctrlNetworkError("the connection broke", may_have_stopped=True)


def answered(status: int, retry_after: float | None = None) -> BctrlServerError:
    return BctrlServerError(
        f"the server answered {status}",
        status=status,
        may_have_stopped=True,
        retry_after=retry_after,
    )


def state(
    quota: RetryQuota | None = None,
    **policy: Any,  # noqa: ANN401 - `RetryPolicy` checks them.
) -> RetryState:
    quota = quota or RetryQuota()
    return RetryState(RetryPolicy(**policy), quota, Repeat.CONVERGES, longest)


def failure_of(error: BctrlError) -> Failure:
    """Return the failure of an error, whose class may belong to another status."""
    failure = Failure.of(error)
    if error.status is None:
        return failure
    return replace(failure, kind=kind_of_status(error.status, error.code))


def delay_after(
    retries: RetryState,
    error: BctrlError,
    now: float = 0.0,
    *,
    target_failed: bool = False,
) -> float | None:
    retries.record(failure_of(error), target_failed=target_failed)
    return retries.delay(now)


def call_of(*errors: BctrlError, patience: float | None = None) -> Call[Runtime]:
    """Return a stop whose attempts have failed with these errors."""
    retries = state(patience=patience)
    call = Call(STOP, "ws-1", "crm", "/", ClientTimeout(), retries=retries)
    for error in errors:
        call.attempts += 1
        call.retries.record(failure_of(error))
    return call


class TestPolicy:
    def test_the_defaults_are_as_documented(self) -> None:
        policy = RetryPolicy()

        assert (policy.attempts, policy.base, policy.cap) == (4, 0.5, 20.0)
        assert (policy.patience, policy.max_throttle_wait) == (None, 60.0)
        assert policy.statuses == {408, 429, *range(500, 600)}

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("attempts", 0), ("attempts", True), ("base", 0), ("base", math.inf)),
            *(("cap", 0), ("cap", -1), ("patience", -1), ("patience", math.inf)),
        ],
    )
    def test_an_invalid_number_is_rejected(self, name: str, value: float) -> None:
        options: dict[str, Any] = {name: value}
        with pytest.raises(BctrlConfigError, match=f"^invalid {name} "):
            RetryPolicy(**options)

    @pytest.mark.parametrize("status", [200, 409, 499, 600])
    def test_a_permanent_status_cannot_be_chosen(self, status: int) -> None:
        with pytest.raises(
            BctrlConfigError, match=rf"^invalid statuses {status}: expected 408"
        ):
            RetryPolicy(statuses=frozenset({429, status}))

    def test_the_longest_delay_is_the_cap_after_any_number_of_failures(self) -> None:
        assert RetryPolicy().backoff(10**6, longest) == 20.0

    def test_jitter_is_full(self) -> None:
        uniform = random.Random(1).uniform

        sampled = [RetryPolicy().backoff(3, uniform) for _ in range(1000)]

        assert 0 <= min(sampled) < 0.1
        assert 1.9 < max(sampled) <= 2.0
        assert 0.9 < sum(sampled) / len(sampled) < 1.1

    def test_its_repr_has_only_what_differs_from_the_defaults(self) -> None:
        """Fault: the signature of a session in `help` has a hundred statuses."""
        assert repr(RetryPolicy()) == "RetryPolicy()"
        assert repr(RetryPolicy(attempts=2)) == "RetryPolicy(attempts=2)"


RETRIED = [
    BctrlNetworkError("no connection"),
    BctrlTimeoutError("no answer within 60 s", may_have_stopped=True),
    BctrlResponseError("the answer is not HTTP", may_have_stopped=True),
    BctrlApiError("the server answered 408", status=408),
    answered(500),
    answered(599),
]
GIVEN_UP = [
    *(
        BctrlApiError(f"the server answered {status}", status=status, retry_after=1.0)
        for status in (400, 401, 403, 404, 409, 422, 425)
    ),
    BctrlResponseError("a redirect", status=307),
    BctrlResponseError("unreadable", status=200, may_have_stopped=True),
    BctrlTimeoutError("it drips", status=200, may_have_stopped=True),
    BctrlConfigError("the session is closed"),
]


@pytest.mark.parametrize("error", RETRIED, ids=lambda error: error.summary)
def test_a_transient_error_is_retried(error: BctrlError) -> None:
    assert delay_after(state(), error) == 0.5


@pytest.mark.parametrize("error", GIVEN_UP, ids=lambda error: error.summary)
def test_a_permanent_error_is_never_retried_whatever_its_headers(
    error: BctrlError,
) -> None:
    """Fault: a 400 that carries Retry-After is retried, four times (azure-core)."""
    assert delay_after(state(), error) is None


class At(NamedTuple):
    """A failed attempt, its time, and whether a gateway's 503 is of its target."""

    now: float
    error: BctrlError
    target_failed: bool = False


def busy(now: float = 0.0, retry_after: float | None = None) -> At:
    return At(now, BctrlApiError("429", status=429, retry_after=retry_after))


def unavailable(retry_after: float | None = None, *, target_failed: bool = False) -> At:
    """Return the 503 of a gateway."""
    return At(0.0, answered(503, retry_after), target_failed)


BROKEN = At(0.0, lost())
ONLY_503 = frozenset({503})

CASES: dict[str, tuple[dict[str, Any], list[At], list[float | None]]] = {
    "a call fails with its last attempt": ({}, [BROKEN] * 4, [0.5, 1.0, 2.0, None]),
    "a single attempt may be asked for": ({"attempts": 1}, [BROKEN], [None]),
    "429 and 503 cost no attempts, and back off by themselves": (
        {"attempts": 2, "patience": 100.0},
        [busy(), unavailable(), BROKEN, *[busy()] * 4, *[unavailable()] * 2, BROKEN],
        [0.5, 1.0, 0.5, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0, None],
    ),
    # Fault: calls that waited for their turn behind many others gave up.
    "patience counts the delays alone, and no delay exceeds it": (
        {"patience": 2.0},
        [At(-500.0, lost()), busy(1000), busy(2000), busy(3000), busy(4000)],
        [0.5, 0.5, 1.0, 0.5, None],
    ),
    "a Retry-After is compared with what is left of the patience": (
        {"patience": 60.0},
        [busy(0, 20.0), busy(500, 30.0), busy(900, 11.0)],
        [20.0, 30.0, None],
    ),
    # Fault: a long Retry-After is waited out, or shortened, so that the retry is too
    # early.
    "a Retry-After beyond the patience ends the call at once": (
        {},
        [busy(0, 61.0)],
        [None],
    ),
    "without patience a throttled call is given up at once": (
        {"patience": 0},
        [busy(5)],
        [None],
    ),
    "the call waits for its own Retry-After": (
        {"patience": 100.0},
        [busy(0, 7.0), unavailable(90.0)],
        [7.0, 90.0],
    ),
    "a gateway's 503 for its own target costs an attempt": (
        {"attempts": 3},
        [unavailable(target_failed=own) for own in (False, True, True, False, True)],
        [0.5, 0.5, 1.0, 1.0, None],
    ),
    "the Retry-After of a 500 is kept": (
        {"patience": 10},
        [At(0, answered(500, 9.0))],
        [9.0],
    ),
    "it gives up if the patience is shorter": (
        {"patience": 10},
        [At(0, answered(500, 11.0))],
        [None],
    ),
    "a chosen status is retried": ({"statuses": ONLY_503}, [unavailable()], [0.5]),
    "a status that was not chosen is not retried": (
        {"statuses": ONLY_503},
        [busy()],
        [None],
    ),
}


@pytest.mark.parametrize(("policy", "failures", "delays"), CASES.values(), ids=CASES)
def test_the_delays_are_those_of_the_policy(
    policy: dict[str, Any], failures: list[At], delays: list[float | None]
) -> None:
    retries = state(**policy)

    assert [
        delay_after(
            retries, failure.error, failure.now, target_failed=failure.target_failed
        )
        for failure in failures
    ] == delays


def test_each_earlier_attempt_is_a_note_on_the_last_error_alone() -> None:
    call = call_of(answered(429), lost(), answered(500))
    failures = call.retries.last_failures

    assert call.error(failures[-1]).__notes__ == [
        "attempt 1: the server answered 429",
        "attempt 2: the connection broke",
    ]
    assert not hasattr(call.attempt_error(failures[0]), "__notes__")


def test_a_throttled_call_is_rejected_if_its_next_connection_fails() -> None:
    """Fault: it was `not_sent`, although the server had said no."""
    call = call_of(BctrlApiError("429", status=429), BctrlNetworkError("no connection"))

    error = call.error(call.retries.last_failures[-1])

    assert result_of(error) is StopResult.REJECTED


def test_an_error_says_when_the_server_may_be_called_again() -> None:
    call = call_of(BctrlRateLimitError("429", status=429, retry_after=100.0))

    assert call.retries.delay(0.0) is None
    assert "Call again in 100 s (Retry-After)" in str(
        call.error(call.retries.last_failures[-1])
    )


Attempt = Callable[[RetryQuota], None]


def failed(status: int) -> Attempt:
    """Return an attempt that is answered with a status, and not retried."""
    return lambda quota: state(quota, statuses=frozenset()).record(
        failure_of(answered(status))
    )


class TestQuota:
    def test_in_an_outage_retries_add_a_tenth_to_the_load(self) -> None:
        """Fault: retry storms in an outage (apache/opendal#7376)."""
        quota = RetryQuota()
        retried = sum(quota.acquire() for _ in range(1000))
        assert 100 <= retried <= 1000 * 0.1 + 12

    @pytest.mark.parametrize(
        ("attempt", "retries"),
        [
            (RetryQuota.release, 111),
            (failed(404), 111),
            (failed(408), 11),
            (failed(503), 11),
        ],
    )
    def test_success_and_permanent_errors_refill_it(
        self, attempt: Attempt, retries: int
    ) -> None:
        quota = RetryQuota()
        for _ in range(1000):
            attempt(quota)
        assert sum(quota.acquire() for _ in range(retries + 1)) == retries

    def test_a_call_is_given_up_with_a_reason_if_it_is_exhausted(self) -> None:
        call = call_of(lost())
        while call.retries.quota.acquire():
            pass
        assert call.retries.delay(0.0) is None
        error = call.error(call.retries.last_failures[-1])
        assert "Not retried: the retry quota is exhausted" in str(error)
        # What comes after it was not given up for that.
        refused = Failure(kind=Kind.NOT_ADMITTED, summary="the server is busy")
        assert "quota" not in str(call.error(refused))
        call.retries.record(Failure.of(lost()))
        assert "quota" not in str(call.error(call.retries.last_failures[-1]))

    def test_a_call_that_waits_for_it_gives_up_with_its_patience(self) -> None:
        call = call_of(lost(), patience=1.0)
        while call.retries.quota.acquire():
            pass

        async def back_off() -> tuple[bool, float]:
            limiter = Limiter(1, AdaptiveRate())
            return await call.back_off(limiter, waits_for_quota=True), now()

        may_retry, seconds = run(back_off())
        assert not may_retry
        assert 1.0 <= seconds < 10.0
