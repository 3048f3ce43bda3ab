"""Observers of calls, for tracing and metrics of any kind.

A session reports the start of each call to its observer, and the events of the call to the object
that is returned. Every start has an end, on cancellation as well. Subclass the classes you need:
their methods do nothing. Methods run in the event loop, so they must not block. An exception from
one is logged and does not affect the call. No method receives the API key.
"""

from __future__ import annotations

from collections.abc import Mapping

from yarl import URL

from bctrl_async.outcomes import StopOutcome, StopReport

__all__ = [
    "AttemptObserver",
    "BulkObserver",
    "CallObserver",
    "Observer",
    "ReadObserver",
    "StopObserver",
]

_NO_HEADERS: Mapping[str, str] = {}


class AttemptObserver:
    """An observer of one attempt: one HTTP request."""

    def headers(self) -> Mapping[str, str]:
        """Return headers to add, such as `traceparent`; those of the session take precedence."""
        return _NO_HEADERS

    def answered(self, status: int) -> None:
        """Handle the start of the response.

        Args:
            status: The HTTP status.
        """

    def end(self, error: BaseException | None) -> None:
        """Handle the end of the attempt.

        Args:
            error: The error or cancellation that ended it, None on success.
        """


class CallObserver:
    """An observer of one call and its attempts."""

    def begin_attempt(self, number: int, method: str, url: URL) -> AttemptObserver:
        """Handle the start of an attempt.

        Args:
            number: The number of the attempt within the call, from 1.
            method: `POST` for a stop, `GET` for a read.
            url: The URL of the request.
        """
        del number, method, url
        return AttemptObserver()


class StopObserver(CallObserver):
    """An observer of one stop: its attempts, and the GETs that ask for its effect.

    These are the polls of `verify=`, and the GET of a single stop that found its runtime stopped.
    """

    def end(self, outcome: StopOutcome) -> None:
        """Handle the end of the stop.

        Args:
            outcome: The outcome; the `index` of a single stop is 0.
        """


class ReadObserver(CallObserver):
    """An observer of one `get_runtime` or `list_runtimes` and its attempts."""

    def end(self, error: BaseException | None) -> None:
        """Handle the end of the read.

        Args:
            error: The error or cancellation that ended it, None on success.
        """


class BulkObserver:
    """An observer of one bulk stop."""

    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        """Handle the start of the stop of one target.

        Args:
            workspace_id: The workspace's id.
            alias: The runtime's alias.
        """
        del workspace_id, alias
        return StopObserver()

    def begin_read(self, workspace_id: str, alias: str) -> ReadObserver:
        """Handle the start of a read that belongs to no stop of this run.

        It asks whether the server is up, after a request that was not answered.

        Args:
            workspace_id: The workspace's id.
            alias: The runtime's alias.
        """
        del workspace_id, alias
        return ReadObserver()

    def outcome(self, outcome: StopOutcome) -> None:
        """Handle an outcome of this run, even if its stop was never started.

        Outcomes that an earlier run recorded in the journal are not reported again.

        Args:
            outcome: The outcome.
        """

    def end(self, report: StopReport) -> None:
        """Handle the end of the bulk stop.

        Args:
            report: The report.
        """


class Observer:
    """An observer of all calls of a session. Several sessions may share it."""

    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        """Handle the start of a single stop, before it waits for a slot.

        Args:
            workspace_id: The workspace's id.
            alias: The runtime's alias.
        """
        del workspace_id, alias
        return StopObserver()

    def begin_read(self, workspace_id: str, alias: str | None) -> ReadObserver:
        """Handle the start of `get_runtime` or `list_runtimes`.

        Args:
            workspace_id: The workspace's id.
            alias: The runtime's alias; None for `list_runtimes`.
        """
        del workspace_id, alias
        return ReadObserver()

    def begin_bulk(self) -> BulkObserver:
        """Handle the start of a bulk stop."""
        return BulkObserver()
