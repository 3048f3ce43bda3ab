"""A bulk stop killed with SIGKILL at any moment, and resumed from its journal."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from zlib import crc32

import pytest

from bctrl_async import StopResult
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.journal import read_journal

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")

KEY = "a-key-that-must-not-be-written"
TARGETS = [("ws-1", f"r{number}") for number in range(1000)]
IN_FLIGHT = 20
FAULTS = {Fault.DROP_AFTER: 0.02, Fault.SERVER_ERROR: 0.02, Fault.RATE_LIMITED: 0.01}

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


def settled(journal: Path) -> set[tuple[str, str]]:
    """Check each whole line of a journal, and return the targets that they settle."""
    text = journal.read_bytes() if journal.exists() else b""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
    found = set()
    for number, line in enumerate(lines):
        content, _, checksum = line.rpartition(b',"crc":')
        assert checksum == b'"%08x"}\n' % crc32(content), line
        record = json.loads(line)
        if number == 0:
            assert record["journal"] == "bctrl_async"
            time = record["started"]
        elif "completed" in record:
            assert number == len(lines) - 1
            time = record["completed"]
        else:
            time = record["at"]
            if StopResult(record["result"]).settled:
                found.add((record["workspace_id"], record["alias"]))
        assert datetime.fromisoformat(time).tzinfo is not None
    if lines:
        resumed = read_journal(journal)
        assert resumed is not None
        assert resumed.settled.keys() == found
        assert resumed.is_torn == (len(b"".join(lines)) < len(text))
    return found


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
            before, received = settled(journal), Counter(emulator.received)
            answered = {target for target in TARGETS if emulator.status(*target) == "stopped"}
            process = await start(emulator, journal)
            until = len(emulator.requests) + rng.randint(1, 60)
            async with asyncio.timeout(30):
                while len(emulator.requests) < until:
                    await asyncio.sleep(0)
            for _ in range(rng.randint(0, 30)):
                await asyncio.sleep(0)
            process.kill()
            assert await process.wait() == -signal.SIGKILL

            new = emulator.received - received
            assert before & new.keys() == set()
            assert before <= settled(journal)
            resent += len((answered - before) & new.keys())

        process = await start(emulator, journal)
        async with asyncio.timeout(60):
            stdout, _ = await process.communicate()

        assert stdout.decode().split() == [str(len(TARGETS)), "True"]
        assert settled(journal) == set(TARGETS)
        resumed = read_journal(journal)
        assert resumed is not None
        assert resumed.is_complete
        assert {emulator.status(*target) for target in TARGETS} == {"stopped"}
        # Only requests in flight at a kill can have been answered without a line.
        assert resent <= 20 * IN_FLIGHT
        assert KEY.encode() not in journal.read_bytes()
