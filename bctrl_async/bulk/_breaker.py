"""A circuit breaker: detect a server that answers nothing, and probe it with one call."""

from __future__ import annotations

import asyncio

from bctrl_async._calls.call import Call
from bctrl_async._calls.retry import RetryPolicy, probe_delay
from bctrl_async._limiter.limiter import Limiter
from bctrl_async.errors import is_unanswered
from bctrl_async.models import Runtime

_PROBE_SHARE = 0.2
"""The share of the patience after which another call becomes the probe."""


class CircuitBreaker:
    """A circuit breaker shared by the workers of one bulk stop.

    While other calls are answered, a failure is the call's own and its policy decides. The breaker
    opens when none is answered. Unlike the usual one it then holds all calls but the probe, which
    is sent again and again until the server answers or is given up: an outage costs a request now
    and then, however many calls wait. The probe's own target may break the server, so after a while
    another call becomes the probe.

    Args:
        limiter: The limiter, which counts the answers.
        policy: The delays between probes, and the attempts until a server is given up that has
            never answered.
        patience: Seconds until a server is given up that has answered before.

    Attributes:
        gave_up: True once the server is given up.
    """

    def __init__(self, limiter: Limiter, policy: RetryPolicy, patience: float) -> None:
        self._limiter = limiter
        self._policy = policy
        self._patience = patience
        self._answers_at_start = limiter.answers
        self._opened_at: float | None = None
        self._answers_at_open = 0
        self._probe: Call[Runtime] | None = None
        self._probe_since = 0.0
        self._probe_failures = 0
        self._probe_count = 0
        self._probers = 0
        self._changed = asyncio.Event()
        self.gave_up: bool = False

    @property
    def is_open(self) -> bool:
        """True while the server answers no call."""
        return self._opened_at is not None

    def reset(self) -> None:
        """Close the breaker: the server answers."""
        if self._opened_at is not None:
            self._opened_at = None
            self._release_probe()

    def leave(self, call: Call[Runtime]) -> None:
        """Let another call become the probe if this one was it and has ended."""
        if self._probe is call:
            self._release_probe()

    async def wait_to_retry(self, call: Call[Runtime]) -> bool:
        """Wait before retrying a call whose last attempt failed; return False to give up.

        The caller must `leave` when the call has ended.
        """
        failure = None if call.retries is None else call.retries.last_failure
        # While open, compare with the opening: an older attempt counts answers from before it.
        answers = self._answers_at_open if self.is_open else call.answers_before
        if failure is None or not is_unanswered(failure) or self._limiter.answers != answers:
            self.reset()
            return await call.back_off(self._limiter)
        if self._opened_at is None:
            self._opened_at, self._answers_at_open = _now(), self._limiter.answers
            self._probe_count = self._probers = 0
        while self._probe is not None and self._probe is not call:
            await self._changed.wait()
            if self.gave_up:
                return False
            if not self.is_open:
                call.log_retry(0.0)
                return True
        return await self._wait_to_probe(call, self._opened_at)

    async def _wait_to_probe(self, call: Call[Runtime], opened_at: float) -> bool:
        now = _now()
        if self._probe is None:
            self._probe, self._probe_since, self._probe_failures = call, now, 0
            self._probers += 1
        self._probe_failures += 1
        self._probe_count += 1
        self.gave_up, probe_gave_up = self._verdict(now, now - opened_at)
        if self.gave_up or probe_gave_up:
            return False
        delay = probe_delay(self._policy, self._probe_failures)
        call.log_retry(delay)
        await self._limiter.sleep(delay)
        return True

    def _verdict(self, now: float, open_for: float) -> tuple[bool, bool]:
        """Decide whether to give up the server, and whether to give up this probe."""
        if self._limiter.answers == self._answers_at_start:
            # While it has requests to answer, the server may be slow and not dead.
            enough = self._probe_count >= self._policy.attempts and not self._limiter.in_use
            return enough and self._probers > 1, enough
        return open_for > self._patience, now - self._probe_since > _PROBE_SHARE * self._patience

    def _release_probe(self) -> None:
        self._probe = None
        self._changed.set()
        self._changed = asyncio.Event()


def _now() -> float:
    return asyncio.get_running_loop().time()
