"""Outcomes as lines or records."""

import textwrap
from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from bctrl_async import BctrlError, RuntimeRef, RuntimeState, StopOutcome, StopResult
from bctrl_async.cli._format import MAX_SHOWN, describe, escape
from bctrl_async.cli._lines import ends_input
from bctrl_async.cli._output import Output, one_line, print_info
from bctrl_async.cli._reasons import Reasons, reported_error
from bctrl_async.cli._records import print_json
from bctrl_async.errors import subject_of

_MAX_ALIAS_WIDTH = 28
_MIN_DETAIL_WIDTH = 50
_INDENT = 4
_ANSWERED = frozenset({StopResult.ACCEPTED, StopResult.NOT_FOUND})
_RESULT_WIDTH = max(len(result) for result in StopResult)


class OutcomePrinter:
    """Prints outcomes as lines or records.

    On a terminal a long line wraps within its last column; in a file it never wraps.

    Args:
        output: The output to print to.
        aliases: The aliases to align the lines to, each of which gets one. None if they are not
            known: only attempted targets that are not known to be not running are shown then, the
            first for each reason with a line.
        shows_unsent: Show targets that were not attempted, too.
        prints_json: Print every outcome as a line of JSON instead.
        complete: Where all outcomes are, for those that got no line.
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
        self._reasons = Reasons()
        self._prints_all = aliases is not None
        self._invalid = 0
        widest = max((cell_len(escape(alias)) for alias in aliases or ()), default=_MAX_ALIAS_WIDTH)
        self._width = min(widest, _MAX_ALIAS_WIDTH)

    def print(self, outcome: StopOutcome) -> None:
        """Print an outcome."""
        state = outcome.state
        if self._prints_json:
            print_json(self._output, outcome.to_dict())
        elif self._prints_all or (
            self._needs_attention(outcome) and self._is_shown(outcome, state)
        ):
            is_stopped = (
                state is RuntimeState.NOT_RUNNING and outcome.result is not StopResult.ACCEPTED
            )
            detail = self._detail(outcome, state)
            if detail is not None:
                self._print_line(outcome.target, outcome.result, detail, is_good=is_stopped)

    def _detail(self, outcome: StopOutcome, state: RuntimeState) -> str | None:
        """Return the text of a line, None if there is none for this target."""
        if state in {RuntimeState.INVALID, RuntimeState.NOT_RUNNING}:
            return _describe(outcome, state)
        given = self._reasons.add(outcome)
        if given is None or (self._prints_all and reported_error(outcome) is None):
            return _describe(outcome, state)
        return given if self._prints_all else None

    def has_explained(self, error: BctrlError) -> bool:
        """Return True if an outcome with this error was printed, with its advice."""
        return not self._prints_json and self._reasons.has(error)

    def finish(self) -> None:
        """Print the targets that got no line."""
        if not self._prints_all:
            self._print_groups()
        if self._invalid > MAX_SHOWN:
            print_info(f"{self._invalid - MAX_SHOWN:,} more invalid targets are not shown")

    def _print_groups(self) -> None:
        """Print the targets that got no line since their reasons had been given."""
        leaves_out = False
        for result, reason, count, first in self._reasons.repeated():
            names = [self._output.escape_unencodable(self._name(target)) for target in first]
            more = count - len(names)
            listed = ", ".join(names) + (f" and {more:,} more" if more else "")
            line = f"{count:,} more {result} ({one_line(reason)}): {listed}"
            self._output.print_result(line, wrap=True)
            leaves_out = leaves_out or more > 0
        if self._complete and leaves_out:
            print_info(f"All of them: {self._complete}")

    def _needs_attention(self, outcome: StopOutcome) -> bool:
        """Return True if a target was attempted and its runtime may still run."""
        not_attempted = outcome.result is StopResult.NOT_SENT and not outcome.attempts
        return not outcome.ok and (self._shows_unsent or not not_attempted)

    def _is_shown(self, outcome: StopOutcome, state: RuntimeState) -> bool:
        """Return True unless it is one of very many invalid targets."""
        if state is not RuntimeState.INVALID or ends_input(outcome):
            return True
        self._invalid += 1
        return self._invalid <= MAX_SHOWN

    def _print_line(self, target: RuntimeRef, result: str, detail: str, *, is_good: bool) -> None:
        name = self._output.escape_unencodable(self._name(target))
        name += " " * (self._width - cell_len(name))
        detail = self._output.escape_unencodable(one_line(detail))
        if self._output.on_terminal:
            detail = self._wrapped(detail, self._width + _RESULT_WIDTH + 4)
        padding = "" if detail.startswith("\n") else " " * (_RESULT_WIDTH - len(result) + 2)
        styled = (result, "green" if is_good else "yellow")
        self._output.print_result(Text.assemble(name, "  ", styled, padding, detail))

    def _wrapped(self, detail: str, indent: int) -> str:
        """Wrap the last column of a line, or put it below if that would be too narrow."""
        room = self._output.width - indent
        start = ""
        if room < min(len(detail), _MIN_DETAIL_WIDTH):
            indent = _INDENT
            room = max(self._output.width, _MIN_DETAIL_WIDTH) - indent
            start = f"\n{' ' * indent}"
        lines = textwrap.wrap(detail, room, break_on_hyphens=False, break_long_words=False)
        return start + f"\n{' ' * indent}".join(lines)

    def _name(self, target: RuntimeRef) -> str:
        alias = escape(target.alias)
        if self._prints_all or not target.workspace_id:
            return alias
        return f"{escape(target.workspace_id)} {alias}"


def _describe(outcome: StopOutcome, state: RuntimeState) -> str:
    if outcome.resumed:
        return "from the journal of an earlier run, not sent again"
    facts = []
    error = reported_error(outcome)
    if error is None:
        facts.append(f"{outcome.elapsed:.2f} s")
        if outcome.attempts > 1:
            facts.append(f"{outcome.attempts} attempts")
    if outcome.result is not StopResult.STOPPED and outcome.runtime is not None:
        facts.append(f"status {escape(outcome.runtime.status)} ({state.text})")
    if error is not None:
        # The advice of a class of errors is that of a stop that failed.
        has_advice = outcome.result not in _ANSWERED or error.advice is not None
        facts.append(
            describe(error).removeprefix(subject_of(error)) if has_advice else error.summary
        )
    return ", ".join(facts)
