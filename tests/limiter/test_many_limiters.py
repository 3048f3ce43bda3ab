"""Many limiters on one limit, as in many processes with one key, simulated in virtual time."""

from __future__ import annotations

import random

import pytest
from throttling import Fleet, Server, token_bucket


def bucket(rate: int = 200, retry_after: float | None = None) -> Server:
    return token_bucket(lambda _: float(rate), burst=rate / 4, retry_after=retry_after)


def starts(count: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.uniform(0.0, 1.0) for _ in range(count)]


def run(serve: Server, count: int, seed: int = 0, seconds: float = 40.0) -> Fleet:
    fleet = Fleet(serve, starts(count, seed), seed)
    fleet.run(seconds)
    return fleet


class TestTokenBucket:
    @pytest.mark.parametrize(("count", "share"), [(1, 0.005), (4, 0.01), (16, 0.06)])
    def test_hardly_any_request_is_throttled_and_the_limit_is_used(
        self, count: int, share: float
    ) -> None:
        """Fault: each took the load of the others for throttling at any rate, and ignored it."""
        fleet = run(bucket(), count)
        assert fleet.throttled_share(20, 40) <= share
        assert sum(fleet.rates(20, 40)) >= 0.95 * 200

    # With the second, a comparison without a trial let a fifth of the requests be throttled.
    @pytest.mark.parametrize("seed", [1, 21])
    def test_eight_limiters_have_similar_shares(self, seed: int) -> None:
        fleet = run(bucket(), 8, seed, 60.0)
        assert fleet.throttled_share(20, 60) <= 0.02
        assert fleet.fairness(20, 60) >= 0.8

    def test_with_retry_after_the_limit_is_still_used(self) -> None:
        fleet = run(bucket(retry_after=1.0), 8)
        assert fleet.throttled_share(20, 40) <= 0.02
        assert sum(fleet.rates(20, 40)) >= 0.85 * 200

    def test_a_late_joiner_gets_its_share(self) -> None:
        fleet = Fleet(bucket(), [*starts(3, 0), 20.0], 0)
        fleet.run(50.0)
        assert fleet.throttled_share(30, 50) <= 0.02
        assert fleet.rates(30, 50)[3] >= 200 / 4 / 2
