"""One stop on its way: what is to be sent, and how far it has come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import msgspec
from aiohttp import ClientTimeout

from bctrl_async._retry import Retries, RetryPolicy
from bctrl_async.errors import BctrlError
from bctrl_async.observer import StopObserver

_log = logging.getLogger("bctrl_async")


class Call(msgspec.Struct):
    """One stop on its way.

    Args:
        workspace_id: For the errors.
        alias: For the errors.
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
        watch: Who is told of its attempts.
    """

    workspace_id: str
    alias: str
    path: str
    headers: Mapping[str, str]
    limit: ClientTimeout
    policy: RetryPolicy
    answered: Callable[[], None] | None = None
    retries: Retries | None = None
    attempts: int = 0
    in_flight: bool = False
    unanswered: bool = False
    is_last: bool = False
    watch: StopObserver | None = None

    def describe(self, error: BctrlError) -> None:
        """Tell an error which stop it ends, and what the attempts before it may have done."""
        error.workspace_id = self.workspace_id
        error.alias = self.alias
        error.attempts = self.attempts
        if self.retries is not None:
            self.retries.account(error)

    def log_retry(self, delay: float) -> None:
        """Log why the last attempt failed, and that another one follows after a delay."""
        failed = None if self.retries is None else self.retries.last_failure
        if failed is not None and _log.isEnabledFor(logging.INFO):
            _log.info(
                "attempt %d to stop %r in workspace %r failed: %s; the next follows in %.3f s",
                self.attempts,
                self.alias,
                self.workspace_id,
                failed.summary,
                delay,
            )
