"""CPU time of the client process per stop, by client, as ratios to bare aiohttp + msgspec.

`python tests/benchmarks/stop.py [--stops 5000] [--rounds 20] [--json]`
"""

from __future__ import annotations

import asyncio
import time
from statistics import median

import contenders
import msgspec
from contenders import Contender, Stop
from harness import Goal, Report, command, installed, measured, ratio, run, server

_WARM_UP = 500
_IN_FLIGHT = (1, 64)


class _Case(msgspec.Struct, frozen=True):
    name: str
    contender: Contender
    needs: tuple[str, ...] = ()
    share: float = 1.0  # Of the stops: slow clients make fewer.
    base: str = "bare aiohttp + msgspec"


_CASES = [
    _Case("bare aiohttp + msgspec", contenders.bare),
    _Case("bctrl_async stop_runtime", contenders.bctrl_async),
    _Case("bare, uvloop", contenders.bare, ("uvloop",), base="bare, uvloop"),
    _Case("bctrl_async, uvloop", contenders.bctrl_async, ("uvloop",), base="bare, uvloop"),
    _Case("httpx + msgspec", contenders.httpx, ("httpx",), share=0.1),
    _Case("bctrl AsyncBctrl", contenders.vendor, ("bctrl",), share=0.1),
]
_OURS = _CASES[1]


async def _stop_many(stop: Stop, stops: int, in_flight: int) -> None:
    aliases = (f"crm-{number}" for number in range(stops))

    async def work() -> None:
        for alias in aliases:
            await stop(alias)

    await asyncio.gather(*(work() for _ in range(in_flight)))


async def _measure(contender: Contender, url: str, stops: int, in_flight: int) -> float:
    async with contender(url) as stop:
        await _stop_many(stop, _WARM_UP, in_flight)
        start = time.process_time()
        await _stop_many(stop, stops, in_flight)
        return (time.process_time() - start) / stops * 1e6


def _child(name: str, url: str, stops: str, in_flight: str) -> float:
    case = next(case for case in _CASES if case.name == name)
    main = _measure(case.contender, url, int(stops), int(in_flight))
    return run(main, uvloop="uvloop" in case.needs)


def _compare(stops: int, rounds: int) -> Report:
    notes = ["AsyncBctrl stops a sandbox (POST /v1/sandboxes/{id}/stop): it has no workspaces."]
    cases = []
    for case in _CASES:
        if all(installed(package) for package in case.needs):
            cases.append(case)
        else:
            notes.append(f"{case.name}: skipped, {' '.join(case.needs)} is not installed.")
    runs = [(case, in_flight) for in_flight in _IN_FLIGHT for case in cases]
    times: dict[tuple[str, int], list[float]] = {(case.name, many): [] for case, many in runs}
    with server() as url:
        for _ in range(rounds):
            for case, in_flight in runs:
                count = str(max(1, round(stops * case.share)))
                task = ("--measure", case.name, url, count, str(in_flight))
                times[case.name, in_flight].append(measured(__file__, *task, kind=float))
            # Many short rounds in alternating order, so that other load on the machine affects all
            # cases alike.
            runs.reverse()

    def to_bare(case: _Case, in_flight: int) -> float:
        return ratio(times[case.name, in_flight], times[case.base, in_flight])

    return Report(
        "CPU time of the client process per stop",
        ["client", "in flight", "median µs", "min µs", "ratio to bare"],
        [
            [case.name, in_flight, median(column), min(column), to_bare(case, in_flight)]
            for in_flight in _IN_FLIGHT
            for case in cases
            for column in [times[case.name, in_flight]]
        ],
        [
            Goal(
                f"stop_runtime to bare aiohttp + msgspec, {in_flight} in flight",
                to_bare(_OURS, in_flight),
                1.10,
            )
            for in_flight in _IN_FLIGHT
        ],
        notes,
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, stops=5_000, rounds=20)
