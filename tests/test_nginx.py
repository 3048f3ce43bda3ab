"""The pace behind a real nginx: what the simulated buckets of `test_rate.py` only imitate."""

from __future__ import annotations

import asyncio

import pytest
from conftest import KEY
from nginx_server import NGINX, Nginx, nginx

from bctrl_async import BctrlSession, StopResult
from bctrl_async.emulator import Emulator

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

# What is in flight when the server first refuses is refused as well. So that this is a small share
# of fewer targets than a benchmark's, there are fewer connections, and more that pass at first.
TARGETS = [("ws-1", f"r{number}") for number in range(800)]
CONNECTIONS, BURST = 20, 100


@pytest.fixture
def runtimes(emulator: Emulator) -> Emulator:
    for target in TARGETS:
        emulator.add_runtime(*target)
    return emulator


def connect(limited: Nginx) -> BctrlSession:
    return BctrlSession(KEY, base_url=limited.url, max_connections=CONNECTIONS)


@pytest.mark.parametrize(("retry_after", "share"), [(None, 0.1), (1, 0.05)])
class TestLimitReq:
    async def test_a_bulk_stop_stops_all_with_few_refusals(
        self, runtimes: Emulator, retry_after: int | None, share: float
    ) -> None:
        with nginx(runtimes.url, burst=BURST, retry_after=retry_after) as limited:
            async with connect(limited) as session:
                report = await session.stop_runtimes(TARGETS)
        assert report.counts[StopResult.STOPPED] == len(TARGETS)
        assert report.throttled == limited.statuses[429]
        assert 0 < limited.refused <= share

    async def test_gathered_stops_stop_all_with_few_refusals(
        self, runtimes: Emulator, retry_after: int | None, share: float
    ) -> None:
        with nginx(runtimes.url, burst=BURST, retry_after=retry_after) as limited:
            async with connect(limited) as session:
                stopped = await asyncio.gather(*(session.stop_runtime(*each) for each in TARGETS))
        assert {runtime.status for runtime in stopped} == {"stopped"}
        assert limited.statuses[200] == len(TARGETS)
        assert 0 < limited.refused <= share
