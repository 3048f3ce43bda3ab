"""One stop on its way: what is to be sent, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from aiohttp import ClientTimeout

from bctrl_async._retry import Retries, RetryPolicy
from bctrl_async.errors import BctrlError


class Call(msgspec.Struct):
    """One stop on its way.

    Args:
        workspace_id: For the errors.
        alias: For the errors.
        path: The encoded path of the request.
        headers: Those of this call alone.
        limit: What one attempt may take.
        policy: When and how often to try again.
        retries: What was spent of the policy; None as long as nothing failed.
        attempts: How many requests were begun.
    """

    workspace_id: str
    alias: str
    path: str
    headers: Mapping[str, str]
    limit: ClientTimeout
    policy: RetryPolicy
    retries: Retries | None = None
    attempts: int = 0

    def describe(self, error: BctrlError) -> None:
        """Tell an error which stop it ends, and what the attempts before it may have done."""
        error.workspace_id = self.workspace_id
        error.alias = self.alias
        error.attempts = self.attempts
        if self.retries is not None:
            self.retries.account(error)
