"""A bulk stop whose handle is dropped within its block."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import BOUND, add_runtimes, wait_for_requests
from journal_lines import read_lines
from leaks import bulk_tasks

from bctrl_async import BctrlSession, StopBatch
from bctrl_async.emulator import Emulator

Connect = Callable[..., BctrlSession]


async def enter(batch: StopBatch) -> StopBatch:
    """Enter a block that is never left."""
    await batch.__aenter__()
    await anext(batch)
    return batch


async def test_it_records_every_target_and_leaves_no_task_and_no_lock(
    emulator: Emulator, connect: Connect, tmp_path: Path
) -> None:
    """Fault: its task was destroyed while pending, and the journal stayed locked."""
    reported: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    targets = add_runtimes(emulator, 300)
    journal = tmp_path / "dropped.jsonl"
    async with connect() as session:
        batch = await enter(session.stop_runtimes(targets, journal=journal))
        # With a hundred outcomes unread, all workers wait.
        await wait_for_requests(emulator, 150)
        del batch
        gc.collect()
        async with asyncio.timeout(BOUND):
            while bulk_tasks():
                await asyncio.sleep(0.01)
        assert len(read_lines(journal.read_bytes()).entries) == len(targets)

        again = await session.stop_runtimes(targets, journal=journal)
    # Stops in flight when the run was cancelled are unknown.
    assert again.ok
    assert again.resumed >= 100
    assert reported == []


def test_it_may_be_dropped_after_its_loop(tmp_path: Path) -> None:
    kept: list[StopBatch] = []

    async def scenario() -> None:
        async with Emulator(port=0) as emulator:
            targets = add_runtimes(emulator, 300)
            async with BctrlSession("emulator-key", base_url=emulator.url) as session:
                batch = session.stop_runtimes(targets, journal=tmp_path / "kept.jsonl")
                kept.append(await enter(batch))

    asyncio.run(scenario())
    assert kept.pop().report.total == 300
    gc.collect()
