"""CPU time of the client process per stop, by client and loop, with and without TLS.

`python tests/benchmarks/stop.py [--stops 3000] [--rounds 9] [--only TEXT]`

Each ratio is to the client named, on the same loop, with or without TLS like it, and
with as many stops in flight. With `--only`, just the cases with TEXT in their name are
measured, such as "asyncio", "uvloop, TLS" or "pyreqwest".
"""

from __future__ import annotations

from statistics import median

import contenders
import msgspec
from contenders import Contender
from harness import (
    Goal,
    Report,
    Row,
    certificate,
    command,
    in_rounds,
    installed,
    measured,
    ratio,
    run,
    server,
)

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
_PACKAGES = {
    _PYREQWEST: "pyreqwest",
    "httpx + msgspec": "httpx",
    "bctrl AsyncBctrl": "bctrl",
}


class _Case(msgspec.Struct, frozen=True):
    client: str
    loop: str = "asyncio"
    tls: bool = False
    share: float = 1.0  # Slow clients make fewer stops.

    @property
    def name(self) -> str:
        return f"{self.client}, {self.loop}{', TLS' if self.tls else ''}"

    @property
    def missing(self) -> list[str]:
        needed = [_PACKAGES.get(self.client), self.loop]
        return [
            name
            for name in needed
            if name not in {None, "asyncio"} and not installed(name)
        ]


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


def _child(client: str, loop: str, url: str, stops: str, in_flight: str) -> float:
    stopping = contenders.cpu_of_stop(_CLIENTS[client], url, int(stops), int(in_flight))
    return run(stopping, loop)


def _times(cases: list[_Case], stops: int, rounds: int) -> dict[_Run, list[float]]:
    with certificate() as (trusted, own), server() as plain, server(own) as tls:

        def measure(case: _Case, in_flight: int) -> float:
            url, count = tls if case.tls else plain, round(stops * case.share)
            return measured(
                *(case.client, case.loop, url, count, in_flight),
                kind=float,
                environment={"SSL_CERT_FILE": str(trusted)} if case.tls else {},
            )

        runs = [(case, in_flight) for in_flight in _IN_FLIGHT for case in cases]
        return in_rounds(runs, rounds, lambda case: measure(*case))


def _compare(stops: int, rounds: int, only: str) -> Report:
    cases = [case for case in _CASES if only in case.name]
    times = _times([case for case in cases if not case.missing], stops, rounds)

    def to(case: _Case, in_flight: int, client: str, loop: str) -> float | None:
        peer = times.get((_Case(client, loop, case.tls), in_flight))
        return None if peer is None else ratio(times[case, in_flight], peer)

    def row(case: _Case, in_flight: int) -> Row:
        column = times[case, in_flight]
        ratios = [
            *(to(case, in_flight, peer, case.loop) for peer in _PEERS),
            to(case, in_flight, case.client, "asyncio"),
        ]
        shown = ["-" if value is None else value for value in ratios]
        return [case.name, in_flight, median(column), min(column), *shown]

    return Report(
        "CPU time of the client process per stop",
        [
            "client",
            "in flight",
            "median µs",
            "min µs",
            "to bare",
            "to pyreqwest",
            "to asyncio",
        ],
        [row(*case) for case in times],
        [
            Goal(f"{case.name}, {in_flight} in flight, to {peer}", found, limit)
            for case, in_flight, limits in _GOALS
            for peer, limit in limits.items()
            if (case, in_flight) in times
            if (found := to(case, in_flight, peer, case.loop)) is not None
        ],
        [
            contenders.NO_WORKSPACES,
            *(
                f"{case.name}: skipped, {' '.join(case.missing)} is not installed."
                for case in cases
                if case.missing
            ),
        ],
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, stops=3_000, rounds=9, only="")
