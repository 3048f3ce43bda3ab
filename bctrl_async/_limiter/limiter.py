"""The one gate that every attempt passes, whoever makes it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from enum import IntEnum

from bctrl_async._limiter.rate import Throttle
from bctrl_async.errors import (
    THROTTLED,
    BctrlError,
    BctrlRateLimitError,
    is_unanswered,
    session_closed,
)

_log = logging.getLogger("bctrl_async")


class Line(IntEnum):
    """Where somebody waits; each line is let in only when those before it are empty."""

    RETURNING = 0
    """Calls that were inside before."""
    NEW = 1
    POLLING = 2
    """Calls that only look how a stop has gone on, for which there is time."""


class Gate:
    """A bound on attempts in flight and on how fast they start: first come, first served.

    An attempt that was refused keeps its call's place in line: who returns goes before who is new.
    `asyncio.Semaphore` can neither be paced nor be closed under those who wait for it.

    Args:
        limit: How many may be inside at once.
        throttle: How fast they may enter.

    Attributes:
        limit: As given.
        answers: How many attempts the server itself has answered.
    """

    __slots__ = (
        "_closed",
        "_free",
        "_least_patience",
        "_lines",
        "_pausing",
        "_throttle",
        "_throttled_since",
        "_timer",
        "answers",
        "limit",
    )

    def __init__(self, limit: int, throttle: Throttle) -> None:
        self.limit: int = limit
        self.answers: int = 0
        self._free = limit
        self._throttle = throttle
        self._lines: list[deque[asyncio.Future[bool]]] = [deque() for _ in Line]
        self._least_patience = math.inf
        self._throttled_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._pausing: set[asyncio.Future[bool]] = set()

    def is_closed(self) -> bool:
        """Whether nobody may enter any more."""
        return self._closed

    @property
    def inside(self) -> int:
        """How many are inside."""
        return self.limit - self._free

    @property
    def waiting(self) -> int:
        """How many wait for a place or, outside, for their next attempt."""
        in_line = sum(not turn.done() for line in self._lines for turn in line)
        return in_line + len(self._pausing)

    @property
    def is_throttled(self) -> bool:
        """Whether the server's refusals hold attempts back."""
        return self._throttle.has_learned

    def enter_nowait(self) -> bool:
        """Enter if there is room and nobody waits; tell whether it was so."""
        if not self._free or self._closed or any(self._lines):
            return False
        if not self._throttle.idle:
            now = asyncio.get_running_loop().time()
            if self._throttle.wait(now, self.inside) > 0.0:
                return False
            self._take(now)
        self._free -= 1
        return True

    async def enter(self, patience: float, line: Line = Line.NEW) -> None:
        """Wait for a place.

        Args:
            patience: Seconds that the server may have asked everybody to stay away.
            line: Where it waits.

        Raises:
            BctrlConfigError: The gate was closed.
            BctrlRateLimitError: The server asked to stay away for longer than the patience.
        """
        loop = asyncio.get_running_loop()
        while True:
            if self.is_closed():
                raise session_closed()
            away = self._throttle.closed_until - loop.time()
            if away > patience:
                raise BctrlRateLimitError(
                    f"not sent: the server asked all to stay away for another {away:.0f} s",
                    retry_after=away,
                )
            self._least_patience = min(self._least_patience, patience)
            turn: asyncio.Future[bool] = loop.create_future()
            self._lines[line].append(turn)
            self._admit(loop)
            try:
                its_turn = await turn
            except asyncio.CancelledError:
                # Cancelled after its turn had come: the place goes to the next.
                if turn.done() and not turn.cancelled() and turn.result():
                    self.leave(None)
                raise
            if its_turn and not self.is_closed():
                return
            if its_turn:
                self.leave(None)

    def leave(self, answer: object) -> None:
        """Give the place to the next in line.

        Args:
            answer: What the server answered: a `BctrlError` with a status if it was an error, None
                if there was no answer.
        """
        loop = asyncio.get_running_loop()
        if answer is not None:
            self._learn(answer, loop.time())
        self._free += 1
        if any(self._lines):
            self._admit(loop)

    def _learn(self, answer: object, now: float) -> None:
        if isinstance(answer, BctrlError):
            if answer.status is None:
                return
            self.answers += not is_unanswered(answer)
            if answer.status in THROTTLED:
                self._throttle.refused(now, answer.retry_after, self.inside)
                if self._throttle.has_learned and self._throttled_since is None:
                    self._throttled_since = now
                    _log.warning(
                        "the server throttles (status %d): all stops of the session slow down, "
                        "and none starts within %.3f s",
                        answer.status,
                        self._throttle.closed_until - now,
                    )
                if self._throttle.closed_until - now > self._least_patience:
                    self._let_all_reconsider()
                return
        else:
            self.answers += 1
        self._throttle.accepted(now)

    def _take(self, now: float) -> None:
        self._throttle.take(now)
        if self._throttled_since is not None and not self._throttle.has_learned:
            _log.warning(
                "the server throttles no more, after %.3f s: stops start at any rate",
                now - self._throttled_since,
            )
            self._throttled_since = None

    def _let_all_reconsider(self) -> None:
        """Wake all who wait: those whose patience is too short leave, the rest stand in line."""
        self._least_patience = math.inf
        for line in self._lines:
            waiting = list(line)
            line.clear()
            for turn in waiting:
                _wake(turn)

    def _admit(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let in whoever may enter now, and come back when the next one may."""
        while self._free and (line := next(filter(None, self._lines), None)):
            if line[0].done():  # It was cancelled while it waited.
                line.popleft()
                continue
            if not self._throttle.idle:
                now = loop.time()
                wait = self._throttle.wait(now, self.inside)
                if wait > 0.0:
                    self._come_back(loop, now + wait)
                    return
                self._take(now)
            self._free -= 1
            line.popleft().set_result(True)
        if not any(self._lines):
            self._least_patience = math.inf

    def _come_back(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        # If it depends on those inside, `leave` comes back.
        if when < math.inf and self._timer is None:
            self._timer = loop.call_at(when, self._on_time, loop)

    def _on_time(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._admit(loop)

    async def pause(self, delay: float) -> None:
        """Wait outside for this many seconds, or until the gate is closed."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        over: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_later(delay, _wake, over)
        self._pausing.add(over)
        try:
            await over
        finally:
            timer.cancel()
            self._pausing.discard(over)

    def close(self) -> None:
        """Send away all who wait, and all who come."""
        self._closed = True
        self._let_all_reconsider()
        for over in self._pausing:
            _wake(over)
        if self._timer is not None:
            self._timer.cancel()


def _wake(waiter: asyncio.Future[bool]) -> None:
    """End a wait without giving it a turn."""
    if not waiter.done():
        waiter.set_result(False)
