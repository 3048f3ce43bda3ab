"""The clients that are compared, each as a good engineer would write it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from enum import StrEnum
from functools import partial
from importlib import import_module
from urllib.parse import urlsplit
from uuid import UUID

import aiohttp
import msgspec

from bctrl_async import BctrlSession

KEY = "a-key-of-usual-length-0123456789"
WORKSPACE = "6f1f7a52-9f0e-4d53-8a64-0d1c6d6d2f11"

Stop = Callable[[str], Awaitable[object]]
"""Stop the runtime with this alias and return the parsed response."""

Contender = Callable[[str], AbstractAsyncContextManager[Stop]]
"""Open a client of the server at this URL."""


class _Kind(StrEnum):
    BROWSER = "browser"
    DESKTOP = "desktop"
    SPREADSHEET = "spreadsheet"


class _Status(StrEnum):
    ACTIVE = "active"
    STOPPED = "stopped"
    FAILED = "failed"


class _LaunchMode(StrEnum):
    PROFILE = "profile"
    EPHEMERAL = "ephemeral"


class _Summary(msgspec.Struct, frozen=True, rename="camel"):
    browser_running: bool | None = None
    current_driver: str | None = None
    default_context_id: str | None = None
    default_page_id: str | None = None
    launch_mode: _LaunchMode | None = None
    profile_id: UUID | None = None
    storage_workspace: str | None = None


class _Runtime(msgspec.Struct, frozen=True, rename="camel"):
    # A copy, so that a slow model of bctrl_async cannot slow down both.
    id: UUID
    alias: str
    workspace_id: UUID
    kind: _Kind
    status: _Status
    driver: str
    created_at: str
    updated_at: str
    summary: _Summary | None = None


_decode = msgspec.json.Decoder(_Runtime).decode
_HEADERS = {"Authorization": f"Bearer {KEY}"}
_TIMEOUT = timedelta(minutes=5)  # The default of aiohttp.


def _read(status: int, body: bytes) -> _Runtime:
    if status != 200:
        raise RuntimeError(f"the server answered {status}")
    return _decode(body)


@asynccontextmanager
async def bare(
    base: str, trace_configs: Sequence[aiohttp.TraceConfig] = ()
) -> AsyncGenerator[Stop]:
    """Use only aiohttp and msgspec."""
    async with aiohttp.ClientSession(
        headers=_HEADERS, trace_configs=list(trace_configs)
    ) as session:

        async def stop(alias: str) -> _Runtime:
            url = f"{base}/v1/workspaces/{WORKSPACE}/runtimes/{alias}/stop"
            async with session.post(url) as response:
                return _read(response.status, await response.read())

        yield stop


@asynccontextmanager
async def bare_bounded(base: str) -> AsyncGenerator[Stop]:
    """Use aiohttp and msgspec behind a semaphore."""
    semaphore = asyncio.Semaphore(100)
    async with bare(base) as unbounded:

        async def stop(alias: str) -> object:
            async with semaphore:
                return await unbounded(alias)

        yield stop


@asynccontextmanager
async def bctrl_async(base: str) -> AsyncGenerator[Stop]:
    """Use this package."""
    async with BctrlSession(KEY, base_url=base) as session:
        yield partial(session.stop_runtime, WORKSPACE)


@asynccontextmanager
async def vendor(base: str) -> AsyncGenerator[Stop]:
    """Use the vendor's AsyncBctrl. It cannot be closed: its connections end with the process."""
    client = import_module("bctrl").AsyncBctrl(token=KEY, base_url=base)
    yield client.sandboxes.stop


@asynccontextmanager
async def httpx(base: str) -> AsyncGenerator[Stop]:
    """Use httpx and msgspec."""
    async with import_module("httpx").AsyncClient(base_url=base, headers=_HEADERS) as client:

        async def stop(alias: str) -> _Runtime:
            response = await client.post(f"/v1/workspaces/{WORKSPACE}/runtimes/{alias}/stop")
            return _read(response.status_code, response.content)

        yield stop


@asynccontextmanager
async def pyreqwest(base: str) -> AsyncGenerator[Stop]:
    """Use pyreqwest, a client in Rust, and msgspec."""
    builder = import_module("pyreqwest.client").ClientBuilder()
    builder = builder.default_headers(_HEADERS).timeout(_TIMEOUT)
    async with builder.build() as client:

        async def stop(alias: str) -> _Runtime:
            url = f"{base}/v1/workspaces/{WORKSPACE}/runtimes/{alias}/stop"
            response = await client.post(url).build().send()
            return _read(response.status, await response.bytes())

        yield stop


class _Connection(asyncio.Protocol):
    """A connection that sends one request at a time and returns its status and body."""

    def __init__(self) -> None:
        self._body = b""
        self._answer: asyncio.Future[tuple[int, bytes]]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._parser = import_module("httptools").HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        """Parse a part of a response."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Store a part of the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """End the response."""
        self._answer.set_result((self._parser.get_status_code(), self._body))
        self._body = b""

    def connection_lost(self, error: Exception | None) -> None:
        """End the response that is being read."""
        if not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError())

    def request(self, data: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """Send a request."""
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return self._answer


@asynccontextmanager
async def raw(base: str) -> AsyncGenerator[Stop]:
    """Use an asyncio protocol of its own, httptools and msgspec: no client can cost much less."""
    url = urlsplit(base)
    host, port = str(url.hostname), int(url.port or 80)
    headers = "".join(f"{name}: {value}\r\n" for name, value in _HEADERS.items())
    head = f"HTTP/1.1\r\nHost: {url.netloc}\r\n{headers}Content-Length: 0\r\n\r\n"
    loop, idle = asyncio.get_running_loop(), list[_Connection]()

    async def connect() -> _Connection:
        _, connection = await loop.create_connection(_Connection, host, port)
        return connection

    async def stop(alias: str) -> _Runtime:
        connection = idle.pop() if idle else await connect()
        path = f"/v1/workspaces/{WORKSPACE}/runtimes/{alias}/stop"
        runtime = _read(*await connection.request(f"POST {path} {head}".encode()))
        idle.append(connection)
        return runtime

    try:
        yield stop
    finally:
        for connection in idle:
            connection.transport.close()
