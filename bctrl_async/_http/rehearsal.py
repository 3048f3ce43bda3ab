"""Open the fast path, if the installed aiohttp allows it."""

from __future__ import annotations

import inspect
import logging
from contextlib import suppress
from http import HTTPStatus
from types import FunctionType

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from bctrl_async._http.canned import CannedConnector, run_now
from bctrl_async._http.connector import Connector
from bctrl_async._http.fast_path import FastPath, request_functions

_log = logging.getLogger("bctrl_async")

_BODY = b"{}"
_PLAIN = b"HTTP/1.1 200 OK\r\nX-Rehearsal: yes\r\nContent-Length: 2\r\n\r\n" + _BODY
_PARSED = b"HTTP/1.1 100 Continue\r\n\r\n" + _PLAIN


def open_fast_path(
    http: aiohttp.ClientSession,
    url: URL,
    headers: CIMultiDict[str],
    limit: aiohttp.ClientTimeout,
    *,
    has_proxy: bool,
) -> FastPath | None:
    """Return the fast path to a pool, or None if its requests must not take it.

    A rehearsal tries all that it needs of aiohttp, instead of a list of versions.

    Args:
        http: An owned pool, just opened.
        url: The URL of the API.
        headers: The headers of most requests.
        limit: The time limits of most requests.
        has_proxy: True if the pool has a proxy, to which the fast path does not connect.
    """
    connector = http.connector
    if has_proxy:
        return None
    if not isinstance(connector, Connector) or http.trust_env or http.trace_configs:
        return None
    if not all(map(_is_aiohttps, (*request_functions(), aiohttp.ClientSession.__init__))):
        return None
    try:
        inspect.signature(aiohttp.TCPConnector.connect).bind(connector, None, [], None)
        _rehearse(url)
        return FastPath(connector.take, url, headers, limit)
    except Exception as error:  # noqa: BLE001 - another aiohttp may raise anything.
        _log.info(
            "the fast path does not work with this aiohttp: %r",
            error,
            extra={"bctrl.event": "no_fast_path"},
        )
        return None


def _is_aiohttps(function: object) -> bool:
    """Return True if a function was defined by aiohttp itself."""
    # By its exact type, since wrappers pass for what they wrap.
    return type(function) is FunctionType and function.__globals__ is vars(aiohttp.client)


def _rehearse(url: URL) -> None:
    """Try the fast path on connections in memory.

    Raises:
        Exception: It does not work with this aiohttp.
    """
    connector = CannedConnector(_PLAIN, _PARSED, _PLAIN)
    try:
        run_now(_rehearse_on(connector, url))
    finally:
        connector.discard()


async def _rehearse_on(connector: CannedConnector, url: URL) -> None:
    headers = CIMultiDict({"X-Rehearsal": "yes"})
    limit = aiohttp.ClientTimeout(total=60)
    fast_path = FastPath(connector.connect, url, headers, limit)
    try:
        for path in ("/first", "/second", "/third"):
            exchange = await fast_path.post(path, headers, limit, _ignore)
            head = exchange.status, exchange.headers.get("X-Rehearsal")
            if (head, exchange.body) != ((HTTPStatus.OK, "yes"), _BODY):
                raise ValueError("it read another answer")
            sent, connector.received = connector.received, b""
            if not sent.startswith(b"POST %b HTTP/1.1\r\nHost: " % path.encode()):
                raise ValueError("it wrote another request")
        if connector.connections != 1:
            raise ValueError("it did not keep the connection alive")
        unanswered = fast_path.post("/fourth", headers, limit, _ignore)
        unanswered.send(None)
        connector.protocol.set_exception(TimeoutError())
        with suppress(TimeoutError):
            unanswered.send(None)
            raise ValueError("it did not time out")
    finally:
        fast_path.close()


def _ignore() -> None:
    pass
