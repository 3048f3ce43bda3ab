"""One of those who do the work of a bulk stop, and how what it waits for is cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from enum import IntEnum
from typing import TypeVar

from bctrl_async._calls.call import Call
from bctrl_async.errors import BctrlError
from bctrl_async.models import Runtime

_T = TypeVar("_T")


class Reach(IntEnum):
    """How much of a run is ended early; each includes those before it."""

    READING = 0
    """No further target is begun; those that were begun are stopped as usual."""
    WAITING = 1
    """No further request is sent; those that are under way may still be answered."""
    IN_FLIGHT = 2
    """No answer is waited for; what has an outcome is still handed over."""
    HANDING_OVER = 3
    """Nobody wants the outcomes any more; they are still accounted for."""


_CODE = {
    Reach.READING: "the input",
    Reach.WAITING: "the call",
    Reach.HANDING_OVER: "on_outcome",
}


class CutOffError(Exception):
    """What a worker was waiting for has been cut off."""


class Worker:
    """One of those who stop or poll the targets, and what the others must know of it.

    Attributes:
        call: The call that it is at.
        task: What it runs in.
        cancelled: Whether somebody else has cancelled that task.
    """

    __slots__ = ("_cut_off", "_doing", "call", "cancelled", "task")

    def __init__(self) -> None:
        self.call: Call[Runtime] | None = None
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False
        self._doing: Reach | None = None
        self._cut_off = False

    @property
    def stops(self) -> bool:
        """Whether it is at a stop, and does not only look at one."""
        return self.call is not None and self.call.operation.stops

    async def wait(self, doing: Reach, work: Awaitable[_T]) -> _T:
        """Wait for something that can be interrupted.

        Args:
            doing: The least reach that ends it.
            work: What is waited for.

        Raises:
            CutOffError: It was ended.
        """
        self._doing = doing
        try:
            return await work
        except asyncio.CancelledError as error:
            if not self._cut_off and self.task is not None:
                if not self.task.cancelling():
                    # It is nobody's cancellation of this run, but what the user's own code raised.
                    raise BctrlError(f"{_CODE[doing]} raised CancelledError") from error
                self.cancelled = True
            raise CutOffError from None
        finally:
            self._doing = None
            if self._cut_off and self.task is not None:
                self._cut_off = False
                self.task.uncancel()

    def interrupt(self, reach: Reach) -> None:
        """End what it waits for, if that is within reach."""
        doing = self._doing
        if doing is Reach.WAITING and self.call is not None and self.call.in_flight:
            doing = Reach.IN_FLIGHT
        # Whoever calls for the end, as an input may, waits for nothing.
        if (
            doing is None
            or doing > reach
            or self._cut_off
            or self.task in {None, asyncio.current_task()}
        ):
            return
        self._cut_off = True
        self.task.cancel()
