"""The reasons of outcomes that need attention, so that each is explained once."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from bctrl_async import BctrlError, RuntimeRef, StopOutcome, StopResult

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


def reported_error(outcome: StopOutcome) -> BctrlError | None:
    """Return the error of an outcome, unless the status of its runtime says as much."""
    is_described = outcome.result is StopResult.ACCEPTED and outcome.runtime is not None
    return None if is_described else outcome.error


def _reason(outcome: StopOutcome) -> str:
    if outcome.resumed:
        return "from an earlier run"
    if (error := reported_error(outcome)) is not None:
        return reason_of(error)
    status = None if outcome.runtime is None else outcome.runtime.status
    return "not confirmed" if status is None else f"status {status}"


class Reasons:
    """The results and reasons so far, of which the first target is explained and others counted."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._reasons: dict[tuple[str, str], str] = {}
        self._named: defaultdict[tuple[str, str], list[RuntimeRef]] = defaultdict(list)

    def add(self, outcome: StopOutcome) -> str | None:
        """Add an outcome; return its reason if it was given before, else None."""
        reason, result = _reason(outcome), outcome.result.value
        # The same reason may name another time or port.
        key = result, _without_numbers("0", reason)
        if key not in self._counts and len(self._counts) >= _MAX_REASONS:
            key, reason = (result, _OTHER), _OTHER
        self._counts[key] += 1
        if self._counts[key] == 1:
            self._reasons[key] = reason
            return None
        if len(self._named[key]) < _MAX_NAMED:
            self._named[key].append(outcome.target)
        return reason

    def has(self, error: BctrlError) -> bool:
        """Return True if an outcome had this error."""
        return reason_of(error) in self._reasons.values()

    def repeated(self) -> Iterator[tuple[str, str, int, list[RuntimeRef]]]:
        """Yield result, reason, number and some of the targets that were not explained."""
        for key, count in self._counts.most_common():
            if count > 1:
                yield key[0], self._reasons[key], count - 1, self._named[key]
