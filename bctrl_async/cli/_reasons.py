"""The reasons of outcomes that need attention, so that each is explained once."""

import re
from dataclasses import dataclass, field

from bctrl_async import BctrlError, RuntimeRef, StopOutcome

_MAX_REASONS = 20
"""The number of reasons that are told apart: a server may put an id into each message."""
_OTHER = "other reasons"
_MAX_NAMED = 3
_without_numbers = re.compile(r"\d+").sub


def reason_of(error: BctrlError) -> str:
    """Return an error in a few words, without its target and its advice."""
    if error.status is not None and error.code is not None:
        return f"{error.status} {error.code}"
    return error.summary.partition(": ")[0]


def _reason(outcome: StopOutcome) -> str:
    if outcome.resumed:
        return "from an earlier run"
    if outcome.error is not None:
        return reason_of(outcome.error)
    status = None if outcome.runtime is None else outcome.runtime.status
    return "not confirmed" if status is None else f"status {status}"


@dataclass
class Group:
    """The targets that have a result for one reason, but for the first of them.

    Attributes:
        result: The result.
        reason: The reason in a few words.
        count: The number of targets.
        first: The first few of them.
    """

    result: str
    reason: str
    count: int = 0
    first: list[RuntimeRef] = field(default_factory=list)


class Reasons:
    """The reasons so far."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], Group] = {}

    def add(self, outcome: StopOutcome) -> str | None:
        """Add an outcome; return its reason if it was given before, else None."""
        reason = _reason(outcome)
        # The same reason may name another time or port.
        key = outcome.result.value, _without_numbers("0", reason)
        group = self._groups.get(key)
        if group is None and len(self._groups) >= _MAX_REASONS:
            key = outcome.result.value, _OTHER
            group = self._groups.get(key)
            reason = _OTHER
        if group is None:
            self._groups[key] = Group(outcome.result.value, reason)
            return None
        group.count += 1
        if len(group.first) < _MAX_NAMED:
            group.first.append(outcome.target)
        return reason

    def has(self, error: BctrlError) -> bool:
        """Return True if an outcome had this error."""
        reason = reason_of(error)
        return any(group.reason == reason for group in self._groups.values())

    def repeated(self) -> list[Group]:
        """Return the reasons of more than one target, the most frequent first."""
        groups = (group for group in self._groups.values() if group.count)
        return sorted(groups, key=lambda group: group.count, reverse=True)
