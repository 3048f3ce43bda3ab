"""2,000 stops through a real nginx that accepts 200 per second, by client.

`python tests/benchmarks/nginx.py [--targets 2000]`
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import contenders
import msgspec
from contenders import Contender
from harness import Goal, Report, Row, command, installed, measured, run, server

from bctrl_async import BctrlSession, StopResult

sys.path.append(str(Path(__file__).parents[1]))
from support.nginx_server import BURST, RATE, nginx


class _Figures(msgspec.Struct, frozen=True):
    seconds: float
    stopped: int


_Client = Callable[[str, int], Awaitable[int]]
"""Stop a number of runtimes; return how many were stopped."""


async def _stop_runtimes(url: str, targets: int) -> int:
    async with BctrlSession(contenders.KEY, base_url=url) as session:
        report = await session.stop_runtimes(list(contenders.pairs(targets)))
    return report.counts[StopResult.STOPPED]


async def _gather(contender: Contender, url: str, targets: int) -> int:
    async with contender(url) as stop:
        stops = (stop(alias) for alias in contenders.aliases(targets))
        results = await asyncio.gather(*stops, return_exceptions=True)
    return sum(not isinstance(result, BaseException) for result in results)


class _Case(msgspec.Struct, frozen=True):
    client: _Client
    goal: float | None
    """The highest share of throttled responses; None for a peer, which has no goals.

    The time has no goal with a Retry-After: honouring it costs a full second.
    """
    retry_after: int | None = None


_VENDOR = "bctrl AsyncBctrl, gather"
_CASES = {
    "stop_runtimes": _Case(_stop_runtimes, 0.10),
    "gather over stop_runtime": _Case(partial(_gather, contenders.bctrl_async), 0.10),
    _VENDOR: _Case(partial(_gather, contenders.vendor), None),
    "stop_runtimes, Retry-After": _Case(_stop_runtimes, 0.05, 1),
}


async def _measure(client: _Client, url: str, targets: int) -> _Figures:
    start = time.monotonic()
    stopped = await client(url, targets)
    return _Figures(time.monotonic() - start, stopped)


def _child(name: str, url: str, targets: str) -> _Figures:
    return run(_measure(_CASES[name].client, url, int(targets)))


def _compare(targets: int) -> Report:
    ideal = (targets - BURST) / RATE
    notes = [f"Ideal: {targets} - {BURST} at {RATE} per second, {ideal:.2f} s."]
    notes.append(contenders.NO_WORKSPACES)
    rows: list[Row] = []
    goals = []
    cases = dict(_CASES)
    if not installed("bctrl"):
        notes.append("AsyncBctrl: skipped, bctrl is not installed.")
        del cases[_VENDOR]
    with server() as url:
        for name, case in cases.items():
            # A new nginx for each case, with an empty bucket and a log of its own.
            with nginx(url, retry_after=case.retry_after) as limited:
                figures = measured(name, limited.url, targets, kind=_Figures)
            failed, throttled = targets - figures.stopped, limited.throttled_share
            to_ideal = figures.seconds / ideal
            # A client that gives up is fast, so its time is not comparable.
            shown = "-" if failed else to_ideal
            rows.append(
                [name, figures.seconds, shown, 100 * throttled, figures.stopped, failed]
            )
            if case.goal is not None:
                goals.append(Goal(f"{name}: share throttled", throttled, case.goal))
                goals.append(Goal(f"{name}: not stopped", failed, 0))
                if case.retry_after is None:
                    goals.append(Goal(f"{name}: time to ideal", to_ideal, 1.25))
    return Report(
        f"{targets:,} stops through nginx, limit_req {RATE} per second, burst {BURST}",
        ["client", "seconds", "to ideal", "% throttled", "stopped", "failed"],
        rows,
        goals,
        notes,
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, targets=2_000)
