"""The one limiter that every attempt passes, whoever makes it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from enum import IntEnum

from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async.errors import (
    THROTTLED,
    BctrlError,
    BctrlRateLimitError,
    is_unanswered,
    session_closed,
)

_log = logging.getLogger("bctrl_async")


class Priority(IntEnum):
    """Where somebody waits; each line is let in only when those before it are empty."""

    RETRY = 0
    """Calls that were inside before."""
    NEW = 1
    POLL = 2
    """Calls that only look how a stop has gone on, for which there is time."""


class Limiter:
    """A bound on attempts in flight and on how fast they start: first come, first served.

    An attempt that was refused keeps its call's place in line: who returns goes before who is new.
    `asyncio.Semaphore` can neither be paced nor be closed under those who wait for it.

    Args:
        limit: How many may be inside at once.
        rate: How fast they may enter.

    Attributes:
        limit: As given.
        answers: How many attempts the server itself has answered.
    """

    __slots__ = (
        "_closed",
        "_free",
        "_queues",
        "_rate",
        "_shortest_max_wait",
        "_sleeping",
        "_throttled_since",
        "_timer",
        "answers",
        "limit",
    )

    def __init__(self, limit: int, rate: AdaptiveRate) -> None:
        self.limit: int = limit
        self.answers: int = 0
        self._free = limit
        self._rate = rate
        self._queues: list[deque[asyncio.Future[bool]]] = [deque() for _ in Priority]
        self._shortest_max_wait = math.inf
        self._throttled_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._sleeping: set[asyncio.Future[bool]] = set()

    def is_closed(self) -> bool:
        """Whether nobody may enter any more."""
        return self._closed

    @property
    def in_use(self) -> int:
        """How many are inside."""
        return self.limit - self._free

    @property
    def tasks_waiting(self) -> int:
        """How many wait for a place or, outside, for their next attempt."""
        in_line = sum(not waiter.done() for queue in self._queues for waiter in queue)
        return in_line + len(self._sleeping)

    @property
    def is_throttled(self) -> bool:
        """Whether the server's refusals hold attempts back."""
        return self._rate.is_throttled

    def acquire_nowait(self) -> bool:
        """Enter if there is room and nobody waits; tell whether it was so."""
        if not self._free or self._closed or any(self._queues):
            return False
        if not self._rate.unlimited:
            now = asyncio.get_running_loop().time()
            if self._rate.wait(now, self.in_use) > 0.0:
                return False
            self._start(now)
        self._free -= 1
        return True

    async def acquire(self, max_wait: float, priority: Priority = Priority.NEW) -> None:
        """Wait for a place.

        Args:
            max_wait: Seconds that the server may have asked everybody to stay away.
            priority: Where it waits.

        Raises:
            BctrlConfigError: The limiter was closed.
            BctrlRateLimitError: The server asked to stay away for longer than the patience.
        """
        loop = asyncio.get_running_loop()
        while True:
            if self.is_closed():
                raise session_closed()
            away = self._rate.closed_until - loop.time()
            if away > max_wait:
                raise BctrlRateLimitError(
                    f"not sent: the server asked all to stay away for another {away:.0f} s",
                    retry_after=away,
                )
            self._shortest_max_wait = min(self._shortest_max_wait, max_wait)
            waiter: asyncio.Future[bool] = loop.create_future()
            self._queues[priority].append(waiter)
            self._admit(loop)
            try:
                admitted = await waiter
            except asyncio.CancelledError:
                # Cancelled after its turn had come: the place goes to the next.
                if waiter.done() and not waiter.cancelled() and waiter.result():
                    self.release(None)
                raise
            if admitted and not self.is_closed():
                return
            if admitted:
                self.release(None)

    def release(self, answer: object) -> None:
        """Give the place to the next in queue.

        Args:
            answer: What the server answered: a `BctrlError` with a status if it was an error, None
                if there was no answer.
        """
        loop = asyncio.get_running_loop()
        if answer is not None:
            self._record(answer, loop.time())
        self._free += 1
        if any(self._queues):
            self._admit(loop)

    def _record(self, answer: object, now: float) -> None:
        if isinstance(answer, BctrlError):
            if answer.status is None:
                return
            self.answers += not is_unanswered(answer)
            if answer.status in THROTTLED:
                self._rate.on_throttled(now, answer.retry_after, self.in_use)
                if self._rate.is_throttled and self._throttled_since is None:
                    self._throttled_since = now
                    _log.warning(
                        "the server throttles (status %d): all stops of the session slow down, "
                        "and none starts within %.3f s",
                        answer.status,
                        self._rate.closed_until - now,
                    )
                if self._rate.closed_until - now > self._shortest_max_wait:
                    self._wake_all()
                return
        else:
            self.answers += 1
        self._rate.on_success(now)

    def _start(self, now: float) -> None:
        self._rate.on_start(now)
        if self._throttled_since is not None and not self._rate.is_throttled:
            _log.warning(
                "the server throttles no more, after %.3f s: stops start at any rate",
                now - self._throttled_since,
            )
            self._throttled_since = None

    def _wake_all(self) -> None:
        """Wake all who wait: those whose patience is too short leave, the rest stand in queue."""
        self._shortest_max_wait = math.inf
        for queue in self._queues:
            waiting = list(queue)
            queue.clear()
            for waiter in waiting:
                _wake(waiter)

    def _admit(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let in whoever may enter now, and come back when the next one may."""
        while self._free and (queue := next(filter(None, self._queues), None)):
            if queue[0].done():  # It was cancelled while it waited.
                queue.popleft()
                continue
            if not self._rate.unlimited:
                now = loop.time()
                wait = self._rate.wait(now, self.in_use)
                if wait > 0.0:
                    self._schedule_wakeup(loop, now + wait)
                    return
                self._start(now)
            self._free -= 1
            queue.popleft().set_result(True)
        if not any(self._queues):
            self._shortest_max_wait = math.inf

    def _schedule_wakeup(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        # If it depends on those inside, `leave` comes back.
        if when < math.inf and self._timer is None:
            self._timer = loop.call_at(when, self._on_timer, loop)

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._admit(loop)

    async def sleep(self, delay: float) -> None:
        """Wait outside for this many seconds, or until the limiter is closed."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_later(delay, _wake, waiter)
        self._sleeping.add(waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._sleeping.discard(waiter)

    def close(self) -> None:
        """Send away all who wait, and all who come."""
        self._closed = True
        self._wake_all()
        for waiter in self._sleeping:
            _wake(waiter)
        if self._timer is not None:
            self._timer.cancel()


def _wake(waiter: asyncio.Future[bool]) -> None:
    """End a wait without giving it a waiter."""
    if not waiter.done():
        waiter.set_result(False)
