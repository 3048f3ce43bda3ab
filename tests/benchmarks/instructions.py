"""Instructions that the client executes for each stop, counted by valgrind.

`python tests/benchmarks/instructions.py [--before PATH] [--only TEXT]`

Unlike CPU time, they hardly depend on other load: two runs differ by less than 1 %.
Instructions of the kernel are not counted. Each case runs twice, with different numbers
of stops, so that the cost of the start cancels out. `--before` also measures the
package in another checkout. With `--only`, just the cases with TEXT in their name are
measured.
"""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp
import contenders
from contenders import KEY, WORKSPACE, Contender, Stop, pairs
from harness import Report, Row, command, measured, run, server

from bctrl_async import BctrlSession

_FEW, _MANY = 200, 700
_IN_FLIGHT = 16

_Client = Callable[[str, int], Coroutine[None, None, int]]
"""Stop a number of runtimes and return the number that were stopped."""


async def _one_by_one(contender: Contender, url: str, stops: int) -> int:
    async with contender(url) as stop:
        return await contenders.stop_all(stop, stops, 1)


@asynccontextmanager
async def _long_way(url: str) -> AsyncGenerator[Stop]:
    """Use this package with a borrowed pool, which the fast path does not have."""
    async with (
        aiohttp.ClientSession() as http,
        BctrlSession(KEY, base_url=url, http=http) as session,
    ):
        yield partial(session.stop_runtime, WORKSPACE)


async def _stop_runtimes(url: str, stops: int) -> int:
    async with BctrlSession(KEY, base_url=url, max_connections=_IN_FLIGHT) as session:
        report = await session.stop_runtimes(list(pairs(stops)))
    return report.total - len(report.failures)


_BARE = "bare aiohttp + msgspec"
_CASES: dict[str, _Client] = {
    _BARE: partial(_one_by_one, contenders.bare),
    "stop_runtime": partial(_one_by_one, contenders.bctrl_async),
    "stop_runtime, the long way": partial(_one_by_one, _long_way),
    f"stop_runtimes, {_IN_FLIGHT} in flight": _stop_runtimes,
}


def _child(name: str, url: str, stops: str) -> int:
    # A collection would fall into one of the two runs by chance.
    gc.disable()
    return run(_CASES[name](url, int(stops)))


def _count(name: str, url: str, stops: int, path: str | None) -> int:
    with tempfile.NamedTemporaryFile() as counts:
        tool = (
            "--tool=cachegrind",
            "--cache-sim=no",
            f"--cachegrind-out-file={counts.name}",
        )
        stopped = measured(
            *(name, url, stops),
            kind=int,
            under=("valgrind", "-q", *tool),
            environment={} if path is None else {"PYTHONPATH": path},
        )
        if stopped != stops:
            raise SystemExit(f"{name}: stopped only {stopped} of {stops}")
        found = re.search(
            r"^summary: (\d+)", Path(counts.name).read_text(), re.MULTILINE
        )
    if found is None:
        raise SystemExit("cachegrind did not write a summary")
    return int(found[1])


def _thousands(name: str, url: str, path: str | None = None) -> float:
    few, many = (_count(name, url, stops, path) for stops in (_FEW, _MANY))
    return (many - few) / (_MANY - _FEW) / 1000


def _compare(before: str, only: str) -> Report:
    rows: list[Row] = []
    with server() as url:
        bare = _thousands(_BARE, url)
        for name in (name for name in _CASES if only in name or name == _BARE):
            count = bare if name == _BARE else _thousands(name, url)
            row: Row = [name, count, count / bare]
            if before and name == _BARE:
                row += ["-", "-", "-"]
            elif before:
                then = _thousands(name, url, str(Path(before).resolve()))
                row += [then, then / bare, count / then]
            rows.append(row)
    columns = ["client", "thousand", "to bare"]
    if before:
        columns += ["before", "before to bare", "to before"]
    return Report("Instructions of the client per stop, in thousands", columns, rows)


if __name__ == "__main__":
    command(__doc__, _compare, _child, before="", only="")
