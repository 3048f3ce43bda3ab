"""Memory and event loop stalls of `asyncio.gather` over 100,000 stops, and over idle tasks.

`python tests/benchmarks/gather.py [--tasks 100000] [--rounds 3] [--json]`
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from statistics import median

import contenders
import msgspec
from contenders import Contender, Stop
from harness import TICK, Goal, Report, StallWatch, command, measured, ratio, run, server


@asynccontextmanager
async def _only_wait(_url: str) -> AsyncGenerator[Stop]:
    event = asyncio.Event()
    # The timer runs after all tasks that are ready, so that every one waits already.
    asyncio.get_running_loop().call_later(TICK, event.set)
    yield lambda _alias: event.wait()


_CASES: dict[str, Contender] = {
    "tasks that wait on an event": _only_wait,
    "bctrl_async stop_runtime": contenders.bctrl_async,
    "bare behind a semaphore": contenders.bare_bounded,
    "bare aiohttp + msgspec": contenders.bare,
}
_WAITING, _OURS, *_ = _CASES


class _Figures(msgspec.Struct, frozen=True):
    peak: float
    grown: float
    stall: float


def _peak_mebibytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


async def _measure(contender: Contender, url: str, tasks: int) -> _Figures:
    async with contender(url) as stop:
        watch = StallWatch()
        before = _peak_mebibytes()
        await asyncio.gather(*(stop(f"crm-{number}") for number in range(tasks)))
        await asyncio.sleep(2 * TICK)
        peak = _peak_mebibytes()
        return _Figures(peak, peak - before, watch.longest)


def _child(name: str, url: str, tasks: str) -> _Figures:
    return run(_measure(_CASES[name], url, int(tasks)))


def _compare(tasks: int, rounds: int) -> Report:
    measurements: dict[str, list[_Figures]] = {name: [] for name in _CASES}
    with server() as url:
        for _ in range(rounds):
            for name, figures in measurements.items():
                command = (__file__, "--measure", name, url, str(tasks))
                figures.append(measured(*command, kind=_Figures))

    def column(name: str, field: str) -> list[float]:
        return [getattr(figures, field) for figures in measurements[name]]

    def to_waiting(name: str, field: str) -> float:
        return ratio(column(name, field), column(_WAITING, field))

    return Report(
        f"asyncio.gather over {tasks:,} calls, each in a fresh process",
        ["case", "peak MiB", "grown by MiB", "stall ms", "peak ratio", "stall ratio"],
        [
            [
                name,
                median(column(name, "peak")),
                median(column(name, "grown")),
                median(column(name, "stall")) * 1000,
                to_waiting(name, "peak"),
                to_waiting(name, "stall"),
            ]
            for name in _CASES
        ],
        [
            Goal("peak memory to tasks that only wait", to_waiting(_OURS, "peak"), 1.5),
            Goal("longest loop stall to tasks that only wait", to_waiting(_OURS, "stall"), 2.0),
        ],
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, tasks=100_000, rounds=3)
