"""Answers of portals and gateways: they are no fact about a runtime.

The simulation stops runtimes through gateways that answer 404, 503 or a page by
themselves.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from support.helpers import BOUND, pass_time
from support.servers import http_answer, served

from bctrl_async import (
    BctrlNetworkError,
    RetryPolicy,
    StopOutcome,
    StopResult,
)
from bctrl_async._http.response import with_body
from bctrl_async._kinds import Failure, Kind

CRM = ("ws-1", "crm")
ONCE = RetryPolicy(attempts=1, patience=0)
TIMEOUT = BOUND
"""Seconds for an attempt. Some answers never end; there the clock jumps ahead."""

PAGE = "<!DOCTYPE html><html><title>Sign in</title><body>Sign in</body></html>"
HTML = "text/html; charset=utf-8"
JSON = "application/json"

BODIES: dict[str, tuple[str, bytes, bool]] = {
    "a page": (JSON, PAGE.encode(), True),
    "a page with a BOM": (JSON, codecs.BOM_UTF8 + PAGE.encode(), True),
    "a page in UTF-16 with a BOM": (
        JSON,
        codecs.BOM_UTF16_BE + PAGE.encode("utf-16-be"),
        True,
    ),
    "a page in UTF-16": (JSON, PAGE.encode("utf-16-be"), True),
    "a page after blank lines": (
        JSON,
        f"\ufeff\r\n \t{PAGE}".encode("utf-16-le"),
        True,
    ),
    "a page after many blank lines": (JSON, b"\n" * 1_000_000 + PAGE.encode(), True),
    # Fault: only the body is looked at, and only its first byte.
    "JSON that is called HTML": ("TEXT/HTML", b'{"status": "sign in"}', True),
    "noise that is called XHTML": ("application/xhtml+xml;charset=utf-16", b"?", True),
    "HTML without a body": (HTML, b"", True),
    "JSON": (JSON, b'{"status": "stopped"}', False),
    "words": (JSON, b"It is being stopped. <br>", False),
    "nothing": ("", b"", False),
}


@pytest.mark.parametrize(
    ("content_type", "body", "is_page"), BODIES.values(), ids=BODIES
)
def test_only_a_page_is_not_accepted(
    content_type: str, body: bytes, *, is_page: bool
) -> None:
    """Fault: a login page with a BOM, in UTF-16, cut, long or slow is accepted."""
    failure = Failure(kind=Kind.UNREADABLE, summary="it is not a runtime", status=200)

    returned = with_body(failure, content_type, body, "Bearer k")

    assert returned.kind is (Kind.PAGE if is_page else Kind.UNREADABLE)
    assert ("a page" in returned.summary) is is_page
    assert (returned.status, returned.may_have_worked) == (200, True)


async def complete(answer: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(answer)


async def cut_short(answer: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(answer[:-5])
    writer.close()


async def held_back(answer: bytes, writer: asyncio.StreamWriter) -> None:
    writer.transport.set_write_buffer_limits(0)
    writer.write(answer[:-5])
    # A busy machine must read it before the attempt times out.
    with suppress(ConnectionError):
        await writer.drain()
    for _iteration in range(100):
        await asyncio.sleep(0)
    pass_time(TIMEOUT)


async def in_pieces(answer: bytes, writer: asyncio.StreamWriter) -> None:
    head, separator, body = answer.partition(b"\r\n\r\n")
    writer.write(head + separator)
    for piece in (body[:1], body[1:3], body[3:4], body[4:]):
        await writer.drain()
        for _iteration in range(20):
            await asyncio.sleep(0)
        writer.write(piece)


Deliver = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@pytest.mark.parametrize("size", [0, 2**21])
@pytest.mark.parametrize(
    ("body", "header", "result"),
    [
        (PAGE.encode(), JSON, StopResult.UNKNOWN),
        (b'{"status": "stopped"}', HTML, StopResult.UNKNOWN),
        (b'{"status": "stopped"}', JSON, StopResult.ACCEPTED),
    ],
)
@pytest.mark.parametrize(
    "deliver",
    [
        complete,
        cut_short,
        pytest.param(held_back, marks=pytest.mark.moves_clock),
        in_pieces,
    ],
)
async def test_a_page_is_known_however_it_is_delivered(
    deliver: Deliver, body: bytes, header: str, result: StopResult, size: int
) -> None:
    outcomes: list[StopOutcome] = []

    async def handle(_: bytes, writer: asyncio.StreamWriter) -> None:
        answer = http_answer("200 OK", body + b" " * size, f"Content-Type: {header}")
        await deliver(answer, writer)

    async with served(handle, "stopped", retry=ONCE, timeout=TIMEOUT) as session:
        await session.stop_runtimes([CRM], on_outcome=outcomes.append, verify=False)
    [outcome] = outcomes
    assert outcome.result is result
    error = outcome.error
    assert isinstance(error, BctrlNetworkError)
    assert (error.status, error.may_have_stopped) == (200, True)
    # Fault: the error of a truncated body does not show what was read of it.
    shown = body.decode().replace("stopped", "***")
    assert (error.body or "").startswith(shown[:-5])
