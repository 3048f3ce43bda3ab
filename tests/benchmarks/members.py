"""Processes that stop runtimes at once, alone or as members of a shared pace."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import msgspec
from contenders import WORKSPACE
from harness import measured_together, run, wait_for_start

from bctrl_async import BctrlSession, StopOutcome, StopResult
from bctrl_async.pace import FilePace, Pace
from bctrl_async.pace._leases import Lease, Store
from bctrl_async.redis import RedisPace

_KEY = "emulator-key"
_SINGLE_EVERY = 0.05
SINGLES_FROM = 1.0
"""Seconds after the start at which single stops begin: bulk stops are in full swing."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """The work of one process.

    Args:
        url: The URL of the server.
        targets: The number of targets of its bulk stop; 0 for none.
        first: The number of the first.
        rate: The rate of its session alone, or of the pace.
        store: The path or URL of a shared pace.
        singles_for: Seconds for which it also makes a single stop every 50 ms.
    """

    url: str
    targets: int
    first: int = 0
    rate: float | None = None
    store: str | None = None
    singles_for: float = 0.0


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one process.

    Attributes:
        stopped_at: Seconds after the start at which each target was stopped.
        seconds: Seconds from the start to the end of its bulk stop.
        results: The number of targets by result.
        cpu: Seconds of CPU time of its bulk stop, all threads.
        leases: The latency of each call of the store.
        singles: The latency of each single stop.
        warnings: The warnings that the pace logged.
    """

    stopped_at: list[float]
    seconds: float
    results: dict[str, int]
    cpu: float
    leases: list[float]
    singles: list[float]
    warnings: list[str]


class _TimedPace(Pace):
    """A pace that records the latency of each lease."""

    def __init__(self, pace: Pace, latencies: list[float]) -> None:
        super().__init__(rate=pace.rate)
        self._pace = pace
        self._latencies = latencies

    def open(self) -> Store:
        return _TimedStore(self._pace.open(), self._latencies)


class _TimedStore:
    def __init__(self, store: Store, latencies: list[float]) -> None:
        self._store = store
        self._latencies = latencies

    async def lease(self, member: str, slots: int, since: float) -> Lease:
        began = time.perf_counter()
        lease = await self._store.lease(member, slots, since)
        self._latencies.append(time.perf_counter() - began)
        return lease

    async def close(self) -> None:
        await self._store.close()


def _session(task: Task, latencies: list[float]) -> BctrlSession:
    if task.store is None:
        return BctrlSession(_KEY, base_url=task.url, rate=task.rate)
    assert task.rate is not None
    kind = RedisPace if "://" in task.store else FilePace
    pace = _TimedPace(kind(task.store, rate=task.rate), latencies)
    return BctrlSession(_KEY, base_url=task.url, pace=pace)


async def _stop_one(session: BctrlSession, alias: str, latencies: list[float]) -> None:
    began = time.perf_counter()
    await session.stop_runtime(WORKSPACE, alias)
    latencies.append(time.perf_counter() - began)


async def _stop_singles(session: BctrlSession, seconds: float, latencies: list[float]) -> None:
    """Make a single stop every 50 ms, whether or not the last has ended."""
    loop = asyncio.get_running_loop()
    began = loop.time() + SINGLES_FROM
    async with asyncio.TaskGroup() as group:
        for number in range(int(seconds / _SINGLE_EVERY)):
            await asyncio.sleep(max(began + number * _SINGLE_EVERY - loop.time(), 0.0))
            group.create_task(_stop_one(session, f"single-{number}", latencies))


async def _work(task: Task) -> Figures:
    leases: list[float] = []
    singles: list[float] = []
    stopped_at: list[float] = []
    results: Counter[str] = Counter()
    targets = [(WORKSPACE, f"crm-{task.first + number}") for number in range(task.targets)]
    async with _session(task, leases) as session, asyncio.TaskGroup() as group:
        start = wait_for_start()
        cpu = time.process_time()

        def record(outcome: StopOutcome) -> None:
            results[outcome.result] += 1
            if outcome.result is StopResult.STOPPED:
                stopped_at.append(time.monotonic() - start)

        if task.singles_for:
            group.create_task(_stop_singles(session, task.singles_for, singles))
        await session.stop_runtimes(targets, on_outcome=record)
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    return Figures(
        stopped_at=stopped_at,
        seconds=seconds,
        results=results,
        cpu=cpu,
        leases=leases,
        singles=singles,
        warnings=_warnings.messages,
    )


class _Warnings(logging.Handler):
    """A handler that collects messages."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


_warnings = _Warnings()


def work(task: str) -> Figures:
    """Do the work of a process that `members` started."""
    logging.getLogger("bctrl_async.pace").addHandler(_warnings)
    # The warnings of eight processes would hide the table.
    logging.getLogger("bctrl_async").addHandler(logging.NullHandler())
    return run(_work(msgspec.json.decode(task, type=Task)))


def members(tasks: list[Task], meanwhile: Callable[[float], None] | None = None) -> list[Figures]:
    """Run a process for each task; they begin at once."""
    program = Path(sys.argv[0]).resolve()
    commands = [(program, "--measure", msgspec.json.encode(task).decode()) for task in tasks]
    return measured_together(commands, kind=Figures, meanwhile=meanwhile)


def jain(team: list[Figures]) -> float:
    """Return Jain's fairness of the processes' throughput while all of them are busy.

    Their throughput is the number of runtimes that each has stopped when the first has ended.
    """
    end = min(figures.seconds for figures in team)
    shares = [sum(at <= end for at in figures.stopped_at) for figures in team]
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0


def longest_gap(team: list[Figures]) -> float:
    """Return the longest time in which no runtime was stopped, in seconds."""
    times = sorted(at for figures in team for at in figures.stopped_at)
    return max(later - before for before, later in zip([0.0, *times], times, strict=False))


def percentiles(latencies: list[float]) -> tuple[float, float, float]:
    """Return the median, the 99th percentile and the maximum in milliseconds."""
    p99 = quantiles(latencies, n=100, method="inclusive")[98]
    return median(latencies) * 1000, p99 * 1000, max(latencies) * 1000
