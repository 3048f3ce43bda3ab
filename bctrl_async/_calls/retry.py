"""Retry decisions: policy, quota and the state of one call, without I/O or a clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

import msgspec

from bctrl_async import _config, _quick_failures
from bctrl_async._kinds import Cost, Failure, Repeat
from bctrl_async._limiter.evidence import History
from bctrl_async.errors import BctrlConfigError

_MAY_RETRY = frozenset({408, 429, *range(500, 600)})
_CALL_PATIENCE = 60.0
BULK_PATIENCE = 300.0
"""Seconds for which a bulk stop without a deadline waits for a busy server."""
_MAX_PROBE_DELAY = 5.0
"""The most seconds between two probes or polls: a change is seen no later."""
_LARGEST_EXPONENT = 60
"""The largest of a backoff: `2.0 ** 1024` would raise OverflowError."""
_MAX_NOTES = 10
"""The most attempts that an error lists in its notes; a call may make a hundred."""


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """A retry policy with exponential backoff and full jitter.

    A stop is safe to repeat. A failed connection or a server error costs one of
    `attempts`; a connection that this machine cannot hold beside others costs none. A
    429 or 503 costs `patience` instead, because the server is busy. A gateway's 503,
    which has no `code` of the API, costs an attempt from the second on if other targets
    are answered meanwhile, because its target is then dead. The delay after the nth
    failure is random between 0 and the smaller of `cap` and `base * 2**(n-1)` seconds,
    and never shorter than Retry-After. In an outage of the server, a bulk stop waits
    and probes it, and a target's first failures do not count. An untrusted certificate
    ends a single call without a retry, and a bulk stop if the server has never answered
    it.

    Args:
        attempts: Attempts that may fail, from 1; a busy server's 429 and 503 do not
            count. For a single attempt, set `patience` to 0 as well.
        base: The longest first delay in seconds, above 0.
        cap: The longest delay in seconds, above 0.
        patience: Seconds of all delays after a 429 or 503 until giving up, and the
            longest Retry-After to wait for; 0 gives up at once. Waiting for a slot
            costs none. None is 60 for a single stop; for a bulk stop it is its
            deadline, and at most 300.
        statuses: The statuses to retry, of 408, 429 and 500 to 599.

    Raises:
        BctrlConfigError: A value is out of range.
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
            _config.seconds(
                self.patience, "patience", "0 or a positive number of seconds"
            )
        _config.check_type(self.statuses, Collection, "statuses", "a set of statuses")
        for status in self.statuses:
            # The type comes first: an unhashable status, such as a list, raises.
            if not isinstance(status, int) or status not in _MAY_RETRY:
                raise BctrlConfigError(
                    f"invalid statuses {status!r}: expected 408, 429 or 500 to 599",
                    argument="statuses",
                )

    @property
    def max_throttle_wait(self) -> float:
        """The patience of a single call in seconds, 60 if None."""
        return _CALL_PATIENCE if self.patience is None else self.patience

    def for_bulk(self, deadline: float | None) -> RetryPolicy:
        """Return the policy of a bulk stop, given its deadline in seconds."""
        if self.patience is not None:
            return self
        patience = BULK_PATIENCE
        if deadline is not None:
            patience = min(deadline, patience)
        return msgspec.structs.replace(self, patience=patience)

    def backoff(self, failures: int, uniform: Callable[[float, float], float]) -> float:
        """Return the delay in seconds after this many consecutive failures."""
        if _quick_failures.is_on:
            return 0.0
        longest = min(self.cap, self.base * 2.0 ** min(failures - 1, _LARGEST_EXPONENT))
        return uniform(0.0, longest)


class RetryQuota:
    """A retry quota, a token bucket like botocore's: it bounds retries in an outage.

    A success or a permanent error status adds 1, because the server works. Asking for a
    retry adds 0.1, then takes 1: even in an outage, a tenth of the retries are made.
    """

    _INITIAL = 10.0
    _MAX = 100.0
    _PER_ASK = 0.1

    def __init__(self) -> None:
        self._tokens = self._INITIAL

    def release(self) -> None:
        """Add a token, after a success or a permanent error status."""
        if self._tokens < self._MAX:
            self._tokens += 1.0

    def acquire(self) -> bool:
        """Take a token for a retry; return False if the quota is exhausted."""
        self._tokens += self._PER_ASK
        if _quick_failures.is_on:
            # Retries come at once, so that no answer could refill the bucket.
            return True
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


# Failures have exceptions, whose frames may refer to their call.
class RetryState(History, gc=True):
    """The retries of one call: its failures so far, and its next delay."""

    policy: RetryPolicy
    quota: RetryQuota
    repeat: Repeat
    uniform: Callable[[float, float], float] = random.uniform
    failed_attempts: int = 0
    failures: int = 0
    """Failed attempts that cost an attempt of the policy."""
    hung: int = 0
    """Attempts that were not answered in the time limit of a test."""
    busy: int = 0
    """Throttled attempts that cost patience."""
    target_failed: bool = False
    """True if a gateway answered 503 for this target alone; it costs an attempt."""
    waited: float = 0.0
    """Seconds of the patience that were spent."""
    resumes_at: float | None = None
    """The time of the next attempt of a bulk stop's call that has no worker."""
    last_failures: tuple[Failure, ...] = ()
    in_doubt: bool = False
    """True if a failed attempt may have taken effect."""
    status: int | None = None
    """The status of the last answer."""
    advice: str | None = None
    """The reason why the last failure is not retried, if not the failure's own."""
    lacks_quota: bool = False
    """True if only the quota keeps the call from its next attempt."""

    def record(self, failure: Failure, *, target_failed: bool = False) -> None:
        """Record a failed attempt, and whether a gateway's 503 is about its target."""
        self.failed_attempts += 1
        if failure.status is not None:
            self.status = failure.status
        self.in_doubt |= self.leaves_doubt(failure)
        self.last_failures = (*self.last_failures, failure)[-_MAX_NOTES:]
        self.target_failed = target_failed
        self.advice = None
        if failure.kind.is_throttling:
            self.count_throttled()
        if _quick_failures.hangs(failure):
            self.hung += 1
            self.advice = _quick_failures.ADVICE
        if failure.kind.is_refusal:
            self.quota.release()

    def leaves_doubt(self, failure: Failure) -> bool:
        """Return True if an attempt may have worked, or repeating it would do harm."""
        is_harmful = failure.kind.costs is Cost.IF_SAFE and self.repeat is Repeat.ONCE
        return failure.may_have_worked or is_harmful

    def may_succeed(self, failure: Failure) -> bool:
        """Return True if the same request may be sent again, and may succeed."""
        if self.repeat not in failure.kind.costs.repeats:
            return False
        if self.in_doubt and self.repeat is Repeat.ONCE:
            return False
        # A read whose body was cut short has the status of a success.
        if failure.status is None or failure.kind.costs is Cost.IF_READ:
            return True
        return failure.status in self.policy.statuses

    def delay(self, now: float) -> float | None:
        """Charge the last failure; return the seconds to wait, or None to give up."""
        failure = self.last_failures[-1]
        if not self.may_succeed(failure):
            return None
        is_busy = False
        if failure.kind.is_throttling:
            self.wait_from(now)
            is_busy = not self.target_failed
        patience = self.policy.max_throttle_wait
        if is_busy:
            self.busy += 1
            patience -= self.waited
            gives_up = patience <= 0
        else:
            self.failures += 1
            gives_up = self.failures >= self.policy.attempts
        # A target that hangs is retried once in a test.
        if gives_up or self.hung > 1 or _quick_failures.is_enough(self.busy):
            return None
        retry_after = failure.retry_after or 0.0
        if retry_after > patience:
            # The patience ends before the Retry-After, and an earlier retry would only
            # add load.
            wait = f"{retry_after:.0f} s (Retry-After)"
            self.advice = f"Call again in {wait}, or raise the patience"
            return None
        if not is_busy:
            return self.ask_quota()
        return self._throttled_delay(retry_after, patience)

    def _throttled_delay(self, retry_after: float, patience: float) -> float:
        """Return the delay after a throttled response, which costs patience."""
        if _quick_failures.is_on:
            return 0.0
        backoff = self.policy.backoff(self.busy, self.uniform)
        delay = max(retry_after, min(backoff, patience))
        self.waited += delay
        return delay

    def resume(self, now: float) -> float:
        """End the wait without a worker; return the seconds that are left of it."""
        if self.resumes_at is None:
            return 0.0
        delay = max(self.resumes_at - now, 0.0)
        self.resumes_at = None
        return delay

    def ask_quota(self) -> float | None:
        """Take a token of the quota; return the delay, or None if there is no token."""
        # The quota spares the server, which a failure of the machine does not reach.
        is_local = self.last_failures[-1].kind.is_local
        self.lacks_quota = not (is_local or self.quota.acquire())
        if self.lacks_quota:
            self.advice = "Not retried: the retry quota is exhausted. Call again later"
            return None
        backoff = self.policy.backoff(self.failures, self.uniform)
        if _quick_failures.is_on:
            return backoff
        return max(self.last_failures[-1].retry_after or 0.0, backoff)

    @property
    def last_failure(self) -> Failure | None:
        """The failure of the last attempt."""
        return self.last_failures[-1] if self.last_failures else None

    @property
    def uncounted(self) -> int:
        """The number of failed attempts that cost neither attempts nor patience."""
        return self.failed_attempts - self.failures - self.busy


def probe_delay(policy: RetryPolicy, probes: int) -> float:
    """Return the seconds until the next probe or poll, given how many there were."""
    # Equal jitter keeps the delay above 0: a single prober needs no spreading.
    share = random.uniform(0.5, 1.0)  # noqa: S311 - jitter is not a secret.
    # `max` takes the place of a random number: the backoff is the longest.
    longest = policy.backoff(probes, max)
    return min(share * longest, _MAX_PROBE_DELAY)
