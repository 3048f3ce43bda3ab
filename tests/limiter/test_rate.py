"""The rate under throttling, simulated in virtual time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial

import pytest
from support import virtual_time
from support.throttling import Fleet, Run, Server, fixed_window, throttled, token_bucket

from bctrl_async import BctrlError
from bctrl_async._limiter.bounds import FixedRate

bucket = partial(token_bucket, lambda _: 200.0, burst=50)


def unlimited() -> Server:
    return lambda _: None


def no_burst(retry_after: float | None = None) -> Server:
    """Make a server that limits like nginx's `limit_req` without a burst."""
    next_start = 0.0

    def serve(now: float) -> BctrlError | None:
        nonlocal next_start
        if now < next_start:
            return throttled(retry_after)
        next_start = now + 1 / 200
        return None

    return serve


def falling_bucket() -> Server:
    """Make a server whose limit is a quarter for half a minute."""
    return token_bucket(lambda now: 50.0 if 10 <= now < 40 else 200.0, burst=50)


def at_random(
    share: float,
    seed: float | None = None,
    retry_after: float | None = None,
    otherwise: Callable[[], Server] = unlimited,
    ends: float = math.inf,
) -> Server:
    """Make a server that throttles a share until a time, and others as another does."""
    rng, server = random.Random(share if seed is None else seed), otherwise()
    return lambda now: (
        throttled(retry_after) if now < ends and rng.random() < share else server(now)
    )


def refusing(since: float, until: float) -> Server:
    return lambda now: throttled() if since <= now < until else None


@dataclass(frozen=True)
class Case:
    """Stops at a new server, the most seconds, and the most throttled (a share).

    A hundred workers make them, unless all start `at_once`. `latency` may depend on the
    number of attempts in flight, of which the server accepts `server_limit`.
    """

    server: Callable[[], Server]
    count: int
    seconds: float
    throttled: float = 0.0
    _: KW_ONLY
    latency: float | Callable[[int], float] = 0.01
    at_once: bool = False
    limit: int = 100
    server_limit: float = math.inf
    seed: int = 0


CASES = {
    # The start costs some tenths of a second, once.
    "calls in a row": Case(unlimited, 100, 2.02, limit=1, latency=0.02),
    "a hundred quick calls": Case(unlimited, 100, 0.15, at_once=True, latency=0.01),
    "a hundred slow calls": Case(unlimited, 100, 1.65, at_once=True, latency=1.0),
    "many calls": Case(unlimited, 20_000, 2.17, at_once=True),
    "no limit": Case(unlimited, 10_000, 21, latency=0.2),
    "latency that grows with load": Case(
        unlimited, 2000, 11, latency=lambda in_flight: 0.005 * in_flight
    ),
    # A limit: the ideal is (count - burst) / 200.
    "a token bucket": Case(bucket, 2000, 12.2, 0.1, latency=0.1),
    "a token bucket nearby": Case(bucket, 2000, 12.2, 0.1, latency=0.002),
    "a token bucket and single calls": Case(bucket, 2000, 12.2, 0.1, at_once=True),
    "a token bucket with Retry-After": Case(
        partial(bucket, retry_after=1), 2000, 20, 0.05
    ),
    "a server without bursts": Case(no_burst, 2000, 40, 0.1, latency=0.002),
    "a server without bursts that asks to wait": Case(
        partial(no_burst, 1), 2000, 40, 0.1, latency=0.002
    ),
    "a fixed window": Case(partial(fixed_window, 200), 20_000, 110, 0.05),
    # Fault: without a success the rate stayed, so most requests were throttled.
    "a window of a minute": Case(partial(fixed_window, 600, 60.0), 2000, 200, 0.4),
    # Fault: each late answer of a burst made the rate step down.
    "answers after four seconds": Case(bucket, 4000, 30, 0.3, latency=4.0, limit=1000),
    # The full rate takes four seconds; some eight if the samples' rate is taken for it.
    "a high limit": Case(
        partial(token_bucket, lambda _: 5000.0, burst=50), 20_000, 7, 0.1, latency=0.005
    ),
    "a bound on concurrency": Case(
        unlimited, 20_000, 125, 0.05, latency=0.1, server_limit=20
    ),
    "a bound on the concurrency of slow requests": Case(
        unlimited, 1500, 600, 0.6, latency=1.0, server_limit=10
    ),
    # Ten seconds at 200, thirty at 50, and the rest at 200 again.
    "a limit that falls and rises": Case(falling_bucket, 20_000, 141, 0.05),
    # A thousand per second before and after it, and some time to recover.
    "an outage of 429s": Case(partial(refusing, 5, 35), 20_000, 65, 0.05, latency=0.1),
    # Throttling at random. Fault: each was taken for a limit, down to a few requests a
    # second.
    "a hundredth throttled": Case(
        partial(at_random, 0.01), 3000, 5, 0.03, latency=0.03
    ),
    "a fiftieth throttled": Case(
        partial(at_random, 0.02), 10_000, 6, 0.04, latency=0.03
    ),
    "a sixteenth throttled": Case(
        partial(at_random, 0.06), 3000, 30, 0.1, latency=0.03
    ),
    "a third throttled": Case(partial(at_random, 0.3), 3000, 120, 0.4, latency=0.03),
    "a tenth throttled with Retry-After": Case(
        partial(at_random, 0.1, retry_after=0.01), 3000, 60, 0.2, latency=0.03
    ),
    # Fault: a comparison that declined by bad luck started again at a tenth of the
    # rate.
    "a twentieth throttled and a limit": Case(
        partial(at_random, 0.05, 1, otherwise=bucket), 10_000, 99, 0.1, seed=1
    ),
    "a twentieth throttled and a limit, in bad luck": Case(
        partial(at_random, 0.05, 12, otherwise=bucket), 10_000, 99, 0.1, seed=12
    ),
    "a fiftieth throttled and a limit": Case(
        partial(at_random, 0.02, 13, otherwise=bucket), 10_000, 99, 0.04, seed=13
    ),
    # Fault: a trial that nothing was throttled in held the rate for ever.
    "throttling at random that ends": Case(
        partial(at_random, 0.05, 1, ends=10), 20_000, 40, 0.1, latency=0.1, seed=1
    ),
    "an outage of 429s amid throttling at random": Case(
        partial(at_random, 0.05, otherwise=partial(refusing, 20, 50)),
        20_000,
        600,
        0.1,
        latency=0.1,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_stops_take_hardly_longer_than_the_server_allows_with(case: Case) -> None:
    random.seed(case.seed)
    seconds = case.latency
    latency = seconds if callable(seconds) else lambda _: seconds
    run = Run(case.server(), latency, case.limit, case.server_limit)
    virtual_time.run(run.gather(case.count) if case.at_once else run.bulk(case.count))

    assert run.gave_up == 0
    assert run.seconds <= case.seconds
    assert run.throttled <= case.throttled * run.requests


def test_until_an_attempt_succeeds_150_a_second_start() -> None:
    run = Run(unlimited(), latency=lambda _: 0.4)
    virtual_time.run(run.gather(200))
    # It includes the burst that makes up for late timers.
    assert sum(start < 0.4 for start in run.starts) == pytest.approx(60, abs=4)


class TestCap:
    @pytest.mark.parametrize("cap", [1, 300])
    def test_no_second_has_more_starts_than_the_cap(self, cap: int) -> None:
        run = Run(unlimited(), bound=FixedRate(cap))
        virtual_time.run(run.gather(5 * cap))
        assert run.seconds == pytest.approx((5 * cap - 1) / cap, abs=0.1)
        for start in run.starts:
            started = sum(start <= other < start + 1 for other in run.starts)
            assert started <= cap * 1.02 + 1

    def test_below_a_limit_nothing_is_throttled(self) -> None:
        run = Run(token_bucket(lambda _: 200.0, burst=10), bound=FixedRate(100))
        virtual_time.run(run.bulk(1000))
        assert run.throttled == 0
        assert run.seconds == pytest.approx(10, rel=0.05)


class TestManyLimiters:
    """Several limiters on one limit, as in several processes with one key."""

    def run(
        self,
        count: int,
        *,
        seed: int = 0,
        retry_after: float | None = None,
        late: bool = False,
    ) -> Fleet:
        rng = random.Random(seed)
        starts = [rng.uniform(0.0, 1.0) for _ in range(count)]
        fleet = Fleet(bucket(retry_after=retry_after), starts + [20.0] * late, seed)
        fleet.run(60.0)
        return fleet

    @pytest.mark.parametrize(
        ("count", "retry_after", "share", "used"),
        [
            (1, None, 0.005, 0.95),
            (4, None, 0.01, 0.95),
            (16, None, 0.06, 0.95),
            (8, 1, 0.02, 0.85),
        ],
    )
    def test_hardly_any_request_is_throttled_and_the_limit_is_used(
        self, count: int, retry_after: float | None, share: float, used: float
    ) -> None:
        """Fault: each ignored the others' load, as throttling at any rate."""
        fleet = self.run(count, retry_after=retry_after)
        assert fleet.throttled_share(20, 60) <= share
        assert sum(fleet.rates(20, 60)) >= used * 200

    # The second is a seed for which a comparison without a trial throttled a fifth.
    @pytest.mark.parametrize("seed", [1, 21])
    def test_eight_have_similar_shares(self, seed: int) -> None:
        fleet = self.run(8, seed=seed)
        assert fleet.throttled_share(20, 60) <= 0.02
        assert fleet.fairness(20, 60) >= 0.8

    def test_a_late_joiner_gets_its_share(self) -> None:
        fleet = self.run(3, late=True)
        assert fleet.throttled_share(30, 60) <= 0.02
        assert fleet.rates(30, 60)[3] >= 200 / 4 / 2

    def test_eight_that_start_together_learn_of_a_limit_by_few_throttled_requests(
        self,
    ) -> None:
        """Fault: each sent a hundred at once, and a quarter was throttled."""
        fleet = Fleet(bucket(), [n / 100 for n in range(8)])
        fleet.run(60.0, 250)
        assert fleet.throttled_share(0.0, 60.0) <= 0.07
        assert fleet.fairness(0.0, min(fleet.ended)) >= 0.85
