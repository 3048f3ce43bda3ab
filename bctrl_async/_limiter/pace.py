"""A rate that several processes share: the abstract classes of `bctrl_async.pace`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from bctrl_async import _config
from bctrl_async._limiter.rate import PROBE_INTERVAL

LEASE = 0.05
"""Seconds that a lease lasts at most. It is the longest that a single member makes others wait."""
MAX_CLOSED = PROBE_INTERVAL
"""The longest Retry-After in seconds that is shared: in a longer one a call a minute is a probe."""


def longest_queue(rate: float, members: int) -> float:
    """Return the seconds that the leases of all members take at most.

    Each member has one lease ahead, or waits for its next one. At a low rate a slot is longer than
    a lease.
    """
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
