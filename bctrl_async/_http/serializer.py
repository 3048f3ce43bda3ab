"""Serialize POSTs without a body to the bytes that aiohttp sends."""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from bctrl_async._http.canned import CannedConnector, run_now

# Without it aiohttp sends a Content-Type of `application/octet-stream`, although there is no body,
# and strict servers reject it.
NO_CONTENT_TYPE = (hdrs.CONTENT_TYPE,)


class Serializer:
    """Serializes requests by the example of one that aiohttp serialized.

    Args:
        url: The URL of the API.
        headers: The headers of most requests.

    Raises:
        ValueError: aiohttp serializes a request in another way.
    """

    def __init__(self, url: URL, headers: CIMultiDict[str]) -> None:
        self._url = url.with_path("/", encoded=True)
        self._headers = headers
        self._lines = _lines(headers)
        example = self._by_aiohttp(headers)
        # Around the headers of the session, aiohttp writes its own.
        begin, found, self._end = example.partition(self._lines)
        method, slash, self._begin = begin.partition(b"/")
        if method != b"POST " or not (slash and found):
            raise ValueError("aiohttp serializes requests in another way")

    def serialize(self, path: str, headers: CIMultiDict[str]) -> bytes:
        """Return the bytes of a request.

        Args:
            path: The encoded path, from its root.
            headers: All headers; they were checked before.
        """
        if headers is self._headers:
            lines = self._lines
        elif hdrs.ACCEPT_ENCODING in headers:
            # It replaces aiohttp's own.
            method, _, rest = self._by_aiohttp(headers).partition(b"/")
            return method + path.encode() + rest
        else:
            lines = _lines(headers)
        return b"".join((b"POST ", path.encode(), self._begin, lines, self._end))

    def _by_aiohttp(self, headers: CIMultiDict[str]) -> bytes:
        request = aiohttp.ClientRequest(
            hdrs.METH_POST,
            self._url,
            headers=headers,
            skip_auto_headers=NO_CONTENT_TYPE,
            loop=asyncio.get_running_loop(),
        )
        connector = CannedConnector()
        connection = run_now(connector.connect(request, [], aiohttp.ClientTimeout()))
        try:
            run_now(request.send(connection))
        finally:
            connection.close()
        return connector.received


def _lines(headers: CIMultiDict[str]) -> bytes:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode()
