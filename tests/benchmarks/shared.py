"""Several processes behind one rate limit: nothing shared, or a pace in each store.

`python tests/benchmarks/shared.py [--store file,redis,valkey] [--processes 1,2,4,8]`

They stop 2,000 targets through an nginx that accepts 200 requests a second.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Generator
from contextlib import AsyncExitStack, contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import contenders
import msgspec
from harness import (
    Goal,
    Report,
    Row,
    command,
    measured_together,
    run,
    server,
    wait_for_start,
)

sys.path.append(str(Path(__file__).parents[1]))
from redis.asyncio import Redis
from support.nginx_server import BURST, RATE, nginx
from support.redis_server import redis_server

from bctrl_async import BctrlSession, StopResult
from bctrl_async.pace import FilePace, Pace
from bctrl_async.redis import RedisPace

_TARGETS = 2_000
_SHARED_RATE = 195.0
"""Slightly below the limit."""
_PROGRAMS = {"redis": "redis-server", "valkey": "valkey-server"}
_NOTHING, _FIXED = "nothing", "a fixed share each"
_MAX_TO_IDEAL = 1.10
_MAX_THROTTLED = 0.5


class _Figures(msgspec.Struct, frozen=True):
    """The figures of one process: its seconds, and how many it stopped."""

    seconds: float
    stopped: int


@contextmanager
def _store(name: str) -> Generator[str]:
    """Run the store of a pace, and yield its path or URL; the empty text for none."""
    if name in _PROGRAMS:
        if shutil.which(_PROGRAMS[name]) is None:
            sys.exit(f"{_PROGRAMS[name]} is not installed")
        with redis_server(_PROGRAMS[name]) as running:
            yield running.url
    else:
        with TemporaryDirectory() as folder:
            yield f"{folder}/pace" if name == "file" else ""


async def _work(
    url: str, rate: float | None, store: str, first: int, targets: int
) -> _Figures:
    aliases = [f"crm-{number}" for number in range(first, first + targets)]
    async with AsyncExitStack() as stack:
        shared: float | Pace | None = rate
        if rate and "://" in store:
            client = await stack.enter_async_context(Redis.from_url(store))
            shared = RedisPace(client, rate=rate)
        elif rate and store:
            shared = FilePace(store, rate=rate)
        session = BctrlSession("emulator-key", base_url=url, rate=shared)
        await stack.enter_async_context(session)
        start = wait_for_start()
        report = await session.stop_runtimes(
            [(contenders.WORKSPACE, alias) for alias in aliases]
        )
        return _Figures(time.monotonic() - start, report.counts[StopResult.STOPPED])


def _child(url: str, rate: str, store: str, first: str, targets: str) -> _Figures:
    # The warnings of eight processes would hide the table.
    logging.getLogger("bctrl_async").addHandler(logging.NullHandler())
    return run(_work(url, float(rate) or None, store, int(first), int(targets)))


def _race(case: str, processes: int, api: str) -> tuple[list[_Figures], float]:
    """Return the figures of each process, and the share of requests answered 429."""
    share, rate = _TARGETS // processes, _SHARED_RATE
    if case in {_NOTHING, _FIXED}:
        rate = 0.0 if case == _NOTHING else rate / processes
    with nginx(api) as limited, _store(case) as store:
        tasks = [
            (limited.url, rate, store, number * share, share)
            for number in range(processes)
        ]
        team = measured_together(tasks, _Figures)
    return team, limited.throttled_share


def _compare(store: str, processes: str) -> Report:
    ideal = (_TARGETS - BURST) / RATE
    stores = store.split(",")
    rows: list[Row] = []
    goals = []
    with server() as api:
        for case, count in product(
            [_NOTHING, _FIXED, *stores], map(int, processes.split(","))
        ):
            team, throttled = _race(case, count, api)
            seconds = [figures.seconds for figures in team]
            to_ideal = max(seconds) / ideal
            missing = _TARGETS - sum(figures.stopped for figures in team)
            span = f"{min(seconds):.2f}..{max(seconds):.2f}"
            rows.append([case, count, to_ideal, 100 * throttled, span, missing])
            if case in stores:
                name = f"{case}, {count} processes"
                goals += [
                    Goal(f"{name}: time to ideal", to_ideal, _MAX_TO_IDEAL),
                    Goal(f"{name}: % answered 429", 100 * throttled, _MAX_THROTTLED),
                    Goal(f"{name}: not stopped", missing, 0),
                ]
    return Report(
        f"{_TARGETS:,} stops through nginx, limit_req {RATE} per second, burst "
        f"{BURST}, at a shared rate of {_SHARED_RATE:g}",
        ["shared", "processes", "to ideal", "% 429", "first..last s", "not stopped"],
        rows,
        goals,
        [f"Ideal: {_TARGETS - BURST:,} at {RATE} per second, {ideal:.2f} s."],
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, store="file,redis,valkey", processes="1,2,4,8")
