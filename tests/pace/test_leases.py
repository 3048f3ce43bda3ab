"""A rate shared by several limiters through leases, in virtual time."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import pytest
import virtual_time
from hypothesis import given, settings
from hypothesis import strategies as st
from pacing import Member, MemoryPace, jain, most_in_a_window
from throttling import show_limit
from virtual_time import in_virtual_time, now

from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.queues import Priority
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async.pace._leases import LEASE


@in_virtual_time
class TestSharing:
    @pytest.mark.parametrize(
        ("count", "rate", "ideal", "latency"),
        [(1, 195, 10, 0.0005), (16, 1950, 4, 0.0005), (1, 195, 10, 0.02), (8, 195, 10, 0.02)],
    )
    async def test_together_they_use_the_whole_rate_in_equal_parts(
        self, count: int, rate: int, ideal: int, latency: float
    ) -> None:
        """Fault: a member that asks when its slots are used up loses those of the round trip."""
        pace = MemoryPace(rate=rate, latency=latency)
        members = [Member(pace) for _ in range(count)]
        await asyncio.gather(*(member.bulk(ideal * rate // count) for member in members))

        assert now() <= 1.015 * ideal
        assert jain([member.between(1, ideal - 1) for member in members]) > 0.999
        assert most_in_a_window([t for member in members for t in member.starts], rate) <= 2

    async def test_a_late_joiner_has_its_share_within_a_second(self) -> None:
        pace = MemoryPace(rate=195)
        first = [Member(pace) for _ in range(3)]
        late = Member(pace)
        running = [asyncio.create_task(member.bulk(10_000, until=10)) for member in first]
        await asyncio.sleep(5)
        await asyncio.gather(late.bulk(10_000, until=10), *running)

        share = 195 / 4
        assert late.between(5, 6) == pytest.approx(share, rel=0.1)
        assert [m.between(6, 10) for m in first] == [pytest.approx(4 * share, rel=0.03)] * 3
        assert sum(m.between(4, 5) for m in first) == pytest.approx(195, abs=2)

    async def test_a_member_that_dies_costs_one_lease(self) -> None:
        pace = MemoryPace(rate=195)
        members = [Member(pace) for _ in range(3)]
        dying = asyncio.create_task(members[0].bulk(10_000))
        living = [asyncio.create_task(m.bulk(10_000, until=10)) for m in members[1:]]
        await asyncio.sleep(5.001)
        dying.cancel()
        await asyncio.gather(*living)

        assert sum(member.between(5.001, 10) for member in members) >= 195 * 5 - 195 * LEASE - 1

    async def test_a_single_attempt_leases_one_slot_and_attempts_in_a_row_more_each_time(
        self,
    ) -> None:
        pace = MemoryPace(rate=1000)
        member = Member(pace, limit=1, latency=0.001)
        for _ in range(3):
            await member.attempt()
            await asyncio.sleep(1)
        for _ in range(100):
            await member.attempt()

        assert pace.asked_for == [1, 1, 1, 1, 2, 4, 8, 16, 32, 64]

    async def test_those_that_have_a_slot_ask_for_no_other(self) -> None:
        pace = MemoryPace(rate=1000, latency=0.02)
        member = Member(pace)
        await asyncio.gather(*(member.attempt() for _ in range(60)))

        # Fifty are in the first lease, and of these some still wait when the second is asked for.
        assert pace.asked_for == [60, 10]

    async def test_a_slot_is_lost_one_lease_after_its_time(self) -> None:
        """Fault: a member that was idle for two leases starts both at once."""
        pace = MemoryPace(rate=1000)
        member = Member(pace, latency=0.0)
        abandoned = asyncio.gather(*(member.attempt() for _ in range(50)))
        await asyncio.sleep(0.001)
        abandoned.cancel()
        await asyncio.sleep(LEASE + 0.04)
        began = now()
        await member.bulk(100)

        # The fifty slots of the first lease were due in its 0.05 s: 0.04 s of them are lost.
        assert member.between(began, began + 0.0005) == pytest.approx(10, abs=2)

    async def test_the_learned_limit_stays_beneath(self) -> None:
        member = Member(MemoryPace(rate=1000))
        show_limit(member.limiter, 0.1)
        before = now()
        await member.bulk(10)

        assert member.between(before, before + 0.4) == 0


@in_virtual_time
class TestPriorities:
    @pytest.mark.parametrize(("others", "longest"), [(7, 0.1), (0, 0.05)])
    async def test_single_stops_wait_for_milliseconds_beside_bulks(
        self, others: int, longest: float
    ) -> None:
        """Fault: a single stop waits behind a hundred targets, half a second at 200 a second."""
        pace = MemoryPace(rate=200)
        member = Member(pace)
        # They are in other processes, or there is only one, in the same session.
        bulks = [Member(pace) for _ in range(others)] or [member]
        running = [asyncio.create_task(bulk.bulk(10_000, until=20)) for bulk in bulks]
        await asyncio.sleep(1)
        waits = []
        while now() < 19:
            waits.append(await member.attempt())
            await asyncio.sleep(0.05)
        await asyncio.gather(*running)

        assert sorted(waits)[int(0.99 * len(waits))] < longest
        used = sum(bulk.between(1, 19) for bulk in bulks) + len(waits) * bool(others)
        assert used == pytest.approx(200 * 18, abs=100)

    async def test_a_bulk_keeps_a_fifth_if_single_stops_could_use_everything(self) -> None:
        member = Member(MemoryPace(rate=200))
        started = 0

        async def use() -> None:
            nonlocal started
            while now() < 10:
                await member.attempt()
                started += 1

        await asyncio.gather(member.bulk(10_000, until=10), *(use() for _ in range(150)))

        assert started == pytest.approx(0.8 * len(member.starts), rel=0.1)

    async def test_a_retry_goes_before_the_turn_of_the_bulk(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        order: list[str] = []

        async def use(priority: Priority) -> None:
            await limiter.acquire(60, priority)
            order.append(priority.name.lower())
            await asyncio.sleep(1)
            limiter.release("a runtime")

        async with asyncio.TaskGroup() as group:
            for priority in [Priority.SINGLE] * 6 + [Priority.BULK]:
                group.create_task(use(priority))
            # The bulk waits while four go before it, so the next turn is its own.
            while len(order) < 5:
                await asyncio.sleep(0.5)
            group.create_task(use(Priority.RETRY))

        assert order == ["single"] * 5 + ["retry", "bulk", "single"]

    async def test_waiting_single_stops_go_on_when_the_bulk_is_cancelled_at_its_turn(self) -> None:
        member = Member(MemoryPace(rate=10), latency=0.0)
        bulk = asyncio.create_task(member.bulk(100))
        await asyncio.sleep(0)
        singles = [asyncio.create_task(member.attempt()) for _ in range(20)]
        while sum(single.done() for single in singles) < 4:
            await asyncio.sleep(0.01)
        bulk.cancel()
        async with asyncio.timeout(60):
            await asyncio.gather(*singles)


HOUR = 3600.0


def busiest(starts: Sequence[float], seconds: float) -> int:
    """Return the most attempts that started in so many seconds."""
    starts = sorted(starts)
    return max(
        number - bisect_left(starts, start - seconds) for number, start in enumerate(starts, 1)
    )


Sets = Sequence[tuple[float, float]]
"""The times at which a clock is set, and the seconds by which it is ahead from then on."""


def every(interval: float, *offsets: float) -> Sets:
    count = int(5.0 / interval)
    return [(5.0 + n * interval, offsets[n % len(offsets)]) for n in range(count)]


CASES: dict[str, Sets] = {
    "back": [(5.0, -HOUR)],
    "ahead": [(5.0, HOUR)],
    "far back and forth": every(0.2, -HOUR, 0.0),
    "back and forth a little": every(0.05, -0.04, 0.0),
    "back each second": [(5.0 + n, -1.0 * n) for n in range(5)],
    "another clock at every other lease": every(0.003, -10.0, 0.0),
}


MEMBERS = [(1, 0.001, 75, 0.2), (5, 0.05, 40, 0.1), (50, 0.2, 75, 0.0), (50, 0.001, 10, 0.03)]
"""Members by their attempts in flight, latency, number of attempts, and idles between them."""

offsets = st.one_of(
    st.floats(-1e6, 1e6), st.floats(-0.5, 0.5), st.sampled_from([-HOUR, 0.0, HOUR, -LEASE, LEASE])
)


@in_virtual_time
class TestClock:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    @pytest.mark.parametrize(("rate", "count"), [(200, 8), (30, 40)])
    async def test_no_second_has_more_than_the_rate_and_one_lease(
        self, rate: int, count: int, case: Sets
    ) -> None:
        """Fault: what was leased was leased again, up to ten times as much as the rate allows."""
        pace = MemoryPace(rate=rate)
        starts: list[float] = []
        members = [Member(pace, limit=5, starts=starts) for _ in range(count)]
        running = [asyncio.create_task(m.bulk(100_000, until=11.0)) for m in members]
        for when, offset in case:
            await asyncio.sleep(when - now())
            pace.clock = offset
        await asyncio.gather(*running)

        # A lease has at least one slot, a span has both of its ends, and a slot that was lost when
        # the clock was set back may be made up for.
        lease = max(rate * LEASE, 1.0) + 2.0
        assert busiest(starts, 1.0) <= rate + lease
        assert busiest(starts, 5.0) <= 5.0 * rate + lease
        assert sum(5.0 <= start < 10.0 for start in starts) >= 0.5 * 5.0 * rate, "it goes on"

    @given(
        rate=st.sampled_from([2.0, 50.0, 190.0, 1000.0]),
        members=st.lists(st.sampled_from(MEMBERS), min_size=1, max_size=6),
        latency=st.floats(0, 0.01),
        moments=st.lists(st.tuples(st.floats(0.01, 1.0), offsets), max_size=10),
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
