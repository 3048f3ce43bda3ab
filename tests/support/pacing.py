"""A shared pace in memory whose store can fail, and attempts that are paced by it."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.queues import Priority
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async.pace import Pace


class MemoryPace(Pace):
    """A pace whose store is in this process, and is waited for as Redis is.

    Args:
        rate: The rate.
        latency: Seconds that an answer takes, half of them before the slots are
            reserved.

    Attributes:
        error: Raised by every call, if set.
        outage: The times from and until which every call fails.
        calls: The times of all calls.
        asked_for: The slots that each call asked for.
    """

    def __init__(self, *, rate: float, latency: float = 0.0005) -> None:
        super().__init__(rate=rate)
        self.latency = latency
        self.error: BaseException | None = None
        self.outage = (0.0, 0.0)
        self.calls: list[float] = []
        self.asked_for: list[int] = []
        self._reserved_until = 0.0

    async def acquire(self, slots: int) -> None:
        loop = asyncio.get_running_loop()
        self.calls.append(loop.time())
        self.asked_for.append(slots)
        async with asyncio.timeout(1.0):
            await asyncio.sleep(self.latency / 2)
            now = loop.time()
            if self.error is not None:
                raise self.error
            if self.outage[0] <= now < self.outage[1]:
                raise ConnectionRefusedError("outage")
            start = max(self._reserved_until, now)
            self._reserved_until = start + slots / self.rate
            await asyncio.sleep(self.latency / 2)
        await asyncio.sleep(start - now)


@dataclass
class Member:
    """Attempts of one process, which all succeed after their latency.

    Attributes:
        starts: The times at which its attempts started.
    """

    pace: Pace
    latency: float = 0.01
    limit: int = 100
    starts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.limiter = Limiter(self.limit, AdaptiveRate(), self.pace)

    async def attempt(self, priority: Priority = Priority.SINGLE) -> float:
        """Make an attempt; return the seconds that it waited for its slot."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        if not self.limiter.acquire_nowait():
            await self.limiter.acquire(60.0, priority)
        self.starts.append(loop.time())
        await asyncio.sleep(self.latency)
        self.limiter.release("a runtime")
        return self.starts[-1] - began

    async def bulk(self, count: int, *, until: float = math.inf) -> None:
        """Make attempts as a bulk stop does, until a time or until all are made."""
        remaining = iter(range(count))

        async def work() -> None:
            for _ in remaining:
                if asyncio.get_running_loop().time() >= until:
                    return
                await self.attempt(Priority.BULK)

        await asyncio.gather(*(work() for _ in range(self.limit)))

    async def close(self) -> None:
        self.limiter.close()
        await self.limiter.close_pace()

    def between(self, begin: float, end: float) -> int:
        """Return the number of attempts that started in a span of time."""
        return sum(begin <= start < end for start in self.starts)


def jain(shares: list[int]) -> float:
    """Return Jain's index: 1 if all shares are equal, 1/n if a single share counts."""
    squares = sum(share**2 for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares)


def most_in_a_window(starts: list[float], rate: float) -> float:
    """Return by how many attempts a window exceeds what the rate allows in it."""
    # With x(i) = i - rate * time(i), a window from i to j exceeds it by x(j) - x(i) +
    # 1.
    most, lowest = 0.0, math.inf
    for number, start in enumerate(sorted(starts)):
        position = number - rate * start
        lowest = min(lowest, position)
        most = max(most, position - lowest + 1)
    return most
