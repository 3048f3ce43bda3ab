"""Connections in memory: transports, and the pipes between them."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from sim.exchange import Conditions, Exchange


class Segment(NamedTuple):
    arrives: float
    data: bytes | None
    """None ends the connection."""
    exchange: Exchange | None
    own: int


class Pipe:
    """One direction of a connection: segments arrive in order, each after its latency.

    Args:
        loop: The loop.
        conditions: The faults of the network, which may change.
        rng: The source of chance.
        deliver: Called with each segment that arrives.

    Attributes:
        silent_from: The time from which nothing arrives.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        conditions: Callable[[], Conditions],
        rng: random.Random,
        deliver: Callable[[Segment], None],
    ) -> None:
        self._loop = loop
        self._conditions = conditions
        self._rng = rng
        self._deliver = deliver
        self.silent_from = math.inf
        self._segments: deque[Segment] = deque()
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def send(
        self,
        data: bytes | None,
        exchange: Exchange | None = None,
        *,
        stray: bytes = b"",
    ) -> None:
        conditions, rng = self._conditions(), self._rng
        cuts = [0]
        if data and not stray and rng.random() < conditions.cut:
            cuts += sorted(rng.randrange(len(data)) for _ in range(rng.randint(1, 4)))
        for start, end in itertools.pairwise([*cuts, len(data or b"")]):
            if data and start == end:
                continue
            arrives = self._loop.time() + conditions.latency(rng)
            self._last = max(self._last, conditions.reachable_at(arrives))
            part = None if data is None else data[start:end]
            own = 0 if exchange is None else end - start
            self._segments.append(
                Segment(
                    self._last, None if part is None else part + stray, exchange, own
                )
            )
        if self._timer is None:
            self._schedule()

    def _schedule(self) -> None:
        self._timer = self._loop.call_at(self._segments[0].arrives, self._arrive)

    def _arrive(self) -> None:
        segment = self._segments.popleft()
        self._timer = None
        if self._segments:
            self._schedule()
        if segment.arrives < self.silent_from:
            self._deliver(segment)

    def drop(self) -> None:
        """Drop everything that is on its way."""
        self._segments.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Endpoint(asyncio.Transport):
    """One end of a connection, the client's or the server's."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        write: Callable[[bytes], None],
        leave: Callable[[bool], None],
    ) -> None:
        super().__init__()
        self._loop = loop
        self._write = write
        self._leave = leave
        self.protocol: asyncio.Protocol | None = None
        self.closing = False
        self._paused = False
        self._backlog: deque[bytes | None] = deque()

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        return ("127.0.0.1", 1) if name in {"peername", "sockname"} else default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.closing:
            self._write(bytes(data))

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self._end(reset=False)

    def abort(self) -> None:
        self._end(reset=True)

    def _end(self, *, reset: bool) -> None:
        if not self.closing:
            self.closing = True
            self._leave(reset)
            self._loop.call_soon(self._lost, None)

    def _lost(self, error: Exception | None) -> None:
        protocol, self.protocol = self.protocol, None
        if protocol is not None:
            protocol.connection_lost(error)

    def is_reading(self) -> bool:
        return not self._paused

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        while self._backlog and not self._paused:
            self.receive(self._backlog.popleft())

    def receive(self, data: bytes | None) -> None:
        """Pass data to the protocol; None is the end of the stream."""
        if self._paused:
            self._backlog.append(data)
        elif self.protocol is None or self.closing:
            return
        elif data is not None:
            self.protocol.data_received(data)
        elif not self.protocol.eof_received():
            self.close()

    def reset(self) -> None:
        """Lose the connection because the peer reset it."""
        if not self.closing:
            self.closing = True
            self._loop.call_soon(
                self._lost, ConnectionResetError(104, "Connection reset by peer")
            )
