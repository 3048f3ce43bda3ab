"""The traffic of the network: requests, their answers, and the fate of both."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

Target = tuple[str, str]


class Fate(Enum):
    """The fate of a request or an answer at the gateway."""

    PASS = "passes"
    ANSWER = "is answered by the gateway"
    RESET = "is lost by a reset"
    CLOSE = "is lost by a close"
    SILENCE = "is lost in silence"
    REPLACED = "is replaced by the gateway"


class Action(NamedTuple):
    """The action of the gateway on one request."""

    request: Fate = Fate.PASS
    answer: Fate = Fate.PASS
    delay: float = 0.0
    page: bytes = b""
    foreign: bool = False
    """True if the page is a gateway's, which proves nothing about the runtime."""


class Stray(NamedTuple):
    """An answer too many: when it is sent after a real answer, and its bytes."""

    moment: str
    page: bytes
    about: Target | None
    """The runtime that it names, None for an error, which names none."""


class Conditions(Protocol):
    """The faults of the network, as functions of a seed and the time."""

    cut: float
    refuse: float
    connect_silence: float
    half_open: float
    lookup_fails: float
    descriptors: float

    def latency(self, rng: random.Random) -> float: ...
    def reachable_at(self, when: float) -> float: ...
    def is_dead(self, when: float) -> bool: ...
    def decide(self, exchange: Exchange, rng: random.Random, now: float) -> Action: ...
    def stray(self, rng: random.Random) -> Stray | None: ...


@dataclass(eq=False)
class Exchange:
    """A request as the client wrote it, and its answer as far as it arrived.

    Attributes:
        status: The status, once the head of the answer was delivered.
        answered: The time at which the last byte was delivered.
        page: True if the gateway answered by itself.
        foreign: True if the answer is a gateway's, which proves nothing about the
            runtime.
        replacement: What the gateway answers in place of an answer that is lost.
    """

    connection: int
    method: str
    target: Target
    size: int
    written: float
    step: int
    passed: bool = False
    page: bool = False
    foreign: bool = False
    replacement: bytes = b""
    answer: Fate = Fate.PASS
    head: int = 0
    total: int = 0
    sent: int = 0
    delivered: int = 0
    coming: int = 0
    status: int | None = None
    answered: float | None = None

    @property
    def stops(self) -> bool:
        """True for a POST."""
        return self.method == "POST"

    @property
    def lists(self) -> bool:
        """True for the list of a workspace, which has no alias."""
        return not self.target[1]
