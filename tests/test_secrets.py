"""Secrets in what tools show of an error: the API key, and the credentials of a proxy."""

from __future__ import annotations

import asyncio
import base64
import io
import pprint
import reprlib
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from helpers import unused_url
from rich.console import Console
from rich.pretty import Pretty
from rich.traceback import Traceback
from servers import answering, closing, http_answer, raw_server, served
from yarl import URL

from bctrl_async import (
    BctrlApiError,
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlSession,
    RetryPolicy,
    _config,
)
from bctrl_async.redis import RedisPace

KEY = "sk-live-" + "0123456789abcdef" * 8
ONCE = RetryPolicy(attempts=1, patience=0)


def with_rich(value: object) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(Pretty([value, {"nested": value}], max_string=80))
    return text.getvalue()


def with_structlog(value: object) -> str:
    # As `structlog.tracebacks.to_repr` does without rich.
    if isinstance(value, str) and len(value) > 73:
        return f"{value[:73]!r}+{len(value) - 73}"
    return repr(value)


SHOWN_BY: dict[str, Callable[[object], str]] = {
    "rich": with_rich,
    "structlog": with_structlog,
    "reprlib": lambda value: reprlib.repr({"a": [value]}),
    "pprint": lambda value: pprint.pformat({"a": [value]}, width=20),
    "%r": lambda value: f"{value!r} {(value,)}",
}


def everything_of(error: BaseException) -> str:
    """Return all that a log could show of an error and of the errors that led to it."""
    texts = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is None:
            continue
        texts += [str(found), repr(found), repr(vars(found)), repr(found.args)]
        waiting += [found.__cause__, found.__context__]
    below = error.__traceback__.tb_next if error.__traceback__ else None
    shown = traceback.TracebackException(type(error), error, below, capture_locals=True)
    # Not rendered, as panels in panels take a quarter of a second.
    by_rich = [
        f"{stack.exc_type}: {stack.exc_value}\n"
        + "\n".join(f"{name} = {node}" for name, node in (frame.locals or {}).items())
        for stack in Traceback.extract(type(error), error, below, show_locals=True).stacks
        for frame in stack.frames
    ]
    return "\n".join([*texts, *shown.format(), *by_rich])


class TestSecret:
    @pytest.mark.parametrize("shown_by", SHOWN_BY)
    def test_neither_a_secret_nor_a_slice_of_it_is_shown(self, shown_by: str) -> None:
        """Fault: rich and structlog show the first 73 characters of a long value."""
        secret = _config.Secret(KEY)
        for hidden, text in ((secret, KEY), (secret[:73], KEY[:73]), (secret[8:][::2], KEY[8::2])):
            shown = SHOWN_BY[shown_by](hidden)

            assert "***" in shown
            assert "0123" not in shown
            assert "0246" not in shown
            assert hidden == text


@pytest.mark.parametrize("key", [KEY.encode(), f"{KEY} "])
async def test_an_invalid_key_of_a_function_is_not_in_a_frame_of_the_error(key: str) -> None:
    async with BctrlSession(lambda: key, base_url="http://127.0.0.1:9") as session:
        with pytest.raises(BctrlConfigError, match="invalid API key") as caught:
            await session.stop_runtime("ws-1", "crm")

    assert "0123" not in everything_of(caught.value)


class TestPaces:
    @pytest.mark.parametrize("url", ["redis://:s3cret@h:nan/0", "redis://me:s3cr/et@h"])
    def test_the_password_is_not_in_a_frame_of_the_error(self, url: str) -> None:
        """Fault: the URL was a variable, and the repr of the pace an AttributeError."""
        with pytest.raises(BctrlConfigError) as raised:
            RedisPace(url, rate=200)
        assert "s3cr" not in everything_of(raised.value)

    @pytest.mark.parametrize("options", [{"rate": 0}, {"rate": 200, "name": ""}])
    def test_it_is_in_no_frame_of_the_error_of_another_argument(
        self, options: dict[str, Any]
    ) -> None:
        with pytest.raises(BctrlConfigError) as raised:
            RedisPace("redis://:s3cret@localhost", **options)
        assert "s3cr" not in everything_of(raised.value)


ECHO = KEY.encode()
LATIN = "caf\u00e9".encode("latin-1")
ECHOES = {
    "nothing": b"",
    "text that is not UTF-8": http_answer("200 OK", LATIN + ECHO, f"X-Echo: {KEY}"),
    "half of a character": http_answer("200 OK", b'{"driver": "\\ud83d%b", "id": 1}' % ECHO),
    "a list that is not UTF-8": http_answer("200 OK", b'{"runtimes": ["%b", "%b' % (ECHO, LATIN)),
    "a body that is cut": http_answer("200 OK", ECHO)[:-5],
    "a false encoding": http_answer("200 OK", ECHO, "Content-Encoding: gzip"),
    "an error": http_answer("500 X", ECHO, f"X-Echo: {KEY}"),
    "a head that is cut": b"HTTP/1.1 401 No\r\nX-Echo: Bearer %b\r\n" % ECHO,
    "an invalid header": b"HTTP/1.1 401 No\r\nX-Echo: %b\x00\r\n\r\n" % ECHO,
    "no HTTP": b"bad key %b\r\n\r\n" % ECHO,
}
CALLS: dict[str, Callable[[BctrlSession], Awaitable[object]]] = {
    "stop": lambda session: session.stop_runtime("ws-1", "crm"),
    "list": lambda session: session.list_runtimes("ws-1"),
}


@pytest.mark.parametrize("answer", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_an_echoed_key_is_in_no_error_no_cause_and_no_frame(
    answer: bytes, call: Callable[[BctrlSession], Awaitable[object]]
) -> None:
    """Fault: the cause of a body that is not UTF-8 was shown with the whole body."""
    async with served(closing(answer), KEY, retry=ONCE) as session:
        with pytest.raises((BctrlNetworkError, BctrlApiError)) as caught:
            await call(session)

    assert "limit = ClientTimeout" in everything_of(caught.value)
    assert "0123" not in everything_of(caught.value)
    assert len(str(caught.value).splitlines()) == 1


class TestWrite:
    @pytest.mark.parametrize("fast", [True, False], ids=["fast path", "aiohttp"])
    @pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, asyncio.CancelledError])
    async def test_no_frame_of_what_a_transport_raises_has_the_request(
        self,
        monkeypatch: pytest.MonkeyPatch,
        kind: type[BaseException],
        *,
        fast: bool,
    ) -> None:
        """Fault: frames of asyncio, aiohttp and the fast path had the bytes of the request."""

        def send(data: bytes) -> None:
            raise OSError(f"cannot send {len(data)} bytes")

        def write(_: object, data: bytes) -> None:
            try:
                send(data)
            except OSError as error:
                raise kind from error

        monkeypatch.setattr("asyncio.selector_events._SelectorSocketTransport.write", write)
        traces = [] if fast else [aiohttp.TraceConfig()]
        async with served(b"", KEY, retry=ONCE, trace_configs=traces) as session:
            with pytest.raises(kind) as caught:
                await session.stop_runtime("ws-1", "crm")

        assert "0123" not in everything_of(caught.value)


USER, PASSWORD = "proxy-user", "s3cret-p4ss"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


def with_credentials(url: str) -> str:
    return url.replace("//", f"//{USER}:{PASSWORD}@")


async def stop_through(proxy: str, monkeypatch: pytest.MonkeyPatch, scheme: str) -> BctrlError:
    """Stop a runtime through a proxy of the environment, and return the error."""
    monkeypatch.setenv(f"{scheme}_proxy", proxy)
    async with BctrlSession(
        KEY,
        base_url=f"{scheme}://bctrl.invalid",
        trust_env=True,
        allow_plaintext=True,
        retry=ONCE,
        timeout=5,
    ) as session:
        with pytest.raises(BctrlError) as caught:
            await session.stop_runtime("ws-1", "crm")
    return caught.value


def assert_hidden(error: BctrlError) -> None:
    shown = everything_of(error)
    for secret in (PASSWORD, BASIC, KEY):
        assert secret not in shown


schemes = pytest.mark.parametrize("scheme", ["http", "https"])


class TestProxies:
    @schemes
    @pytest.mark.parametrize(
        "answer",
        [
            http_answer("407 No", b"", "Proxy-Authenticate: Basic"),
            b"nonsense\r\n\r\n",
            b"",
            None,
        ],
        ids=["407", "nonsense", "nothing", "refused"],
    )
    async def test_no_credentials_are_in_the_error_of_a_proxy_that_fails(
        self, monkeypatch: pytest.MonkeyPatch, scheme: str, answer: bytes | None
    ) -> None:
        """Fault: the request to the proxy, with its credentials, stood in the repr of the cause."""
        with unused_url() as unused:
            async with raw_server(closing(answer or b"")) as running:
                url = unused if answer is None else running
                error = await stop_through(with_credentials(url), monkeypatch, scheme)
        assert error.summary.startswith("no connection: ") is (answer is None or scheme == "https")
        assert_hidden(error)

    @pytest.mark.parametrize("answer", [b"", b"This is not TLS at all, but text.\r\n"])
    async def test_no_credentials_are_in_the_error_of_a_tunnel_that_fails(
        self, monkeypatch: pytest.MonkeyPatch, answer: bytes
    ) -> None:
        """Fault: the repr of the cause named the proxy with its user and password."""

        async def handle(_: bytes, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await writer.drain()
            # Until TLS has begun.
            for _iteration in range(50):
                await asyncio.sleep(0)
            writer.write(answer)
            writer.close()

        async with raw_server(handle) as url:
            error = await stop_through(with_credentials(url), monkeypatch, "https")

        assert isinstance(error.__cause__, aiohttp.ClientConnectorError)
        assert not error.may_have_stopped
        assert_hidden(error)

    @schemes
    @pytest.mark.parametrize(
        "proxy",
        [
            f"http://{USER}:{PASSWORD}@127.0.0.1:port",
            f"http://{USER}:{PASSWORD}@",
            f"http://{USER}:{PASSWORD}@\u2100.test",
            f"http://{USER}:{PASSWORD}\u20ac@127.0.0.1:9",
            f"socks5://{USER}:{PASSWORD}@127.0.0.1:9",
            f"{USER}:{PASSWORD}@127.0.0.1:9",
            f"http://{USER}:{PASSWORD}@proxy.invalid:9",
        ],
    )
    async def test_no_credentials_are_in_the_error_of_an_invalid_proxy(
        self, monkeypatch: pytest.MonkeyPatch, scheme: str, proxy: str
    ) -> None:
        assert_hidden(await stop_through(proxy, monkeypatch, scheme))

    async def test_no_credentials_are_in_the_error_of_the_proxy_of_a_borrowed_session(
        self,
    ) -> None:
        async with (
            raw_server(answering(http_answer("407 No"))) as url,
            aiohttp.ClientSession(proxy=URL(with_credentials(url))) as http,
        ):
            session = BctrlSession(KEY, base_url="https://bctrl.invalid", http=http, retry=ONCE)
            with pytest.raises(BctrlError) as caught:
                await session.stop_runtime("ws-1", "crm")

        assert_hidden(caught.value)
