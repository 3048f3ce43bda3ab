"""The chunks of a bulk stop on a cluster, and the outcome of each target in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from bctrl_async._calls.call import annotate
from bctrl_async._http.request import STOP
from bctrl_async.dask._messages import Known
from bctrl_async.errors import BctrlError
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import RuntimeState, StopOutcome, StopResult

_SETTLED = frozenset(
    {StopResult.STOPPED, StopResult.ACCEPTED, StopResult.ALREADY_STOPPED, StopResult.NOT_FOUND}
)
_REPEATABLE = "Stop it again: a stop is safe to repeat"


class Chunk:
    """Targets that one worker stops, or several one after the other if workers die.

    The first settled outcome of a target stays. An unsettled one is kept until the chunk has ended:
    it is replaced if the chunk is repeated.

    Args:
        number: The number of the chunk.
        indices: The index in the input of each target.
        targets: The targets.
        tries: The times that these targets were handed out, with this one.

    Attributes:
        number: The number of the chunk.
        targets: The targets.
        tries: The times that these targets were handed out.
        has_begun: True once a worker may have sent a request.
    """

    def __init__(
        self, number: int, indices: Sequence[int], targets: Sequence[RuntimeRef], tries: int = 1
    ) -> None:
        self.number = number
        self.tries = tries
        self.targets = targets
        self.has_begun: bool = False
        self._indices = indices
        self._open: dict[int, StopOutcome | None] = dict.fromkeys(range(len(targets)))
        self._doubtful: set[int] = set()

    @property
    def open(self) -> int:
        """The number of targets without a settled outcome."""
        return len(self._open)

    @property
    def is_known(self) -> bool:
        """True if each target has an outcome."""
        return None not in self._open.values()

    def again(self, number: int) -> Chunk:
        """Return another chunk with the targets of this one, which is left without any."""
        self._open.clear()
        return Chunk(number, self._indices, self.targets, self.tries + 1)

    def begin(self) -> None:
        """Record that a worker begins the chunk, perhaps after another one has died."""
        if self.has_begun:
            self._doubtful.update(
                number
                for number, outcome in self._open.items()
                if outcome is None or outcome.result is StopResult.UNKNOWN
            )
        self.has_begun = True

    def add(self, known: Iterable[Known]) -> Iterator[StopOutcome]:
        """Add outcomes; yield those to record, which are the first settled ones."""
        for each in known:
            if each.number not in self._open:
                continue
            outcome = each.outcome(self._indices[each.number], self.targets[each.number])
            if each.result in _SETTLED:
                del self._open[each.number]
                yield outcome
            else:
                self._open[each.number] = outcome

    def end(self, reason: BctrlError) -> Iterator[StopOutcome]:
        """Yield the outcomes of all other targets, now that there will be no further ones.

        Args:
            reason: Why some may have none.
        """
        not_sent = BctrlError(f"not sent: {reason.summary}")
        rest, self._open = self._open, {}
        for number, outcome in rest.items():
            if outcome is None:
                error = self._lost(number, reason) if self.has_begun else not_sent
                yield StopOutcome(
                    state=RuntimeState.UNCONFIRMED,
                    index=self._indices[number],
                    target=self.targets[number],
                    result=StopResult.UNKNOWN if self.has_begun else StopResult.NOT_SENT,
                    error=error,
                    attempts=0,
                )
            elif number in self._doubtful and outcome.error is not None:
                # The worker that died may have sent it.
                outcome.error.may_have_stopped = True
                yield msgspec.structs.replace(outcome, result=StopResult.UNKNOWN)
            else:
                yield outcome

    def _lost(self, number: int, reason: BctrlError) -> BctrlError:
        error = BctrlError(
            f"no outcome came back: {reason.summary}", advice=_REPEATABLE, may_have_stopped=True
        )
        annotate(error, STOP.name, *self.targets[number])
        return error
