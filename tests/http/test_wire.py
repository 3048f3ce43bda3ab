"""HTTP on real sockets: paths, the API key, redirects, bodies of any shape."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from pathlib import Path

import pytest
from runtimes import RUNTIME
from servers import Handler, answering, closing, http_answer, raw_server, recording, served
from test_secrets import everything_of

from bctrl_async import (
    BctrlApiError,
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlResponseError,
    BctrlServerError,
    BctrlSession,
    RetryPolicy,
    Runtime,
)
from bctrl_async.emulator import Emulator, Fault, Reply

KEY = "sk-live-0123456789-do-not-print"
ONCE = RetryPolicy(attempts=1, patience=0)


async def stop_on(server: bytes | Handler) -> Runtime:
    async with served(server, KEY, retry=ONCE) as session:
        return await session.stop_runtime("ws-1", "crm")


PATH = "could be taken for a path"
CONTROL = "contains a control character"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is empty"),
        (".", PATH),
        ("%2E.", PATH),
        ("..;x", PATH),
        ("a/../b", PATH),
        ("a\\..", PATH),
        ("a%5c%2e%2e", PATH),
        ("%252e%252e%255c", PATH),
        # Decoding until nothing changes would take 14 ms of the event loop.
        ("%" * 334 + "25" * 333, PATH),
        ("crm\n", CONTROL),
        ("a\x00b", CONTROL),
        ("a\x7f", CONTROL),
        ("a\x85b", CONTROL),
        ("\U000e0001" * 900 + "\n", CONTROL),
        ("crm\udfff", "contains a lone surrogate"),
        ("\n" * 1_001, "has 1,001 characters, more than 1,000"),
        # Not even decoded once.
        ("%" + "25" * 32_000 + "2e", "has 64,003 characters, more than 1,000"),
        (None, "must be a str, not NoneType"),
        (b"crm", "must be a str, not bytes"),
        (1, "must be a str, not int"),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_an_invalid_name_is_rejected_before_a_byte_is_sent(
    emulator: Emulator, session: BctrlSession, name: str, problem: str
) -> None:
    """Fault: stop("..") leaves the resource (the vendor's SDK, elasticsearch, aiodocker)."""
    for target, part in ((("ws-1", name), "alias"), ((name, "crm"), "workspace id")):
        with pytest.raises(BctrlConfigError) as caught:
            await session.stop_runtime(*target)
        error = caught.value
        assert error.summary.startswith(part)
        assert problem in error.summary
        assert (error.reason_class, error.__cause__) == ("invalid_input", None)
        assert len(str(error)) < 600
        assert str(error).isprintable()
    assert emulator.requests == []


async def test_a_prefix_of_the_base_url_and_special_characters_are_kept() -> None:
    heads: list[bytes] = []
    async with (
        raw_server(recording(heads, http_answer("200 OK", RUNTIME))) as url,
        BctrlSession(KEY, base_url=f"{url}/through%20here/v1/", check_answers=False) as session,
    ):
        await session.stop_runtime("ws 1/\u00e4", "c%2Fr?m#")
    path = b"/through%20here/v1/workspaces/ws%201%2F%C3%A4/runtimes/c%252Fr%3Fm%23/stop"
    assert heads[0].startswith(b"POST " + path + b" HTTP/1.1")


@pytest.mark.parametrize(
    ("status", "may_have_stopped"),
    [(301, True), (302, True), (303, True), (307, False), (308, False)],
)
async def test_a_redirect_is_not_followed_with_the_key_and_its_tokens_are_not_shown(
    status: int, *, may_have_stopped: bool
) -> None:
    """Fault: redirects are followed with the key attached (browserbase, steel)."""
    elsewhere: list[bytes] = []
    async with raw_server(recording(elsewhere, http_answer("200 OK", RUNTIME))) as other:
        user = other.replace("//", "//user:secret@")
        answer = http_answer(f"{status} Moved", b"", f"Location: {user}/x?token=secret#secret")
        with pytest.raises(BctrlResponseError) as caught:
            await stop_on(answer)
    assert elsewhere == []
    assert caught.value.status == status
    assert caught.value.may_have_stopped is may_have_stopped
    assert caught.value.summary == (
        f"the server answered {status}, a redirect to {other}/x: not followed, to protect the API "
        "key"
    )
    assert str(caught.value).endswith("Point the base URL at the API itself")


async def test_a_key_echoed_by_the_server_is_not_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Fault: the key in debug logs (openai-python#1082)."""
    caplog.set_level(logging.DEBUG)
    body = json.dumps({"code": "auth.required", "error": f"bad key {KEY}", "hint": KEY}).encode()
    answer = http_answer("401 No", b" " * 2040 + body, f"x-request-id: {KEY}")
    async with raw_server(answering(answer)) as url:
        session = BctrlSession(KEY, base_url=url)
        with pytest.raises(BctrlAuthenticationError) as caught:
            await session.stop_runtime("ws-1", "crm")
        session_repr = f"{session!r} {session.__dict__!r}"
        await session.close()

    error = caught.value
    assert KEY[:12] not in session_repr + caplog.text + everything_of(error)


async def test_netrc_credentials_do_not_replace_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    answer = http_answer("200 OK", RUNTIME)
    async with served(answer, trust_env=True, allow_plaintext=True) as session:
        with pytest.raises(BctrlConfigError, match="netrc"):
            await session.stop_runtime("ws-1", "crm")


async def test_a_proxy_from_the_environment_is_used_except_for_loopback(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[bytes] = []
    async with raw_server(recording(heads, http_answer("200 OK", RUNTIME))) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        async with BctrlSession("emulator-key", base_url=emulator.url, trust_env=True) as session:
            await session.stop_runtime("ws-1", "crm")
        assert heads == []
        async with BctrlSession(
            KEY, base_url="http://bctrl.invalid", trust_env=True, allow_plaintext=True
        ) as session:
            await session.stop_runtime("ws-1", "crm")
    assert heads[0].startswith(b"POST http://bctrl.invalid/v1/workspaces/ws-1/runtimes/crm/stop ")


BROKE = b'{"code":"server.error","error":"broke"}'


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (http_answer("500 X", gzip.compress(BROKE), "Content-Encoding: gzip"), BROKE.decode()),
        (http_answer("500 X", BROKE)[:-9], BROKE.decode()[:-9]),
        (http_answer("500 X", b"not gzip at all", "Content-Encoding: gzip"), None),
    ],
    ids=["compressed", "truncated", "in a false encoding"],
)
async def test_an_error_body_that_cannot_be_read_still_has_its_status(
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


async def test_a_runtime_that_is_chunked_or_compressed_or_arrives_in_pieces_is_read() -> None:
    async def in_pieces(_: bytes, writer: asyncio.StreamWriter) -> None:
        answer = http_answer("200 OK", RUNTIME)
        for piece in (answer[:-200], answer[-200:-100], answer[-100:]):
            writer.write(piece)
            for _iteration in range(20):
                await asyncio.sleep(0)

    half = len(RUNTIME) // 2
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
        b"%x\r\n%s\r\n" % (len(part), part) for part in (RUNTIME[:half], RUNTIME[half:], b"")
    )
    packed = http_answer("200 OK", gzip.compress(RUNTIME), "Content-Encoding: gzip")
    for server in (packed, chunked, in_pieces):
        assert (await stop_on(server)).alias == "crm"


async def test_a_proxy_that_wants_a_login_is_named_as_the_cause() -> None:
    with pytest.raises(BctrlApiError, match=r"Check the user and the password of the proxy$"):
        await stop_on(http_answer("407 No"))


async def test_a_response_that_is_not_http_is_a_response_error() -> None:
    with pytest.raises(BctrlResponseError, match="invalid HTTP response") as caught:
        await stop_on(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")
    assert caught.value.may_have_stopped


async def test_another_2xx_needs_a_runtime() -> None:
    assert (await stop_on(http_answer("202 Accepted", RUNTIME))).status == "stopped"
    with pytest.raises(BctrlResponseError, match="204") as caught:
        await stop_on(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert (caught.value.status, caught.value.may_have_stopped) == (204, True)


async def test_each_fault_of_a_body_is_named_in_the_error(
    emulator: Emulator, session: BctrlSession
) -> None:
    expected: dict[Fault | Reply, str] = {
        Fault.MALFORMED_JSON: "is not JSON",
        Reply(200, body={"ok": True}): "missing required field",
        Fault.OVERSIZED: "more than 1 MiB",
        Fault.COMPRESSED_BOMB: "more than 1 MiB",
        Fault.TRUNCATED_JSON: "the body was truncated",
    }
    for number, (fault, problem) in enumerate(expected.items()):
        emulator.add_runtime("ws-1", f"r{number}")
        emulator.inject(fault)
        with pytest.raises(BctrlResponseError, match=problem) as caught:
            await session.stop_runtime("ws-1", f"r{number}")
        assert (caught.value.status, caught.value.may_have_stopped) == (200, True)
        assert emulator.received["ws-1", f"r{number}"] == 1
