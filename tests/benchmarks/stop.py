"""CPU time of the client process per stop, by client and event loop, with and without TLS.

`python tests/benchmarks/stop.py [--stops 3000] [--rounds 9] [--only TEXT] [--json]`

Each ratio is to the client named, on the same loop, with or without TLS like it, and with as many
stops in flight. With `--only`, just the cases with TEXT in their name are measured, such as
"asyncio", "uvloop, TLS" or "pyreqwest".
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from statistics import median

import contenders
import msgspec
from contenders import Contender, Stop
from harness import Goal, Report, certificate, command, installed, measured, ratio, run, server

_WARM_UP = 500
_IN_FLIGHT = (1, 64)
_BARE, _OURS, _PYREQWEST = (
    "bare aiohttp + msgspec",
    "bctrl_async stop_runtime",
    "pyreqwest + msgspec",
)
_PEERS = (_BARE, _PYREQWEST)
_CLIENTS: dict[str, Contender] = {
    _BARE: contenders.bare,
    _OURS: contenders.bctrl_async,
    _PYREQWEST: contenders.pyreqwest,
    "httpx + msgspec": contenders.httpx,
    "bctrl AsyncBctrl": contenders.vendor,
}
_PACKAGES = {_PYREQWEST: "pyreqwest", "httpx + msgspec": "httpx", "bctrl AsyncBctrl": "bctrl"}


class _Case(msgspec.Struct, frozen=True):
    client: str
    loop: str = "asyncio"
    tls: bool = False
    share: float = 1.0  # Of the stops: slow clients make fewer.

    @property
    def name(self) -> str:
        return f"{self.client}, {self.loop}{', TLS' if self.tls else ''}"

    @property
    def missing(self) -> list[str]:
        needed = [_PACKAGES.get(self.client), self.loop, "trustme" if self.tls else None]
        return [name for name in needed if name not in {None, "asyncio"} and not installed(name)]


_CASES = [
    *(
        _Case(client, loop, tls)
        for loop in ("asyncio", "uvloop")
        for tls in (False, True)
        for client in (_BARE, _OURS, _PYREQWEST)
    ),
    _Case(_OURS, "aiofastnet"),
    _Case(_OURS, "aiofastnet", tls=True),
    _Case("httpx + msgspec", share=0.1),
    _Case("bctrl AsyncBctrl", share=0.1),
]
_GOALS = [
    # A case, the number in flight, and the highest ratio to each peer.
    (_Case(_OURS), 64, {_BARE: 0.50, _PYREQWEST: 0.70}),
    (_Case(_OURS), 1, {_BARE: 0.75, _PYREQWEST: 0.90}),
    (_Case(_OURS, "uvloop"), 64, {_BARE: 0.55, _PYREQWEST: 1.0}),
    (_Case(_OURS, tls=True), 64, {_BARE: 0.60, _PYREQWEST: 0.85}),
]

_Run = tuple[_Case, int]
"""A case and the number of stops in flight."""


async def _stop_many(stop: Stop, stops: int, in_flight: int) -> None:
    aliases = (f"crm-{number}" for number in range(stops))

    async def work() -> None:
        for alias in aliases:
            await stop(alias)

    await asyncio.gather(*(work() for _ in range(in_flight)))


async def _measure(contender: Contender, url: str, stops: int, in_flight: int) -> float:
    async with contender(url) as stop:
        await _stop_many(stop, _WARM_UP, in_flight)
        start = time.process_time()
        await _stop_many(stop, stops, in_flight)
        return (time.process_time() - start) / stops * 1e6


def _child(client: str, loop: str, url: str, stops: str, in_flight: str) -> float:
    return run(_measure(_CLIENTS[client], url, int(stops), int(in_flight)), loop)


def _time(runs: list[_Run], stops: int, rounds: int) -> dict[_Run, list[float]]:
    times: dict[_Run, list[float]] = {each: [] for each in runs}
    with ExitStack() as stack:
        urls = {False: stack.enter_context(server())}
        trust = {}
        if any(case.tls for case, _ in runs):
            trusted, own = stack.enter_context(certificate())
            urls[True] = stack.enter_context(server(certificate=own))
            trust["SSL_CERT_FILE"] = str(trusted)
        for _ in range(rounds):
            for case, in_flight in runs:
                task = (
                    case.client,
                    case.loop,
                    urls[case.tls],
                    round(stops * case.share),
                    in_flight,
                )
                took = measured(
                    *(__file__, "--measure", *map(str, task)),
                    kind=float,
                    environment=trust,
                )
                times[case, in_flight].append(took)
            # Many short rounds in alternating order, so that other load on the machine affects all
            # cases alike.
            runs.reverse()
    return times


def _compare(stops: int, rounds: int, only: str) -> Report:
    notes = ["AsyncBctrl stops a sandbox (POST /v1/sandboxes/{id}/stop): it has no workspaces."]
    cases = []
    for case in (case for case in _CASES if only in case.name):
        if case.missing:
            notes.append(f"{case.name}: skipped, {' '.join(case.missing)} is not installed.")
        else:
            cases.append(case)
    runs = [(case, in_flight) for in_flight in _IN_FLIGHT for case in cases]
    times = _time(list(runs), stops, rounds)

    def to(case: _Case, in_flight: int, client: str, loop: str) -> float | None:
        peer = times.get((_Case(client, loop, case.tls), in_flight))
        return None if peer is None else ratio(times[case, in_flight], peer)

    def row(case: _Case, in_flight: int) -> list[str | float]:
        column = times[case, in_flight]
        ratios = [
            *(to(case, in_flight, peer, case.loop) for peer in _PEERS),
            to(case, in_flight, case.client, "asyncio"),
        ]
        shown = ["-" if value is None else value for value in ratios]
        return [case.name, in_flight, median(column), min(column), *shown]

    return Report(
        "CPU time of the client process per stop",
        ["client", "in flight", "median µs", "min µs", "to bare", "to pyreqwest", "to asyncio"],
        [row(*each) for each in runs],
        [
            Goal(f"{case.name}, {in_flight} in flight, to {peer}", found, limit)
            for case, in_flight, limits in _GOALS
            for peer, limit in limits.items()
            if (case, in_flight) in times
            if (found := to(case, in_flight, peer, case.loop)) is not None
        ],
        notes,
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, stops=3_000, rounds=9, only="")
