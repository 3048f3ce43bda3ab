"""Spans and metrics of calls, as the OpenTelemetry SDK receives them."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry import baggage, context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric, Sum
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support.helpers import Connect, wait_for_requests

import bctrl_async
from bctrl_async import BctrlError, BctrlSession, RetryPolicy, StopResult
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.otel import OpenTelemetry

DOCS = Path(bctrl_async.__file__).parents[1] / "docs"
STATUS = "http.response.status_code"
DURATION = "http.client.request.duration"

Call = Callable[[BctrlSession], Awaitable[object]]


class Traced:
    """The spans and metrics that the SDK received of a session on an emulator."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self._exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers, self.meters = TracerProvider(), MeterProvider([self.reader])
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.session: BctrlSession

    def observer(self, **options: bool) -> OpenTelemetry:
        return OpenTelemetry(
            tracer_provider=self.tracers, meter_provider=self.meters, **options
        )

    def spans(self, parent: ReadableSpan | None = None) -> list[ReadableSpan]:
        """Return the children of a span by their start, or the outermost spans."""
        of = None if parent is None else parent.get_span_context()
        spans = [
            span for span in self._exporter.get_finished_spans() if span.parent == of
        ]
        return sorted(spans, key=lambda span: span.start_time or 0)

    def tree(self, parent: ReadableSpan | None = None) -> str:
        """Return the spans with their status or result, error, and children."""
        shown = []
        for span in self.spans(parent):
            has, method_or_name = attributes(span), span.name.partition(" ")[0]
            facts = [method_or_name, has.get(STATUS) or has.get("bctrl.result")]
            if span.status.status_code is StatusCode.ERROR:
                facts += ["error", has["error.type"]]
            if children := self.tree(span):
                facts.append(f"({children})")
            shown.append(" ".join(str(fact) for fact in facts if fact))
        return ", ".join(shown)

    def points(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        """Return the attributes and the point of each series of a metric."""
        data = self.reader.get_metrics_data()
        return [
            (dict(point.attributes or {}), point)
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def counts(self, name: str, attribute: str) -> Counter[Any]:
        """Return the counts of a metric by an attribute, without those that are 0."""
        counts = {has.get(attribute): point.value for has, point in self.points(name)}
        return +Counter(counts)


@pytest.fixture
async def traced(emulator: Emulator, connect: Connect) -> AsyncIterator[Traced]:
    traced = Traced(emulator)
    policy = RetryPolicy(attempts=2, base=0.001, cap=0.001)
    async with connect(observer=traced.observer(), retry=policy) as traced.session:
        yield traced
    traced.tracers.shutdown()
    traced.meters.shutdown()


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


async def stop(session: BctrlSession) -> object:
    return await session.stop_runtime("ws-1", "crm")


async def list_and_get(session: BctrlSession) -> object:
    await session.list_runtimes("ws-1")
    return await session.get_runtime("ws-1", "gone")


async def bulk(session: BctrlSession) -> object:
    return await session.stop_runtimes([("ws-1", "crm")])


UNREADABLE = "error BctrlResponseError"
FAILED = "stop_runtimes error ExceptionGroup"
REJECTED = "stop_runtime rejected error 403 (POST 403 error 403)"
# The call, the faults of its requests, and its spans.
SPANS: dict[str, tuple[Call, list[Fault | Reply], str]] = {
    "each attempt of a stop is its child": (
        stop,
        [Fault.SERVER_ERROR],
        "stop_runtime stopped (POST 500 error 500, POST 200)",
    ),
    "an unreadable answer is an error of the stop that raises it": (
        stop,
        [Reply(202, body="what?")],
        f"stop_runtime accepted {UNREADABLE} (POST 202 {UNREADABLE})",
    ),
    # Fault: the span of a stop that raised a 409 had no error, unlike the span of a
    # get.
    "a runtime that was not running is an error of the stop that raises it": (
        stop,
        [Reply(409, code="runtime.not_active")],
        "stop_runtime already_stopped error 409 (POST 409 error 409)",
    ),
    "a runtime that does not exist is an error of the stop that raises it": (
        stop,
        [Reply(404, code="runtime.not_found")],
        "stop_runtime not_found error 404 (POST 404 error 404)",
    ),
    "a runtime that was not running is no error with stopped_ok": (
        lambda session: session.stop_runtime("ws-1", "crm", stopped_ok=True),
        [Reply(409, code="runtime.not_active")],
        "stop_runtime already_stopped (POST 409 error 409, GET 200)",
    ),
    "a runtime that may run on is no error of the stop that returns it": (
        stop,
        [Fault.ACCEPTED],
        "stop_runtime accepted (POST 200)",
    ),
    # Fault: below the error of a bulk stop, no span had an error.
    "in a bulk stop, a runtime that does not exist is an error of its stop": (
        bulk,
        [Reply(404, code="runtime.not_found")],
        f"{FAILED} (stop_runtime not_found error 404 (POST 404 error 404))",
    ),
    "in a bulk stop, it is none with missing_ok": (
        lambda session: session.stop_runtimes([("ws-1", "crm")], missing_ok=True),
        [Reply(404, code="runtime.not_found")],
        "stop_runtimes (stop_runtime not_found (POST 404 error 404))",
    ),
    "in a bulk stop, a runtime that may run on is an error of its stop": (
        lambda session: session.stop_runtimes([("ws-1", "crm")], verify=False),
        [Fault.ACCEPTED],
        f"{FAILED} (stop_runtime accepted error BctrlError (POST 200))",
    ),
    "in a bulk stop, a runtime that was not running is no error of its stop": (
        bulk,
        [Reply(409, code="runtime.not_active")],
        "stop_runtimes (stop_runtime already_stopped (POST 409 error 409))",
    ),
    "reads have spans of the same kind": (
        list_and_get,
        [],
        "list_runtimes (GET 200), get_runtime error 404 (GET 404 error 404)",
    ),
    "a bulk stop has the error that its caller may raise": (
        bulk,
        [Reply(403)],
        f"{FAILED} ({REJECTED})",
    ),
    "a poll is a child of its stop": (
        bulk,
        [Fault.ACCEPTED],
        "stop_runtimes (stop_runtime stopped (POST 200, GET 200))",
    ),
}


@pytest.mark.parametrize(("call", "faults", "spans"), SPANS.values(), ids=SPANS)
async def test_the_spans_of_a_call(
    traced: Traced, call: Call, faults: list[Fault | Reply], spans: str
) -> None:
    traced.emulator.inject(*faults)
    with suppress(BctrlError):
        await call(traced.session)
    assert traced.tree() == spans


async def test_attributes_follow_the_semantic_conventions(traced: Traced) -> None:
    traced.emulator.inject(Fault.DROP_BEFORE, Reply(403))
    with pytest.raises(BctrlError) as caught:
        await stop(traced.session)

    [call] = traced.spans()
    attempts = traced.spans(call)
    template = "/v1/workspaces/{id}/runtimes/{alias}/stop"
    request = {
        "http.request.method": "POST",
        "server.address": "127.0.0.1",
        "server.port": int(traced.emulator.url.rpartition(":")[2]),
    }
    span = {
        **request,
        "url.full": f"{traced.emulator.url}/v1/workspaces/ws-1/runtimes/crm/stop",
        "url.template": template,
        "network.protocol.version": "1.1",
    }
    failures: list[dict[str, object]] = [
        {"error.type": "BctrlNetworkError"},
        {"error.type": "403", STATUS: 403},
    ]
    assert [attributes(span) for span in attempts] == [
        {**span, **failures[0]},
        {**span, **failures[1], "http.request.resend_count": 1},
    ]
    assert attributes(call) == {
        "bctrl.workspace_id": "ws-1",
        "bctrl.alias": "crm",
        "bctrl.attempts": 2,
        "bctrl.result": "unknown",
        "bctrl.may_have_stopped": True,
        "error.type": "403",
    }
    assert [(span.name, span.kind) for span in (call, *attempts)] == [
        ("stop_runtime", SpanKind.INTERNAL),
        *[(f"POST {template}", SpanKind.CLIENT)] * 2,
    ]
    # The status of an answer needs no description.
    lost = "connection lost before a response: Server disconnected"
    texts = [span.status.description for span in (call, *attempts)]
    assert texts == [caught.value.summary, lost, None]
    durations = traced.points(DURATION)
    assert [labels for labels, _ in durations] == [
        {**request, **failure} for failure in failures
    ]
    point = durations[0][1]
    assert (
        0.0
        < point.sum
        <= ((attempts[0].end_time or 0) - (attempts[0].start_time or 0)) / 1e9
    )
    assert (point.count, point.explicit_bounds[0]) == (1, 0.005)


async def test_what_a_stop_raises_is_the_error_of_its_span(traced: Traced) -> None:
    """Fault: the span of a stop that raised a 409 had no error, unlike a get's."""
    traced.emulator.inject(Reply(409, code="runtime.not_active"))
    with pytest.raises(BctrlError) as caught:
        await stop(traced.session)

    [call] = traced.spans()
    assert call.status.description == caught.value.summary
    assert attributes(call)["error.type"] == "409"
    assert attributes(call)["bctrl.may_have_stopped"] is False
    counts = traced.counts("bctrl.stop.outcomes", "bctrl.result")
    assert counts == {"already_stopped": 1}


async def test_the_current_span_is_the_parent_and_its_context_is_sent(
    traced: Traced,
) -> None:
    traced.emulator.inject(Fault.SERVER_ERROR)
    token = context.attach(baggage.set_baggage("team", "blue"))
    try:
        with traced.tracers.get_tracer("test").start_as_current_span("cleanup"):
            for call in (stop, list_and_get, bulk):
                with suppress(BctrlError):
                    await call(traced.session)
    finally:
        context.detach(token)

    [outer] = traced.spans()
    stopped, listed, got, bulk_stop = traced.spans(outer)
    calls = [stopped, listed, got, *traced.spans(bulk_stop)]
    requests = traced.emulator.requests
    assert [request.headers["traceparent"][:-2] for request in requests] == [
        f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-"
        for call in calls
        for span in traced.spans(call)
    ]
    assert {request.headers["baggage"] for request in requests} == {"team=blue"}


async def test_a_cancelled_stop_ends_its_spans_and_is_no_longer_active(
    traced: Traced,
) -> None:
    traced.emulator.inject(Fault.HANG)
    stopping = asyncio.ensure_future(stop(traced.session))
    await wait_for_requests(traced.emulator, 1)
    active = traced.points("http.client.active_requests")
    stopping.cancel()
    await asyncio.wait([stopping])

    active += traced.points("http.client.active_requests")
    assert [point.value for _, point in active] == [1, 0]
    spans = "stop_runtime unknown error CancelledError (POST error CancelledError)"
    assert traced.tree() == spans
    [span] = traced.spans()
    assert attributes(span)["bctrl.may_have_stopped"] is True


class TestBulk:
    async def test_its_span_has_its_counts(
        self, traced: Traced, tmp_path: Path
    ) -> None:
        traced.emulator.inject(Fault.SERVER_ERROR, Fault.RATE_LIMITED)
        targets = [("ws-1", "crm"), ("ws-1", "gone"), ("ws-1", "..")]
        for _ in range(2):
            await traced.session.stop_runtimes(targets, journal=tmp_path / "journal")

        first, second = traced.spans()
        assert attributes(first) == {
            "bctrl.total": 3,
            "bctrl.count.stopped": 1,
            "bctrl.count.not_found": 1,
            "bctrl.count.invalid": 1,
            "bctrl.retries": 2,
            "bctrl.throttled": 1,
            "bctrl.resumed": 0,
            "error.type": "ExceptionGroup",
        }
        assert first.status.description == "not all stops succeeded"
        assert (
            attributes(second).items()
            >= {"bctrl.resumed": 1, "bctrl.throttled": 0}.items()
        )
        # The first run has counted what the journal has.
        counted = {"stopped": 1, "not_found": 2, "invalid": 2}
        assert traced.counts("bctrl.stop.outcomes", "bctrl.result") == counted

    @pytest.mark.parametrize(
        ("fault", "running"),
        [(None, False), (Fault.ACCEPTED, True), (Fault.MALFORMED_JSON, None)],
    )
    async def test_the_span_of_a_stop_has_whether_it_runs_unless_nobody_knows(
        self, traced: Traced, fault: Fault | None, *, running: bool | None
    ) -> None:
        traced.emulator.inject(fault)
        await traced.session.stop_runtimes([("ws-1", "crm")], verify=False)
        [span] = traced.spans(traced.spans()[0])
        assert attributes(span).get("bctrl.running") is running

    async def test_a_canary_is_its_child(self, traced: Traced) -> None:
        traced.emulator.inject(Fault.DROP_BEFORE)
        await bulk(traced.session)
        # It may be cancelled before its answer.
        stopped = "stop_runtime stopped (POST error BctrlNetworkError, POST 200)"
        assert traced.tree().startswith(f"stop_runtimes ({stopped}, get_runtime ")

    async def test_its_early_end_has_the_reason(self, traced: Traced) -> None:
        traced.emulator.api_key = "another"
        report = await traced.session.stop_runtimes(
            [("ws-1", f"r{n}") for n in range(300)]
        )

        [span] = traced.spans()
        assert report.ended_early is not None
        assert attributes(span)["error.type"] == "401"
        assert span.status.description == report.ended_early.summary
        counted = traced.counts("bctrl.stop.outcomes", "bctrl.result")
        assert counted == {
            result.value: count for result, count in report.counts.items()
        }

    async def test_without_spans_of_stops_it_counts(
        self, traced: Traced, connect: Connect
    ) -> None:
        traced.emulator.inject(Fault.SERVER_ERROR)
        async with connect(observer=traced.observer(spans_in_bulk=False)) as session:
            await bulk(session)

        assert traced.tree() == "stop_runtimes"
        assert traced.counts("bctrl.stop.attempts", STATUS) == {500: 1, 200: 1}
        # Spans of the server become children of the bulk stop.
        span_id = f"{traced.spans()[0].context.span_id:016x}"
        requests = traced.emulator.requests
        assert all(span_id in request.headers["traceparent"] for request in requests)


@pytest.mark.usefixtures("pauses")
async def test_stops_are_counted_and_reads_have_only_durations(traced: Traced) -> None:
    # An alert sees an increase only of a series that was there before the first stop.
    before = traced.points("bctrl.stop.outcomes")
    assert {labels["bctrl.result"] for labels, _ in before} == set(StopResult)
    assert {point.value for _, point in before} == {0}
    traced.emulator.inject(Fault.RATE_LIMITED, Reply(503), Fault.DROP_BEFORE)
    for call in (stop, bulk, list_and_get):
        with suppress(BctrlError):
            await call(traced.session)

    outcomes = {"stopped": 1, "already_stopped": 1}
    assert traced.counts("bctrl.stop.outcomes", "bctrl.result") == outcomes
    attempts = {429: 1, 503: 1, None: 1, 200: 1, 409: 1}
    assert traced.counts("bctrl.stop.attempts", STATUS) == attempts
    durations = [labels for labels, _ in traced.points(DURATION)]
    reads = [
        labels[STATUS] for labels in durations if labels["http.request.method"] == "GET"
    ]
    assert reads == [200, 404]


def prometheus_name(metric: Metric) -> str:
    """Return the name that OpenTelemetry's exporter for Prometheus gives a metric."""
    is_counter = isinstance(metric.data, Sum) and metric.data.is_monotonic
    return (
        metric.name.replace(".", "_")
        + "_seconds" * (metric.unit == "s")
        + "_total" * is_counter
    )


async def test_the_guide_to_prometheus_has_all_metrics(traced: Traced) -> None:
    await stop(traced.session)
    data = traced.reader.get_metrics_data()
    assert data is not None
    [scope] = data.resource_metrics[0].scope_metrics
    assert scope.scope == traced.spans()[0].instrumentation_scope
    assert scope.scope.schema_url == "https://opentelemetry.io/schemas/1.37.0"
    names = {metric.name: prometheus_name(metric) for metric in scope.metrics}

    page = (DOCS / "how-to" / "telemetry.md").read_text("utf-8")
    assert dict(re.findall(r"^\| `([\w.]+)` \| `(\w+)`", page, re.MULTILINE)) == names
    rules = (DOCS / "examples" / "prometheus" / "bctrl-rules.yaml").read_text("utf-8")
    expressions = [rule["expr"] for rule in yaml.safe_load(rules)["groups"][0]["rules"]]
    used = set(
        re.findall(r"\b((?:bctrl|http_client)_\w+)(?=[{[])", "".join(expressions))
    )
    assert {name.removesuffix("_bucket") for name in used} < set(names.values())
    assert len(used) == len(expressions)


async def test_without_an_sdk_no_context_is_carried(
    emulator: Emulator, connect: Connect
) -> None:
    async with connect(observer=OpenTelemetry()) as session:
        await stop(session)
    assert "traceparent" not in emulator.requests[0].headers
