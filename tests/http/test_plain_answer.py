"""Plain answers: what is read without an HTTP parser is read as aiohttp's parser reads it."""

from __future__ import annotations

import asyncio
from string import ascii_letters, digits

import pytest
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bctrl_async._http.fast.answer import plain_answer

BODY = b'{"alias":"crm"}'
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n" + BODY
NGINX = (
    b"HTTP/1.1 200 OK\r\nServer: nginx/1.26.3\r\nDate: Thu, 26 Nov 2026 10:00:00 GMT\r\n"
    b"Content-Type: application/json\r\nContent-Length: 15\r\nConnection: keep-alive\r\n"
    b"X-Request-Id: 0190a6c2\r\nCache-Control: no-store\r\nStrict-Transport-Security: max-age=1\r\n"
    b"Set-Cookie: a=b\r\nSet-Cookie: c=d\r\n\r\n" + BODY
)


def parsed(data: bytes) -> tuple[RawResponseMessage, bytes, bool] | None:
    """Return what aiohttp reads: head, body and if the connection stays open. None for an error."""
    loop = asyncio.new_event_loop()
    try:
        protocol = ResponseHandler(loop)
        protocol.set_response_params(read_until_eof=True)
        protocol.data_received(data)
        if protocol.exception() is not None or len(protocol) != 1:
            return None
        message, content = protocol._buffer[0][0]
        complete = content.is_eof() and content.exception() is None
        protocol._buffer.clear()
        return (message, content.read_nowait(), not protocol.should_close) if complete else None
    finally:
        loop.close()


EXPRESS = (
    b"HTTP/1.1 200 OK\r\nContent-Security-Policy: default-src 'self';base-uri 'self'\r\n"
    b"Cross-Origin-Opener-Policy: same-origin\r\nOrigin-Agent-Cluster: ?1\r\n"
    b"X-DNS-Prefetch-Control: off\r\nX-Powered-By: Express\r\n"
    b"Content-Type: application/json; charset=utf-8\r\nContent-Length: 15\r\n"
    b'ETag: W/"f-abc"\r\nVary: Accept-Encoding\r\nDate: Thu, 26 Nov 2026 10:00:00 GMT\r\n'
    b"Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n\r\n" + BODY
)


@pytest.mark.parametrize("data", [PLAIN, NGINX, EXPRESS, PLAIN.replace(b"OK", b"ok")])
def test_answers_of_common_servers_are_plain(data: bytes) -> None:
    answer = plain_answer(data)
    assert answer is not None
    assert (answer.code, answer.body) == (200, BODY)
    assert (answer.header("content-type") or "").startswith("application/json")


@pytest.mark.parametrize(
    "line",
    [
        b"Connection: close",
        b"Connection: keep-alive, close",
        b"Connection: upgrade",
        b"Proxy-Connection: close",
        b"Content-Encoding: gzip",
        b"Transfer-Encoding: chunked",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Key1: x",
        b"Content-Length: 15",
        b"Content-Length: 16",
        b"Host: x",
        b"X: \xe9",
        b"X: a\tb",
        b"X: a\x00b",
        b"X: a\nb",
        b" folded",
        b"X : a",
        b"X",
        b"",
        b"X: " + b"a" * 5_000,
        b"\r\n".join([b"X: a"] * 60),
    ],
)
@pytest.mark.parametrize("at", ["first", "last"])
def test_anything_else_in_the_head_is_left_to_aiohttp(line: bytes, at: str) -> None:
    head, _, body = NGINX.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    lines.insert(1 if at == "first" else len(lines), line)
    assert plain_answer(b"\r\n".join(lines) + b"\r\n\r\n" + body) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        PLAIN[:-1],
        PLAIN + b" ",
        PLAIN[:40],
        b"\r\n" + PLAIN,
        PLAIN.replace(b"200", b"201"),
        PLAIN.replace(b"1.1", b"1.0"),
        PLAIN.replace(b"HTTP", b"http"),
        PLAIN.replace(b" 15", b" 015"),
        PLAIN.replace(b" 15", b"  15"),
        PLAIN.replace(b"Content-Length: 15\r\n", b""),
        PLAIN.replace(b"\r\n", b"\n"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN,
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + BODY,
    ],
)
def test_other_answers_are_left_to_aiohttp(data: bytes) -> None:
    assert plain_answer(data) is None


NAMES = st.sampled_from(
    """
    Connection Proxy-Connection Content-Length Content-Type Content-Encoding Transfer-Encoding
    Upgrade Server Date Set-Cookie Keep-Alive Etag Sec-WebSocket-Key1 Content-Range Host TE
    Max-Forwards User-Agent Trailer Expect X-Request-Id Via Vary HTTP2-Settings
    """.split()  # noqa: SIM905 - easier to read.
) | st.text(ascii_letters + digits + "-", min_size=1, max_size=12)
VALUES = st.sampled_from(
    ["15", "0", "close", "keep-alive", "chunked", "gzip", "upgrade", "websocket", "", " ", "a b"]
) | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


@given(
    st.lists(st.tuples(NAMES, VALUES), max_size=3),
    st.sampled_from([b"", b"", b"", b"x"]),
    st.sampled_from([15, 15, 15, 14, 0]),
)
@example([("Connection", "keep-alive")], b"", 15)
@example([("Server", "nginx ")], b"", 15)
@example([("Server", " nginx")], b"", 15)
@settings(max_examples=1_500, deadline=None)
def test_aiohttp_reads_a_plain_answer_in_the_same_way(
    headers: list[tuple[str, str]], rest: bytes, length: int
) -> None:
    """Fault: a reader of its own and aiohttp's parser can take the same bytes for two answers."""
    lines = [f"{name}: {value}" for name, value in [*headers, ("Content-Length", str(length))]]
    data = "\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]).encode() + BODY + rest
    answer = plain_answer(data)
    if answer is None:
        return
    read = parsed(data)
    assert read is not None
    message, body, stays_open = read
    assert stays_open
    assert body == answer.body
    assert message.code == answer.code
    for name in message.headers:
        assert answer.header(name) == message.headers[name]
    assert answer.header("x-absent") is None
