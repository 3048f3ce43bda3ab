"""Memory, event loop stalls, CPU time and throughput of a bulk stop over a generator.

`python tests/benchmarks/bulk.py [--targets 1000000] [--latency-targets 5000] [--rounds 3] [--json]`
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Generator
from statistics import median

import contenders
import msgspec
from harness import TICK, Goal, Report, StallWatch, command, measured, ratio, run, server

from bctrl_async import BctrlSession

_FEW = 10_000
_IN_FLIGHT = 100
_DELAY = 0.2
_MAX_GROWTH = 9.5  # MiB, just below 10 MB.


class _Figures(msgspec.Struct, frozen=True):
    peak: float
    stall: float
    busy: float
    cpu: float
    elapsed: float


def _aliases(targets: int) -> Generator[str]:
    return (f"crm-{number}" for number in range(targets))


def _pairs(targets: int) -> Generator[tuple[str, str]]:
    return ((contenders.WORKSPACE, alias) for alias in _aliases(targets))


async def _bare(url: str, targets: int) -> int:
    aliases = _aliases(targets)
    stopped = 0
    async with contenders.bare(url) as stop:

        async def work() -> None:
            nonlocal stopped
            for alias in aliases:
                await stop(alias)
                stopped += 1

        await asyncio.gather(*(work() for _ in range(_IN_FLIGHT)))
    return stopped


async def _awaited(url: str, targets: int) -> int:
    async with BctrlSession(contenders.KEY, base_url=url, max_connections=_IN_FLIGHT) as session:
        report = await session.stop_runtimes(_pairs(targets))
    return report.total - len(report.failures)


async def _iterated(url: str, targets: int) -> int:
    stopped = 0
    async with (
        BctrlSession(contenders.KEY, base_url=url, max_connections=_IN_FLIGHT) as session,
        session.stop_runtimes(_pairs(targets)) as batch,
    ):
        async for outcome in batch:
            stopped += outcome.ok
    return stopped


_CASES: dict[str, Callable[[str, int], Awaitable[int]]] = {
    "bare aiohttp + msgspec, workers": _bare,
    "stop_runtimes, awaited": _awaited,
    "stop_runtimes, iterated": _iterated,
}
_BASE, _AWAITED, _ITERATED = _CASES
_LIMITS = {_AWAITED: (0.75, 15.0), _ITERATED: (0.80, 20.0)}
"""The highest CPU time per stop, relative to bare workers, and the longest stall in ms."""


async def _measure(name: str, url: str, targets: int) -> _Figures:
    watch = StallWatch()
    start, cpu_start = time.perf_counter(), time.process_time()
    stopped = await _CASES[name](url, targets)
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    await asyncio.sleep(2 * TICK)
    if stopped != targets:
        raise SystemExit(f"{name}: stopped only {stopped} of {targets}")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return _Figures(peak, watch.longest, watch.busiest, cpu, elapsed)


def _child(name: str, url: str, targets: str) -> _Figures:
    return run(_measure(name, url, int(targets)))


_Case = tuple[str, int, float]
"""A case, the number of targets, and the latency of the server in seconds."""


def _compare(targets: int, latency_targets: int, rounds: int) -> Report:
    sizes = [(_FEW, 0.0), (targets, 0.0), (latency_targets, _DELAY)]
    runs = [(name, size, delay) for size, delay in sizes for name in _CASES]
    measurements: dict[_Case, list[_Figures]] = {case: [] for case in runs}
    with server() as fast, server(_DELAY) as slow:
        for _ in range(rounds):
            for case in runs:
                name, size, delay = case
                task = ("--measure", name, slow if delay else fast, str(size))
                measurements[case].append(measured(__file__, *task, kind=_Figures))
            # In alternating order, so that a trend in the machine's load affects all alike.
            runs.reverse()

    def column(case: _Case, field: str) -> list[float]:
        return [getattr(figures, field) for figures in measurements[case]]

    def cpu_to_bare(case: _Case) -> float:
        return ratio(column(case, "cpu"), column((_BASE, *case[1:]), "cpu"))

    def growth(name: str) -> float:
        few, many = (column((name, size, 0.0), "peak") for size in (_FEW, targets))
        return median(more - less for more, less in zip(many, few, strict=True))

    def to_ideal(case: _Case) -> float:
        return median(column(case, "elapsed")) / (latency_targets / _IN_FLIGHT * _DELAY)

    return Report(
        f"A bulk stop over a generator, {_IN_FLIGHT} in flight, each in a fresh process",
        [
            "case",
            "targets",
            "latency ms",
            "peak MiB",
            "stall ms",
            "CPU stall ms",
            "s",
            "CPU µs",
            "to bare",
        ],
        [
            [
                case[0],
                case[1],
                case[2] * 1000,
                median(column(case, "peak")),
                median(column(case, "stall")) * 1000,
                median(column(case, "busy")) * 1000,
                median(column(case, "elapsed")),
                median(column(case, "cpu")) / case[1] * 1e6,
                cpu_to_bare(case),
            ]
            for case in measurements
        ],
        [
            goal
            for name, (cpu, stall) in _LIMITS.items()
            for many in [(name, targets, 0.0)]
            for goal in [
                Goal(f"{name}: MiB more than for {_FEW:,} targets", growth(name), _MAX_GROWTH),
                Goal(
                    f"{name}: longest loop stall in ms",
                    median(column(many, "stall")) * 1000,
                    stall,
                ),
                Goal(f"{name}: CPU per stop to bare", cpu_to_bare(many), cpu),
                Goal(
                    f"{name}: time to ideal",
                    to_ideal((name, latency_targets, _DELAY)),
                    1.05,
                ),
            ]
        ],
        [
            f"{_BASE}: {growth(_BASE):.2f} MiB more than for {_FEW:,} targets.",
            f"{_BASE}: {to_ideal((_BASE, latency_targets, _DELAY)):.2f} times the ideal time.",
        ],
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, targets=1_000_000, latency_targets=5_000, rounds=3)
