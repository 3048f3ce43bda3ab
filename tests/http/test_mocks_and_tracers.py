"""Tools that patch or observe aiohttp see every stop: with them, none takes the fast path."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiohttp
import pytest
import wrapt
from conftest import KEY
from helpers import Connect
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ways import Ways

from bctrl_async import BctrlConfigError, BctrlSession, StopResult
from bctrl_async.emulator import Emulator

CRM, MAIL = ("ws-1", "crm"), ("ws-1", "mail")
Patch = Callable[[pytest.MonkeyPatch, list[str]], None]
"""Patches aiohttp so that the method of each request is added to a list."""


@pytest.fixture(autouse=True)
def _second_runtime(emulator: Emulator) -> None:
    emulator.add_runtime(*MAIL)


@pytest.fixture(name="session", params=[False, True], ids=["pool not open", "pool open"])
async def _session(connect: Connect, request: pytest.FixtureRequest) -> AsyncIterator[BctrlSession]:
    """A session whose pool opens before or after the tools are used."""
    session = connect()
    if request.param:
        await session.__aenter__()
    yield session
    await session.close()


# Tools that replace `ClientSession._request`


def replace_request(monkeypatch: pytest.MonkeyPatch, seen: list[str]) -> None:
    original = aiohttp.ClientSession.request

    def wrapper(http: aiohttp.ClientSession, method: str, *args: Any, **options: Any) -> object:  # noqa: ANN401
        seen.append(method)
        return original(http, method, *args, **options)

    monkeypatch.setattr(aiohttp.ClientSession, "request", wrapper)


def wrap_with_wrapt(monkeypatch: pytest.MonkeyPatch, seen: list[str]) -> None:
    """Wrap it as tracers do: the wrapper passes for what it wraps, also in its `__globals__`."""

    @wrapt.decorator
    def wrapper(
        wrapped: Callable[..., object],
        _: object,
        args: tuple[str, ...],
        options: dict[str, object],
    ) -> object:
        seen.append(args[0])
        return wrapped(*args, **options)

    monkeypatch.setattr(aiohttp.ClientSession, "_request", wrapper(aiohttp.ClientSession._request))


@pytest.mark.parametrize("patch", [replace_request, wrap_with_wrapt])
async def test_a_patch_sees_every_stop_until_it_is_taken_back(
    session: BctrlSession, ways: Ways, patch: Patch, request: pytest.FixtureRequest
) -> None:
    """Fault: a patched function passes for aiohttp's own, as it was never seen unpatched."""
    seen: list[str] = []
    was_open = session._sender.opened
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch, seen)
        await session.stop_runtime(*CRM)
        assert ways.taken == (0, 1)
    await session.stop_runtime(*MAIL)
    assert seen == ["POST"]
    # A pool that opens with a patch stays on the long way.
    is_short = was_open and not request.config.getoption("long_way")
    assert ways.short == is_short


# Tools that aiohttp has a place for


@pytest.mark.parametrize(
    ("error", "closes"), [(ValueError, False), (RuntimeError, True), (asyncio.CancelledError, True)]
)
async def test_after_a_tracer_fails_at_the_end_of_a_request_the_stop_is_unknown(
    connect: Connect, emulator: Emulator, error: type[BaseException], *, closes: bool
) -> None:
    """Fault: the outcome was `not_sent`, and the runtime was stopped."""

    async def fail(*_: object) -> None:
        if closes:
            await session.close()
        raise error

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(fail)
    async with connect(trace_configs=[trace]) as session:
        report = await session.stop_runtimes([CRM], verify=False)

    assert report.counts == {StopResult.UNKNOWN: 1}
    assert emulator.status(*CRM) == "stopped"


async def test_a_session_that_is_closed_while_a_trace_waits_sends_nothing(
    emulator: Emulator,
) -> None:
    """Fault: the AssertionError of aiohttp left the call."""

    async def close(*_: object) -> None:
        await session.close()

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(close)
    session = BctrlSession(KEY, base_url=emulator.url, trace_configs=[trace])
    with pytest.raises(BctrlConfigError, match="the session is closed"):
        await session.stop_runtime(*CRM)
    assert emulator.requests == []


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """The spans of OpenTelemetry's own instrumentation of aiohttp, which is switched on."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = AioHttpClientInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        yield exporter
    finally:
        instrumentor.uninstrument()


async def test_opentelemetrys_instrumentation_of_aiohttp_has_a_span_for_every_stop(
    connect: Connect, ways: Ways, spans: InMemorySpanExporter
) -> None:
    async with connect() as session:
        await session.stop_runtime(*CRM)
    assert [span.name for span in spans.get_finished_spans()] == ["POST"]
    assert ways.taken == (0, 1)
