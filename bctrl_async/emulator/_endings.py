"""The ends of runtimes, which come at once or some time after their stop."""

import asyncio
from collections.abc import Mapping

from bctrl_async.emulator._assertions import Target
from bctrl_async.emulator._contract import WireRuntime, time_after


class Endings:
    """The ends of an emulator's runtimes.

    Attributes:
        pending: The timer of each runtime that a stop is ending, in order of the stops.
    """

    def __init__(self, runtimes: Mapping[Target, WireRuntime]) -> None:
        self.pending: dict[Target, asyncio.TimerHandle] = {}
        self._runtimes = runtimes
        self._seconds: dict[Target, float] = {}

    def close(self) -> None:
        """End no more runtimes; those that were ending stay as they are."""
        for timer in self.pending.values():
            timer.cancel()

    def add(self, target: Target, seconds: float) -> None:
        """Set the time of a new runtime's stop, and forget the runtime it replaces."""
        self._seconds[target] = seconds
        # A timer is not cancelled here, because its loop may run in another thread.
        self.pending.pop(target, None)

    def stop(self, target: Target) -> None:
        """End a runtime once its stop has taken its time."""
        seconds = self._seconds[target]
        if not seconds:
            self.end(target, "stopped")
        # Another stop does not move the end.
        elif target not in self.pending:
            self.pending[target] = asyncio.get_running_loop().call_later(
                seconds, self._on_time, target, self._runtimes[target]
            )

    def _on_time(self, target: Target, runtime: WireRuntime) -> None:
        """End a runtime, unless it has failed or was replaced meanwhile."""
        if target in self.pending and self._runtimes[target] is runtime:
            self.end(target, "stopped")

    def end(self, target: Target, status: str) -> None:
        """End a runtime now."""
        self.pending.pop(target, None)
        runtime = self._runtimes[target]
        runtime["status"] = status
        runtime["summary"]["browserRunning"] = False
        runtime["updatedAt"] = time_after(runtime["createdAt"])
