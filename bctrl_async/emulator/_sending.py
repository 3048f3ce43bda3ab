"""Sending a reply otherwise than whole and alone."""

import asyncio
from contextlib import suppress
from typing import cast

from aiohttp import web

from bctrl_async.emulator._faults import Fault
from bctrl_async.emulator._replies import WireReply

STREAMED = frozenset({Fault.CLOSE_KEPT_ALIVE, Fault.SLOW_DRIP, Fault.TRUNCATED_JSON})


async def stream(
    request: web.BaseRequest, reply: WireReply, fault: Fault, drip_interval: float
) -> web.StreamResponse:
    """Send a reply byte by byte, cut short, or with the end of the connection behind it."""
    response = web.StreamResponse(status=reply.status, headers=reply.headers)
    response.content_length = len(reply.body)
    # The client may disconnect at any point.
    with suppress(ConnectionError):
        await response.prepare(request)
        if fault is Fault.SLOW_DRIP:
            for byte in reply.body:
                await response.write(bytes((byte,)))
                await asyncio.sleep(drip_interval)
        elif fault is Fault.TRUNCATED_JSON:
            await response.write(reply.body[: len(reply.body) // 2])
            request.protocol.force_close()
        else:
            await response.write_eof(reply.body)
            request.protocol.force_close()
    return response


async def send_with_stray(
    request: web.BaseRequest, reply: WireReply, stray: WireReply, late_by: float
) -> web.StreamResponse:
    """Send a reply, and another that nobody asked for.

    Args:
        request: The request.
        reply: Its reply.
        stray: The answer that is one too many.
        late_by: Seconds by which it follows; with 0 both are in one segment. The next request on
            the connection is served only after it.
    """
    # This handler is cancelled when the connection closes.
    transport = cast("asyncio.Transport", request.transport)
    if late_by:
        transport.write(reply.wire)
        await asyncio.sleep(late_by)
        transport.write(stray.wire)
    else:
        transport.write(reply.wire + stray.wire)
    return _Written()


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
