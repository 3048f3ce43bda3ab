"""A connector in memory, to try aiohttp's own code without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, TypeVar

import aiohttp

from bctrl_async._http.protocol import AnswerHandler

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.tracing import Trace

_T = TypeVar("_T")


class CannedConnector(aiohttp.BaseConnector):
    """A connector whose connections answer requests at once.

    Args:
        *answers: The bytes that answer each request; further requests are not answered.

    Attributes:
        connections: The number of connections made.
        protocol: The protocol of the last one.
        received: The bytes of all requests.
    """

    protocol: AnswerHandler

    def __init__(self, *answers: bytes) -> None:
        super().__init__()
        self._answers = iter(answers)
        self.connections: int = 0
        self.received: bytes = b""

    async def _create_connection(
        self,
        # aiohttp's arguments.
        req: aiohttp.ClientRequest,  # noqa: ARG002
        traces: list[Trace],  # noqa: ARG002
        timeout: aiohttp.ClientTimeout,  # noqa: ARG002, ASYNC109
    ) -> ResponseHandler:
        self.protocol = AnswerHandler(asyncio.get_running_loop())
        self.protocol.connection_made(_CannedTransport(self, self.protocol))
        self.connections += 1
        return self.protocol

    def discard(self) -> None:
        """Close all connections. Unlike `close`, it need not be awaited."""
        self._close()

    def receive(self, request: bytes, protocol: ResponseHandler) -> None:
        """Answer a request."""
        self.received += request
        if answer := next(self._answers, None):
            protocol.data_received(answer)


class _CannedTransport(asyncio.Transport):
    def __init__(self, connector: CannedConnector, protocol: ResponseHandler) -> None:
        super().__init__()
        self._connector = connector
        self._protocol = protocol
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._connector.receive(bytes(data), self._protocol)

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True
        self._protocol.connection_lost(None)


def run_now(coroutine: Coroutine[object, object, _T]) -> _T:
    """Return the result of a coroutine that does not wait.

    Raises:
        RuntimeError: It waits.
    """
    try:
        coroutine.send(None)
    except StopIteration as ended:
        returned: _T = ended.value
        return returned
    coroutine.close()
    raise RuntimeError("the coroutine waits")
