"""Tools that patch or observe aiohttp see every stop: with them, none takes the fast path."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import aioresponses
import pytest
import vcr  # type: ignore[import-untyped]
import wrapt
from helpers import Connect, port_kept
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ways import Ways

from bctrl_async import BctrlNetworkError, BctrlSession, StopResult
from bctrl_async.emulator import Emulator

Patch = Callable[[pytest.MonkeyPatch, list[str]], None]
"""Patches aiohttp so that the method of each request is added to a list."""

OPENED = pytest.mark.parametrize("opened", [False, True], ids=["pool not open", "pool open"])


@pytest.fixture(autouse=True)
def _second_runtime(emulator: Emulator) -> None:
    emulator.add_runtime("ws-1", "mail")


@pytest.fixture
def may_be_short(request: pytest.FixtureRequest) -> bool:
    """True unless the whole suite takes the long way."""
    return not request.config.getoption("long_way")


@contextlib.asynccontextmanager
async def one_session(connect: Connect, *, opened: bool) -> AsyncIterator[BctrlSession]:
    """Yield a session, with or without an open pool."""
    session = connect()
    if opened:
        await session.__aenter__()
    try:
        yield session
    finally:
        await session.close()


# Tools that replace `ClientSession._request`


@OPENED
async def test_with_aioresponses_nothing_is_sent(
    emulator: Emulator,
    connect: Connect,
    ways: Ways,
    bctrl_aioresponses: aioresponses.aioresponses,
    *,
    opened: bool,
    may_be_short: bool,
) -> None:
    """Fault: a test that mocks aiohttp stops a real browser."""
    stop = f"{emulator.url}/v1/workspaces/ws-1/runtimes/crm/stop"
    # The pool opens before aiohttp is patched.
    bctrl_aioresponses.stop()
    async with one_session(connect, opened=opened) as session:
        with bctrl_aioresponses as mocked:
            mocked.post(stop, payload={**emulator.runtimes["ws-1", "crm"], "status": "stopped"})
            assert (await session.stop_runtime("ws-1", "crm")).alias == "crm"
            assert len(mocked.requests) == 1
            assert ways.short == 0
            assert emulator.requests == []
        await session.stop_runtime("ws-1", "mail")
        assert len(emulator.requests) == 1
        if opened and may_be_short:
            assert ways.short == 1


@OPENED
async def test_vcr_records_and_replays_a_stop(
    emulator: Emulator, connect: Connect, ways: Ways, tmp_path: Path, *, opened: bool
) -> None:
    cassette = vcr.VCR(filter_headers=["authorization"]).use_cassette
    path = str(tmp_path / "stop.yaml")
    async with one_session(connect, opened=opened) as session:
        with cassette(path):
            recorded = await session.stop_runtime("ws-1", "crm")
    assert ways.taken == (0, 1)
    await emulator.close()

    with port_kept(emulator.url):
        async with one_session(connect, opened=opened) as session:
            with cassette(path, record_mode="none"):
                assert await session.stop_runtime("ws-1", "crm") == recorded
            assert ways.taken == (0, 1)
            with pytest.raises(BctrlNetworkError, match="no connection"):
                await session.stop_runtime("ws-1", "crm")


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
@OPENED
async def test_a_patch_sees_every_stop_until_it_is_taken_back(
    connect: Connect, ways: Ways, patch: Patch, *, opened: bool, may_be_short: bool
) -> None:
    async with one_session(connect, opened=opened) as session:
        with pytest.MonkeyPatch.context() as monkeypatch:
            seen: list[str] = []
            patch(monkeypatch, seen)
            await session.stop_runtime("ws-1", "crm")
            assert seen == ["POST"]
            assert ways.taken == (0, 1)
        await session.stop_runtime("ws-1", "mail")
        assert seen == ["POST"]
        if opened and may_be_short:
            assert ways.taken == (1, 1)


@pytest.mark.parametrize(
    "patch",
    [
        "aiohttp.ClientSession.request = see(aiohttp.ClientSession.request)",
        "wrap_function_wrapper(aiohttp.ClientSession, '_request', see_wrapped)",
        "aiohttp.ClientSession.__init__ = with_own_request",
        "aiohttp.ClientSession = Own",
    ],
)
async def test_a_patch_from_before_the_import_sees_every_stop(
    emulator: Emulator, patch: str
) -> None:
    """Fault: a patched function passes for aiohttp's own, as it was never seen unpatched."""
    program = f"""
import asyncio, sys
import aiohttp
from wrapt import wrap_function_wrapper

def see(function):
    def seeing(*args, **options):
        print("POST" in args)
        return function(*args, **options)
    return seeing

def see_wrapped(wrapped, _, args, options):
    return see(wrapped)(*args, **options)

init = aiohttp.ClientSession.__init__

def with_own_request(http, **options):
    init(http, **options)
    vars(http)["_request"] = see(http._request)

class Own(aiohttp.ClientSession):
    def _request(self, *args, **options):
        return see(super()._request)(*args, **options)

{patch}
import bctrl_async

async def main():
    async with bctrl_async.BctrlSession("emulator-key", base_url=sys.argv[1]) as session:
        await session.stop_runtime("ws-1", "crm")

asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, emulator.url, stdout=asyncio.subprocess.PIPE
    )
    stdout, _ = await process.communicate()
    assert process.returncode == 0
    assert stdout.split() == [b"True"]
    assert len(emulator.requests) == 1


# Tools that aiohttp has a place for


async def test_a_trace_config_is_told_of_every_stop(connect: Connect, ways: Ways) -> None:
    told: list[str] = []

    async def start(*_: object) -> None:
        told.append("start")

    async def connection(*_: object) -> None:
        told.append("connection")

    async def end(*_: object) -> None:
        told.append("end")

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(start)
    trace.on_connection_create_end.append(connection)
    trace.on_request_end.append(end)
    async with connect(trace_configs=[trace]) as session:
        await session.stop_runtime("ws-1", "crm")
    assert told == ["start", "connection", "end"]
    assert ways.taken == (0, 1)


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
        report = await session.stop_runtimes([("ws-1", "crm")], verify=False)

    assert report.counts == {StopResult.UNKNOWN: 1}
    assert emulator.status("ws-1", "crm") == "stopped"


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
        if instrumentor.is_instrumented_by_opentelemetry:
            instrumentor.uninstrument()


async def test_opentelemetrys_instrumentation_of_aiohttp_has_a_span_for_every_stop(
    connect: Connect, ways: Ways, spans: InMemorySpanExporter, *, may_be_short: bool
) -> None:
    async with connect() as session:
        await session.stop_runtime("ws-1", "crm")
        assert [span.name for span in spans.get_finished_spans()] == ["POST"]
        assert ways.taken == (0, 1)
    AioHttpClientInstrumentor().uninstrument()
    async with connect() as session:
        await session.stop_runtime("ws-1", "mail")
    assert len(spans.get_finished_spans()) == 1
    if may_be_short:
        assert ways.taken == (1, 1)
