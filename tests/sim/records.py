"""Records of a run, for the checks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bctrl_async import Runtime, StopOutcome, StopReport
from sim.exchange import Target

REACTION = 5
"""Steps of the loop until a cancellation or a signal has reached a run."""


class PlannedError(Exception):
    """Raised on purpose by an input or a callback."""


class Moment(NamedTuple):
    """The moment at which a run was ended from outside.

    Attributes:
        time: The time.
        step: The step of the loop.
        in_flight: The attempts that were in flight when the run knew it.
    """

    time: float
    step: int
    in_flight: int


class Recorded(NamedTuple):
    """An outcome, when it was recorded, and its runtime's true status then."""

    time: float
    step: int
    outcome: StopOutcome
    status: str | None


class Due(NamedTuple):
    """A moment at which the client was free to retry a stop that was throttled."""

    target: Target
    sent_at: float
    """The time at which the throttled attempt was sent."""
    time: float


@dataclass(eq=False)
class BulkRun:
    """The record of a bulk stop, for the checks."""

    items: list[object]
    before: dict[Target, str | None]
    after: dict[Target, str | None] = field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0
    first_exchange: int = 0
    last_exchange: int = 0
    recorded: list[Recorded] = field(default_factory=list)
    delivered: list[StopOutcome] = field(default_factory=list)
    due: list[Due] = field(default_factory=list)
    ended_at: Moment | None = None
    report: StopReport | None = None
    raised: BaseException | None = None
    interrupted: bool = False
    journal: Path | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0
    tasks_left: int = 0
    connections_left: int = 0
    settled_before: set[Target] = field(default_factory=set)
    resumes: bool = False
    ids: set[str] = field(default_factory=set)
    """The ids of the runtimes that ran when the run began."""
    runs_on: dict[Target, str] = field(default_factory=dict)
    """The ids of the runtimes that another program has started, and that run."""
    restarted: set[Target] = field(default_factory=set)
    """The targets whose runtimes another program has started meanwhile."""


@dataclass(eq=False)
class SingleCall:
    """The record of one `stop_runtime` or `get_runtime`, for the checks."""

    target: Target
    reads: bool
    stopped_ok: bool
    before: str | None
    cancel_after: float | None
    began: float = 0.0
    ended: float = 0.0
    result: Runtime | BaseException | None = None


def tear(path: Path, share: float) -> None:
    """Truncate a journal at any byte, as a crash does; one in five stays whole."""
    size = path.stat().st_size
    if share < 0.8:
        with path.open("r+b") as file:
            file.truncate(int(size * share / 0.8))


def settled_in(path: Path) -> set[Target]:
    """Return the targets whose runtimes have ended by the whole lines of a journal."""
    lines, _ = read_lines(path)
    last = {(line["workspace_id"], line["alias"]): line for line in lines}
    return {
        target
        for target, line in last.items()
        if line.get("ok") and line["result"] != "not_found"
    }


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the outcomes in a journal, and the number of damaged lines."""
    lines, damaged = [], 0
    for line in path.read_bytes().split(b"\n")[1:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            damaged += 1
    return lines, damaged


def is_correction(line: dict[str, Any]) -> bool:
    """Return True for the line of a runtime that a list has as running."""
    return line["result"] == "not_sent" and "was listed" in str(line.get("error"))
