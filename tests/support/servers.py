"""Servers for tests: any bytes, sessions on them, and an emulator in a thread."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from bctrl_async import BctrlSession
from bctrl_async.emulator import Fault, Reply
from bctrl_async.testing import _running_in_thread
from support.wire_faults import WireEmulator

Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    context: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """Serve connections on loopback, over TLS with a context; yield the port."""
    serving: set[asyncio.Task[None]] = set()

    async def serve_connection(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                await serve(reader, writer)
        finally:
            serving.discard(task)
            writer.close()

    server = await asyncio.start_server(serve_connection, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        # Otherwise their connections would be left to the garbage collector.
        tasks = list(serving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)


@asynccontextmanager
async def raw_server(handle: Handler) -> AsyncIterator[str]:
    """Serve on loopback; `handle` gets each request's head, and answers it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await handle(await reader.readuntil(b"\r\n\r\n"), writer)
            await writer.drain()

    async with listening(serve) as port:
        yield f"http://127.0.0.1:{port}"


def answering(*answers: bytes) -> Handler:
    """Answer the requests with these bytes in order, all later with the last."""
    remaining = list(answers)

    async def handle(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(remaining.pop(0) if len(remaining) > 1 else remaining[0])

    return handle


def http_answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    """Return a complete response with its Content-Length."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def closing(answer: bytes) -> Handler:
    """Answer each request with these bytes, and close the connection."""

    async def handle(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    return handle


def recording(heads: list[bytes], answer: bytes) -> Handler:
    """Keep the head of each request, and answer it with these bytes."""

    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        writer.write(answer)

    return handle


@asynccontextmanager
async def served(
    server: bytes | Handler,
    key: str = "k",
    **options: Any,  # noqa: ANN401 - those of a session.
) -> AsyncIterator[BctrlSession]:
    """Yield a session on a server that sends these bytes, or acts as a handler."""
    handle = answering(server) if isinstance(server, bytes) else server
    async with (
        raw_server(handle) as url,
        BctrlSession(key, base_url=url, **options) as session,
    ):
        yield session


@contextmanager
def emulator_in_a_thread(*faults: Fault | Reply) -> Iterator[WireEmulator]:
    """Run an emulator in a thread, for several event loops or processes."""
    emulator = WireEmulator(port=0)
    for number in range(10):
        emulator.add_runtime("ws-1", f"r{number}")
    emulator.inject(*faults)
    with _running_in_thread(emulator):
        yield emulator
