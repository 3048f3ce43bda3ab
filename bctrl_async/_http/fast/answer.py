"""Connections that match answers to requests; most answers need no HTTP parser."""

from __future__ import annotations

import asyncio
import re
import select
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import aiohttp
import msgspec
from aiohttp.client_proto import ResponseHandler

if TYPE_CHECKING:
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

on_connection: ContextVar[Callable[[], object]] = ContextVar(
    "on_connection", default=object
)
"""Called when a request of this context has its connection: from then on it may have
been sent. By default, `object()` does nothing."""

_MAX_HEAD = 4096
_BLANK_LINE = b"\r\n\r\n"

# The pattern excludes headers that matter to an HTTP parser, such as
# `Transfer-Encoding`.
_is_plain = re.compile(
    rb"http/1\.1 200 ok"
    rb"(?:\r\n(?:[abdfgijklnoqrvwxyz][a-z0-9-]*"
    rb"|c(?:ontent-(?:length|type|language|security-policy)|onnection(?=: keep-alive\r)"
    rb"|ache-control|f-[a-z0-9-]+|ross-origin-[a-z-]+)"
    rb"|etag|expires|permissions-policy|pragma"
    rb"|s(?:erver|erver-timing|et-cookie|trict-transport-security)"
    rb"|trace(?:parent|state)"
    # Versions of aiohttp differ in whether they keep the spaces around a value.
    rb"): (?! )[ -~]*(?<! )){1,60}\r\n\r\n"
).fullmatch
_find_length = re.compile(rb"\r\ncontent-length: ([1-9][0-9]{0,6})\r\n").search


@lru_cache(maxsize=16)
def _line_start(name: str) -> bytes:
    return b"\r\n%b: " % name.lower().encode()


class PlainAnswer(msgspec.Struct, frozen=True, gc=False):
    """A complete response in place of aiohttp's message."""

    head: bytes
    lower_head: bytes
    """The head in lower case."""
    body: bytes
    status: ClassVar[int] = 200
    code: ClassVar[int] = 200
    """The status, as aiohttp's messages name it."""
    is_success: ClassVar[bool] = True
    problem: ClassVar[None] = None
    links: ClassVar[tuple[str, ...]] = ()

    @property
    def may_have_id(self) -> bool:
        """False if no header can be an id of the request."""
        # `in` would first try whether the bytes are a number, at 1 % of a stop's cost.
        return self.lower_head.find(b"request-id: ") >= 0

    def header(self, name: str) -> str | None:
        """Return the value of the first header with this name, or None."""
        start = self.lower_head.find(_line_start(name))
        if start < 0:
            return None
        start += len(_line_start(name))
        return self.head[start : self.head.index(b"\r\n", start)].decode()


def plain_answer(data: bytes) -> PlainAnswer | None:
    """Return a response if the bytes are exactly one response that needs no parser."""
    # The head is too short to have a length if `find` returns -1.
    end = data.find(_BLANK_LINE, 0, _MAX_HEAD) + len(_BLANK_LINE)
    lower_head = data[:end].lower()
    length = _find_length(lower_head)
    # The version is in capitals, which the head in lower case does not show.
    if (
        length is None
        or int(length[1]) != len(data) - end
        or not data.startswith(b"HTTP/")
    ):
        return None
    if lower_head.count(b"\r\ncontent-length:") > 1 or not _is_plain(lower_head):
        return None
    return PlainAnswer(data[:end], lower_head, data[end:])


class AnswerHandler(ResponseHandler):
    """A protocol that reads plain answers itself: parsing is a quarter of a stop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.expects_answer: bool = False

    def data_received(self, data: bytes) -> None:
        """Read a plain answer, or leave it to aiohttp."""
        if self.expects_answer:
            self.expects_answer = False
            answer = plain_answer(data)
            if answer is not None:
                # aiohttp's queue does not look at what it passes on.
                item = (answer, aiohttp.EMPTY_PAYLOAD)
                self.feed_data(item)  # type: ignore[arg-type]
                return
            # This makes a parser, which gets the bytes below.
            self.set_response_params(read_until_eof=True)
        super().data_received(data)


class Connector(aiohttp.TCPConnector):
    """A connector that closes a connection on which bytes arrived while it was idle.

    After a surplus answer, each request would get the answer to the request before it.
    aiohttp looks for unread bytes when a connection returns to the pool, but not when
    it leaves the pool.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - TCPConnector's.
        super().__init__(**options)
        # There is no public way to set a protocol, and `_factory` is typed for
        # aiohttp's. With aiohttp's protocol, the fast path would parse every answer.
        factory = partial(AnswerHandler, loop=asyncio.get_running_loop())
        self._factory = factory  # type: ignore[assignment]
        self._readable_checks: WeakKeyDictionary[
            ResponseHandler, Callable[[], object]
        ] = WeakKeyDictionary()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's.
    ) -> Connection:
        """Return a connection with nothing unread, and notify `on_connection`."""
        while True:
            connection = await super().connect(req, traces, timeout)
            if self.accepts(connection, req):
                break
        notify = on_connection.get()
        notify()
        return connection

    def accepts(self, connection: Connection, req: aiohttp.ClientRequest) -> bool:
        """Return True if a connection has nothing unread; close it otherwise.

        The caller must write before its next await.
        """
        # `protocol` is None only after the release.
        protocol: ResponseHandler = connection.protocol  # type: ignore[assignment]
        is_readable = self._readable_checks.get(protocol)
        is_new = is_readable is None
        if is_readable is None:
            is_readable = _readable_check(connection.transport)
            self._readable_checks[protocol] = is_readable
        # Over TLS, unread bytes on a new connection belong to the handshake.
        is_in_handshake = is_new and req.is_ssl()
        if not protocol.should_close and (is_in_handshake or not is_readable()):
            return True
        connection.close()
        if is_new:
            # The next new connection would end the same way.
            raise aiohttp.ClientConnectionError(
                "the server spoke or closed before the request"
            )
        return False

    async def _create_proxy_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's.
    ) -> tuple[asyncio.BaseTransport, ResponseHandler]:
        try:
            return await super()._create_proxy_connection(req, traces, timeout)
        except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError):
            raise
        except aiohttp.ClientError as error:
            # This class of error also occurs after a request was sent; here, none was
            # sent yet.
            reason = OSError(0, "it opened no tunnel")
            # aiohttp calls this method only for a proxy.
            proxy = req.proxy or req.url
            key = req.connection_key._replace(
                host=proxy.raw_host or "", port=proxy.port
            )
            raise aiohttp.ClientProxyConnectionError(key, reason) from error

    def _release(
        self,
        key: ConnectionKey,
        protocol: ResponseHandler,
        *,
        should_close: bool = False,
    ) -> None:
        # A protocol without a parser keeps every byte that arrives, so `should_close`
        # becomes true. A parser would swallow the start of an answer; each request gets
        # a new parser.
        protocol._parser = None  # noqa: SLF001 - no way is public; tests guard it.
        super()._release(key, protocol, should_close=should_close)


def _readable_check(transport: asyncio.BaseTransport | None) -> Callable[[], object]:
    """Return a function that returns true if a socket has unread bytes, or its end."""
    # A transport without a socket, such as a transport in memory, has nothing unread.
    sock = None
    if transport is not None:
        sock = transport.get_extra_info("socket")
    if sock is None:
        return lambda: False
    if not hasattr(select, "poll"):  # pragma: no cover - Windows.
        return lambda: select.select([sock], [], [], 0)[0]
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return partial(poller.poll, 0)


def loop_of(http: aiohttp.ClientSession) -> asyncio.AbstractEventLoop:
    """Return the event loop of a session."""
    # The public `loop` is deprecated, without a replacement.
    return http._loop  # noqa: SLF001
