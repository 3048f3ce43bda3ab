"""Bulk stops of which a few runtimes are behind a dead node, and a server that is down for a while.

`python tests/benchmarks/poison.py [--targets 1000] [--json]`

A poisoned runtime answers every request with a gateway's 502 or 503, with a reset, or never. Each
case has a client in a process of its own, whose attempts time out after a second.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator

import msgspec
from harness import Goal, Report, command, run
from yarl import URL

from bctrl_async import BctrlSession, StopOutcome, StopResult
from bctrl_async.emulator import Emulator, Fault, Reply

_WORKSPACE, _KEY = "ws-1", "emulator-key"
_TIMEOUT = 1.0
_DOWN_SECONDS = 6.0
_LATENCY = 0.1
_FAULTS: dict[str, Fault | Reply] = {
    "502": Fault.BAD_GATEWAY,
    "reset": Fault.DROP_BEFORE,
    "silence": Fault.HANG,
    "503": Reply(503, body="no healthy upstream"),
    "503, Retry-After 5": Reply(503, body="Backend fetch failed", headers={"Retry-After": "5"}),
}


class _Figures(msgspec.Struct, frozen=True):
    """The figures of one run; "others" are the targets that are not poisoned."""

    seconds: float
    unknown: int
    others_lost: int
    slowest_other: float
    attempts: int
    ended_early: str | None


class _Case(msgspec.Struct, frozen=True):
    fault: str
    targets: int
    poisoned: int
    goal: float | None
    """The most seconds; None if the time is not compared."""
    before: float
    """The seconds of 1,000 targets when the breaker knew no canary (commit c57baba), or when a 503
    was always throttling (commit aad35eb)."""
    goes_down: bool = False

    def __str__(self) -> str:
        outage = f", down for {_DOWN_SECONDS:g} s" if self.goes_down else ""
        return f"{self.poisoned} of {self.targets:,}, {self.fault}{outage}"


def _cases(targets: int) -> list[_Case]:
    few, fiftieth, fifth, many = targets // 200, targets // 50, targets // 5, 5 * targets
    return [
        _Case("502", targets, 1, 8, 62),
        _Case("reset", targets, 1, 8, 62),
        _Case("silence", targets, 1, 14, 67),
        _Case("503", targets, 1, 12, 300),
        _Case("503", targets, fiftieth, 20, 302),
        _Case("503, Retry-After 5", targets, few, 30, 1008),
        _Case("502", targets, fifth, 20, 489),
        _Case("reset", targets, fifth, 20, 492),
        _Case("silence", targets, fifth, 20, 433),
        _Case("502", many, many // 100, None, 317, goes_down=True),
        _Case("reset", many, many // 100, None, 319, goes_down=True),
        _Case("silence", many, many // 100, None, 325, goes_down=True),
    ]


def _aliases(targets: int, poisoned: int) -> Iterator[tuple[str, bool]]:
    """Yield each alias, and whether it is poisoned: evenly spread, and never the first."""
    step = targets // poisoned
    return ((f"r{number}", number % step == step // 2) for number in range(targets))


def _emulator(case: _Case, before: Emulator | None = None) -> Emulator:
    """Make the server of a case, or the same one after its outage."""
    latency = _LATENCY if case.goes_down else 0.0
    port = 0 if before is None else URL(before.url).port or 0
    emulator = Emulator(port=port, latency=latency)
    for alias, is_poisoned in _aliases(case.targets, case.poisoned):
        status = "active" if before is None else before.status(_WORKSPACE, alias) or "active"
        emulator.add_runtime(_WORKSPACE, alias, status=status)
        if is_poisoned:
            emulator.poison(_WORKSPACE, alias, _FAULTS[case.fault])
    return emulator


async def _go_down(emulator: Emulator, case: _Case) -> Emulator:
    while len(emulator.requests) < case.targets // 2:
        await asyncio.sleep(0.01)
    await emulator.close()
    again = _emulator(case, emulator)
    await asyncio.sleep(_DOWN_SECONDS)
    await again.start()
    return again


async def _figures(case: _Case) -> _Figures:
    emulator = _emulator(case)
    await emulator.start()
    task = ("--measure", emulator.url, str(case.targets), str(case.poisoned))
    client = await asyncio.create_subprocess_exec(
        sys.executable, __file__, *task, stdout=asyncio.subprocess.PIPE
    )
    if case.goes_down:
        emulator = await _go_down(emulator, case)
    output, _ = await client.communicate()
    await emulator.close()
    return msgspec.json.decode(output, type=_Figures)


async def _stop_all(url: str, targets: int, poisoned: int) -> _Figures:
    aliases = list(_aliases(targets, poisoned))
    others: Counter[StopResult] = Counter()
    slowest, attempts = 0.0, 0

    def count(outcome: StopOutcome) -> None:
        nonlocal slowest, attempts
        attempts += outcome.attempts
        _, is_poisoned = aliases[outcome.index]
        if not is_poisoned:
            others[outcome.result] += 1
            slowest = max(slowest, outcome.elapsed)

    async with BctrlSession(_KEY, base_url=url, timeout=_TIMEOUT) as session:
        report = await session.stop_runtimes(
            # A poisoned runtime would be polled for 30 s, whatever the run does before.
            [(_WORKSPACE, alias) for alias, _ in aliases],
            on_outcome=count,
            verify=False,
        )
    # A stop that took effect before its connection broke is found to have done so.
    lost = others.total() - others[StopResult.STOPPED] - others[StopResult.ALREADY_STOPPED]
    ended_early = report.ended_early
    return _Figures(
        report.elapsed,
        report.counts[StopResult.UNKNOWN],
        lost,
        slowest,
        attempts,
        None if ended_early is None else str(ended_early),
    )


def _child(url: str, targets: str, poisoned: str) -> _Figures:
    return run(_stop_all(url, int(targets), int(poisoned)))


def _goals(case: _Case, figures: _Figures) -> Iterator[Goal]:
    if case.goal is not None:
        yield Goal(f"{case}: seconds", figures.seconds, case.goal)
    if case.poisoned == 1 or case.fault.startswith("503"):
        yield Goal(f"{case}: seconds of the slowest other", figures.slowest_other, 4)
    yield Goal(f"{case}: unknown but not poisoned", abs(figures.unknown - case.poisoned), 0)
    yield Goal(f"{case}: others not stopped", figures.others_lost, 0)
    if case.goes_down:
        yield Goal(f"{case}: attempts per target", figures.attempts / case.targets, 1.1)


def _compare(targets: int) -> Report:
    measurements = {case: run(_figures(case)) for case in _cases(targets)}
    return Report(
        f"Bulk stops with poisoned runtimes, attempts of at most {_TIMEOUT:g} s",
        ["case", "s", "s before", "unknown", "others lost", "slowest other s", "attempts"],
        [
            [
                str(case),
                figures.seconds,
                case.before,
                figures.unknown,
                figures.others_lost,
                figures.slowest_other,
                figures.attempts / case.targets,
            ]
            for case, figures in measurements.items()
        ],
        [goal for case, figures in measurements.items() for goal in _goals(case, figures)],
        [
            f"{case} ended early: {figures.ended_early}"
            for case, figures in measurements.items()
            if figures.ended_early
        ],
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, targets=1_000)
