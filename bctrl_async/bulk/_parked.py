"""The stops of a run that wait without a worker."""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec

from bctrl_async._calls.call import Call
from bctrl_async._limiter.queues import Waiter
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.observer import StopObserver

_MAX_STOPS = 10_000


class Stop(msgspec.Struct, eq=False):
    """The stop of a target, read at `started`, until its outcome is recorded."""

    index: int
    target: RuntimeRef
    call: Call[Runtime]
    started: float
    observer: StopObserver | None = None
    is_notified: bool = False
    was_parked: bool = False
    token_asks: int = 0
    """The number of times that the retry quota was exhausted when it was to be sent."""
    waiter: Waiter | None = None
    """Its place in the lane of its workspace."""

    @property
    def is_new(self) -> bool:
        """True if it has neither waited in a lane nor been sent."""
        return self.waiter is None and not self.call.retries.failed_attempts


class Parked:
    """The stops of a run that wait for their next attempt or in a lane."""

    def __init__(self) -> None:
        self.unsettled: int = 0
        """The number of stops that were parked, and have no outcome yet."""
        self.ready: deque[tuple[int, object]] = deque()
        """The items that a worker is to take next."""
        self._futures: dict[Stop, asyncio.Future[None]] = {}

    @property
    def is_full(self) -> bool:
        """True if nothing is read until a stop is settled, which bounds the memory."""
        return self.unsettled >= _MAX_STOPS

    @property
    def calls(self) -> list[Call[Runtime]]:
        """The calls of the stops that wait."""
        return [stop.call for stop in self._futures]

    def add(self, stop: Stop, future: asyncio.Future[None]) -> None:
        """Let a stop wait for a future."""
        self._futures[stop] = future
        if not stop.was_parked:
            stop.was_parked = True
            self.unsettled += 1

    def make_ready(self, stop: Stop) -> None:
        """Let a worker take a stop that waits no more."""
        del self._futures[stop]
        self.ready.append((stop.index, stop))

    def settle(self, stop: Stop) -> None:
        """Forget a stop that has its outcome."""
        if stop.was_parked:
            self.unsettled -= 1

    def wake_all(self) -> None:
        """Let no stop wait any more."""
        for future in list(self._futures.values()):
            future.cancel()
