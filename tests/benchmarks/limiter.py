"""The limiter in virtual time: behind a limit, throttled at random, and beside throttled targets.

`python tests/benchmarks/limiter.py [--seeds 24]`

Each case runs with many seeds against two simulated servers: the first decides when a request
starts, the second half a latency later.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median

import msgspec
import pytest
from harness import Report, command, measured

sys.path.append(str(Path(__file__).parents[1]))
import virtual_time
from simulated import ANSWER, Request, Simulation
from throttling import Fleet, Run, Server, throttled, token_bucket

from bctrl_async import BctrlError, BctrlSession, Runtime, StopOutcome

_RATE, _BURST = 200.0, 50
_AT_ONCE = 0.1
"""Seconds in which the bulk stops of several processes start."""


class _Figures(msgspec.Struct, frozen=True):
    to_ideal: float
    throttled: float
    """The share of the requests that were throttled, in per cent."""


_Case = Callable[[int, bool], _Figures]
"""Run a case with a seed; the server decides halfway or at once."""


def _bucket(retry_after: float | None = None) -> Server:
    return token_bucket(lambda _: _RATE, _BURST, retry_after)


def _together(processes: int, stops: int = 2000, retry_after: float | None = None) -> _Case:
    """Processes that share a bulk stop and start at once."""

    def run(seed: int, halfway: bool) -> _Figures:  # noqa: FBT001
        rng = random.Random(seed)
        starts = [rng.uniform(0.0, _AT_ONCE) for _ in range(processes)]
        fleet = Fleet(_bucket(retry_after), starts, seed, halfway=halfway)
        fleet.run(600.0, stops // processes)
        return _Figures(
            max(fleet.ended) / ((stops - _BURST) / _RATE),
            100 * fleet.throttled_share(0.0, math.inf),
        )

    return run


def _at_random(
    share: float, ideal: float, latency: float, otherwise: Callable[[], Server]
) -> _Case:
    """One process, of whose requests the server throttles a share by chance."""

    def run(seed: int, halfway: bool) -> _Figures:  # noqa: FBT001
        random.seed(seed)
        rng, chance, others = random.Random(seed), random.Random(f"{share} {seed}"), otherwise()

        def serve(now: float) -> BctrlError | None:
            return throttled() if chance.random() < share else others(now)

        run = Run(serve, lambda _: latency * rng.uniform(0.5, 1.5), halfway=halfway)
        virtual_time.run(run.bulk(10_000))
        return _Figures(run.seconds / ideal, 100 * run.throttled / run.requests)

    return run


def _stop(
    targets: list[tuple[str, str]], serve: Callable[[Request], Runtime | BctrlError]
) -> tuple[float, int]:
    """Stop targets; return when the last good one had its outcome, and the number of requests."""
    last = 0.0

    def on_outcome(outcome: StopOutcome) -> None:
        nonlocal last
        if not outcome.target.alias.startswith("bad"):
            last = asyncio.get_running_loop().time()

    async def main(session: BctrlSession) -> None:
        await session.stop_runtimes(targets, on_outcome=on_outcome, verify=False)

    with pytest.MonkeyPatch.context() as patch:
        simulation = Simulation(patch, serve, 0.02)
        simulation.run(main)
    return last, len(simulation.requests)


def _beside_throttled(bad: int, total: int) -> _Case:
    """A list whose first targets, of one workspace, are throttled for ever."""
    good = [("ws-1", f"r{number}") for number in range(total - bad)]
    worse = [("ws-bad", f"bad{number}") for number in range(bad)]

    def serve(each: Request) -> Runtime | BctrlError:
        return throttled() if each.alias.startswith("bad") else ANSWER

    def run(seed: int, halfway: bool) -> _Figures:  # noqa: ARG001, FBT001
        random.seed(seed)
        alone, _ = _stop(good, serve)
        last, requests = _stop(worse + good, serve)
        return _Figures(last / alone, 100 * (requests - len(good)) / requests)

    return run


def _quotas(workspaces: int, targets: int) -> _Case:
    """A list sorted by workspace, each with a quota of 5 a second and a burst of 10."""
    items = [(f"ws{n}", f"{n}-{m}") for n in range(workspaces) for m in range(targets)]

    def run(seed: int, halfway: bool) -> _Figures:  # noqa: ARG001, FBT001
        random.seed(seed)
        buckets = [token_bucket(lambda _: 5.0, 10) for _ in range(workspaces)]

        def serve(each: Request) -> Runtime | BctrlError:
            return buckets[int(each.alias.partition("-")[0])](each.at) or ANSWER

        seconds, requests = _stop(items, serve)
        ideal = (targets - 10) / 5.0
        return _Figures(seconds / ideal, 100 * (requests - len(items)) / requests)

    return run


_CASES: dict[str, _Case] = {
    "1 process": _together(1),
    "8": _together(8),
    "8, Retry-After 1": _together(8, retry_after=1.0),
    "random 6 %": _at_random(0.06, 3.0, 0.03, lambda: lambda _: None),
    "random 5 %, 200/s": _at_random(0.05, 49.75, 0.01, _bucket),
    "30 of 3,000 throttled": _beside_throttled(30, 3000),
    "300 of 3,000 throttled": _beside_throttled(300, 3000),
    "20 quotas, sorted": _quotas(20, 500),
}


def _child(name: str, seeds: str, server: str) -> list[_Figures]:
    logging.getLogger("bctrl_async").addHandler(logging.NullHandler())
    return [_CASES[name](seed, server == "halfway") for seed in range(int(seeds))]


def _compare(seeds: int) -> Report:
    tasks = list(product(_CASES, ("at once", "halfway")))

    def measure(task: tuple[str, str]) -> list[_Figures]:
        name, server = task
        return measured(name, seeds, server, kind=list[_Figures])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(measure, tasks))
    return Report(
        f"The limiter in virtual time: median and worst of {seeds} seeds",
        ["case", "server decides", "to ideal", "% throttled"],
        [
            [
                *task,
                _cell([each.to_ideal for each in figures], 2),
                _cell([each.throttled for each in figures], 1),
            ]
            for task, figures in zip(tasks, results, strict=True)
        ],
    )


def _cell(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({max(values):.{digits}f})"


if __name__ == "__main__":
    command(__doc__, _compare, _child, seeds=24)
