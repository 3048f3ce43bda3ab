"""The protocol of a connection: aiohttp's own, which reads plain answers without a parser."""

from __future__ import annotations

import asyncio

from aiohttp import EMPTY_PAYLOAD
from aiohttp.client_proto import ResponseHandler

from bctrl_async._http.plain_answer import plain_answer


class AnswerHandler(ResponseHandler):
    """A protocol that can expect an answer, most likely a plain one.

    aiohttp's parser and stream reader are a quarter of the cost of a stop. They are made only for
    an answer that is not plain, and then read it from its first byte.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._is_expecting = False

    def expect_answer(self) -> None:
        """Prepare for the answer to a POST. `read` may return a `PlainAnswer` as its message."""
        self._is_expecting = True

    def data_received(self, data: bytes) -> None:
        """Read a plain answer, or leave it to aiohttp."""
        if self._is_expecting:
            self._is_expecting = False
            answer = plain_answer(data)
            if answer is not None:
                # aiohttp's queue does not look at what it passes on.
                self.feed_data((answer, EMPTY_PAYLOAD))  # type: ignore[arg-type]
                return
            self.set_response_params(read_until_eof=True)
        super().data_received(data)
