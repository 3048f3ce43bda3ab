"""Verify outcomes: poll runtimes whose stop the server has not confirmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from bctrl_async import _quick_failures
from bctrl_async._calls.call import Call
from bctrl_async._calls.results import outcome_after_poll
from bctrl_async._calls.retry import probe_delay
from bctrl_async._kinds import Failure
from bctrl_async.bulk._parked import Stop
from bctrl_async.bulk._sender import BulkSender
from bctrl_async.bulk._state import Worker
from bctrl_async.models import Runtime
from bctrl_async.outcomes import StopOutcome

_MAX_POLLERS = 1000
"""The most runtimes that are polled beside the stops, to bound the memory."""


class Polls:
    """The polls of a run: each ends with an outcome that is recorded.

    `make_poll` makes a GET of a target, with a `policy`; `seconds` is how long a target
    is polled. `outcomes` has the outcomes so far of the stops whose targets are polled.
    """

    def __init__(
        self,
        sender: BulkSender,
        make_poll: Callable[..., Call[Runtime]],
        seconds: float,
    ) -> None:
        self._sender = sender
        self._seconds = seconds
        patience = min(sender.policy.max_throttle_wait, seconds)
        poll_policy = replace(sender.policy, attempts=1, patience=patience)
        self._make_poll = partial(make_poll, policy=poll_policy)
        self.outcomes: dict[Stop, StopOutcome] = {}

    @property
    def is_full(self) -> bool:
        """True if so many are polled that a worker is to poll its target itself."""
        return len(self.outcomes) > _MAX_POLLERS

    def needs(self, outcome: StopOutcome) -> bool:
        """Return True if the server may have taken the stop and the runtime may run."""
        if outcome.ok or not outcome.result.needs_poll:
            return False
        return self._seconds > 0 and self._sender.state.goes_on()

    async def poll(self, stop: Stop, worker: Worker) -> StopOutcome:
        """Poll a target until it is settled or time is up, and record its outcome."""
        loop = asyncio.get_running_loop()
        policy = self._sender.policy
        outcome = self.outcomes[stop]
        deadline = loop.time() + self._seconds
        polls = 0
        try:
            while self.needs(outcome):
                remaining = max(deadline - loop.time(), 0.0)
                # Each target is polled at least once.
                if polls and (not remaining or _quick_failures.is_enough(polls)):
                    break
                polls += 1
                poll = self._make_poll(*stop.target)
                delay = min(probe_delay(policy, polls), remaining)
                answer = await self._sender.send(
                    worker, poll, delay, deadline, stop.observer
                )
                outcome = outcome_after_poll(outcome, answer, poll)
                self.outcomes[stop] = outcome
                if isinstance(answer, Failure) and _would_fail_again(answer, poll):
                    break
        finally:
            outcome = self._record(stop)
        return outcome

    def on_end(self, stop: Stop, _: asyncio.Task[None]) -> None:
        """Record the outcome of a stop unless its ended poller has recorded it."""
        if stop in self.outcomes:
            self._record(stop)

    def _record(self, stop: Stop) -> StopOutcome:
        elapsed = time.monotonic() - stop.started
        outcome = replace(self.outcomes.pop(stop), elapsed=elapsed)
        return self._sender.ledger.record(outcome, stop.observer)


def _would_fail_again(failure: Failure, poll: Call[Runtime]) -> bool:
    """Return True if another poll would fail as well."""
    return _quick_failures.hangs(failure) or not poll.retries.may_succeed(failure)
