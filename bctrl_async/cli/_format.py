"""Outcomes and counts as lines and tables."""

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace
from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from bctrl_async import RuntimeRef, RuntimeState, StopOutcome, StopReport, StopResult
from bctrl_async.cli._items import ends_input
from bctrl_async.cli._output import Output, one_line, print_error, print_info
from bctrl_async.cli._records import Records, outcome_fields
from bctrl_async.errors import subject_of
from bctrl_async.outcomes import state_of

_MAX_ALIAS_WIDTH = 28
_MIN_DETAIL_WIDTH = 20
MAX_SHOWN = 10
"""The number of targets that are shown one by one if they are invalid, or have no outcome."""
INPUT_LEFT = "the input was not read to its end"
_RESULT_WIDTH = max(len(result) for result in StopResult)
_MEANINGS = {
    StopResult.STOPPED: "the server confirmed that it is stopped",
    StopResult.ACCEPTED: "accepted, not yet confirmed as stopped",
    StopResult.ALREADY_STOPPED: "nothing was running under the alias",
    StopResult.NOT_FOUND: "no such workspace or alias",
    StopResult.REJECTED: "rejected, throttled to the end, or invalid",
    StopResult.NOT_SENT: "not sent, or only throttled",
    StopResult.UNKNOWN: "no conclusive answer: it may have stopped",
}


class OutcomePrinter:
    """Prints outcomes as lines or records.

    On a terminal a long line wraps within its last column; in a file it never wraps.

    Args:
        output: The output to print to.
        aliases: The aliases to align the lines to, each of which gets one. None if they are not
            known: only attempted targets that are not known to be not running get a line then.
        missing_ok: Count `not_found` as not running.
        records: Prints every outcome as a record instead; None to print lines.
        to_fields: Returns the fields of that record.
    """

    def __init__(
        self,
        output: Output,
        aliases: Sequence[str] | None,
        *,
        missing_ok: bool = False,
        records: Records | None = None,
        to_fields: Callable[[StopOutcome], Mapping[str, object]] = outcome_fields,
    ) -> None:
        self._output = output
        self._missing_ok = missing_ok
        self._records = records
        self._to_fields = to_fields
        self._prints_all = aliases is not None
        self._invalid = 0
        widest = max((cell_len(escape(alias)) for alias in aliases or ()), default=_MAX_ALIAS_WIDTH)
        self._width = min(widest, _MAX_ALIAS_WIDTH)

    def print(self, outcome: StopOutcome) -> None:
        """Print an outcome."""
        state = state_of(outcome, missing_ok=self._missing_ok)
        if self._records is not None:
            self._records.print(self._to_fields(outcome))
        elif self._prints_all or (
            _needs_attention(outcome, state) and self._is_shown(outcome, state)
        ):
            is_stopped = (
                state is RuntimeState.NOT_RUNNING and outcome.result is not StopResult.ACCEPTED
            )
            self._print_line(
                outcome.target, outcome.result, _describe(outcome, state), is_good=is_stopped
            )

    def print_missing(self, target: RuntimeRef) -> None:
        """Print the line of a target that has no outcome."""
        self._print_line(target, "no outcome", "in no journal", is_good=False)

    def finish(self) -> None:
        """Print the header of CSV without rows, or the number of invalid targets without a line."""
        if self._records is not None:
            self._records.print_header()
        if self._invalid > MAX_SHOWN:
            print_info(f"{self._invalid - MAX_SHOWN:,} more invalid targets are not shown")

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
            indent = self._width + _RESULT_WIDTH + 4
            room = max(self._output.width - indent, _MIN_DETAIL_WIDTH)
            detail = f"\n{' ' * indent}".join(textwrap.wrap(detail, room, break_on_hyphens=False))
        styled = (result.ljust(_RESULT_WIDTH), "green" if is_good else "yellow")
        self._output.print_result(Text.assemble(name, "  ", styled, "  ", detail))

    def _name(self, target: RuntimeRef) -> str:
        alias = escape(target.alias)
        if self._prints_all or not target.workspace_id:
            return alias
        return f"{escape(target.workspace_id)} {alias}"


def _needs_attention(outcome: StopOutcome, state: RuntimeState) -> bool:
    """Return True if a target was attempted and may still be running."""
    not_attempted = outcome.result is StopResult.NOT_SENT and not outcome.attempts
    return not (state is RuntimeState.NOT_RUNNING or not_attempted)


def _describe(outcome: StopOutcome, state: RuntimeState) -> str:
    if outcome.resumed:
        return "from the journal of an earlier run, not sent again"
    if outcome.duplicate:
        return "a duplicate, sent once"
    facts = []
    error = outcome.error
    if error is None:
        facts.append(f"{outcome.elapsed:.2f} s")
        if outcome.attempts > 1:
            facts.append(f"{outcome.attempts} attempts")
    if outcome.result is not StopResult.STOPPED and outcome.runtime is not None:
        facts.append(f"status {escape(outcome.runtime.status)} ({state})")
    if error is not None:
        is_settled = outcome.result.settled
        facts.append(error.summary if is_settled else str(error).removeprefix(subject_of(error)))
    return ", ".join(facts)


def pluralize(count: int, noun: str) -> str:
    """Return a count with its noun, such as `1 stop` or `2,000 stops`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def escape(text: str) -> str:
    """Return printable text as it is, and any other text as an ASCII literal."""
    # The repr of an enum's member would be its Python name.
    text = str.__str__(text)
    return text if text and text.isprintable() else ascii(text)


def summarize(report: StopReport, *, input_left: bool = False, missing: int = 0) -> str:
    """Return a report as one line, without the reason why it ended early.

    Args:
        report: The report.
        input_left: True if the input was not read to its end.
        missing: The number of targets without an outcome.
    """
    parts = [str(replace(report, ended_early=None))]
    if missing:
        parts.append(f"{missing:,} without an outcome")
    if input_left:
        parts.append(INPUT_LEFT)
    return "; ".join(parts)


def print_not_found(report: StopReport) -> None:
    """Print an error if targets were not found, and that is a failure."""
    missing = sum(outcome.result is StopResult.NOT_FOUND for outcome in report.failures)
    if missing:
        print_error(
            f"{missing:,} of {report.total:,} targets not found: check the workspace ids, the "
            "aliases and the base URL, or add --ignore-not-found"
        )


def format_counts(counts: Counter[StopResult]) -> str:
    """Return the counts that are not 0."""
    return ", ".join(f"{counts[result]:,} {result}" for result in StopResult if counts[result])


def counts_table(counts: Counter[StopResult]) -> Table:
    """Return a table of all results, with their counts and meanings."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("Result")
    table.add_column("Count", justify="right")
    table.add_column("Settled")
    table.add_column("Meaning")
    for result in StopResult:
        settled = "yes" if result.settled else "no"
        style = "" if counts[result] else "dim"
        table.add_row(result, str(counts[result]), settled, _MEANINGS[result], style=style)
    return table
