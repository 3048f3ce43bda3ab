"""A gate: it admits attempts, first come, first served in each priority."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection
from dataclasses import replace

from bctrl_async._kinds import Failure
from bctrl_async._limiter.bounds import Capacity, FixedRate
from bctrl_async._limiter.evidence import History
from bctrl_async._limiter.patience import TIMER_TOLERANCE, PatienceTimer, find_error
from bctrl_async._limiter.queues import Queues, Waiter
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async._limiter.standings import Standing
from bctrl_async.errors import BctrlError
from bctrl_async.pace import Pace
from bctrl_async.pace._leases import Leases

_log = logging.getLogger("bctrl_async")

_LATER = 1.0
"""Seconds by which a Retry-After must be later to be news for those that wait."""


class Gate:
    """A bound on attempts in flight and on their rate, of a workspace or of all.

    `asyncio.Semaphore` has neither a rate nor `close`.
    """

    def __init__(
        self, limit: float, rate: AdaptiveRate, workspace: str | None = None
    ) -> None:
        self.rate: AdaptiveRate = rate
        self.in_use: int = 0
        """The number of slots in use."""
        self._limit = limit
        self._capacity: Capacity | None = None
        """The bound of the machine; None if it has never lacked anything."""
        self._text_of_calls = "the calls of the session"
        if workspace is not None:
            self._text_of_calls = f"the calls in workspace {workspace!r}"
        self._bound: FixedRate | Leases | None = None
        """The rate of the caller, which holds whatever the server allows."""
        self._queues = Queues()
        self._limited_since: float | None = None
        self._wakeup_timer: asyncio.Handle | None = None
        self._wakeup_at = math.inf
        self._patience = PatienceTimer(self._on_patience_end)
        self._error: BctrlError | None = None
        """The error of each call once it is closed."""

    def bound_by(self, rate: FixedRate) -> None:
        """Let a rate of the caller bound the attempts, too."""
        self._bound = rate

    def use_pace(
        self, pace: Pace, on_misconfigured: Callable[[BctrlError], None]
    ) -> Leases:
        """Let a pace bound the rate; `on_misconfigured` gets a bad store's error."""
        leases = Leases(pace, lambda: self._queues.count, self._admit, on_misconfigured)
        self._bound = leases
        # The pace bounds the first attempts too; a slower start would waste slots.
        self.rate.is_starting = False
        return leases

    @property
    def is_empty(self) -> bool:
        """True if no call waits, and none is in flight."""
        return not (self.in_use or self._queues.count)

    @property
    def is_idle(self) -> bool:
        """True if it has no call, and no evidence to remember."""
        return self.is_empty and not self.rate.has_limit and not self.rate.excess

    @property
    def is_limiting(self) -> bool:
        """True if throttling by the server limits the rate of its calls."""
        return self.rate.has_limit and not self.is_empty

    @property
    def waiting(self) -> list[Waiter]:
        """The waiters."""
        return self._queues.waiting

    @property
    def retry_after_ends(self) -> float:
        """The time until which the server has asked all to wait."""
        return self.rate.retry_after_ends

    def acquire_nowait(self) -> bool:
        """Acquire a slot if no rate bounds attempts, and no wait is needed."""
        if self.in_use >= self._limit or self._error is not None or self._queues.count:
            return False
        if self._bound is not None or not self.rate.is_unlimited:
            return False
        self.in_use += 1
        return True

    def acquire_if_due(self, standing: Standing = Standing.HELD) -> bool:
        """Acquire a slot if the rate allows an attempt now, and no wait is needed."""
        if self.in_use >= self._limit or self._error is not None:
            return False
        now = asyncio.get_running_loop().time()
        if self._queues.are_ahead_of(standing) or self._delay(now, standing) > 0.0:
            return False
        self._on_start(now, standing)
        self.in_use += 1
        return True

    def add(self, *waiters: Waiter) -> None:
        """Add waiters, which are admitted at once if possible.

        They fail if a Retry-After is longer than they wait, or if the server throttles
        every attempt for that long.
        """
        now = asyncio.get_running_loop().time()
        for waiter in waiters:
            if self._error is not None:
                waiter.fail(replace(self._error))
            elif not self._fail_if_in_vain(waiter, now):
                self._queues.add(waiter)
        self._admit()
        self._patience.watch(waiters, self.rate)

    def take(self, workspaces: Collection[str]) -> list[Waiter]:
        """Remove and return the waiters of workspaces, but no canary, in order."""
        return self._queues.take(workspaces)

    def _fail_if_in_vain(self, waiter: Waiter, now: float) -> bool:
        """Fail a waiter, and return True, if no attempt may succeed in its patience."""
        error = find_error(waiter, self.rate, now, self._text_of_calls)
        if error is None:
            return False
        waiter.fail(error)
        return True

    def _on_patience_end(self, now: float) -> None:
        self._fail_waits_in_vain(now)
        self._patience.watch(self.waiting, self.rate)

    def on_lack(self, failure: Failure) -> None:
        """Let no more be in flight than the others, as the machine holds no more."""
        others = self.in_use - 1
        if self._capacity is None:
            self._capacity = Capacity(self._limit)
            self._capacity.warn(failure, others)
        now = asyncio.get_running_loop().time()
        self._limit = self._capacity.lower(now, others)

    def take_slot(self) -> None:
        """Take a slot, of a call that was admitted without."""
        self.in_use += 1

    def release(self) -> None:
        """Release a slot."""
        self.in_use -= 1
        if self._queues.count:
            self._admit()

    def on_success(self, now: float, history: History) -> None:
        """Record a response that was not throttled."""
        self.rate.on_success(now, history)
        if self._queues.count:
            self._admit()

    def on_throttled(
        self,
        now: float,
        status: int | None,
        retry_after: float | None,
        history: History,
        *,
        is_explained: bool = False,
    ) -> bool:
        """Record a throttled response; fail those whose wait is now too long.

        Return True if it shows a limit that was not known.
        """
        had_limit = self.rate.has_limit
        was_answered = self.rate.all_throttled_since == math.inf
        earlier_end = self.rate.retry_after_ends
        self.rate.on_throttled(now, retry_after, history, is_explained=is_explained)
        if was_answered:
            self._patience.watch(self.waiting, self.rate)
        if self.rate.has_limit and self._limited_since is None:
            self._log_throttled(now, status)
        # Each response that was in flight moves the end by some milliseconds.
        if self.rate.retry_after_ends > earlier_end + _LATER:
            self._fail_waits_in_vain(now)
        return self.rate.has_limit and not had_limit

    def _fail_waits_in_vain(self, now: float) -> None:
        for waiter in self.waiting:
            self._fail_if_in_vain(waiter, now)

    def _log_throttled(self, now: float, status: int | None) -> None:
        self._limited_since = now
        delay = self.rate.delay(now)
        _log.info(
            "throttled by the server (status %d): %s slow down, and the next attempt "
            "starts in %.3f s",
            status,
            self._text_of_calls,
            delay,
            extra={
                "bctrl.event": "throttled",
                "http.response.status_code": status,
                "bctrl.delay": delay,
            },
        )

    def lift_limit(self) -> None:
        """Start again, as a limit for all explains the throttling; admit who waits."""
        self.rate = AdaptiveRate.of_workspace(self.rate.answers)
        self._limited_since = None
        for waiter in self.waiting:
            # This wakes a parked stop. When a worker takes the stop up, it passes the
            # lane again, which may have a new limit then.
            if not waiter.has_task:
                waiter.admitted.cancel()
        self._admit()

    def _delay(self, now: float, standing: Standing) -> float:
        """Return the seconds until the next attempt may start; inf if unknown."""
        delay = 0.0
        if self._bounds(standing):
            delay = self.rate.delay(now, is_held=standing is Standing.HELD)
        if delay <= 0.0 and self._bound is not None:
            # It comes last: while the server allows no attempt, a new lease would be
            # lost.
            delay = self._bound.delay(now)
        return delay

    def _bounds(self, standing: Standing) -> bool:
        """Return True if the learned rate bounds those of a standing."""
        return standing is not Standing.EXEMPT and not self.rate.is_unlimited

    def _on_start(self, now: float, standing: Standing) -> None:
        if self._bounds(standing):
            self.rate.on_start(now)
        if self._bound is not None:
            self._bound.on_start(now)
        if self._limited_since is not None and not self.rate.has_limit:
            self._log_full_speed(now - self._limited_since)
            self._limited_since = None

    def _log_full_speed(self, elapsed: float) -> None:
        _log.info(
            "no longer throttled by the server, after %.3f s: %s start at full speed",
            elapsed,
            self._text_of_calls,
            extra={"bctrl.event": "throttling_ended", "bctrl.elapsed": elapsed},
        )

    def _admit(self, due: float = -math.inf) -> None:
        """Admit all waiters that may start now; schedule a wakeup for the next.

        `due` is the time of a wakeup. uvloop rounds it to milliseconds, so it may come
        early, and waiting for the rest would keep the loop busy.
        """
        if self._capacity is not None:
            self._limit = self._capacity.grow(asyncio.get_running_loop().time())
        while self.in_use < self._limit:
            waiter = self._next_due(due)
            if waiter is None:
                return
            # A call without a task takes its slot later: all workers may wait in the
            # lane until then.
            if waiter.has_task:
                self.in_use += 1
            self._queues.remove(waiter)
            waiter.admit(self)

    def _next_due(self, due: float) -> Waiter | None:
        """Return the waiter to admit now, and record its start, or None."""
        for waiter in self._queues.heads(is_limited=not self.rate.is_unlimited):
            if self._start_if_due(waiter, due):
                return waiter
        return None

    def _start_if_due(self, waiter: Waiter, due: float) -> bool:
        standing = waiter.standing
        if self._bound is None and not self._bounds(standing):
            return True
        now = max(asyncio.get_running_loop().time(), due)
        delay = self._delay(now, standing)
        if delay > 0.0:
            self._schedule_wakeup(now + delay)
            return False
        self._on_start(now, standing)
        return True

    def _schedule_wakeup(self, when: float) -> None:
        # The time is inf while a lease is awaited, which admits the next.
        if when >= self._wakeup_at - TIMER_TOLERANCE:
            return
        if self._wakeup_timer is not None:
            self._wakeup_timer.cancel()
        self._wakeup_at = when
        self._wakeup_timer = asyncio.get_running_loop().call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        due = self._wakeup_at
        self._wakeup_at = math.inf
        self._admit(due)

    def close(self, error: BctrlError) -> None:
        """Close the gate: current and future waiters fail with a copy of an error."""
        self._error = error
        for waiter in self.waiting:
            waiter.fail(replace(error))
        self.cancel_timers()

    def cancel_timers(self) -> None:
        """Cancel the timers of a gate that is closed or forgotten."""
        self._patience.cancel()
        if self._wakeup_timer is not None:
            self._wakeup_timer.cancel()
