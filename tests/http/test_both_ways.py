"""The fast path: it is taken, sends aiohttp's bytes, and reads plain answers.

It leaves all other answers to aiohttp. `tests/fuzz/` compares what follows from both.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

import pytest
from support.helpers import Connect, add_runtimes
from support.servers import http_answer, raw_server, recording
from support.ways import Ways, long_way
from test_observer import Recorder

from bctrl_async import BctrlPermissionError, BctrlSession
from bctrl_async._http.fast.answer import plain_answer
from bctrl_async.emulator import Emulator


async def test_every_stop_of_an_owned_pool_takes_the_fast_path(
    emulator: Emulator, connect: Connect, ways: Ways, request: pytest.FixtureRequest
) -> None:
    """Fault: the fast path is lost, and only the time of stops shows it."""
    targets = add_runtimes(emulator, 100)
    async with connect() as session:
        await asyncio.gather(
            *(session.stop_runtime(*target) for target in targets[:50])
        )
        assert (await session.stop_runtimes(targets[50:])).ok
    assert len(emulator.requests) == 100
    assert ways.taken == (
        (0, 100) if request.config.getoption("long_way") else (100, 0)
    )


async def ask_for_key() -> str:
    return "key-of-a-function"


TRACED = Recorder({"traceparent": "00-1-2-01", "accept": "is the session's"})
Options = dict[str, Any]

CASES: dict[str, tuple[Options, Options]] = {
    "plain": ({}, {}),
    "headers": (
        {},
        {"headers": {"X-B": "1", "X-A": "", "x-b2": "a\tb", "User-Agent": "own/1"}},
    ),
    "idempotency key, replaced header": (
        {},
        {"headers": {"Idempotency-Key": "k", "accept": "text/html"}},
    ),
    "awaited key, headers": (
        {"api_key": ask_for_key},
        {"headers": {"Idempotency-Key": "k"}},
    ),
    "session's headers": (
        {"headers": {"X-B": "1", "x-b": "2", "X-A": "", "user-agent": "own/1"}},
        {},
    ),
    "session's headers, headers": (
        {"headers": {"X-B": "1", "Cookie": "a=b"}},
        {"headers": {"x-b": "2", "X-A": "3"}},
    ),
    "observer, awaited key, headers": (
        {"observer": TRACED, "api_key": ask_for_key},
        {"headers": {"X-A": "1"}},
    ),
}
"""Options of a session, and of a stop."""


@pytest.mark.parametrize(("settings", "arguments"), CASES.values(), ids=CASES)
async def test_both_ways_send_the_same_bytes(
    settings: Options, arguments: Options, ways: Ways
) -> None:
    """Fault: a header is missing on the fast path, and a server rejects it."""
    heads: list[bytes] = []
    targets = [("ws-1", "crm"), ("ws 1/ä", "c%2Fr m"), ("ws-1", "crm")]
    async with raw_server(recording(heads, http_answer("403 Forbidden"))) as url:
        options = {
            "api_key": "k",
            "base_url": f"{url}/a%2Fb/v1",
            "check_answers": False,
        }
        for way in (nullcontext, long_way):
            async with BctrlSession(**{**options, **settings}) as session:
                with way():
                    for target in targets:
                        with pytest.raises(BctrlPermissionError):
                            await session.stop_runtime(*target, **arguments)

    assert len(heads) == 6
    assert heads[:3] == heads[3:]
    assert ways.short in {0, 3}


BODY = b'{"alias":"crm"}'
PLAIN = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
    + BODY
)
NGINX = (
    b"HTTP/1.1 200 OK\r\nServer: nginx/1.26.3\r\nDate: Thu, 26 Nov 2026 10:00:00 "
    b"GMT\r\nContent-Type: application/json\r\nContent-Length: 15\r\nConnection: "
    b"keep-alive\r\nX-Request-Id: 0190a6c2\r\nCache-Control: "
    b"no-store\r\nStrict-Transport-Security: max-age=1\r\n"
    b"Set-Cookie: a=b\r\nSet-Cookie: c=d\r\n\r\n" + BODY
)
EXPRESS = (
    b"HTTP/1.1 200 OK\r\n"
    b"Content-Security-Policy: default-src 'self';base-uri 'self'\r\n"
    b"Cross-Origin-Opener-Policy: same-origin\r\nOrigin-Agent-Cluster: ?1\r\n"
    b"X-DNS-Prefetch-Control: off\r\nX-Powered-By: Express\r\n"
    b"Content-Type: application/json; charset=utf-8\r\nContent-Length: 15\r\n"
    b'ETag: W/"f-abc"\r\nVary: Accept-Encoding\r\n'
    b"Date: Thu, 26 Nov 2026 10:00:00 GMT\r\n"
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
