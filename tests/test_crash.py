"""A bulk stop killed with SIGKILL at any moment, and resumed from its journal."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import BOUND
from journal_lines import read_lines

from bctrl_async import StopResult
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.journal import read_journal

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")

KEY = "a-key-that-must-not-be-written"
TARGETS = [("ws-1", f"r{number}") for number in range(1000)]
IN_FLIGHT = 20
FAULTS = {
    Fault.DROP_AFTER: 0.02,
    Fault.SERVER_ERROR: 0.02,
    Fault.RATE_LIMITED: 0.01,
    Fault.STRAY_ANSWER: 0.02,
    Fault.LATE_STRAY_ANSWER: 0.02,
}

PROGRAM = """
import asyncio, sys
from bctrl_async import BctrlSession, RetryPolicy

async def main(key, url, journal, count, in_flight):
    async with BctrlSession(key, base_url=url, max_connections=int(in_flight)) as session:
        targets = [("ws-1", f"r{number}") for number in range(int(count))]
        policy = RetryPolicy(attempts=10, base=0.001, cap=0.01)
        report = await session.stop_runtimes(targets, journal=journal, retry=policy)
    print(report.total, report.ok)

asyncio.run(main(*sys.argv[1:]))
"""


async def start(emulator: Emulator, journal: Path) -> asyncio.subprocess.Process:
    args = (KEY, emulator.url, journal, str(len(TARGETS)), str(IN_FLIGHT))
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, *args, stdout=asyncio.subprocess.PIPE
    )


def read_settled(journal: Path, emulator: Emulator) -> set[tuple[str, str]]:
    """Check each line of a journal against the emulator; return the targets that it settles."""
    data = journal.read_bytes() if journal.exists() else b""
    if b"\n" not in data:
        return set()
    lines = read_lines(data)
    assert lines.header["base_url"] == f"{emulator.url}/v1"
    assert not lines.marks or lines.ends_with_mark
    settled: set[tuple[str, str]] = set()
    for entry in lines.entries:
        target = (entry["workspace_id"], entry["alias"])
        assert target == TARGETS[entry["index"]], entry
        assert target not in settled, "a line follows the one that settles its target"
        assert emulator.received[target] >= (entry["result"] != StopResult.NOT_SENT), entry
        if entry.get("ok"):
            assert emulator.status(*target) == "stopped", entry
            settled.add(target)
    resumed = read_journal(journal)
    assert resumed is not None
    assert resumed.not_running.keys() == settled
    assert resumed.is_torn == lines.is_torn
    return settled


async def test_twenty_runs_killed_at_any_moment_and_resumed_settle_every_target(
    tmp_path: Path,
) -> None:
    rng = random.Random(4)
    journal = tmp_path / "journal"
    async with Emulator(port=0, api_key=KEY, faults=FAULTS, seed=1, latency=0.002) as emulator:
        for target in TARGETS:
            emulator.add_runtime(*target)
        resent = 0
        for _ in range(20):
            before, received = read_settled(journal, emulator), Counter(emulator.received)
            answered = {target for target in TARGETS if emulator.status(*target) == "stopped"}
            process = await start(emulator, journal)
            begun = len(emulator.requests)
            until = begun + rng.randint(1, 60)
            async with asyncio.timeout(BOUND):
                # Its start takes long, so leave it the processor.
                while len(emulator.requests) == begun:
                    await asyncio.sleep(0.001)
                while len(emulator.requests) < until:
                    await asyncio.sleep(0)
            for _ in range(rng.randint(0, 30)):
                await asyncio.sleep(0)
            process.kill()
            assert await process.wait() == -signal.SIGKILL

            new = emulator.received - received
            assert before & new.keys() == set()
            assert before <= read_settled(journal, emulator)
            resent += len((answered - before) & new.keys())

        process = await start(emulator, journal)
        async with asyncio.timeout(60):
            stdout, _ = await process.communicate()

        assert stdout.decode().split() == [str(len(TARGETS)), "True"]
        assert read_settled(journal, emulator) == set(TARGETS)
        resumed = read_journal(journal)
        assert resumed is not None
        assert resumed.is_complete
        assert {emulator.status(*target) for target in TARGETS} == {"stopped"}
        # Only requests in flight at a kill can have been answered without a line.
        assert resent <= 20 * IN_FLIGHT
        assert KEY.encode() not in journal.read_bytes()
