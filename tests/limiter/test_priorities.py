"""The order in which calls of several kinds pass the limiter, in virtual time."""

from __future__ import annotations

import asyncio

import pytest
from support.pacing import Member, MemoryPace
from support.virtual_time import in_virtual_time, now

from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.queues import Priority
from bctrl_async._limiter.rate import AdaptiveRate


@in_virtual_time
class TestPriorities:
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
