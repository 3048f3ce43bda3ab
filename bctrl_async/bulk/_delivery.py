"""The delivery of outcomes: to a callback, and through a bounded buffer to readers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from bctrl_async.outcomes import StopOutcome

OnOutcome = Callable[[StopOutcome], Awaitable[object] | object]
"""Takes an outcome; may return an awaitable, which the worker awaits before its next target."""


class OutcomeBuffer:
    """A queue of outcomes between the workers of a bulk stop and the readers of its outcomes.

    A worker waits while more than `limit` are unread. An `asyncio.Queue` would cost a coroutine for
    each outcome, even if there is nothing to wait for.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._unread: deque[StopOutcome] = deque()
        self._has_outcome, self._has_room = asyncio.Event(), asyncio.Event()
        self._has_ended = False

    def put(self, outcome: StopOutcome) -> Awaitable[object] | None:
        """Add an outcome; return what its worker must await if too many are unread."""
        self._unread.append(outcome)
        self._has_outcome.set()
        if len(self._unread) <= self._limit:
            return None
        self._has_room.clear()
        return self._has_room.wait()

    async def get(self) -> StopOutcome | None:
        """Return the next outcome, waiting if necessary; None at the end."""
        while not self._unread:
            if self._has_ended:
                return None
            self._has_outcome.clear()
            await self._has_outcome.wait()
        outcome = self._unread.popleft()
        if len(self._unread) <= self._limit:
            self._has_room.set()
        return outcome

    def end(self) -> None:
        """Give readers the unread outcomes, and then None."""
        self._has_ended = True
        self._has_outcome.set()

    def discard(self) -> None:
        """Discard the unread outcomes, and give readers None."""
        self._unread.clear()
        self.end()
