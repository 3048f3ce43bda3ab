"""Memory and event loop stalls of one `gather` over many stops.

`python tests/benchmarks/gather.py [--stops 100000] [--rounds 5] [--loop uvloop]`

All tasks exist at once, and 100 of their requests are in flight. The peer is a
semaphore around the same request written with aiohttp and msgspec.
"""

from __future__ import annotations

import asyncio
from functools import partial
from statistics import median

import contenders
from contenders import Stop
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

_IN_FLIGHT = 100
_BARE, _OURS = "bare aiohttp + msgspec, a semaphore", "stop_runtime"
_LIMITS = {"mebibytes": 1.5, "stall": 2.0}
"""The highest ratios to bare tasks."""


async def _stop_with_semaphore(
    semaphore: asyncio.Semaphore, stop: Stop, alias: str
) -> object:
    async with semaphore:
        return await stop(alias)


async def _bare(url: str, stops: int) -> int:
    semaphore = asyncio.Semaphore(_IN_FLIGHT)
    async with contenders.bare(url) as stop:
        return await _gather(partial(_stop_with_semaphore, semaphore, stop), stops)


async def _ours(url: str, stops: int) -> int:
    # The default of `max_connections` is the number in flight.
    async with contenders.bctrl_async(url) as stop:
        return await _gather(stop, stops)


async def _gather(stop: Stop, stops: int) -> int:
    return len(
        await asyncio.gather(*(stop(alias) for alias in contenders.aliases(stops)))
    )


_CASES = {_BARE: _bare, _OURS: _ours}


def _child(name: str, url: str, stops: str, loop: str) -> Figures:
    return run(figures_of(_CASES[name](url, int(stops)), int(stops)), loop)


def _compare(stops: int, rounds: int, loop: str) -> Report:
    with server() as url:
        measurements = in_rounds(
            _CASES, rounds, lambda name: measured(name, url, stops, loop, kind=Figures)
        )

    def column(name: str, field: str) -> list[float]:
        return [getattr(figures, field) for figures in measurements[name]]

    fields = ("mebibytes", "stall", "seconds", "cpu")
    return Report(
        f"A gather of {stops:,} stops on {loop}, {_IN_FLIGHT} in flight",
        ["case", "peak MiB", "stall ms", "s", "CPU µs"],
        [[name, *(median(column(name, field)) for field in fields)] for name in _CASES],
        [
            Goal(
                f"{field} to bare",
                ratio(column(_OURS, field), column(_BARE, field)),
                limit,
            )
            for field, limit in _LIMITS.items()
        ],
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, stops=100_000, rounds=5, loop="asyncio")
