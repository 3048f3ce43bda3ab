"""Latency of another route of the FastAPI example while a bulk stop runs in the app.

`python tests/benchmarks/fastapi_latency.py [--targets 100000] [--rounds 3]`
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import aiohttp
import contenders
import msgspec
from harness import Goal, Report, command, in_rounds, measured, run, server

_EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "fastapi"
_TOKEN = "let-me-in"
_INTERVAL = 0.005
_IDLE, _POLL = 3.0, 0.5
_MAX_P99 = 50.0
_CASES = ("nothing else", "a bulk stop")


class _Figures(msgspec.Struct, frozen=True):
    p50: float
    p99: float
    seconds: float


@contextmanager
def _app(api: str) -> Generator[str]:
    """Run the example under uvicorn and yield its URL."""
    arguments = ["-m", "uvicorn", "--app-dir", str(_EXAMPLE), "app:app", "--port", "0"]
    environment = {
        "APP_TOKEN": _TOKEN,
        "BCTRL_API_KEY": contenders.KEY,
        "BCTRL_BASE_URL": api,
    }
    with subprocess.Popen(
        [sys.executable, *arguments, "--no-access-log"],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        found = next(
            filter(
                None, map(re.compile(r"running on (http://\S+)").search, process.stderr)
            )
        )
        try:
            yield found[1]
        finally:
            process.terminate()
            process.communicate()


async def _bulk_stop(url: str, targets: int) -> None:
    headers = {"Authorization": f"Bearer {_TOKEN}"}
    async with aiohttp.ClientSession(
        url, headers=headers, raise_for_status=True
    ) as http:
        async with http.post("/runs", json=list(contenders.pairs(targets))) as response:
            run_id = await response.json()
        report = None
        while report is None:
            await asyncio.sleep(_POLL)
            async with http.get(f"/runs/{run_id}") as response:
                report = (await response.json())["report"]
    if report["counts"]["stopped"] != targets:
        raise SystemExit(f"not all of {targets} were stopped: {report['counts']}")


async def _measure(url: str, targets: int) -> _Figures:
    work = _bulk_stop(url, targets) if targets else asyncio.sleep(_IDLE)
    latencies = []
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        start = time.perf_counter()
        working = asyncio.create_task(work)
        while not working.done():
            sent = time.perf_counter()
            async with http.get(url) as response:
                await response.read()
            latencies.append((time.perf_counter() - sent) * 1000)
            await asyncio.sleep(_INTERVAL)
        seconds = time.perf_counter() - start
        await working
    p99 = quantiles(latencies, n=100)[98]
    return _Figures(median(latencies), p99, seconds)


def _child(url: str, targets: str) -> _Figures:
    return run(_measure(url, int(targets)))


def _compare(targets: int, rounds: int) -> Report:
    sizes = dict(zip(_CASES, [0, targets], strict=True))
    with server() as api, _app(api) as url:
        found = in_rounds(
            _CASES, rounds, lambda name: measured(url, sizes[name], kind=_Figures)
        )

    def middle(name: str, field: str) -> float:
        return float(median(getattr(figures, field) for figures in found[name]))

    return Report(
        f"The page of the FastAPI example, {_INTERVAL * 1000:g} ms after each response",
        ["beside", "targets", "p50 ms", "p99 ms", "s"],
        [
            [
                name,
                sizes[name],
                *(middle(name, field) for field in _Figures.__struct_fields__),
            ]
            for name in _CASES
        ],
        [
            Goal(
                f"p99 in ms beside {targets:,} stops",
                middle("a bulk stop", "p99"),
                _MAX_P99,
            )
        ],
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, targets=100_000, rounds=3)
