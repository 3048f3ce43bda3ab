"""The time limits of exchanges, with one timer of the event loop for most of them."""

from __future__ import annotations

import asyncio
import math
from typing import Protocol


class Expiring(Protocol):
    """An exchange with a time limit."""

    def time_out(self) -> None:
        """End the exchange: its time is over."""


class Deadlines:
    """The time limits of all exchanges of a session.

    A timer for each exchange would be a twentieth of the cost of a stop. Exchanges with the same
    limit expire in the order in which they begin, so a timer for the oldest is enough.

    Args:
        seconds: The usual time limit; exchanges with another one have their own timers.
        loop: The event loop.
    """

    def __init__(self, seconds: float | None, loop: asyncio.AbstractEventLoop) -> None:
        self._seconds = seconds
        self._loop = loop
        self._ends: dict[Expiring, float] = {}
        self._last = -math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._timers: dict[Expiring, asyncio.TimerHandle] = {}
        self._is_closed = False

    def add(self, exchange: Expiring, began: float, seconds: float) -> None:
        """Let an exchange time out, unless it is discarded before.

        Args:
            exchange: The exchange.
            began: The time of the loop from which its time limit counts.
            seconds: Its time limit.
        """
        ends = began + seconds
        # One that had to connect first is added after others that began later.
        if seconds != self._seconds or ends < self._last:
            self._timers[exchange] = self._loop.call_at(ends, self._time_out, exchange)
            return
        self._ends[exchange] = self._last = ends
        if self._timer is None:
            self._timer = self._loop.call_at(ends, self._time_out_oldest, ends)

    def discard(self, exchange: Expiring) -> None:
        """Remove an exchange."""
        if self._ends.pop(exchange, None) is None and (timer := self._timers.pop(exchange, None)):
            timer.cancel()
        if self._is_closed:
            self.close()

    def _time_out(self, exchange: Expiring) -> None:
        del self._timers[exchange]
        exchange.time_out()

    def _time_out_oldest(self, now: float) -> None:
        self._timer = None
        for exchange, ends in list(self._ends.items()):
            if ends > now:
                self._timer = self._loop.call_at(ends, self._time_out_oldest, ends)
                break
            del self._ends[exchange]
            exchange.time_out()

    def close(self) -> None:
        """Cancel the timer once no exchange is left.

        A body that is being read when its connection is closed ends only by its time limit.
        """
        self._is_closed = True
        if self._timer is not None and not self._ends:
            self._timer.cancel()
