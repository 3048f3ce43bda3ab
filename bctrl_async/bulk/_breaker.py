"""Whether the server answers at all, as the workers of one bulk stop find out together."""

from __future__ import annotations

import asyncio

from bctrl_async._calls.call import Call
from bctrl_async._calls.retry import RetryPolicy, probe_delay
from bctrl_async._limiter.limiter import Limiter
from bctrl_async.models import Runtime

_ONE_TARGET = 0.2
"""The share of the patience after which the question is put with another target."""


class CircuitBreaker:
    """Decides what follows upon a request that the server did not answer.

    While others are answered the failure is the request's own, and its policy decides. When nobody
    is answered, all hold what they have, and one of them asks the server again and again until it
    answers or is given up. So an outage costs a request now and then, however many wait. It may be
    the target that breaks the server: so it is given up after a while, and another one asks.

    Args:
        limiter: Knows whether anybody was answered.
        policy: How long the waits are, and after how many attempts a server is given up that has
            never answered.
        patience: Seconds after which one is given up that has answered before.

    Attributes:
        gave_up: Whether the server is.
    """

    def __init__(self, limiter: Limiter, policy: RetryPolicy, patience: float) -> None:
        self._limiter = limiter
        self._policy = policy
        self._patience = patience
        self._answers_before = limiter.answers
        self._began: float | None = None
        self._asking: Call[Runtime] | None = None
        self._asking_since = 0.0
        self._failures = 0
        self._answers_then = 0
        self._asked = 0
        self._askers = 0
        self._news = asyncio.Event()
        self.gave_up: bool = False

    @property
    def is_open(self) -> bool:
        """Whether nobody is answered at the moment."""
        return self._began is not None

    def reset(self) -> None:
        """Let all go on: the server answers."""
        if self._began is not None:
            self._began = None
            self._pass_on()

    async def wait_to_retry(self, call: Call[Runtime], answers: int) -> bool:
        """Wait until a call should be tried again, and tell whether it should.

        Args:
            call: The call, whose last attempt was not answered.
            answers: The limiter's count before that attempt.
        """
        # What was sent before an outage and is given up only now says nothing of its end.
        if self._limiter.answers != (answers if self._began is None else self._answers_then):
            self.reset()
            return await self._retry_alone(call)
        if self._began is None:
            self._began, self._answers_then = _now(), self._limiter.answers
            self._asked = self._askers = 0
        while self._asking is not None and self._asking is not call:
            await self._news.wait()
            if self.gave_up or self._began is None:
                return self._goes_on_with(call)
        return await self._ask(call, self._began)

    def _goes_on_with(self, call: Call[Runtime]) -> bool:
        if not self.gave_up:
            call.log_retry(0.0)
        return not self.gave_up

    async def _retry_alone(self, call: Call[Runtime]) -> bool:
        delay = None if call.retries is None else call.retries.delay(_now())
        if delay is None:
            return False
        call.log_retry(delay)
        await self._limiter.sleep(delay)
        return True

    async def _ask(self, call: Call[Runtime], began: float) -> bool:
        now = _now()
        if self._asking is None:
            self._asking, self._asking_since, self._failures = call, now, 0
            self._askers += 1
        self._failures += 1
        self._asked += 1
        self.gave_up, exhausted = self._verdict(now, now - began)
        if self.gave_up or exhausted:
            self._pass_on()
            return False
        delay = probe_delay(self._policy, self._failures)
        call.log_retry(delay)
        await self._limiter.sleep(delay)
        return True

    def _verdict(self, now: float, lasted: float) -> tuple[bool, bool]:
        """Decide whether to give up the server, or this target, as far as it has been asked."""
        if self._limiter.answers == self._answers_before:
            # It may be slow instead of dead while it still has requests to answer.
            enough = self._asked >= self._policy.attempts and not self._limiter.in_use
            return enough and self._askers > 1, enough
        return lasted > self._patience, now - self._asking_since > _ONE_TARGET * self._patience

    def _pass_on(self) -> None:
        self._asking = None
        self._news.set()
        self._news = asyncio.Event()


def _now() -> float:
    return asyncio.get_running_loop().time()
