"""The harness of the benchmarks: processes, tables and goals."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TypeVar

import msgspec

_HERE = Path(__file__).parent
TICK = 0.001
_T = TypeVar("_T")


class Goal(msgspec.Struct, frozen=True):
    """A ratio that must not be exceeded."""

    name: str
    ratio: float
    limit: float

    def __str__(self) -> str:
        verdict = "met" if self.ratio <= self.limit else "MISSED"
        return f"{verdict:6}  {self.ratio:5.2f} (at most {self.limit:.2f})  {self.name}"


class Report(msgspec.Struct, frozen=True):
    """The report of a benchmark: a table, notes and goals."""

    title: str
    columns: list[str]
    rows: list[list[str | float]]
    goals: list[Goal]
    notes: list[str] = []

    def write(self, *, as_json: bool) -> None:
        """Write the report to standard output."""
        machine = {
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            **{name: installed(name) for name in ("aiohttp", "msgspec")},
        }
        if as_json:
            report = {**msgspec.structs.asdict(self), "machine": machine}
            sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
            return
        table = [self.columns, *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            self.title,
            ", ".join(f"{name} {value}" for name, value in machine.items()),
            "",
            *(
                "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
                for first, *rest in table
            ),
            "",
            *self.notes,
            *map(str, self.goals),
        ]
        sys.stdout.write("\n".join(lines) + "\n")


def _cell(value: str | float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command(
    description: str | None,
    compare: Callable[..., Report],
    measure: Callable[..., object] = str,
    **counts: int,
) -> None:
    """Run a benchmark from its command line.

    Args:
        description: The text of `--help`.
        compare: Makes the report; takes the counts as keywords.
        measure: Runs in the fresh processes that `measured` starts with `--measure`.
        counts: Options with integer values, and their defaults.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measure", nargs="+", help=SUPPRESS)
    for name, default in counts.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, help=f"default {default}")
    given = vars(parser.parse_args())
    as_json, task = given.pop("json"), given.pop("measure")
    if task:
        sys.stdout.write(msgspec.json.encode(measure(*task)).decode())
    else:
        compare(**given).write(as_json=as_json)


@contextmanager
def server(delay: float = 0.0) -> Generator[str]:
    """Run the server in another process and yield its URL.

    Args:
        delay: The latency of each response, in seconds.
    """
    with _python(_HERE / "server.py", str(delay)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.stdin.close()


def measured(*command: str | Path, kind: type[_T]) -> _T:
    """Run a fresh interpreter and decode the JSON that it prints."""
    with _python(*command) as process:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return msgspec.json.decode(output, type=kind)


def _python(*command: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run(main: Coroutine[None, None, _T], *, uvloop: bool = False) -> _T:
    """Run a coroutine on asyncio's own loop or on uvloop's."""
    factory = import_module("uvloop").new_event_loop if uvloop else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios of each round: load on a whole round cancels out."""
    return median(mine / other for mine, other in zip(ours, theirs, strict=True))


class StallWatch:
    """A monitor of event loop stalls: the delay of a timer of one millisecond.

    Unlike a loop patched to time its iterations, it works on uvloop, and measures the delay of a
    user's timer, which may be several iterations long.

    Attributes:
        longest: The longest delay of the timer, in seconds.
        busiest: The most CPU time that the process took between two ticks, in seconds. It tells a
            stall of this process from one caused by others.
    """

    def __init__(self) -> None:
        self.longest = self.busiest = 0.0
        self._cpu = time.process_time()
        self._loop = asyncio.get_running_loop()
        self._schedule()

    def _schedule(self) -> None:
        self._due = self._loop.time() + TICK
        self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        before, self._cpu = self._cpu, time.process_time()
        self.busiest = max(self.busiest, self._cpu - before)
        self.longest = max(self.longest, self._loop.time() - self._due)
        self._schedule()
