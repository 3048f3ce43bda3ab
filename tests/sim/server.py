"""The server of a run: an emulator whose stops take time, and whose lists may fail."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from enum import StrEnum
from typing import Any, NamedTuple, cast

from aiohttp import web
from support.wire_faults import WireEmulator

from bctrl_async.emulator import Fault, Reply
from bctrl_async.emulator._contract import Route, WireRuntime
from bctrl_async.emulator._faults import reply_of
from bctrl_async.emulator._replies import Payload
from sim.exchange import Target
from sim.starts import OtherProgram


class ListFault(StrEnum):
    """A fault of the list of a workspace."""

    LATE = "late"
    """The list as it was up to two timeouts ago."""
    PARTIAL = "partial"
    """The first half, with a cursor."""
    UNREADABLE = "unreadable"
    """A body that is not JSON."""
    UNREADABLE_ITEM = "unreadable item"
    """A runtime whose status is a number."""
    DUPLICATE = "duplicate"
    """Beside each runtime an older one of the same alias, which has ended."""
    ERROR = "error"
    """An error status."""


_ERRORS = (403, 429, 500, 503)
"""Statuses of a list; a 401 would end the run."""


LIST_TROUBLES = (
    Fault.BAD_GATEWAY,
    Fault.DROP_BEFORE,
    Fault.HANG,
    Fault.RATE_LIMITED,
)
"""Faults of lists while stops and GETs are answered."""


class ListTrouble(NamedTuple):
    """A fault that the next lists have; all of them if their number is inf."""

    fault: Fault
    lists: float


class SimulatedServer(WireEmulator):
    """An emulator whose stops take time, and whose lists may fail.

    A stop that takes time is answered with the runtime, which is active until then. A
    fault says what became of the runtime, so a stop that meets one takes effect at
    once.

    Args:
        stop_seconds: The seconds that the stop of a target takes, 0 by default.
        list_faults: The probability of each fault of a list, at most 1 together.
        list_trouble: The trouble of lists, if any.
        good_lists: The number of lists before the first that may fail.
        timeout: The timeout of the client.
        options: The other arguments of an emulator.

    Attributes:
        ended_at: The times at which runtimes were stopped.
        lists: The number of lists that were served by their fault, None for none.
        other: A program that starts runtimes meanwhile.
    """

    def __init__(
        self,
        *,
        stop_seconds: dict[Target, float],
        list_faults: dict[ListFault, float],
        good_lists: int,
        timeout: float,
        list_trouble: ListTrouble | None = None,
        seed: int,
        **options: Any,  # noqa: ANN401 - an emulator has them.
    ) -> None:
        super().__init__(seed=seed, **options)
        self.ended_at: dict[Target, float] = {}
        self.lists: Counter[ListFault | None] = Counter()
        self._stop_seconds = stop_seconds
        self._list_faults = list_faults
        self._good_lists = good_lists
        self._list_trouble = list_trouble
        self._troubled = 0
        self._timeout = timeout
        self._stopping: set[Target] = set()
        self.other: OtherProgram | None = None
        self._list_random = random.Random(f"lists {seed}")

    def _stop(self, target: Target, fault: Fault | Reply | None) -> bool:
        if self.other is not None:
            self.other.on_stop()
        seconds = self._stop_seconds.get(target, 0.0)
        if fault is not None or not seconds or self.status(*target) != "active":
            return super()._stop(target, fault)
        if target not in self._stopping:
            self._stopping.add(target)
            asyncio.get_running_loop().call_later(seconds, self._end, target)
        return True

    def _end(self, target: Target) -> None:
        self._stopping.discard(target)
        self.ended_at[target] = asyncio.get_running_loop().time()
        super()._stop(target, None)

    def id_of(self, target: Target) -> str:
        """Return the id of a runtime, whatever its status is."""
        return self._runtimes[target]["id"]

    def take_back(self, target: Target) -> None:
        """Let a runtime that has ended run again, under its id."""
        self._runtimes[target]["status"] = "active"
        self._stopped.discard(target)

    def _decide(
        self, request: web.BaseRequest, route: Route
    ) -> tuple[Fault | Reply | None, Reply]:
        if self.other is not None and route.operation == "list":
            self.other.before_list()
        fault, reply = super()._decide(request, route)
        if route.operation != "list" or reply.status != 200:
            return fault, reply
        if self._lists_are_good():
            self.lists[None] += 1
            return fault, reply
        trouble = self._list_trouble
        if trouble is not None and self._troubled < trouble.lists:
            self._troubled += 1
            payload = cast("Payload", reply.body)
            return trouble.fault, reply_of(trouble.fault, payload, is_conflict=False)
        list_fault = self._draw_list_fault()
        self.lists[list_fault] += 1
        if list_fault is ListFault.LATE:
            request[_DELAY] = self._list_random.uniform(0.1, 2.0) * self._timeout
        elif list_fault is not None:
            reply = self._bad_list(list_fault, cast("Payload", reply.body)["runtimes"])
        return fault, reply

    def _lists_are_good(self) -> bool:
        """Return True for the lists before those that may fail."""
        # The list before the first stop may be lost, and is asked for again.
        is_first = self.other is not None and not self.other.has_begun
        return is_first or self.lists.total() < self._good_lists

    def _draw_list_fault(self) -> ListFault | None:
        shares = [self._list_faults.get(fault, 0.0) for fault in ListFault]
        choices: list[ListFault | None] = [*ListFault, None]
        return self._list_random.choices(choices, [*shares, 1.0 - sum(shares)])[0]

    def _bad_list(self, fault: ListFault, runtimes: list[WireRuntime]) -> Reply:
        rng = self._list_random
        body: dict[str, object] = {"runtimes": runtimes}
        if fault is ListFault.ERROR:
            return Reply(rng.choice(_ERRORS))
        if fault is ListFault.UNREADABLE:
            return Reply(200, body='{"runtimes": [', headers=_JSON)
        if fault is ListFault.PARTIAL:
            half = runtimes[: len(runtimes) // 2]
            body = {"runtimes": half, "nextCursor": "half"}
        elif fault is ListFault.UNREADABLE_ITEM:
            number = rng.randrange(len(runtimes))
            body["runtimes"] = [
                {**runtime, "status": 5} if place == number else runtime
                for place, runtime in enumerate(runtimes)
            ]
        else:
            earlier = [{**runtime, **_EARLIER} for runtime in runtimes]
            body["runtimes"] = rng.choice([earlier + runtimes, runtimes + earlier])
        return Reply(200, body=body)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        response = await super()._serve(request)
        delay = request.get(_DELAY, 0.0)
        if delay:
            await asyncio.sleep(delay)
        return response


_DELAY = web.RequestKey("list_delay", float)
"""The key under which a request for a list keeps the delay of its answer."""
_EARLIER = {
    "createdAt": "2025-01-01T00:00:00.000Z",
    "id": str(uuid.UUID(int=1)),
    "status": "stopped",
}
"""An earlier runtime, which has ended."""
_JSON = {"Content-Type": "application/json"}
