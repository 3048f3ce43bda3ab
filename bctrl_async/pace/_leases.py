"""The slots of a shared pace that a session has, and its rate while the pace is away.

While there are slots, no attempt waits for the store: a separate task acquires the next
lease while the session uses the last.
"""

from __future__ import annotations

import asyncio
import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from bctrl_async import _config
from bctrl_async.errors import BctrlConfigError

_log = logging.getLogger("bctrl_async.pace")

PATIENCE = 1.0
"""Seconds for the answer of a store, which may have to be connected first."""
_LEASE = 0.05
"""The most seconds that a lease lasts: no process makes the others wait for longer."""
_INTERVAL = 1.0
"""Seconds between requests to a store that is away."""
_DECAY = 0.8
"""The weight of the earlier leases in the measured share of the rate."""
_MAX_TO_EXPECTED = 2.0
"""A lease counts as at most this many times its expected seconds, because its process
may have been held up."""
_MARGIN = 0.9
"""The part of its share, an estimate, that a session uses while the store is away."""
_BURST = 0.02
"""Seconds' worth of attempts that may start at once without the store: timers are
late."""


class Pace(ABC):
    """A rate that several processes share; an instance serves any number of sessions.

    Attributes:
        rate: The most attempts a second of all processes together.
    """

    def __init__(self, *, rate: float) -> None:
        self.rate: float = _config.per_second(rate, "rate")

    def __str__(self) -> str:
        """Return what a warning calls the pace."""
        return "the shared pace"

    @abstractmethod
    async def acquire(self, slots: int) -> None:
        """Wait until this many attempts may start, spaced by the rate.

        Args:
            slots: The number of attempts: 1, or more if they are worth 0.05 s at most.

        Raises:
            BctrlConfigError: The store cannot be used as configured. A session that has
                never had a slot is then closed.
            Exception: The store is away, which must show within seconds. The session
                goes on without it, and asks again once a second.
        """


class Leases:
    """The slots of a shared pace that a session may use.

    A slot may be used until `_LEASE` seconds after its time, for timers are late. Then
    it is lost: slots that were saved up would be a burst.
    """

    def __init__(
        self,
        pace: Pace,
        count_waiting: Callable[[], int],
        on_lease: Callable[[], None],
        on_misconfigured: Callable[[BctrlConfigError], None],
    ) -> None:
        self._pace = pace
        self._count_waiting = count_waiting
        self._on_lease = on_lease
        self._on_misconfigured = on_misconfigured
        self._slots = deque[float]()  # A slot is the time of its use.
        self._request: asyncio.Task[None] | None = None
        self._requested_at = 0.0
        self._has_leased = False
        self._is_away = False
        # The session is busy while calls wait for each lease: then the slots per second
        # of its leases are its share of the rate. Before, its share is the whole rate.
        self._is_busy = False
        self._busy_seconds = 1.0 / pace.rate
        self._busy_slots = 1.0
        self._next_without_store = 0.0

    def delay(self, now: float) -> float:
        """Return the seconds until the next attempt may start; inf without a lease.

        Request the next lease if more calls wait than there are slots.
        """
        slots = self._slots
        while slots and slots[0] < now - _LEASE:
            slots.popleft()
        may_request = not self._is_away or now >= self._requested_at + _INTERVAL
        if self._request is None and may_request and self._count_waiting() > len(slots):
            self._requested_at = now
            self._request = asyncio.create_task(self._acquire())
            self._request.add_done_callback(self._on_answer)
        if slots:
            return slots[0] - now
        if self._is_away:
            return max(self._next_without_store - _BURST - now, 0.0)
        return math.inf

    def on_start(self, now: float) -> None:
        """Record the start of an attempt: it uses a slot."""
        if self._slots:
            self._slots.popleft()
        else:
            spacing = 1.0 / self._rate_without_store()
            self._next_without_store = max(self._next_without_store, now) + spacing

    async def close(self) -> None:
        """Cancel the request in flight; a closed limiter makes no other."""
        if self._request is not None:
            self._request.cancel()
            await asyncio.wait([self._request], timeout=PATIENCE)

    async def _acquire(self) -> None:
        # First, all calls of the same turn of the loop start to wait.
        await asyncio.sleep(0)
        shortage = self._count_waiting() - len(self._slots)
        slots = max(min(shortage, int(self._pace.rate * _LEASE)), 1)
        await self._pace.acquire(slots)
        now = asyncio.get_running_loop().time()
        if self._is_busy:
            self._measure_share(now - self._requested_at, slots)
        self._slots.extend(now + number / self._pace.rate for number in range(slots))
        self._has_leased = True
        if self._is_away:
            self._is_away = False
            _log.warning(
                "the shared pace is used again", extra={"bctrl.event": "pace_back"}
            )

    def _measure_share(self, elapsed: float, slots: int) -> None:
        """Measure this session's share of the rate, by the seconds of a lease."""
        # A shorter time would show more than the whole rate. Older leases fade out.
        elapsed = max(elapsed, slots / self._pace.rate)
        expected_seconds = slots * self._busy_seconds / self._busy_slots
        self._busy_seconds *= _DECAY
        self._busy_seconds += min(elapsed, _MAX_TO_EXPECTED * expected_seconds)
        self._busy_slots *= _DECAY
        self._busy_slots += slots

    def _on_answer(self, request: asyncio.Task[None]) -> None:
        """Handle the end of a request, even if cancelled: attempts may wait for it."""
        self._request = None
        error = asyncio.CancelledError() if request.cancelled() else request.exception()
        if isinstance(error, BctrlConfigError) and not self._has_leased:
            self._on_misconfigured(error)
        # A request that `close` cancels is `cancelling`. If the store's client raises a
        # cancellation of its own, the store is away.
        elif error is not None and not self._is_away and not request.cancelling():
            self._on_store_away(error)
        self._on_lease()
        # `_on_lease` starts calls, and makes the next request if others still wait.
        self._is_busy = self._request is not None

    def _on_store_away(self, error: BaseException) -> None:
        self._is_away = True
        # The text of another library's error may contain the URL with its password.
        text = str(error) if isinstance(error, OSError | BctrlConfigError) else ""
        rate = self._rate_without_store()
        # The reason is one line: the name of the error, and its text if it has any.
        reason = f"{type(error).__name__}: {text}".removesuffix(": ")
        _log.warning(
            "%s cannot be asked (%s): this session goes on with %.3g attempts a second",
            self._pace,
            " ".join(reason.split()),
            rate,
            extra={"bctrl.event": "pace_away", "bctrl.rate": rate},
        )

    def _rate_without_store(self) -> float:
        return _MARGIN * self._busy_slots / self._busy_seconds
