"""The harness of the benchmarks: processes, rounds, tables and goals."""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import TypeVar

import msgspec

_HERE = Path(__file__).parent
_REPORTED = ("aiohttp", "msgspec", "uvloop", "aiofastnet", "pyreqwest")
# asyncio receives into a new buffer of 256 KiB each time. By default, glibc returns
# that memory to the system after some reads and keeps it after others, depending on the
# layout of the heap, which the hash seed changes. A read then costs up to a fifth of a
# stop more or less. Above both thresholds, and with one hash seed, all clients have the
# same conditions.
_PINNED = {
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
    "PYTHONHASHSEED": "0",
}
_READY = "ready\n"
_TICK = 0.001
"""Seconds between two looks for a stall of the event loop."""
_SOON = 0.1
"""Seconds from the last process being ready to the start."""
_Case = TypeVar("_Case")
_T = TypeVar("_T")

Row = list[str | float]


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
    rows: list[Row]
    goals: list[Goal] = []
    notes: list[str] = []

    def __str__(self) -> str:
        machine = {"python": platform.python_version(), "cpus": os.cpu_count()}
        machine |= {name: found for name in _REPORTED if (found := installed(name))}
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
        return "\n".join(lines)


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
    measure: Callable[..., object],
    **options: int | str,
) -> None:
    """Run a benchmark from its command line.

    Args:
        description: The text of `--help`.
        compare: Makes the report; takes the options as keywords.
        measure: Runs in the fresh processes that `measured` starts with `--measure`.
        options: Options, each with its default, which has the type of its values.
    """
    parser = ArgumentParser(
        description=description, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", nargs="+", help=SUPPRESS)
    for name, default in options.items():
        usual = f"default {default}" if default else None
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=usual
        )
    given = vars(parser.parse_args())
    if task := given.pop("measure"):
        sys.stdout.write(msgspec.json.encode(measure(*task)).decode())
        sys.stdout.flush()
        # The interpreter is not finalized: with pyreqwest it sometimes aborts there.
        os._exit(0)
    sys.stdout.write(f"{compare(**given)}\n")


@contextmanager
def server(certificate: Path | None = None) -> Generator[str]:
    """Run the server in another process and yield its URL.

    Args:
        certificate: The PEM file of a certificate and its key; without it the server
            has no TLS.
    """
    scheme, options = ("https", [certificate]) if certificate else ("http", [])
    with _python(_HERE / "server.py", *options) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield f"{scheme}://127.0.0.1:{process.stdout.readline().strip()}"
        process.stdin.close()


@contextmanager
def certificate() -> Generator[tuple[Path, Path]]:
    """Issue a certificate for 127.0.0.1; yield PEM files of its CA, and of itself."""
    # The import would take memory in a process that is measured.
    authority = import_module("trustme").CA()
    issued = authority.issue_cert("127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        trusted, own = Path(folder, "ca.pem"), Path(folder, "server.pem")
        authority.cert_pem.write_to_path(trusted)
        issued.private_key_and_cert_chain_pem.write_to_path(own)
        yield trusted, own


def measured(
    *task: object,
    kind: type[_T],
    under: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> _T:
    """Measure a task in a fresh interpreter, and decode the JSON that it prints.

    Args:
        task: The arguments of `measure`.
        kind: The type to decode.
        under: The command of a program that runs the interpreter, such as valgrind.
        environment: Other environment variables of the process.
    """
    with _measuring(task, under, environment) as process:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return msgspec.json.decode(output, type=kind)


def measured_together(tasks: Sequence[Sequence[object]], kind: type[_T]) -> list[_T]:
    """Measure tasks in fresh interpreters that start their work at once.

    Each calls `wait_for_start` once it has imported what it needs.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(_measuring(task)) for task in tasks]
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != _READY:
                raise SystemExit(process.wait() or 1)
        start = time.monotonic() + _SOON
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{start}\n")
            process.stdin.flush()
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(1)
    return [msgspec.json.decode(output, type=kind) for output in outputs]


def wait_for_start() -> float:
    """Wait until all processes of `measured_together` start; return the time of that.

    It is a time of `time.monotonic`, which all processes share.
    """
    sys.stdout.write(_READY)
    sys.stdout.flush()
    start = float(sys.stdin.readline())
    time.sleep(max(start - time.monotonic(), 0.0))
    return start


def _measuring(
    task: Sequence[object],
    under: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[str]:
    arguments = (sys.argv[0], "--measure", *map(str, task))
    return _python(*arguments, under=under, environment=environment)


def _python(
    *command: str | Path,
    under: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*under, sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **_PINNED, **environment},
    )


class Figures(msgspec.Struct, frozen=True):
    """The figures of a process: its peak of memory, and what its stops took.

    `stall` is the longest stall of the event loop in milliseconds, `cpu` the
    microseconds of CPU time of a stop.
    """

    mebibytes: float
    stall: float
    cpu: float
    seconds: float


class _StallWatch:
    """A monitor of event loop stalls: the delay of a timer of one millisecond.

    Attributes:
        longest: The longest delay of the timer, in seconds.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self._loop = asyncio.get_running_loop()
        self._schedule()

    def _schedule(self) -> None:
        self._due = self._loop.time() + _TICK
        self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        self.longest = max(self.longest, self._loop.time() - self._due)
        self._schedule()


async def figures_of(stopping: Awaitable[int], stops: int) -> Figures:
    """Return the figures of a client that returns how many runtimes it stopped."""
    watch = _StallWatch()
    start, cpu_start = time.perf_counter(), time.process_time()
    stopped = await stopping
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    await asyncio.sleep(2 * _TICK)
    if stopped != stops:
        raise SystemExit(f"stopped only {stopped} of {stops}")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return Figures(peak, watch.longest * 1000, cpu / stops * 1e6, seconds)


def in_rounds(
    cases: Iterable[_Case], rounds: int, measure: Callable[[_Case], _T]
) -> dict[_Case, list[_T]]:
    """Measure each case once a round.

    The order alternates, so that a trend in the load of the machine affects all alike.
    """
    order = list(cases)
    measurements: dict[_Case, list[_T]] = {case: [] for case in order}
    for _ in range(rounds):
        for case in order:
            measurements[case].append(measure(case))
        order.reverse()
    return measurements


def run(main: Coroutine[None, None, _T], loop: str = "asyncio") -> _T:
    """Run a coroutine on an event loop.

    Args:
        main: The coroutine.
        loop: The package of the loop: asyncio, uvloop, or aiofastnet for asyncio's own
            loop with the transports of aiofastnet.
    """
    factory = None
    if loop == "uvloop":
        factory = import_module("uvloop").new_event_loop
    elif loop == "aiofastnet":
        factory = import_module("aiofastnet").loop_factory()
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios of each round: its load cancels out."""
    return median(mine / other for mine, other in zip(ours, theirs, strict=True))
