"""Duplicates: a target that is in the input of a bulk stop twice is sent once."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Generic, TypeVar

import msgspec

from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import StopOutcome, StopResult, now

_T = TypeVar("_T")
_Waiting = list[tuple[int, float]]
"""The index of each duplicate whose first has no outcome yet, and the time it was read."""

_STOPPED = frozenset({StopResult.STOPPED, StopResult.ALREADY_STOPPED})
"""Nearly every result: only it is remembered, not the outcome with its runtime."""


class Remembering(Generic[_T]):
    """A stream in which a target that occurs twice is sent once, as in an input with a length.

    Args:
        items: The stream, as an async iterator.
        limit: The number of items that are remembered, with some 200 bytes for each. Duplicates of
            later ones are sent.

    Attributes:
        limit: This number.
    """

    def __init__(self, items: AsyncIterator[_T], limit: int) -> None:
        self._items = items
        self.limit = limit

    def __aiter__(self) -> AsyncIterator[_T]:
        return self._items


class Duplicates:
    """The targets that a run has begun, and the duplicates among those that it reads.

    A duplicate gets the outcome of the first of its kind: at once, or as soon as that is known. So
    it holds up no worker, and has an outcome however the run ends.
    """

    def __init__(self) -> None:
        self._firsts: dict[object, StopResult | StopOutcome | _Waiting] = {}
        self._undelivered: dict[RuntimeRef, list[StopOutcome]] = {}

    def __contains__(self, target: RuntimeRef) -> bool:
        return target in self._firsts

    def begin(self, target: RuntimeRef, item: object) -> None:
        """Remember a target, the first of its kind.

        Args:
            target: The target.
            item: The item of the input that it was made from.
        """
        # A list often has plain tuples, which are in memory already.
        is_plain = type(item) is tuple and item == target
        self._firsts[item if is_plain else target] = []

    def repeat(self, target: RuntimeRef, index: int, began: float) -> StopOutcome | None:
        """Return the outcome of a duplicate, or None if that of the first is not known.

        Args:
            target: A target that has begun.
            index: The index of the duplicate.
            began: The time at which it was read.
        """
        first = self._firsts[target]
        if isinstance(first, list):
            first.append((index, began))
            return None
        return _repeated(first, target, index, began)

    def settle(self, outcome: StopOutcome) -> Iterator[StopOutcome]:
        """Yield the outcomes of the duplicates that waited for this one."""
        target = outcome.target
        waiting = self._firsts.get(target)
        if not isinstance(waiting, list):
            return
        is_plain = outcome.result in _STOPPED and not outcome.resumed
        self._firsts[target] = first = outcome.result if is_plain else outcome
        for index, began in waiting:
            repeated = _repeated(first, target, index, began)
            self._undelivered.setdefault(target, []).append(repeated)
            yield repeated

    def undelivered(self, outcome: StopOutcome) -> list[StopOutcome]:
        """Return once the outcomes that are to be delivered after that of the first."""
        return [] if outcome.duplicate else self._undelivered.pop(outcome.target, [])


def _repeated(
    first: StopResult | StopOutcome, target: RuntimeRef, index: int, began: float
) -> StopOutcome:
    elapsed = time.monotonic() - began
    if isinstance(first, StopOutcome):
        return msgspec.structs.replace(
            first, index=index, attempts=0, elapsed=elapsed, at=now(), duplicate=True
        )
    return StopOutcome(
        index=index, target=target, result=first, attempts=0, elapsed=elapsed, duplicate=True
    )
