"""Servers that exist only in virtual time, and stops that go to them through the real limiter."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from bctrl_async import BctrlError, BctrlRateLimitError, RetryPolicy
from bctrl_async._calls.retry import RetryQuota, RetryState
from bctrl_async._limiter.limiter import Limiter, Priority
from bctrl_async._limiter.rate import AdaptiveRate

Server = Callable[[float], BctrlError | None]
"""Decides what becomes of a request that arrives at this time."""


def refusal(retry_after: float | None = None) -> BctrlError:
    return BctrlRateLimitError("429", status=429, retry_after=retry_after)


def token_bucket(
    rate: Callable[[float], float], burst: float, retry_after: float | None = None
) -> Server:
    """Nginx's `limit_req … burst nodelay`: so many a second, and some more at once."""
    excess, last = 0.0, 0.0

    def serve(now: float) -> BctrlError | None:
        nonlocal excess, last
        excess = max(excess - (now - last) * rate(now), 0.0)
        last = now
        if excess > burst:
            return refusal(retry_after)
        excess += 1.0
        return None

    return serve


def fixed_window(limit: int, retry_after: float | None = None) -> Server:
    """So many in each second of the clock."""
    counts: Counter[int] = Counter()

    def serve(now: float) -> BctrlError | None:
        counts[int(now)] += 1
        return refusal(retry_after) if counts[int(now)] > limit else None

    return serve


@dataclass
class Run:
    """Stops that go through one limiter, and what became of them."""

    serve: Server
    latency: Callable[[int], float] = lambda _: 0.01
    limit: int = 100
    most_in_flight: float = math.inf
    cap: float | None = None
    requests: int = 0
    refused: int = 0
    lost: int = 0
    seconds: float = 0.0
    starts: list[float] = field(default_factory=list)
    _in_flight: int = 0

    async def stop(self, limiter: Limiter) -> None:
        loop = asyncio.get_running_loop()
        retries = RetryState(RetryPolicy(patience=300), RetryQuota())
        returning = False
        while True:
            await limiter.acquire(300, Priority.RETRY if returning else Priority.NEW)
            self.requests += 1
            self.starts.append(loop.time())
            self._in_flight += 1
            answer = (
                self.serve(loop.time()) if self._in_flight <= self.most_in_flight else refusal()
            )
            await asyncio.sleep(self.latency(self._in_flight))
            self._in_flight -= 1
            limiter.release(answer or "a runtime")
            if answer is None:
                return
            self.refused += 1
            retries.record(answer)
            delay = retries.delay(loop.time())
            if delay is None:
                self.lost += 1
                return
            await limiter.sleep(delay)
            returning = True

    async def all_at_once(self, count: int) -> None:
        limiter = Limiter(self.limit, AdaptiveRate(self.cap))
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(self.stop(limiter) for _ in range(count)))
        self.seconds = asyncio.get_running_loop().time() - began

    async def by_workers(self, count: int) -> None:
        limiter = Limiter(self.limit, AdaptiveRate(self.cap))
        left = deque(range(count))

        async def work() -> None:
            while left:
                left.popleft()
                await self.stop(limiter)

        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(work() for _ in range(self.limit)))
        self.seconds = asyncio.get_running_loop().time() - began
