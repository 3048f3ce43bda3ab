"""CPU time of the client process per stop, without an observer and with OpenTelemetry.

`python tests/benchmarks/telemetry.py [--stops 5000] [--rounds 20]`

With OpenTelemetry's SDK, each stop makes two spans, which a batch processor exports to
nowhere, and records metrics in memory. OpenTelemetry's own instrumentation of aiohttp
makes one span and records one metric per request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from statistics import median
from typing import Any

import contenders
from contenders import KEY, WORKSPACE, Contender, Stop
from harness import Goal, Report, command, in_rounds, measured, ratio, run, server
from opentelemetry.instrumentation.aiohttp_client import create_trace_config
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SpanExporter,
    SpanExportResult,
)

from bctrl_async import BctrlSession, Observer
from bctrl_async.otel import OpenTelemetry

_IN_FLIGHT = 64


class _Nowhere(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        del spans
        return SpanExportResult.SUCCESS


def _sdk() -> dict[str, Any]:
    """Return the providers as keyword arguments."""
    tracers = TracerProvider()
    tracers.add_span_processor(BatchSpanProcessor(_Nowhere()))
    return {
        "tracer_provider": tracers,
        "meter_provider": MeterProvider([InMemoryMetricReader()]),
    }


@asynccontextmanager
async def _observed(make: Callable[[], Observer], base: str) -> AsyncGenerator[Stop]:
    async with BctrlSession(KEY, base_url=base, observer=make()) as session:
        yield partial(session.stop_runtime, WORKSPACE)


@asynccontextmanager
async def _instrumented(base: str) -> AsyncGenerator[Stop]:
    async with contenders.bare(base, [create_trace_config(**_sdk())]) as stop:
        yield stop


_CASES: dict[str, Contender] = {
    "bare aiohttp + msgspec": contenders.bare,
    "no observer": contenders.bctrl_async,
    "an observer that does nothing": partial(_observed, Observer),
    "OpenTelemetry, with its SDK": partial(_observed, lambda: OpenTelemetry(**_sdk())),
    "bare, its own instrumentation": _instrumented,
}
_BARE, _OURS, *_ = _CASES


def _child(name: str, url: str, stops: str) -> float:
    return run(contenders.cpu_of_stop(_CASES[name], url, int(stops), _IN_FLIGHT))


def _compare(stops: int, rounds: int) -> Report:
    with server() as url:
        times = in_rounds(
            _CASES, rounds, lambda name: measured(name, url, stops, kind=float)
        )
    return Report(
        f"CPU time of the client process per stop, {_IN_FLIGHT} in flight",
        ["client", "median µs", "min µs", "ratio to bare", "ratio to no observer"],
        [
            [
                name,
                median(times[name]),
                min(times[name]),
                ratio(times[name], times[_BARE]),
                ratio(times[name], times[_OURS]),
            ]
            for name in _CASES
        ],
        [
            Goal(
                "no observer to bare aiohttp + msgspec",
                ratio(times[_OURS], times[_BARE]),
                0.50,
            )
        ],
    )


if __name__ == "__main__":
    command(__doc__, _compare, _child, stops=5_000, rounds=20)
