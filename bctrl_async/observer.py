"""What may be told of every call while it happens: for tracing and metrics of any kind.

A session that is given an observer tells it what begins, and what comes back is told how that goes
on and ends. Everything that begins ends, by cancellation as well. Subclass what you need: each
method here does nothing. They are called in the loop, so they must not block. What they raise is
logged, and changes nothing for the call. No method is given the key.
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
    """Follows one request."""

    def headers(self) -> Mapping[str, str]:
        """Return headers to send, such as `traceparent`; those of the session come first."""
        return _NO_HEADERS

    def answered(self, status: int) -> None:
        """Take note that an answer begins.

        Args:
            status: Its HTTP status.
        """

    def end(self, error: BaseException | None) -> None:
        """Take note of its end.

        Args:
            error: What it ended with, a cancellation as well; None if it went well.
        """


class CallObserver:
    """Follows one call through its attempts."""

    def begin_attempt(self, number: int, method: str, url: URL) -> AttemptObserver:
        """Take note that a request begins.

        Args:
            number: Which one of this call it is, from 1.
            method: `POST` if it stops something, `GET` if it looks.
            url: Where it goes.
        """
        del number, method, url
        return AttemptObserver()


class StopObserver(CallObserver):
    """Follows one stop through its attempts, and through the looks of `verify=`."""

    def end(self, outcome: StopOutcome) -> None:
        """Take note of its end.

        Args:
            outcome: What became of it; the `index` of a single stop is 0.
        """


class ReadObserver(CallObserver):
    """Follows one `get_runtime` or `list_runtimes` through its attempts."""

    def end(self, error: BaseException | None) -> None:
        """Take note of its end.

        Args:
            error: What it ended with, a cancellation as well; None if it went well.
        """


class BulkObserver:
    """Follows one bulk stop."""

    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        """Take note that the stop of one target begins.

        Args:
            workspace_id: The workspace's id.
            alias: The runtime's alias.
        """
        del workspace_id, alias
        return StopObserver()

    def begin_read(self, workspace_id: str, alias: str) -> ReadObserver:
        """Take note that a runtime is looked at (`verify=`) that an earlier run has stopped.

        Args:
            workspace_id: The workspace's id.
            alias: The runtime's alias.
        """
        del workspace_id, alias
        return ReadObserver()

    def outcome(self, outcome: StopOutcome) -> None:
        """Take note of an outcome of this run, also that of a target that was never begun.

        What an earlier run has settled, as the journal has it, is not told again.

        Args:
            outcome: The outcome.
        """

    def end(self, report: StopReport) -> None:
        """Take note of the end.

        Args:
            report: What became of all.
        """


class Observer:
    """Follows what a session does; one may be shared by several sessions."""

    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        """Take note that a single stop begins; it may still have to wait for its turn.

        Args:
            workspace_id: The workspace's id.
            alias: The runtime's alias.
        """
        del workspace_id, alias
        return StopObserver()

    def begin_read(self, workspace_id: str, alias: str | None) -> ReadObserver:
        """Take note that a runtime is looked at, or that all are listed.

        Args:
            workspace_id: The workspace's id.
            alias: The runtime's alias; None if all are listed.
        """
        del workspace_id, alias
        return ReadObserver()

    def begin_bulk(self) -> BulkObserver:
        """Take note that a bulk stop begins."""
        return BulkObserver()
