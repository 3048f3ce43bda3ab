"""Bulk stops that meet a wire fault, and the stray answers of the emulator."""

from __future__ import annotations

import pytest
from support.helpers import add_runtimes
from support.wire import Wire
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


@pytest.mark.parametrize(
    ("fault", "status"),
    [(WireFault.STRAY_ANSWER, 403), (WireFault.LATE_STRAY_ANSWER, 200)],
)
async def test_a_stray_answer_shifts_all_that_follow_on_its_connection(
    fault: WireFault, status: int
) -> None:
    async with (
        WireEmulator(port=0, fault_latency=0.01) as emulator,
        Wire(emulator) as wire,
    ):
        emulator.add_runtime("ws-1", "crm")
        emulator.wire_faults["crm"] = fault
        await wire.send()
        first = await wire.answer()
        # A stray answer in the same segment is there without waiting.
        is_early = wire.unread.startswith(b"HTTP/1.1 403")
        assert is_early is (fault is WireFault.STRAY_ANSWER)
        await wire.send()
        stray = await wire.answer()
        second = await wire.answer()

    assert [first.status, stray.status, second.status] == [200, status, 409]
    assert first.json["alias"] == "crm"
