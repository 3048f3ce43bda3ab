"""TLS for tests: an emulator behind a certificate, and a forward proxy with tunnels."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import aiohttp.web
import trustme

from bctrl_async.emulator import Emulator
from support.servers import listening


class TlsServer(NamedTuple):
    """A TLS listener.

    Attributes:
        url: Its URL.
        trusted: A context that trusts its CA.
        authority: The CA.
    """

    url: str
    trusted: ssl.SSLContext
    authority: trustme.CA

    def write_ca(self, folder: Path) -> Path:
        """Write the CA's certificate to a PEM file."""
        file = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(file)
        return file


@asynccontextmanager
async def over_tls(
    emulator: Emulator, host: str = "localhost"
) -> AsyncIterator[TlsServer]:
    """Serve a running emulator over TLS as well, with a certificate for `host`."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host).configure_cert(context)
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    answer = aiohttp.web.Server(emulator._serve, access_log=None)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(answer, "127.0.0.1", 0, ssl=context)
    try:
        port = server.sockets[0].getsockname()[1]
        yield TlsServer(f"https://{host}:{port}", trusted, authority)
    finally:
        server.close()
        await answer.shutdown(0.1)


class Proxy:
    """A forward proxy for CONNECT, which leads to this machine whatever the host.

    Args:
        answer: Its answer to a CONNECT, if it is not 200.

    Attributes:
        url: Its URL.
        heads: The heads of the requests that it received.
    """

    def __init__(self, answer: bytes | None) -> None:
        self.url = ""
        self.heads: list[str] = []
        self._answer = answer

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Open a tunnel, and copy bytes both ways until it is closed."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        if self._answer is not None:
            writer.write(self._answer)
            return
        method, place, _ = head.split(" ", 2)
        assert method == "CONNECT"
        there, here = await asyncio.open_connection(
            "127.0.0.1", int(place.rpartition(":")[2])
        )
        try:
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(_copy(reader, here), _copy(there, writer))
        finally:
            here.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def forward_proxy(
    answer: bytes | None = None, context: ssl.SSLContext | None = None
) -> AsyncIterator[Proxy]:
    """Run a forward proxy; a context gives it TLS, as localhost."""
    proxy = Proxy(answer)
    host = "http://127.0.0.1" if context is None else "https://localhost"
    async with listening(proxy.serve, context) as port:
        proxy.url = f"{host}:{port}"
        yield proxy
