"""`session.stats`: the counters of a session."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from helpers import Connect, add_runtimes, wait_for_requests

from bctrl_async import (
    BctrlConflictError,
    BctrlError,
    BctrlSession,
    RetryPolicy,
    SessionStats,
)
from bctrl_async.emulator import Emulator, Fault, Reply

NOTHING = SessionStats(
    attempts=0, retries=0, succeeded=0, failed={}, cancelled=0, in_flight=0, waiting=0
)


async def test_a_stop_is_one_attempt_that_succeeded(session: BctrlSession) -> None:
    assert session.stats == NOTHING
    await session.stop_runtime("ws-1", "crm")
    assert session.stats == msgspec.structs.replace(NOTHING, attempts=1, succeeded=1)


async def test_failures_are_counted_by_status_even_if_they_were_retried(
    emulator: Emulator, session: BctrlSession, pauses: list[float]
) -> None:
    emulator.inject(Fault.RATE_LIMITED, Reply(503), Fault.SERVER_ERROR)

    await session.stop_runtime("ws-1", "crm")
    with pytest.raises(BctrlConflictError):
        await session.stop_runtime("ws-1", "crm")

    stats = session.stats
    assert stats.failed == {"429": 1, "503": 1, "500": 1, "409": 1}
    assert (stats.attempts, stats.retries, stats.succeeded, stats.throttled) == (5, 3, 1, 2)
    assert len(pauses) == 3


@pytest.mark.parametrize(
    ("fault", "name"),
    [(Reply(200, body="what?"), "BctrlResponseError"), (Fault.DROP_BEFORE, "BctrlNetworkError")],
)
async def test_a_failure_without_a_usable_answer_is_counted_by_its_error(
    emulator: Emulator, connect: Connect, fault: Fault | Reply, name: str
) -> None:
    emulator.inject(fault)
    async with connect(retry=RetryPolicy(attempts=1)) as session:
        with pytest.raises(BctrlError):
            await session.stop_runtime("ws-1", "crm")
        assert session.stats.failed == {name: 1}


async def test_calls_in_flight_and_waiting_are_counted(
    emulator: Emulator, connect: Connect
) -> None:
    emulator.inject(*[Fault.HANG] * 5)
    async with connect(max_connections=2) as session:
        calls = [asyncio.create_task(session.stop_runtime("ws-1", "crm")) for _ in range(5)]
        await wait_for_requests(emulator, 2)
        assert (session.stats.in_flight, session.stats.waiting) == (2, 3)

        calls[4].cancel()
        assert session.stats.waiting == 2

        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        # Those that waited had not started an attempt.
        assert session.stats == msgspec.structs.replace(NOTHING, attempts=2, cancelled=2)


async def test_a_call_between_two_attempts_is_waiting(emulator: Emulator, connect: Connect) -> None:
    emulator.inject(Fault.SERVER_ERROR)
    async with connect(retry=RetryPolicy(base=1000.0, cap=1000.0)) as session:
        call = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        while not session.stats.failed:
            await asyncio.sleep(0)
        assert (session.stats.in_flight, session.stats.waiting) == (0, 1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


async def test_a_bulk_stop_is_counted_and_agrees_with_its_report(
    emulator: Emulator, session: BctrlSession
) -> None:
    targets = add_runtimes(emulator, 50)
    emulator.inject(*[Fault.SERVER_ERROR, Fault.DROP_BEFORE] * 4)

    report = await session.stop_runtimes(targets)

    stats = session.stats
    assert report.ok
    # The canaries that are asked after an unanswered stop are attempts as well.
    canaries = sum(request.method == "GET" for request in emulator.requests)
    assert len(emulator.requests) == 58 + canaries
    # Canaries may be cancelled before the server has them.
    unsent = stats.attempts - len(emulator.requests)
    assert 0 <= unsent <= stats.cancelled
    # Others may be cancelled with their answer on the way: nothing waits for it any more.
    succeeded = stats.succeeded + stats.cancelled - unsent
    assert (succeeded, stats.retries) == (50 + canaries, report.retries)
    assert stats.failed == {"500": 4, "BctrlNetworkError": 4}


async def test_a_snapshot_does_not_change_later(session: BctrlSession) -> None:
    await session.stop_runtime("ws-1", "crm")
    before = session.stats
    with pytest.raises(BctrlConflictError):
        await session.stop_runtime("ws-1", "crm")

    assert (before.failed, before.attempts) == ({}, 1)
    assert msgspec.json.decode(msgspec.json.encode(session.stats))["failed"] == {"409": 1}
