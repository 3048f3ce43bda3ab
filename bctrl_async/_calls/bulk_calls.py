"""The calls that a bulk stop makes, each with its policy, time limit and priority."""

from __future__ import annotations

from typing import Protocol, TypeVar

from aiohttp import ClientTimeout
from msgspec.structs import replace

from bctrl_async._calls.call import Call
from bctrl_async._calls.retry import RetryPolicy
from bctrl_async._http.lists import RuntimeList
from bctrl_async._http.request import GET, LIST, STOP, Operation
from bctrl_async._http.transport import at_most
from bctrl_async._limiter.queues import Priority
from bctrl_async.models import Runtime, RuntimeRef

_MIN_POLL_LIMIT = 5.0
"""The least time limit of a poll in seconds, however short `verify` is."""
_MAX_LIST_LIMIT = 15.0
"""The most seconds for a list: no runtime of its workspace is got meanwhile."""

_T = TypeVar("_T")
BulkAnswer = TypeVar("BulkAnswer", Runtime, RuntimeList)
BulkCall = Call[Runtime] | Call[RuntimeList]


class MakeCall(Protocol):
    """Makes a call of an operation; raises BctrlConfigError if a name is invalid."""

    def __call__(
        self,
        operation: Operation[_T],
        limit: ClientTimeout,
        workspace_id: str,
        alias: str | None,
        *,
        policy: RetryPolicy,
        priority: Priority,
    ) -> Call[_T]: ...


class BulkCalls:
    """Makes the calls of a bulk stop.

    `policy` is for stops, and `limit` for all but polls. A poll takes no longer than a
    runtime is polled, `verify_seconds`; a list in place of polls takes half of it, so
    that each runtime can be got after it.
    """

    def __init__(
        self,
        make_call: MakeCall,
        policy: RetryPolicy,
        limit: ClientTimeout,
        verify_seconds: float,
    ) -> None:
        self._make_call = make_call
        self.policy: RetryPolicy = policy
        self._poll_policy = replace(policy, attempts=1)
        self._canary_policy = replace(policy, attempts=1, statuses=frozenset())
        self._limit = limit
        self._poll_limit = at_most(limit, max(verify_seconds, _MIN_POLL_LIMIT))
        list_limit = max(verify_seconds / 2, _MIN_POLL_LIMIT)
        self._list_limit = at_most(limit, min(list_limit, _MAX_LIST_LIMIT))

    def stop(self, target: RuntimeRef) -> Call[Runtime]:
        """Make the stop of a target."""
        return self._make_call(
            STOP, self._limit, *target, policy=self.policy, priority=Priority.BULK
        )

    def canary(self, target: RuntimeRef) -> Call[Runtime]:
        """Make a canary: a GET that goes first, and shows if the server answers."""
        return self._make_call(
            GET,
            self._limit,
            *target,
            policy=self._canary_policy,
            priority=Priority.CANARY,
        )

    def poll(self, target: RuntimeRef) -> Call[Runtime]:
        """Make a poll of a runtime."""
        return self._make_call(
            GET,
            self._poll_limit,
            *target,
            policy=self._poll_policy,
            priority=Priority.POLL,
        )

    def last_list(self, workspace_id: str) -> Call[RuntimeList]:
        """Make the last list of a workspace, which is retried as a stop is."""
        return self._make_call(
            LIST,
            self._limit,
            workspace_id,
            None,
            policy=self.policy,
            priority=Priority.POLL,
        )

    def list_of(self, workspace_id: str) -> Call[RuntimeList]:
        """Make a list of a workspace, which is a poll of all its runtimes."""
        return self._make_call(
            LIST,
            self._list_limit,
            workspace_id,
            None,
            policy=self._poll_policy,
            priority=Priority.POLL,
        )
