"""The limiter in virtual time: behind limits, alone and with others, and what its start costs.

`python tests/benchmarks/limiter.py [--seeds 24] [--cases 8,16] [--before FOLDER] [--json]`

Each case runs with many seeds against two simulated servers: the first decides when a request
starts, the second half a latency later. `--before` also measures the package in another folder.
"""

from __future__ import annotations

import logging
import math
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import msgspec
from harness import Report, command, measured

sys.path.append(str(Path(__file__).parents[1]))
import virtual_time
from throttling import Fleet, Run, Server, fixed_window, throttled, token_bucket

from bctrl_async import BctrlError

_RATE, _BURST = 200.0, 50
_AT_ONCE = 0.1
"""Seconds in which the bulk stops of several processes start."""


class _Figures(msgspec.Struct, frozen=True):
    """The figures of one run; None where a case has none."""

    to_ideal: float
    refused: float
    """The share of the requests that were refused, in per cent."""
    jain: float | None = None
    extra: float | None = None
    """Seconds more than without a limiter."""


_Case = Callable[[int, bool], _Figures]
"""Run a case with a seed; the server decides halfway or at once."""


def _bucket(retry_after: float | None = None) -> Server:
    return token_bucket(lambda _: _RATE, _BURST, retry_after)


def _at_random(share: float, seed: int, otherwise: Server = lambda _: None) -> Server:
    rng = random.Random(f"{share} {seed}")

    def serve(now: float) -> BctrlError | None:
        return throttled() if rng.random() < share else otherwise(now)

    return serve


def _together(
    processes: int,
    stops: int = 2000,
    latencies: tuple[float, float] = (0.005, 0.015),
    retry_after: float | None = None,
) -> _Case:
    """Processes that share a bulk stop and start at once."""

    def run(seed: int, halfway: bool) -> _Figures:  # noqa: FBT001
        rng = random.Random(seed)
        starts = [rng.uniform(0.0, _AT_ONCE) for _ in range(processes)]
        fleet = Fleet(_bucket(retry_after), starts, seed, latencies, halfway)
        fleet.run(600.0, stops // processes)
        return _Figures(
            max(fleet.ended) / ((stops - _BURST) / _RATE),
            100 * fleet.throttled_share(0.0, math.inf),
            fleet.fairness(0.0, min(fleet.ended)),
        )

    return run


def _long(processes: int) -> _Case:
    """Processes that are busy for a minute, from second 20 to 60; ideal is the whole limit."""

    def run(seed: int, halfway: bool) -> _Figures:  # noqa: FBT001
        rng = random.Random(seed)
        starts = [rng.uniform(0.0, 1.0) for _ in range(processes)]
        fleet = Fleet(_bucket(), starts, seed, halfway=halfway)
        fleet.run(60.0)
        return _Figures(
            _RATE / sum(fleet.rates(20.0, 60.0)),
            100 * fleet.throttled_share(20.0, 60.0),
            fleet.fairness(20.0, 60.0),
        )

    return run


def _alone(
    server: Callable[[int], Server],
    stops: int,
    ideal: float,
    latency: float = 0.01,
    server_limit: float = math.inf,
    *,
    gather: bool = False,
) -> _Case:
    def run(seed: int, halfway: bool) -> _Figures:  # noqa: FBT001
        random.seed(seed)
        rng = random.Random(seed)
        run = Run(
            server(seed),
            lambda _: latency * rng.uniform(0.5, 1.5),
            server_limit=server_limit,
            halfway=halfway,
        )
        virtual_time.run(run.gather(stops) if gather else run.bulk(stops))
        return _Figures(
            run.seconds / ideal,
            100 * run.throttled / run.requests,
        )

    return run


def _unlimited(stops: int, latency: float) -> _Case:
    """Stops that nothing throttles; without a limiter a slot is never empty."""

    def run(seed: int, halfway: bool) -> _Figures:  # noqa: FBT001
        rng = random.Random(seed)
        run = Run(lambda _: None, lambda _: latency * rng.uniform(0.9, 1.1), halfway=halfway)
        virtual_time.run(run.gather(stops))
        slots = [0.0] * min(run.limit, stops)
        rng = random.Random(seed)
        for _ in range(stops):
            first = slots.index(min(slots))
            slots[first] += latency * rng.uniform(0.9, 1.1)
        return _Figures(run.seconds / max(slots), 0.0, extra=run.seconds - max(slots))

    return run


_SECOND = (2000 - _BURST) / _RATE
_CASES: dict[str, _Case] = {
    "1 process": _together(1),
    "1, Retry-After 1": _together(1, retry_after=1.0),
    "1, 100 ms": _together(1, latencies=(0.05, 0.15)),
    "2": _together(2),
    "4": _together(4),
    "8": _together(8),
    "8, Retry-After 1": _together(8, retry_after=1.0),
    "8, 100 ms": _together(8, latencies=(0.05, 0.15)),
    "16": _together(16),
    "16, 100 ms": _together(16, latencies=(0.05, 0.15)),
    "long: 2": _long(2),
    "long: 8": _long(8),
    "long: 16": _long(16),
    "random 2 %": _alone(lambda seed: _at_random(0.02, seed), 10_000, 3.0, 0.03),
    "random 6 %": _alone(lambda seed: _at_random(0.06, seed), 10_000, 3.0, 0.03),
    "random 30 %": _alone(lambda seed: _at_random(0.3, seed), 10_000, 3.0, 0.03),
    "random 5 %, 200/s": _alone(lambda seed: _at_random(0.05, seed, _bucket()), 10_000, 49.75),
    "window": _alone(lambda _: fixed_window(200), 4000, 20.0),
    "window, Retry-After 1": _alone(lambda _: fixed_window(200, 1.0), 4000, 20.0),
    "20 in flight": _alone(lambda _: lambda _: None, 4000, 20.0, 0.1, 20),
    "10 in flight, 1 s": _alone(lambda _: lambda _: None, 1000, 100.0, 1.0, 10),
    "no limit: 100, 10 ms": _unlimited(100, 0.01),
    "no limit: 100, 50 ms": _unlimited(100, 0.05),
    "no limit: 100, 200 ms": _unlimited(100, 0.2),
    "no limit: 100, 1 s": _unlimited(100, 1.0),
    "no limit: 10,000, 10 ms": _unlimited(10_000, 0.01),
    "no limit: 10,000, 200 ms": _unlimited(10_000, 0.2),
}


def _child(name: str, seeds: str, halfway: str) -> list[_Figures]:
    logging.getLogger("bctrl_async").addHandler(logging.NullHandler())
    return [_CASES[name](seed, halfway == "halfway") for seed in range(int(seeds))]


def _compare(seeds: int, cases: str, before: str) -> Report:
    names = [name for name in _CASES if not cases or name in cases.split("; ")]
    trees = {"before": {"PYTHONPATH": before}} if before else {}
    trees["now"] = {}
    tasks = [
        (name, server, tree)
        for name in names
        for server in ("at once", "halfway")
        for tree in trees
    ]

    def measure(task: tuple[str, str, str]) -> list[_Figures]:
        name, server, tree = task
        few = str(min(seeds, 3) if name.startswith("no limit") else seeds)
        arguments = ("--measure", name, few, server)
        return measured(__file__, *arguments, kind=list[_Figures], environment=trees[tree])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(measure, tasks))
    return Report(
        f"The limiter in virtual time: median and worst of {seeds} seeds",
        ["case", "server decides", "limiter", "to ideal", "% refused", "Jain", "extra s"],
        [
            [
                *task,
                _cell([each.to_ideal for each in figures]),
                _cell([each.refused for each in figures], 1),
                _cell([each.jain for each in figures], worst=min),
                _cell([each.extra for each in figures]),
            ]
            for task, figures in zip(tasks, results, strict=True)
        ],
        [],
    )


def _cell(
    values: list[float | None], digits: int = 2, worst: Callable[[list[float]], float] = max
) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{median(known):.{digits}f} ({worst(known):.{digits}f})"


if __name__ == "__main__":
    command(__doc__, _compare, _child, seeds=24, cases="", before="")
