"""The limiter in virtual time: behind limits, and beside throttled targets.

`python tests/benchmarks/limiter.py [--seeds 24] [--only PATTERN,PATTERN]`

Each row runs with many seeds, from 0; a row of the limiter alone runs on two servers,
of which one decides when a request starts and the other half a latency later. `--only`
chooses rows by patterns, such as "random*,20 quotas*".
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median

import pytest
from harness import Report, Row, command, measured

sys.path.append(str(Path(__file__).parents[1]))
from support import simulated, virtual_time
from support.simulated import (
    ANSWER,
    Request,
    Simulation,
    targets_in,
    unavailable,
    with_quotas,
)
from support.throttling import Fleet, Run, Server, fixed_window, throttled, token_bucket

from bctrl_async import BctrlError, BctrlSession

_Figures = dict[str, float]
_Case = Callable[[int], list[_Figures]]
"""Run a row with a seed."""
_MakeServer = Callable[[int], Server]
"""Make a server from a seed."""

_WORST_IS_LEAST = {"fairness"}
_THROTTLED = "throttled"
"""A workspace whose targets are throttled for ever."""


# Servers


def _bucket(
    rate: float = 200.0, burst: float = 50, retry_after: float | None = None
) -> Server:
    return token_bucket(lambda _: rate, burst, retry_after)


def _noisy(share: float, seed: int, otherwise: Server | None = None) -> Server:
    """Make a server that throttles a share of the requests at random."""
    chance = random.Random(f"{share} {seed}")

    def serve(now: float) -> BctrlError | None:
        if chance.random() < share:
            return throttled()
        return otherwise(now) if otherwise else None

    return serve


# The limiter alone


def _one(
    seed: int, make: _MakeServer, count: int, ideal: float, latency: float
) -> list[_Figures]:
    """Run a bulk stop of one process on both servers; `ideal` is in seconds."""
    figures = []
    for halfway in (False, True):
        random.seed(seed)
        rng = random.Random(seed)
        run = Run(make(seed), partial(_random_latency, rng, latency), halfway=halfway)
        virtual_time.run(run.bulk(count))
        throttled_share = run.throttled / run.requests
        figures.append(
            {"to ideal": run.seconds / ideal, "% throttled": 100 * throttled_share}
        )
    return figures


def _random_latency(rng: random.Random, latency: float, _in_flight: int = 0) -> float:
    return latency * rng.uniform(0.5, 1.5)


def _together(seed: int, count: int) -> list[_Figures]:
    """Share 2,000 stops among processes."""
    rng = random.Random(seed + 1000)
    starts = [rng.uniform(0.0, 1.0) for _ in range(count)]
    fleets = [
        Fleet(_bucket(), starts, seed, halfway=halfway) for halfway in (False, True)
    ]
    return [_run_together(fleet, 2000 // count) for fleet in fleets]


def _run_together(fleet: Fleet, stops: int) -> _Figures:
    fleet.run(600.0, stops)
    durations = [
        end - start for end, start in zip(fleet.ended, fleet.starts, strict=True)
    ]
    squares = sum(seconds**-2 for seconds in durations)
    return {
        "to ideal": max(durations) / ((2000 - 50) / 200),
        "% throttled": 100 * fleet.throttled_share(0.0, math.inf),
        "fairness": sum(1 / seconds for seconds in durations) ** 2
        / (len(durations) * squares),
    }


# Whole sessions


@contextmanager
def _simulated(
    seed: int, server: simulated.Server, latency: float = 0.02
) -> Iterator[Simulation]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        simulation = Simulation(monkeypatch, server, 0.0)
        rng = random.Random(seed)
        simulation.before_response = lambda _: asyncio.sleep(
            _random_latency(rng, latency)
        )
        random.seed(seed)
        yield simulation


def _stop(
    seed: int,
    targets: list[tuple[str, str]],
    server: simulated.Server,
    *,
    latency: float = 0.02,
    max_connections: int = 100,
) -> Simulation:
    with _simulated(seed, server, latency) as simulation:
        simulation.stop(targets, deadline=3600.0, max_connections=max_connections)
    return simulation


def _healthy(seed: int, tenants: int, every: float, healthy: float) -> list[_Figures]:
    """Make calls for 15 minutes, in a healthy workspace and in throttled tenants.

    Each tenant makes a call in `every` seconds, and the healthy one in `healthy`.
    """
    chance = random.Random(seed)
    calls: list[tuple[float, str]] = []
    for name, mean in (("healthy", healthy), (_THROTTLED, every / tenants)):
        at = 0.0
        while (at := at + chance.expovariate(1.0 / mean)) < 900.0:
            number = chance.randrange(tenants)
            calls.append((at, name if name == "healthy" else f"{name}-{number}"))

    def serve(request: Request) -> simulated.Answer:
        return ANSWER if request.workspace == "healthy" else throttled()

    async def call(session: BctrlSession, at: float, name: str) -> float:
        await asyncio.sleep(at)
        with suppress(BctrlError):
            await session.stop_runtime(name, f"at {at}")
        return virtual_time.now() - at if name == "healthy" else math.nan

    async def main(session: BctrlSession) -> list[float]:
        return await asyncio.gather(*(call(session, *each) for each in calls))

    with _simulated(seed, serve) as simulation:
        seconds = simulation.run(main)
    waits = sorted(wait for wait in seconds if not math.isnan(wait))
    return [{"median s": median(waits), "99 % s": waits[int(0.99 * len(waits))]}]


def _refused_once() -> simulated.Server:
    """Make a server that refuses the first request of each workspace."""
    known: set[str] = set()

    def serve(request: Request) -> simulated.Answer:
        if request.workspace in known:
            return ANSWER
        known.add(request.workspace)
        return throttled()

    return serve


def _beside(seed: int, count: int, total: int) -> list[_Figures]:
    """Stop targets of which the first are throttled; `to none` is relative to none."""
    bad, good = targets_in(_THROTTLED, count), targets_in("good", total - count)

    def serve(request: Request) -> simulated.Answer:
        return throttled() if request.workspace == _THROTTLED else ANSWER

    seconds, alone = (
        max(simulation.ended_at[alias] for _, alias in good)
        for simulation in (
            _stop(seed, targets, serve) for targets in (bad + good, good)
        )
    )
    return [{"last s": seconds, "to none": seconds / alone}]


def _dead(seed: int, count: int) -> list[_Figures]:
    """Stop 500 targets, of which some are dead behind a gateway's 503."""
    targets = targets_in("ws", 500)
    dead = set(random.Random(seed).sample(targets, count))

    def serve(request: Request) -> simulated.Answer:
        is_dead = (request.workspace, request.alias) in dead
        return unavailable() if is_dead and request.stops else ANSWER

    ended_at = _stop(seed, targets, serve, latency=0.1).ended_at
    return [
        {"last s": max(ended_at[target[1]] for target in targets if target not in dead)}
    ]


def _workspaces(
    seed: int,
    count: int,
    size: int,
    make_server: Callable[[], simulated.Server],
    ideal: float,
    *,
    is_shuffled: bool,
    latency: float = 0.02,
    max_connections: int = 100,
) -> list[_Figures]:
    """Stop the targets of several workspaces; `ideal` is in seconds."""
    targets = [
        target for number in range(count) for target in targets_in(f"ws{number}", size)
    ]
    if is_shuffled:
        random.Random(seed).shuffle(targets)
    simulation = _stop(
        seed, targets, make_server(), latency=latency, max_connections=max_connections
    )
    throttled_share = 1.0 - len(targets) / len(simulation.requests)
    return [
        {"to ideal": simulation.seconds / ideal, "% throttled": 100 * throttled_share}
    ]


def _limited(rate: float, burst: float) -> simulated.Server:
    serve = _bucket(rate, burst)
    return lambda request: serve(request.at) or ANSWER


def _windowed(limit: int, seconds: float) -> simulated.Server:
    serve = fixed_window(limit, seconds)
    return lambda request: serve(request.at) or ANSWER


# The rows


def _rows() -> dict[str, _Case]:
    one = partial(_one, count=2000, ideal=9.75, latency=0.01)
    rows: dict[str, _Case] = {
        "one": partial(one, make=lambda _: _bucket()),
        "one, RA 1": partial(one, make=lambda _: _bucket(retry_after=1.0)),
        "2/s": partial(one, make=lambda _: _bucket(2.0, 1), count=60, ideal=30.0),
        "fixed window of 100": partial(
            one, make=lambda _: fixed_window(100), ideal=19.0
        ),
        "900 in 60 s": partial(
            one, make=lambda _: fixed_window(900, 60.0), count=4500, ideal=240.0
        ),
        "8": partial(_together, count=8),
        "16": partial(_together, count=16),
        "30 of 3000 first": partial(_beside, count=30, total=3000),
        "100 of 500 dead": partial(_dead, count=100),
    }
    for percent in (1, 5, 6, 15):
        noisy = partial(_noisy, percent / 100)
        rows[f"random {percent} %"] = partial(
            one, make=noisy, count=3000, ideal=1.0, latency=0.02
        )
    for percent in (2, 5, 10):
        rows[f"random {percent} %, 200/s"] = partial(
            one, make=_beside_limit(percent / 100), count=4000, ideal=19.75
        )
    for order in ("sorted", "shuffled"):
        workspaces = partial(_workspaces, is_shuffled=order == "shuffled")
        rows[f"20 quotas, {order}"] = partial(
            workspaces,
            count=20,
            size=500,
            make_server=partial(with_quotas, 5.0, 10),
            ideal=98.0,
        )
        rows[f"limit of 5 workspaces, {order}"] = partial(
            workspaces,
            count=5,
            size=800,
            make_server=partial(_limited, 100.0, 20),
            ideal=39.8,
        )
    rows["400 workspaces refuse once"] = partial(
        _workspaces,
        count=400,
        size=3,
        make_server=_refused_once,
        ideal=10.0,
        is_shuffled=True,
    )
    for count in (1, 12):
        rows[f"20 in 60 s, {count} workspaces"] = partial(
            _workspaces,
            count=count,
            size=180 // count,
            make_server=partial(_windowed, 20, 60.0),
            ideal=480.0,
            is_shuffled=True,
            max_connections=20,
        )
    for tenants, every, healthy in ((10, 1.5, 2.0), (40, 8.0, 1.0), (150, 40.0, 1.0)):
        rows[f"healthy beside {tenants}"] = partial(
            _healthy, tenants=tenants, every=every, healthy=healthy
        )
    alone = partial(_workspaces, count=1, is_shuffled=False)
    for seconds in (1.0, 2.0, 4.0):
        rows[f"answers after {seconds:.0f} s"] = partial(
            alone,
            size=8000,
            make_server=partial(_limited, 200.0, 20),
            ideal=39.9,
            latency=seconds,
            max_connections=1200,
        )
    for multiple in (1.1, 1.2, 1.3):
        # The connections would allow this multiple of the limit.
        rows[f"speed {multiple}"] = partial(
            alone,
            size=6000,
            make_server=partial(_limited, 200.0, 50),
            ideal=(6000 - 50) / 200,
            latency=0.05,
            max_connections=round(10 * multiple),
        )
    return rows


def _beside_limit(share: float) -> _MakeServer:
    return lambda seed: _noisy(share, seed, _bucket())


_ROWS = _rows()


def _child(name: str, seeds: str) -> list[_Figures]:
    logging.getLogger("bctrl_async").addHandler(logging.NullHandler())
    return list(chain.from_iterable(_ROWS[name](seed) for seed in range(int(seeds))))


def _compare(seeds: int, only: str) -> Report:
    patterns = only.split(",") if only else ["*"]
    names = [
        name for name in _ROWS if any(fnmatch(name, pattern) for pattern in patterns)
    ]

    def measure(name: str) -> list[_Figures]:
        return measured(name, seeds, kind=list[_Figures])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(measure, names))
    rows = [_row(name, figures) for name, figures in zip(names, results, strict=True)]
    width = max(map(len, rows), default=1)
    return Report(
        f"The limiter in virtual time: median and worst of {seeds} seeds",
        ["row"] + [""] * (width - 1),
        [row + [""] * (width - len(row)) for row in rows],
    )


def _row(name: str, figures: list[_Figures]) -> Row:
    row: Row = [name]
    for figure in figures[0]:
        values = [run[figure] for run in figures]
        worst = min(values) if figure in _WORST_IS_LEAST else max(values)
        row.append(f"{figure} {median(values):.2f} ({worst:.2f})")
    return row


if __name__ == "__main__":
    command(__doc__, _compare, _child, seeds=24, only="")
