"""When to try again: decisions from what happened, without I/O or a clock of their own."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import msgspec

from bctrl_async import _config
from bctrl_async.errors import (
    THROTTLED,
    BctrlApiError,
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlResponseError,
)

_MAY_RETRY = frozenset({408, 429, *range(500, 600)})
_PATIENCE = 60.0
_LONGEST_WAIT = 5.0
"""Seconds between two questions at most, by which their answer may be known late."""
_LARGEST_EXPONENT = 60
_MAX_NOTES = 10
"""Attempts that an error tells about: the last ones, for there may be a hundred."""


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How often, and how patiently, one stop is tried.

    A stop converges, so it is safe to send again. What is a failure of the connection or of the
    server costs one of `attempts`. A 429 or 503 says that nothing was done and the server is
    busy, so it costs none of them but `patience`, however often it comes. Between attempts the
    client waits a random time between 0 and `base * 2**n` seconds, `cap` at the most ("full
    jitter"), and never less than the server's Retry-After.

    Args:
        attempts: Requests that may fail before the stop does, 429 and 503 not counted, from 1. To
            send once and never again, set `patience` to 0 as well.
        base: Seconds that the first wait takes at the most, above 0.
        cap: Seconds that any such wait takes at the most, above 0.
        patience: Seconds from a stop's first 429 or 503 until it gives up, and the longest
            Retry-After that is waited for; 0 gives up at once. None is 60 for a single stop; in a
            bulk stop it is the time to its deadline, or 300 if it has none.
        statuses: The error statuses upon which to try again, of 408, 429 and 500 to 599. No other
            4xx can be chosen: the same request would fail again.

    Raises:
        BctrlConfigError: A value outside these ranges.
    """

    attempts: int = 4
    base: float = 0.5
    cap: float = 20.0
    patience: float | None = None
    statuses: frozenset[int] = _MAY_RETRY

    def __post_init__(self) -> None:
        _config.count(self.attempts, "attempts")
        _config.seconds(self.base, "base")
        _config.seconds(self.cap, "cap")
        if self.patience is not None and self.patience != 0:
            _config.seconds(self.patience, "patience")
        if wrong := sorted(set(self.statuses) - _MAY_RETRY):
            raise BctrlConfigError(
                f"statuses contains {wrong[0]!r}", advice="Choose from 408, 429 and 500 to 599"
            )

    @property
    def max_throttle_wait(self) -> float:
        """The patience of a single stop, in seconds."""
        return _PATIENCE if self.patience is None else self.patience

    def backoff(self, failures: int, uniform: Callable[[float, float], float]) -> float:
        """Return the seconds to wait after this many failures in a row."""
        longest = min(self.cap, self.base * 2.0 ** min(failures - 1, _LARGEST_EXPONENT))
        return uniform(0.0, longest)


class RetryQuota:
    """What retries may spend, so that in an outage they add a tenth to the load, not a multiple.

    A token bucket, as botocore's retry quota is one: an answer earns a token, also one that says
    no, a retry costs one, and each failure brings a tenth.
    """

    __slots__ = ("_tokens",)

    _RESERVE, _LARGEST, _SHARE = 10.0, 100.0, 0.1

    def __init__(self) -> None:
        self._tokens = self._RESERVE

    def release(self) -> None:
        """Note that the server does its work."""
        if self._tokens < self._LARGEST:
            self._tokens += 1.0

    def acquire(self) -> bool:
        """Pay for a retry after a failure; tell whether there was enough."""
        self._tokens += self._SHARE
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class RetryState:
    """What one stop has spent of its policy.

    Args:
        policy: What it may spend.
        quota: What all stops together may spend.
        uniform: The source of jitter.
        reads: Whether it is the policy of a call that only reads.

    Attributes:
        throttled: How many attempts the server refused with 429 or 503.
    """

    __slots__ = (
        "_attempts",
        "_failed",
        "_failures",
        "_is_throttled",
        "_may_have_stopped",
        "_patience",
        "_patience_ends",
        "_policy",
        "_quota",
        "_reads",
        "_status",
        "_transient",
        "_uniform",
        "throttled",
    )

    def __init__(
        self,
        policy: RetryPolicy,
        quota: RetryQuota,
        uniform: Callable[[float, float], float] = random.uniform,
        *,
        reads: bool = False,
    ) -> None:
        self._policy = policy
        self._reads = reads
        self._quota = quota
        self._uniform = uniform
        self._failures = 0
        self._patience = policy.max_throttle_wait
        self._patience_ends: float | None = None
        self._attempts = 0
        self._failed: deque[BctrlError] = deque(maxlen=_MAX_NOTES)
        self._may_have_stopped = False
        self._status: int | None = None
        self._is_throttled = False
        self._transient = False
        self.throttled: int = 0

    def record(self, error: BctrlError) -> None:
        """Remember how an attempt failed."""
        self._attempts += 1
        self._may_have_stopped |= error.may_have_stopped
        self._status = error.status or self._status
        self._failed.append(error)
        # Decided here: an error that ends the attempts for now is told about those before it.
        self._transient = is_transient(error, self._policy.statuses, reads=self._reads)
        self._is_throttled = error.status in THROTTLED
        self.throttled += self._is_throttled
        if isinstance(error, BctrlApiError) and error.status not in _MAY_RETRY:
            self._quota.release()

    def delay(self, now: float) -> float | None:
        """Return how many seconds to wait before the next attempt, None to give up.

        Args:
            now: The time of a monotonic clock, in seconds.
        """
        error = self._failed[-1]
        if not self._transient:
            return None
        if self._is_throttled:
            return self._delay_throttled(error.retry_after, now)
        self._failures += 1
        if self._failures >= self._policy.attempts:
            return None
        if (error.retry_after or 0.0) > self._patience:
            self._explain_wait(error)
            return None
        if not self._quota.acquire():
            error.advice = (
                "It was not sent again: so many calls fail that retries would add to the load. "
                "Call again later, it is safe to repeat"
            )
            return None
        backoff = self._policy.backoff(self._failures, self._uniform)
        return max(error.retry_after or 0.0, backoff)

    @property
    def last_failure(self) -> BctrlError | None:
        """How the last attempt failed."""
        return self._failed[-1] if self._failed else None

    def annotate(self, error: BctrlError) -> None:
        """Tell the error that ends the stop about the attempts before it."""
        error.may_have_stopped |= self._may_have_stopped
        error.status = error.status or self._status
        for number, failed in enumerate(self._failed, self._attempts - len(self._failed) + 1):
            if failed is not error:
                error.add_note(f"attempt {number}: {failed.summary}")

    def _explain_wait(self, error: BctrlError) -> None:
        error.advice = (
            f"The server asks to stay away for {error.retry_after:.0f} s, which is beyond the "
            "patience: call again then"
        )

    def _delay_throttled(self, retry_after: float | None, now: float) -> float | None:
        if self._patience_ends is None:
            self._patience_ends = now + self._patience
        left = self._patience_ends - now
        if left <= 0:
            return None
        if (retry_after or 0.0) > left:
            # Knocking before the time the server named would only add to its load.
            self._explain_wait(self._failed[-1])
            return None
        jitter = min(self._policy.backoff(self.throttled, self._uniform), left)
        return max(retry_after or 0.0, jitter)


def is_transient(error: BctrlError, statuses: frozenset[int], *, reads: bool = False) -> bool:
    """Whether the same request may succeed later (design: connection, timeout, 408, 429, 5xx)."""
    if isinstance(error, BctrlApiError):
        return error.status in statuses
    if not isinstance(error, BctrlNetworkError):
        return False
    # With a status there was an answer, which only could not be read: to ask again would turn
    # a stop that worked into a conflict. What only reads may ask for the rest of it.
    return error.status is None or (reads and not isinstance(error, BctrlResponseError))


def probe_delay(policy: RetryPolicy, asked: int) -> float:
    """Return the seconds before one who asks for all, or about one runtime, asks again.

    Never at once, as full jitter may have it: there is nobody to be kept apart from.

    Args:
        policy: Sets how the waits grow.
        asked: How often it was asked already, from 1.
    """
    return min(policy.backoff(asked, _equal_jitter), _LONGEST_WAIT)


def _equal_jitter(shortest: float, longest: float) -> float:
    return random.uniform((shortest + longest) / 2, longest)  # noqa: S311 - jitter is no secret.
