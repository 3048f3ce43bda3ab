"""Observers of calls, for tracing and metrics of any kind.

A session reports the start of each call to its observer, which returns an object for
the events of that call. Every start has an end, on cancellation as well. Subclass the
classes you need: the methods do nothing by default. They run in the event loop, so they
must not block. An exception in a method is logged and does not affect the call. No
method receives the API key.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from yarl import URL

from bctrl_async.outcomes import StopOutcome, StopReport

__all__ = [
    "Attempt",
    "AttemptObserver",
    "BulkObserver",
    "CallObserver",
    "Observer",
    "StopObserver",
]


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt of a call: one HTTP request.

    Args:
        number: The number of the attempt within the call, from 1. It is not counted if
            this machine cannot hold its connection beside others.
        operation: The operation of the API, such as `stop`.
        stops: True if the operation may stop a runtime.
        method: The HTTP method.
        url: The URL of the request.
        template: The path of the operation, with `{id}` and `{alias}` for the names.
    """

    number: int
    operation: str
    stops: bool
    method: str
    url: URL
    template: str


class AttemptObserver:
    """An observer of one attempt: one HTTP request."""

    def headers(self) -> Mapping[str, str]:
        """Return headers to add, such as `traceparent`.

        The session's own headers take precedence.
        """
        return {}

    def answered(self, status: int) -> None:
        """Handle the start of the response, which has this HTTP status."""

    def end(self, error: BaseException | None) -> None:
        """Handle the end of the attempt.

        Args:
            error: The error or cancellation that ended it, None on success.
        """


class _WithAttempts:
    def begin_attempt(self, attempt: Attempt) -> AttemptObserver:
        """Handle the start of an attempt."""
        return AttemptObserver()


class StopObserver(_WithAttempts):
    """An observer of one stop: its attempts, and the GETs that check its effect.

    These are the polls of `verify=`, and the GET of a single stop that found its
    runtime stopped.
    """

    def raised(self, error: BaseException) -> None:
        """Handle what a single stop is about to raise, just before its `end`.

        The outcome has no error for a runtime that was not running, but `stop_runtime`
        raises. A stop of a bulk stop raises nothing.

        Args:
            error: The error or cancellation.
        """

    def end(self, outcome: StopOutcome) -> None:
        """Handle the end of the stop.

        The outcome of a single stop has the `index` 0.
        """


class CallObserver(_WithAttempts):
    """An observer of one call that stops nothing, and of its attempts."""

    def end(self, error: BaseException | None) -> None:
        """Handle the end of the call.

        Args:
            error: The error or cancellation that ended it, None on success.
        """


class _WithCalls:
    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        """Handle the start of a stop.

        A single stop starts before it waits to be sent.
        """
        return StopObserver()

    def begin_call(
        self, operation: str, workspace_id: str, alias: str | None
    ) -> CallObserver:
        """Handle the start of a call that stops nothing, such as `get_runtime`.

        In a bulk stop, it is a canary: a `get` that checks, after an unanswered
        request, whether the server is up. The GETs of `verify=` belong to their stop.

        Args:
            operation: The operation of the API, such as `get`.
            workspace_id: The workspace's id.
            alias: The runtime's alias; None for a call about a whole workspace.
        """
        return CallObserver()


class BulkObserver(_WithCalls):
    """An observer of one bulk stop."""

    def outcome(self, outcome: StopOutcome) -> None:
        """Handle an outcome of this run, even if its stop was never started.

        Outcomes that an earlier run recorded in the journal are not reported again.
        """

    def end(self, report: StopReport) -> None:
        """Handle the end of the bulk stop."""


class Observer(_WithCalls):
    """An observer of all calls of a session. Several sessions may share it."""

    def begin_bulk(self) -> BulkObserver:
        """Handle the start of a bulk stop."""
        return BulkObserver()
