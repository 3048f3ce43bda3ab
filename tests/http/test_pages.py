"""Pages with a 2xx status, such as a login page: not answers of the API."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from helpers import BOUND, Connect, pass_time
from servers import Handler, answering, http_answer, raw_server

from bctrl_async import (
    BctrlNetworkError,
    BctrlResponseError,
    BctrlSession,
    RetryPolicy,
    StopOutcome,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault

PAGE = "<!DOCTYPE html><html><head><title>Sign in</title></head><body>Sign in</body></html>"
HTML = "Content-Type: text/html; charset=utf-8"
JSON = "Content-Type: application/json"
TIMEOUT = BOUND
"""Seconds for an attempt. Some answers never end; there the clock jumps ahead."""

ENCODINGS: dict[str, bytes] = {
    "UTF-8": PAGE.encode(),
    "UTF-8 with a BOM": codecs.BOM_UTF8 + PAGE.encode(),
    "UTF-16 LE with a BOM": codecs.BOM_UTF16_LE + PAGE.encode("utf-16-le"),
    "UTF-16 BE with a BOM": codecs.BOM_UTF16_BE + PAGE.encode("utf-16-be"),
    "UTF-16 LE": PAGE.encode("utf-16-le"),
    "UTF-16 BE": PAGE.encode("utf-16-be"),
    "UTF-16 LE after blank lines": codecs.BOM_UTF16_LE + f"\r\n \t{PAGE}".encode("utf-16-le"),
    "blank lines": b"\r\n\r\n \t" + PAGE.encode(),
    "a BOM and blank lines": codecs.BOM_UTF8 + b"\r\n \t" + PAGE.encode(),
    "a megabyte of blank lines": b"\n" * 1_000_000 + PAGE.encode(),
    "XML": b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"/>',
    "a comment": b"<!-- portal -->" + PAGE.encode(),
    "more than 1 MiB": PAGE.encode() + b" " * 2**21,
    "UTF-16 of more than 1 MiB": (PAGE + " " * 2**20).encode("utf-16"),
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


async def stop_one(server: str) -> StopOutcome:
    """Stop one runtime in bulk and return its outcome."""
    outcomes: list[StopOutcome] = []
    once = RetryPolicy(attempts=1, patience=0, base=0.001, cap=0.001)
    async with BctrlSession("k", base_url=server, retry=once, timeout=TIMEOUT) as session:
        await session.stop_runtimes([("ws-1", "crm")], on_outcome=outcomes.append, verify=False)
    (outcome,) = outcomes
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
    async with raw_server(delivering(http_answer("200 OK", body), deliver)) as url:
        assert_is_unknown_because_of_a_page(await stop_one(url))


@every_delivery
@pytest.mark.parametrize(
    "content_type",
    [HTML, "content-type: TEXT/HTML", "Content-Type: application/xhtml+xml;charset=utf-16"],
)
@pytest.mark.parametrize("body", [b"Sign in first", b'{"status": "sign in"}', b"?" * 2**21])
async def test_a_body_of_the_content_type_of_pages_is_never_accepted(
    body: bytes, content_type: str, deliver: Delivery
) -> None:
    """Fault: only the body is looked at, and only its first byte."""
    async with raw_server(delivering(http_answer("200 OK", body, content_type), deliver)) as url:
        assert_is_unknown_because_of_a_page(await stop_one(url))


async def test_a_page_without_its_body_is_not_accepted() -> None:
    for answer in (
        http_answer("200 OK", b"", HTML),
        http_answer("200 OK", b"not gzip", HTML, "Content-Encoding: gzip"),
    ):
        async with raw_server(answering(answer)) as url:
            assert_is_unknown_because_of_a_page(await stop_one(url))


async def test_the_beginning_of_a_page_that_was_cut_short_is_kept_without_the_key() -> None:
    answer = http_answer("200 OK", b"<html>emulator-key</html>", HTML)
    async with (
        raw_server(delivering(answer, cut_short)) as url,
        BctrlSession("emulator-key", base_url=url) as session,
    ):
        with pytest.raises(BctrlResponseError) as caught:
            await session.stop_runtime("ws-1", "crm")
    assert caught.value.body == "<html>***</"


async def test_a_page_is_not_sent_for_again() -> None:
    heads: list[bytes] = []

    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        writer.write(http_answer("200 OK", PAGE.encode(), HTML))

    async with raw_server(handle) as url, BctrlSession("k", base_url=url) as session:
        with pytest.raises(BctrlResponseError):
            await session.stop_runtime("ws-1", "crm")
        with pytest.raises(BctrlResponseError) as caught:
            await session.get_runtime("ws-1", "crm")
    assert len(heads) == 2
    assert not caught.value.may_have_stopped


@every_delivery
@pytest.mark.parametrize(
    "body",
    [b'{"status": "stopped"}', b'"stopped"', b"It is being stopped.", b"[" + b" " * 2**21 + b"]"],
)
async def test_a_body_that_is_not_a_page_is_accepted_although_it_cannot_be_read(
    body: bytes, deliver: Delivery
) -> None:
    async with raw_server(delivering(http_answer("200 OK", body, JSON), deliver)) as url:
        outcome = await stop_one(url)

    assert outcome.result is StopResult.ACCEPTED
    assert isinstance(outcome.error, BctrlNetworkError)
    assert outcome.error.accepted


async def test_the_part_of_a_truncated_body_that_was_read_is_kept() -> None:
    """Fault: the error of a truncated body does not show what was read of it."""
    answer = http_answer("200 OK", b'{"status": "stopped"}', JSON)
    async with raw_server(delivering(answer, cut_short)) as url:
        outcome = await stop_one(url)

    assert outcome.error is not None
    assert outcome.error.body == '{"status": "stop'


async def test_only_the_error_of_a_stop_says_that_it_was_accepted(
    emulator: Emulator, connect: Connect
) -> None:
    emulator.inject(Fault.MALFORMED_JSON)
    answer = http_answer("200 OK", b"not a runtime", JSON)
    async with connect() as session:
        with pytest.raises(BctrlResponseError) as caught:
            await session.stop_runtime("ws-1", "crm")
        assert caught.value.accepted
    async with raw_server(answering(answer)) as url, BctrlSession("k", base_url=url) as session:
        with pytest.raises(BctrlResponseError) as caught:
            await session.get_runtime("ws-1", "crm")
        assert not caught.value.accepted
