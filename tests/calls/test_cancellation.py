"""Cancellation of a stop at any moment: prompt, without leaked tasks or reused connections."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from helpers import Connect, pass_time, wait_for_requests
from servers import emulator_in_a_thread

from bctrl_async import BctrlSession, RetryPolicy
from bctrl_async.emulator import Emulator, Fault, Reply

SECONDS = 30.0


async def other_tasks() -> set[asyncio.Task[object]]:
    await asyncio.sleep(0)
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


async def cancel_by_timeout(session: BctrlSession) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SECONDS):
            await session.stop_runtime("ws-1", "r0")


async def cancel_by_wait_for(session: BctrlSession) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(session.stop_runtime("ws-1", "r0"), SECONDS)


async def cancel_by_task_group(session: BctrlSession) -> None:
    async def fail() -> None:
        await asyncio.sleep(SECONDS)
        raise LookupError

    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the block is the group.
        async with asyncio.TaskGroup() as group:
            group.create_task(session.stop_runtime("ws-1", "r0"))
            group.create_task(fail())
    assert [type(error) for error in caught.value.exceptions] == [LookupError]


@pytest.mark.parametrize("cancel", [cancel_by_timeout, cancel_by_wait_for, cancel_by_task_group])
@pytest.mark.parametrize("fault", [Fault.HANG, Fault.SLOW_DRIP, Reply(503)])
async def test_cancelling_a_request_or_a_back_off_is_prompt_and_frees_the_slot(
    fault: Fault | Reply,
    cancel: Callable[[BctrlSession], Awaitable[None]],
) -> None:
    with emulator_in_a_thread(fault) as emulator:
        session = BctrlSession(
            "emulator-key",
            base_url=emulator.url,
            max_connections=1,
            retry=RetryPolicy(base=1000.0, cap=1000.0),
        )

        async def pass_time_once_it_waits() -> None:
            while not emulator.received["ws-1", "r0"]:
                await asyncio.sleep(0)
            while isinstance(fault, Reply) and not session.stats.waiting:
                await asyncio.sleep(0)
            pass_time(SECONDS)

        before = await other_tasks()
        passing = asyncio.create_task(pass_time_once_it_waits())
        await cancel(session)
        await passing
        assert await other_tasks() == before
        # The next call needs the slot, and must not reuse the aborted connection.
        assert (await session.stop_runtime("ws-1", "r1")).alias == "r1"
        assert emulator.received["ws-1", "r0"] == 1
        await session.close()


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


@pytest.mark.parametrize("steps", range(0, 12, 2))
async def test_cancelling_after_any_number_of_steps_leaves_the_session_usable(steps: int) -> None:
    """A stop can be cancelled at each of its awaits, connecting included."""
    with emulator_in_a_thread() as emulator:
        before = await other_tasks()
        async with BctrlSession(
            "emulator-key", base_url=emulator.url, max_connections=2
        ) as session:
            calls = [asyncio.create_task(session.stop_runtime("ws-1", "r0")) for _ in range(4)]
            for _ in range(steps):
                await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            assert (await session.stop_runtime("ws-1", "r1")).alias == "r1"
        assert await other_tasks() == before


async def test_cancelling_a_gather_ends_all_of_its_calls() -> None:
    with emulator_in_a_thread() as emulator:
        before = await other_tasks()
        async with BctrlSession(
            "emulator-key", base_url=emulator.url, max_connections=5
        ) as session:
            stops = [session.stop_runtime("ws-1", f"{number}") for number in range(2000)]
            gathered = asyncio.gather(*stops)
            await wait_for_requests(emulator, 1)
            gathered.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gathered
            await session.stop_runtime("ws-1", "r0")
        assert await other_tasks() == before
