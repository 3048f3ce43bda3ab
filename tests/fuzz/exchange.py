"""Make the stops of a case on connections in memory, in virtual time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import cast
from unittest.mock import patch

from aiohttp.client_proto import ResponseHandler
from sim.loop import SimLoop
from sim.network import Network
from sim.transport import Endpoint
from support.virtual_time import StuckError

from bctrl_async import BctrlError, BctrlSession, RetryPolicy, Runtime
from bctrl_async.observer import Attempt, AttemptObserver, Observer, StopObserver
from fuzz.answers import KEY, TIMEOUT, Case, Ending, Packet

_LIMIT = 1000.0
"""Virtual seconds after which a case counts as stuck."""
_SOONER = 0.0005
"""Seconds that are less than those before any answer."""
_APART = 0.0001
_QUIET = 0.05
"""Seconds after which everything has happened that follows from the last packet."""


@dataclass
class Seen:
    """All that can be seen of a case.

    Attributes:
        results: The result of each stop: a Runtime or an error, and the seconds it
            took.
        requests: The bytes of each request, with the number of its connection.
        kept: The connections that the client has kept for another request, before each
            stop that follows a pause, and at the end.
        events: What an observer was told.
        complaints: What the event loop reported, and what was left behind.
    """

    results: list[str] = field(default_factory=list)
    requests: list[tuple[int, bytes]] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class _Recorder(Observer, StopObserver):
    """An observer of stops that records what it is told."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        self._events.append(f"{workspace_id}/{alias}")
        return self

    def begin_attempt(self, attempt: Attempt) -> AttemptObserver:
        self._events.append(f"attempt {attempt.number}: {attempt.method} {attempt.url}")
        return _AttemptRecorder(self._events)


class _AttemptRecorder(AttemptObserver):
    def __init__(self, events: list[str]) -> None:
        self._events = events

    def headers(self) -> dict[str, str]:
        return {"traceparent": "00-1-2-01"}

    def answered(self, status: int) -> None:
        self._events.append(f"answered {status}")

    def end(self, error: BaseException | None) -> None:
        self._events.append(f"ended {error!r}")


class _Connection:
    def __init__(self, server: _Server, number: int) -> None:
        self.number = number
        self.client = Endpoint(server.loop, self._receive, lambda _: None)
        self._server = server
        self._received = b""

    def open(self, protocol: asyncio.Protocol) -> None:
        self.client.protocol = protocol
        protocol.connection_made(self.client)
        if greeting := self._server.case.greeting:
            self.client.receive(greeting)
        if interruption := self._server.case.interruption:
            self._server.loop.call_later(_SOONER, self._deliver, [interruption])

    def _receive(self, data: bytes) -> None:
        self._received += data
        if self._received.endswith(b"\r\n\r\n"):
            self._server.requests.append((self.number, self._received))
            self._received = b""
            self._send(self._server.case.stops[len(self._server.requests) - 1].answer)

    def _send(self, packets: list[Packet]) -> None:
        # They are in the order of the requests, where packets of several arrive at a
        # time.
        arrives = self._server.loop.time() + len(self._server.requests) * _APART
        together: list[bytes | Ending] = []
        for packet in packets:
            if packet.wait:
                together = []
                arrives += packet.wait
                self._server.loop.call_at(arrives, self._deliver, together)
            together.append(packet.data)

    def _deliver(self, together: Sequence[bytes | Ending]) -> None:
        for data in together:
            if data is Ending.RESET:
                self.client.reset()
            elif not self.client.closing:
                self.client.receive(None if data is Ending.CLOSE else data)


class _Server:
    """The network of a loop, to a server that sends the answers of a case."""

    def __init__(self, loop: SimLoop, case: Case) -> None:
        self.loop = loop
        self.case = case
        self._connecting = list(case.connecting)
        self.requests: list[tuple[int, bytes]] = []
        self.connections: list[_Connection] = []

    async def connect(self, sock: socket.socket) -> None:
        del sock
        delay = self._connecting.pop(0) if self._connecting else 0.0
        if delay is None:
            raise ConnectionRefusedError(111, "Connection refused")
        if delay:
            await asyncio.sleep(delay)

    async def open(
        self, make_protocol: Callable[[], asyncio.Protocol], sock: socket.socket
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        sock.close()
        protocol = make_protocol()
        connection = _Connection(self, len(self.connections))
        self.connections.append(connection)
        connection.open(protocol)
        return connection.client, protocol

    @property
    def kept(self) -> list[int]:
        # aiohttp closes some only when they are to be used again.
        return [
            connection.number
            for connection in self.connections
            if isinstance(connection.client.protocol, ResponseHandler)
            and not connection.client.closing
            and not connection.client.protocol.should_close
        ]


def run(case: Case) -> Seen:
    """Make the stops of a case the way that is open; return what was seen."""
    loop = SimLoop(_LIMIT)
    server = _Server(loop, case)
    loop.network = cast("Network", server)
    seen = Seen(requests=server.requests)
    loop.set_exception_handler(
        lambda _, context: seen.complaints.append(
            f"{context.get('message')} {context.get('exception')!r}"
        )
    )
    with (
        closing(loop),
        patch("time.monotonic", loop.time),
        patch("aiohttp.connector.monotonic", loop.time),
    ):
        try:
            loop.run_until_complete(_stop(case, server, seen))
        except StuckError as error:
            seen.complaints.append(str(error))
        seen.complaints += map(repr, asyncio.all_tasks(loop))
        seen.complaints += (
            f"connection {connection.number} is left open"
            for connection in server.connections
            if not connection.client.closing
        )
    return seen


async def _stop(case: Case, server: _Server, seen: Seen) -> None:
    policy = RetryPolicy(attempts=1, patience=0)
    async with BctrlSession(
        KEY,
        base_url="http://127.0.0.1:9",
        timeout=TIMEOUT,
        retry=policy,
        observer=_Recorder(seen.events) if case.observed else None,
    ) as session:
        closer = None
        if case.closed is not None:
            closer = asyncio.create_task(_close(session, case.closed))
        for index, stop in enumerate(case.stops):
            began = server.loop.time()
            stopping = asyncio.create_task(
                session.stop_runtime("ws-1", f"r{index}", headers=stop.headers)
            )
            if stop.cancelled is not None:
                server.loop.call_later(stop.cancelled, stopping.cancel)
            await asyncio.wait([stopping])
            # The ways differ in the steps of the event loop that they take.
            took = f"after {server.loop.time() - began:.3f} s"
            seen.results.append(f"{_result_of(stopping, seen)}, {took}")
            if stop.pause:
                await asyncio.sleep(stop.pause)
                seen.kept.append(server.kept)
        await asyncio.sleep(_QUIET)
        seen.kept.append(server.kept)
    if closer is not None:
        await closer
    await asyncio.sleep(_QUIET)


async def _close(session: BctrlSession, delay: float) -> None:
    await asyncio.sleep(delay)
    await session.close()


def _result_of(stopping: asyncio.Task[Runtime], seen: Seen) -> str:
    if stopping.cancelled():
        return "cancelled"
    error = stopping.exception()
    if error is None:
        return repr(stopping.result())
    if not isinstance(error, BctrlError):
        seen.complaints.append(f"a stop raised {error!r}")
    return _describe(error)


def _describe(error: BaseException) -> str:
    text = f"{type(error).__qualname__}: {error}: {error!r}"
    if isinstance(error, BctrlError):
        known = dict(vars(error))
        if known["retry_after"] is not None:
            # The limiter's depends on the step of the event loop.
            known["retry_after"] = round(known["retry_after"], 3)
        text = f"{type(error).__qualname__}: {error}: {known}"
    cause = error.__cause__
    return text if cause is None else f"{text}\n    from {_describe(cause)}"
