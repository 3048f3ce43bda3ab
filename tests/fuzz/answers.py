"""Answers that no server should send, with mutated bytes, cuts and endings."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import zlib
from collections.abc import Callable
from enum import Enum
from importlib.util import find_spec
from typing import NamedTuple

KEY = "sk-live-0123456789abcdef"
TIMEOUT = 1.0
"""Seconds for one attempt."""
_MIB = 1024 * 1024
_SHORT = 0.001
"""Seconds between packets that are close together.

The ways differ in the steps of the event loop that a call takes: with packets in
neighbouring steps the next request would race against a packet.
"""
_EXPIRY = 60.0
"""Seconds after which aiohttp has closed a connection that was not used."""


class Ending(Enum):
    """The end of a connection, by the server."""

    CLOSE = "close"
    RESET = "reset"


class Packet(NamedTuple):
    """Bytes that arrive together, or the end of the connection.

    Attributes:
        wait: Seconds since the packet before; with 0 both arrive in one step of the
            event loop.
    """

    wait: float
    data: bytes | Ending


class Stop(NamedTuple):
    """One stop, and what happens to it.

    Attributes:
        answer: The packets that arrive after its request.
        cancelled: The seconds after which it is cancelled, or None.
        pause: Seconds until the next stop.
        headers: The headers of the call, or None.
    """

    answer: list[Packet]
    cancelled: float | None
    pause: float
    headers: dict[str, str] | None


class Case(NamedTuple):
    """A few stops, one after the other.

    Attributes:
        connecting: The seconds that connecting takes, for each connection; None refuses
            it.
        greeting: Bytes that arrive with each connection.
        interruption: Bytes that arrive between its first request and the answer.
        stops: The stops; the last is answered as it should be.
        observed: True if the session has an observer.
        closed: The seconds after which the session is closed, or None.
    """

    connecting: list[float | None]
    greeting: bytes
    interruption: bytes
    stops: list[Stop]
    observed: bool
    closed: float | None


def draw(seed: int, number: int) -> Case:
    """Draw a case."""
    rng = random.Random(f"{seed}/{number}")
    stops = [
        Stop(
            _answer(rng, f"r{index}") if rng.random() < share else [plain(f"r{index}")],
            _interruption(rng) if rng.random() < 0.04 else None,
            rng.choice([0.0, 0.0, 0.05, _EXPIRY]),
            {"Idempotency-Key": "k"} if rng.random() < 0.2 else None,
        )
        for index, share in enumerate([1.0, 0.4, 0.0])
    ]
    greeting, interruption = (
        _noise(rng) if rng.random() < 0.01 else b"" for _ in range(2)
    )
    closed = _interruption(rng) if rng.random() < 0.01 else None
    connecting = [_connecting(rng) if rng.random() < 0.02 else 0.0 for _ in stops]
    return Case(connecting, greeting, interruption, stops, rng.random() < 0.2, closed)


def _connecting(rng: random.Random) -> float | None:
    # It is refused, or takes less than its time limit, or more.
    return rng.choice([None, 0.0017, 0.5 * TIMEOUT, 0.95 * TIMEOUT, 2.0 * TIMEOUT])


def _interruption(rng: random.Random) -> float:
    # Packets are at these times, some of them a little later.
    return rng.choice([0.0, 1.0, 2.0, 14.0, 1990.0]) * _SHORT + 0.0006


def plain(alias: str) -> Packet:
    body = runtime(alias)
    return Packet(
        _SHORT, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )


def _answer(rng: random.Random, alias: str) -> list[Packet]:
    is_typical = rng.random() < 0.3
    data = bytearray(
        _typical_answer(rng, alias) if is_typical else _whole_answer(rng, alias)
    )
    for _ in range(
        rng.choice([0, 1, 1, 1] if is_typical else [0, 0, 0, 0, 1, 1, 2, 5])
    ):
        rng.choice(_MUTATIONS)(rng, data)
    if rng.random() < 0.1:
        data += rng.choice([_noise(rng), _whole_answer(rng, alias), b"\r\n", b"\0"])
    if rng.random() < 0.15:
        del data[rng.randrange(len(data) + 1) :]
    packets = _packets(rng, bytes(data))
    match rng.random():
        case draw if draw < 0.25:
            packets.append(Packet(_gap(rng), rng.choice(list(Ending))))
        case draw if draw < 0.35:
            packets += [Packet(rng.choice([_SHORT, 0.02, 10.0]), _noise(rng))]
    return packets


def _packets(rng: random.Random, data: bytes) -> list[Packet]:
    cuts = {
        rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 8]))
    }
    if rng.random() < 0.03 and len(data) < 1000:
        cuts = set(range(len(data)))
    edges = [0, *sorted(cuts - {0, len(data)}), len(data)]
    return [
        Packet(_gap(rng) if start else _SHORT, data[start:end])
        for start, end in itertools.pairwise(edges)
    ]


def _gap(rng: random.Random) -> float:
    # A packet and the timeout never meet.
    return rng.choices([0.0, _SHORT, 0.013, 2.0 * TIMEOUT], [30, 60, 8, 2])[0]


def _noise(rng: random.Random) -> bytes:
    return rng.choice(
        [
            b"\r\n",
            b"\n",
            b"\0",
            b"220 mail.example.com ESMTP\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n",
            b"HTTP/1.1 ",
            b"\x15\x03\x01\x00\x02\x02\x28",
            rng.randbytes(rng.randint(1, 40)),
        ]
    )


# Bodies


def runtime(alias: str) -> bytes:
    return json.dumps(
        {
            "id": "3f2b9c1e-0a4d-4f6b-9d2e-7c5a1b8e4f60",
            "alias": alias,
            "workspaceId": "8d1f7a52-6c3e-4b0f-a9d4-2e5b7c8f1a36",
            "kind": "browser",
            "status": "stopped",
            "driver": "playwright",
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": "2026-01-01T00:00:00Z",
        }
    ).encode()


def _problem(rng: random.Random) -> bytes:
    code = rng.choice(
        ["runtime.not_found", "runtime.not_active", "auth.invalid", "rate.limited"]
    )
    return json.dumps(
        {"code": code, "error": f"no {KEY}", "hint": "ask", "requestId": "r"}
    ).encode()


def _body(rng: random.Random, alias: str, *, success: bool) -> bytes:
    if rng.random() < 0.7:
        return runtime(alias) if success else _problem(rng)
    return rng.choice(
        [
            b"",
            b"{}",
            b"null",
            b"[1, 2",
            b"<html>Log in</html>",
            b"upstream connect error or disconnect/reset before headers",
            b"<!DOCTYPE html><html><body>Error 503 Backend fetch failed</body></html>",
            b"<html><head><title>503 Service Unavailable</title></head></html>",
            b'{"error": {"code": "ServiceUnavailable"}}',
            b'{"code": "409", "error": "Conflict"}',
            b"\xef\xbb\xbf" + runtime(alias),
            b" " * 3000 + runtime(alias),
            f"echo of {KEY}".encode(),
            runtime("another"),
            runtime(alias)[:-1],
            _problem(rng),
            rng.randbytes(rng.randint(1, 200)),
            b" "
            * (
                rng.choice([70_000, 300_000, _MIB - 1, _MIB + 1])
                if rng.random() < 0.1
                else 9
            ),
        ]
    )


def _gzipped(body: bytes) -> bytes:
    return gzip.compress(body, mtime=0)


def _deflated(body: bytes, window: int) -> bytes:
    packer = zlib.compressobj(wbits=window)
    return packer.compress(body) + packer.flush()


def _brotli(body: bytes) -> bytes:
    import brotli  # type: ignore[import-untyped,import-not-found,unused-ignore]  # noqa: PLC0415

    packed: bytes = brotli.compress(body)
    return packed


_ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": _gzipped,
    "x-gzip": _gzipped,
    "deflate": lambda body: _deflated(body, zlib.MAX_WBITS),
    "Deflate": lambda body: _deflated(body, -zlib.MAX_WBITS),
    "identity": bytes,
    "br": _brotli if find_spec("brotli") else bytes,
    "zstd": bytes,
    "compress": bytes,
    "gzip, gzip": lambda body: _gzipped(_gzipped(body)),
}


def _chunked(rng: random.Random, body: bytes) -> bytes:
    size = rng.choice([1, 7, 100, 5000])
    if len(body) > 1000 * size:
        size = len(body)
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    extension = rng.choice([b"", b"", b";a=b", b'; q="x\\"y"', b" "])
    framed = [b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts]
    end = rng.choice(
        [b"0\r\n\r\n"] * 6
        + [b"0\r\nX-Trailer: 1\r\n\r\n", b"00\r\n\r\n", b"", b"0\r\n"]
    )
    return b"".join(framed) + end


# Heads

_STATUSES = (
    *["200 OK"] * 20,
    *[
        "201 Created",
        "202 Accepted",
        "204 No Content",
        "205 Reset Content",
        "206 Partial Content",
    ],
    *["301 Moved", "302 Found", "304 Not Modified", "307 Temporary", "308 Permanent"],
    *[
        "400 Bad Request",
        "401 Unauthorized",
        "403 Forbidden",
        "404 Not Found",
        "409 Conflict",
    ],
    *["408 Request Time-out", "499 Client Closed Request"],
    *[
        "422 Unprocessable",
        "429 Too Many Requests",
        "500 Oops",
        "502 Bad Gateway",
        "503 Later",
    ],
    *[
        "504 Gateway Timeout",
        "429 Slow down",
        "409 Conflict",
        "404 Not Found",
        "200 Fine",
        "200 ",
    ],
)
_ODD_STATUSES = (
    *[
        "101 Switching Protocols",
        "100 Continue",
        "199 Odd",
        "299 Odd",
        "600 Beyond",
        "999 Beyond",
    ],
    *[
        "000 Nothing",
        "20 OK",
        "2000 OK",
        "200",
        "200 ",
        "OK",
        "",
        "-200 OK",
        "200 \xe9\xff",
    ],
    "200 " + "x" * 9000,
)
_VERSIONS = ("HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0")
_ODD_VERSIONS = (
    *[
        "HTTP/0.9",
        "HTTP/2.0",
        "HTTP/1.2",
        "http/1.1",
        "HTTP/1",
        "HTTPS/1.1",
        "HTTP /1.1",
        "ICY",
    ],
    "",
)
_HEADERS = (
    *["Content-Type: application/json"] * 6,
    *[
        "Content-Type: text/html; charset=utf-8",
        "Content-Type: application/problem+json",
    ],
    *[
        "Connection: close",
        "Connection: keep-alive",
        "connection: Close",
        "Keep-Alive: timeout=5",
    ],
    *[
        "Retry-After: 0",
        "Retry-After: 2",
        "Retry-After: 1.5",
        "Retry-After: -1",
        "Retry-After: x",
    ],
    *[
        "Retry-After: Fri, 31 Dec 2100 23:59:59 GMT",
        "Retry-After: Sat, 01 Jan 2000 00:00:00 GMT",
    ],
    *["Location: https://x.test/login", f"Location: /?key={KEY}", "Location: \xe9"],
    *[
        "X-Request-Id: req-1",
        f"X-Request-Id: {KEY}",
        "Set-Cookie: a=b; Path=/",
        "Set-Cookie: \t=;",
    ],
    *["X: " + "y" * length for length in (100, 8100)],
)
_ODD_HEADERS = (
    *[
        "Connection: upgrade",
        "Upgrade: websocket",
        "Upgrade: h2c",
        "Connection: a, close , b",
    ],
    *[
        "Content-Length: 0",
        "Content-Length: 5",
        "Content-Length: +5",
        "Content-Length: -1",
    ],
    *[
        "Content-Length: 99999999999999999999",
        "Content-Length: 0x10",
        "Content-Length: 1, 1",
    ],
    *[
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: x",
    ],
    *["Transfer-Encoding: chunked, chunked", "Transfer-Encoding: identity"],
    *["Content-Encoding: gzip", "Content-Encoding: br", "Content-Encoding: \xff"],
    *["X: " + "y" * length for length in (8186, 8187, 8190, 8191, 20_000)],
    *[
        "N" * 9000 + ": x",
        "X: a\r\n b",
        "X : 1",
        ": 1",
        "NoColon",
        "X: a\0b",
        "X: a\nY: b",
        "X:\x7f",
    ],
)
_LENGTHS = (
    *["Content-Length: {}"] * 12,
    *[
        "content-length:{}",
        "CONTENT-LENGTH: {}",
        "Content-Length:\t{} ",
        "Content-Length: 0{}",
    ],
    *[
        "Content-Length: {0}\r\nContent-Length: {0}",
        "Content-Length : {}",
        " Content-Length: {}",
    ],
)
_TYPICAL_HEADERS = (
    *[
        "Date: Thu, 26 Nov 2026 12:00:00 GMT",
        "Server: cloudflare",
        "Content-Type: application/json",
    ],
    *[
        "CF-Ray: 8d1f7a52-FRA",
        "Cache-Control: no-store",
        "Connection: keep-alive",
        "Vary: Origin",
    ],
    *[
        "Set-Cookie: a=b",
        "X-Request-Id: req-1",
        "Via: 1.1 google",
        "Content-Type: text/html",
    ],
    *[
        "X-Powered-By: Express",
        'ETag: W/"1-a"',
        "Keep-Alive: timeout=5",
        "Age: 0",
        "NEL: {}",
    ],
    *[
        "Strict-Transport-Security: max-age=1",
        "Access-Control-Allow-Origin: *",
        "Trailer: X",
    ],
    *[
        "Server: nginx",
        "ETag: x",
        "Expires: 0",
        "Alt-Svc: h3",
        "Server-Timing: a, b",
        "X: \t a ",
    ],
)


def _typical_answer(rng: random.Random, alias: str) -> bytes:
    body = runtime(alias)
    headers = rng.sample(_TYPICAL_HEADERS, rng.randint(0, 8))
    headers.insert(rng.randint(0, len(headers)), f"Content-Length: {len(body)}")
    return "\r\n".join(["HTTP/1.1 200 OK", *headers, "", ""]).encode() + body


def _whole_answer(rng: random.Random, alias: str) -> bytes:
    status = rng.choice(_STATUSES if rng.random() < 0.9 else _ODD_STATUSES)
    version = rng.choice(_VERSIONS if rng.random() < 0.95 else _ODD_VERSIONS)
    body = _body(rng, alias, success=status.startswith("2"))
    headers = rng.sample(_HEADERS, rng.choice([0, 1, 1, 2, 3, 6]))
    if rng.random() < 0.15:
        headers += rng.sample(_ODD_HEADERS, rng.choice([1, 1, 2]))
    if rng.random() < 0.01:
        headers += [
            f"X-{number}: 1" for number in range(rng.choice([100, 127, 128, 129, 500]))
        ]
    if rng.random() < 0.25:
        name = rng.choice(list(_ENCODINGS))
        body = _ENCODINGS[name](body)
        headers.append(f"Content-Encoding: {name}")
    match rng.random():
        case draw if draw < 0.6:
            headers.append(rng.choice(_LENGTHS).format(len(body)))
        case draw if draw < 0.65:
            headers.append(f"Content-Length: {len(body) + rng.choice([-1, 1, 7])}")
        case draw if draw < 0.95:
            headers.append("Transfer-Encoding: chunked")
            body = _chunked(rng, body)
    rng.shuffle(headers)
    line_end = rng.choice([b"\r\n"] * 30 + [b"\n"])
    lines = [f"{version} {status}", *headers, "", ""]
    answer = line_end.join(line.encode("latin-1") for line in lines) + body
    if rng.random() < 0.06:
        answer = rng.choice(_INTERIM) * rng.choice([1, 1, 2, 40]) + answer
    return answer


_INTERIM = (
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n",
    b"HTTP/1.1 102 Processing\r\nContent-Length: 2\r\n\r\n",
    b"\r\n",
)

# Mutations of bytes


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[_place(rng, data)] = rng.randrange(256)


def _delete(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    del data[at : at + rng.choice([1, 1, 2, 20])]


def _insert(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    data[at:at] = rng.choice(
        [b"\0", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b":", b"0", b"\xff"]
    )


def _repeat(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    data[at:at] = data[at : at + rng.randint(1, 60)]


def _swap(rng: random.Random, data: bytearray) -> None:
    if data:
        one, two = _place(rng, data), _place(rng, data)
        data[one], data[two] = data[two], data[one]


def _place(rng: random.Random, data: bytearray) -> int:
    # Mostly in the head.
    return rng.randrange(min(len(data), rng.choice([20, 150, 150, len(data)])) or 1)


_MUTATIONS = (_flip, _delete, _insert, _repeat, _swap)
