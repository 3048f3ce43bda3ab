"""Instructions that the client executes for each stop, counted by valgrind.

`python tests/benchmarks/instructions.py [--before PATH] [--only TEXT] [--json]`

Unlike CPU time, they hardly depend on other load: two runs differ by less than 1 %. Instructions of
the kernel are not counted. Each case runs twice, with different numbers of stops, so that the cost
of the start cancels out. `--before` also measures the package in another checkout. With `--only`,
just the cases with TEXT in their name are measured.
"""

from __future__ import annotations

import asyncio
import gc
import re
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path

import contenders
import msgspec
from contenders import KEY, WORKSPACE, Contender, Stop
from harness import Report, command, installed, measured, run, server

from bctrl_async import BctrlSession

_FEW, _MANY = 200, 700
_IN_FLIGHT = 16
_VALGRIND = "valgrind"

_Client = Callable[[str, list[str]], Coroutine[None, None, int]]
"""Stop the runtimes with these aliases and return the number that were stopped."""


async def _one_by_one(stop: Stop, aliases: list[str]) -> int:
    for alias in aliases:
        await stop(alias)
    return len(aliases)


def _by(contender: Contender) -> _Client:
    async def stop_all(url: str, aliases: list[str]) -> int:
        async with contender(url) as stop:
            return await _one_by_one(stop, aliases)

    return stop_all


def _session(url: str) -> BctrlSession:
    return BctrlSession(KEY, base_url=url, max_connections=_IN_FLIGHT)


def _pairs(aliases: list[str]) -> list[tuple[str, str]]:
    return [(WORKSPACE, alias) for alias in aliases]


async def _gathered(url: str, aliases: list[str]) -> int:
    async with _session(url) as session:
        stops = (session.stop_runtime(WORKSPACE, alias) for alias in aliases)
        return len(await asyncio.gather(*stops))


async def _awaited(url: str, aliases: list[str]) -> int:
    async with _session(url) as session:
        report = await session.stop_runtimes(_pairs(aliases))
    return report.total - len(report.failures)


async def _iterated(url: str, aliases: list[str]) -> int:
    async with _session(url) as session, session.stop_runtimes(_pairs(aliases)) as batch:
        return sum([outcome.ok async for outcome in batch])


class _Case(msgspec.Struct, frozen=True):
    name: str
    client: _Client
    needs: str | None = None
    ours: bool = True


_CASES = [
    _Case("bare aiohttp + msgspec", _by(contenders.bare), ours=False),
    _Case("raw asyncio + httptools + msgspec", _by(contenders.raw), "httptools", ours=False),
    _Case("stop_runtime", _by(contenders.bctrl_async)),
    _Case(f"stop_runtime, gather, {_IN_FLIGHT} in flight", _gathered),
    _Case(f"stop_runtimes, awaited, {_IN_FLIGHT} in flight", _awaited),
    _Case(f"stop_runtimes, iterated, {_IN_FLIGHT} in flight", _iterated),
]
_BARE = _CASES[0].name


def _child(name: str, url: str, stops: str) -> int:
    case = next(case for case in _CASES if case.name == name)
    # A collection would fall into one of the two runs by chance.
    gc.disable()
    return run(case.client(url, [f"crm-{number}" for number in range(int(stops))]))


def _count(case: _Case, url: str, stops: int, path: str | None) -> int:
    with tempfile.NamedTemporaryFile() as counts:
        tool = ("--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={counts.name}")
        stopped = measured(
            *(__file__, "--measure", case.name, url, str(stops)),
            kind=int,
            under=(_VALGRIND, "-q", *tool),
            environment={} if path is None else {"PYTHONPATH": path},
        )
        if stopped != stops:
            raise SystemExit(f"{case.name}: stopped only {stopped} of {stops}")
        found = re.search(r"^summary: (\d+)", Path(counts.name).read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit("cachegrind did not write a summary")
    return int(found[1])


def _thousands(case: _Case, url: str, path: str | None = None) -> float:
    few, many = (_count(case, url, stops, path) for stops in (_FEW, _MANY))
    return (many - few) / (_MANY - _FEW) / 1000


def _compare(before: str, only: str) -> Report:
    title = "Instructions of the client per stop, in thousands"
    if shutil.which(_VALGRIND) is None:
        return Report(title, ["client"], [], [], ["Skipped: valgrind is not installed."])
    rows: list[list[str | float]] = []
    notes = []
    bare = None
    with server() as url:
        for case in (case for case in _CASES if only in case.name or case.name == _BARE):
            if case.needs and not installed(case.needs):
                notes.append(f"{case.name}: skipped, {case.needs} is not installed.")
                continue
            count = _thousands(case, url)
            bare = bare or count
            row: list[str | float] = [case.name, count, count / bare]
            if before and case.ours:
                then = _thousands(case, url, str(Path(before).resolve()))
                row += [then, then / bare, count / then]
            elif before:
                row += ["-", "-", "-"]
            rows.append(row)
    columns = ["client", "thousand", "to bare"]
    if before:
        columns += ["before", "before to bare", "to before"]
    return Report(title, columns, rows, [], notes)


if __name__ == "__main__":
    command(__doc__, _compare, _child, before="", only="")
