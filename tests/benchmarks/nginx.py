"""2,000 stops through a real nginx that accepts 200 per second, by client.

`python tests/benchmarks/nginx.py [--targets 2000] [--json]`
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import contenders
import msgspec
from contenders import KEY, WORKSPACE, Contender
from harness import Goal, Report, command, installed, measured, run, server

from bctrl_async import BctrlSession, StopResult

sys.path.append(str(Path(__file__).parents[1]))
from nginx_server import BURST, NGINX, RATE, nginx


class _Figures(msgspec.Struct, frozen=True):
    seconds: float
    stopped: int
    errors: dict[str, int]


_Client = Callable[[str, int], Awaitable[list[BaseException | None]]]
"""Stop a number of runtimes; return for each None or the reason why it was not stopped."""


async def _stop_runtimes(url: str, targets: int) -> list[BaseException | None]:
    async with BctrlSession(KEY, base_url=url) as session:
        report = await session.stop_runtimes(
            [(WORKSPACE, f"crm-{number}") for number in range(targets)]
        )
    failed = [outcome.error for outcome in report.failures]
    return [*failed, *[None] * report.counts[StopResult.STOPPED]]


def _gather(contender: Contender) -> _Client:
    async def stop_all(url: str, targets: int) -> list[BaseException | None]:
        async with contender(url) as stop:
            stops = (stop(f"crm-{number}") for number in range(targets))
            results = await asyncio.gather(*stops, return_exceptions=True)
        return [error if isinstance(error, BaseException) else None for error in results]

    return stop_all


class _Case(msgspec.Struct, frozen=True):
    name: str
    client: _Client
    goal: float | None
    """The highest share of throttled responses; None for a peer, which has no goals.

    The time has no goal with a Retry-After: honouring it costs a full second.
    """
    retry_after: int | None = None
    status: int = 429


_OURS, _GATHER = _stop_runtimes, _gather(contenders.bctrl_async)
_CASES = [
    _Case("stop_runtimes", _OURS, 0.10),
    _Case("stop_runtimes, 503", _OURS, 0.10, status=503),
    _Case("gather over stop_runtime", _GATHER, 0.10),
    _Case("gather over stop_runtime, 503", _GATHER, 0.10, status=503),
    _Case("bctrl AsyncBctrl, gather", _gather(contenders.vendor), None),
    _Case("stop_runtimes, Retry-After", _OURS, 0.05, 1),
    _Case("stop_runtimes, 503 and Retry-After", _OURS, 0.05, 1, 503),
    _Case("gather over stop_runtime, Retry-After", _GATHER, 0.05, 1),
]


async def _measure(client: _Client, url: str, targets: int) -> _Figures:
    start = time.monotonic()
    results = await client(url, targets)
    seconds = time.monotonic() - start
    errors = Counter(type(error).__name__ for error in results if error is not None)
    return _Figures(seconds, results.count(None), errors)


def _child(name: str, url: str, targets: str) -> _Figures:
    case = next(case for case in _CASES if case.name == name)
    return run(_measure(case.client, url, int(targets)))


def _compare(targets: int) -> Report:
    if NGINX is None:
        raise SystemExit("nginx is not installed")
    ideal = (targets - BURST) / RATE
    notes = [
        f"Ideal: {targets} - {BURST} at {RATE} per second, {ideal:.2f} s.",
        "AsyncBctrl stops a sandbox (POST /v1/sandboxes/{id}/stop): it has no workspaces.",
    ]
    cases = _CASES
    if not installed("bctrl"):
        cases = [case for case in _CASES if case.goal is not None]
        notes.append("AsyncBctrl: skipped, bctrl is not installed.")
    rows: list[list[str | float]] = []
    goals = []
    with server() as url:
        for case in cases:
            # A new nginx for each case, with an empty bucket and a log of its own.
            with nginx(url, retry_after=case.retry_after, status=case.status) as limited:
                task = ("--measure", case.name, limited.url, str(targets))
                figures = measured(__file__, *task, kind=_Figures)
            failed = targets - figures.stopped
            to_ideal = figures.seconds / ideal
            rows.append(
                [
                    case.name,
                    figures.seconds,
                    # A client that gives up is fast, so its time is not comparable.
                    to_ideal if not failed else "-",
                    100 * limited.throttled_share,
                    figures.stopped,
                    failed,
                ]
            )
            if failed:
                reasons = ", ".join(f"{count} {name}" for name, count in figures.errors.items())
                notes.append(f"{case.name}: not stopped by {reasons}.")
            if case.goal is not None:
                if case.retry_after is None:
                    goals.append(Goal(f"{case.name}: time to ideal", to_ideal, 1.25))
                goals += [
                    Goal(f"{case.name}: share throttled", limited.throttled_share, case.goal),
                    Goal(f"{case.name}: not stopped", failed, 0),
                ]
    return Report(
        f"{targets:,} stops through nginx, limit_req {RATE} per second, burst {BURST}",
        ["client", "seconds", "to ideal", "% throttled", "stopped", "failed"],
        rows,
        goals,
        notes,
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, targets=2_000)
