"""Duplicates: a target that is in the input of a bulk stop twice is sent once.

Memory is bounded, by the limits below. A duplicate that is not found is sent: a stop is safe to
repeat.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import StopOutcome, StopResult, now

_IN_FLIGHT = None
"""Placeholder for an outcome that is not known yet."""

_STOPPED = frozenset({StopResult.STOPPED, StopResult.ALREADY_STOPPED})
"""Nearly every result: only it is remembered, not the outcome with its runtime."""
_MAX_TARGETS = 1_000_000
"""The targets that are remembered, with some 110 bytes for each."""
_MAX_OUTCOMES = 100_000
"""The outcomes that are remembered as a whole, with a kilobyte for each."""
_MAX_WAITING = 1_000
"""The duplicates of one target in flight beyond which no more is read: they are recorded at once,
in some 10 ms."""
_new_hash = blake2b(digest_size=16).copy
"""Returns a new hash, for less than the constructor with its many arguments."""
_POLL = 0.01
"""Seconds between two checks for room. A wake-up would fail in a loop that is closed."""


class Duplicates:
    """The targets that a run has begun, and the duplicates among those that it reads.

    A duplicate gets the outcome of the first of its kind: at once, or as soon as that is known. So
    it holds up no worker, and has an outcome however the run ends.
    """

    def __init__(self) -> None:
        self._firsts: dict[bytes, StopResult | StopOutcome | None] = {}
        self._in_flight: dict[int, bytes] = {}
        # The index of each duplicate whose first has no outcome yet, and the time it was read.
        self._waiting: dict[bytes, list[tuple[int, float]]] = {}
        self._undelivered: dict[int, list[StopOutcome]] = {}
        self._outcomes = 0
        self._full = 0

    @property
    def is_full(self) -> bool:
        """True if so many duplicates of a target wait that no more are to be read."""
        return self._full > 0

    @property
    def has_undelivered(self) -> bool:
        """True if there are outcomes that are to be delivered after that of the first."""
        return bool(self._undelivered)

    async def wait(self) -> None:
        """Wait until more duplicates may be read."""
        while self.is_full:  # noqa: ASYNC110 - see _POLL.
            await asyncio.sleep(_POLL)

    def begin(self, target: RuntimeRef, index: int) -> bool:
        """Remember a target; return False if it is a duplicate.

        Args:
            target: The target.
            index: Its index in the input.
        """
        key = _digest(target)
        if key in self._firsts:
            return False
        if len(self._firsts) < _MAX_TARGETS:
            self._firsts[key] = _IN_FLIGHT
            self._in_flight[index] = key
        return True

    def repeat(self, target: RuntimeRef, index: int, began: float) -> StopOutcome | None:
        """Return the outcome of a duplicate, or None if that of the first is not known.

        Args:
            target: A target that has begun.
            index: The index of the duplicate.
            began: The time at which it was read.
        """
        key = _digest(target)
        first = self._firsts[key]
        if first is _IN_FLIGHT:
            waiting = self._waiting.setdefault(key, [])
            waiting.append((index, began))
            self._full += len(waiting) == _MAX_WAITING
            return None
        return _repeated(first, target, index, began)

    def settle(self, outcome: StopOutcome) -> Sequence[StopOutcome]:
        """Return the outcomes of the duplicates that waited for this one."""
        # By the index: an invalid item may have the names of a target.
        key = self._in_flight.pop(outcome.index, None)
        if key is None:
            return ()
        is_plain = outcome.result in _STOPPED and not outcome.resumed
        first = outcome.result if is_plain else outcome
        if is_plain or self._outcomes < _MAX_OUTCOMES:
            self._firsts[key] = first
            self._outcomes += not is_plain
        else:
            del self._firsts[key]
        if key not in self._waiting:
            return ()
        waiting = self._waiting.pop(key)
        self._full -= len(waiting) >= _MAX_WAITING
        self._undelivered[outcome.index] = repeated = [
            _repeated(first, outcome.target, index, began) for index, began in waiting
        ]
        return repeated

    def undelivered(self, outcome: StopOutcome) -> Sequence[StopOutcome]:
        """Return once the outcomes that are to be delivered after that of the first."""
        return self._undelivered.pop(outcome.index, ())


def _digest(target: RuntimeRef) -> bytes:
    """Return a key of a target that is short, however long its names are."""
    workspace_id, alias = target
    key = _new_hash()
    # Neither name has a control character, or the target would be invalid.
    key.update(f"{workspace_id}\0{alias}".encode())
    return key.digest()


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
