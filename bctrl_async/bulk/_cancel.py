"""Cancel blocks of tasks, level by level."""

from __future__ import annotations

import asyncio
from enum import IntEnum
from typing import Self


class CancelLevel(IntEnum):
    """The extent of a cancellation. Each level includes the levels before it."""

    NONE = 0
    """Nothing is cancelled."""
    READING = 1
    """No new target is sent, and polls end. Requests in flight may still be answered;
    stops that may have taken effect are retried."""
    WAITING = 2
    """No more requests are sent; requests in flight may still be answered."""
    IN_FLIGHT = 3
    """Requests in flight are abandoned; outcomes are still delivered."""
    DELIVERY = 4
    """Outcomes are recorded and no longer delivered."""


class CancelScope:
    """A block of a task that another task can cancel once, like anyio's `CancelScope`.

    Its task may enter it again after leaving it, but may not nest it. `asyncio.timeout`
    does not fit: rescheduled to now, it cancels in the next turn of the loop, when the
    task may have left the block. `cancelled_caught` is True if the block was left
    because of `cancel`.
    """

    __slots__ = (
        "_cancel_called",
        "_is_entered",
        "_outer_cancels",
        "_task",
        "cancelled_caught",
    )

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._is_entered = False
        self._outer_cancels = 0
        self._cancel_called = False
        self.cancelled_caught: bool = False

    def __enter__(self) -> Self:
        # The task is kept, because it may enter the block again.
        if self._task is None:
            self._task = asyncio.current_task()
        task = self._task
        # The task is None in a coroutine that no task runs, which nobody can cancel.
        self._outer_cancels = 0 if task is None else task.cancelling()
        self._is_entered = True
        self._cancel_called = self.cancelled_caught = False
        return self

    def cancel(self) -> None:
        """Cancel the block once, if a task is in it."""
        task = self._task
        if task is None or not self._is_entered or self._cancel_called:
            return
        # The current task would be cancelled at its next await, perhaps too late.
        if task is not asyncio.current_task():
            self._cancel_called = True
            task.cancel()

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> bool:
        self._is_entered = False
        if self._cancel_called and self._task is not None:
            # A cancellation from outside remains in the count, and propagates.
            is_only_ours = self._task.uncancel() <= self._outer_cancels
            self.cancelled_caught = is_only_ours and exc_type is asyncio.CancelledError
        return self.cancelled_caught


async def wait_shielded(task: asyncio.Task[object]) -> None:
    """Wait for a task to end; a cancellation of the caller takes effect only then."""
    cancellation: asyncio.CancelledError | None = None
    # The wait is repeated: anyio cancels a task at every turn of the loop.
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is not None:
        raise cancellation
