"""The leases that one session takes of a shared pace, and its share of the rate without the store.

Nothing waits for the store on the way of an attempt. A task of its own asks for a lease when the
last one is used up, or a round trip before.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable
from functools import partial
from uuid import uuid4

from bctrl_async._lifetime import close_with_loop
from bctrl_async._limiter.pace import LEASE, MAX_CLOSED, Lease, Pace, PaceStore, longest_queue

_log = logging.getLogger("bctrl_async.pace")

_PATIENCE = 0.25
"""Seconds after which attempts do not wait for the store any more."""
_INTERVAL = 1.0
"""Seconds between two requests to a store that is away; one that takes longer is given up."""
_BURST = 0.02
"""Seconds' worth of attempts that may start at once without the store, for late timers."""


class Leases:
    """The slots that a session may use of a shared pace.

    A slot may be used until `LEASE` seconds after its time, for timers are late. Then it is lost:
    slots that were saved up would be a burst.

    Args:
        pace: The pace.
        waiting: Returns the number of attempts that wait for a slot.
        on_lease: Called when attempts may start, or have to be held back, otherwise than before.
        on_closed: Called with the time and the seconds for which a server has asked a member to
            stay away; returns True if the session has to wait for that, and did not know it.
    """

    def __init__(
        self,
        pace: Pace,
        *,
        waiting: Callable[[], int],
        on_lease: Callable[[], None],
        on_closed: Callable[[float, float], bool],
    ) -> None:
        self._pace = pace
        self._interval = 1.0 / pace.rate
        self._waiting = waiting
        self._on_lease = on_lease
        self._on_closed = on_closed
        self._member = uuid4().hex
        self._members = 1
        self._store: PaceStore | None = None
        self._lifetime: AsyncGenerator[None] | None = None
        self._request: asyncio.Task[None] | None = None
        self._requested_at = -math.inf
        self._round_trip = 0.0
        self._slots = 0
        self._size = 0
        self._next_slot = self._needed_from = -math.inf
        self._following: tuple[float, int] | None = None
        self._next_without_store = -math.inf
        self._used_up_at = -math.inf
        self._away_since: float | None = None
        self._closed_until = self._reported_until = -math.inf
        self._is_closed = False

    @property
    def _is_store_away(self) -> bool:
        return self._away_since is not None

    def delay(self, now: float) -> float:
        """Return the seconds until the next attempt may start; inf until a lease is there.

        It may start if they are 0 or less. Asks for a lease if none is left.
        """
        # Mostly there is nothing to do: each attempt of a bulk stop pays for what is done here.
        if now >= self._needed_from or now > self._next_slot + LEASE:
            self._drop_late_slots(now)
            if self._needs_lease(now):
                self._renew(now)
        if self._slots:
            return self._next_slot - now
        if self._is_store_away:
            return max(self._next_without_store - _BURST - now, 0.0)
        return math.inf

    def on_start(self, now: float) -> None:
        """Record the start of an attempt: it uses a slot."""
        if self._slots > 1:
            self._slots -= 1
            self._next_slot += self._interval
        elif self._slots:
            self._use_slots(1)
            if not self._slots:
                self._used_up_at = now
        else:
            share = self._interval * self._members
            self._next_without_store = max(self._next_without_store, now) + share

    def on_throttled(self, now: float, retry_after: float) -> None:
        """Report a Retry-After in seconds to the other members."""
        self._closed_until = max(self._closed_until, now + retry_after)
        self._report(now)

    def _report(self, now: float) -> None:
        # A burst of throttled answers moves the time by milliseconds only.
        if self._closed_until > max(self._reported_until + LEASE, now):
            self._renew(now)

    async def close(self) -> None:
        """Close the connection to the store; nothing is asked for afterwards."""
        self._is_closed = True
        if self._request is not None:
            self._request.cancel()
            await asyncio.wait([self._request], timeout=_INTERVAL)
        if self._lifetime is not None:
            await anext(self._lifetime, None)

    def _drop_late_slots(self, now: float) -> None:
        while self._slots and (late := now - LEASE - self._next_slot) > 0.0:
            self._use_slots(min(self._slots, math.ceil(late / self._interval)))

    def _use_slots(self, count: int) -> None:
        self._slots -= count
        self._next_slot += count * self._interval
        if not self._slots and self._following is not None:
            self._next_slot, self._slots = self._following
            self._following = None
        last_slot = self._next_slot + (self._slots - 1) * self._interval
        self._needed_from = last_slot - self._round_trip if self._slots else -math.inf

    def _needs_lease(self, now: float) -> bool:
        """Return True if the slots are used up, or will be before the store could answer."""
        if not self._slots:
            return True
        return (
            self._following is None and now >= self._needed_from and self._waiting() > self._slots
        )

    def _renew(self, now: float) -> None:
        """Ask for a lease, unless that is under way."""
        is_due = not self._is_store_away or now >= self._requested_at + _INTERVAL
        if self._request is None and is_due and not self._is_closed:
            self._requested_at = now
            self._request = asyncio.get_running_loop().create_task(self._ask())
            self._request.add_done_callback(self._on_answer)

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(_PATIENCE, self._on_store_away, f"no answer within {_PATIENCE:g} s")
        try:
            # The task begins when all that came in the same turn of the loop are waiting.
            lease = await self._lease(loop.time())
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            self._on_store_away(_in_one_line(error))
        else:
            self._receive(lease, loop.time())
        finally:
            timer.cancel()

    def _on_answer(self, request: asyncio.Task[None]) -> None:
        """Go on after a request, also one that was cancelled: others may wait for it."""
        self._request = None
        if self._is_closed:
            return
        if not request.cancelled():
            # A loop that ends cancels its tasks, and must not get another one.
            self._report(request.get_loop().time())
        self._on_lease()

    async def _lease(self, now: float) -> Lease:
        if self._store is None:
            self._store = self._pace.open()
            self._lifetime = close_with_loop(partial(_close, self._store))
        slots = self._wanted(now) if self._needs_lease(now) else 0
        closed_until = self._closed_until
        # Reported once: a probe may have ended the pause meanwhile.
        closed_for = closed_until - now if closed_until > self._reported_until else 0.0
        async with asyncio.timeout(_INTERVAL):
            lease = await self._store.lease(self._member, slots, max(closed_for, 0.0))
        if not self._is_possible(lease, slots):
            raise ValueError(f"{slots} slots were asked for, and the store answered {lease}")
        self._reported_until = closed_until
        return lease

    def _is_possible(self, lease: Lease, slots: int) -> bool:
        """Return True if a schedule may answer so; anything else would hold up the session."""
        # Members may have left with the lease before.
        members = max(lease.members, self._members)
        longest_delay = MAX_CLOSED + longest_queue(self._pace.rate, members)
        return (
            min(slots, 1) <= lease.slots <= slots
            and 0.0 <= lease.delay <= longest_delay
            and 0.0 <= lease.closed_for <= MAX_CLOSED
            and lease.members >= 1
        )

    def _wanted(self, now: float) -> int:
        """Return the number of slots to ask for: those that will be used, for others are lost."""
        waiting = self._waiting() - self._slots
        if waiting > 0 and now < self._used_up_at + LEASE:
            return max(waiting, 2 * self._size)
        return max(waiting, 0)

    def _receive(self, lease: Lease, now: float) -> None:
        self._members = lease.members
        if now > self._requested_at + _PATIENCE:
            # Late: it is used the next time, when the connection is there.
            return
        self._on_store_back(now)
        self._round_trip = now - self._requested_at
        if lease.closed_for > 0.0 and self._on_closed(now, lease.closed_for):
            _log.warning(
                "the server asked another member of the shared pace to wait (Retry-After): this "
                "session starts no attempt for %.3g s",
                lease.closed_for,
                extra={"bctrl.event": "pace_paused", "bctrl.delay": lease.closed_for},
            )
        if lease.slots:
            self._size = lease.slots
            self._following = now + lease.delay, lease.slots
        self._use_slots(0)

    def _on_store_away(self, reason: str) -> None:
        if self._is_store_away or self._is_closed:
            return
        now = asyncio.get_running_loop().time()
        self._away_since = self._next_without_store = now
        rate = self._pace.rate / self._members
        _log.warning(
            "the shared pace cannot be asked (%s): this session goes on with %.3g attempts a "
            "second, its share of %d",
            reason,
            rate,
            self._members,
            extra={"bctrl.event": "pace_away", "bctrl.rate": rate},
        )
        self._on_lease()

    def _on_store_back(self, now: float) -> None:
        if self._away_since is not None:
            elapsed = now - self._away_since
            _log.warning(
                "the shared pace is used again, after %.3f s",
                elapsed,
                extra={"bctrl.event": "pace_back", "bctrl.elapsed": elapsed},
            )
            self._away_since = None


def _in_one_line(error: BaseException) -> str:
    # The text of an exception may have any lines, or be empty.
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


async def _close(store: PaceStore) -> None:
    try:
        async with asyncio.timeout(_INTERVAL):
            await store.close()
    except Exception as error:  # noqa: BLE001 - of the store, whichever it is.
        _log.debug("the store of the shared pace was not closed: %r", error)
