"""Latency of another route of the FastAPI example while a bulk stop runs in the app.

`python tests/benchmarks/fastapi_latency.py [--targets 100000] [--rounds 3] [--json]`
"""

from __future__ import annotations

import asyncio
import json
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
from harness import Goal, Report, command, measured, run, server

_EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "fastapi"
_TOKEN = "let-me-in"
_INTERVAL = 0.005
_IDLE = 3.0
_MAX_P99 = 50.0


class _Figures(msgspec.Struct, frozen=True):
    responses: int
    p50: float
    p99: float
    longest: float
    elapsed: float


@contextmanager
def _app(api: str) -> Generator[str]:
    """Run the example under uvicorn and yield its URL."""
    arguments = ["-m", "uvicorn", "--app-dir", str(_EXAMPLE), "app:app", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, *arguments, "--no-access-log"],
        env={
            **os.environ,
            "APP_TOKEN": _TOKEN,
            "BCTRL_API_KEY": contenders.KEY,
            "BCTRL_BASE_URL": api,
        },
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                break
        else:
            raise SystemExit("uvicorn did not start")
        try:
            yield found[1]
        finally:
            process.terminate()
            process.communicate()


async def _bulk_stop(url: str, targets: int) -> None:
    pairs = [(contenders.WORKSPACE, f"crm-{number}") for number in range(targets)]
    timeout = aiohttp.ClientTimeout(None)
    async with (
        aiohttp.ClientSession(timeout=timeout) as http,
        http.post(
            f"{url}/stop", json=pairs, headers={"Authorization": f"Bearer {_TOKEN}"}
        ) as response,
    ):
        last = b""
        async for line in response.content:
            last = line if line.startswith(b"data: ") else last
    report = json.loads(last.removeprefix(b"data: "))
    if report["counts"] != {"stopped": targets}:
        raise SystemExit(f"not all of {targets} were stopped: {report['counts']}")


async def _measure(url: str, targets: int) -> _Figures:
    work = _bulk_stop(url, targets) if targets else asyncio.sleep(_IDLE)
    latencies = []
    async with aiohttp.ClientSession() as http:
        start = time.perf_counter()
        working = asyncio.create_task(work)
        while not working.done():
            sent = time.perf_counter()
            async with http.get(f"{url}/health") as response:
                await response.read()
            latencies.append(time.perf_counter() - sent)
            await asyncio.sleep(_INTERVAL)
        elapsed = time.perf_counter() - start
        await working
    p99 = quantiles(latencies, n=100)[98]
    return _Figures(len(latencies), median(latencies), p99, max(latencies), elapsed)


def _child(url: str, targets: str) -> _Figures:
    return run(_measure(url, int(targets)))


def _compare(targets: int, rounds: int) -> Report:
    cases = {"nothing else": 0, "a bulk stop": targets}
    measurements: dict[str, list[_Figures]] = {name: [] for name in cases}
    with server() as api, _app(api) as url:
        for _ in range(rounds):
            for name, size in cases.items():
                task = ("--measure", url, str(size))
                measurements[name].append(measured(__file__, *task, kind=_Figures))

    def middle(name: str, field: str) -> float:
        return float(median(getattr(figures, field) for figures in measurements[name]))

    return Report(
        f"GET /health of the FastAPI example, {_INTERVAL * 1000:g} ms after each response",
        ["beside", "targets", "responses", "p50 ms", "p99 ms", "longest ms", "s"],
        [
            [
                name,
                size,
                int(middle(name, "responses")),
                *(middle(name, field) * 1000 for field in ("p50", "p99", "longest")),
                middle(name, "elapsed"),
            ]
            for name, size in cases.items()
        ],
        [
            Goal(
                f"p99 in ms beside a bulk stop of {targets:,}",
                middle("a bulk stop", "p99") * 1000,
                _MAX_P99,
            )
        ],
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, targets=100_000, rounds=3)
