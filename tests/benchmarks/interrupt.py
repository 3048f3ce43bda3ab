"""Requests that a bulk stop sends after it was told to stop, and how soon it ends.

`python tests/benchmarks/interrupt.py [--rate 20] [--json]`

The command gets a signal in the middle of a file of targets; a program that uses the library calls
`stop_reading` when it gets one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from harness import Goal, Report, command, run

from bctrl_async import BctrlSession
from bctrl_async.emulator import Emulator

_WORKSPACE, _KEY = "ws-1", "emulator-key"
_TARGETS = 1000
_LATENCY = 0.2
_REQUESTS_BEFORE = 30
_LIBRARY = "stop_reading()"
_SIGNALS = {
    "SIGINT": signal.SIGINT,
    "SIGTERM": signal.SIGTERM,
    "SIGHUP": signal.SIGHUP,
    _LIBRARY: signal.SIGUSR1,
}
_INTERRUPTED = 130


class _Figures(msgspec.Struct, frozen=True):
    after: int
    seconds: float
    exit_code: int


def _aliases() -> list[str]:
    return [f"r{number}" for number in range(_TARGETS)]


async def _interrupted(case: str, rate: int, folder: Path) -> _Figures:
    file = folder / "targets.csv"
    file.write_text("".join(f"{_WORKSPACE},{alias}\n" for alias in _aliases()))
    async with Emulator(port=0, api_key=_KEY, latency=_LATENCY) as emulator:
        for alias in _aliases():
            emulator.add_runtime(_WORKSPACE, alias)
        stop = [sys.executable, "-m", "bctrl_async", "stop", "--from", str(file)]
        library = [sys.executable, __file__, "--measure"]
        process = await asyncio.create_subprocess_exec(
            *(library if case == _LIBRARY else [*stop, "--rate"]),
            str(rate),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "BCTRL_API_KEY": _KEY, "BCTRL_BASE_URL": emulator.url},
        )
        while len(emulator.requests) < _REQUESTS_BEFORE:
            await asyncio.sleep(0.01)
        before, signalled = len(emulator.requests), time.monotonic()
        process.send_signal(_SIGNALS[case])
        exit_code = await process.wait()
        return _Figures(len(emulator.requests) - before, time.monotonic() - signalled, exit_code)


async def _stop_until_told(rate: int) -> int:
    """Stop all targets, until a signal."""
    async with BctrlSession(rate=rate) as session:
        batch = session.stop_runtimes([(_WORKSPACE, alias) for alias in _aliases()])
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, batch.stop_reading)
        report = await batch
    return report.total


def _child(rate: str) -> int:
    return run(_stop_until_told(int(rate)))


def _compare(rate: int) -> Report:
    # Under nohup it is ignored, and child processes would inherit that.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as folder:
        measurements = {case: run(_interrupted(case, rate, Path(folder))) for case in _SIGNALS}
    return Report(
        f"{_TARGETS:,} targets at {rate} per second, interrupted after {_REQUESTS_BEFORE} requests",
        ["case", "requests after", "seconds", "exit code"],
        [[case, *msgspec.structs.astuple(figures)] for case, figures in measurements.items()],
        [
            goal
            for case, figures in measurements.items()
            for expected in [0 if case == _LIBRARY else _INTERRUPTED]
            for goal in [
                Goal(f"{case}: requests after it", figures.after, 2),
                Goal(f"{case}: seconds until the exit", figures.seconds, 3),
                Goal(f"{case}: exit code off {expected}", abs(figures.exit_code - expected), 0),
            ]
        ],
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, rate=20)
