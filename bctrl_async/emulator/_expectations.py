"""Stops that a test expects, compared with those that the emulator received."""

import difflib
import itertools
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence

from bctrl_async.emulator._arguments import check_type
from bctrl_async.emulator._faults import Fault
from bctrl_async.emulator._requests import ReceivedRequest
from bctrl_async.emulator._runtimes import WireRuntime

Target = tuple[str, str]

_MAX_NAMES = 5
_MAX_LINES = 20


def targets_of(workspace_id: str, aliases: Sequence[str]) -> list[Target]:
    """Return the targets that a test names.

    Raises:
        ValueError: There is none, or a name is not text.
    """
    if not aliases:
        raise ValueError("no alias is given: name the runtimes, each as an argument")
    for name, value in [("workspace_id", workspace_id), *(("alias", alias) for alias in aliases)]:
        check_type(name, value, str)
    return [(workspace_id, alias) for alias in dict.fromkeys(aliases)]


class StopLog:
    """The stops that an emulator received, by target.

    Args:
        runtimes: The emulator's runtimes.
        ended: Those of them that a stop has ended.
        stops: The requests that were stops.
    """

    def __init__(
        self,
        runtimes: Mapping[Target, WireRuntime],
        ended: Container[Target],
        stops: Iterable[ReceivedRequest],
    ) -> None:
        self._runtimes = runtimes
        self._ended = ended
        self._stops: defaultdict[Target, list[ReceivedRequest]] = defaultdict(list)
        for stop in stops:
            self._stops[stop.workspace_id or "", stop.alias or ""].append(stop)

    def explain_not_stopped(self, expected: Sequence[Target], *, only: bool) -> str:
        """Explain how the stopped runtimes differ from the expected ones; empty if they do not.

        Args:
            expected: The runtimes that must be stopped.
            only: True if a stop of any other runtime is a difference too.
        """
        names = set(expected)
        missing = [target for target in expected if not self._is_stopped(target)]
        others = [target for target in self._stops if target not in names]
        headings = {
            "not stopped": missing,
            "stops received of others": others if only else [],
        }
        met = [target for target in expected if self._is_stopped(target)]
        return self._explain(headings, {"-": missing, "+": others, " ": met})

    def explain_stopped(self, unexpected: Sequence[Target]) -> str:
        """Explain which of some runtimes a stop ended, or were never added; empty if none is."""
        stopped = [target for target in unexpected if target in self._ended]
        unknown = [target for target in unexpected if target not in self._runtimes]
        headings = {"stopped": stopped, "unknown": unknown}
        return self._explain(headings, {"+": stopped, "-": unknown})

    def _explain(
        self, headings: Mapping[str, Sequence[Target]], marked: Mapping[str, Sequence[Target]]
    ) -> str:
        """Return a line for each target below a heading; empty if there is no heading."""
        heading = "; ".join(f"{text}: {_names(found)}" for text, found in headings.items() if found)
        if not heading:
            return ""
        lines = [(mark, target) for mark, targets in marked.items() for target in targets]
        others = marked["+"]
        shown = [
            f"  {mark} {self._describe(target, others)}" for mark, target in lines[:_MAX_LINES]
        ]
        return "\n".join([heading, *shown, *_more(lines, _MAX_LINES)])

    def _is_stopped(self, target: Target) -> bool:
        runtime = self._runtimes.get(target)
        return runtime is not None and runtime["status"] == "stopped" and target in self._stops

    def _describe(self, target: Target, others: Iterable[Target]) -> str:
        """Describe a runtime, its stops, and those of others with a similar name."""
        name = _name(target)
        if target in self._runtimes:
            text = f"{name}: {self._runtimes[target]['status']}"
        elif similar := _similar(target, self._runtimes):
            text = f"{name}: never added, but {_name(similar)} was"
        else:
            text = f"{name}: never added"
        if stops := self._stops.get(target):
            return f"{text}; {_answers(stops)}"
        if similar := _similar(target, others):
            return f"{text}; no stop received, but one of {_name(similar)}"
        return f"{text}; no stop received"


def _similar(target: Target, candidates: Iterable[Target]) -> Target | None:
    """Return the candidate of which a target may be a misspelling."""
    workspace_id, alias = target
    found = list(candidates)
    in_workspace = [name for workspace, name in found if workspace == workspace_id]
    for similar in difflib.get_close_matches(alias, in_workspace, n=1):
        return workspace_id, similar
    return next((candidate for candidate in found if candidate[1] == alias), None)


def _answers(stops: Sequence[ReceivedRequest]) -> str:
    """Return the answers to the stops of a runtime, such as `429 (rate_limited) 2 times`."""
    texts = []
    for answer, group in itertools.groupby(map(_answer, stops)):
        count = len(list(group))
        texts.append(answer if count == 1 else f"{answer} {count} times")
    return f"answered {', '.join(texts)}"


def _answer(stop: ReceivedRequest) -> str:
    status = "not at all" if stop.status is None else str(stop.status)
    if stop.fault is None:
        return status
    return f"{status} ({stop.fault if isinstance(stop.fault, Fault) else 'a Reply'})"


def _name(target: Target) -> str:
    workspace_id, alias = target
    return f"{alias!r} in {workspace_id!r}"


def _names(targets: Sequence[Target]) -> str:
    return ", ".join([*map(_name, targets[:_MAX_NAMES]), *_more(targets, _MAX_NAMES)])


def _more(items: Sequence[object], shown: int) -> list[str]:
    """Return how many items are not shown, if any."""
    return [f"and {len(items) - shown} more"] if len(items) > shown else []
