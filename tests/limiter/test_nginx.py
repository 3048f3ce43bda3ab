"""The rate behind a real nginx, which the simulated servers of `test_rate.py` imitate."""

from __future__ import annotations

import asyncio

import pytest
from conftest import KEY
from nginx_server import NGINX, Nginx, nginx

from bctrl_async import BctrlSession, StopResult
from bctrl_async.emulator import Emulator

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

# All attempts in flight at the first 429 are throttled as well. Few connections and a large burst
# keep their share small, although there are fewer targets than in a benchmark. A busy machine
# exceeds a low rate as well.
TARGETS = [("ws-1", f"r{number}") for number in range(500)]
CONNECTIONS, RATE, BURST = 5, 100, 100


@pytest.fixture
def runtimes(emulator: Emulator) -> Emulator:
    for target in TARGETS:
        emulator.add_runtime(*target)
    return emulator


def connect(limited: Nginx) -> BctrlSession:
    return BctrlSession(KEY, base_url=limited.url, max_connections=CONNECTIONS)


@pytest.mark.parametrize(("status", "retry_after", "share"), [(429, None, 0.1), (503, 1, 0.05)])
class TestLimitReq:
    async def test_a_bulk_stop_stops_all_with_little_throttling(
        self, runtimes: Emulator, retry_after: int | None, share: float, status: int
    ) -> None:
        with nginx(
            runtimes.url, rate=RATE, burst=BURST, retry_after=retry_after, status=status
        ) as limited:
            async with connect(limited) as session:
                report = await session.stop_runtimes(TARGETS)
        assert report.counts[StopResult.STOPPED] == len(TARGETS)
        # Canaries may be throttled as well; a 429 sends none.
        assert (
            report.throttled == limited.statuses[429]
            or 0 < report.throttled <= limited.statuses[503]
        )
        assert 0 < limited.throttled_share <= share

    async def test_gathered_stops_stop_all_with_little_throttling(
        self, runtimes: Emulator, retry_after: int | None, share: float, status: int
    ) -> None:
        with nginx(
            runtimes.url, rate=RATE, burst=BURST, retry_after=retry_after, status=status
        ) as limited:
            async with connect(limited) as session:
                stopped = await asyncio.gather(
                    *(session.stop_runtime(*target) for target in TARGETS)
                )
        assert {runtime.status for runtime in stopped} == {"stopped"}
        assert limited.statuses[200] == len(TARGETS)
        assert 0 < limited.throttled_share <= share
