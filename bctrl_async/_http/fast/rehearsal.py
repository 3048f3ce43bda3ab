"""Open an owned pool, with a fast path if a rehearsal with this aiohttp succeeds."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from ssl import SSLContext
from types import FunctionType
from typing import TYPE_CHECKING, TypeVar

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from bctrl_async._http.fast.answer import AnswerHandler, Connector, PlainAnswer
from bctrl_async._http.fast.exchange import FastPath, request_functions
from bctrl_async._http.response import Answer

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

_log = logging.getLogger("bctrl_async")

_T = TypeVar("_T")

# aiohttp's default Content-Type is `application/octet-stream`, although there is no
# body, and strict servers reject it.
NO_CONTENT_TYPE = (hdrs.CONTENT_TYPE,)

_BODY = b"{}"
# The first answer is plain; only aiohttp's parser can read the second.
_PLAIN = b"HTTP/1.1 200 OK\r\nX-Rehearsal: yes\r\nContent-Length: 2\r\n\r\n" + _BODY
_PARSED = b"HTTP/1.1 100 Continue\r\n\r\n" + _PLAIN


def open_pool(
    url: URL,
    headers: CIMultiDict[str],
    *,
    trust_env: bool,
    proxy: str | None,
    ssl: SSLContext | None,
) -> tuple[aiohttp.ClientSession, FastPath | None]:
    """Return a new pool and its fast path, if the options and aiohttp allow it."""
    # The limiter bounds the connections, so the connector needs no limit.
    connector = Connector(limit=0, ssl=ssl or True)
    http = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=trust_env,
        proxy=proxy,
    )
    # The environment may name a proxy, too, and the fast path cannot use proxies.
    if proxy is not None or trust_env:
        return http, None
    # What has replaced aiohttp's own functions, such as a mock, must see each request.
    functions = (*request_functions(), aiohttp.ClientSession.__init__)
    if not all(_is_of_aiohttp(function) for function in functions):
        return http, None
    # The rehearsal tries all that the fast path needs of aiohttp; a version number
    # would not tell.
    try:
        # `bind` raises if `connect` does not take the arguments of the fast path.
        inspect.signature(aiohttp.TCPConnector.connect).bind(connector, None, [], None)
        run_now(_rehearse(url))
        fast_path = FastPath(
            partial(aiohttp.TCPConnector.connect, connector),
            connector.accepts,
            url,
            headers,
            _example(url, headers),
        )
    except Exception as error:  # noqa: BLE001 - another aiohttp may raise anything.
        _log.info(
            "the fast path does not work with this aiohttp: %r",
            error,
            extra={"bctrl.event": "no_fast_path"},
        )
        return http, None
    return http, fast_path


def _is_of_aiohttp(function: object) -> bool:
    """Return True if a function was defined by aiohttp itself."""
    # `isinstance` would also accept a wrapper that pretends to be a function.
    names = vars(aiohttp.client)
    return type(function) is FunctionType and function.__globals__ is names


async def _rehearse(url: URL) -> None:
    """Try the fast path on connections in memory; raise if it does not work."""
    headers = CIMultiDict({"X-Rehearsal": "yes"})
    limit = aiohttp.ClientTimeout(total=60)
    connector = _CannedConnector(_PLAIN, _PARSED, _PLAIN)
    fast_path = FastPath(
        connector.connect, connector.accepts, url, headers, _example(url, headers)
    )
    try:
        for path in ("/first", "/second", "/third"):
            exchange = await fast_path.post(path, headers, limit, object)
            if not _is_canned(exchange.answer):
                raise ValueError("it read another answer")
            line = b"POST %b HTTP/1.1\r\nHost: " % path.encode()
            if not connector.received.startswith(line):
                raise ValueError("it wrote another request")
            connector.received = b""
        if connector.connection_count != 1:
            raise ValueError("it did not keep the connection alive")
        unanswered = fast_path.post("/fourth", headers, limit, object)
        unanswered.send(None)
        connector.protocol.set_exception(TimeoutError())
        with suppress(TimeoutError):
            unanswered.send(None)
            raise ValueError("it did not time out")
    finally:
        fast_path.close()
        connector.discard()


def _is_canned(answer: Answer | PlainAnswer | None) -> bool:
    return (
        answer is not None
        and answer.is_success
        and answer.header("X-Rehearsal") == "yes"
        and answer.body == _BODY
    )


def _example(url: URL, headers: CIMultiDict[str]) -> bytes:
    """Return the bytes of a request as aiohttp serializes it."""
    request = aiohttp.ClientRequest(
        hdrs.METH_POST,
        url.with_path("/", encoded=True),
        headers=headers,
        skip_auto_headers=NO_CONTENT_TYPE,
        loop=asyncio.get_running_loop(),
    )
    connector = _CannedConnector()
    connection = run_now(connector.connect(request, [], aiohttp.ClientTimeout()))
    try:
        run_now(request.send(connection))
    finally:
        connection.close()
    return connector.received


class _CannedConnector(aiohttp.BaseConnector):
    """A connector in memory: it answers each request at once with the next answer."""

    protocol: AnswerHandler

    def __init__(self, *answers: bytes) -> None:
        super().__init__()
        self._answers = list(answers)
        self.connection_count: int = 0
        self.received: bytes = b""

    async def _create_connection(
        self,
        # The arguments have aiohttp's names.
        req: aiohttp.ClientRequest,  # noqa: ARG002
        traces: list[Trace],  # noqa: ARG002
        timeout: aiohttp.ClientTimeout,  # noqa: ARG002, ASYNC109
    ) -> ResponseHandler:
        self.protocol = AnswerHandler(asyncio.get_running_loop())
        self.protocol.connection_made(_CannedTransport(self, self.protocol))
        self.connection_count += 1
        return self.protocol

    def accepts(self, connection: Connection, _: aiohttp.ClientRequest) -> bool:
        """Return True unless the connection is closed."""
        return connection.transport is not None

    def discard(self) -> None:
        self._close()

    def receive(self, request: bytes, protocol: ResponseHandler) -> None:
        self.received += request
        if self._answers:
            protocol.data_received(self._answers.pop(0))


class _CannedTransport(asyncio.Transport):
    _closing = False

    def __init__(self, connector: _CannedConnector, protocol: ResponseHandler) -> None:
        super().__init__()
        self._connector = connector
        self._protocol = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._connector.receive(bytes(data), self._protocol)

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True
        self._protocol.connection_lost(None)


def run_now(coroutine: Coroutine[object, object, _T]) -> _T:
    """Return the result of a coroutine; raise RuntimeError if it waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: _T = stop.value
        return result
    coroutine.close()
    raise RuntimeError("the coroutine waits")
