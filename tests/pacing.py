"""A shared pace in memory whose store can fail, and attempts that are paced by it."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.queues import Priority
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async.pace import Pace
from bctrl_async.pace._leases import Lease, Schedule, Store


class MemoryPace(Pace):
    """A pace whose store is in this process.

    Args:
        rate: The rate.
        latency: Seconds that an answer takes, half of them before the lease is made.

    Attributes:
        schedule: The state of the store.
        clock: The seconds by which the clock of the store is ahead.
        error: Raised by every call, if set.
        answer: Answered to every call, if set.
        outage: The times from and until which every call fails.
        calls: The times of all calls.
        asked_for: The slots that each call asked for.
        opened: The number of stores that were opened.
        closed: The number of stores that were closed.
    """

    def __init__(self, *, rate: float, latency: float = 0.0005) -> None:
        super().__init__(rate=rate)
        self.latency = latency
        self.schedule = Schedule()
        self.clock = 0.0
        self.error: BaseException | None = None
        self.answer: Lease | None = None
        self.outage = (0.0, 0.0)
        self.calls: list[float] = []
        self.asked_for: list[int] = []
        self.opened = self.closed = 0

    def open(self) -> Store:
        self.opened += 1
        return _MemoryStore(self)


class _MemoryStore:
    def __init__(self, pace: MemoryPace) -> None:
        self._pace = pace

    async def lease(self, member: str, slots: int, since: float) -> Lease:
        pace, loop = self._pace, asyncio.get_running_loop()
        pace.calls.append(loop.time())
        pace.asked_for.append(slots)
        await asyncio.sleep(pace.latency / 2)
        now = loop.time()
        if pace.error is not None:
            raise pace.error
        if pace.outage[0] <= now < pace.outage[1]:
            raise ConnectionRefusedError("outage")
        lease = pace.schedule.lease(now + pace.clock, pace.rate, member, slots, since)
        await asyncio.sleep(pace.latency / 2)
        return pace.answer or lease

    async def close(self) -> None:
        self._pace.closed += 1
        if self._pace.error is not None:
            raise self._pace.error


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
    """Return Jain's fairness index: 1 if all shares are equal, 1/n if one has everything."""
    squares = sum(share**2 for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares)


def most_in_a_window(starts: list[float], rate: float) -> float:
    """Return by how many attempts a window of any length exceeds what the rate allows in it."""
    # With x(i) = i - rate * time(i), a window from i to j exceeds it by x(j) - x(i) + 1.
    most, lowest = 0.0, math.inf
    for number, start in enumerate(sorted(starts)):
        position = number - rate * start
        lowest = min(lowest, position)
        most = max(most, position - lowest + 1)
    return most
