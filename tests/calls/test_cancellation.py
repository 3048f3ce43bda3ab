"""Cancellation of a stop at any moment: prompt, without leaked tasks or reused connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from helpers import Connect, until, wait_for_requests
from servers import emulator_in_a_thread

from bctrl_async import BctrlSession, RetryPolicy
from bctrl_async.emulator import Emulator, Fault, Reply


async def tasks() -> set[asyncio.Task[object]]:
    await asyncio.sleep(0)
    return asyncio.all_tasks()


@asynccontextmanager
async def session_that_leaves_no_task(
    emulator: Emulator, max_connections: int
) -> AsyncIterator[BctrlSession]:
    """Yield a session; then check that it has no task left, and a slot for another stop."""
    before = await tasks()
    async with BctrlSession(
        "emulator-key",
        base_url=emulator.url,
        max_connections=max_connections,
        retry=RetryPolicy(base=1000.0, cap=1000.0),
    ) as session:
        yield session
        assert await tasks() == before
        # An aborted connection must not be used again.
        assert (await session.stop_runtime("ws-1", "r1")).alias == "r1"
    assert await tasks() == before


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.SLOW_DRIP, Reply(503)])
async def test_cancelling_a_request_or_a_back_off_frees_the_slot(fault: Fault | Reply) -> None:
    with emulator_in_a_thread(fault) as emulator:
        async with session_that_leaves_no_task(emulator, 1) as session:
            stopping = asyncio.create_task(session.stop_runtime("ws-1", "r0"))
            await until(lambda: emulator.received["ws-1", "r0"])
            if isinstance(fault, Reply):
                await until(lambda: session.stats.waiting)
            stopping.cancel()
            await asyncio.wait([stopping])
            assert stopping.cancelled()
        assert emulator.received["ws-1", "r0"] == 1


@pytest.mark.parametrize("steps", range(0, 12, 2))
async def test_cancelling_after_any_number_of_steps_leaves_the_session_usable(steps: int) -> None:
    """A stop can be cancelled at each of its awaits, connecting included."""
    with emulator_in_a_thread() as emulator:
        async with session_that_leaves_no_task(emulator, 2) as session:
            stops = [asyncio.create_task(session.stop_runtime("ws-1", "r0")) for _ in range(4)]
            for _ in range(steps):
                await asyncio.sleep(0)
            for stop in stops:
                stop.cancel()
            await asyncio.gather(*stops, return_exceptions=True)


async def test_a_call_cancelled_while_it_waits_for_a_slot_sends_nothing(
    emulator: Emulator, connect: Connect
) -> None:
    emulator.inject(Fault.HANG)
    for name in ("a", "b", "c"):
        emulator.add_runtime("ws-1", name)
    async with connect(max_connections=1) as session:
        first = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await wait_for_requests(emulator, 1)
        queued = [asyncio.create_task(session.stop_runtime("ws-1", name)) for name in "abc"]
        await asyncio.sleep(0)
        queued[0].cancel()
        first.cancel()
        queued[1].cancel()
        assert (await queued[2]).alias == "c"
        errors = await asyncio.gather(first, *queued[:2], return_exceptions=True)
    assert [type(error) for error in errors] == [asyncio.CancelledError] * 3
    assert set(emulator.received) == {("ws-1", "crm"), ("ws-1", "c")}
