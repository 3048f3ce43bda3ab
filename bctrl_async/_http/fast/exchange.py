"""The fast path: POSTs without a body, on the connections of an owned pool.

`ClientSession.request` spends half of its time on cookies, redirects, proxies and
bodies. The fast path takes a connection, writes what aiohttp would, and has aiohttp
parse all but plain answers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from functools import cached_property
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import hdrs
from aiohttp.connector import Connection
from multidict import CIMultiDict
from yarl import URL

from bctrl_async._http.fast.answer import AnswerHandler, PlainAnswer
from bctrl_async._http.response import Answer, Header

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.http import RawResponseMessage

_CONTINUE = 100
_SWITCHING_PROTOCOLS = 101
_OK = 200

_Connect = Callable[
    [aiohttp.ClientRequest, list[Any], aiohttp.ClientTimeout],
    Coroutine[object, object, Connection],
]
_Accepts = Callable[[Connection, aiohttp.ClientRequest], bool]


class _Deadlines:
    """The time limits of exchanges: one timer for all saves 5 % of a stop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._times: dict[Exchange, float] = {}
        self._timer: asyncio.Handle | None = None
        # The timer's time is infinite without a timer, so that any deadline sets it.
        self._when = math.inf
        self.is_closed = False

    def add(self, exchange: Exchange, deadline: float) -> None:
        self._times[exchange] = deadline
        if deadline < self._when:
            self._set_timer(deadline)

    def discard(self, exchange: Exchange) -> None:
        self._times.pop(exchange, None)
        if self.is_closed:
            # The last exchange ends the timer that `close` has kept.
            self.close()

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._on_timer)
        self._when = when

    def _on_timer(self) -> None:
        # uvloop rounds to milliseconds, so a timer may fire early.
        now = max(self._loop.time(), self._when)
        self._when = math.inf
        late = [
            exchange for exchange, deadline in self._times.items() if deadline <= now
        ]
        for exchange in late:
            del self._times[exchange]
            exchange.time_out()
        if self._times:
            self._set_timer(min(self._times.values()))

    def close(self) -> None:
        # Open exchanges keep the timer, since a closed connection ends no read.
        self.is_closed = True
        if self._timer is not None and not self._times:
            self._timer.cancel()


class Exchange:
    """A request with its response; `answer` is set if its body came with the head."""

    status: int
    header: Header

    def __init__(self, connection: Connection, deadlines: _Deadlines) -> None:
        self._connection = connection
        self._deadlines = deadlines
        # `protocol` is None only after the release.
        self.protocol: ResponseHandler = connection.protocol  # type: ignore[assignment]
        self.content: aiohttp.StreamReader = aiohttp.EMPTY_PAYLOAD
        self.answer: Answer | PlainAnswer | None = None
        self._timeout_error: TimeoutError | None = None

    def write(self, request: bytes) -> None:
        """Send the request."""
        protocol = self.protocol
        if isinstance(protocol, AnswerHandler):
            protocol.expects_answer = True
        else:
            # A protocol of aiohttp's own parses every answer.
            protocol.set_response_params(read_until_eof=True)
        transport = protocol.transport
        if transport is None or transport.is_closing():
            raise aiohttp.ClientConnectionResetError(
                "Cannot write to closing transport"
            )
        transport.write(request)

    def take_head(
        self, message: RawResponseMessage | PlainAnswer, content: aiohttp.StreamReader
    ) -> None:
        """Take the head of the response, and the body if it is complete."""
        self.status = message.code
        if isinstance(message, PlainAnswer):
            self.answer = message
            # The connection goes back to the pool.
            self.close()
            return
        self.content = content
        # The callback runs at once if the body is complete.
        content.on_eof(self.close)
        self.header = message.headers.get
        if content.is_eof():
            self.answer = Answer(self.status, self.header, content.read_nowait())
        elif self._timeout_error is not None:
            # The time ran out in the same turn of the loop in which the head arrived.
            content.set_exception(self._timeout_error)

    def time_out(self) -> None:
        """End the exchange with a `TimeoutError`."""
        # This cancels no task, so it cannot be taken for a cancellation by the caller.
        self._timeout_error = TimeoutError()
        self.protocol.set_exception(self._timeout_error)
        self.content.set_exception(self._timeout_error)

    def abort(self) -> None:
        """Close the connection."""
        self._deadlines.discard(self)
        self._connection.close()

    def close(self) -> None:
        """Return the connection to the pool; close it unless the body is complete.

        The head has been read, and with a plain answer its body: then `content` is
        still empty, and at its end.
        """
        if self.content.is_eof():
            self._deadlines.discard(self)
            self._connection.release()
        else:
            self.abort()


class _ConnectRequest(aiohttp.ClientRequest):
    # All POSTs share a request, whose key aiohttp would make anew for each.
    @cached_property
    def connection_key(self) -> ConnectionKey:
        return super().connection_key


class FastPath:
    """Sends POSTs without a body, in the form of an example that aiohttp serialized.

    It calls `connect` until `accepts` is True, as `Connector.connect` does: one more
    coroutine would take 1 % of a stop.
    """

    def __init__(
        self,
        connect: _Connect,
        accepts: _Accepts,
        url: URL,
        headers: CIMultiDict[str],
        example: bytes,
    ) -> None:
        self._connect = connect
        self._accepts = accepts
        self._url = url
        self._headers = headers
        self._header_lines = _header_lines(headers)
        # aiohttp writes its own headers before and after the headers of the session.
        start, lines, self._end = example.partition(self._header_lines)
        method, slash, self._after_path = start.partition(b"/")
        # A separator is empty if `partition` did not find it.
        if method != b"POST " or not (slash and lines):
            raise ValueError("aiohttp serializes requests in another way")
        self._loop = asyncio.get_running_loop()
        self._deadlines = _Deadlines(self._loop)
        # Connectors look only at the URL, so all POSTs share this request.
        self._request = _ConnectRequest(hdrs.METH_POST, url, loop=self._loop)
        self._functions = request_functions()

    def takes(self, method: str) -> bool:
        """Return True for a POST, unless a mock or a tracer patches `ClientSession`."""
        request, private = self._functions
        return (
            method == hdrs.METH_POST
            and not self._deadlines.is_closed
            and aiohttp.ClientSession._request is private  # noqa: SLF001 - mocked.
            and aiohttp.ClientSession.request is request
        )

    def close(self) -> None:
        """Take no more requests, and leave no timer behind in the event loop."""
        self._deadlines.close()

    async def post(
        self,
        path: str,
        headers: CIMultiDict[str],
        limit: aiohttp.ClientTimeout,
        on_connection: Callable[[], object],
    ) -> Exchange:
        """Send a POST and read the response's head; raise as `ClientSession.request`.

        `on_connection` is called once there is a connection. The caller reads and
        closes the exchange.
        """
        started = self._loop.time()
        try:
            connection = await self._connect(self._request, [], limit)
            while not self._accepts(connection, self._request):
                connection = await self._connect(self._request, [], limit)
        except TimeoutError as error:
            url = self._url.with_path(path, encoded=True)
            raise aiohttp.ConnectionTimeoutError(
                f"Connection timeout to host {url}"
            ) from error
        on_connection()
        exchange = Exchange(connection, self._deadlines)
        self._deadlines.add(exchange, started + (limit.total or math.inf))
        try:
            exchange.write(self._serialize(path, headers))
            while True:
                message, content = await exchange.protocol.read()
                code = message.code
                # Informational responses precede the final one (RFC 9110 section 15.2).
                if code >= _OK or code < _CONTINUE or code == _SWITCHING_PROTOCOLS:
                    break
        except BaseException:
            exchange.abort()
            raise
        exchange.take_head(message, content)
        return exchange

    def _serialize(self, path: str, headers: CIMultiDict[str]) -> bytes:
        lines = self._header_lines
        # The session's usual headers are serialized once, others each time.
        if headers is not self._headers:
            lines = _header_lines(headers)
        return b"".join((b"POST ", path.encode(), self._after_path, lines, self._end))


def _header_lines(headers: CIMultiDict[str]) -> bytes:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode()


def close_connection(response: object) -> None:
    """Close the connection of a response: its next answer would be wrong as well."""
    # aiohttp's public `connection` is None by now; a mocked response has no protocol.
    name = "_protocol"
    if isinstance(response, Exchange):
        name = "protocol"
    protocol = getattr(response, name, None)
    if protocol is not None and protocol.transport is not None:
        protocol.transport.close()


def request_functions() -> tuple[Callable[..., object], Callable[..., object]]:
    """Return the functions that mocks, recorders and tracers of aiohttp replace."""
    return aiohttp.ClientSession.request, aiohttp.ClientSession._request  # noqa: SLF001
