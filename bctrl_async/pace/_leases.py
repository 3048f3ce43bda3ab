"""The schedule of a shared pace, a session's leases, and its rate while the store is away.

While there are slots, no attempt waits for the store: a separate task asks for the next lease when
the slots are used up, or a round trip earlier.
"""

from __future__ import annotations

import asyncio
import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Protocol
from uuid import uuid4

import msgspec

from bctrl_async import _config
from bctrl_async._lifetime import close_with_loop
from bctrl_async.errors import BctrlConfigError, format_duration

_log = logging.getLogger("bctrl_async.pace")

LEASE = 0.05
"""The most seconds that a lease lasts: no member makes the others wait for longer."""
_MEMBERSHIP = 2.0
"""Seconds after the end of its last lease until a member no longer counts."""
_PATIENCE = 0.25
"""Seconds after which attempts do not wait for the store any more."""
_INTERVAL = 1.0
"""Seconds between requests to a store that is away; a request that takes longer is given up."""
_MEMBERS = 1000
"""The most members of a pace. An answer that implies more is not believed."""
_FAR = 1e12
"""The latest time of a schedule: beyond it, rounding would swallow an added slot."""
_BURST = 0.02
"""Seconds' worth of attempts that may start at once without the store, since timers are late."""


class Lease(NamedTuple):
    """Slots of a member (a session), seconds until the first slot, and the number of members."""

    slots: int
    delay: float
    members: int


class Schedule(msgspec.Struct):
    """The schedule of a pace, as its store keeps it.

    Its own time, `now`, passes with the store's clock, but does not jump when that clock is set.
    """

    clock: float = 0.0
    now: float = 0.0
    ends_at: float = 0.0
    members: dict[str, float] = {}
    """The end of each member's last lease."""

    def lease(self, clock: float, rate: float, member: str, slots: int, since: float) -> Lease:
        """Lease at most this many of the next slots.

        By the member's own clock, its last lease ended `since` seconds ago.
        """
        if max(abs(self.clock), abs(self.now), abs(self.ends_at)) > _FAR:
            self.clock, self.now, self.ends_at, self.members = 0.0, 0.0, 0.0, {}
        passed = max(clock - self.clock, -LEASE)
        own = self.members.get(member, math.inf) + since - self.now
        if passed > own + LEASE:
            # The clock was set ahead. Counting that would lease the slots of other members again.
            passed = max(own, 0.0)
        self.clock, self.now = clock, self.now + passed
        oldest = self.now - _MEMBERSHIP
        self.members = {name: end for name, end in self.members.items() if oldest < end}
        self.members.setdefault(member, self.now)
        slots = min(slots, max(int(rate * LEASE / len(self.members)), 1))
        begins = max(self.ends_at, self.now)
        self.members[member] = self.ends_at = begins + slots / rate
        return Lease(slots, begins - self.now, len(self.members))


class Store(Protocol):
    """A session's connection to the store of a pace; it leases in one atomic step."""

    async def lease(self, member: str, slots: int, since: float, /) -> Lease: ...

    async def close(self) -> None: ...


class Pace(ABC):
    """A rate that several processes share: a `FilePace` or a `RedisPace`.

    An instance may be used by any number of sessions, and pickled.

    Attributes:
        rate: The most attempts a second of all processes together.
    """

    def __init__(self, *, rate: float) -> None:
        # A traceback that shows variables calls the repr, which reads the rate even if invalid.
        self.rate: float = math.nan
        self.rate = _config.per_second(rate, "rate")

    @abstractmethod
    def open(self) -> Store:
        """Return a connection of one session to the store; it may connect later."""


class Leases:
    """The slots of a shared pace that a session may use.

    A slot may be used until `LEASE` seconds after its time, for timers are late. Then it is lost:
    slots that were saved up would be a burst.
    """

    def __init__(
        self,
        pace: Pace,
        waiting: Callable[[], int],
        on_lease: Callable[[], None],
        on_misconfigured: Callable[[BctrlConfigError], None],
    ) -> None:
        self._pace = pace
        self._waiting = waiting
        self._on_lease = on_lease
        self._on_misconfigured = on_misconfigured
        self._member = uuid4().hex
        self._members = 1
        self._store: Store | None = None
        self._lifetime: AsyncGenerator[None] | None = None
        self._request: asyncio.Task[None] | None = None
        self._requested_at = self._used_up_at = -math.inf
        self._lease_ends = self._round_trip = 0.0
        self._slots: deque[float] = deque()  # A slot is the time of its use.
        self._size = 0
        self._away_since: float | None = None
        self._next_without_store = -math.inf
        self._is_closed = False
        self._is_proven = False

    def delay(self, now: float) -> float:
        """Return the seconds until the next attempt may start; inf until a lease is there."""
        slots = self._slots
        while slots and slots[0] < now - LEASE:
            slots.popleft()
        if self._needs_lease(now):
            self._renew(now)
        if slots:
            return slots[0] - now
        if self._away_since is not None:
            return max(self._next_without_store - _BURST - now, 0.0)
        return math.inf

    def on_start(self, now: float) -> None:
        """Record the start of an attempt: it uses a slot."""
        if self._slots:
            self._slots.popleft()
            if not self._slots:
                self._used_up_at = now
        else:
            share = self._members / self._pace.rate
            self._next_without_store = max(self._next_without_store, now) + share

    async def close(self) -> None:
        """Close the connection to the store, and request no more leases."""
        self._is_closed = True
        if self._request is not None:
            self._request.cancel()
            await asyncio.wait([self._request], timeout=_INTERVAL)
        if self._lifetime is not None:
            await anext(self._lifetime, None)

    def _needs_lease(self, now: float) -> bool:
        """Return True if the slots are used up, or will be before the store could answer."""
        if not self._slots:
            return True
        # The bound LEASE keeps a long round trip from leading to more than two leases at a time.
        is_low = self._slots[-1] - now <= min(self._round_trip, LEASE)
        return is_low and self._waiting() > len(self._slots)

    def _renew(self, now: float) -> None:
        """Ask for a lease, unless a request is in flight, or it is too early for another."""
        is_due = self._away_since is None or now >= self._requested_at + _INTERVAL
        if self._request is None and is_due and not self._is_closed:
            self._requested_at = now
            self._request = asyncio.get_running_loop().create_task(self._ask())
            self._request.add_done_callback(self._on_answer)

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        problem = f"no answer within {format_duration(_PATIENCE)}"
        timer = loop.call_later(_PATIENCE, self._on_store_away, problem)
        try:
            if self._store is None:
                self._store = self._pace.open()
                self._lifetime = close_with_loop(partial(_close, self._store))
            # First, all calls of the same turn of the loop start to wait.
            await asyncio.sleep(0)
            sent = loop.time()
            wanted, since = self._wanted(sent), sent - self._lease_ends
            async with asyncio.timeout(_INTERVAL):
                lease = await self._store.lease(self._member, wanted, since)
            self._receive(lease, wanted, sent, loop.time())
        finally:
            timer.cancel()

    def _wanted(self, now: float) -> int:
        """Return the number of slots to request: no more than will be used, as others are lost."""
        waiting = self._waiting() - len(self._slots)
        if waiting > 0 and now < self._used_up_at + LEASE:
            waiting = max(waiting, 2 * self._size)
        return max(waiting, 0)

    def _on_answer(self, request: asyncio.Task[None]) -> None:
        """Handle the end of a request, even if cancelled: attempts may wait for its lease."""
        self._request = None
        error = asyncio.CancelledError() if request.cancelled() else request.exception()
        if self._is_closed:
            return
        if isinstance(error, BctrlConfigError) and not self._is_proven:
            self._is_closed = True
            self._on_misconfigured(error)
        elif error is not None and not request.cancelling():
            self._on_store_away(_reason(error))
        self._on_lease()

    def _receive(self, lease: Lease, wanted: int, sent: float, now: float) -> None:
        rate = self._pace.rate
        is_possible = min(wanted, 1) <= lease.slots <= wanted and 1 <= lease.members <= _MEMBERS
        # A member has two leases at most, and leases get shorter with more members.
        if not (is_possible and 0 <= lease.delay <= 1 + 2 * _MEMBERS / rate):
            self._on_store_away("its answer makes no sense")
            return
        self._is_proven = True
        self._lease_ends = sent + lease.delay + lease.slots / rate
        self._members = lease.members
        round_trip = now - sent
        if round_trip > _PATIENCE:
            # A lease this late is dropped; its request has opened the connection for the next.
            return
        self._round_trip = round_trip
        if self._away_since is not None:
            elapsed, self._away_since = now - self._away_since, None
            _log.warning(
                "the shared pace is used again, after %.3f s",
                elapsed,
                extra={"bctrl.event": "pace_back", "bctrl.elapsed": elapsed},
            )
        self._size = lease.slots or self._size
        begins = now + lease.delay
        self._slots.extend(begins + number / rate for number in range(lease.slots))

    def _on_store_away(self, reason: str) -> None:
        if self._away_since is not None or self._is_closed:
            return
        self._away_since = self._next_without_store = asyncio.get_running_loop().time()
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


def _reason(error: BaseException) -> str:
    # The text of another library's error may contain the URL with its password.
    text = str(error) if isinstance(error, OSError | BctrlConfigError) else ""
    return " ".join(f"{type(error).__name__}: {text}".removesuffix(": ").split())


async def _close(store: Store) -> None:
    with suppress(Exception):
        async with asyncio.timeout(_INTERVAL):
            await store.close()
