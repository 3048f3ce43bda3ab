"""Secrets in what tools show of an error: the API key, and a proxy's login."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pprint
import reprlib
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from rich.console import Console
from rich.pretty import Pretty
from rich.traceback import Traceback
from support.servers import Handler, closing, http_answer, raw_server, served
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
from bctrl_async.otel import OpenTelemetry

# Its characters after the prefix occur in no number and no word of a log line.
KEY = "sk-live-" + "qwertzuiopasdfgh" * 8
ONCE = RetryPolicy(attempts=1, patience=0)


def with_rich(value: object) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(
        Pretty([value, {"nested": value}], max_string=80)
    )
    return text.getvalue()


def with_structlog(value: object) -> str:
    # `structlog.tracebacks.to_repr` does so without rich.
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
    # It is not rendered: panels in panels take a quarter of a second.
    by_rich = [
        f"{stack.exc_type}: {stack.exc_value}\n"
        + "\n".join(f"{name} = {node}" for name, node in (frame.locals or {}).items())
        for stack in Traceback.extract(
            type(error), error, below, show_locals=True
        ).stacks
        for frame in stack.frames
    ]
    return "\n".join([*texts, *shown.format(), *by_rich])


@pytest.mark.parametrize("show", SHOWN_BY.values(), ids=SHOWN_BY)
def test_neither_a_secret_nor_a_slice_of_it_is_shown(
    show: Callable[[object], str],
) -> None:
    """Fault: rich and structlog show the first 73 characters of a long value."""
    secret = _config.Secret(KEY)
    for hidden, text in (
        (secret, KEY),
        (secret[:73], KEY[:73]),
        (secret[8:][::2], KEY[8::2]),
    ):
        shown = show(hidden)
        assert "***" in shown
        assert "qwer" not in shown
        assert "qetu" not in shown
        assert hidden == text


@pytest.mark.parametrize("key", [KEY.encode(), f"{KEY} "])
async def test_an_invalid_key_of_a_function_is_not_in_a_frame_of_the_error(
    key: str,
) -> None:
    async with BctrlSession(lambda: key, base_url="http://127.0.0.1:9") as session:
        with pytest.raises(BctrlConfigError, match="invalid API key") as caught:
            await session.stop_runtime("ws-1", "crm")

    assert "qwer" not in everything_of(caught.value)


ECHO = KEY.encode()
LATIN = "caf\u00e9".encode("latin-1")
WORDS = json.dumps(
    {"code": KEY, "message": f"no entry for Bearer {KEY}", "requestId": KEY}
).encode()
ECHOES = {
    "nothing": b"",
    "text that is not UTF-8": http_answer("200 OK", LATIN + ECHO, f"X-Echo: {KEY}"),
    "half of a character": http_answer(
        "200 OK", b'{"driver": "\\ud83d%b", "id": 1}' % ECHO
    ),
    "a list that is not UTF-8": http_answer(
        "200 OK", b'{"runtimes": ["%b", "%b' % (ECHO, LATIN)
    ),
    "a body that is cut": http_answer("200 OK", ECHO)[:-5],
    "a false encoding": http_answer("200 OK", ECHO, "Content-Encoding: gzip"),
    "an error": http_answer("500 X", ECHO, f"X-Echo: {KEY}"),
    "an error of the API": http_answer(f"500 {KEY}", WORDS, f"X-Request-Id: {KEY}"),
    "a redirect": http_answer("307 X", WORDS, f"Location: /?key={KEY}"),
    "throttling": http_answer("429 X", WORDS, f"X-Request-Id: {KEY}", "Retry-After: 0"),
    "a head that is cut": b"HTTP/1.1 401 No\r\nX-Echo: Bearer %b\r\n" % ECHO,
    "an invalid header": b"HTTP/1.1 401 No\r\nX-Echo: %b\x00\r\n\r\n" % ECHO,
    "no HTTP": b"bad key %b\r\n\r\n" % ECHO,
}
Call = Callable[[BctrlSession], Awaitable[object]]
CALLS: dict[str, Call] = {
    "stop": lambda session: session.stop_runtime("ws-1", "crm"),
    "list": lambda session: session.list_runtimes("ws-1"),
}


@pytest.mark.parametrize("answer", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_an_echoed_key_is_in_no_error_no_frame_no_log_line_and_no_span(
    answer: bytes, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: the cause of a body that is not UTF-8 was shown with the whole body."""
    caplog.set_level("DEBUG", "bctrl_async")
    exporter, reader, tracers = (
        InMemorySpanExporter(),
        InMemoryMetricReader(),
        TracerProvider(),
    )
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    observer = OpenTelemetry(
        tracer_provider=tracers, meter_provider=MeterProvider([reader])
    )
    retry = RetryPolicy(attempts=2, base=0.001, patience=0.05)
    async with served(closing(answer), KEY, retry=retry, observer=observer) as session:
        with pytest.raises((BctrlNetworkError, BctrlApiError)) as caught:
            await call(session)

    shown = everything_of(caught.value)
    assert "limit = ClientTimeout" in shown
    assert "qwer" not in shown
    assert len(str(caught.value).splitlines()) == 1
    assert "qwer" not in caplog.text + "".join(
        repr(vars(record)) for record in caplog.records
    )
    spans, metrics = exporter.get_finished_spans(), reader.get_metrics_data()
    assert spans
    assert metrics is not None
    assert "qwer" not in "".join(
        [metrics.to_json(), *(span.to_json() or "" for span in spans)]
    )


@pytest.mark.parametrize("answer", ECHOES.values(), ids=ECHOES)
async def test_an_echoed_key_is_in_no_report_and_no_journal(
    answer: bytes, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    async with served(closing(answer), KEY, retry=ONCE) as session:
        report = await session.stop_runtimes(
            [("ws-1", "crm")], journal=journal, verify=False
        )

    assert report.failures
    assert "qwer" not in f"{report}{report.failures}{journal.read_text('utf-8')}"


@pytest.mark.parametrize("is_borrowed", [False, True], ids=["fast path", "aiohttp"])
@pytest.mark.parametrize(
    "kind", [RuntimeError, KeyboardInterrupt, asyncio.CancelledError]
)
async def test_no_frame_of_what_a_transport_raises_has_the_request(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], *, is_borrowed: bool
) -> None:
    """Fault: frames of asyncio, aiohttp and the fast path had the request."""

    def send(data: bytes) -> None:
        raise OSError(f"cannot send {len(data)} bytes")

    def write(_: object, data: bytes) -> None:
        try:
            send(data)
        except OSError as error:
            raise kind from error

    monkeypatch.setattr("asyncio.selector_events._SelectorSocketTransport.write", write)
    async with AsyncExitStack() as stack:
        http = (
            await stack.enter_async_context(aiohttp.ClientSession())
            if is_borrowed
            else None
        )
        session = await stack.enter_async_context(
            served(b"", KEY, retry=ONCE, http=http)
        )
        with pytest.raises(kind) as caught:
            await session.stop_runtime("ws-1", "crm")
    assert "qwer" not in everything_of(caught.value)


LOGIN = "proxy-user:s3cret-p4ss"
BASIC = base64.b64encode(LOGIN.encode()).decode()


def assert_hidden(error: BctrlError) -> None:
    shown = everything_of(error)
    for secret in (LOGIN.partition(":")[2], BASIC, KEY):
        assert secret not in shown


def tunnel(answer: bytes) -> Handler:
    """Answer these bytes in place of TLS."""

    async def handle(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await writer.drain()
        # TLS starts meanwhile.
        for _iteration in range(50):
            await asyncio.sleep(0)
        writer.write(answer)
        writer.close()

    return handle


LOGIN_REQUIRED = http_answer("407 No", b"", "Proxy-Authenticate: Basic")
PROXIES: dict[str, Handler | str] = {
    "asks for another login": closing(LOGIN_REQUIRED),
    "speaks no HTTP": closing(b"nonsense\r\n\r\n"),
    "answers nothing": closing(b""),
    "ends its tunnel": tunnel(b""),
    "speaks no TLS in its tunnel": tunnel(b"This is not TLS at all, but text.\r\n"),
    "is not there": f"http://{LOGIN}@127.0.0.1:1",
    "has a port that is no number": f"http://{LOGIN}@127.0.0.1:port",
    "has no host": f"http://{LOGIN}@",
    "has an invalid host": f"http://{LOGIN}@\u2100.test",
    "has an unknown host": f"http://{LOGIN}@proxy.invalid:9",
    "has a password that is not ASCII": f"http://{LOGIN}\u20ac@127.0.0.1:9",
    "has another scheme": f"socks5://{LOGIN}@127.0.0.1:9",
    "has no scheme": f"{LOGIN}@127.0.0.1:9",
}


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("proxy", PROXIES.values(), ids=PROXIES)
async def test_the_credentials_of_a_proxy_of_the_environment_are_not_in_its_error(
    monkeypatch: pytest.MonkeyPatch, scheme: str, proxy: Handler | str
) -> None:
    """Fault: the repr of the cause had the proxy's user and password."""
    async with raw_server(closing(b"") if isinstance(proxy, str) else proxy) as running:
        url = proxy if isinstance(proxy, str) else running.replace("//", f"//{LOGIN}@")
        monkeypatch.setenv(f"{scheme}_proxy", url)
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
    assert not (scheme == "https" and caught.value.may_have_stopped)
    assert_hidden(caught.value)


async def test_the_credentials_of_the_proxy_of_a_borrowed_session_are_not_shown() -> (
    None
):
    async with (
        raw_server(closing(LOGIN_REQUIRED)) as url,
        aiohttp.ClientSession(proxy=URL(url.replace("//", f"//{LOGIN}@"))) as http,
    ):
        session = BctrlSession(
            KEY, base_url="https://bctrl.invalid", http=http, retry=ONCE
        )
        with pytest.raises(BctrlError) as caught:
            await session.stop_runtime("ws-1", "crm")
    assert_hidden(caught.value)
