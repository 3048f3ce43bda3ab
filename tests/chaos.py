"""A bulk stop under fire: every fault at once, ended in every way, and then the books are checked.

`python tests/chaos.py [--seeds 50] [--first 0] [--targets 10000] [--jobs 4]`

One seed is one run against the emulator over real sockets. The seed decides the faults, the kind
of the input, the policy, and how and when the run is ended. What is checked afterwards is the
promise of the bulk stop: one outcome for each target, and none that the server contradicts.
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

_KEY = "a-key-that-must-not-be-written"
_DONE = frozenset({StopResult.STOPPED, StopResult.ACCEPTED, StopResult.ALREADY_STOPPED})
_NOTHING_DONE = frozenset({StopResult.REJECTED, StopResult.NOT_SENT})


class Ending(StrEnum):
    """How a run ends."""

    BY_ITSELF = "by itself"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    LEFT_EARLY = "left early"
    NO_MORE_FEEDING = "no more feeding"
    CALLBACK_RAISES = "on_outcome raises"
    INPUT_RAISES = "input raises"
    KEY_REVOKED = "key revoked"
    SESSION_CLOSED = "session closed"


class _Planned(Exception):  # noqa: N818 - it is no error.
    """What the run's own input or callback raises."""


class Books(NamedTuple):
    """What one run came to."""

    seed: int
    ending: Ending
    report: StopReport
    requests: int
    problems: list[str]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {result}" for result, count in self.report.counts.items())
        verdict = "; ".join(self.problems) or "ok"
        took = f"{self.report.elapsed:.1f} s, {self.requests} requests"
        return f"seed {self.seed:4} {self.ending:18} {took}: {counts}: {verdict}"


class Storm:
    """One run, as its seed has it.

    Args:
        seed: Decides everything that is left to chance.
        targets: How many targets there are.
        folder: Where the journal is kept.
    """

    def __init__(self, seed: int, targets: int, folder: Path) -> None:
        chance = random.Random(seed)
        self.seed = seed
        self.ending = list(Ending)[seed % len(Ending)]
        self.journal = folder / f"{seed}.jsonl"
        faults = {fault: chance.uniform(0.0, 0.04) for fault in Fault}
        self.emulator = Emulator(
            port=0,
            api_key=_KEY,
            faults=faults,
            seed=seed,
            latency=chance.choice([0.0, 0.002]),
            retry_after=chance.choice(["0", "0.02", None]),
            fault_latency=0.02,
            drip_interval=0.0002,
        )
        self.targets: list[object] = []
        for number in range(targets):
            target = RuntimeRef(f"ws-{number % 7}", f"runtime {number}")
            kind = chance.random()
            if kind < 0.97:
                self.emulator.add_runtime(*target, status="stopped" if kind < 0.02 else "active")
            self.targets.append(target if kind < 0.99 else chance.choice([None, ("ws", ""), "ab"]))
        self._before = {
            target: self.emulator.status(*target)
            for target in self.targets
            if isinstance(target, RuntimeRef)
        }
        feeds: list[Callable[[], Any]] = [
            self._as_list,
            self._as_generator,
            self._as_async_generator,
        ]
        self._feed = chance.choice(feeds[self.ending is Ending.INPUT_RAISES :])
        self._is_list = self._feed == self._as_list
        self._streamed = chance.random() < 0.5 or self.ending is Ending.LEFT_EARLY
        self._concurrency = chance.choice([1, 7, 50, 100]) if targets <= 1000 else 100
        self._turning_point = chance.randrange(targets // 2)
        self._verify = seed % 4 == 3
        # What is still active is polled for that long.
        self._patience = chance.uniform(1.5, 4.0) if self._verify else chance.uniform(0.2, 10.0)
        self._policy = RetryPolicy(
            attempts=chance.randint(1, 4), base=0.001, cap=0.01, patience=self._patience
        )
        self._delivered: Counter[int] = Counter()
        self._batch: StopBatch | None = None
        self._runner: asyncio.Task[None] | None = None
        self._key = _KEY

    def _as_list(self) -> Iterable[object]:
        return self.targets

    def _as_generator(self) -> Iterator[object]:
        for index, target in enumerate(self.targets):
            if self.ending is Ending.INPUT_RAISES and index == self._turning_point:
                raise _Planned
            yield target

    async def _as_async_generator(self) -> AsyncIterator[object]:
        for target in self._as_generator():
            if len(self._delivered) % 100 == 0:
                await asyncio.sleep(0)
            yield target

    async def rage(self) -> Books:
        """Run, and check the books."""
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
                self._feed(),
                concurrency=self._concurrency,
                deadline=self._patience / 3 if self.ending is Ending.DEADLINE else None,
                on_outcome=lambda outcome: self._note(outcome.index),
                journal=self.journal,
                verify=self._verify,
            )
            self._runner = asyncio.create_task(self._run(batch))
            with suppress(_Planned, asyncio.CancelledError):
                await self._runner
            left = bulk_tasks()
            problems = [f"left running: {left}"] if left else []
        problems += self._check(batch.report)
        return Books(self.seed, self.ending, batch.report, len(self.emulator.requests), problems)

    async def _run(self, batch: StopBatch) -> None:
        if not self._streamed:
            await batch
            return
        async with batch:
            async for outcome in batch:
                if outcome.index % 1000 == 0:
                    await asyncio.sleep(0.001)
                if self.ending is Ending.LEFT_EARLY and batch.counts.total() > self._turning_point:
                    break

    async def _note(self, index: int) -> None:
        self._delivered[index] += 1
        if len(self._delivered) != self._turning_point + 1:
            return
        assert self._batch is not None
        assert self._runner is not None
        match self.ending:
            case Ending.CANCELLED:
                self._runner.cancel()
            case Ending.NO_MORE_FEEDING:
                self._batch.stop_reading()
            case Ending.CALLBACK_RAISES:
                raise _Planned
            case Ending.KEY_REVOKED:
                self._key = "another"
            case Ending.SESSION_CLOSED:
                await self._session.close()

    def _check(self, report: StopReport) -> Iterator[str]:
        text = self.journal.read_text()
        lines = [json.loads(line) for line in text.splitlines()[1:]]
        indices = Counter(line["index"] for line in lines)
        results = Counter(StopResult(line["result"]) for line in lines)
        unsettled = {line["index"] for line in lines if not StopResult(line["result"]).settled}
        delivered = self._delivered.keys()
        to_the_end = self.ending in {Ending.BY_ITSELF, Ending.DEADLINE, Ending.NO_MORE_FEEDING}
        rules = {
            "the key is in the journal": _KEY not in text,
            "a target has two outcomes": max(indices.values(), default=1) == 1,
            "a target has no outcome": sorted(indices) == list(range(report.total)),
            "the counts are not those of the journal": results == report.counts,
            "the counts do not add up": report.counts.total() == report.total,
            "the list was not worked off": not self._is_list or report.total == len(self.targets),
            "the failures are not those of the journal": unsettled
            == {outcome.index for outcome in report.failures},
            "an outcome was delivered twice": max(self._delivered.values(), default=1) == 1,
            "an outcome was delivered that is none": delivered <= indices.keys(),
            "an outcome was not delivered": not to_the_end or delivered == indices.keys(),
        }
        yield from (problem for problem, kept in rules.items() if not kept)
        for line in lines:
            yield from self._contradictions(line)

    def _contradictions(self, line: dict[str, Any]) -> Iterator[str]:
        target, result = self.targets[line["index"]], StopResult(line["result"])
        if not isinstance(target, RuntimeRef):
            rules = {"it is no target": result is StopResult.REJECTED}
        else:
            now, received = self.emulator.status(*target), self.emulator.received[target]
            rules = {
                f"its status is {now}": (now in {"stopped", "failed"} or result not in _DONE)
                and (now == self._before[target] or result not in _NOTHING_DONE)
                and (now is None or result is not StopResult.NOT_FOUND),
                f"the server received it {received} times": received <= line.get("attempts", 0)
                and (not received or result is not StopResult.NOT_SENT),
            }
        for problem, kept in rules.items():
            if not kept:
                yield f"target {line['index']} is {result}, but {problem}"


def storm(seed: int, targets: int) -> Books:
    """Run one seed in this process, with an event loop and a folder of its own."""
    logging.getLogger("bctrl_async").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(Storm(seed, targets, Path(folder)).rage())


def _main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in {"seeds": 50, "first": 0, "targets": 10_000, "jobs": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.seeds)
    wrong = 0
    with ProcessPoolExecutor(given.jobs) as pool:
        runs = [pool.submit(storm, seed, given.targets) for seed in seeds]
        for run in as_completed(runs):
            books = run.result()
            wrong += bool(books.problems)
            sys.stdout.write(f"{str(books)[:1000]}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{given.seeds - wrong} of {given.seeds} seeds are in order\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(_main())
