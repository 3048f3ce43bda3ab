"""A bulk stop of runtimes that take their time to end, against a server beside it.

`python tests/benchmarks/slow_stops.py [--targets 100000] [--takes 5]` stops the targets
in one workspace for each thousand, at once and with the time they take, and measures
the memory, the stalls of the event loop, and the requests for each target. The server
answers every request at once, and lists what it was asked to stop.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import contenders
import msgspec
from harness import Figures, Goal, Report, command, figures_of, measured, run
from server import RUNTIME

from bctrl_async import BctrlSession

_IN_FLIGHT = 100
_PER_WORKSPACE = 1_000
_ACTIVE = RUNTIME.replace(b'"stopped"', b'"active"').replace(b"\n", b"")
_STOPPED = RUNTIME.replace(b"\n", b"")


class Counts(msgspec.Struct, frozen=True):
    """The figures of a client, and the counts of its server."""

    figures: Figures
    requests: int
    last_stop: float
    """Seconds from the first stop to the last."""


class _Server(asyncio.Protocol):
    """A server whose runtimes end so many seconds after their stop."""

    takes = 0.0
    stops: ClassVar[defaultdict[bytes, dict[bytes, float]]] = defaultdict(dict)
    requests = 0
    first_stop = last_stop = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._unread = b""

    def data_received(self, data: bytes) -> None:
        unread = self._unread + data
        while b"\r\n\r\n" in unread:
            head, _, unread = unread.partition(b"\r\n\r\n")
            body = self._answer(head)
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
        self._unread = unread

    def _answer(self, head: bytes) -> bytes:
        method, path, _ = head.split(b" ", 2)
        if path == b"/counts":
            seconds = _Server.last_stop - _Server.first_stop
            return b"[%d,%f]" % (_Server.requests, seconds)
        _Server.requests += 1
        now = time.monotonic()
        parts = path.split(b"/")
        stops = _Server.stops[parts[3]]
        if len(parts) == 5:
            items = (self._runtime(alias, end, now) for alias, end in stops.items())
            return b'{"runtimes":[%b]}' % b",".join(items)
        alias = parts[5]
        if method == b"POST":
            stops.setdefault(alias, now + _Server.takes)
            _Server.last_stop = now
            _Server.first_stop = _Server.first_stop or now
        return self._runtime(alias, stops[alias], now)

    def _runtime(self, alias: bytes, end: float, now: float) -> bytes:
        return (_STOPPED if now >= end else _ACTIVE) % alias


async def _serve(takes: float) -> None:
    _Server.takes = takes
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Server, "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


@contextmanager
def _serving(takes: float) -> Iterator[str]:
    arguments = [sys.executable, __file__, "--measure", "serve", str(takes)]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.communicate()


def _targets(count: int) -> Iterator[tuple[str, str]]:
    for number in range(count):
        yield f"ws-{number // _PER_WORKSPACE}", f"r{number}"


async def _stop(url: str, targets: int) -> int:
    async with BctrlSession(
        contenders.KEY, base_url=url, max_connections=_IN_FLIGHT
    ) as session:
        report = await session.stop_runtimes(_targets(targets))
    return report.not_running


async def _counts(url: str) -> tuple[int, float]:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", int(url.rpartition(":")[2])
    )
    writer.write(b"GET /counts HTTP/1.1\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.rpartition(b": ")[2])
    body = await reader.readexactly(length)
    writer.close()
    return msgspec.json.decode(body, type=tuple[int, float])


def _child(task: str, *arguments: str) -> object:
    if task == "serve":
        return run(_serve(float(arguments[0])))
    url, targets = arguments[0], int(arguments[1])
    figures = run(figures_of(_stop(url, targets), targets))
    return Counts(figures, *asyncio.run(_counts(url)))


def _compare(targets: int, takes: int) -> Report:
    counts: dict[int, Counts] = {}
    for seconds in (0, takes):
        with _serving(seconds) as url:
            counts[seconds] = measured("stop", url, targets, kind=Counts)
    at_once, slow = counts[0], counts[takes]
    return Report(
        f"{targets:,} runtimes, {_PER_WORKSPACE:,} in each workspace, "
        f"{_IN_FLIGHT} in flight",
        [
            "end after s",
            "last stop s",
            "s",
            "requests",
            "peak MiB",
            "stall ms",
            "CPU µs",
        ],
        [
            [
                str(seconds),
                each.last_stop,
                each.figures.seconds,
                each.requests / targets,
                each.figures.mebibytes,
                each.figures.stall,
                each.figures.cpu,
            ]
            for seconds, each in counts.items()
        ],
        [
            Goal("last stop, to at once", slow.last_stop / at_once.last_stop, 1.2),
            Goal("requests for each", slow.requests / targets, 1.2),
            Goal(
                "seconds after the last stop beyond the time to end",
                slow.figures.seconds - slow.last_stop - takes,
                5.0,
            ),
        ],
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, targets=100_000, takes=5)
