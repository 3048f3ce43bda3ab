"""The delivery of outcomes: to a callback, and through a bounded buffer to those who iterate."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable

from bctrl_async.outcomes import StopOutcome

OnOutcome = Callable[[StopOutcome], Awaitable[object] | object]

Deliver = Callable[[StopOutcome], Awaitable[object] | None]
"""Takes an outcome; returns an awaitable if its worker must wait before the next target."""


class OutcomeBuffer:
    """A queue of outcomes between the workers of a bulk stop and the readers of its outcomes.

    A worker waits while more than `limit` are unread. `Queue.put` would cost a coroutine for each
    outcome, also where there is nothing to wait for.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._unread: asyncio.Queue[StopOutcome | None] = asyncio.Queue()
        self._has_room = asyncio.Event()

    def put(self, outcome: StopOutcome) -> Awaitable[object] | None:
        """Add an outcome; return what its worker must await if too many are unread."""
        self._unread.put_nowait(outcome)
        if self._unread.qsize() <= self._limit:
            return None
        self._has_room.clear()
        return self._has_room.wait()

    async def get(self) -> StopOutcome | None:
        """Return the next outcome, waiting if necessary; None at the end."""
        outcome = await self._unread.get()
        if outcome is None:
            # All other readers must find it as well.
            self.end()
        elif self._unread.qsize() <= self._limit:
            self._has_room.set()
        return outcome

    def end(self) -> None:
        """Let the readers have the outcomes that are unread, and then None."""
        self._unread.put_nowait(None)

    def discard(self) -> None:
        """Discard the outcomes that are unread, and let the readers have None."""
        while not self._unread.empty():
            self._unread.get_nowait()
        self.end()


def to_callback(on_outcome: OnOutcome) -> Deliver:
    """Return the delivery to a callback, plain or async."""

    def deliver(outcome: StopOutcome) -> Awaitable[object] | None:
        returned = on_outcome(outcome)
        # Nearly every callback returns None, which is found at a tenth of the cost.
        return returned if returned is not None and inspect.isawaitable(returned) else None

    return deliver


def in_turn(on_outcome: Deliver, buffer: OutcomeBuffer) -> Deliver:
    """Return the delivery to a callback and then, once it has ended, to a buffer."""

    async def put_after(called: Awaitable[object], outcome: StopOutcome) -> None:
        await called
        if (full := buffer.put(outcome)) is not None:
            await full

    def deliver(outcome: StopOutcome) -> Awaitable[object] | None:
        called = on_outcome(outcome)
        return buffer.put(outcome) if called is None else put_after(called, outcome)

    return deliver
