"""CPU time of the client process per stop, without an observer and with OpenTelemetry.

`python tests/benchmarks/telemetry.py [--stops 5000] [--rounds 20] [--json]`

Without its SDK, OpenTelemetry's API does nothing. With it, each stop makes two spans, which a batch
processor exports to nowhere, and records metrics in memory. OpenTelemetry's own instrumentation of
aiohttp makes one span and records one metric per request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any

import contenders
from contenders import KEY, WORKSPACE, Contender, Stop
from harness import Goal, Report, command, installed, measured, ratio, run, server

from bctrl_async import BctrlSession, Observer

_WARM_UP = 500
_IN_FLIGHT = 64


@asynccontextmanager
async def _observed(make: Callable[[], Observer], base: str) -> AsyncGenerator[Stop]:
    async with BctrlSession(KEY, base_url=base, observer=make()) as session:
        yield partial(session.stop_runtime, WORKSPACE)


def _api_alone() -> Observer:
    observer: Observer = import_module("bctrl_async.otel").OpenTelemetry()
    return observer


def _sdk() -> dict[str, Any]:
    """Return the providers as keyword arguments."""
    trace, export = (
        import_module("opentelemetry.sdk.trace"),
        import_module("opentelemetry.sdk.trace.export"),
    )
    metrics = import_module("opentelemetry.sdk.metrics")
    reader = import_module("opentelemetry.sdk.metrics.export").InMemoryMetricReader()

    class Nowhere(export.SpanExporter):  # type: ignore[misc, name-defined]
        def export(self, _: object) -> object:
            return export.SpanExportResult.SUCCESS

    tracers = trace.TracerProvider()
    tracers.add_span_processor(export.BatchSpanProcessor(Nowhere()))
    meters = metrics.MeterProvider([reader])
    return {"tracer_provider": tracers, "meter_provider": meters}


def _with_sdk() -> Observer:
    observer: Observer = import_module("bctrl_async.otel").OpenTelemetry(**_sdk())
    return observer


@asynccontextmanager
async def _instrumented(base: str) -> AsyncGenerator[Stop]:
    own = import_module("opentelemetry.instrumentation.aiohttp_client")
    async with contenders.bare(base, [own.create_trace_config(**_sdk())]) as stop:
        yield stop


_CASES: dict[str, Contender] = {
    "bare aiohttp + msgspec": contenders.bare,
    "no observer": contenders.bctrl_async,
    "an observer that does nothing": partial(_observed, Observer),
    "OpenTelemetry, API alone": partial(_observed, _api_alone),
    "OpenTelemetry, with its SDK": partial(_observed, _with_sdk),
    "bare, its own instrumentation": _instrumented,
}
_BARE, _OURS, *_ = _CASES


async def _measure(contender: Contender, url: str, stops: int) -> float:
    async def work() -> None:
        for alias in aliases:
            await stop(alias)

    async with contender(url) as stop:
        for count in (_WARM_UP, stops):
            aliases = (f"crm-{number}" for number in range(count))
            start = time.process_time()
            await asyncio.gather(*(work() for _ in range(_IN_FLIGHT)))
        return (time.process_time() - start) / stops * 1e6


def _child(name: str, url: str, stops: str) -> float:
    return run(_measure(_CASES[name], url, int(stops)))


def _compare(stops: int, rounds: int) -> Report:
    names = list(_CASES)
    notes = []
    for package, needs_it in (
        ("opentelemetry-api", "API"),
        ("opentelemetry-sdk", "SDK"),
        ("opentelemetry-instrumentation-aiohttp-client", "instrumentation"),
    ):
        if not installed(package):
            names = [name for name in names if needs_it not in name]
            notes.append(f"{package} is not installed: its cases were skipped.")
    times: dict[str, list[float]] = {name: [] for name in names}
    with server() as url:
        for _ in range(rounds):
            for name in names:
                task = (__file__, "--measure", name, url, str(stops))
                times[name].append(measured(*task, kind=float))
            names.reverse()
    return Report(
        f"CPU time of the client process per stop, {_IN_FLIGHT} in flight",
        ["client", "median µs", "min µs", "ratio to bare", "ratio to no observer"],
        [
            [
                name,
                median(column),
                min(column),
                ratio(column, times[_BARE]),
                ratio(column, times[_OURS]),
            ]
            for name, column in times.items()
        ],
        [Goal("no observer to bare aiohttp + msgspec", ratio(times[_OURS], times[_BARE]), 0.50)],
        notes,
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, stops=5_000, rounds=20)
