"""Pages with a 2xx status, such as a login page: not answers of the API."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from helpers import BOUND, pass_time
from servers import Handler, http_answer, recording, served

from bctrl_async import (
    BctrlNetworkError,
    BctrlResponseError,
    RetryPolicy,
    StopOutcome,
    StopResult,
)

PAGE = "<!DOCTYPE html><html><head><title>Sign in</title></head><body>Sign in</body></html>"
HTML = "Content-Type: text/html; charset=utf-8"
JSON = "Content-Type: application/json"
TIMEOUT = BOUND
"""Seconds for an attempt. Some answers never end; there the clock jumps ahead."""

ENCODINGS: dict[str, bytes] = {
    "UTF-8 with a BOM": codecs.BOM_UTF8 + PAGE.encode(),
    "UTF-16 BE with a BOM": codecs.BOM_UTF16_BE + PAGE.encode("utf-16-be"),
    "UTF-16 BE": PAGE.encode("utf-16-be"),
    "UTF-16 LE after blank lines": codecs.BOM_UTF16_LE + f"\r\n \t{PAGE}".encode("utf-16-le"),
    "a megabyte of blank lines": b"\n" * 1_000_000 + PAGE.encode(),
    "a comment": b"<!-- portal -->" + PAGE.encode(),
    "more than 1 MiB": PAGE.encode() + b" " * 2**21,
}
every_encoding = pytest.mark.parametrize("body", ENCODINGS.values(), ids=ENCODINGS.keys())

Delivery = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


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


every_delivery = pytest.mark.parametrize(
    "deliver", [complete, cut_short, held_back, in_pieces], ids=lambda deliver: deliver.__name__
)


def delivering(answer: bytes, deliver: Delivery) -> Handler:
    async def handle(_: bytes, writer: asyncio.StreamWriter) -> None:
        await deliver(answer, writer)

    return handle


async def stop_one(server: bytes | Handler) -> StopOutcome:
    """Stop one runtime in bulk and return its outcome."""
    outcomes: list[StopOutcome] = []
    once = RetryPolicy(attempts=1, patience=0, base=0.001, cap=0.001)
    async with served(server, retry=once, timeout=TIMEOUT) as session:
        await session.stop_runtimes([("ws-1", "crm")], on_outcome=outcomes.append, verify=False)
    [outcome] = outcomes
    return outcome


def assert_is_unknown_because_of_a_page(outcome: StopOutcome) -> None:
    assert outcome.result is StopResult.UNKNOWN
    error = outcome.error
    assert type(error) is BctrlResponseError
    assert "a page" in error.summary
    assert (error.status, error.may_have_stopped, error.accepted) == (200, True, False)


@every_delivery
@every_encoding
async def test_a_body_that_begins_like_a_page_is_never_accepted(
    body: bytes, deliver: Delivery
) -> None:
    """Fault: a login page counts as accepted if it has a BOM, is UTF-16, cut, long or slow."""
    answer = delivering(http_answer("200 OK", body), deliver)
    assert_is_unknown_because_of_a_page(await stop_one(answer))


@every_delivery
@pytest.mark.parametrize(
    "content_type",
    ["content-type: TEXT/HTML", "Content-Type: application/xhtml+xml;charset=utf-16"],
)
@pytest.mark.parametrize("body", [b'{"status": "sign in"}', b"?" * 2**21])
async def test_a_body_of_the_content_type_of_pages_is_never_accepted(
    body: bytes, content_type: str, deliver: Delivery
) -> None:
    """Fault: only the body is looked at, and only its first byte."""
    answer = delivering(http_answer("200 OK", body, content_type), deliver)
    assert_is_unknown_because_of_a_page(await stop_one(answer))


async def test_a_page_without_its_body_is_not_accepted() -> None:
    for answer in (
        http_answer("200 OK", b"", HTML),
        http_answer("200 OK", b"not gzip", HTML, "Content-Encoding: gzip"),
    ):
        assert_is_unknown_because_of_a_page(await stop_one(answer))


async def test_a_page_is_not_sent_for_again() -> None:
    heads: list[bytes] = []
    async with served(recording(heads, http_answer("200 OK", PAGE.encode(), HTML))) as session:
        with pytest.raises(BctrlResponseError):
            await session.stop_runtime("ws-1", "crm")
        with pytest.raises(BctrlResponseError) as caught:
            await session.get_runtime("ws-1", "crm")
    assert len(heads) == 2
    assert not caught.value.may_have_stopped


@every_delivery
@pytest.mark.parametrize(
    "body",
    [b'{"status": "stopped"}', b"It is being stopped.", b"[" + b" " * 2**21 + b"]"],
)
async def test_a_body_that_is_not_a_page_is_accepted_although_it_cannot_be_read(
    body: bytes, deliver: Delivery
) -> None:
    outcome = await stop_one(delivering(http_answer("200 OK", body, JSON), deliver))

    assert outcome.result is StopResult.ACCEPTED
    assert isinstance(outcome.error, BctrlNetworkError)
    assert outcome.error.accepted


@pytest.mark.parametrize(
    ("content_type", "body", "kept"),
    [
        (JSON, b'{"status": "stopped"}', '{"status": "stop'),
        (HTML, b"<html>a-key</html>", "<html>***</"),
    ],
)
async def test_the_part_of_a_truncated_body_that_was_read_is_kept_without_the_key(
    content_type: str, body: bytes, kept: str
) -> None:
    """Fault: the error of a truncated body does not show what was read of it."""
    answer = delivering(http_answer("200 OK", body, content_type), cut_short)
    async with served(answer, "a-key") as session:
        with pytest.raises(BctrlResponseError) as caught:
            await session.stop_runtime("ws-1", "crm")
    assert caught.value.body == kept
