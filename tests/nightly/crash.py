"""Bulk stops killed with SIGKILL at random moments, each resumed from its journal.

`python tests/nightly/crash.py [--kills 200] [--seed 1]`

After each kill the journal is read line by line and compared with the server: each
entry that says that a runtime no longer runs is true, none is lost or sent again, and
only the last line may be cut short. In the end a run that is not killed stops what is
left.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bctrl_async.emulator import Emulator, Fault
from bctrl_async.journal import read_journals

sys.path.append(str(Path(__file__).parents[1]))
from support.journal_lines import read_lines
from support.wire_faults import WireEmulator, WireFault

KEY = "a-key-that-must-not-be-written"
IN_FLIGHT = 20
_BOUND = 60.0
_PER_RUN = 60
"""The most requests of a run before it is killed."""
_FAULTS: dict[Fault | WireFault, float] = {
    Fault.DROP_AFTER: 0.02,
    Fault.SERVER_ERROR: 0.02,
    Fault.RATE_LIMITED: 0.01,
    WireFault.STRAY_ANSWER: 0.02,
    WireFault.LATE_STRAY_ANSWER: 0.02,
}
_PROGRAM = """
import asyncio, logging, sys
from bctrl_async import BctrlSession, RetryPolicy

logging.disable()

async def main(key, url, journal, count, in_flight):
    options = {"base_url": url, "max_connections": int(in_flight)}
    async with BctrlSession(key, **options) as session:
        targets = [("ws-1", f"r{number}") for number in range(int(count))]
        policy = RetryPolicy(attempts=10, base=0.001, cap=0.01)
        report = await session.stop_runtimes(targets, journal=journal, retry=policy)
    print(report.total, report.ok)

asyncio.run(main(*sys.argv[1:]))
"""

Target = tuple[str, str]


class Crashes:
    """A list, its emulator, and the journal of the runs that are killed."""

    def __init__(
        self, emulator: Emulator, journal: Path, kills: int, rng: random.Random
    ) -> None:
        self._emulator = emulator
        self._journal = journal
        self._kills = kills
        self._rng = rng
        # Each run leaves something for the next.
        self.targets = [
            ("ws-1", f"r{number}") for number in range(kills * (_PER_RUN - 10))
        ]
        for target in self.targets:
            emulator.add_runtime(*target)

    async def run(self) -> int:
        """Kill the runs, then let one end; return the number of stops sent twice."""
        resent = 0
        for _ in range(self._kills):
            before, received = self._done(), Counter(self._emulator.received)
            stopped = {
                target
                for target in self.targets
                if self._emulator.status(*target) == "stopped"
            }
            process = await self._start()
            await self._wait(process)
            process.kill()
            assert await process.wait() == -signal.SIGKILL
            new = self._emulator.received - received
            assert before & new.keys() == set(), "what was done was sent again"
            assert before <= self._done(), "an entry was lost"
            resent += len((stopped - before) & new.keys())
        process = await self._start()
        async with asyncio.timeout(_BOUND * 10):
            stdout, _ = await process.communicate()
        assert stdout.decode().split() == [str(len(self.targets)), "True"]
        assert self._done() == set(self.targets)
        assert {self._emulator.status(*target) for target in self.targets} == {
            "stopped"
        }
        # A request can have been answered without a line if it was in flight at a kill.
        assert resent <= self._kills * IN_FLIGHT
        assert KEY.encode() not in self._journal.read_bytes()
        return resent

    async def _start(self) -> asyncio.subprocess.Process:
        args = (
            KEY,
            self._emulator.url,
            self._journal,
            str(len(self.targets)),
            str(IN_FLIGHT),
        )
        return await asyncio.create_subprocess_exec(
            sys.executable, "-c", _PROGRAM, *args, stdout=asyncio.subprocess.PIPE
        )

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        """Wait for some requests of a run and a moment, or only for a moment."""
        requests = len(self._emulator.requests)
        until = requests + self._rng.randint(1, _PER_RUN)
        if self._rng.random() < 0.1:
            # It may be killed before it has opened its journal, or while it reads that.
            end = time.monotonic() + self._rng.uniform(0.0, 1.0)
            while time.monotonic() < end and len(self._emulator.requests) < until:
                await asyncio.sleep(0.001)
            return
        async with asyncio.timeout(_BOUND):
            # Its start takes long, so leave it the processor.
            while len(self._emulator.requests) == requests:
                assert process.returncode is None, "a run ended by itself"
                await asyncio.sleep(0.001)
            while len(self._emulator.requests) < until:
                await asyncio.sleep(0)
        for _ in range(self._rng.randint(0, 30)):
            await asyncio.sleep(0)

    def _done(self) -> set[Target]:
        """Check each line of the journal; return the targets that are done."""
        data = self._journal.read_bytes() if self._journal.exists() else b""
        if b"\n" not in data:
            return set()
        lines = read_lines(data)
        assert lines.header["base_url"] == f"{self._emulator.url}/v1"
        done: set[Target] = set()
        for entry in lines.entries:
            target = (entry["workspace_id"], entry["alias"])
            assert target == self.targets[entry["index"]], entry
            assert target not in done, (
                f"a line follows the one after which it is done: {entry}"
            )
            assert self._emulator.received[target] >= (entry["result"] != "not_sent"), (
                entry
            )
            if entry.get("ok"):
                assert self._emulator.status(*target) == "stopped", entry
                done.add(target)
        outcomes = read_journals([self._journal], self.targets)
        assert {(*outcome.target,) for outcome in outcomes if outcome.ok} == done
        return done


async def crash(kills: int, seed: int, folder: Path) -> str:
    """Run it with an emulator of its own, and return what happened."""
    start = time.monotonic()
    async with WireEmulator(
        port=0, api_key=KEY, faults=_FAULTS, seed=seed, latency=0.002
    ) as emulator:
        crashes = Crashes(
            emulator, folder / "journal.jsonl", kills, random.Random(seed)
        )
        resent = await crashes.run()
    seconds = time.monotonic() - start
    return (
        f"{kills} kills of runs of {len(crashes.targets)} targets in {seconds:.0f} s: "
        f"nothing lost or false, {resent} stops sent again whose answer had no line yet"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(
            asyncio.run(crash(given.kills, given.seed, Path(folder))) + "\n"
        )


if __name__ == "__main__":
    main()
