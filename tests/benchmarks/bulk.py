"""Memory, event loop stalls and CPU time of a bulk stop over a generator.

`python tests/benchmarks/bulk.py [--targets 1000000] [--rounds 3]`
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from statistics import median

import contenders
from harness import (
    Figures,
    Goal,
    Report,
    command,
    figures_of,
    in_rounds,
    measured,
    ratio,
    run,
    server,
)

from bctrl_async import BctrlSession

_FEW = 10_000
_IN_FLIGHT = 100
_MAX_GROWTH = 9.5  # MiB, just below 10 MB.


def _session(url: str) -> BctrlSession:
    return BctrlSession(contenders.KEY, base_url=url, max_connections=_IN_FLIGHT)


async def _bare(url: str, targets: int) -> int:
    async with contenders.bare(url) as stop:
        return await contenders.stop_all(stop, targets, _IN_FLIGHT)


async def _awaited(url: str, targets: int) -> int:
    async with _session(url) as session:
        report = await session.stop_runtimes(contenders.pairs(targets))
    return report.total - len(report.failures)


async def _iterated(url: str, targets: int) -> int:
    async with (
        _session(url) as session,
        session.stop_runtimes(contenders.pairs(targets)) as batch,
    ):
        # A list of the outcomes would take memory.
        stopped = 0
        async for outcome in batch:
            stopped += outcome.ok
    return stopped


_CASES: dict[str, Callable[[str, int], Coroutine[None, None, int]]] = {
    "bare aiohttp + msgspec, workers": _bare,
    "stop_runtimes, awaited": _awaited,
    "stop_runtimes, iterated": _iterated,
}
_BASE, _AWAITED, _ITERATED = _CASES
_LIMITS = {_AWAITED: (0.75, 15.0), _ITERATED: (0.80, 20.0)}
"""The highest CPU time per stop, relative to bare workers, and longest stall in ms."""


def _child(name: str, url: str, targets: str) -> Figures:
    return run(figures_of(_CASES[name](url, int(targets)), int(targets)))


def _compare(targets: int, rounds: int) -> Report:
    with server() as url:
        measurements = in_rounds(
            [(name, size) for size in (_FEW, targets) for name in _CASES],
            rounds,
            lambda case: measured(case[0], url, case[1], kind=Figures),
        )

    def column(name: str, size: int, field: str) -> list[float]:
        return [getattr(figures, field) for figures in measurements[name, size]]

    def middle(name: str, size: int, field: str) -> float:
        return median(column(name, size, field))

    def cpu_to_bare(name: str, size: int) -> float:
        return ratio(column(name, size, "cpu"), column(_BASE, size, "cpu"))

    def growth(name: str) -> float:
        return middle(name, targets, "mebibytes") - middle(name, _FEW, "mebibytes")

    return Report(
        f"A bulk stop over a generator, {_IN_FLIGHT} in flight, in fresh processes",
        ["case", "targets", "peak MiB", "stall ms", "s", "CPU µs", "to bare"],
        [
            [
                *case,
                *(
                    middle(*case, field)
                    for field in ("mebibytes", "stall", "seconds", "cpu")
                ),
                cpu_to_bare(*case),
            ]
            for case in measurements
        ],
        [
            goal
            for name, (cpu, stall) in _LIMITS.items()
            for goal in [
                Goal(
                    f"{name}: MiB more than for {_FEW:,} targets",
                    growth(name),
                    _MAX_GROWTH,
                ),
                Goal(
                    f"{name}: longest loop stall in ms",
                    middle(name, targets, "stall"),
                    stall,
                ),
                Goal(f"{name}: CPU per stop to bare", cpu_to_bare(name, targets), cpu),
            ]
        ],
        [f"{_BASE}: {growth(_BASE):.2f} MiB more than for {_FEW:,} targets."],
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, targets=1_000_000, rounds=3)
