"""Bulk stops on a cluster of dask.distributed whose parts are killed, compared with the server.

`python tests/nightly/cluster.py [--targets 100000] [--workers 3] [--seed 0] [--only CASE ...]`

The emulator, the cluster (scheduler and nannies), its workers and the coordinator are processes. In
each case one of them is killed with SIGKILL at a moment that the seed decides, or one worker is
closed and another scaled away, or one is restarted, or one has another version and another no
network; then the coordinator is started again with the same journal, until its report is ok. In the
end each target must have exactly one outcome, and none that contradicts what the server has
received and stopped.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, cast

from distributed import Worker

import bctrl_async.dask
from bctrl_async import BctrlSession, StopReport
from bctrl_async.dask import stop_runtimes
from bctrl_async.emulator import Emulator
from bctrl_async.outcomes import StopResult

sys.path.append(str(Path(__file__).parents[1]))
from dask_cluster import connect, local_cluster
from journal_lines import read_lines

_KEY = "emulator-key"
_STOPPED = frozenset({StopResult.STOPPED, StopResult.ACCEPTED, StopResult.ALREADY_STOPPED})
_AGREES = "each target has one outcome, and the server's record agrees"
_MAX_RUNS = 5
_LINE = 150
"""About the bytes of a line of the journal."""
_spawn = multiprocessing.get_context("spawn")


class Case(StrEnum):
    """The part that is killed."""

    NOTHING = "nothing is killed"
    WORKER = "a worker is killed"
    SCHEDULER = "the scheduler is killed"
    COORDINATOR = "the coordinator is killed"
    CLOSED = "a worker is closed, and one scaled away"
    RESTARTED = "a worker is restarted"
    UNFIT = "a worker has another version, and one no network"


def targets_of(count: int) -> Iterator[tuple[str, str]]:
    return (("ws-1", f"r{number}") for number in range(count))


def serve(control: Connection, count: int) -> None:
    """Run the emulator until its record is asked for, and send that."""

    async def main() -> None:
        async with Emulator(port=0, api_key=_KEY) as emulator:
            for target in targets_of(count):
                emulator.add_runtime(*target)
            control.send(emulator.url)
            await _until_told(control)
            record = {
                alias: (emulator.received[workspace, alias], runtime["status"])
                for (workspace, alias), runtime in emulator.runtimes.items()
            }
            control.send(record)

    asyncio.run(main())


def host(control: Connection, workers: int) -> None:
    """Run the scheduler and the nannies of a cluster until told to close it."""

    async def main() -> None:
        async with local_cluster(workers) as cluster, connect(cluster) as client:
            pids = await client.run(os.getpid)
            control.send((cluster.scheduler_address, list(pids.values())))
            first, second, *_ = pids
            while told := await _until_told(control):
                if told is Case.CLOSED:
                    await client.run(_close, workers=[first], wait=False)
                    await client.retire_workers([second])
                elif told is Case.RESTARTED:
                    await client.restart_workers([first])
                else:
                    await client.run(_have_another_version, workers=[first])
                    await client.run(_have_no_network, workers=[second])
                    control.send(told)

    asyncio.run(main())


async def _close(dask_worker: Worker) -> None:
    await dask_worker.close()


def _have_another_version() -> None:
    vars(bctrl_async.dask)["__version__"] = "0.0.1"


def _have_no_network() -> None:
    os.environ["TEST_PROXY"] = "http://127.0.0.1:1"


def make_session() -> BctrlSession:
    """Make the session of a worker, which may have no network."""
    return BctrlSession(proxy=os.environ.get("TEST_PROXY"), allow_plaintext=True)


async def _until_told(control: Connection) -> object:
    while not control.poll():
        await asyncio.sleep(0.05)
    return control.recv()


def coordinate(control: Connection, address: str, journal: Path, count: int) -> None:
    """Stop all targets on a cluster, and send the end."""

    async def main() -> StopReport:
        async with connect(address) as client:
            targets = list(targets_of(count))
            return await stop_runtimes(client, targets, session=make_session, journal=journal)

    logging.disable()
    report = asyncio.run(main())
    control.send(End(report.ok, dict(report.counts), str(report.ended_early)))


_ONE_RUN = frozenset({Case.CLOSED, Case.RESTARTED, Case.UNFIT})
"""The cases in which the first run must be ok."""


class End(NamedTuple):
    """The end of a coordinator: if its report is ok, its counts, and why it ended early."""

    ok: bool
    counts: dict[StopResult, int]
    ended_early: str


class Child:
    """A process, and the pipe to it."""

    def __init__(self, run: Callable[..., None], *args: object) -> None:
        self.control, theirs = _spawn.Pipe()
        self.process = _spawn.Process(target=run, args=(theirs, *args))
        self.process.start()
        # The pipe ends with the process.
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> object:
        """Tell it to end, and return the last that it sends, if anything."""
        self.control.send(None)
        last: object = None
        with suppress(EOFError):
            while True:
                last = self.control.recv()
        self.process.join()
        return last


class Cluster:
    """A running cluster: the process with its scheduler, and the pids of its workers."""

    def __init__(self, workers: int) -> None:
        self.host = Child(host, workers)
        self.address, self.pids = cast("tuple[str, list[int]]", self.host.control.recv())


class Run:
    """One case, from an empty server to the check of its record."""

    def __init__(self, case: Case, arguments: Namespace, folder: Path) -> None:
        self._case = case
        self._count: int = arguments.targets
        self._workers: int = arguments.workers
        self._random = random.Random(f"{arguments.seed}{case}")
        self._journal = folder / f"{case.name}.jsonl"

    def run(self) -> str:
        server = Child(serve, self._count)
        os.environ["BCTRL_API_KEY"], os.environ["BCTRL_BASE_URL"] = _KEY, server.control.recv()
        cluster = Cluster(self._workers)
        if self._case is Case.UNFIT:
            cluster.host.control.send(self._case)
            cluster.host.control.recv()
        ends: list[End] = []
        kills = self._case not in {Case.NOTHING, Case.UNFIT}
        began = time.monotonic()
        runs = 1 if self._case in _ONE_RUN else _MAX_RUNS
        while not (ends and ends[-1].ok) and len(ends) < runs:
            if not cluster.host.process.is_alive():
                cluster = Cluster(self._workers)
            coordinator = Child(coordinate, cluster.address, self._journal, self._count)
            if kills:
                kills = False
                self._kill(coordinator, cluster)
            try:
                ends.append(cast("End", coordinator.control.recv()))
            except EOFError:
                # It was killed.
                continue
            coordinator.process.join()
        seconds = time.monotonic() - began
        cluster.host.end()
        record = cast("dict[str, tuple[int, str]]", server.end())
        problems = list(self._problems(record)) if ends[-1].ok else [f"no end: {ends[-1]}"]
        repeated = sum(received - 1 for received, _ in record.values() if received)
        results = ", ".join(f"{count:,} {result}" for result, count in ends[-1].counts.items())
        early = [end.ended_early for end in ends if not end.ok]
        text = f"{self._case}: {results}; {repeated:,} requests repeated; {seconds:.1f} s"
        return "\n    ".join([text, *early, *(problems or [_AGREES])])

    def _kill(self, coordinator: Child, cluster: Cluster) -> None:
        # The share of the outcomes that are known by then.
        share = self._random.uniform(0.1, 0.8)
        while self._known() < share * self._count:
            time.sleep(0.01)
        match self._case:
            case Case.WORKER:
                os.kill(self._random.choice(cluster.pids), signal.SIGKILL)
            case Case.SCHEDULER:
                cluster.host.kill()
            case Case.CLOSED | Case.RESTARTED:
                cluster.host.control.send(self._case)
            case _:
                coordinator.kill()

    def _known(self) -> int:
        with suppress(FileNotFoundError):
            # Counting the lines of a growing file would cost more.
            return self._journal.stat().st_size // _LINE
        return 0

    def _problems(self, record: dict[str, tuple[int, str]]) -> Iterator[str]:
        """Compare the journal with the record of the server."""
        entries = read_lines(self._journal.read_bytes()).entries
        settled = Counter(entry["alias"] for entry in entries if entry.get("ok"))
        if (several := [alias for alias, count in settled.items() if count > 1]) != []:
            yield f"{len(several)} targets have two settled outcomes, such as {several[0]}"
        last = {entry["alias"]: StopResult(entry["result"]) for entry in entries}
        if len(last) != self._count:
            yield f"{len(last)} of {self._count} targets have an outcome"
        for entry in entries:
            alias, result = entry["alias"], StopResult(entry["result"])
            received, status = record[alias]
            if result in _STOPPED and status != "stopped":
                yield f"{alias} is {result}, and the server says {status}"
            if result in _STOPPED and not received:
                yield f"{alias} is {result}, and was never sent"
        for alias, result in last.items():
            if result is StopResult.NOT_SENT and record[alias][0]:
                yield f"{alias} is {result}, and the server has received it"


def main() -> int:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", metavar="CASE", choices=[case.name for case in Case])
    arguments = parser.parse_args()
    cases = [case for case in Case if case.name in (arguments.only or Case.__members__)]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            verdict = Run(case, arguments, Path(folder)).run()
            failed |= _AGREES not in verdict
            print(verdict, flush=True)  # noqa: T201 - its output.
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
