"""A shared pace whose store has a clock that is set back and forth, in memory and in Redis."""

from __future__ import annotations

import asyncio
import os
import random
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import virtual_time
from hypothesis import given, settings
from hypothesis import strategies as st
from pacing import Member, MemoryPace, most_in_a_window
from redis_server import SERVERS, RedisServer, needs_compiler, redis_server
from virtual_time import in_virtual_time, now

from bctrl_async.pace import Pace
from bctrl_async.pace._leases import LEASE, Schedule
from bctrl_async.redis import RedisPace

HOUR = 3600.0


def busiest(starts: Sequence[float], seconds: float) -> int:
    """Return the most attempts that started in so many seconds."""
    starts = sorted(starts)
    return max(
        number - bisect_left(starts, start - seconds) for number, start in enumerate(starts, 1)
    )


async def run(pace: Pace, count: int, until: float) -> list[float]:
    """Make attempts in so many members until a time; return when they started."""
    starts: list[float] = []
    members = [Member(pace, limit=5, starts=starts) for _ in range(count)]
    await asyncio.gather(*(member.bulk(100_000, until=until) for member in members))
    for member in members:
        await member.close()
    return starts


Sets = Sequence[tuple[float, float]]
"""The times at which a clock is set, and the seconds by which it is ahead from then on."""


def every(interval: float, *offsets: float) -> Sets:
    count = int(5.0 / interval)
    return [(5.0 + n * interval, offsets[n % len(offsets)]) for n in range(count)]


CASES: dict[str, Sets] = {
    "back": [(5.0, -HOUR)],
    "back a little": [(5.0, -0.1)],
    "ahead": [(5.0, HOUR)],
    "ahead a little": [(5.0, 0.1)],
    "far back and forth": every(0.2, -HOUR, 0.0),
    "back and forth a little": every(0.05, -0.04, 0.0),
    "back each second": [(5.0 + n, -1.0 * n) for n in range(5)],
    "ahead each second": [(5.0 + n, 1.0 * n) for n in range(5)],
    "another clock at every other lease": every(0.003, -10.0, 0.0),
}


@in_virtual_time
class TestMemory:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    @pytest.mark.parametrize(("rate", "count"), [(200, 8), (30, 40)])
    async def test_no_second_has_more_than_the_rate_and_one_lease(
        self, rate: int, count: int, case: Sets
    ) -> None:
        """Fault: what was leased was leased again, up to ten times as much as the rate allows."""
        pace = MemoryPace(rate=rate)
        running = asyncio.create_task(run(pace, count, 11.0))
        for when, offset in case:
            await asyncio.sleep(when - now())
            pace.clock = offset
        starts = await running

        # A lease has at least one slot, a span has both of its ends, and a slot that was lost when
        # the clock was set back may be made up for.
        lease = max(rate * LEASE, 1.0) + 2.0
        assert busiest(starts, 1.0) <= rate + lease
        assert busiest(starts, 5.0) <= 5.0 * rate + lease
        assert sum(5.0 <= start < 10.0 for start in starts) >= 0.5 * 5.0 * rate, "it goes on"

    @given(
        rate=st.sampled_from([2.0, 50.0, 190.0, 1000.0]),
        members=st.lists(
            st.tuples(
                st.sampled_from([1, 5, 50]),  # Attempts in flight.
                st.floats(0.001, 0.2),  # The latency of the server.
                st.integers(1, 75),  # Attempts.
                st.floats(0, 0.2),  # Idles between them.
            ),
            min_size=1,
            max_size=6,
        ),
        latency=st.floats(0, 0.01),
        moments=st.lists(
            st.tuples(
                st.floats(0.01, 1.0),
                st.one_of(
                    st.floats(-1e6, 1e6),
                    st.floats(-0.5, 0.5),
                    st.sampled_from([-HOUR, 0.0, HOUR, -LEASE, LEASE]),
                ),
            ),
            max_size=10,
        ),
    )
    @settings(deadline=None, max_examples=60)
    def test_no_window_has_more_than_the_rate_and_what_was_lost_before(
        self,
        rate: float,
        members: list[tuple[int, float, int, float]],
        latency: float,
        moments: list[tuple[float, float]],
    ) -> None:
        async def scenario() -> list[float]:
            pace = MemoryPace(rate=rate, latency=latency)
            starts: list[float] = []

            async def take_part(limit: int, latency: float, count: int, idle: float) -> None:
                member = Member(pace, latency, limit, starts)
                for _ in range(3):
                    await member.bulk(count)
                    await asyncio.sleep(idle)
                await member.close()

            running = asyncio.gather(*(take_part(*member) for member in members))
            for wait, offset in moments:
                await asyncio.sleep(wait)
                pace.clock = offset
            await running
            return starts

        starts = virtual_time.run(scenario())

        steps = [b - a for a, b in pairwise([0.0, *(offset for _, offset in moments)])]
        # A clock that is set ahead by less is not noticed.
        unseen = sum(step for step in steps if 0.0 < step <= LEASE)
        # Each time that it is set back, a lease and a slot are lost, and may be made up for.
        lost = sum(step < 0.0 for step in steps)
        late = LEASE * (1 + lost) + latency + unseen
        assert most_in_a_window(starts, rate) <= rate * late + 2 + lost


@needs_compiler
class TestRedis:
    @pytest.fixture(params=SERVERS, ids=os.path.basename)
    def server(self, request: pytest.FixtureRequest) -> Iterator[RedisServer]:
        with redis_server(request.param, can_set_clock=True) as running:
            yield running

    async def test_no_second_has_more_than_the_rate_and_one_lease(
        self, server: RedisServer
    ) -> None:
        """The script leases as `Schedule` does, and twelve days ahead its keys are still there."""
        rate, rng, schedule = 200.0, random.Random(0), Schedule()
        store = RedisPace(server.url, rate=rate).open()
        names = [f"member {number}" for number in range(40)]
        # The members' own time, and the ends of their last leases in it.
        now, ends = 0.0, dict.fromkeys(names, -1e9)
        clock, starts = round(time.time(), 6), list[float]()
        offsets = iter((-HOUR, 0.0, HOUR, 0.0, -0.3, 0.0, -1e6, 0.0, 0.2, HOUR, 0.5, -HOUR))
        next_set, offset = 0.5, 0.0
        while now < 6.5:
            now += rng.expovariate(2 * rate)
            if now >= next_set and (step := next(offsets, None)) is not None:
                next_set, offset = next_set + 0.5, step
            if not (idle := [name for name, end in ends.items() if end <= now]):
                continue
            member = rng.choice(idle)
            shown = round(clock + offset + now, 6)
            server.set_clock(shown)
            wanted = schedule.lease(shown, rate, member, 5, now - ends[member])
            leased = await store.lease(member, 5, now - ends[member])
            assert (leased.slots, leased.members) == (wanted.slots, wanted.members)
            assert leased.delay == pytest.approx(wanted.delay, abs=1e-4)
            starts += (now + leased.delay + number / rate for number in range(leased.slots))
            ends[member] = starts[-1] + 1 / rate
        await store.close()

        lease = max(rate * LEASE, 1.0) + 2.0
        assert busiest(starts, 1.0) <= rate + lease
        assert busiest(starts, 5.0) <= 5.0 * rate + lease
        assert len(starts) >= 0.5 * 6.5 * rate, "it goes on"
