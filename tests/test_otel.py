"""Spans and metrics of calls, as the OpenTelemetry SDK receives them."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from helpers import Connect, wait_for_requests
from opentelemetry import baggage, context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric, Sum
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from servers import answering, http_answer, raw_server

import bctrl_async
from bctrl_async import (
    BctrlApiError,
    BctrlConflictError,
    BctrlError,
    BctrlNotFoundError,
    BctrlSession,
    RetryPolicy,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.otel import OpenTelemetry

DOCS = Path(bctrl_async.__file__).parents[1] / "docs"
KEY = "a-key-that-must-not-be-traced"
PATH = "/v1/workspaces/ws-1/runtimes/crm/stop"
ATTEMPT = "POST /v1/workspaces/{id}/runtimes/{alias}/stop"
READ = "GET /v1/workspaces/{id}/runtimes/{alias}"


class Backend(NamedTuple):
    """The in-memory exporters of spans and metrics, and their providers."""

    exporter: InMemorySpanExporter
    tracers: TracerProvider
    reader: InMemoryMetricReader
    meters: MeterProvider

    def observer(self, **options: bool) -> OpenTelemetry:
        return OpenTelemetry(tracer_provider=self.tracers, meter_provider=self.meters, **options)

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

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
        counts = {attributes.get(attribute): point.value for attributes, point in self.points(name)}
        return +Counter(counts)


@pytest.fixture
def backend() -> Iterator[Backend]:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    yield Backend(exporter, tracers, reader, meters)
    tracers.shutdown()
    meters.shutdown()


@pytest.fixture
def observed(connect: Connect, backend: Backend) -> Connect:
    return partial(connect, observer=backend.observer())


@pytest.fixture
async def session(observed: Connect) -> AsyncIterator[BctrlSession]:
    async with observed() as opened:
        yield opened


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    return span.parent is not None and span.parent.span_id == parent.context.span_id


def prometheus_name(metric: Metric) -> str:
    """Return the name that OpenTelemetry's exporter for Prometheus gives a metric."""
    is_counter = isinstance(metric.data, Sum) and metric.data.is_monotonic
    return metric.name.replace(".", "_") + "_seconds" * (metric.unit == "s") + "_total" * is_counter


class TestSpans:
    async def test_a_retried_stop_is_a_span_with_a_child_for_each_attempt(
        self, emulator: Emulator, session: BctrlSession, backend: Backend
    ) -> None:
        emulator.inject(Fault.SERVER_ERROR)
        await session.stop_runtime("ws-1", "crm")

        first, second, stop = backend.exporter.get_finished_spans()
        assert (stop.name, stop.parent, stop.kind) == ("stop_runtime", None, SpanKind.INTERNAL)
        assert attributes(stop) == {
            "bctrl.workspace_id": "ws-1",
            "bctrl.alias": "crm",
            "bctrl.attempts": 2,
            "bctrl.result": "stopped",
        }
        common = {
            "http.request.method": "POST",
            "url.full": emulator.url + PATH,
            "url.template": "/v1/workspaces/{id}/runtimes/{alias}/stop",
            "server.address": "127.0.0.1",
            "server.port": int(emulator.url.rpartition(":")[2]),
            "network.protocol.version": "1.1",
        }
        assert attributes(first) == {
            **common,
            "http.response.status_code": 500,
            "error.type": "500",
        }
        assert attributes(second) == {
            **common,
            "http.response.status_code": 200,
            "http.request.resend_count": 1,
        }
        for attempt in (first, second):
            assert (attempt.name, attempt.kind) == (ATTEMPT, SpanKind.CLIENT)
            assert is_child(attempt, stop)
        assert [span.status.status_code for span in (first, second, stop)] == [
            StatusCode.ERROR,
            StatusCode.UNSET,
            StatusCode.UNSET,
        ]

    async def test_the_current_span_is_the_parent_and_its_context_is_propagated(
        self, emulator: Emulator, session: BctrlSession, backend: Backend
    ) -> None:
        emulator.inject(Fault.SERVER_ERROR)
        token = context.attach(baggage.set_baggage("team", "blue"))
        try:
            with backend.tracers.get_tracer("test").start_as_current_span("cleanup") as parent:
                await session.stop_runtime("ws-1", "crm")
                await session.get_runtime("ws-1", "crm")
                await session.stop_runtimes([("ws-1", "crm")])
        finally:
            context.detach(token)

        [stop, _] = backend.spans("stop_runtime")
        for span in (stop, *backend.spans("get_runtime"), *backend.spans("stop_runtimes")):
            assert span.parent == parent.get_span_context()
        stops = [request.headers for request in emulator.stops]
        # Each attempt carries its own context.
        assert [headers["traceparent"][:-2] for headers in stops] == [
            f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-"
            for span in backend.spans(ATTEMPT)
        ]
        assert [headers["baggage"] for headers in stops] == ["team=blue"] * 3

    @pytest.mark.parametrize(
        ("fault", "status", "error_type", "result"),
        [
            (Fault.DROP_AFTER, None, "BctrlNetworkError", "unknown"),
            (Reply(202, body="what?"), 202, "BctrlResponseError", "accepted"),
            (Reply(403), 403, "403", "rejected"),
            (Reply(409, code="runtime.not_active"), 409, "409", "already_stopped"),
        ],
    )
    async def test_a_failed_stop_and_its_attempt_have_their_error(  # noqa: PLR0917 - a table.
        self,
        emulator: Emulator,
        observed: Connect,
        backend: Backend,
        fault: Fault | Reply,
        status: int | None,
        error_type: str,
        result: str,
    ) -> None:
        emulator.inject(fault)
        async with observed(retry=RetryPolicy(attempts=1)) as session:
            with pytest.raises(BctrlError) as caught:
                await session.stop_runtime("ws-1", "crm")

        [attempt], [stop] = backend.spans(ATTEMPT), backend.spans("stop_runtime")
        assert attributes(attempt).get("http.response.status_code") == status
        assert attributes(attempt)["error.type"] == error_type
        assert attempt.status.status_code is StatusCode.ERROR
        # By the conventions a 4xx is an error, and its status needs no description.
        assert (attempt.status.description is None) is error_type.isdigit()
        assert attributes(stop)["bctrl.result"] == result
        # The others are answers: no errors of the stop.
        failed = result in {"unknown", "rejected"}
        assert stop.status.status_code is (StatusCode.ERROR if failed else StatusCode.UNSET)
        assert stop.status.description == (caught.value.summary if failed else None)
        assert attributes(stop).get("error.type") == (error_type if failed else None)
        may_have_stopped = {"rejected": False, "already_stopped": None}.get(result, True)
        assert attributes(stop).get("bctrl.may_have_stopped") is may_have_stopped

    async def test_a_cancelled_stop_ends_its_spans_and_is_no_longer_active(
        self, emulator: Emulator, session: BctrlSession, backend: Backend
    ) -> None:
        emulator.inject(Fault.HANG)
        stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await wait_for_requests(emulator, 1)
        active = backend.points("http.client.active_requests")
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping

        active += backend.points("http.client.active_requests")
        assert [point.value for _, point in active] == [1, 0]
        attempt, stop = backend.exporter.get_finished_spans()
        assert attributes(attempt)["error.type"] == "CancelledError"
        assert attributes(stop)["error.type"] == "CancelledError"
        assert attributes(stop)["bctrl.result"] == "unknown"

    async def test_reads_have_spans_of_the_same_kind(
        self, emulator: Emulator, session: BctrlSession, backend: Backend
    ) -> None:
        await session.list_runtimes("ws-1")
        with pytest.raises(BctrlNotFoundError) as caught:
            await session.get_runtime("ws-1", "gone")

        list_attempt, listed, get_attempt, got = backend.exporter.get_finished_spans()
        assert is_child(list_attempt, listed)
        assert list_attempt.name == "GET /v1/workspaces/{id}/runtimes"
        assert attributes(list_attempt)["url.full"] == f"{emulator.url}/v1/workspaces/ws-1/runtimes"
        assert listed.name == "list_runtimes"
        assert attributes(listed) == {"bctrl.workspace_id": "ws-1"}
        assert listed.status.status_code is StatusCode.UNSET
        assert is_child(get_attempt, got)
        assert (get_attempt.name, got.name) == (READ, "get_runtime")
        assert attributes(got) == {
            "bctrl.workspace_id": "ws-1",
            "bctrl.alias": "gone",
            "error.type": "404",
        }
        assert got.status.status_code is StatusCode.ERROR
        assert got.status.description == caught.value.summary

    async def test_the_key_is_in_no_span_or_metric(self, backend: Backend) -> None:
        body = f'{{"code":"{KEY}","message":"no entry for Bearer {KEY}","requestId":"{KEY}"}}'
        answer = http_answer(f"403 {KEY}", body.encode(), f"X-Request-Id: {KEY}")
        async with (
            raw_server(answering(answer)) as url,
            BctrlSession(KEY, base_url=url, observer=backend.observer()) as session,
        ):
            with pytest.raises(BctrlApiError):
                await session.stop_runtime("ws-1", "crm")
            await session.stop_runtimes([("ws-1", "mail")])

        spans = backend.exporter.get_finished_spans()
        assert len(spans) == 5
        assert KEY not in "".join(str(span.to_json()) for span in spans)
        data = backend.reader.get_metrics_data()
        assert data is not None
        assert KEY not in data.to_json()


class TestBulk:
    async def test_it_is_a_span_with_counts_whose_children_are_the_stops(
        self, emulator: Emulator, session: BctrlSession, backend: Backend
    ) -> None:
        emulator.inject(Fault.SERVER_ERROR)
        report = await session.stop_runtimes([("ws-1", "crm"), ("ws-1", "no"), ("ws-1", "..")])

        [bulk] = backend.spans("stop_runtimes")
        assert attributes(bulk) == {
            "bctrl.total": 3,
            "bctrl.count.stopped": 1,
            "bctrl.count.not_found": 1,
            "bctrl.count.rejected": 1,
            "bctrl.retries": report.retries,
            "bctrl.throttled": 0,
            "bctrl.resumed": 0,
            # The caller may raise it with `raise_for_failures`.
            "error.type": "ExceptionGroup",
        }
        assert bulk.status.status_code is StatusCode.ERROR
        assert bulk.status.description == "not all stops succeeded"
        stops = backend.spans("stop_runtime")
        assert {attributes(stop)["bctrl.alias"] for stop in stops} == {"crm", "no"}
        assert all(is_child(stop, bulk) for stop in stops)
        assert len(backend.spans(ATTEMPT)) == 3

    async def test_a_poll_is_a_child_of_its_stop_and_a_canary_a_read_of_the_bulk_stop(
        self, emulator: Emulator, session: BctrlSession, backend: Backend
    ) -> None:
        emulator.inject(Fault.DROP_BEFORE, Fault.ACCEPTED)
        await session.stop_runtimes([("ws-1", "crm")], verify=True)

        [bulk], [stop] = backend.spans("stop_runtimes"), backend.spans("stop_runtime")
        [canary], [attempt, poll] = backend.spans("get_runtime"), backend.spans(READ)
        assert [is_child(span, stop) for span in backend.spans(ATTEMPT)] == [True] * 2
        assert is_child(canary, bulk)
        assert is_child(attempt, canary)
        assert is_child(poll, stop)
        assert attributes(poll)["url.template"] == "/v1/workspaces/{id}/runtimes/{alias}"
        assert attributes(stop)["bctrl.result"] == "stopped"
        # In the end all is well.
        assert bulk.status.status_code is StatusCode.UNSET
        assert "error.type" not in attributes(bulk)

    async def test_it_counts_throttled_attempts_and_resumed_outcomes(
        self, emulator: Emulator, session: BctrlSession, backend: Backend, tmp_path: Path
    ) -> None:
        emulator.inject(Fault.RATE_LIMITED)
        for _ in range(2):
            await session.stop_runtimes([("ws-1", "crm")], journal=tmp_path / "journal")

        first, second = (attributes(span) for span in backend.spans("stop_runtimes"))
        assert (first["bctrl.throttled"], first["bctrl.resumed"]) == (1, 0)
        assert (second["bctrl.throttled"], second["bctrl.resumed"]) == (0, 1)
        # The earlier run has counted it.
        assert backend.counts("bctrl.stop.outcomes", "bctrl.result") == {"stopped": 1}

    async def test_one_that_ends_early_has_the_reason(
        self, emulator: Emulator, backend: Backend
    ) -> None:
        observer = backend.observer()
        async with BctrlSession("wrong", base_url=emulator.url, observer=observer) as session:
            report = await session.stop_runtimes([("ws-1", f"r{n}") for n in range(300)])

        [bulk] = backend.spans("stop_runtimes")
        assert report.ended_early is not None
        assert attributes(bulk)["error.type"] == "401"
        assert bulk.status.description == report.ended_early.summary
        counted = backend.counts("bctrl.stop.outcomes", "bctrl.result")
        assert counted == {result.value: count for result, count in report.counts.items()}

    async def test_without_spans_of_its_stops_it_is_one_span_and_still_counts(
        self, emulator: Emulator, connect: Connect, backend: Backend
    ) -> None:
        emulator.inject(Fault.SERVER_ERROR)
        async with connect(observer=backend.observer(spans_in_bulk=False)) as session:
            await session.stop_runtimes([("ws-1", "crm")])

        [bulk] = backend.exporter.get_finished_spans()
        assert bulk.name == "stop_runtimes"
        assert backend.counts("bctrl.stop.attempts", "http.response.status_code") == {
            500: 1,
            200: 1,
        }
        # Spans of the server become children of the bulk stop.
        span_id = f"{bulk.context.span_id:016x}"
        assert all(span_id in request.headers["traceparent"] for request in emulator.requests)


class TestMetrics:
    async def test_the_guide_to_prometheus_has_the_names_of_all_metrics_of_the_conventions(
        self, emulator: Emulator, session: BctrlSession, backend: Backend
    ) -> None:
        emulator.inject(Fault.RATE_LIMITED)
        await session.stop_runtime("ws-1", "crm")
        data = backend.reader.get_metrics_data()
        assert data is not None
        [resource] = data.resource_metrics
        [scope] = resource.scope_metrics
        scopes = {span.instrumentation_scope for span in backend.exporter.get_finished_spans()}
        assert scopes == {scope.scope}
        assert scope.scope.schema_url == "https://opentelemetry.io/schemas/1.37.0"
        names = {metric.name: prometheus_name(metric) for metric in scope.metrics}
        page = (DOCS / "how-to" / "prometheus.md").read_text("utf-8")

        rows = re.findall(r"^\| `([\w.]+)` \| `(\w+)`", page, re.MULTILINE)
        rules = (DOCS / "examples" / "prometheus" / "bctrl-rules.yaml").read_text("utf-8")
        expressions = [rule["expr"] for rule in yaml.safe_load(rules)["groups"][0]["rules"]]
        used = set(re.findall(r"\b((?:bctrl|http_client)_\w+)(?=[{[])", "".join(expressions)))

        assert dict(rows) == names
        assert {name.removesuffix("_bucket") for name in used} < set(names.values())
        assert len(used) == len(expressions)

    def test_every_result_has_a_series_before_the_first_stop(self, backend: Backend) -> None:
        assert backend.points("bctrl.stop.outcomes") == []
        backend.observer()

        points = backend.points("bctrl.stop.outcomes")

        assert {attributes["bctrl.result"] for attributes, _ in points} == set(StopResult)
        assert {point.value for _, point in points} == {0}

    async def test_outcomes_attempts_and_throttling_are_counted(
        self, emulator: Emulator, session: BctrlSession, backend: Backend, pauses: list[float]
    ) -> None:
        emulator.inject(Fault.RATE_LIMITED, Reply(503), Fault.DROP_BEFORE)
        await session.stop_runtime("ws-1", "crm")
        await session.stop_runtimes([("ws-1", "crm"), ("ws-1", "gone")])

        assert len(pauses) == 3
        assert backend.counts("bctrl.stop.outcomes", "bctrl.result") == {
            "stopped": 1,
            "already_stopped": 1,
            "not_found": 1,
        }
        status = "http.response.status_code"
        assert backend.counts("bctrl.stop.attempts", status) == {
            429: 1,
            503: 1,
            None: 1,
            200: 1,
            409: 1,
            404: 1,
        }

    async def test_durations_are_those_of_the_semantic_conventions(
        self, emulator: Emulator, session: BctrlSession, backend: Backend
    ) -> None:
        await session.stop_runtime("ws-1", "crm")

        [(labels, point)] = backend.points("http.client.request.duration")
        assert labels == {
            "http.request.method": "POST",
            "server.address": "127.0.0.1",
            "server.port": int(emulator.url.rpartition(":")[2]),
            "http.response.status_code": 200,
        }
        [span] = backend.spans(ATTEMPT)
        assert point.count == 1
        assert 0.0 < point.sum <= ((span.end_time or 0) - (span.start_time or 0)) / 1e9
        assert point.explicit_bounds[0] == 0.005

    async def test_a_read_has_a_duration_but_is_not_a_stop_attempt(
        self, emulator: Emulator, session: BctrlSession, backend: Backend, pauses: list[float]
    ) -> None:
        emulator.inject(Fault.RATE_LIMITED, method="GET")
        await session.get_runtime("ws-1", "crm")

        assert len(pauses) == 1
        durations = backend.points("http.client.request.duration")
        assert {labels["http.request.method"] for labels, _ in durations} == {"GET"}
        assert sum(point.count for _, point in durations) == 2
        assert backend.points("bctrl.stop.attempts") == []


class TestWithoutSdk:
    async def test_without_an_sdk_stops_work_and_carry_no_context(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        async with connect(observer=OpenTelemetry()) as session:
            await session.stop_runtime("ws-1", "crm")
            with pytest.raises(BctrlConflictError):
                await session.stop_runtime("ws-1", "crm")

        assert "traceparent" not in emulator.requests[0].headers
