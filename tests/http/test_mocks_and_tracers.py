"""Tools that patch or observe aiohttp see every stop, which takes the long way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from unittest.mock import patch

import aiohttp
import pytest
import wrapt
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.helpers import Connect
from support.ways import Ways

from bctrl_async import BctrlConfigError, BctrlSession, StopResult
from bctrl_async.emulator import Emulator

CRM, MAIL = ("ws-1", "crm"), ("ws-1", "mail")
Function = Callable[..., object]


def plain_wrapper(wrapped: Function, seen: list[str]) -> Function:
    def wrapper(http: object, method: str, *args: object, **options: object) -> object:
        seen.append(method)
        return wrapped(http, method, *args, **options)

    return wrapper


def transparent_wrapper(wrapped: Function, seen: list[str]) -> Function:
    """Wrap it as tracers do: the wrapper passes for what it wraps."""

    @wrapt.decorator
    def wrapper(
        wrapped: Function, _: object, args: tuple[str, ...], options: dict[str, object]
    ) -> object:
        seen.append(args[0])
        return wrapped(*args, **options)

    return wrapper(wrapped)


@pytest.fixture(params=[False, True], ids=["pool not open", "pool open"])
async def maybe_open(
    emulator: Emulator, connect: Connect, request: pytest.FixtureRequest
) -> AsyncIterator[BctrlSession]:
    """A session whose pool opens before or after aiohttp is patched."""
    emulator.add_runtime(*MAIL)
    session = connect()
    if request.param:
        await session.__aenter__()
    yield session
    await session.close()


@pytest.mark.parametrize(
    ("name", "wrap"), [("request", plain_wrapper), ("_request", transparent_wrapper)]
)
async def test_a_patch_sees_every_stop_until_it_is_taken_back(
    maybe_open: BctrlSession,
    ways: Ways,
    name: str,
    wrap: Callable[[Function, list[str]], Function],
    request: pytest.FixtureRequest,
) -> None:
    """Fault: a patched function, never seen unpatched, passes for aiohttp's own."""
    seen: list[str] = []
    was_open = maybe_open._sender.was_opened
    wrapper = wrap(getattr(aiohttp.ClientSession, name), seen)
    with patch.object(aiohttp.ClientSession, name, wrapper):
        await maybe_open.stop_runtime(*CRM)
        assert ways.taken == (0, 1)
    await maybe_open.stop_runtime(*MAIL)
    assert seen == ["POST"]
    # A pool that opens with a patch stays on the long way.
    assert ways.short == (was_open and not request.config.getoption("long_way"))


@pytest.mark.parametrize(
    ("error", "closes"),
    [(ValueError, False), (RuntimeError, True), (asyncio.CancelledError, True)],
)
async def test_after_a_tracer_fails_at_the_end_of_a_request_the_stop_is_unknown(
    connect: Connect, emulator: Emulator, error: type[BaseException], *, closes: bool
) -> None:
    """Fault: the outcome was `not_sent`, and the runtime was stopped."""

    async def fail(*_: object) -> None:
        if closes:
            await http.close()
        raise error

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(fail)
    async with (
        aiohttp.ClientSession(trace_configs=[trace]) as http,
        connect(http=http) as session,
    ):
        report = await session.stop_runtimes([CRM], verify=False)

    assert report.counts == {StopResult.UNKNOWN: 1}
    assert emulator.status(*CRM) == "stopped"


async def test_after_its_pool_closes_while_a_trace_waits_nothing_is_sent(
    emulator: Emulator, connect: Connect
) -> None:
    """Fault: the AssertionError of aiohttp left the call."""

    async def close(*_: object) -> None:
        await http.close()

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(close)
    async with (
        aiohttp.ClientSession(trace_configs=[trace]) as http,
        connect(http=http) as session,
    ):
        with pytest.raises(BctrlConfigError, match="session is closed"):
            await session.stop_runtime(*CRM)
    assert emulator.requests == []


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """The spans of OpenTelemetry's own instrumentation of aiohttp."""
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
