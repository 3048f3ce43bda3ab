"""When to try again: decisions from what happened, without I/O or a clock of their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from http import HTTPStatus

import msgspec

from bctrl_async import _config
from bctrl_async.errors import (
    BctrlApiError,
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
)

_THROTTLED = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
_MAY_RETRY = frozenset({408, 429, *range(500, 600)})
_LARGEST_EXPONENT = 60


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How often, and how patiently, one stop is tried.

    A stop converges, so it is safe to send again. What is a failure of the connection or of the
    server costs one of `attempts`. A 429 or 503 says that nothing was done and the server is
    busy, so it costs `patience` instead. Between attempts the client waits a random time between
    0 and `base * 2**n` seconds, `cap` at the most ("full jitter"), and never less than the
    server's Retry-After.

    Args:
        attempts: Requests that may fail before the stop does, from 1; 1 is no retry.
        base: Seconds that the first wait takes at the most, above 0.
        cap: Seconds that any such wait takes at the most, above 0.
        patience: Seconds from a stop's first 429 or 503 until it gives up; 0 gives up at once.
        statuses: The error statuses upon which to try again, of 408, 429 and 500 to 599. No other
            4xx can be chosen: the same request would fail again.

    Raises:
        BctrlConfigError: A value outside these ranges.
    """

    attempts: int = 4
    base: float = 0.5
    cap: float = 20.0
    patience: float = 60.0
    statuses: frozenset[int] = _MAY_RETRY

    def __post_init__(self) -> None:
        _config.count(self.attempts, "attempts")
        _config.seconds(self.base, "base")
        _config.seconds(self.cap, "cap")
        if self.patience != 0:
            _config.seconds(self.patience, "patience")
        if wrong := sorted(set(self.statuses) - _MAY_RETRY):
            raise BctrlConfigError(
                f"statuses contains {wrong[0]!r}", cure="Choose from 408, 429 and 500 to 599"
            )

    def backoff(self, failures: int, uniform: Callable[[float, float], float]) -> float:
        """Return the seconds to wait after this many failures in a row."""
        longest = min(self.cap, self.base * 2.0 ** min(failures - 1, _LARGEST_EXPONENT))
        return uniform(0.0, longest)


class Retries:
    """What one stop has spent of its policy.

    Args:
        policy: What it may spend.
        uniform: The source of jitter.
    """

    __slots__ = ("_failed", "_failures", "_patience_ends", "_policy", "_throttles", "_uniform")

    def __init__(
        self, policy: RetryPolicy, uniform: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._policy = policy
        self._uniform = uniform
        self._failures = 0
        self._throttles = 0
        self._patience_ends = 0.0
        self._failed: list[BctrlError] = []

    def delay(self, error: BctrlError, now: float) -> float | None:
        """Return how many seconds to wait before the next attempt, None to give up.

        Args:
            error: How the last attempt failed.
            now: The time of a monotonic clock, in seconds.
        """
        self._failed.append(error)
        if not is_transient(error, self._policy.statuses):
            return None
        if error.status in _THROTTLED:
            return self._delay_throttled(error.retry_after, now)
        self._failures += 1
        if self._failures >= self._policy.attempts:
            return None
        return self._policy.backoff(self._failures, self._uniform)

    def account(self, error: BctrlError) -> None:
        """Tell the error that ends the stop about the attempts before it."""
        for number, failed in enumerate(self._failed, start=1):
            error.may_have_stopped |= failed.may_have_stopped
            if failed is not error:
                error.add_note(f"attempt {number}: {failed.summary}")

    def _delay_throttled(self, retry_after: float | None, now: float) -> float | None:
        self._throttles += 1
        if self._throttles == 1:
            self._patience_ends = now + self._policy.patience
        left = self._patience_ends - now
        if left <= 0 or (retry_after or 0.0) > left:
            # Knocking before the time the server named would only add to its load.
            return None
        jitter = min(self._policy.backoff(self._throttles, self._uniform), left)
        return max(retry_after or 0.0, jitter)


def is_transient(error: BctrlError, statuses: frozenset[int]) -> bool:
    """Whether the same request may succeed later (design: connection, timeout, 408, 429, 5xx)."""
    if isinstance(error, BctrlApiError):
        return error.status in statuses
    # With a status there was an answer, which only could not be read: to ask again would turn
    # a stop that worked into a conflict.
    return isinstance(error, BctrlNetworkError) and error.status is None
