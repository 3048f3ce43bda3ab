"""HTTP on real sockets: paths, the API key, redirects, bodies of any shape."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import traceback
import zlib
from pathlib import Path
from urllib.parse import quote, unquote

import aiohttp
import aiohttp.web
import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import answering, http_answer, raw_server

from bctrl_async import (
    BctrlApiError,
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlConflictError,
    BctrlNetworkError,
    BctrlResponseError,
    BctrlServerError,
    BctrlSession,
    RetryPolicy,
    Runtime,
)
from bctrl_async.emulator import Emulator, Fault, Reply

KEY = "sk-live-0123456789-do-not-print"
ONCE = RetryPolicy(attempts=1, patience=0)
RUNTIME = json.dumps(
    {
        "alias": "crm",
        "createdAt": "whenever",
        "driver": "d",
        "id": "7b1f6a54-9d2c-4a5e-8f10-3c2b1a0d9e8f",
        "kind": "browser",
        "status": "stopped",
        "updatedAt": "",
        "workspaceId": "0b2f6a54-9d2c-4a5e-8f10-3c2b1a0d9e8f",
    }
).encode()


async def stop_on(server: str, *, key: str = KEY, retry: RetryPolicy = ONCE) -> Runtime:
    async with BctrlSession(key, base_url=server, retry=retry) as session:
        return await session.stop_runtime("ws-1", "crm")


def with_variables(error: BaseException) -> str:
    """Format a traceback with its local variables, except those of the test itself."""
    below = error.__traceback__.tb_next if error.__traceback__ else None
    lines = traceback.TracebackException(type(error), error, below, capture_locals=True).format()
    return "".join(lines)


TRICKY_TEXT = st.text(st.sampled_from("aé😀/\\%.?#;:@&=+ ~\"'<>|2eEfF\uff15\uff21")) | st.text()


@given(targets=st.lists(st.tuples(TRICKY_TEXT, TRICKY_TEXT), min_size=20, max_size=40))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_ids_and_aliases_arrive_unchanged_or_are_rejected(
    targets: list[tuple[str, str]],
) -> None:
    """Fault: stop("..") collapses to /v1/stop, `%2e%2e` too (the vendor's SDK, elasticsearch)."""
    heads: list[bytes] = []

    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        writer.write(http_answer("200 OK", RUNTIME))

    async def main() -> list[tuple[str, str]]:
        sent = []
        async with (
            raw_server(handle) as url,
            BctrlSession(KEY, base_url=url, check_answers=False) as session,
        ):
            for target in targets:
                try:
                    await session.stop_runtime(*target)
                except BctrlConfigError:
                    continue
                sent.append(target)
        return sent

    sent = asyncio.run(main())

    arrived = []
    for head in heads:
        match head.split(b" ")[1].decode("ascii").split("/"):
            case ["", "v1", "workspaces", workspace, "runtimes", alias, "stop"]:
                arrived.append((unquote(workspace), unquote(alias)))
            case path:
                pytest.fail(f"left the resource: {path}")
    assert arrived == sent


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "..\\x",
        "a/../b",
        "a/.",
        "%2e%2e",
        "..%2fx",
        "%252e%252e%252fx",
        "..;/x",
        "a\x00b",
        "a\nb",
        "a\x85b",
    ],
)
async def test_a_dot_segment_is_rejected_before_a_byte_is_sent(
    emulator: Emulator, session: BctrlSession, name: str
) -> None:
    """Fault: stop("..") leaves the resource (the vendor's SDK, elasticsearch, aiodocker)."""
    with pytest.raises(BctrlConfigError, match="alias"):
        await session.stop_runtime("ws-1", name)
    with pytest.raises(BctrlConfigError, match="workspace id"):
        await session.stop_runtime(name, "crm")
    assert emulator.requests == []


async def test_a_prefix_of_the_base_url_is_kept() -> None:
    heads: list[bytes] = []

    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        writer.write(http_answer("200 OK", RUNTIME))

    async with raw_server(handle) as url:
        await stop_on(f"{url}/through%20here/v1/")
    assert heads[0].startswith(
        b"POST /through%20here/v1/workspaces/ws-1/runtimes/crm/stop HTTP/1.1"
    )


@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308"])
async def test_a_redirect_is_not_followed_with_the_key(status: str) -> None:
    """Fault: redirects are followed with the key attached (browserbase, steel)."""
    elsewhere: list[bytes] = []

    async def thief(head: bytes, writer: asyncio.StreamWriter) -> None:
        elsewhere.append(head)
        writer.write(http_answer("200 OK", RUNTIME))

    async with raw_server(thief) as other:
        answer = http_answer(f"{status} Moved", b"", f"Location: {other}/x")
        async with raw_server(answering(answer)) as url:
            with pytest.raises(BctrlResponseError, match=f"{status}, a redirect to {other}/x"):
                await stop_on(url)
    assert elsewhere == []


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
    shown = [
        str(error),
        repr(error),
        repr(vars(error)),
        session_repr,
        caplog.text,
        with_variables(error),
    ]
    assert not [text for text in shown if KEY[:12] in text]


ECHO = KEY.encode()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        http_answer("200 OK", ECHO, f"X-Echo: {KEY}"),
        http_answer("200 OK", b'{"id": "%s"}' % ECHO),
        http_answer("500 X", ECHO, f"X-Echo: {KEY}"),
        http_answer("200 OK", ECHO)[:-5],
        http_answer("200 OK", ECHO, "Content-Encoding: gzip"),
        b"HTTP/1.1 401 No\r\nX-Echo: Bearer %s\r\n" % ECHO,
        b"HTTP/1.1 401 No\r\nX-Echo: %s\x00\r\n\r\n" % ECHO,
        b"bad key %s\r\n\r\n" % ECHO,
    ],
)
async def test_no_response_makes_an_error_or_its_traceback_show_the_key(answer: bytes) -> None:
    async def handle(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    async with raw_server(handle) as url:
        session = BctrlSession(KEY, base_url=url, retry=ONCE)
        with pytest.raises((BctrlNetworkError, BctrlApiError)) as caught:
            await session.stop_runtime("ws-1", "crm")
        await session.close()

    assert "limit = ClientTimeout" in with_variables(caught.value)
    assert KEY not in with_variables(caught.value)
    assert KEY not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["ab+cd/ef==0123", "abc123"])
async def test_an_echoed_key_that_is_short_or_percent_encoded_is_not_shown(key: str) -> None:
    location = f"Location: https://x.test/?t={quote(key, safe='')}&u={key}"
    async with raw_server(answering(http_answer("302 Found", b"", location))) as url:
        with pytest.raises(BctrlResponseError, match=r"t=\*\*\*&u=\*\*\*") as caught:
            await stop_on(url, key=key)
    assert key not in str(caught.value)


async def test_after_a_proxy_rejects_the_tunnel_nothing_may_have_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with raw_server(answering(http_answer("407 No"))) as url:
        monkeypatch.setenv("https_proxy", url)
        async with BctrlSession(
            KEY, base_url="https://bctrl.invalid", trust_env=True, retry=ONCE
        ) as session:
            with pytest.raises(BctrlNetworkError, match="the proxy answered 407") as caught:
                await session.stop_runtime("ws-1", "crm")
    assert caught.value.may_have_stopped is False


@pytest.mark.parametrize("key", ["with space", "two\nlines", "tab\tkey", "clé-é", "", "Bearer abc"])
def test_a_key_that_is_not_a_valid_header_value_is_rejected_and_not_shown(key: str) -> None:
    with pytest.raises(BctrlConfigError, match="API key") as caught:
        BctrlSession(key)
    assert not key or key not in str(caught.value)


async def test_tls_is_used_and_an_untrusted_certificate_fails_the_call() -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    async def answer(_: aiohttp.web.BaseRequest) -> aiohttp.web.Response:
        return aiohttp.web.Response(body=RUNTIME)

    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(aiohttp.web.Server(answer), "127.0.0.1", 0, ssl=context)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
    try:
        with pytest.raises(BctrlNetworkError, match="certificate") as caught:
            await stop_on(url)
        assert caught.value.may_have_stopped is False
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted)) as http:
            session = BctrlSession(KEY, base_url=url, http=http)
            assert (await session.stop_runtime("ws-1", "crm")).alias == "crm"
    finally:
        server.close()


async def test_netrc_credentials_do_not_replace_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    async with raw_server(answering(http_answer("200 OK", RUNTIME))) as url:
        session = BctrlSession(KEY, base_url=url, trust_env=True, allow_plaintext=True)
        async with session:
            with pytest.raises(BctrlConfigError, match="netrc"):
                await session.stop_runtime("ws-1", "crm")


async def test_a_proxy_from_the_environment_is_used_except_for_loopback(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[bytes] = []

    async def proxy(head: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        writer.write(http_answer("200 OK", RUNTIME))

    async with raw_server(proxy) as url:
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.delenv("no_proxy", raising=False)
        async with BctrlSession("emulator-key", base_url=emulator.url, trust_env=True) as session:
            await session.stop_runtime("ws-1", "crm")
        assert heads == []
        async with BctrlSession(
            KEY, base_url="http://bctrl.invalid", trust_env=True, allow_plaintext=True
        ) as session:
            await session.stop_runtime("ws-1", "crm")
    assert heads[0].startswith(b"POST http://bctrl.invalid/v1/workspaces/ws-1/runtimes/crm/stop ")


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b'{"code":"server.error","error":"broke"}', "server.error", "broke"),
        (b'{"title":"Broken","detail":"it broke","status":500}', None, "it broke"),
        (b'{"message":"broke"}', None, "broke"),
        (b'{"error":{"code":"E1","message":"broke"}}', None, "broke"),
        (b'{"error":"broke"}', None, "broke"),
        (b"just words", None, "just words"),
        (b"<html>500</html>", None, None),
        (b"", None, None),
        (b'{"code":"x","err', None, '{"code":"x","err'),
    ],
)
async def test_an_error_body_of_any_shape_becomes_a_server_error(
    body: bytes, code: str | None, message: str | None
) -> None:
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(body) + packer.flush()
    for answer in (
        http_answer("500 X", body),
        http_answer("500 X", packed, "Content-Encoding: gzip"),
    ):
        async with raw_server(answering(answer)) as url:
            with pytest.raises(BctrlServerError) as caught:
                await stop_on(url)
        assert (caught.value.code, caught.value.message) == (code, message)
        assert caught.value.body == body.decode()


async def test_a_truncated_error_body_still_has_its_status() -> None:
    async def handle(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 409 Conflict\r\nContent-Length: 99\r\n\r\n{"code":')
        writer.close()

    async with raw_server(handle) as url:
        with pytest.raises(BctrlConflictError) as caught:
            await stop_on(url)
    assert caught.value.body == '{"code":'


async def test_an_error_body_in_a_false_encoding_still_has_its_status() -> None:
    answer = http_answer("502 X", b"not gzip at all", "Content-Encoding: gzip")
    async with raw_server(answering(answer)) as url:
        with pytest.raises(BctrlServerError):
            await stop_on(url)


async def test_an_endless_error_body_is_not_read_completely() -> None:
    async def handle(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 500 X\r\nContent-Length: 99999999999\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x" * 65536)
            await writer.drain()

    async with raw_server(handle) as url:
        with pytest.raises(BctrlServerError) as caught:
            await stop_on(url)
    assert caught.value.body == "x" * 2048


async def test_a_chunked_or_compressed_runtime_is_read() -> None:
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(RUNTIME) + packer.flush()
    half = len(RUNTIME) // 2
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
        b"%x\r\n%s\r\n" % (len(part), part) for part in (RUNTIME[:half], RUNTIME[half:], b"")
    )
    for answer in (http_answer("200 OK", packed, "Content-Encoding: gzip"), chunked):
        async with raw_server(answering(answer)) as url:
            assert (await stop_on(url)).alias == "crm"


async def test_a_runtime_that_arrives_in_pieces_is_read_completely() -> None:
    async def in_pieces(_: bytes, writer: asyncio.StreamWriter) -> None:
        answer = http_answer("200 OK", RUNTIME)
        for piece in (answer[:-200], answer[-200:-100], answer[-100:]):
            writer.write(piece)
            for _iteration in range(20):
                await asyncio.sleep(0)

    async with raw_server(in_pieces) as url, BctrlSession("k", base_url=url) as session:
        assert (await session.stop_runtime("ws-1", "crm")).alias == "crm"


async def test_a_response_that_is_not_http_is_a_response_error() -> None:
    async with raw_server(answering(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")) as url:
        with pytest.raises(BctrlResponseError, match="invalid HTTP response") as caught:
            await stop_on(url)
    assert caught.value.may_have_stopped


async def test_another_2xx_needs_a_runtime() -> None:
    async with raw_server(answering(http_answer("202 Accepted", RUNTIME))) as url:
        assert (await stop_on(url)).status == "stopped"
    async with raw_server(answering(b"HTTP/1.1 204 No Content\r\n\r\n")) as url:
        with pytest.raises(BctrlResponseError, match="204") as caught:
            await stop_on(url)
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
