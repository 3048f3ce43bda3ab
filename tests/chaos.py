"""Chaos tests of the bulk stop: all faults at once, every ending, then a check of all outcomes.

`python tests/chaos.py [--seeds 50] [--first 0] [--targets 10000] [--jobs 4]`

Each seed is one run against the emulator over real sockets. The seed decides the faults, the kind
of input, the policy, and how and when the run ends. Afterwards the guarantee of the bulk stop is
checked: one outcome for each target, and none that contradicts the state of the server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import tempfile
from argparse import ArgumentParser
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from leaks import bulk_tasks

from bctrl_async import BctrlSession, RetryPolicy, RuntimeRef, StopBatch, StopReport, StopResult
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.journal import read_journal

_NOT_YET = {
    Fault.STRAY_ANSWER,
    Fault.LATE_STRAY_ANSWER,
    Fault.FOREIGN_NOT_FOUND,
    Fault.LOGIN_PAGE,
}
_KEY = "a-key-that-must-not-be-written"
_CLAIMS_STOPPED = frozenset({StopResult.STOPPED, StopResult.ACCEPTED, StopResult.ALREADY_STOPPED})
_CLAIMS_NO_EFFECT = frozenset({StopResult.REJECTED, StopResult.NOT_SENT})


class Ending(StrEnum):
    """A way in which a run ends."""

    COMPLETED = "completed"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    LEFT_EARLY = "left early"
    STOP_READING = "stop_reading"
    CALLBACK_RAISES = "on_outcome raises"
    INPUT_RAISES = "input raises"
    KEY_REVOKED = "key revoked"
    SESSION_CLOSED = "session closed"


class _PlannedError(Exception):
    """Raised on purpose by the input or the callback of a run."""


class Verdict(NamedTuple):
    """The outcome counts of one run, and the problems found in them."""

    seed: int
    ending: Ending
    report: StopReport
    requests: int
    problems: list[str]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {result}" for result, count in self.report.counts.items())
        problems = "; ".join(self.problems) or "ok"
        cost = f"{self.report.elapsed:.1f} s, {self.requests} requests"
        return f"seed {self.seed:4} {self.ending:18} {cost}: {counts}: {problems}"


class ChaosRun:
    """One run, as decided by its seed.

    Args:
        seed: The seed of all random choices.
        targets: The number of targets.
        folder: The folder for the journal.
    """

    def __init__(self, seed: int, targets: int, folder: Path) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.ending = list(Ending)[seed % len(Ending)]
        self.journal = folder / f"{seed}.jsonl"
        faults = {fault: rng.uniform(0.0, 0.04) for fault in Fault if fault not in _NOT_YET}
        self.emulator = Emulator(
            port=0,
            api_key=_KEY,
            faults=faults,
            seed=seed,
            latency=rng.choice([0.0, 0.002]),
            retry_after=rng.choice(["0", "0.02", None]),
            fault_latency=0.02,
            drip_interval=0.0002,
        )
        self.targets: list[object] = []
        for number in range(targets):
            target = RuntimeRef(f"ws-{number % 7}", f"runtime {number}")
            draw = rng.random()
            if draw < 0.97:
                self.emulator.add_runtime(*target, status="stopped" if draw < 0.02 else "active")
            self.targets.append(target if draw < 0.99 else rng.choice([None, ("ws", ""), "ab"]))
        self._before = {
            target: self.emulator.status(*target)
            for target in self.targets
            if isinstance(target, RuntimeRef)
        }
        inputs: list[Callable[[], Any]] = [
            self._as_list,
            self._as_generator,
            self._as_async_generator,
        ]
        self._make_input = rng.choice(inputs[self.ending is Ending.INPUT_RAISES :])
        self._is_list = self._make_input == self._as_list
        self._streamed = rng.random() < 0.5 or self.ending is Ending.LEFT_EARLY
        self._concurrency = rng.choice([1, 7, 50, 100]) if targets <= 1000 else 100
        self._end_after = rng.randrange(targets // 2)
        self._verify = seed % 4 == 3
        # `verify` polls a runtime that stays active for this long.
        self._patience = rng.uniform(1.5, 4.0) if self._verify else rng.uniform(0.2, 10.0)
        self._policy = RetryPolicy(
            attempts=rng.randint(1, 4), base=0.001, cap=0.01, patience=self._patience
        )
        self._delivered: Counter[int] = Counter()
        self._batch: StopBatch | None = None
        self._runner: asyncio.Task[None] | None = None
        self._key = _KEY

    def _as_list(self) -> Iterable[object]:
        return self.targets

    def _as_generator(self) -> Iterator[object]:
        for index, target in enumerate(self.targets):
            if self.ending is Ending.INPUT_RAISES and index == self._end_after:
                raise _PlannedError
            yield target

    async def _as_async_generator(self) -> AsyncIterator[object]:
        for target in self._as_generator():
            if len(self._delivered) % 100 == 0:
                await asyncio.sleep(0)
            yield target

    async def run(self) -> Verdict:
        """Run the bulk stop and check its outcomes."""
        async with (
            self.emulator,
            BctrlSession(
                lambda: self._key,
                base_url=self.emulator.url,
                timeout=0.5,
                retry=self._policy,
            ) as session,
        ):
            self._session = session
            batch = self._batch = session.stop_runtimes(
                self._make_input(),
                concurrency=self._concurrency,
                deadline=self._patience / 3 if self.ending is Ending.DEADLINE else None,
                on_outcome=lambda outcome: self._on_outcome(outcome.index),
                journal=self.journal,
                verify=self._verify,
            )
            self._runner = asyncio.create_task(self._run_batch(batch))
            with suppress(_PlannedError, asyncio.CancelledError):
                await self._runner
            leaked = bulk_tasks()
            problems = [f"leaked tasks: {leaked}"] if leaked else []
        problems += self._check(batch.report)
        return Verdict(self.seed, self.ending, batch.report, len(self.emulator.requests), problems)

    async def _run_batch(self, batch: StopBatch) -> None:
        if not self._streamed:
            await batch
            return
        async with batch:
            async for outcome in batch:
                if outcome.index % 1000 == 0:
                    await asyncio.sleep(0.001)
                if self.ending is Ending.LEFT_EARLY and batch.counts.total() > self._end_after:
                    break

    async def _on_outcome(self, index: int) -> None:
        self._delivered[index] += 1
        if len(self._delivered) != self._end_after + 1:
            return
        assert self._batch is not None
        assert self._runner is not None
        match self.ending:
            case Ending.CANCELLED:
                self._runner.cancel()
            case Ending.STOP_READING:
                self._batch.stop_reading()
            case Ending.CALLBACK_RAISES:
                raise _PlannedError
            case Ending.KEY_REVOKED:
                self._key = "another"
            case Ending.SESSION_CLOSED:
                await self._session.close()

    def _check(self, report: StopReport) -> Iterator[str]:
        text = self.journal.read_text()
        found = [json.loads(line) for line in text.splitlines()[1:]]
        lines = [line for line in found if "completed" not in line]
        content = read_journal(self.journal)  # It checks each line's checksum.
        indices = Counter(line["index"] for line in lines)
        results = Counter(StopResult(line["result"]) for line in lines)
        failed = {
            line["index"]
            for line in lines
            if not StopResult(line["result"]).settled or line["result"] == StopResult.NOT_FOUND
        }
        delivered = self._delivered.keys()
        delivers_all = self.ending in {Ending.COMPLETED, Ending.DEADLINE, Ending.STOP_READING}
        rules = {
            "the key is in the journal": _KEY not in text,
            "a target has two outcomes": max(indices.values(), default=1) == 1,
            "a target has no outcome": sorted(indices) == list(range(report.total)),
            "the journal is torn": content is not None and not content.is_torn,
            "the journal is marked as complete": len(lines) == len(found) or report.ok,
            "the counts differ from the journal": results == report.counts,
            "the counts do not add up": report.counts.total() == report.total,
            "the list was not read to its end": not self._is_list
            or report.total == len(self.targets),
            "the failures differ from the journal": failed
            == {outcome.index for outcome in report.failures},
            "an outcome was delivered twice": max(self._delivered.values(), default=1) == 1,
            "a delivered outcome is not in the journal": delivered <= indices.keys(),
            "an outcome was not delivered": not delivers_all or delivered == indices.keys(),
        }
        yield from (problem for problem, holds in rules.items() if not holds)
        for line in lines:
            yield from self._contradictions(line)

    def _contradictions(self, line: dict[str, Any]) -> Iterator[str]:
        target, result = self.targets[line["index"]], StopResult(line["result"])
        if not isinstance(target, RuntimeRef):
            rules = {"it is invalid": result is StopResult.REJECTED}
        else:
            now, received = self.emulator.status(*target), self.emulator.received[target]
            rules = {
                f"its status is {now}": (
                    now in {"stopped", "failed"} or result not in _CLAIMS_STOPPED
                )
                and (now == self._before[target] or result not in _CLAIMS_NO_EFFECT)
                and (now is None or result is not StopResult.NOT_FOUND),
                f"the server received it {received} times": received <= line.get("attempts", 0)
                and (not received or result is not StopResult.NOT_SENT),
            }
        for problem, holds in rules.items():
            if not holds:
                yield f"target {line['index']} is {result}, but {problem}"


def run_seed(seed: int, targets: int) -> Verdict:
    """Run one seed in this process, with its own event loop and folder."""
    logging.getLogger("bctrl_async").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(ChaosRun(seed, targets, Path(folder)).run())


def _main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in {"seeds": 50, "first": 0, "targets": 10_000, "jobs": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.seeds)
    failed = 0
    with ProcessPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(run_seed, seed, args.targets) for seed in seeds]
        for run in as_completed(runs):
            verdict = run.result()
            failed += bool(verdict.problems)
            sys.stdout.write(f"{str(verdict)[:1000]}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{args.seeds - failed} of {args.seeds} seeds passed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(_main())
