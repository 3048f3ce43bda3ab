"""How the command shows what became of the stops: lines, JSON, a bar and a table."""

import json
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import msgspec
from msgspec.structs import asdict
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bctrl_async import Runtime, RuntimeRef, StopOutcome, StopReport, StopResult
from bctrl_async.outcomes import OutcomeRecord

_WIDEST_ALIAS = 28
_NARROWEST_DETAIL = 20
_RESULT_WIDTH = max(len(result) for result in StopResult)
_MEANINGS = {
    StopResult.STOPPED: "the server says that it is stopped",
    StopResult.ACCEPTED: "taken, but not said to be done",
    StopResult.ALREADY_STOPPED: "nothing was running under the alias",
    StopResult.NOT_FOUND: "there is no such workspace or alias",
    StopResult.REJECTED: "the final answer was no",
    StopResult.NOT_SENT: "the request never reached the server",
    StopResult.UNKNOWN: "no answer settled it: it may have stopped",
}


def print_error(message: str) -> None:
    """Print an error as one line on stderr."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print_info(f"bctrl-async: error: {line}")


def print_info(line: str) -> None:
    """Print on stderr what is worth knowing and no result."""
    # `print` would take a stderr that the shell has closed (None) for stdout.
    if sys.stderr is not None:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - rich would wrap it.


def print_question(question: str) -> None:
    """Print a question on stderr, and stay on its line."""
    # Beside the results, which may go to a file.
    print(question, end="", file=sys.stderr, flush=True)  # noqa: T201 - rich would wrap it.


def stdout_failed(error: OSError) -> None:
    """Say that results cannot be written, and why."""
    _discard_stdout()
    print_error(f"cannot write to stdout: {error.strerror}")


def _discard_stdout() -> None:
    # What is still buffered goes nowhere at exit, where to write it would fail once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Output(Console):
    """Stdout, for results.

    Once nobody can read them any more (`| head`, a full disk) it falls silent and the stops go on.

    Attributes:
        write_failed: Whether results were lost although somebody wants them.
    """

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False, emoji=False)
        self.write_failed = False

    def print_result(self, what: str | Text | Table, *, wrap: bool = False) -> None:
        """Print a result.

        Args:
            what: The result; text stays one line, however long.
            wrap: Whether a terminal may break it between words.
        """
        try:
            self.print(what, soft_wrap=not (isinstance(what, Table) or (wrap and self.on_terminal)))
        except OSError as error:
            self.quiet = self.write_failed = True
            stdout_failed(error)

    def on_broken_pipe(self) -> None:
        """Fall silent; rich's own way is to exit, which would leave stops without an account."""
        self.quiet = True
        _discard_stdout()

    @property
    def on_terminal(self) -> bool:
        """Whether a person looks at it, whatever FORCE_COLOR says."""
        return self.file.isatty() and not self.is_dumb_terminal

    def progress_console(self) -> tuple[Console, bool]:
        """Return where progress is shown, and whether it can be drawn over there."""
        errors = Console(stderr=True)
        if not (errors.file.isatty() and not errors.is_dumb_terminal):
            return errors, False
        # On one screen both must be drawn by the same hand.
        return (self if self.on_terminal else errors), True

    def escape_unencodable(self, text: str) -> str:
        """Escape what the terminal's encoding lacks: it must not end the run."""
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def end_line(self) -> None:
        """Begin a new line after the ^C that a terminal shows."""
        if self.on_terminal:
            self.print_result("")


class OutcomePrinter:
    """A line for each outcome, which on a terminal wraps under itself and in a file never does.

    Args:
        output: Where they go.
        aliases: Those that they are about, which are aligned; None if they are not known, and not
            of one workspace.
    """

    def __init__(
        self, output: Output, aliases: Sequence[str] | None, *, json: bool = False
    ) -> None:
        self._output = output
        self._json = json
        self._with_workspace = aliases is None
        widest = max((cell_len(escape(alias)) for alias in aliases or ()), default=_WIDEST_ALIAS)
        self._width = min(widest, _WIDEST_ALIAS)

    def print(self, outcome: StopOutcome) -> None:
        """Print the line of one outcome, unless there is nothing to do about it in a long list."""
        if self._json:
            self._output.print_result(outcome_json(outcome))
            return
        not_begun = outcome.result is StopResult.NOT_SENT and not outcome.attempts
        if self._with_workspace and (outcome.result.settled or not_begun):
            return
        name = self._output.escape_unencodable(self._name(outcome.target))
        name += " " * (self._width - cell_len(name))
        detail = self._output.escape_unencodable(_describe(outcome))
        if self._output.on_terminal:
            indent = self._width + _RESULT_WIDTH + 4
            room = max(self._output.width - indent, _NARROWEST_DETAIL)
            detail = f"\n{' ' * indent}".join(textwrap.wrap(detail, room, break_on_hyphens=False))
        style = "green" if outcome.result.settled else "yellow"
        result = (outcome.result.ljust(_RESULT_WIDTH), style)
        self._output.print_result(Text.assemble(name, "  ", result, "  ", detail))

    def _name(self, target: RuntimeRef) -> str:
        alias = escape(target.alias)
        if not self._with_workspace or not target.workspace_id:
            return alias
        return f"{escape(target.workspace_id)} {alias}"


def pluralize(count: int, noun: str) -> str:
    """How many there are of something, such as `1 stop` or `2,000 stops`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def escape(text: str) -> str:
    """The text as it is, but nothing that would steer a terminal, cannot be encoded or be seen."""
    return text if text and text.isprintable() else ascii(text)


def _describe(outcome: StopOutcome) -> str:
    if outcome.resumed:
        return "by an earlier run, as the journal has it; not sent again"
    error = outcome.error
    if error is not None:
        if outcome.result.settled:
            return error.summary
        name = f"stop of {error.alias!r} in workspace {error.workspace_id!r}: "
        return str(error).removeprefix(name)
    facts = [f"{outcome.elapsed:.2f} s"]
    if outcome.attempts > 1:
        facts.append(f"{outcome.attempts} attempts")
    if outcome.result is StopResult.ACCEPTED and outcome.runtime is not None:
        facts.append(f"status {outcome.runtime.status!s}")
    return ", ".join(facts)


def outcome_json(outcome: StopOutcome) -> str:
    """Format an outcome as a line of JSON in ASCII, with the runtime in the API's spelling."""
    record = OutcomeRecord.of(outcome)
    fields = asdict(record) | {"runtime": msgspec.to_builtins(record.runtime)}
    if record.error is not None:
        fields["error"] = asdict(record.error) | {"message": str(outcome.error)}
    return json.dumps(fields)


def target_json(target: RuntimeRef) -> str:
    """One target, as `--from` reads it."""
    return json.dumps({"workspace_id": target.workspace_id, "alias": target.alias})


def runtime_json(workspace: str, runtime: Runtime) -> str:
    """One listed runtime, in ASCII, as `--from` reads it, with all that the API says of it."""
    fields = {
        "workspace_id": workspace,
        "alias": runtime.alias,
        "status": runtime.status,
        "kind": runtime.kind,
        "created_at": runtime.created_at,
        "runtime": msgspec.to_builtins(runtime),
    }
    return json.dumps(fields)


def print_runtimes(output: Output, runtimes: Sequence[Runtime]) -> None:
    """Print a table of runtimes: a line for each, which is never cut, with its alias last."""
    rows = [("STATUS", "KIND", "CREATED", "ALIAS")]
    rows += [
        (
            output.escape_unencodable(escape(runtime.status)),
            output.escape_unencodable(escape(runtime.kind)),
            output.escape_unencodable(escape(runtime.created_at)),
            output.escape_unencodable(escape(runtime.alias)),
        )
        for runtime in runtimes
    ]
    widths = [max(cell_len(row[column]) for row in rows) for column in range(3)]
    for *cells, alias in rows:
        padded = (
            cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)
        )
        output.print_result("  ".join([*padded, alias]))


def summarize(report: StopReport, *, input_left: bool = False) -> str:
    """All results in one line.

    Args:
        report: What became of the targets.
        input_left: Whether there may be more of them.
    """
    counts = report.counts
    settled = sum(count for result, count in counts.items() if result.settled)
    parts = [f"{settled:,} of {report.total:,} settled in {report.elapsed:.2f} s"]
    if counts:
        parts[0] += f": {format_counts(counts)}"
    if report.resumed:
        parts.append(f"{report.resumed:,} of them by an earlier run, and not sent again")
    if input_left:
        parts.append("the input was not read to its end")
    return "; ".join(parts)


def format_counts(counts: Counter[StopResult]) -> str:
    """The counts of those results that there are."""
    return ", ".join(f"{counts[result]:,} {result}" for result in StopResult if counts[result])


def counts_table(counts: Counter[StopResult]) -> Table:
    """What became of all stops: every result there is, and what it means."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    shown.add_column("Result")
    shown.add_column("Count", justify="right")
    shown.add_column("Settled")
    shown.add_column("What it means")
    for result in StopResult:
        settled = "yes" if result.settled else "no"
        style = "" if counts[result] else "dim"
        shown.add_row(result, str(counts[result]), settled, _MEANINGS[result], style=style)
    return shown
