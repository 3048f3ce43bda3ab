"""The connector of an owned pool: it reuses only connections that were silent while idle."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import aiohttp

from bctrl_async._http.protocol import AnswerHandler

if TYPE_CHECKING:
    from asyncio import BaseTransport

    from aiohttp.client_proto import ResponseHandler
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace


on_connection: ContextVar[Callable[[], object] | None] = ContextVar("on_connection", default=None)
"""Called when a request of this context has its connection: from then on it may have been sent."""


class Connector(aiohttp.TCPConnector):
    """A connector that closes a connection on which something arrived while it was idle.

    If a server or gateway sends one answer too many, each further request on that connection would
    get the answer to the one before it. aiohttp looks for such bytes when a connection returns to
    the pool, but not when it leaves the pool.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - those of a TCPConnector.
        super().__init__(**options)
        # There is no public way, and aiohttp types it for its own protocol. Without it the fast
        # path uses the parser for every answer.
        self._factory = partial(AnswerHandler, loop=asyncio.get_running_loop())  # type: ignore[assignment]
        self._is_readable: WeakKeyDictionary[ResponseHandler, Callable[[], bool]] = (
            WeakKeyDictionary()
        )

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's.
    ) -> Connection:
        """Return a connection as `take` does, and notify the request's `on_connection`."""
        connection = await self.take(req, traces, timeout)
        if (notify := on_connection.get()) is not None:
            notify()
        return connection

    async def take(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's.
    ) -> Connection:
        """Return a new connection, or one that was silent while it was idle.

        The request must be written at once: between this check and the request nothing is read.
        """
        while True:
            connection = await super().connect(req, traces, timeout)
            # It is None only after the release.
            protocol: ResponseHandler = connection.protocol  # type: ignore[assignment]
            is_readable = self._is_readable.get(protocol)
            if is_readable is None:
                self._is_readable[protocol] = is_readable = _readability(connection.transport)
                if not (protocol.should_close or (not req.is_ssl() and is_readable())):
                    return connection
                # Not retried here: such a server does so on every new connection. Over TLS, what is
                # unread on a new one belongs to the handshake.
                connection.close()
                raise aiohttp.ClientConnectionError("the server spoke or closed before the request")
            if not protocol.should_close and not is_readable():
                return connection
            connection.close()

    async def _create_proxy_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's.
    ) -> tuple[BaseTransport, ResponseHandler]:
        try:
            return await super()._create_proxy_connection(req, traces, timeout)
        except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError):
            raise
        except aiohttp.ClientError as error:
            # As it is, it could not be told from one after the request was sent.
            reason = OSError(0, "it opened no tunnel")
            # aiohttp comes here only with a proxy.
            proxy = req.proxy or req.url
            place = req.connection_key._replace(host=proxy.raw_host or "", port=proxy.port)
            raise aiohttp.ClientProxyConnectionError(place, reason) from error

    def _release(
        self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False
    ) -> None:
        # Without a parser the protocol keeps every byte that arrives, and `should_close` is true. A
        # parser would swallow the beginning of an answer, and each request has a new one.
        protocol._parser = None  # noqa: SLF001 - there is no public way; tests guard it.
        super()._release(key, protocol, should_close=should_close)


def _readability(transport: BaseTransport | None) -> Callable[[], bool]:
    """Return a function that tells if a socket has unread bytes, or the end of the connection."""
    # A transport without a socket, such as one in memory, has nothing unread.
    sock = None if transport is None else transport.get_extra_info("socket")
    if sock is None:
        return lambda: False
    if not hasattr(select, "poll"):  # pragma: no cover - Windows.
        return lambda: bool(select.select([sock], [], [], 0)[0])
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return lambda: bool(poller.poll(0))
