"""The delivery of outcomes: to a callback, and through a bounded buffer to those who iterate."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from bctrl_async._calls.call import as_failure, is_cancelled
from bctrl_async.outcomes import StopOutcome

OnOutcome = Callable[[StopOutcome], Awaitable[object] | object]

Deliver = Callable[[StopOutcome], Awaitable[None] | None]
"""Takes an outcome; returns an awaitable if its worker must wait before the next target."""

_Waiters = deque[asyncio.Future[None]]


class OutcomeBuffer:
    """A bounded buffer between the workers of a bulk stop and the readers of its outcomes.

    An `asyncio.Queue` would cost a coroutine for each outcome, also where there is nothing to wait
    for.

    Args:
        limit: The outcomes that may be unread before a worker waits.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._unread: deque[StopOutcome] = deque()
        self._readers: _Waiters = deque()
        self._writers: _Waiters = deque()
        self._ended = False

    def put(self, outcome: StopOutcome) -> asyncio.Future[None] | None:
        """Add an outcome; return a future for its worker to await if too many are unread."""
        self._unread.append(outcome)
        _wake_first(self._readers)
        if len(self._unread) <= self._limit:
            return None
        return _waiter(self._writers)

    async def get(self) -> StopOutcome | None:
        """Return the next outcome, waiting if necessary; None at the end."""
        while not self._unread:
            if self._ended:
                return None
            reader = _waiter(self._readers)
            try:
                await reader
            except asyncio.CancelledError:
                with suppress(ValueError):
                    self._readers.remove(reader)
                if self._unread:
                    # It was woken for an outcome, which is now for another reader.
                    _wake_first(self._readers)
                raise
        _wake_first(self._writers)
        return self._unread.popleft()

    def end(self) -> None:
        """Let the readers have the outcomes that are unread, and then None."""
        self._ended = True
        while self._readers:
            _wake_first(self._readers)

    def discard(self) -> None:
        """Discard the outcomes that are unread, and let the readers have None."""
        self._unread.clear()
        self.end()


def _waiter(waiters: _Waiters) -> asyncio.Future[None]:
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    return waiter


def _wake_first(waiters: _Waiters) -> None:
    while waiters:
        waiter = waiters.popleft()
        if not waiter.done():
            waiter.set_result(None)
            return


def to_callback(on_outcome: OnOutcome) -> Deliver:
    """Return the delivery to a callback, plain or async."""

    async def finish(returned: Awaitable[object]) -> None:
        try:
            await returned
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            raise as_failure(error, "on_outcome") from error

    def deliver(outcome: StopOutcome) -> Awaitable[None] | None:
        try:
            returned = on_outcome(outcome)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            raise as_failure(error, "on_outcome") from error
        # Nearly every callback returns None, which is found at a tenth of the cost.
        if returned is None or not inspect.isawaitable(returned):
            return None
        return finish(returned)

    return deliver


def in_turn(on_outcome: Deliver, buffer: OutcomeBuffer) -> Deliver:
    """Return the delivery to a callback and then, once it has ended, to a buffer."""

    async def put_after(called: Awaitable[None], outcome: StopOutcome) -> None:
        await called
        if (full := buffer.put(outcome)) is not None:
            await full

    def deliver(outcome: StopOutcome) -> Awaitable[None] | None:
        called = on_outcome(outcome)
        return buffer.put(outcome) if called is None else put_after(called, outcome)

    return deliver
