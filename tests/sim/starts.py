"""Another program, which starts runtimes while a bulk stop goes on."""

from __future__ import annotations

import asyncio
import random
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from sim.exchange import Target

if TYPE_CHECKING:
    from sim.server import SimulatedServer


class Way(StrEnum):
    """A way to start a runtime."""

    NEW_ALIAS = "under a new alias"
    NEW_ID = "under an alias whose runtime has ended"
    SAME_ID = "under the id of a runtime that has ended"


class Occasion(StrEnum):
    """An occasion to start a runtime."""

    TIME = "some time after the first stop"
    BEFORE_LIST = "before a list, once all targets have ended"
    AFTER_LIST = "after such a list"


class Start(NamedTuple):
    """A start of a runtime that a seed decides."""

    way: Way
    occasion: Occasion
    delay: float
    number: int


class Started(NamedTuple):
    """A runtime that was started."""

    time: float
    target: Target
    id: str


def draw_starts(rng: random.Random) -> list[Start]:
    """Draw starts of every way and occasion."""
    return [
        Start(
            rng.choice(list(Way)),
            rng.choice(list(Occasion)),
            10 ** rng.uniform(-2.5, 1.0),
            rng.randrange(1000),
        )
        for _ in range(rng.randint(1, 5))
    ]


class OtherProgram:
    """A program that starts runtimes of a workspace.

    It begins with the first stop, since what it starts before may become a target.

    Attributes:
        started: The runtimes that it has started.
        lists: The times of the lists since it began.
        has_begun: True once a stop was received.
    """

    def __init__(
        self,
        starts: list[Start],
        workspace: str,
        targets: list[Target],
        server: SimulatedServer,
    ) -> None:
        self.started: list[Started] = []
        self.lists: list[float] = []
        self._starts = starts
        self._workspace = workspace
        self._targets = [target for target in targets if target[0] == workspace]
        self._server = server
        self.has_begun = False

    def on_stop(self) -> None:
        """Begin, if this is the first stop."""
        if self.has_begun:
            return
        self.has_begun = True
        for start in self._starts:
            if start.occasion is Occasion.TIME:
                loop = asyncio.get_running_loop()
                loop.call_later(start.delay, self._start, start)

    def before_list(self) -> None:
        """Start what is to be started before the last list."""
        if not self.has_begun:
            return
        is_last = all(
            self._server.status(*target) != "active" for target in self._targets
        )
        for start in self._starts:
            if is_last and start.occasion is Occasion.BEFORE_LIST:
                self._start(start)
            elif is_last and start.occasion is Occasion.AFTER_LIST:
                asyncio.get_running_loop().call_soon(self._start, start)
        self.lists.append(asyncio.get_running_loop().time())

    def _start(self, start: Start) -> None:
        target = self._target(start)
        if target is None:
            return
        if start.way is Way.SAME_ID:
            self._server.take_back(target)
        else:
            self._server.add_runtime(*target)
        now = asyncio.get_running_loop().time()
        self.started.append(Started(now, target, self._server.id_of(target)))

    def _target(self, start: Start) -> Target | None:
        """Return where to start a runtime; None if none has ended there."""
        if start.way is Way.NEW_ALIAS:
            return self._workspace, f"new{start.number}"
        target = self._targets[start.number % len(self._targets)]
        return None if self._server.status(*target) in {None, "active"} else target
