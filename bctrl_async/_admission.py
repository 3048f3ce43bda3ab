"""The one gate that every attempt passes, whoever makes it."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from bctrl_async.errors import session_closed


class Gate:
    """A bound on attempts in flight: first come, first served.

    `asyncio.Semaphore` cannot be closed under those who wait for it, and a session must be.

    Args:
        limit: How many may be inside at once.
    """

    __slots__ = ("_closing", "_free", "_waiting")

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closing = asyncio.Event()

    def enter_nowait(self) -> bool:
        """Enter if there is room and nobody waits; tell whether it was so."""
        # Nobody waits while a place is free: `leave` hands its place to the next in line.
        if self._free and not self._closing.is_set():
            self._free -= 1
            return True
        return False

    async def enter(self) -> None:
        """Wait for a place.

        Raises:
            BctrlConfigError: The gate was closed.
        """
        if self._closing.is_set():
            raise session_closed()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            # Cancelled after its turn had come: the place goes to the next.
            if waiter.done() and not waiter.cancelled():
                self.leave()
            raise
        if self._closing.is_set():
            raise session_closed()

    def leave(self) -> None:
        """Give the place to the next in line."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._free += 1

    async def pause(self, delay: float) -> None:
        """Wait outside for this many seconds, or until the gate is closed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._closing.wait()

    def close(self) -> None:
        """Send away all who wait, and all who come."""
        self._closing.set()
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
