"""The delivery of outcomes beside a run: one after the other, as their reader takes them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from bctrl_async.bulk._cancel import CancelScope
from bctrl_async.bulk._delivery import Deliver
from bctrl_async.outcomes import StopOutcome

_LIMIT = 1_000
"""Undelivered outcomes beyond which no further targets are handed out."""
_AT_ONCE = 100
"""Outcomes that are delivered before the event loop runs."""


class Deliveries:
    """The outcomes that wait to be delivered.

    Args:
        deliver: Called with each outcome.
        has_room: Called when there are few undelivered outcomes again.
    """

    def __init__(self, deliver: Deliver, has_room: Callable[[], None]) -> None:
        self._deliver = deliver
        self._has_room = has_room
        self._waiting: deque[StopOutcome] = deque()
        self._wake = asyncio.Event()
        self._scope = CancelScope()
        self._ended = False

    @property
    def is_full(self) -> bool:
        """True if so many outcomes are undelivered that no further targets are to be handed out."""
        return len(self._waiting) >= _LIMIT

    def put(self, outcome: StopOutcome) -> None:
        """Add an outcome."""
        self._waiting.append(outcome)
        self._wake.set()

    def end(self) -> None:
        """Let `run` return once all outcomes are delivered."""
        self._ended = True
        self._wake.set()

    def discard(self) -> None:
        """Deliver nothing more, and let `run` return."""
        self._waiting.clear()
        self.end()
        self._scope.cancel()

    async def run(self) -> None:
        """Deliver the outcomes.

        Raises:
            BaseException: The error of `deliver`.
        """
        while self._waiting or not self._ended:
            with self._scope:
                await self._wake.wait()
            self._wake.clear()
            count = 0
            while self._waiting:
                was_full = self.is_full
                waits = self._deliver(self._waiting.popleft())
                if waits is not None:
                    with self._scope:
                        await waits
                count += 1
                if count % _AT_ONCE == 0:
                    await asyncio.sleep(0)
                if was_full and not self.is_full:
                    self._has_room()
