"""Counts as lines and tables, and the words of the command."""

from collections import Counter
from copy import copy

from msgspec.structs import replace
from rich import box
from rich.table import Table

from bctrl_async import BctrlError, StopReport, StopResult
from bctrl_async.cli._output import print_error

MAX_SHOWN = 10
"""The number of targets that are shown one by one if they are invalid, or have no outcome."""
INPUT_LEFT = "the input was not read to its end"
_MEANINGS = {
    StopResult.STOPPED: "the server confirmed that it is stopped",
    StopResult.ACCEPTED: "accepted, not confirmed as stopped",
    StopResult.ALREADY_STOPPED: "nothing was running under the alias",
    StopResult.NOT_FOUND: "no such workspace or alias",
    StopResult.REJECTED: "the server said no to the end, or the target is none",
    StopResult.NOT_SENT: "no request was sent",
    StopResult.UNKNOWN: "no conclusive answer: it may have stopped",
}


def pluralize(count: int, noun: str) -> str:
    """Return a count with its noun, such as `1 stop` or `2,000 stops`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def escape(text: str) -> str:
    """Return visible text as it is, and any other, such as a space at its end, as a literal."""
    # The repr of an enum's member would be its Python name.
    text = str.__str__(text)
    is_visible = text and text.isprintable() and text == text.strip()
    return text if is_visible else ascii(text)


def describe(error: BctrlError) -> str:
    """Return the text of an error with a single advice, without the server's own."""
    shown = copy(error)
    if error.advice or error.default_advice:
        shown.hint = None
    return str(shown)


def summarize(report: StopReport, *, input_left: bool) -> str:
    """Return a report as one line, without the reason why it ended early."""
    return str(replace(report, ended_early=None)) + f"; {INPUT_LEFT}" * input_left


def print_read_error(error: OSError) -> None:
    """Report that an input could be opened, but not read to its end."""
    print_error(f"cannot read all targets: {error.strerror}")


def print_not_found(report: StopReport) -> None:
    """Print an error if targets were not found, and that is a failure."""
    missing = sum(outcome.result is StopResult.NOT_FOUND for outcome in report.failures)
    if missing:
        remedy = "check the workspace ids, the aliases and the base URL, or add --ignore-not-found"
        print_error(f"{missing:,} of {report.total:,} targets not found: {remedy}")


def format_counts(counts: Counter[StopResult]) -> str:
    """Return the counts that are not 0."""
    return ", ".join(f"{counts[result]:,} {result}" for result in StopResult if counts[result])


def counts_table(counts: Counter[StopResult]) -> Table:
    """Return a table of all results, with their counts and meanings."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("Result")
    table.add_column("Count", justify="right")
    table.add_column("Meaning")
    for result in StopResult:
        style = "" if counts[result] else "dim"
        table.add_row(result, str(counts[result]), _MEANINGS[result], style=style)
    return table
