"""One call on its way: what is to be sent, and how far it has come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import msgspec
from aiohttp import ClientTimeout

from bctrl_async._calls.retry import RetryPolicy, RetryState
from bctrl_async._http.protocol import Operation
from bctrl_async._limiter.limiter import Priority
from bctrl_async.errors import BctrlError
from bctrl_async.observer import CallObserver

_log = logging.getLogger("bctrl_async")

_T = TypeVar("_T")


class Call(msgspec.Struct, Generic[_T]):
    """One call on its way.

    Args:
        operation: What it does.
        workspace_id: For the errors.
        alias: For the errors; None if it is about the whole workspace.
        path: The encoded path of the request.
        headers: Those of this call alone.
        limit: What one attempt may take.
        policy: When and how often to try again.
        answered: Called when the server answers an attempt with an error. If there is such a
            function, a request that is not answered ends the attempts: what follows is then for
            the caller to decide.
        retries: What was spent of the policy; None as long as nothing failed.
        attempts: How many requests were begun.
        in_flight: Whether one is under way.
        unanswered: Whether the last one got no answer.
        is_last: Whether no further one may follow, however it ends.
        polls: Whether it looks at what another call has stopped, for which there is time.
        observer: Who is told of its attempts.
    """

    operation: Operation[_T]
    workspace_id: str
    alias: str | None
    path: str
    headers: Mapping[str, str]
    limit: ClientTimeout
    policy: RetryPolicy
    answered: Callable[[], None] | None = None
    retries: RetryState | None = None
    attempts: int = 0
    in_flight: bool = False
    unanswered: bool = False
    is_last: bool = False
    polls: bool = False
    observer: CallObserver | None = None

    @property
    def priority(self) -> Priority:
        """Where it waits for its turn."""
        if self.polls:
            return Priority.POLL
        return Priority.RETRY if self.attempts else Priority.NEW

    def annotate(self, error: BctrlError) -> None:
        """Tell an error which call it ends, and what the attempts before it may have done."""
        error.operation = self.operation.name
        error.workspace_id = self.workspace_id
        error.alias = self.alias
        error.attempts = self.attempts
        if self.retries is not None:
            self.retries.annotate(error)
        # What only reads has stopped nothing, however it ended.
        error.may_have_stopped &= self.operation.stops

    def log_retry(self, delay: float) -> None:
        """Log why the last attempt failed, and that another one follows after a delay."""
        failed = None if self.retries is None else self.retries.last_failure
        if failed is not None and _log.isEnabledFor(logging.INFO):
            alias = "" if self.alias is None else f"{self.alias!r} in "
            _log.info(
                "attempt %d to %s %sworkspace %r failed: %s; the next follows in %.3f s",
                self.attempts,
                self.operation.name,
                alias,
                self.workspace_id,
                failed.summary,
                delay,
            )
