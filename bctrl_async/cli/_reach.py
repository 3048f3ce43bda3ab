"""Checks of the way to a server, step by step: names, connections, tunnels and certificates."""

import asyncio
import base64
import errno
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
from yarl import URL

_FAILURES = (OSError, EOFError, ValueError, asyncio.LimitOverrunError)
"""The exceptions of a step; those of TLS and of a time limit are OSErrors.

A name that cannot be one of a host is a ValueError.
"""

_OTHER_HOST = {62, 64}
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""


class Check(msgspec.Struct, frozen=True):
    """One check.

    Attributes:
        check: What was checked.
        ok: Its result; None if it was not made.
        found: What was found.
        advice: What to do, unless all is well.
    """

    check: str
    ok: bool | None
    found: str
    advice: str | None = None


class _Step(NamedTuple):
    """A step of the way; `make` returns what it found, and raises one of `_FAILURES`."""

    check: str
    make: Callable[[], Awaitable[str]]
    advice: str


async def check_way(
    url: URL, proxy: URL | None, context: ssl.SSLContext, limit: float
) -> AsyncIterator[Check]:
    """Make the checks in order; one that fails is the last.

    Args:
        url: The URL of the API.
        proxy: The URL of the proxy, if there is one.
        context: The TLS context.
        limit: Seconds for each step.
    """
    way = _Way(url, proxy, context)
    network = "Check the URL and the network; if a proxy is needed, give --proxy"
    if proxy is not None:
        network = "Check the URL of the proxy and the network"
    steps = [_Step("DNS", way.resolve, network), _Step("TCP", way.connect, network)]
    if proxy is not None:
        steps.append(
            _Step("tunnel", way.open_tunnel, "Check its user and password, and what it allows")
        )
    if url.scheme == "https":
        steps.append(
            _Step("TLS", way.start_tls, "If the server has a private CA, give it with --ca-file")
        )
    try:
        for step in steps:
            try:
                found = await asyncio.wait_for(step.make(), limit)
            except _FAILURES as error:
                reason = f"{way.place}: {_reason(error, limit)}"
                advice = _tls_advice(error) or step.advice
                yield Check(step.check, ok=False, found=reason, advice=advice)
                return
            yield Check(step.check, ok=True, found=found)
    finally:
        way.close()


class _Way:
    """A connection to a server, perhaps through a tunnel of a proxy.

    Attributes:
        place: The host and port that the current step is about.
    """

    def __init__(self, url: URL, proxy: URL | None, context: ssl.SSLContext) -> None:
        self._api, self._first = url, proxy or url
        self._host, self._port = self._first.raw_host or "", self._first.port
        self.place = f"{self._host} port {self._port}"
        self._proxy_context = context if proxy and proxy.scheme == "https" else None
        self._context = context
        self._at_end = ExitStack()

    async def resolve(self) -> str:
        """Resolve the name of the host."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        addresses = dict.fromkeys(str(address[0]) for *_, address in found)
        return f"{self._host} is {', '.join(addresses)}"

    async def connect(self) -> str:
        """Connect to the host."""
        began = time.monotonic()
        self._reader, self._writer = await asyncio.open_connection(
            self._host, self._port, ssl=self._proxy_context
        )
        self._at_end.callback(self._abort)
        return f"{self.place} in {(time.monotonic() - began) * 1000:.0f} ms"

    async def open_tunnel(self) -> str:
        """Ask the proxy for a tunnel (RFC 9110 section 9.3.6)."""
        place = f"{self._api.host_subcomponent}:{self._api.port}"
        lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
        if self._first.user is not None:
            login = f"{self._first.user}:{self._first.password or ''}"
            basic = base64.b64encode(login.encode("latin-1", "replace")).decode()
            lines.append(f"Proxy-Authorization: Basic {basic}")
        self._writer.write("\r\n".join([*lines, "", ""]).encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        status_line = head.decode("latin-1").partition("\r\n")[0]
        if status_line.split(" ")[1:2] != ["200"]:
            raise ConnectionError(f"it answered {status_line!r}")
        return f"{self.place} leads to {place}"

    async def start_tls(self) -> str:
        """Do the handshake with the API, and describe its certificate."""
        self.place = f"{self._api.raw_host} port {self._api.port}"
        await self._writer.start_tls(self._context, server_hostname=self._api.raw_host)
        secure: ssl.SSLObject = self._writer.get_extra_info("ssl_object")
        # Every context here asks for one.
        certificate: Mapping[str, Any] = secure.getpeercert()  # type: ignore[assignment]
        issuer = dict(pair for name in certificate["issuer"] for pair in name)
        authority = issuer.get("organizationName") or issuer.get("commonName")
        end = datetime.fromtimestamp(ssl.cert_time_to_seconds(certificate["notAfter"]), UTC)
        days = (end - datetime.now(UTC)).days
        return f"{secure.version()}, CA {authority}, valid until {end:%Y-%m-%d} ({days:,} days)"

    def close(self) -> None:
        """Close the connection, if there is one."""
        self._at_end.close()

    def _abort(self) -> None:
        self._writer.transport.abort()


def _tls_advice(error: Exception) -> str | None:
    """Return what to do about an error of TLS that a file of CAs does not mend."""
    match error:
        case ssl.SSLCertVerificationError() if error.verify_code in _OTHER_HOST:
            return "Check the host: the certificate is for another"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return "Check the port, and the scheme of the URL"
    return None


def _reason(error: Exception, limit: float) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return error.verify_message
        case ValueError():
            return "not a valid name of a host"
        case TimeoutError() if error.errno is None:
            return f"no answer within {limit:g} s"
        case asyncio.IncompleteReadError():
            return "it closed the connection"
        case OSError() if error.errno in errno.errorcode and not isinstance(error, ssl.SSLError):
            # Without the address, which the text of asyncio has.
            return os.strerror(error.errno or 0)
    return getattr(error, "strerror", None) or str(error)
