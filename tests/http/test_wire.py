"""HTTP on real sockets: redirects, proxies, bodies of any shape."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path

import pytest
from support.runtimes import RUNTIME
from support.servers import Handler, closing, http_answer, raw_server, recording, served

from bctrl_async import (
    BctrlApiError,
    BctrlConfigError,
    BctrlResponseError,
    BctrlServerError,
    BctrlSession,
    RetryPolicy,
    Runtime,
)
from bctrl_async.emulator import Emulator

ONCE = RetryPolicy(attempts=1, patience=0)
GOOD = http_answer("200 OK", RUNTIME)


async def stop_on(server: bytes | Handler) -> Runtime:
    async with served(server, retry=ONCE) as session:
        return await session.stop_runtime("ws-1", "crm")


@pytest.mark.parametrize("status", [302, 307])
async def test_a_redirect_is_neither_followed_nor_shown_with_its_tokens(
    status: int,
) -> None:
    """Fault: redirects are followed with the key attached (browserbase, steel)."""
    elsewhere: list[bytes] = []
    async with raw_server(recording(elsewhere, GOOD)) as other:
        user = other.replace("//", "//user:secret@")
        answer = http_answer(
            f"{status} Moved", b"", f"Location: {user}/x?token=secret#secret"
        )
        with pytest.raises(BctrlResponseError) as caught:
            await stop_on(answer)
    assert elsewhere == []
    assert caught.value.status == status
    # 307 asks to send the request elsewhere, so it was not carried out.
    assert caught.value.may_have_stopped is (status != 307)
    assert caught.value.summary == (
        f"the server answered {status}, a redirect to {other}/x: not followed, to "
        "protect the API key"
    )
    assert str(caught.value).endswith("Point the base URL at the API itself")


async def test_a_proxy_that_wants_a_login_is_named_as_the_cause() -> None:
    with pytest.raises(
        BctrlApiError, match=r"Check the user and the password of the proxy$"
    ):
        await stop_on(http_answer("407 No"))


async def test_netrc_credentials_do_not_replace_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    async with served(GOOD, trust_env=True, allow_plaintext=True) as session:
        with pytest.raises(BctrlConfigError, match="netrc"):
            await session.stop_runtime("ws-1", "crm")


async def test_a_proxy_from_the_environment_is_used_except_for_loopback(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[bytes] = []
    async with raw_server(recording(heads, GOOD)) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        async with BctrlSession(
            "emulator-key", base_url=emulator.url, trust_env=True
        ) as session:
            await session.stop_runtime("ws-1", "crm")
        assert heads == []
        async with BctrlSession(
            "k", base_url="http://bctrl.invalid", trust_env=True, allow_plaintext=True
        ) as session:
            await session.stop_runtime("ws-1", "crm")
    assert heads[0].startswith(
        b"POST http://bctrl.invalid/v1/workspaces/ws-1/runtimes/crm/stop "
    )


BROKE = b'{"code":"server.error","error":"broke"}'
GZIP = "Content-Encoding: gzip"


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (http_answer("500 X", gzip.compress(BROKE), GZIP), BROKE.decode()),
        (http_answer("500 X", BROKE)[:-9], BROKE.decode()[:-9]),
        (http_answer("500 X", b"not gzip at all", GZIP), None),
    ],
    ids=["compressed", "truncated", "in a false encoding"],
)
async def test_an_unreadable_error_body_has_its_status(
    answer: bytes, body: str | None
) -> None:
    with pytest.raises(BctrlServerError) as caught:
        await stop_on(closing(answer))
    assert caught.value.status == 500
    assert body is None or caught.value.body == body


async def test_an_endless_error_body_is_not_read_completely() -> None:
    async def handle(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 500 X\r\nContent-Length: 99999999999\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x" * 65536)
            await writer.drain()

    with pytest.raises(BctrlServerError) as caught:
        await stop_on(handle)
    assert caught.value.body == "x" * 2048


async def in_pieces(_: bytes, writer: asyncio.StreamWriter) -> None:
    for piece in (GOOD[:-200], GOOD[-200:-100], GOOD[-100:]):
        writer.write(piece)
        for _iteration in range(20):
            await asyncio.sleep(0)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
    b"%x\r\n%s\r\n" % (len(part), part) for part in (RUNTIME[:99], RUNTIME[99:], b"")
)


@pytest.mark.parametrize(
    "server",
    [
        in_pieces,
        CHUNKED,
        http_answer("200 OK", gzip.compress(RUNTIME), GZIP),
        http_answer("202 Accepted", RUNTIME),
    ],
    ids=["in pieces", "chunked", "compressed", "202"],
)
async def test_a_runtime_is_read_however_it_arrives(server: bytes | Handler) -> None:
    assert (await stop_on(server)).status == "stopped"


@pytest.mark.parametrize(
    ("server", "status", "problem"),
    [
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", None, "invalid HTTP response"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, "204"),
        (closing(GOOD[:-9]), 200, "the body was truncated"),
        (http_answer("200 OK", RUNTIME, GZIP), 200, "or cannot be decompressed"),
        (http_answer("200 OK", b" " * 2**21), 200, "more than 1 MiB"),
        (
            http_answer("200 OK", gzip.compress(b" " * 2**21), GZIP),
            200,
            "more than 1 MiB",
        ),
    ],
)
async def test_anything_but_a_runtime_is_an_error(
    server: bytes | Handler, status: int | None, problem: str
) -> None:
    with pytest.raises(BctrlResponseError, match=problem) as caught:
        await stop_on(server)
    assert (caught.value.status, caught.value.may_have_stopped) == (status, True)
