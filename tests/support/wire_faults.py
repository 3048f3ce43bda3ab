"""An emulator whose answers also break rules of HTTP, or are too large."""

from __future__ import annotations

import asyncio
import gzip
import random
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache
from typing import Any, cast

from aiohttp import web

from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.emulator._contract import Route, make_runtime
from bctrl_async.emulator._replies import Payload, response_to

_MIB = 2**20


class WireFault(StrEnum):
    """A fault of the normal answer to a stop; the runtime is stopped."""

    CLOSE_KEPT_ALIVE = "close_kept_alive"
    """The kept-alive connection closes after the answer."""
    SLOW_DRIP = "slow_drip"
    """The body arrives byte by byte in `fault_latency` seconds."""
    OVERSIZED = "oversized"
    """The Runtime has more than 2 MiB."""
    COMPRESSED_BOMB = "compressed_bomb"
    """The body is 64 KiB of gzip that unpack to 64 MiB of JSON."""
    STRAY_ANSWER = "stray_answer"
    """A surplus 403 follows in the same segment."""
    LATE_STRAY_ANSWER = "late_stray_answer"
    """A 200 about another runtime follows `fault_latency` seconds later."""


@cache
def bomb() -> Reply:
    """Return a 200 with the body of a compressed bomb."""
    body = gzip.compress(b'{"padding":"%b"}' % (b"x" * 64 * _MIB))
    return Reply(
        200,
        body=body,
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )


_PADDING = {"padding": "x" * 2 * _MIB}
OVERSIZED = Reply(200, body=_PADDING)
_FAULT = web.RequestKey("wire_fault", WireFault)
"""The key under which a request keeps its wire fault."""


class WireEmulator(Emulator):
    """An emulator that has wire faults, too.

    Args:
        faults: The probability of each fault of a stop, of either kind.
        seed: The seed of the random faults.
        fault_latency: As of an emulator.
        options: The other arguments of an emulator.

    Attributes:
        wire_faults: The fault of the next stop of an alias.
    """

    def __init__(
        self,
        *,
        faults: Mapping[Fault | WireFault, float] | None = None,
        seed: int = 0,
        fault_latency: float = 0.05,
        **options: Any,  # noqa: ANN401 - an emulator has them.
    ) -> None:
        shares = {} if faults is None else faults
        plain = {
            fault: share for fault, share in shares.items() if isinstance(fault, Fault)
        }
        super().__init__(
            faults=plain, seed=seed, fault_latency=fault_latency, **options
        )
        self.wire_faults: dict[str, WireFault] = {}
        self._random = random.Random(seed)
        self._wire_shares = [shares.get(fault, 0.0) for fault in WireFault]

    def _decide(
        self, request: web.BaseRequest, route: Route
    ) -> tuple[Fault | Reply | None, Reply]:
        fault, reply = super()._decide(request, route)
        # Any other answer may be to a stop without an effect.
        if fault is not None or reply.status != 200 or request.method != "POST":
            return fault, reply
        wire_fault = (
            self.wire_faults.pop(request.path.split("/")[-2], None) or self._draw()
        )
        if wire_fault is WireFault.COMPRESSED_BOMB:
            return None, bomb()
        if wire_fault is WireFault.OVERSIZED:
            return None, Reply(200, body={**cast("Payload", reply.body), **_PADDING})
        if wire_fault is not None:
            request[_FAULT] = wire_fault
        return None, reply

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        response = cast("web.Response", await super()._serve(request))
        fault = request.get(_FAULT)
        if fault is None:
            return response
        await self._write(request, _PIECES[fault](*_wire(response)))
        if fault is WireFault.CLOSE_KEPT_ALIVE:
            request.protocol.force_close()
        return _Written()

    def _draw(self) -> WireFault | None:
        share_of_none = 1 - sum(self._wire_shares)
        choices: list[WireFault | None] = [*WireFault, None]
        return self._random.choices(choices, [*self._wire_shares, share_of_none])[0]

    async def _write(self, request: web.BaseRequest, pieces: list[bytes]) -> None:
        transport = cast("asyncio.Transport", request.transport)
        for number, piece in enumerate(pieces):
            if number:
                await asyncio.sleep(self._fault_latency / (len(pieces) - 1))
            transport.write(piece)


class _Written(web.StreamResponse):
    """A response that is written already, on a connection that is kept alive."""

    @property
    def keep_alive(self) -> bool:
        """True, for aiohttp keeps the connection only then."""
        return True

    async def prepare(self, _: web.BaseRequest) -> None:
        """Write no head."""

    async def write_eof(self, _: bytes = b"") -> None:
        """Write no body."""


def _wire(response: web.Response) -> tuple[bytes, bytes]:
    """Return the head and the body of a response as they are sent."""
    body = cast("bytes", response.body)
    lines = [
        f"HTTP/1.1 {response.status} {response.reason}",
        *(f"{name}: {value}" for name, value in response.headers.items()),
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode(), body


_STRAY = b"".join(_wire(response_to(Reply(403), "req_stray")))
_STRAY_RUNTIME = make_runtime(
    "stray", "stray", "browser", "stopped", "2026-01-01T00:00:00.000Z"
)
_LATE_STRAY = b"".join(_wire(response_to(Reply(200, body=_STRAY_RUNTIME), "req_stray")))
_PIECES: dict[WireFault, Callable[[bytes, bytes], list[bytes]]] = {
    WireFault.CLOSE_KEPT_ALIVE: lambda head, body: [head + body],
    WireFault.SLOW_DRIP: lambda head, body: [head, *(bytes((byte,)) for byte in body)],
    WireFault.STRAY_ANSWER: lambda head, body: [head + body + _STRAY],
    WireFault.LATE_STRAY_ANSWER: lambda head, body: [head + body, _LATE_STRAY],
}
