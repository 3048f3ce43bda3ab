"""Bulk stops that meet a wire fault."""

from __future__ import annotations

import pytest
from support.helpers import add_runtimes
from support.wire_faults import WireEmulator, WireFault

from bctrl_async import BctrlSession, StopResult

RESULTS = {
    WireFault.CLOSE_KEPT_ALIVE: StopResult.STOPPED,
    WireFault.SLOW_DRIP: StopResult.STOPPED,
    WireFault.OVERSIZED: StopResult.ACCEPTED,
    WireFault.COMPRESSED_BOMB: StopResult.ACCEPTED,
    WireFault.STRAY_ANSWER: StopResult.STOPPED,
    WireFault.LATE_STRAY_ANSWER: StopResult.STOPPED,
}


@pytest.mark.parametrize("fault", WireFault)
async def test_a_stop_needs_no_other_attempt(fault: WireFault) -> None:
    async with (
        WireEmulator(port=0, faults={fault: 1.0}, fault_latency=0.01) as emulator,
        BctrlSession(emulator.api_key, base_url=emulator.url) as session,
    ):
        report = await session.stop_runtimes(add_runtimes(emulator, 1), verify=False)

    assert report.counts == {RESULTS[fault]: 1}
    assert emulator.received.total() == 1
