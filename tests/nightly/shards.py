"""Shards of one list: processes of the command that are killed and started again.

`python tests/nightly/shards.py [--seeds 5] [--first 0] [--targets 30000] [--shards 4]
[--kills 12]`

The seed decides the order of each process's list, and the moments at which a process
that has a request in flight gets SIGKILL. A supervisor starts it again with the same
journal until its exit code is 0. Afterwards the output of `bctrl-async report` is
compared with the list and with the state of the server, and the requests that were
repeated are counted.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bctrl_async.emulator import Emulator
from bctrl_async.journal import read_journals
from bctrl_async.shards import shard_of

_KEY = "a-key-that-must-not-be-written"
_IN_FLIGHT = 20
_STOPPED_SHARE = 0.02
_MISSING_SHARE = 0.01
_MAX_STARTS = 100
_Target = tuple[str, str]


class Verdict(NamedTuple):
    """The figures of one run, and the problems found."""

    seed: int
    targets: int
    kills: int
    repeated: int
    seconds: float
    problems: list[str]


class ShardsRun:
    """One run.

    Args:
        seed: Decides the orders and the moments.
        targets: The length of the list.
        folder: The folder of the lists and journals.
        shards: The number of shards, a process for each.
        kills: The number of kills.
    """

    def __init__(
        self, seed: int, targets: int, folder: Path, *, shards: int = 4, kills: int = 12
    ) -> None:
        self._seed = seed
        self._rng = random.Random(seed)
        self._folder = folder
        self._shards = range(1, shards + 1)
        self._emulator = Emulator(port=0, api_key=_KEY, latency=0.005)
        self._targets: list[_Target] = [
            ("ws", f"r{number}") for number in range(targets)
        ]
        for target in self._targets:
            if self._rng.random() >= _MISSING_SHARE:
                is_stopped = self._rng.random() < _STOPPED_SHARE
                self._emulator.add_runtime(
                    *target, status="stopped" if is_stopped else "active"
                )
        self._missing = {t for t in self._targets if self._emulator.status(*t) is None}
        self._kills_at = sorted(
            self._rng.choices(range(1, int(targets * 0.95)), k=kills)
        )
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._kills = 0
        self._problems: list[str] = []

    async def run(self) -> Verdict:
        """Run the shards to their end, and check the report."""
        self._write_list("all.csv", self._targets)
        began = time.monotonic()
        async with self._emulator:
            supervisors = [
                asyncio.create_task(self._supervise(number)) for number in self._shards
            ]
            killer = asyncio.create_task(self._kill())
            await asyncio.gather(*supervisors)
            killer.cancel()
            seconds = time.monotonic() - began
            self._problems += [problem async for problem in self._check()]
        received = self._emulator.received
        # A target that was not found is sent again by each start.
        repeated = sum(
            received[target] - 1
            for target in self._targets
            if target not in self._missing
        )
        # A request can have been answered without a line if it was in flight at a kill.
        if not 0 <= repeated <= self._kills * _IN_FLIGHT:
            self._problems.append(
                f"{repeated} requests were repeated after {self._kills} kills"
            )
        return Verdict(
            self._seed,
            len(self._targets),
            self._kills,
            repeated,
            seconds,
            self._problems,
        )

    def _write_list(self, name: str, targets: list[_Target]) -> None:
        text = "".join(f"{workspace_id},{alias}\n" for workspace_id, alias in targets)
        (self._folder / name).write_text(text, "utf-8")

    async def _start(
        self, *args: str, stdout: int | None = None
    ) -> asyncio.subprocess.Process:
        environment = os.environ | {
            "BCTRL_API_KEY": _KEY,
            "BCTRL_BASE_URL": self._emulator.url,
        }
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bctrl_async", *args),
            cwd=self._folder,
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=asyncio.subprocess.DEVNULL if stdout is None else stdout,
            stderr=asyncio.subprocess.PIPE,
        )

    async def _supervise(self, number: int) -> None:
        """Start the process of a shard until its exit code is 0."""
        name = f"list-{number}.csv"
        self._write_list(name, self._rng.sample(self._targets, len(self._targets)))
        options = ("--from", name, "--shard", f"{number}/{len(self._shards)}")
        journal = ("--journal", f"night-{number}.jsonl")
        limits = ("--concurrency", str(_IN_FLIGHT), "--ignore-not-found")
        for _ in range(_MAX_STARTS):
            process = await self._start("stop", *options, *journal, *limits)
            self._processes[number] = process
            _, stderr = await process.communicate()
            if process.returncode == 0:
                return
            if process.returncode != -9:
                self._problems.append(
                    f"shard {number} ended with {process.returncode}: {stderr!r}"
                )
                return

    async def _kill(self) -> None:
        """Kill the process whose request arrived last, when this many have arrived."""
        requests = self._emulator.requests
        for count in self._kills_at:
            while len(requests) < count:
                await asyncio.sleep(0.001)
            for _ in range(self._rng.randint(0, 30)):
                await asyncio.sleep(0)
            last = requests[-1]
            process = self._processes[
                shard_of((last.workspace_id, last.alias), len(self._shards))
            ]
            if process.returncode is None:
                # Its own kill() may take the exit code of a killed process from
                # asyncio, which then reports 255.
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                self._kills += 1
                self._check_journals()

    def _journals(self) -> list[Path]:
        return sorted(self._folder.glob("night-*.jsonl"))

    def _check_journals(self) -> None:
        """Check the journals while processes write them."""
        if paths := self._journals():
            known = (
                (outcome.target, str(outcome.result))
                for outcome in read_journals(paths)
            )
            self._problems += [
                problem for pair in known for problem in self._check_outcome(*pair)
            ]
            parts = [
                {outcome.target for outcome in read_journals([path])} for path in paths
            ]
            if sum(map(len, parts)) > len(set().union(*parts)):
                self._problems.append("a target is in two journals")

    def _check_outcome(self, target: _Target, result: str | None) -> Iterator[str]:
        is_true = (
            result == "not_found"
            if target in self._missing
            else result in {"stopped", "already_stopped"}
            and self._emulator.status(*target) == "stopped"
        )
        if not is_true:
            status = self._emulator.status(*target)
            yield f"{target} is {result}, and {status} on the server"

    async def _check(self) -> AsyncIterator[str]:
        paths = self._journals()
        names = [path.name for path in paths]
        process = await self._start(
            *(
                "report",
                *names,
                "--from",
                "all.csv",
                "--ignore-not-found",
                "-o",
                "json",
            ),
            stdout=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        if process.returncode != 0:
            yield f"the report ended with {process.returncode}: {err.decode()}"
        found = [json.loads(line) for line in out.splitlines()]
        if [(line["workspace_id"], line["alias"]) for line in found] != self._targets:
            yield "the report does not have each target of the list once, in its order"
        for line in found:
            target = (line["workspace_id"], line["alias"])
            for problem in self._check_outcome(target, line["result"]):
                yield problem
        if f"{len(self._targets):,} of {len(self._targets):,} done" not in err.decode():
            yield f"the summary is {err.decode()}"
        if any(_KEY.encode() in path.read_bytes() for path in paths):
            yield "the key is in a journal"


def _main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    defaults = {"seeds": 5, "first": 0, "targets": 30_000, "shards": 4, "kills": 12}
    for name, default in defaults.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"default {default}"
        )
    args = parser.parse_args()
    failed = 0
    for seed in range(args.first, args.first + args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            options = {"shards": args.shards, "kills": args.kills}
            run = ShardsRun(seed, args.targets, Path(folder), **options)
            verdict = asyncio.run(run.run())
        failed += bool(verdict.problems)
        sys.stdout.write(f"{str(verdict)[:1000]}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{args.seeds - failed} of {args.seeds} seeds passed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(_main())
