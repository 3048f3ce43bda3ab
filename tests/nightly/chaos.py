"""Chaos tests of the bulk stop: all faults, every ending, a check of all outcomes.

`python tests/nightly/chaos.py [--seeds 50] [--first 0] [--targets 10000] [--jobs 4]
[--long-way]`

Each seed is one run against the emulator over real sockets. The seed decides the
faults, the targets that are poisoned, the kind of input, the policy, and how and when
the run ends. Afterwards the guarantee of the bulk stop is checked: one outcome for each
target, and none that contradicts the state of the server, or was not in one of its
answers. With `--long-way` every request goes through `aiohttp.ClientSession.request`,
as if a tracer had wrapped it.
"""

from __future__ import annotations

import asyncio
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

import anyio

from bctrl_async import BctrlSession, RetryPolicy, RuntimeRef, StopBatch, StopReport
from bctrl_async.emulator import Fault, Reply
from bctrl_async.journal import read_journals
from bctrl_async.observer import (
    Attempt,
    AttemptObserver,
    BulkObserver,
    Observer,
    StopObserver,
)

sys.path.append(str(Path(__file__).parents[1]))
from chaos_checks import (
    FOREIGN_NOT_FOUND,
    GATEWAYS,
    LOGIN_PAGE,
    check_account,
    check_journal,
    check_targets,
    done_targets,
)
from chaos_server import ChaosServer
from support.journal_lines import read_lines
from support.leaks import bulk_tasks
from support.ways import LONG_WAY_HELP, take_long_way
from support.wire_faults import WireFault

_KEY = "a-key-that-must-not-be-written"
_TIMEOUT = 0.5
_POISON = (Fault.BAD_GATEWAY, Fault.DROP_BEFORE, Fault.HANG)
_POISONED_SHARE = 0.01
_ANSWERED_SHARE = 0.1
"""The share of targets whose first stop has an answer that is no fault."""
_REPEATED_SHARE = 0.01
_CANCEL_ITERATIONS = 5
"""A cancellation reaches all workers within these iterations of the event loop."""
_YEARS = "1798761600"
"""A Retry-After that is a point in time, where seconds belong."""


class Ending(StrEnum):
    """A way in which a run ends."""

    COMPLETED = "completed"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    LEFT_EARLY = "left early"
    STOP_READING = "stop_reading"
    ABORTED = "abort"
    SCOPE_CANCELLED = "scope cancelled"
    CALLBACK_RAISES = "on_outcome raises"
    INPUT_RAISES = "input raises"
    KEY_REVOKED = "key revoked"
    SESSION_CLOSED = "session closed"
    CONNECTIONS_RESET = "connections reset"
    RETRY_AFTER_YEARS = "Retry-After of years"


_DELIVERS_ALL = frozenset(
    {
        Ending.COMPLETED,
        Ending.DEADLINE,
        Ending.STOP_READING,
        Ending.ABORTED,
        Ending.CONNECTIONS_RESET,
        Ending.RETRY_AFTER_YEARS,
    }
)
_SENDS_NOTHING_NEW = frozenset(
    {
        Ending.CANCELLED,
        Ending.STOP_READING,
        Ending.ABORTED,
        Ending.SCOPE_CANCELLED,
        Ending.CALLBACK_RAISES,
        Ending.SESSION_CLOSED,
    }
)


class _PlannedError(Exception):
    """Raised on purpose by the input or the callback of a run."""


class _Begun(Observer, BulkObserver, StopObserver):
    """An observer that records the paths of stops that were sent, or nearly."""

    def __init__(self) -> None:
        self.paths: set[str] = set()

    def begin_bulk(self) -> BulkObserver:
        return self

    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        del workspace_id, alias
        return self

    def begin_attempt(self, attempt: Attempt) -> AttemptObserver:
        if attempt.stops:
            self.paths.add(attempt.url.raw_path)
        return AttemptObserver()

    def end(self, _: object) -> None:
        """End nothing: a bulk stop and a stop end alike."""


class Verdict(NamedTuple):
    """The outcome counts of one run, and the problems found in them."""

    seed: int
    ending: Ending
    report: StopReport
    requests: int
    problems: list[str]

    def __str__(self) -> str:
        counts = ", ".join(
            f"{count} {result}" for result, count in self.report.counts.items()
        )
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
        faults = {fault: rng.uniform(0.0, 0.04) for fault in (*Fault, *WireFault)}
        headers = rng.choice([{"Retry-After": "0"}, {"Retry-After": "0.02"}, {}])
        throttled = [Reply(429, headers=headers), Reply(503, headers=headers)]
        others = [
            LOGIN_PAGE,
            FOREIGN_NOT_FOUND,
            Reply(307),
            Reply(200, body={"ok": True}),
        ]
        others += rng.sample(GATEWAYS, 2)
        # A newer Retry-After would replace the long Retry-After.
        years = self.ending is Ending.RETRY_AFTER_YEARS
        self._answers = others if years else [*throttled, *others]
        self.emulator = ChaosServer(
            port=0,
            api_key=_KEY,
            faults=faults,
            seed=seed,
            latency=rng.choice([0.0, 0.002]),
            fault_latency=0.02,
            # Drawn apart, so that the rest of a seed's run stays as it is.
            stop_takes=random.Random(f"slow {seed}").choice([0.0, 0.0, 0.1, 0.5]),
        )
        self.targets = [self._target(rng, number) for number in range(targets)]
        self._before = {
            target: self.emulator.status(*target)
            for target in self.targets
            if isinstance(target, RuntimeRef)
        }
        poisoned = {target for target in self._before if rng.random() < _POISONED_SHARE}
        self._poisoned = frozenset(poisoned & self.emulator.runtimes.keys())
        for target in self._poisoned:
            self.emulator.poison(*target, rng.choice(_POISON))
        for index in range(1, targets):
            if rng.random() < _REPEATED_SHARE:
                self.targets[index] = self.targets[rng.randrange(index)]
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
        self._verify = rng.random() < 0.25
        # `verify` polls a runtime that stays active for this long.
        self._patience = (
            rng.uniform(1.5, 4.0) if self._verify else rng.uniform(0.2, 10.0)
        )
        self._policy = RetryPolicy(
            attempts=rng.randint(1, 4), base=0.001, cap=0.01, patience=self._patience
        )
        self._delivered: Counter[int] = Counter()
        self._batch: StopBatch | None = None
        self._runner: asyncio.Task[None] | None = None
        self._scope: anyio.CancelScope | None = None
        self._begun = _Begun() if self.ending in _SENDS_NOTHING_NEW else None
        self._begun_at_end: set[str] | None = None
        self._key = _KEY

    def _target(self, rng: random.Random, number: int) -> object:
        target = RuntimeRef(f"ws-{number % 7}", f"runtime {number}")
        draw = rng.random()
        if draw < 0.97:
            self.emulator.add_runtime(
                *target, status="stopped" if draw < 0.02 else "active"
            )
            if rng.random() < _ANSWERED_SHARE:
                workspace_id, alias = target
                answer = rng.choice(self._answers)
                self.emulator.inject(answer, workspace_id=workspace_id, alias=alias)
        # A first item of another type is an error of the whole input.
        is_target = number == 0 or draw < 0.99
        return target if is_target else rng.choice([None, ("ws", ""), "ab"])

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
                timeout=_TIMEOUT,
                retry=self._policy,
                observer=self._begun,
            ) as session,
        ):
            self._session = session
            batch = self._batch = session.stop_runtimes(
                self._make_input(),
                concurrency=self._concurrency,
                deadline=self._patience / 3 if self.ending is Ending.DEADLINE else None,
                on_outcome=lambda outcome: self._on_outcome(outcome.index),
                journal=self.journal,
                verify=self._verify and self._patience,
            )
            self._runner = asyncio.create_task(self._run_batch(batch))
            with suppress(_PlannedError, asyncio.CancelledError):
                await self._runner
            # A stop that was answered may still take effect.
            while self.emulator.ending:
                await asyncio.sleep(0.05)
            leaked = bulk_tasks()
            problems = [f"leaked tasks: {leaked}"] if leaked else []
        problems += self._check(batch.report)
        return Verdict(
            self.seed, self.ending, batch.report, len(self.emulator.requests), problems
        )

    async def _run_batch(self, batch: StopBatch) -> None:
        with anyio.CancelScope() as self._scope:
            await self._consume(batch)

    async def _consume(self, batch: StopBatch) -> None:
        if not self._streamed:
            await batch
            return
        async with batch:
            async for outcome in batch:
                if outcome.index % 1000 == 0:
                    await asyncio.sleep(0.001)
                if (
                    self.ending is Ending.LEFT_EARLY
                    and batch.counts.total() > self._end_after
                ):
                    break

    async def _on_outcome(self, index: int) -> None:
        self._delivered[index] += 1
        if len(self._delivered) != self._end_after + 1:
            return
        assert self._batch is not None
        assert self._runner is not None
        self._end(self._batch, self._runner)
        is_cancelled = self.ending in {Ending.CANCELLED, Ending.SCOPE_CANCELLED}
        self._mark_end(_CANCEL_ITERATIONS if is_cancelled else 0)
        match self.ending:
            case Ending.CALLBACK_RAISES:
                raise _PlannedError
            case Ending.SESSION_CLOSED:
                await self._session.close()

    def _mark_end(self, iterations: int) -> None:
        """Keep the targets sent so far, some turns of the loop after the end."""
        assert self._runner is not None
        # Anyio postpones the cancellation of a task that is about to run, again and
        # again.
        is_scope = self.ending is Ending.SCOPE_CANCELLED
        has_ended = (
            not is_scope or bool(self._runner.cancelling()) or self._runner.done()
        )
        if iterations or not has_ended:
            asyncio.get_running_loop().call_soon(self._mark_end, iterations - has_ended)
        else:
            self._begun_at_end = (
                set() if self._begun is None else set(self._begun.paths)
            )

    def _end(self, batch: StopBatch, runner: asyncio.Task[None]) -> None:
        match self.ending:
            case Ending.CANCELLED:
                runner.cancel()
            case Ending.SCOPE_CANCELLED if self._scope is not None:
                self._scope.cancel()
            case Ending.STOP_READING:
                batch.stop_reading()
            case Ending.ABORTED:
                batch.abort()
            case Ending.KEY_REVOKED:
                self._key = "another"
            case Ending.CONNECTIONS_RESET:
                for connection in self.emulator._server.connections:
                    if connection.transport is not None:
                        connection.transport.abort()
            case Ending.RETRY_AFTER_YEARS:
                self.emulator.inject(Reply(429, headers={"Retry-After": _YEARS}))

    def _check(self, report: StopReport) -> Iterator[str]:
        data = self.journal.read_bytes()
        try:
            journal = read_lines(data)
        except ValueError as error:
            yield f"the journal cannot be read: {error}"
            return
        entries = journal.entries
        yield from check_journal(journal, self.emulator.url)
        done = {
            outcome.target for outcome in read_journals([self.journal]) if outcome.ok
        }
        if done != done_targets(entries):
            yield "a resumed run would read another journal"
        yield from check_account(entries, report, self._delivered)
        yield from check_targets(
            entries,
            self.targets,
            self.emulator,
            self._before,
            self._poisoned,
        )
        if _KEY.encode() in data:
            yield "the key is in the journal"
        if self._is_list and report.total != len(self.targets):
            yield "the list was not read to its end"
        if self.ending in _DELIVERS_ALL and len(self._delivered) != report.total:
            yield "an outcome was not delivered"
        if self._begun is not None and self._begun_at_end is not None:
            begun = self._begun.paths - self._begun_at_end
            if begun:
                yield f"{len(begun)} targets were first sent after {self.ending}"


def run_seed(seed: int, targets: int) -> Verdict:
    """Run one seed in this process, with its own event loop and folder."""
    logging.getLogger("bctrl_async").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(ChaosRun(seed, targets, Path(folder)).run())


def _main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in {
        "seeds": 50,
        "first": 0,
        "targets": 10_000,
        "jobs": 4,
    }.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"default {default}"
        )
    parser.add_argument("--long-way", action="store_true", help=LONG_WAY_HELP)
    args = parser.parse_args()
    if args.long_way:
        take_long_way()
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
