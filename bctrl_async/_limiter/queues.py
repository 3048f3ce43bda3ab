"""The queues of the calls that wait for a slot."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Collection
from enum import IntEnum

import msgspec

from bctrl_async._limiter.evidence import History, Slots
from bctrl_async._limiter.standings import Standing


class Priority(IntEnum):
    """Priority of a waiter. Lower values are admitted first."""

    CANARY = 0
    """A canary; it waits in no lane, because it shows whether the server is up."""
    RETRY = 1
    """A call that may have taken effect."""
    SINGLE = 2
    """A single call; it comes before a bulk stop, because somebody waits for it."""
    BULK = 3
    """A target of a bulk stop; it gets every fifth slot beside single calls."""
    POLL = 4
    """A poll; it comes last, because runtimes that are not stopped yet cost money. It
    gets every twentieth slot beside others, as a list answers for many runtimes."""


_MAX_PASSES = {Priority.BULK: 4, Priority.POLL: 19}
"""Single calls and stops that are admitted in a row while one of these waits."""


class Waiter(msgspec.Struct, eq=False):
    """A call that waits for a slot; it fails if its wait is in vain."""

    admitted: asyncio.Future[None]
    """It is done once the call is admitted, or fails."""
    history: History
    priority: Priority
    patience: float
    """Seconds for which it waits while all is throttled, or as Retry-After asks."""
    standing: Standing = Standing.HELD
    """Whether the limit for all may hold it; at the gate for all."""
    has_task: bool = True
    """False if its call gets its slot when a task takes it up."""
    error: Exception | None = None

    gate: Slots | None = None
    """The gate that admitted the call."""

    def admit(self, gate: Slots) -> None:
        """Let the call pass a gate."""
        self.gate = gate
        self.admitted.set_result(None)

    def raise_if_failed(self) -> None:
        """Raise the error of a waiter that has failed."""
        if self.error is not None:
            raise self.error

    def fail(self, error: Exception) -> None:
        """Let the call fail, which still waits."""
        self.error = error
        self.admitted.set_result(None)


class Queues:
    """The waiters of a gate, by standing and then by priority.

    Under a limit, the standings take turns, as the limit may be about some workspaces,
    or about first attempts only.
    """

    def __init__(self) -> None:
        self._queues: dict[Standing, Queue] = {Standing.HELD: Queue()}
        self._turn = 0
        """The standing whose turn is next."""
        self.count: int = 0
        """The number of waiters in the queues; some of them may wait no more."""

    @property
    def waiting(self) -> list[Waiter]:
        """The waiters that have no slot yet."""
        queues = self._queues.values()
        return [waiter for queue in queues for waiter in queue.waiting]

    def are_ahead_of(self, standing: Standing) -> bool:
        """Return True if a new call of a standing must wait behind these waiters."""
        if standing is not Standing.EXEMPT:
            return self.count > 0
        return standing in self._queues and self._queues[standing].count > 0

    def add(self, waiter: Waiter) -> None:
        """Add a waiter to the end of its queue."""
        self._queues.setdefault(waiter.standing, Queue()).add(waiter)
        self.count += 1

    def heads(self, *, is_limited: bool) -> list[Waiter]:
        """Return the next waiter of each standing, in the order of their turns."""
        if not is_limited and len(self._queues) > 1:
            self._merge()
        standings = sorted(self._queues, key=self._turns_until)
        heads = [self._queues[standing].next() for standing in standings]
        # `next` has dropped those that wait no more.
        self._count()
        return [waiter for waiter in heads if waiter is not None]

    def _merge(self) -> None:
        """Let all wait in one queue, as nobody has a standing without a limit."""
        merged = Queue()
        for standing in sorted(self._queues, reverse=True):
            for waiter in self._queues[standing].waiting:
                waiter.standing = Standing.HELD
                merged.add(waiter)
        self._queues = {Standing.HELD: merged}

    def _turns_until(self, standing: Standing) -> int:
        # The exempt come last, since the rate of the others lets them pass.
        if standing is Standing.EXEMPT:
            return standing
        return (standing - self._turn) % Standing.EXEMPT

    def _count(self) -> None:
        self.count = sum(queue.count for queue in self._queues.values())

    def remove(self, waiter: Waiter) -> None:
        """Remove a waiter that `heads` returned, to be admitted."""
        self._queues[waiter.standing].remove(waiter)
        self.count -= 1
        if waiter.standing is not Standing.EXEMPT:
            self._turn = waiter.standing + 1

    def take(self, workspaces: Collection[str]) -> list[Waiter]:
        """Remove and return the waiters of workspaces, but no canary, in order."""
        queues = self._queues.values()
        taken = [waiter for queue in queues for waiter in queue.take(workspaces)]
        self._count()
        return taken


class Queue:
    """The waiters of each priority, first come, first served."""

    def __init__(self) -> None:
        self._queues: list[deque[Waiter]] = [deque() for _ in Priority]
        self._passes = dict.fromkeys(_MAX_PASSES, 0)
        self.count: int = 0
        """The number of waiters in the queues; some of them may wait no more."""

    @property
    def waiting(self) -> list[Waiter]:
        """The waiters that have no slot yet, in the order of their priority."""
        waiters = [waiter for queue in self._queues for waiter in queue]
        return [waiter for waiter in waiters if not waiter.admitted.done()]

    def add(self, waiter: Waiter) -> None:
        """Add a waiter to the end of its queue."""
        self._queues[waiter.priority].append(waiter)
        self.count += 1

    def _heads(self) -> list[Waiter]:
        """Return the first waiter of each queue, and drop those that wait no more."""
        heads = []
        for queue in self._queues:
            while queue and queue[0].admitted.done():
                queue.popleft()
                self.count -= 1
            if queue:
                heads.append(queue[0])
        return heads

    def next(self) -> Waiter | None:
        """Return the waiter to admit next; None if there is none."""
        if not self.count:
            return None
        heads = self._heads()
        if not heads:
            return None
        if heads[0].priority >= Priority.SINGLE:
            for waiter in reversed(heads):
                priority = waiter.priority
                if self._passes.get(priority, 0) >= _MAX_PASSES.get(priority, math.inf):
                    return waiter
        return heads[0]

    def remove(self, waiter: Waiter) -> None:
        """Remove the waiter that `next` returned, to be admitted."""
        self._queues[waiter.priority].popleft()
        self.count -= 1
        for priority in self._passes:
            if priority is waiter.priority or not self._queues[priority]:
                self._passes[priority] = 0
            elif Priority.SINGLE <= waiter.priority < priority:
                self._passes[priority] += 1

    def take(self, workspaces: Collection[str]) -> list[Waiter]:
        """Remove and return the waiters of workspaces, but no canary, in order."""
        removed: list[Waiter] = []
        for priority in Priority:
            if priority is not Priority.CANARY:
                removed += self._take_from(priority, workspaces)
        return removed

    def _take_from(
        self, priority: Priority, workspaces: Collection[str]
    ) -> list[Waiter]:
        removed: list[Waiter] = []
        remaining: deque[Waiter] = deque()
        for waiter in self._queues[priority]:
            is_removed = waiter.history.workspace in workspaces
            (removed if is_removed else remaining).append(waiter)
        self._queues[priority] = remaining
        self.count -= len(removed)
        return [waiter for waiter in removed if not waiter.admitted.done()]
