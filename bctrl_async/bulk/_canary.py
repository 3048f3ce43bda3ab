"""The canary of a bulk stop: a GET that shows whether the server answers, and stops nothing."""

from __future__ import annotations

from typing import Protocol

import msgspec

from bctrl_async._calls.call import Call
from bctrl_async._calls.observing import observe_read
from bctrl_async._calls.retry import RetryPolicy
from bctrl_async._calls.sender import Sender
from bctrl_async._limiter.limiter import Priority
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.errors import BctrlError, is_unanswered
from bctrl_async.models import Runtime, RuntimeRef


class MakeRead(Protocol):
    """Makes a GET of a target."""

    def __call__(
        self, target: RuntimeRef, *, policy: RetryPolicy, priority: Priority
    ) -> Call[Runtime]:
        """Return the call, whose first attempt has this priority."""


class Canary:
    """Sends canaries, each a single attempt that precedes all new calls.

    Args:
        sender: Sends them.
        make_read: Makes them.
        policy: The policy of the run, of which only the patience counts.
        ledger: Has the observer that is notified of each.
    """

    def __init__(
        self, sender: Sender, make_read: MakeRead, policy: RetryPolicy, ledger: Ledger
    ) -> None:
        self._sender = sender
        self._make_read = make_read
        self._policy = msgspec.structs.replace(policy, attempts=1)
        self._ledger = ledger

    async def is_answered(self, target: RuntimeRef) -> bool:
        """Send a GET of a target once; return True if the server answers it."""
        call = self._make_read(target, policy=self._policy, priority=Priority.RETRY)
        call.wait_to_retry = _give_up
        try:
            with observe_read(
                self._ledger.begin_read, target.workspace_id, target.alias
            ) as call.observer:
                await self._sender.request(call)
        except BctrlError as error:
            return not is_unanswered(error)
        return True


async def _give_up(_: Call[Runtime]) -> bool:
    return False
