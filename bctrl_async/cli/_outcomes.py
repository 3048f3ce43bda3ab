"""Outcomes as lines or records: each reason is explained once, and then counted."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from bctrl_async import BctrlError, RuntimeRef, RuntimeState, StopOutcome, StopResult
from bctrl_async.cli._output import (
    MAX_SHOWN,
    Output,
    describe,
    escape,
    is_quiet,
    one_line,
    print_info,
)

_MAX_ALIAS_WIDTH = 28
_MAX_NAME = 100
_MAX_REASONS = 20
"""The number of reasons that are told apart: a server may put an id into each message."""
_OTHER = "other reasons"
_MAX_NAMED = 3
_ANSWERED = frozenset({StopResult.ACCEPTED, StopResult.NOT_FOUND})
_RESULT_WIDTH = max(len(result) for result in StopResult)
_without_numbers = re.compile(r"\d+").sub


class OutcomePrinter:
    """A printer of outcomes, as lines or records.

    Each of `aliases` gets a line. Without them, only attempted targets that may run are shown: the
    first for each reason with a line, the others counted. `complete` says where all of them are.
    """

    def __init__(
        self,
        output: Output,
        aliases: Sequence[str] | None,
        *,
        shows_unsent: bool = False,
        prints_json: bool = False,
        complete: str = "",
    ) -> None:
        self._output = output
        self._shows_unsent = shows_unsent
        self._prints_json = prints_json
        self._complete = complete
        self._prints_all = aliases is not None
        self._invalid = 0
        # By result and reason, which may name another time or port each time.
        self._counts: Counter[tuple[str, str]] = Counter()
        self._reasons: dict[tuple[str, str], str] = {}
        self._named: defaultdict[tuple[str, str], list[RuntimeRef]] = defaultdict(list)
        widest = max((cell_len(escape(alias)) for alias in aliases or ()), default=_MAX_ALIAS_WIDTH)
        self._width = min(widest, _MAX_ALIAS_WIDTH)

    def print(self, outcome: StopOutcome) -> None:
        """Print an outcome."""
        if self._prints_json:
            self._output.print_object(outcome.to_dict())
        elif self._needs_attention(outcome) or (self._prints_all and not is_quiet.get()):
            detail = self._detail(outcome)
            if detail is not None:
                self._print_line(outcome, detail)

    def _needs_attention(self, outcome: StopOutcome) -> bool:
        """Return True if a target was attempted and its runtime may still run."""
        not_attempted = outcome.result is StopResult.NOT_SENT and not outcome.attempts
        return not outcome.ok and (self._shows_unsent or not not_attempted)

    def _detail(self, outcome: StopOutcome) -> str | None:
        """Return the text of a line, None if there is none for this target."""
        if outcome.state is RuntimeState.INVALID and not self._prints_all:
            self._invalid += 1
            return _describe(outcome) if self._invalid <= MAX_SHOWN else None
        if outcome.state in {RuntimeState.INVALID, RuntimeState.NOT_RUNNING}:
            return _describe(outcome)
        reason, result = _reason(outcome), outcome.result.value
        key = result, _without_numbers("0", reason)
        if key not in self._counts and len(self._counts) >= _MAX_REASONS:
            key, reason = (result, _OTHER), _OTHER
        self._counts[key] += 1
        self._reasons.setdefault(key, reason)
        is_first = self._counts[key] == 1
        if not is_first and len(self._named[key]) < _MAX_NAMED:
            self._named[key].append(outcome.target)
        if is_first or (self._prints_all and _reported_error(outcome) is None):
            return _describe(outcome)
        return reason if self._prints_all else None

    def has_explained(self, error: BctrlError) -> bool:
        """Return True if an outcome with this error was printed, with its advice."""
        return _summary(error) in self._reasons.values()

    def finish(self) -> None:
        """Print the targets that got no line since their reasons had been given."""
        leaves_out = False
        for key, count in self._counts.most_common():
            if self._prints_all or not self._named[key]:
                continue
            names = [self._name(t) for t in self._named[key]]
            more = count - 1 - len(names)
            listed = ", ".join(names) + (f" and {more:,} more" if more else "")
            line = f"{count - 1:,} more {key[0]} ({one_line(self._reasons[key])}): {listed}"
            self._output.print_result(line)
            leaves_out = leaves_out or more > 0
        if self._complete and leaves_out:
            print_info(f"All of them: {self._complete}")
        if self._invalid > MAX_SHOWN:
            print_info(f"{self._invalid - MAX_SHOWN:,} more invalid targets are not shown")

    def _print_line(self, outcome: StopOutcome, detail: str) -> None:
        is_stopped = outcome.ok and outcome.result is not StopResult.ACCEPTED
        name = self._name(outcome.target)
        name += " " * (self._width - cell_len(name))
        result = (f"{outcome.result:<{_RESULT_WIDTH}}", "green" if is_stopped else "yellow")
        detail = one_line(detail)
        self._output.print_result(Text.assemble(name, "  ", result, "  ", detail))

    def _name(self, target: RuntimeRef) -> str:
        alias = escape(target.alias)
        if len(alias) > _MAX_NAME:
            alias = f"{alias[:_MAX_NAME]}..."
        if self._prints_all or not target.workspace_id:
            return alias
        return f"{escape(target.workspace_id)} {alias}"


def _summary(error: BctrlError) -> str:
    """Return an error in a few words, without its target and its advice."""
    if error.status is not None and error.code is not None:
        return f"{error.status} {error.code}"
    return error.summary.partition(": ")[0]


def _reported_error(outcome: StopOutcome) -> BctrlError | None:
    """Return the error of an outcome, unless the status of its runtime says as much."""
    is_described = outcome.result is StopResult.ACCEPTED and outcome.runtime is not None
    return None if is_described else outcome.error


def _reason(outcome: StopOutcome) -> str:
    if outcome.resumed:
        return "from an earlier run"
    if (error := _reported_error(outcome)) is not None:
        return _summary(error)
    status = None if outcome.runtime is None else outcome.runtime.status
    return "not confirmed" if status is None else f"status {escape(status)}"


def _describe(outcome: StopOutcome) -> str:
    if outcome.resumed:
        return "from the journal of an earlier run, not sent again"
    facts = []
    error = _reported_error(outcome)
    if error is None:
        facts.append(f"{outcome.elapsed:.2f} s")
        if outcome.attempts > 1:
            facts.append(f"{outcome.attempts} attempts")
    if outcome.result is not StopResult.STOPPED and outcome.runtime is not None:
        facts.append(f"status {escape(outcome.runtime.status)} ({outcome.state.text})")
    if error is not None:
        # A class's default advice assumes a failed stop; show it only then.
        has_advice = outcome.result not in _ANSWERED or error.advice is not None
        facts.append(describe(error, with_subject=False) if has_advice else error.summary)
    return ", ".join(facts)
