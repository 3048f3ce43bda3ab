"""A minimal asyncio server that answers every stop.

`python tests/benchmarks/server.py [PEM]` listens on 127.0.0.1 and prints its port. It
ends with its standard input, so that it does not outlive its parent process. With PEM,
the file of a certificate and its key, it speaks TLS.
"""

from __future__ import annotations

import asyncio
import ssl
import sys

RUNTIME = b"""{"id":"0190a6c2-7a51-7c3e-9d0b-3f1f6f0a1b2c","alias":"%s",
"workspaceId":"6f1f7a52-9f0e-4d53-8a64-0d1c6d6d2f11","kind":"browser","status":"stopped",
"driver":"chromium","createdAt":"2026-11-25T09:00:00.000Z","updatedAt":"2026-11-25T09:30:00.000Z",
"summary":{"browserRunning":false,"currentDriver":null,"defaultContextId":"ctx-1",
"defaultPageId":"page-1","launchMode":"profile",
"profileId":"4b0d6b3e-6f0a-4b57-9a55-0f7f8f5d3c21","storageWorkspace":null}}"""

# The vendor's current package has no workspaces; its closest operation stops a sandbox.
SANDBOX = b"""{"id":"crm","object":"sandbox","status":"stopped","image":"base",
"spaceId":"ws","createdAt":"2026-11-25T09:00:00.000Z","updatedAt":"2026-11-25T09:30:00.000Z",
"audit":{"files":"directory"},
"capabilities":{"exec":true,"files":true,"ports":true,"ssh":true,"terminal":true}}"""


def _answer(body: bytes) -> bytes:
    body = body.replace(b"\n", b"")
    lines = ["HTTP/1.1 200 OK", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    return head.encode() + body


_SANDBOX_ANSWER = _answer(SANDBOX)


class ServerProtocol(asyncio.Protocol):
    """A server protocol that answers each stop as done."""

    def __init__(self) -> None:
        self._unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each complete request."""
        unread = self._unread + data
        while (end := _end_of_request(unread)) is not None:
            answer = _SANDBOX_ANSWER
            if not unread.startswith(b"POST /v1/sandboxes/"):
                answer = _answer(RUNTIME % unread.split(b"/", 6)[5])
            self._transport.write(answer)
            unread = unread[end:]
        self._unread = unread


def _end_of_request(data: bytes) -> int | None:
    end_of_head = data.find(b"\r\n\r\n")
    if end_of_head < 0:
        return None
    _, found, after = data[:end_of_head].lower().partition(b"\r\ncontent-length:")
    length = int(after.partition(b"\r\n")[0]) if found else 0
    end = end_of_head + 4 + length
    return end if end <= len(data) else None


async def serve(certificate: str | None = None) -> None:
    """Listen on a free port until standard input ends."""
    loop = asyncio.get_running_loop()
    tls = None
    if certificate is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate)
    # A client may open all its connections at once.
    server = await loop.create_server(
        ServerProtocol, "127.0.0.1", 0, backlog=1024, ssl=tls
    )
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
