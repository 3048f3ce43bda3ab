"""The client mocked with aioresponses."""

from __future__ import annotations

import aiohttp
import aioresponses
import pytest
from helpers import Connect

from bctrl_async import BctrlNetworkError, BctrlRateLimitError, BctrlSession, RetryPolicy
from bctrl_async.emulator import Emulator

STOP = "https://api.bctrl.ai/v1/workspaces/ws-1/runtimes/crm/stop"


@pytest.fixture
def runtime() -> dict[str, object]:
    emulator = Emulator()
    emulator.add_runtime("ws-1", "crm", status="stopped")
    return dict(emulator.runtimes["ws-1", "crm"])


async def test_a_mocked_answer_is_decoded(
    bctrl_aioresponses: aioresponses.aioresponses, runtime: dict[str, object]
) -> None:
    bctrl_aioresponses.post(STOP, payload=runtime)
    async with BctrlSession("k") as session:
        assert (await session.stop_runtime("ws-1", "crm")).alias == "crm"
    assert len(bctrl_aioresponses.requests) == 1


async def test_a_mocked_error_is_retried(
    bctrl_aioresponses: aioresponses.aioresponses, runtime: dict[str, object], pauses: list[float]
) -> None:
    bctrl_aioresponses.post(STOP, status=503, headers={"Retry-After": "7"})
    bctrl_aioresponses.post(STOP, payload=runtime)
    async with BctrlSession("k") as session:
        await session.stop_runtime("ws-1", "crm")
    assert pauses[0] >= 7


async def test_mocked_exceptions_are_translated(
    bctrl_aioresponses: aioresponses.aioresponses,
) -> None:
    bctrl_aioresponses.post(STOP, exception=aiohttp.ServerDisconnectedError())
    bctrl_aioresponses.post(STOP, status=429)
    async with BctrlSession("k", retry=RetryPolicy(attempts=1, patience=0)) as session:
        with pytest.raises(BctrlNetworkError, match="connection lost"):
            await session.stop_runtime("ws-1", "crm")
        with pytest.raises(BctrlRateLimitError):
            await session.stop_runtime("ws-1", "crm")


async def test_a_request_that_is_not_mocked_is_not_sent(
    bctrl_aioresponses: aioresponses.aioresponses, emulator: Emulator, connect: Connect
) -> None:
    """Fault: a test that forgets a mock stops a real browser."""
    async with connect(retry=RetryPolicy(attempts=1)) as session:
        with pytest.raises(BctrlNetworkError, match="Connection refused"):
            await session.stop_runtime("ws-1", "crm")
    assert emulator.requests == []
    assert len(bctrl_aioresponses.requests) == 1
