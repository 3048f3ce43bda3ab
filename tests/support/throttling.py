"""Simulated rate-limited servers, and stops sent to them through the real limiter."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from bctrl_async import BctrlError, BctrlRateLimitError, RetryPolicy
from bctrl_async._calls.retry import RetryQuota, RetryState
from bctrl_async._kinds import Failure, Repeat
from bctrl_async._limiter.bounds import FixedRate
from bctrl_async._limiter.evidence import History
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.queues import Priority
from bctrl_async._limiter.rate import AdaptiveRate
from support import virtual_time

_PATIENT = RetryPolicy(patience=300)

Server = Callable[[float], BctrlError | None]
"""Takes the time of a request; returns its error, or None for a success."""


def past_start() -> AdaptiveRate:
    """Make a rate whose start is over, long ago: all attempts have succeeded."""
    rate = AdaptiveRate()
    while rate.is_starting:
        rate.on_success(-1000.0, History())
        rate.on_start(-1000.0)
    return rate


def throttled(retry_after: float | None = None) -> BctrlError:
    return BctrlRateLimitError("429", status=429, retry_after=retry_after)


def show_limit(
    limiter: Limiter, retry_after: float | None = None, *workspaces: str
) -> None:
    """Let so many be throttled that there is a limit, of these workspaces."""
    for number in range(8):
        workspace = workspaces[number % len(workspaces)] if workspaces else ""
        limiter._on_failure(
            Failure.of(throttled(retry_after)), History(workspace=workspace)
        )


async def answer(limiter: Limiter, parsed: object) -> None:
    """Make an attempt that takes no time and has this answer."""
    await limiter.acquire(60.0)
    release(limiter, parsed)


def release(limiter: Limiter, answer: object, history: History | None = None) -> bool:
    """Release the slot of an attempt with this answer."""
    if isinstance(answer, BctrlError):
        answer = Failure.of(answer)
    return limiter.release(answer, history)


def token_bucket(
    rate: Callable[[float], float], burst: float, retry_after: float | None = None
) -> Server:
    """Make a server with a rate and a burst, as nginx's `limit_req … nodelay`."""
    excess, last = 0.0, 0.0

    def serve(now: float) -> BctrlError | None:
        nonlocal excess, last
        excess = max(excess - (now - last) * rate(now), 0.0)
        last = now
        if excess > burst:
            return throttled(retry_after)
        excess += 1.0
        return None

    return serve


def fixed_window(limit: int, seconds: float = 1.0) -> Server:
    """Make a server that accepts up to `limit` requests in each window of the clock."""
    counts: Counter[int] = Counter()

    def serve(now: float) -> BctrlError | None:
        window = int(now / seconds)
        counts[window] += 1
        return throttled() if counts[window] > limit else None

    return serve


def sliding_log(limit: int, seconds: float, *, counts_refused: bool) -> Server:
    """Make a server that accepts up to `limit` requests in any such span.

    As in many limiters on Redis, a refused request may count as well.
    """
    times: deque[float] = deque()

    def serve(now: float) -> BctrlError | None:
        while times and times[0] <= now - seconds:
            times.popleft()
        is_refused = len(times) >= limit
        if counts_refused or not is_refused:
            times.append(now)
        return throttled() if is_refused else None

    return serve


@dataclass
class Run:
    """Stops that share one limiter, with counts of their requests.

    They repeat exactly if `random`, which makes the jitter of their retries, is seeded
    before.
    """

    serve: Server
    latency: Callable[[int], float] = lambda _: 0.01
    limit: int = 100
    server_limit: float = math.inf
    """Requests in flight that the server accepts."""
    bound: FixedRate | None = None
    halfway: bool = False
    """The server decides half a latency after a request was sent, not at once."""
    requests: int = 0
    throttled: int = 0
    gave_up: int = 0
    seconds: float = 0.0
    starts: list[float] = field(default_factory=list)
    _in_flight: int = 0

    async def stop(self, limiter: Limiter) -> None:
        loop = asyncio.get_running_loop()
        retries = RetryState(_PATIENT, RetryQuota(), Repeat.CONVERGES)
        while True:
            await limiter.acquire(300, Priority.BULK, retries)
            self.requests += 1
            self.starts.append(loop.time())
            self._in_flight += 1
            latency = self.latency(self._in_flight)
            there = latency / 2 if self.halfway else 0.0
            if there:
                await asyncio.sleep(there)
            answer = (
                self.serve(loop.time())
                if self._in_flight <= self.server_limit
                else throttled()
            )
            await asyncio.sleep(latency - there)
            self._in_flight -= 1
            target_failed = release(limiter, answer or "a runtime", retries)
            if answer is None:
                return
            self.throttled += 1
            retries.record(Failure.of(answer), target_failed=target_failed)
            delay = retries.delay(loop.time())
            if delay is None:
                self.gave_up += 1
                return
            await limiter.sleep(delay)

    async def gather(self, count: int) -> None:
        limiter = Limiter(self.limit, AdaptiveRate(), self.bound)
        start = asyncio.get_running_loop().time()
        await asyncio.gather(*(self.stop(limiter) for _ in range(count)))
        self.seconds = asyncio.get_running_loop().time() - start

    async def bulk(self, count: int) -> None:
        limiter = Limiter(self.limit, AdaptiveRate(), self.bound)
        remaining = iter(range(count))

        async def work() -> None:
            for _ in remaining:
                await self.stop(limiter)

        start = asyncio.get_running_loop().time()
        await asyncio.gather(*(work() for _ in range(self.limit)))
        self.seconds = asyncio.get_running_loop().time() - start


@dataclass
class Fleet:
    """Bulk stops of several limiters at one server, with records of their responses.

    Args:
        serve: The server.
        starts: The time at which each bulk stop starts.
        seed: The seed of all latencies and of the jitter.
        latencies: The bounds of the seconds that a response takes.
        halfway: The server decides half a latency after a request was sent, not at
            once.

    Attributes:
        accepted: The times of the requests of each that were accepted.
        throttled: The times of those that were not.
        ended: The time at which each bulk stop ended.
    """

    serve: Server
    starts: list[float]
    seed: int = 0
    latencies: tuple[float, float] = (0.005, 0.015)
    halfway: bool = False
    accepted: list[list[float]] = field(init=False)
    throttled: list[list[float]] = field(init=False)
    ended: list[float] = field(init=False)

    def run(self, seconds: float, stops: int = 10**9) -> None:
        """Keep all of them busy until this time, or until each has made its stops."""
        self.accepted = [[] for _ in self.starts]
        self.throttled = [[] for _ in self.starts]
        self.ended = [math.inf for _ in self.starts]
        rng = random.Random(self.seed)
        # It decides the jitter of the retries.
        random.seed(self.seed)

        async def bulk(number: int, start: float) -> None:
            def serve(now: float) -> BctrlError | None:
                answer = self.serve(now)
                (self.throttled if answer else self.accepted)[number].append(now)
                return answer

            await asyncio.sleep(start)
            run = Run(
                serve, lambda _: rng.uniform(*self.latencies), halfway=self.halfway
            )
            await run.bulk(stops)
            self.ended[number] = asyncio.get_running_loop().time()

        async def main() -> None:
            bulks = [
                asyncio.create_task(bulk(*member)) for member in enumerate(self.starts)
            ]
            await asyncio.wait(bulks, timeout=seconds)
            for task in bulks:
                task.cancel()
            await asyncio.gather(*bulks, return_exceptions=True)

        virtual_time.run(main())

    def rates(self, start: float, end: float) -> list[float]:
        """Return the accepted requests per second of each limiter in this span."""
        return [_count([times], start, end) / (end - start) for times in self.accepted]

    def throttled_share(self, start: float, end: float) -> float:
        """Return the share of the requests of this span that was throttled."""
        throttled = _count(self.throttled, start, end)
        return throttled / (throttled + _count(self.accepted, start, end))

    def fairness(self, start: float, end: float) -> float:
        """Return Jain's index of the rates: 1 if equal, 1/n if only one counts."""
        rates = self.rates(start, end)
        return sum(rates) ** 2 / (len(rates) * sum(rate * rate for rate in rates))


def _count(records: list[list[float]], start: float, end: float) -> int:
    return sum(start <= time < end for times in records for time in times)
