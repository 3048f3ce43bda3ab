"""A rate that several processes share: its schedule, and what a store of it does."""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from bctrl_async import _config

LEASE = 0.05
"""Seconds that a lease lasts at most. It is the longest that a single member makes others wait."""
MAX_CLOSED = 60.0
"""The longest Retry-After in seconds that is shared: in a longer one a call a minute is a probe."""
_MEMBERSHIP = 2.0
"""Seconds after the end of its last lease until a member no longer counts."""


def longest_queue(rate: float, members: int) -> float:
    """Return the seconds that all leases take at most: two of each member, and of a newcomer."""
    # At a low rate a slot is longer than a lease.
    return 2.0 * max(LEASE, 1.0 / rate) * (members + 1)


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """Slots of a shared schedule: attempts that one member may start, at the rate of the pace.

    A session takes an answer beyond these bounds for a failure of the store.

    Args:
        slots: The number of slots; at most as many as were asked for, and at least 1 of them.
        delay: Seconds until the first slot; at most a pause of 60 and two leases of each member.
        closed_for: Seconds for which a server has asked all to stay away (Retry-After), or 0; at
            most 60.
        members: The number of members that share the rate, this one included; at least 1.
    """

    slots: int
    delay: float
    closed_for: float
    members: int


class Schedule(msgspec.Struct):
    """The schedule of a pace, as its store keeps it: a pure function of the store's clock.

    Args:
        ends_at: The time at which the slots leased so far end.
        closed_until: The time until which a server has asked all to stay away.
        members: The times until which members count, by name.
    """

    ends_at: float = 0.0
    closed_until: float = 0.0
    members: dict[str, float] = {}

    def lease(self, now: float, rate: float, member: str, slots: int, closed_for: float) -> Lease:
        """Lease the next slots to a member.

        Args:
            now: The time of the store's clock in seconds. It may be set back.
            rate: The rate of the pace.
            member: The name of the member.
            slots: The most slots that it can use.
            closed_for: Seconds for which the server has asked this member to stay away, or 0.
        """
        closed = max(self.closed_until - now, 0.0)
        latest = now + closed + longest_queue(rate, len(self.members))
        if closed > MAX_CLOSED + 1.0 or self.ends_at > latest:
            # The clock was set back since: its times would hold up all, or give all the same slots.
            self.ends_at, closed, self.members = now, 0.0, {}
        closed_for = min(max(closed, closed_for), MAX_CLOSED)
        members = {name: until for name, until in self.members.items() if now < until}
        members.setdefault(member, now)
        slots = min(slots, max(int(rate * LEASE / len(members)), 1))
        begins = max(self.ends_at, now + closed_for)
        self.ends_at = begins + slots / rate
        members[member] = self.ends_at + _MEMBERSHIP
        # The time of a lease must not become a Retry-After when the clock is set back.
        self.closed_until, self.members = now + closed_for if closed_for else 0.0, members
        return Lease(slots=slots, delay=begins - now, closed_for=closed_for, members=len(members))


class PaceStore(ABC):
    """One member's connection to the store of a pace, used on one event loop.

    A call that fails or takes longer than 0.25 s makes the member go on without the store, at its
    share of the rate. It calls again a second later.
    """

    @abstractmethod
    async def lease(self, member: str, slots: int, closed_for: float) -> Lease:
        """Lease the next slots of the schedule, in one atomic step.

        Args:
            member: A random name of the member.
            slots: The most slots that it can use; 0 to report `closed_for` only.
            closed_for: Seconds for which the server has asked this member to stay away, or 0.

        Raises:
            Exception: The store cannot be reached.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close the connection."""


class Pace(ABC):
    """A rate that several processes share through a store, for `BctrlSession(pace=…)`.

    An instance may be used by any number of sessions, and pickled.

    Args:
        rate: The most attempts a second of all members together, above 0.

    Attributes:
        rate: The rate.

    Raises:
        BctrlConfigError: The rate is invalid.
    """

    def __init__(self, *, rate: float) -> None:
        self.rate: float = _config.per_second(rate, "rate")

    @abstractmethod
    def open(self) -> PaceStore:
        """Return a connection of one session to the store; it may connect later."""
