"""Several processes behind one rate limit: without a shared pace, and with one in each store.

`python tests/benchmarks/shared.py [--part limit] [--store file,redis,valkey] [--processes 1,2,4,8]
[--rounds 5] [--json]`

The parts:

- `limit`: 2,000 targets through an nginx that accepts 200 requests a second
- `fast`: 20,000 targets through an nginx that accepts 2,000 requests a second
- `cpu`: CPU time of a stop with a pace that does not bind, relative to none
- `singles`: latency of single stops beside bulk stops, of other processes or of the same session
- `faults`: the store killed, suspended, restarted empty, and never there
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import msgspec
from contenders import WORKSPACE
from harness import Goal, Report, command, ratio, server
from members import SINGLES_FROM, Figures, Task, jain, longest_gap, members, percentiles, work

sys.path.append(str(Path(__file__).parents[1]))
from nginx_server import BURST, NGINX, nginx
from redis_server import REDIS, VALKEY, RedisServer, redis_server
from servers import emulator_in_a_thread

from bctrl_async import StopResult

_PROGRAMS = {"redis": REDIS, "valkey": VALKEY}
_MAX_TO_IDEAL = 1.10
_MAX_THROTTLED = 0.005
_MAX_UNFAIR = 0.02
_MAX_CPU = 1.05
_MAX_SINGLE_MS = 100.0
_MAX_SINGLE_BESIDE_MS = 50.0
_MAX_GAP = 0.5
_JAIN = "Jain: fairness of the runtimes that each process has stopped when the first one ends."


@contextmanager
def _store(name: str) -> Generator[str]:
    """Run the store of a pace, and yield its path or URL."""
    if name == "file":
        with TemporaryDirectory() as folder:
            yield f"{folder}/pace"
        return
    with redis_server(_program(name)) as running:
        yield running.url


def _program(name: str) -> str:
    program = _PROGRAMS[name]
    if program is None:
        raise SystemExit(f"{name}-server is not installed")
    return program


def _tasks(
    url: str, targets: int, processes: int, rate: float | None = None, store: str | None = None
) -> list[Task]:
    """Divide a bulk stop among processes."""
    share = targets // processes
    return [
        Task(url=url, targets=share, first=number * share, rate=rate, store=store)
        for number in range(processes)
    ]


# Behind a limit


class _Limit(msgspec.Struct, frozen=True):
    targets: int
    accepted: int
    """Requests that nginx accepts in a second."""
    rate: float
    """The rate that is shared, slightly below."""
    alone: bool = True
    """Whether to measure processes that share nothing."""


_LIMITS = {
    "limit": _Limit(2_000, 200, 195.0),
    "fast": _Limit(20_000, 2_000, 1_950.0, alone=False),
}


def _behind_a_limit(limit: _Limit, stores: Sequence[str], counts: Sequence[int]) -> Report:
    if NGINX is None:
        raise SystemExit("nginx is not installed")
    ideal = (limit.targets - BURST) / limit.accepted
    cases = [*(["nothing", "a fixed share each"] if limit.alone else []), *stores]
    rows: list[list[str | float]] = []
    goals = []
    notes = [
        f"Ideal: {limit.targets - BURST:,} at {limit.accepted} per second, {ideal:.2f} s.",
        _JAIN,
    ]
    with server() as api:
        for case in cases:
            for count in counts:
                team, throttled = _race(limit, case, count, api)
                notes += [
                    f"{case}, {count} processes: {warning}"
                    for figures in team
                    for warning in figures.warnings
                ]
                seconds = [figures.seconds for figures in team]
                to_ideal, fairness = max(seconds) / ideal, jain(team)
                stopped = sum(figures.results.get(StopResult.STOPPED, 0) for figures in team)
                rows.append(
                    [
                        *(case, count, to_ideal, 100 * throttled, round(fairness, 3)),
                        f"{min(seconds):.2f}..{max(seconds):.2f}",
                        *_lease_cells(team),
                        limit.targets - stopped,
                    ]
                )
                if case in stores:
                    name = f"{case}, {count} processes"
                    goals += [
                        Goal(f"{name}: time to ideal", to_ideal, _MAX_TO_IDEAL),
                        Goal(f"{name}: % answered 429", 100 * throttled, 100 * _MAX_THROTTLED),
                        Goal(f"{name}: 1 - Jain", 1 - fairness, _MAX_UNFAIR),
                        Goal(f"{name}: not stopped", limit.targets - stopped, 0),
                    ]
    return Report(
        f"{limit.targets:,} stops through nginx, limit_req {limit.accepted} per second, burst "
        f"{BURST}, at a shared rate of {limit.rate:g}",
        [
            *("shared", "processes", "to ideal", "% 429", "Jain", "first..last s"),
            *("leases each", "lease p50 ms", "p99 ms", "not stopped"),
        ],
        rows,
        goals,
        notes,
    )


def _race(limit: _Limit, case: str, count: int, api: str) -> tuple[list[Figures], float]:
    """Return the figures of each process, and the share of requests answered 429."""
    with nginx(api, rate=limit.accepted) as limited:
        if case == "nothing":
            team = members(_tasks(limited.url, limit.targets, count))
        elif case == "a fixed share each":
            team = members(_tasks(limited.url, limit.targets, count, limit.rate / count))
        else:
            with _store(case) as store:
                team = members(_tasks(limited.url, limit.targets, count, limit.rate, store))
    return team, limited.throttled_share


def _lease_cells(team: Sequence[Figures]) -> list[str | float]:
    latencies = [latency for figures in team for latency in figures.leases]
    if not latencies:
        return ["-", "-", "-"]
    p50, p99, _ = percentiles(latencies)
    return [max(len(figures.leases) for figures in team), p50, p99]


# CPU time


def _cpu(stores: Sequence[str], rounds: int) -> Report:
    # Several times as many as a process can stop. A lower rate would space attempts that are now
    # sent in one turn of the event loop, with or without a pace.
    targets, rate = 20_000, 100_000.0
    cases = ["nothing", "rate= of the session", *stores]
    costs: dict[str, list[float]] = {case: [] for case in cases}
    with server() as api:
        for number in range(rounds):
            # Every other round in reverse: what is measured later has a warmer machine.
            for case in cases if number % 2 else reversed(cases):
                task = Task(url=api, targets=targets)
                if case == "nothing":
                    [figures] = members([task])
                elif case not in stores:
                    [figures] = members([msgspec.structs.replace(task, rate=rate)])
                else:
                    with _store(case) as store:
                        task = msgspec.structs.replace(task, rate=rate, store=store)
                        [figures] = members([task])
                costs[case].append(figures.cpu / targets * 1e6)
    relative = {case: ratio(costs[case], costs["nothing"]) for case in cases}
    return Report(
        f"CPU time of a stop of {targets:,}, at a rate of {rate:,.0f}, which does not bind",
        ["shared", "us", "relative"],
        [[case, median(costs[case]), relative[case]] for case in cases],
        [Goal(f"{case}: CPU time to none", relative[case], _MAX_CPU) for case in stores],
        ["Medians of the rounds; all threads of the process."],
    )


# Single stops


def _singles(stores: Sequence[str]) -> Report:
    rate, seconds, bulk_processes = 195.0, 10.0, 7
    rows: list[list[str | float]] = []
    goals = []
    with server() as api:
        [idle] = members([Task(url=api, targets=0, singles_for=seconds)])
        rows.append(["nothing", "nothing", *percentiles(idle.singles), "-"])
        for case in stores:
            bulk = _tasks(api, 2_450, bulk_processes, rate)
            single = Task(url=api, targets=0, rate=rate, singles_for=seconds)
            with _store(case) as store:
                tasks = [msgspec.structs.replace(task, store=store) for task in (*bulk, single)]
                *team, alone = members(tasks)
            latencies = percentiles(alone.singles)
            rows.append(
                [case, f"{bulk_processes} bulk processes", *latencies, _throughput(team, seconds)]
            )
            name = f"{case}, beside {bulk_processes} bulk processes"
            goals.append(Goal(f"{name}: p99 ms", latencies[1], _MAX_SINGLE_MS))
        for case in ("rate= of the session", *stores):
            task = Task(url=api, targets=2_100, rate=rate, singles_for=seconds)
            if case in stores:
                with _store(case) as store:
                    [figures] = members([msgspec.structs.replace(task, store=store)])
            else:
                [figures] = members([task])
            latencies = percentiles(figures.singles)
            throughput = _throughput([figures], seconds)
            rows.append([case, "a bulk of the session", *latencies, throughput])
            left = rate - len(figures.singles) / seconds
            name = f"{case}, beside a bulk of the session"
            goals += [
                Goal(f"{name}: p99 ms", latencies[1], _MAX_SINGLE_BESIDE_MS),
                Goal(f"{name}: the rate left to the bulk to its own", left / throughput, 1.05),
            ]
    return Report(
        f"A single stop every 50 ms, at a shared rate of {rate:g}",
        ["shared", "beside", "p50 ms", "p99 ms", "longest ms", "bulk/s"],
        rows,
        goals,
    )


def _throughput(team: Sequence[Figures], seconds: float) -> float:
    """Return the targets stopped in a second while there were single stops as well."""
    times = [at - SINGLES_FROM for figures in team for at in figures.stopped_at]
    return sum(0.0 < at <= seconds for at in times) / seconds


# Faults of the store

_Fault = Callable[[RedisServer, float], None]


def _until(start: float, seconds: float) -> None:
    time.sleep(max(start + seconds - time.monotonic(), 0.0))


def _kill(store: RedisServer, start: float) -> None:
    _until(start, 4.0)
    store.kill()


def _suspend(store: RedisServer, start: float) -> None:
    _until(start, 4.0)
    store.suspend()


def _kill_and_restart(store: RedisServer, start: float) -> None:
    _kill(store, start)
    _until(start, 7.0)
    store.restart()


def _suspend_and_resume(store: RedisServer, start: float) -> None:
    _suspend(store, start)
    _until(start, 7.0)
    store.resume()


def _never_there(store: RedisServer, start: float) -> None:
    del store, start


_FAULTS: dict[str, _Fault] = {
    "SIGKILL at 4 s": _kill,
    "SIGSTOP at 4 s": _suspend,
    "SIGKILL at 4 s, empty again at 7 s": _kill_and_restart,
    "SIGSTOP from 4 s to 7 s": _suspend_and_resume,
    "never there": _never_there,
}


def _faults(stores: Sequence[str]) -> Report:
    limit, processes = _LIMITS["limit"], 4
    ideal = (limit.targets - BURST) / limit.accepted
    rows: list[list[str | float]] = []
    goals = []
    for name in stores:
        for fault, cause in _FAULTS.items():
            with (
                emulator_in_a_thread() as emulator,
                nginx(emulator.url, rate=limit.accepted) as limited,
                redis_server(_program(name)) as store,
            ):
                aliases = [f"crm-{number}" for number in range(limit.targets)]
                for alias in aliases:
                    emulator.add_runtime(WORKSPACE, alias)
                if cause is _never_there:
                    store.kill()
                tasks = _tasks(limited.url, limit.targets, processes, limit.rate, store.url)
                team = members(tasks, partial(cause, store))
                running = sum(emulator.status(WORKSPACE, alias) != "stopped" for alias in aliases)
            results = sum((Counter(figures.results) for figures in team), Counter[str]())
            seconds, gap = max(figures.seconds for figures in team), longest_gap(team)
            untrue = limit.targets - results[StopResult.STOPPED] + running
            share = 100 * limited.throttled_share
            rows.append([f"{name}: {fault}", seconds / ideal, share, gap, results.total(), untrue])
            goals += [
                Goal(f"{name}: {fault}: longest gap s", gap, _MAX_GAP),
                Goal(f"{name}: {fault}: outcomes missing or untrue", untrue, 0),
            ]
    return Report(
        f"{limit.targets:,} stops by {processes} processes, at a shared rate of {limit.rate:g}",
        ["store", "to ideal", "% 429", "longest gap s", "outcomes", "missing or untrue"],
        rows,
        goals,
    )


def _compare(part: str, store: str, processes: str, rounds: int) -> Report:
    stores = store.split(",")
    counts = [int(count) for count in processes.split(",")]
    if part in _LIMITS:
        return _behind_a_limit(_LIMITS[part], stores, counts)
    if part == "cpu":
        return _cpu(stores, rounds)
    if part == "singles":
        return _singles(stores)
    if part == "faults":
        return _faults([name for name in stores if name in _PROGRAMS])
    raise SystemExit(f"unknown part {part!r}")


if __name__ == "__main__":
    command(
        __doc__,
        _compare,
        work,
        part="limit",
        store="file,redis,valkey",
        processes="1,2,4,8",
        rounds=5,
    )
