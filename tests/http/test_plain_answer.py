"""Plain answers, which are read without an HTTP parser; all others are left to aiohttp.

`tests/fuzz/` compares what follows from both, for mutated answers.
"""

from __future__ import annotations

import pytest

from bctrl_async._http.fast.answer import plain_answer

BODY = b'{"alias":"crm"}'
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n" + BODY
NGINX = (
    b"HTTP/1.1 200 OK\r\nServer: nginx/1.26.3\r\nDate: Thu, 26 Nov 2026 10:00:00 GMT\r\n"
    b"Content-Type: application/json\r\nContent-Length: 15\r\nConnection: keep-alive\r\n"
    b"X-Request-Id: 0190a6c2\r\nCache-Control: no-store\r\nStrict-Transport-Security: max-age=1\r\n"
    b"Set-Cookie: a=b\r\nSet-Cookie: c=d\r\n\r\n" + BODY
)
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


LINES = [
    b"Connection: close",
    b"Connection: keep-alive, close",
    b"Content-Encoding: gzip",
    b"Transfer-Encoding: chunked",
    b"Trailer: X",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Key1: x",
    b"Host: x",
    b"Content-Length: 15",
    b"Content-Length: 16",
    b"X: \xe9",
    b"X: a\x00b",
    b"X: a\nb",
    b"X: a ",
    b"X:  a",
    b" folded",
    b"X : a",
    b"X",
    b"",
    b"X: " + b"a" * 5_000,
    b"\r\n".join([b"X: a"] * 60),
]
OTHERS = [
    b"",
    PLAIN[:-1],
    PLAIN + b" ",
    PLAIN[:40],
    b"\r\n" + PLAIN,
    PLAIN.replace(b"200", b"201"),
    PLAIN.replace(b"1.1", b"1.0"),
    PLAIN.replace(b"HTTP", b"http"),
    PLAIN.replace(b" 15", b" 015"),
    PLAIN.replace(b"\r\n", b"\n"),
    b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN,
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n" + BODY,
    *(NGINX.replace(b"OK\r\n", b"OK\r\n" + line + b"\r\n") for line in LINES),
    *(NGINX.replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n\r\n") for line in LINES),
]


@pytest.mark.parametrize("data", OTHERS, ids=lambda data: repr(data)[:60])
def test_anything_else_is_left_to_aiohttp(data: bytes) -> None:
    assert plain_answer(data) is None
