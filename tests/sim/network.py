"""A network in memory, whose segments are late, cut, lost or reset by a seed.

Before the server stands a gateway that sees whole requests and whole answers, as a
reverse proxy does: it may answer by itself, lose an answer, or send one too many.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import re
import socket
from collections import deque
from collections.abc import Callable
from urllib.parse import unquote

from sim.exchange import Action, Conditions, Exchange, Fate, Stray
from sim.loop import SimLoop
from sim.transport import Endpoint, Pipe, Segment

_PATH = re.compile(rb"(\w+) /v1/workspaces/([^/ ]+)/runtimes(?:/([^/ ]+))?(?:/stop)? ")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STATUS = slice(9, 12)


class Connection:
    """A connection of the client, with the gateway in it."""

    def __init__(self, network: Network, number: int) -> None:
        self.network = network
        self.number = number
        self.rng = rng = random.Random(network.seed * 1_000_003 + number)
        self.client = Endpoint(network.loop, self._request, self._client_left)
        self.server = Endpoint(network.loop, self._respond, self._server_left)

        def conditions() -> Conditions:
            return network.conditions

        self._up = Pipe(network.loop, conditions, rng, self._arrive_at_gateway)
        self._down = Pipe(network.loop, conditions, rng, self._arrive_at_client)
        self._accepted = False
        self._head = b""
        self._serving: deque[Exchange] = deque()
        self._stray: Stray | None = None
        self.current: Exchange | None = None
        if rng.random() < network.conditions.half_open:
            silent_from = network.loop.time() + 10 ** rng.uniform(-3.0, 0.5)
            self._up.silent_from = self._down.silent_from = silent_from

    def open(self, protocol: asyncio.Protocol) -> None:
        self.client.protocol = protocol
        self._up.send(b"")  # SYN
        protocol.connection_made(self.client)

    def reset(self) -> None:
        """Cut the connection at both ends."""
        self.network.log(self.number, "reset")
        self._up.drop()
        self._down.drop()
        self.server.reset()
        self.client.reset()

    # The client's side

    def _request(self, data: bytes) -> None:
        found = _PATH.match(data)
        assert found, data
        assert data.endswith(b"\r\n\r\n"), data
        method, workspace, alias = found.groups()
        target = unquote(workspace.decode()), unquote((alias or b"").decode())
        network = self.network
        exchange = Exchange(
            self.number,
            method.decode(),
            target,
            len(data),
            network.loop.time(),
            network.loop.step,
        )
        self.current = exchange
        network.exchanges.append(exchange)
        network.log(self.number, f"-> {exchange.method} {'/'.join(target)}")
        if self._stray is not None and self._stray.moment == "next request":
            stray, self._stray = self._stray, None
            network.loop.call_soon(self._deliver_stray, stray)
        self._up.send(data, exchange)

    def _client_left(self, reset: bool) -> None:  # noqa: FBT001 - a callback.
        self._down.drop()
        self.network.log(self.number, "client aborts" if reset else "client closes")
        self._up.send(None)

    def _arrive_at_client(self, segment: Segment) -> None:
        if self.client.closing:
            return
        exchange = segment.exchange
        if exchange is not None:
            exchange.delivered += segment.own
            now = self.network.loop.time()
            if exchange.status is None and exchange.delivered >= exchange.head:
                exchange.status = exchange.coming
            if exchange.delivered >= exchange.total:
                exchange.answered = now
                self.network.log(
                    self.number, f"<- {exchange.status} {'/'.join(exchange.target)}"
                )
                self.network.on_answer(exchange)
        elif segment.data is None:
            self.network.log(self.number, "server closes")
        if (
            exchange is not None
            and exchange is self.current
            and exchange.answered is not None
        ):
            self.current = None
        self.client.receive(segment.data)
        if (
            self.current is None
            and self._stray is not None
            and self._stray.moment == "idle"
        ):
            stray, self._stray = self._stray, None
            # Within a few steps of the loop, or after a while.
            delay = 10 ** self.rng.uniform(-6.0, -1.0)
            self.network.loop.call_later(delay, self._deliver_stray, stray)

    def _deliver_stray(self, stray: Stray) -> None:
        """Deliver an answer too many, unless it could pass for a real answer."""
        current = self.current
        # The bytes of a stream keep their order, so nothing comes into the middle of an
        # answer.
        may_come = current is None or (
            not current.delivered and stray.about not in {None, current.target}
        )
        if not self.client.closing and may_come:
            self.network.log(
                self.number, f"<- stray {_summary(stray.page)} ({stray.moment})"
            )
            self.network.strays += 1
            self.client.receive(stray.page)

    # The gateway's side

    def _arrive_at_gateway(self, segment: Segment) -> None:
        network = self.network
        if segment.data is None:
            self.server.receive(None)
            return
        if self.server.closing or network.conditions.is_dead(network.loop.time()):
            self.reset()
            return
        if not self._accepted:
            self._accepted = True
            self.server.protocol = protocol = network.accept()
            protocol.connection_made(self.server)
        exchange = segment.exchange
        if exchange is None:
            return
        self._head += segment.data
        if len(self._head) < exchange.size:
            return
        head, self._head = self._head, b""
        action = network.conditions.decide(exchange, self.rng, network.loop.time())
        if action.delay:
            network.log(self.number, f"delayed by {action.delay:.3f} s")
            network.loop.call_later(action.delay, self._act, exchange, head, action)
        else:
            self._act(exchange, head, action)

    def _act(self, exchange: Exchange, head: bytes, action: Action) -> None:
        if self.server.closing or self.server.protocol is None:
            return
        exchange.answer = action.answer
        exchange.replacement = action.page
        if action.request is Fate.PASS or self._serving:
            # The gateway does not answer while the server is at an earlier request, as
            # after a stray answer.
            exchange.passed = True
            self._serving.append(exchange)
            self.server.receive(head)
            return
        self.network.log(self.number, f"the request {action.request.value}")
        if action.request is Fate.ANSWER:
            exchange.page, exchange.foreign = True, action.foreign
            self._serving.append(exchange)
            self._respond(action.page)
        else:
            self._lose(action.request)

    def _lose(self, fate: Fate) -> None:
        if fate is Fate.RESET:
            self.reset()
        elif fate is Fate.CLOSE:
            self._down.send(None)

    def _respond(self, data: bytes) -> None:
        exchange = self._serving[0]
        if not exchange.total:
            _measure(exchange, data)
        exchange.sent += len(data)
        if exchange.sent >= exchange.total:
            self._serving.popleft()
        if exchange.answer is Fate.REPLACED:
            if exchange.sent < exchange.total:
                return
            self.network.log(self.number, f"the answer {exchange.answer.value}")
            exchange.page = exchange.foreign = True
            data = exchange.replacement
            _measure(exchange, data)
        elif exchange.answer is not Fate.PASS:
            if exchange.sent >= exchange.total:
                self.network.log(self.number, f"the answer {exchange.answer.value}")
                self._lose(exchange.answer)
            return
        stray = None
        if exchange.sent >= exchange.total:
            stray = self.network.conditions.stray(self.rng)
        if stray is None:
            self._down.send(data, exchange)
        elif stray.moment == "same segment":
            self.network.log(
                self.number, f"stray {_summary(stray.page)} ({stray.moment})"
            )
            self.network.strays += 1
            self._down.send(data, exchange, stray=stray.page)
        else:
            self._down.send(data, exchange)
            self._stray = stray

    def _server_left(self, reset: bool) -> None:  # noqa: FBT001 - a callback.
        if reset:
            self.client.reset()
        else:
            self._down.send(None)


class Network:
    """All connections between the client and the server.

    Args:
        loop: The loop.
        seed: The seed of every random choice.
        conditions: The faults.

    Attributes:
        connections: The connections that were opened.
        exchanges: Every request that the client wrote, in order.
        strays: The number of stray answers that were sent.
        trace: What happened: time, connection, event.
        on_answer: Called with each exchange whose answer was delivered.
    """

    def __init__(self, loop: SimLoop, seed: int, conditions: Conditions) -> None:
        self.loop = loop
        self.seed = seed
        self.conditions = conditions
        self.connections: list[Connection] = []
        self.exchanges: list[Exchange] = []
        self.strays = 0
        self.trace: list[tuple[float, int, str]] = []
        self.connections_open: list[Connection] = []
        self.connecting = 0
        self.on_answer: Callable[[Exchange], None] = lambda _: None
        self._rng = random.Random(seed + 1)
        self._numbers = itertools.count(1)
        self._pending: dict[socket.socket, Connection] = {}
        self._make_server: Callable[[], asyncio.Protocol] | None = None

    def log(self, connection: int, event: str) -> None:
        """Add an event to the trace; connection 0 is none."""
        self.trace.append((self.loop.time(), connection, event))

    def listen(
        self, make_server: Callable[[], asyncio.Protocol], host: str, port: int
    ) -> Listener:
        self._make_server = make_server
        return Listener(self, host, port)

    def stop_listening(self) -> None:
        self._make_server = None

    def accept(self) -> asyncio.Protocol:
        assert self._make_server is not None
        return self._make_server()

    async def look_up(self) -> None:
        """Take the time of a DNS lookup, or fail as lookups do."""
        await asyncio.sleep(self.conditions.latency(self._rng))
        if self._rng.random() < self.conditions.lookup_fails:
            self.log(0, "the DNS lookup fails")
            raise socket.gaierror(
                socket.EAI_AGAIN, "Temporary failure in name resolution"
            )

    def _take_descriptor(self) -> None:
        """Raise an error if the client's machine can hold no more connections."""
        self.connections_open = [
            connection
            for connection in self.connections_open
            if not connection.client.closing
        ]
        in_use = len(self.connections_open) + self.connecting
        if in_use >= self.conditions.descriptors:
            self.log(0, f"no file descriptor is left beside {in_use}")
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def connect(self, sock: socket.socket) -> None:
        """Connect a socket to the server, or refuse, or be silent."""
        self._take_descriptor()
        self.connecting += 1
        try:
            await self._connect(sock)
        finally:
            self.connecting -= 1

    async def _connect(self, sock: socket.socket) -> None:
        number, conditions, loop = next(self._numbers), self.conditions, self.loop
        connection = Connection(self, number)
        if connection.rng.random() < conditions.connect_silence:
            self.log(number, "connecting is met with silence")
            await loop.create_future()
        arrives = conditions.reachable_at(
            loop.time() + conditions.latency(connection.rng)
        )
        await asyncio.sleep(arrives - loop.time())
        if (
            self._make_server is None
            or conditions.is_dead(loop.time())
            or connection.rng.random() < conditions.refuse
        ):
            self.log(number, "the connection is refused")
            raise ConnectionRefusedError(111, "Connection refused")
        self._pending[sock] = connection

    async def open(
        self, make_protocol: Callable[[], asyncio.Protocol], sock: socket.socket
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """Open the connection of a connected socket, in the steps of asyncio."""
        connection = self._pending.pop(sock)
        sock.close()
        protocol = make_protocol()
        # See `runner`: its place in the sets of aiohttp.
        protocol.number = connection.number  # type: ignore[attr-defined]
        made = self.loop.create_future()
        self.loop.call_soon(connection.open, protocol)
        self.loop.call_soon(_resolve, made)
        self.connections.append(connection)
        self.connections_open.append(connection)
        self.log(connection.number, "connected")
        try:
            await made
        except BaseException:
            connection.client.close()
            raise
        return connection.client, protocol

    def crash(self) -> None:
        """Reset every connection, as a server that dies does."""
        self.log(0, "the server dies")
        for connection in self.connections:
            if not connection.client.closing:
                connection.reset()


class Listener:
    """A listening socket: the part of `asyncio.Server` that the emulator uses."""

    def __init__(self, network: Network, host: str, port: int) -> None:
        self._network = network
        self._address = host, port

    @property
    def sockets(self) -> list[Listener]:
        return [self]

    def getsockname(self) -> tuple[str, int]:
        return self._address

    def close(self) -> None:
        self._network.stop_listening()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _measure(exchange: Exchange, data: bytes) -> None:
    """Read the size and the status of an answer from its head."""
    exchange.head = data.index(b"\r\n\r\n") + 4
    length = _LENGTH.search(data, 0, exchange.head)
    assert length, data
    exchange.total = exchange.head + int(length[1])
    exchange.coming = int(data[_STATUS])


def _summary(page: bytes) -> str:
    return (
        page.partition(b"\r\n")[0].decode() + " " + page[-60:].decode(errors="replace")
    )
