"""The limiter that every attempt of a session passes."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from dataclasses import replace
from enum import IntEnum

from bctrl_async import _quick
from bctrl_async._limiter.rate import PROBE_INTERVAL, AdaptiveRate
from bctrl_async.errors import (
    THROTTLED,
    BctrlError,
    BctrlRateLimitError,
    format_duration,
    is_unanswered,
    session_closed,
)
from bctrl_async.pace import Pace
from bctrl_async.pace._leases import Leases

_log = logging.getLogger("bctrl_async")

_TIMER_TOLERANCE = 0.01
"""Seconds by which a wakeup may be late before its timer is replaced."""
_MAX_PASSED = 4
"""Attempts of single calls that are admitted in a row while a bulk stop waits."""


class Priority(IntEnum):
    """Priority of a waiter. Lower values are admitted first."""

    RETRY = 0
    """A call that has made an attempt before."""
    SINGLE = 1
    """A single call; it comes before a bulk stop, because somebody waits for it."""
    BULK = 2
    """A target of a bulk stop; it gets every fifth slot if single calls would use them all."""
    POLL = 3
    """A poll; it comes last, because runtimes that are still to be stopped cost money."""


class Limiter:
    """A bound on attempts in flight and their rate, first come, first served in each priority.

    `asyncio.Semaphore` has neither a rate nor `close`.
    """

    def __init__(self, limit: int, rate: AdaptiveRate, pace: Pace | None = None) -> None:
        self.limit: int = limit
        self._free = limit
        self._rate = rate
        self._leases: Leases | None = None
        if pace is not None:
            self._leases = Leases(pace, lambda: self._queued, self._admit, self.close)
            # The pace bounds the first attempts too; a slower start would waste leased slots.
            rate.is_starting = False
        self._passed = 0
        self._queues: list[deque[asyncio.Future[bool]]] = [deque() for _ in Priority]
        self._queued = 0
        self._shortest_max_wait = self._shortest_patience = self._first_patience_end = math.inf
        self._throttled_since: float | None = None
        self._timer: asyncio.Handle | None = None
        self._wakeup_at = math.inf
        self._end: BctrlError | None = None
        self._sleepers: set[asyncio.Future[bool]] = set()

    def is_closed(self) -> bool:
        """Return True if the limiter is closed."""
        return self._end is not None

    @property
    def in_use(self) -> int:
        """The number of slots in use."""
        return self.limit - self._free

    @property
    def tasks_waiting(self) -> int:
        """The number of tasks that wait for a slot or sleep between attempts."""
        queued = sum(not waiter.done() for queue in self._queues for waiter in queue)
        return queued + len(self._sleepers)

    @property
    def is_throttled(self) -> bool:
        """True while throttling by the server limits the rate."""
        return self._rate.is_throttled

    def answers_others(self, since: float) -> bool:
        """Return True if other calls were answered since a time, and hardly any is throttled."""
        return self._rate.answers_others(since)

    @property
    def retry_after(self) -> float:
        """The seconds for which the server asked to wait; 0 if it did not, or outside a loop."""
        try:
            now = asyncio.get_running_loop().time()
        except RuntimeError:
            return 0.0
        return max(self._rate.retry_after_ends - now, 0.0)

    def acquire_nowait(self) -> bool:
        """Acquire a slot without waiting; return False if that is not possible."""
        if not self._free or self._end is not None or self._queued:
            return False
        if self._leases is not None or not self._rate.is_unlimited:
            now = asyncio.get_running_loop().time()
            if self._delay(now) > 0.0:
                return False
            self._on_start(now)
        self._free -= 1
        return True

    async def acquire(
        self,
        max_wait: float,
        priority: Priority = Priority.SINGLE,
        patience_ends: float = math.inf,
    ) -> None:
        """Acquire a slot, waiting if necessary.

        Raises:
            BctrlConfigError: The limiter is closed, now or while waiting.
            BctrlRateLimitError: A Retry-After is longer than `max_wait` seconds or the patience,
                with no probe due or in flight; or the server throttles everything for that long.
        """
        loop = asyncio.get_running_loop()
        # A call without patience still waits for its first attempt.
        ends = min(patience_ends, loop.time() + (max_wait or math.inf))
        while True:
            if self._end is not None:
                raise replace(self._end)
            now = loop.time()
            if self._waits_in_vain(now, max_wait, patience_ends):
                raise self._rate_limited(now)
            self._shortest_max_wait = min(self._shortest_max_wait, max_wait)
            self._first_patience_end = min(self._first_patience_end, patience_ends)
            self._shortest_patience = min(self._shortest_patience, max_wait or math.inf)
            waiter: asyncio.Future[bool] = loop.create_future()
            self._queues[priority].append(waiter)
            self._queued += 1
            self._admit()
            try:
                admitted = await waiter
            except asyncio.CancelledError:
                # The call was admitted before it was cancelled, so it has a slot to release.
                if waiter.done() and not waiter.cancelled() and waiter.result():
                    self.release(None)
                raise
            if admitted and not self.is_closed():
                return
            if admitted:
                self.release(None)
            elif loop.time() >= ends and self._throttles_for(max_wait, loop.time()):
                raise BctrlRateLimitError(
                    f"the server throttled everything for {format_duration(max_wait)}"
                )

    def _throttles_for(self, seconds: float, now: float) -> bool:
        """Return True if the server has throttled everything for this many seconds."""
        return now - self._rate.refused_since >= seconds

    def _waits_in_vain(self, now: float, max_wait: float, patience_ends: float) -> bool:
        """Return True if the pause lasts too long, and no probe is due or in flight.

        The end of a probe looks like the end of an older attempt. So an unanswered probe counts as
        in flight until no attempt is, or until the next probe is due.
        """
        wait = self._rate.retry_after_ends - now
        return (
            wait > min(max_wait, max(patience_ends - now, 0.0))
            and self._rate.delay(now, self.in_use) > 0.0
            and not (self._rate.is_probed and self.in_use)
        )

    def _rate_limited(self, now: float) -> BctrlRateLimitError:
        wait, delay = self._rate.retry_after_ends - now, self._rate.delay(now, self.in_use)
        advice = f"Probes are sent once a minute; retry in {delay:.0f} s"
        return BctrlRateLimitError(
            f"not sent: rate limited for another {wait:.0f} s (Retry-After)",
            advice=advice if wait > PROBE_INTERVAL else None,
            retry_after=wait,
        )

    def release(self, answer: object, last: float = math.inf) -> bool:
        """Release a slot after an attempt; `answer` is its response or `BctrlError`, if any.

        `last` is the time of the call's last throttled response; inf if it has none. Return True
        if a gateway answered 503 again while other calls are answered.
        """
        is_its_own = False
        if isinstance(answer, BctrlError):
            is_its_own = self._on_error(answer, last)
        elif answer is not None:
            self._rate.on_success(asyncio.get_running_loop().time(), last)
        self._free += 1
        if self._queued:
            self._admit()
        return is_its_own

    def _on_error(self, error: BctrlError, last: float) -> bool:
        now, by_gateway = asyncio.get_running_loop().time(), is_unanswered(error)
        if error.status not in THROTTLED:
            if error.status is not None and not by_gateway:
                self._rate.on_success(now, last)
            return False
        is_its_own = by_gateway and self._rate.throttles_alone(last)
        if _quick.is_on:
            # The rate learns nothing from the answer: its limits would make calls wait.
            self._rate.is_starting = False
            return is_its_own
        # A gateway's 503 may be about a dead target: its Retry-After counts if all are throttled.
        holds_all = not by_gateway or (self._rate.is_throttled and not is_its_own)
        retry_after = error.retry_after if holds_all else None
        self._rate.on_throttled(now, retry_after, self.in_use, last)
        if self._throttles_for(self._shortest_patience, now):
            self._wake_all()
        if self._rate.is_throttled and self._throttled_since is None:
            self._throttled_since = now
            delay = self._rate.delay(now, 0)
            _log.info(
                "throttled by the server (status %d): all calls of the session slow down, and "
                "the next attempt starts in %.3f s",
                error.status,
                delay,
                extra={
                    "bctrl.event": "throttled",
                    "http.response.status_code": error.status,
                    "bctrl.delay": delay,
                },
            )
        return is_its_own

    def _delay(self, now: float) -> float:
        """Return the seconds until the next attempt may start; inf if the time is not known."""
        delay = 0.0 if self._rate.is_unlimited else self._rate.delay(now, self.in_use)
        if delay <= 0.0 and self._leases is not None:
            # The leases come last: while the rate allows no attempt, a new lease would be lost.
            delay = self._leases.delay(now)
        return delay

    def _on_start(self, now: float) -> None:
        if not self._rate.is_unlimited:
            self._rate.on_start(now)
        if self._leases is not None:
            self._leases.on_start(now)
        if self._throttled_since is not None and not self._rate.is_throttled:
            elapsed = now - self._throttled_since
            _log.info(
                "no longer throttled by the server, after %.3f s: calls start at full speed",
                elapsed,
                extra={"bctrl.event": "throttling_ended", "bctrl.elapsed": elapsed},
            )
            self._throttled_since = None

    def _wake_all(self) -> None:
        """Wake all waiters; each gives up or queues again."""
        self._shortest_max_wait = self._shortest_patience = self._first_patience_end = math.inf
        self._queued = 0
        for queue in self._queues:
            for waiter in queue:
                _wake(waiter)
            queue.clear()

    def _admit(self, due: float = -math.inf) -> None:
        """Admit all waiters that may start now; schedule a wakeup for the next.

        `due` is the time of a wakeup. uvloop rounds it to milliseconds, so it may come early, and
        waiting for the rest would keep the loop busy.
        """
        while self._free and (queue := self._next_queue()):
            if queue[0].done():  # The waiter was cancelled.
                queue.popleft()
                self._queued -= 1
                continue
            if self._leases is not None or not self._rate.is_unlimited:
                now = max(asyncio.get_running_loop().time(), due)
                delay = self._delay(now)
                if delay > 0.0:
                    if self._waits_in_vain(now, self._shortest_max_wait, self._first_patience_end):
                        self._wake_all()
                    else:
                        self._schedule_wakeup(now + delay)
                    return
                self._on_start(now)
            self._free -= 1
            self._queued -= 1
            queue.popleft().set_result(True)
            if queue is self._queues[Priority.SINGLE]:
                self._passed += bool(self._queues[Priority.BULK])
            elif queue is self._queues[Priority.BULK]:
                self._passed = 0
        if not self._queued:
            self._shortest_max_wait = self._shortest_patience = self._first_patience_end = math.inf

    def _next_queue(self) -> deque[asyncio.Future[bool]] | None:
        """Return the queue of the next waiter, or None if there is none."""
        bulk = self._queues[Priority.BULK]
        if self._passed >= _MAX_PASSED and bulk and not self._queues[Priority.RETRY]:
            return bulk
        return next(filter(None, self._queues), None)

    def _schedule_wakeup(self, when: float) -> None:
        # While the window is full, no time is known: `release` admits the next waiter.
        if when >= self._wakeup_at - _TIMER_TOLERANCE:
            return
        if self._timer is not None:
            self._timer.cancel()  # A pause has ended before its time.
        self._wakeup_at = when
        self._timer = asyncio.get_running_loop().call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        due = self._wakeup_at
        self._wakeup_at = math.inf
        self._admit(due)

    async def sleep(self, delay: float) -> None:
        """Sleep without a slot for this many seconds, or until the limiter is closed."""
        if self._end is not None:
            return
        if _quick.is_on:
            delay = 0.0
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_later(delay, _wake, waiter)
        self._sleepers.add(waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._sleepers.discard(waiter)

    def close(self, error: BctrlError | None = None) -> None:
        """Close the limiter. Current and future waiters fail, by default as on a closed session."""
        self._end = session_closed() if error is None else replace(error)
        self._wake_all()
        for waiter in self._sleepers:
            _wake(waiter)
        if self._timer is not None:
            self._timer.cancel()

    async def close_pace(self) -> None:
        """Close the connection to the store of the pace."""
        if self._leases is not None:
            await self._leases.close()


def _wake(waiter: asyncio.Future[bool]) -> None:
    """Wake a waiter without admitting it."""
    if not waiter.done():
        waiter.set_result(False)
