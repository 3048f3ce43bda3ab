"""OpenTelemetry spans and metrics for every call (extra `otel`).

    session = BctrlSession(observer=OpenTelemetry())

Each stop is a span `stop_runtime`. Its children are the attempts, which follow the
semantic conventions for HTTP clients
(https://opentelemetry.io/docs/specs/semconv/http/http-spans/), and the polls of
`verify=`. A bulk stop is a span `stop_runtimes` with its counts, the parent of its
stops. `get_runtime` and `list_runtimes` are spans with attempts as well. Attempts
propagate the context in their headers (`traceparent`).

The metrics are `http.client.request.duration` and `http.client.active_requests` of the
same conventions, and for stops `bctrl.stop.outcomes` by result and
`bctrl.stop.attempts` by status.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from bctrl_async import _config
from bctrl_async._version import __version__
from bctrl_async.errors import BctrlApiError, BctrlError, error_type
from bctrl_async.observer import (
    Attempt,
    AttemptObserver,
    BulkObserver,
    CallObserver,
    Observer,
    StopObserver,
)
from bctrl_async.outcomes import StopOutcome, StopReport, StopResult

try:
    from opentelemetry import context, metrics, propagate, trace
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
except ModuleNotFoundError as _error:
    raise _config.missing_extra(_error, "otel") from _error

__all__ = ["OpenTelemetry"]

_SCHEMA = "https://opentelemetry.io/schemas/1.37.0"
"""The version of the semantic conventions whose names are used here."""

# The conventions recommend these boundaries for `http.client.request.duration`.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)

_Attributes = dict[str, str | int | bool]


class _Meters:
    """The instruments of one `OpenTelemetry`, shared by its observers."""

    def __init__(self, provider: metrics.MeterProvider | None) -> None:
        meter = metrics.get_meter("bctrl_async", __version__, provider, _SCHEMA)
        self.duration = meter.create_histogram(
            "http.client.request.duration",
            "s",
            "Duration of HTTP client requests.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self.active = meter.create_up_down_counter(
            "http.client.active_requests",
            "{request}",
            "Number of active HTTP requests.",
        )
        self.attempts = meter.create_counter(
            "bctrl.stop.attempts",
            "{attempt}",
            "Stop requests that ended, by status or error.",
        )
        self.outcomes = meter.create_counter(
            "bctrl.stop.outcomes", "{stop}", "Stops that ended, by result."
        )
        for result in StopResult:
            # Each series starts at 0: an alert would see no increase in a series that
            # starts at 1.
            self.outcomes.add(0, {"bctrl.result": result.value})


class _Scope(NamedTuple):
    """The tracer, the instruments and the parent context for new spans."""

    tracer: Tracer | None
    meters: _Meters
    context: context.Context
    in_bulk: bool

    def begin(
        self, name: str, kind: SpanKind, attributes: _Attributes
    ) -> tuple[Span, _Scope]:
        """Start a span, and return it with the scope of its children."""
        if self.tracer is None:
            return trace.INVALID_SPAN, self
        span = self.tracer.start_span(name, self.context, kind, attributes)
        return span, self._replace(
            context=trace.set_span_in_context(span, self.context)
        )


class OpenTelemetry(Observer):
    """An observer that records spans and metrics. Several sessions may share it.

    Args:
        tracer_provider: The provider of the tracer; None uses the global provider.
        meter_provider: The provider of the meter; None uses the global provider.
        spans_in_bulk: If False, a bulk stop of any size is one span, without spans for
            its stops and attempts. The metrics do not change.

    Raises:
        BctrlConfigError: An argument is not a provider of OpenTelemetry's API.
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        spans_in_bulk: bool = True,
    ) -> None:
        kind = "a provider of opentelemetry"
        _config.check_type(
            tracer_provider, trace.TracerProvider | None, "tracer_provider", kind
        )
        _config.check_type(
            meter_provider, metrics.MeterProvider | None, "meter_provider", kind
        )
        self._tracer = trace.get_tracer(
            "bctrl_async", __version__, tracer_provider, _SCHEMA
        )
        self._tracer_in_bulk = self._tracer if spans_in_bulk else None
        self._meters = _Meters(meter_provider)

    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        """Start the span of a single stop as a child of the current span."""
        return _Stop(self._scope(), "stop", workspace_id, alias)

    def begin_call(
        self, operation: str, workspace_id: str, alias: str | None
    ) -> CallObserver:
        """Start the span of another call as a child of the current span."""
        return _Call(self._scope(), operation, workspace_id, alias)

    def begin_bulk(self) -> BulkObserver:
        """Start the span of a bulk stop as a child of the current span."""
        span, children = self._scope().begin("stop_runtimes", SpanKind.INTERNAL, {})
        return _Bulk(span, children._replace(tracer=self._tracer_in_bulk, in_bulk=True))

    def _scope(self) -> _Scope:
        return _Scope(self._tracer, self._meters, context.get_current(), in_bulk=False)


class _Bulk(BulkObserver):
    def __init__(self, span: Span, children: _Scope) -> None:
        self._span = span
        self._children = children

    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        return _Stop(self._children, "stop", workspace_id, alias)

    def begin_call(
        self, operation: str, workspace_id: str, alias: str | None
    ) -> CallObserver:
        return _Call(self._children, operation, workspace_id, alias)

    def outcome(self, outcome: StopOutcome) -> None:
        self._children.meters.outcomes.add(1, {"bctrl.result": outcome.result.value})

    def end(self, report: StopReport) -> None:
        span = self._span
        span.set_attributes(
            {
                "bctrl.total": report.total,
                **{
                    f"bctrl.count.{result}": count
                    for result, count in report.counts.items()
                },
                "bctrl.retries": report.retries,
                "bctrl.throttled": report.throttled,
                "bctrl.resumed": report.resumed,
            }
        )
        if report.failures and report.ended_early is None:
            # This is the type that `raise_for_failures` raises.
            span.set_attribute("error.type", ExceptionGroup.__name__)
            span.set_status(Status(StatusCode.ERROR, "not all stops succeeded"))
        _end(span, report.ended_early)


class _WithSpan:
    """A call with a span, whose children are its attempts."""

    def __init__(
        self, scope: _Scope, operation: str, workspace_id: str, alias: str | None
    ) -> None:
        # The span is named after the method of the session.
        name = f"{operation}_runtimes"
        attributes: _Attributes = {"bctrl.workspace_id": workspace_id}
        if alias is not None:
            name = f"{operation}_runtime"
            attributes["bctrl.alias"] = alias
        self._span, self._children = scope.begin(name, SpanKind.INTERNAL, attributes)

    def begin_attempt(self, attempt: Attempt) -> AttemptObserver:
        return _Attempt(self._children, attempt)


class _Stop(_WithSpan, StopObserver):
    _raised_error: BaseException | None = None

    def raised(self, error: BaseException) -> None:
        self._raised_error = error

    def end(self, outcome: StopOutcome) -> None:
        span = self._span
        in_bulk = self._children.in_bulk
        # A bulk stop counts its outcomes itself, because some of them had no stop.
        if not in_bulk:
            self._children.meters.outcomes.add(
                1, {"bctrl.result": outcome.result.value}
            )
        span.set_attribute("bctrl.attempts", outcome.attempts)
        span.set_attribute("bctrl.result", outcome.result.value)
        if outcome.running is not None:
            span.set_attribute("bctrl.running", outcome.running)
        # The outcome's error comes first: a raised cancellation does not say what is in
        # doubt.
        error = outcome.error or self._raised_error
        if isinstance(error, BctrlError):
            span.set_attribute("bctrl.may_have_stopped", error.may_have_stopped)
        # A single stop that raised nothing has not failed, though its runtime may run.
        if not in_bulk and self._raised_error is None:
            error = None
        _end(span, error)


class _Call(_WithSpan, CallObserver):
    def end(self, error: BaseException | None) -> None:
        _end(self._span, error)


class _Attempt(AttemptObserver):
    def __init__(self, scope: _Scope, attempt: Attempt) -> None:
        self._stops = attempt.stops
        self._response_attributes: _Attributes = {}
        self._request_attributes: _Attributes = {
            "http.request.method": attempt.method,
            "server.address": attempt.url.host or "",
            "server.port": attempt.url.port or 0,
        }
        attributes = {
            **self._request_attributes,
            "url.full": str(attempt.url),
            "url.template": attempt.template,
            # aiohttp speaks no other version.
            "network.protocol.version": "1.1",
        }
        if attempt.number > 1:
            attributes["http.request.resend_count"] = attempt.number - 1
        name = f"{attempt.method} {attempt.template}"
        self._span, self._children = scope.begin(name, SpanKind.CLIENT, attributes)
        self._children.meters.active.add(1, self._request_attributes)
        self._started = time.perf_counter()

    def headers(self) -> Mapping[str, str]:
        carrier: dict[str, str] = {}
        propagate.inject(carrier, self._children.context)
        return carrier

    def answered(self, status: int) -> None:
        self._response_attributes["http.response.status_code"] = status

    def end(self, error: BaseException | None) -> None:
        elapsed = time.perf_counter() - self._started
        attributes = self._response_attributes
        if error is not None:
            attributes["error.type"] = error_type(error)
        meters = self._children.meters
        meters.active.add(-1, self._request_attributes)
        meters.duration.record(elapsed, {**self._request_attributes, **attributes})
        if self._stops:
            meters.attempts.add(1, attributes)
        self._span.set_attributes(attributes)
        # The conventions want no description if the HTTP status explains the error.
        _end(self._span, error, with_text=not isinstance(error, BctrlApiError))


def _end(span: Span, error: BaseException | None, *, with_text: bool = True) -> None:
    """End a span, with the error of its operation, if any."""
    if error is not None:
        span.set_attribute("error.type", error_type(error))
        text = None
        if with_text and isinstance(error, BctrlError):
            text = error.summary
        span.set_status(Status(StatusCode.ERROR, text))
    span.end()
