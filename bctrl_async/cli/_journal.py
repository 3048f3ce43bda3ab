"""The command `journal`."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec
import typer

from bctrl_async import BctrlConfigError, StopOutcome, StopResult
from bctrl_async.cli._command import Command, Group
from bctrl_async.cli._exit_codes import FAILED
from bctrl_async.cli._format import escape, format_counts, pluralize
from bctrl_async.cli._output import Output
from bctrl_async.cli._records import OutputFormat, OutputOption, Records
from bctrl_async.cli._redirects import check_redirects
from bctrl_async.journal import JournalContent, read_journal
from bctrl_async.outcomes import is_only_accepted

journal: typer.Typer = typer.Typer(cls=Group, rich_markup_mode=None)

_File = Annotated[str, typer.Argument(metavar="FILE", help="The journal.")]
_COLUMNS = (
    *("file", "base_url", "started", "updated", "age", "targets"),
    *(f"counts.{result}" for result in StopResult),
    *("pending", "complete", "torn"),
)


@journal.callback(invoke_without_command=True)
def _top(context: typer.Context) -> None:
    """Inspect the journal of a bulk stop."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


@journal.command("show", cls=Command)
def show(file: _File, *, output_format: OutputOption = OutputFormat.TABLE) -> int:
    """Show the server, age and results of a journal.

    A pending target is sent again by a resumed run: it was not stopped, or only
    accepted and may still be running. FILE is only read, and may be in use by a run.
    """
    check_redirects([("FILE", file)])
    content = read_journal(file)
    if content is None:
        raise BctrlConfigError(f"the journal {file!r} is empty: no run has begun it")
    output = Output()
    records = Records.of(output, output_format, _COLUMNS)
    if records is not None:
        records.print(_fields(content))
    else:
        for name, text in _rows(content):
            output.print_result(f"{name:<12}{output.escape_unencodable(text)}")
    return FAILED if output.write_failed else 0


def _count(outcomes: Iterable[StopOutcome]) -> Counter[StopResult]:
    return Counter(outcome.result for outcome in outcomes)


def _fields(content: JournalContent) -> dict[str, object]:
    counts = _count(content.outcomes.values())
    return {
        "file": str(content.path),
        "base_url": content.base_url,
        "started": msgspec.to_builtins(content.started),
        "updated": msgspec.to_builtins(content.updated),
        "age": content.age.total_seconds(),
        "targets": len(content.outcomes),
        "counts": {result: counts[result] for result in StopResult},
        "pending": content.pending,
        "complete": content.is_complete,
        "torn": content.is_torn,
    }


def _rows(content: JournalContent) -> Iterator[tuple[str, str]]:
    yield "server", escape(content.base_url)
    yield "started", f"{msgspec.to_builtins(content.started)}, {content.age_text}"
    yield "last entry", msgspec.to_builtins(content.updated) or "none"
    known = content.not_running
    pending = (o for target, o in content.outcomes.items() if target not in known)
    yield "targets", _total(_count(content.outcomes.values()))
    yield "pending", _total(_count(pending))
    yield "complete", _complete(content) if content.is_complete else _incomplete(content)
    if content.is_torn:
        yield "torn", "the last line is cut short: a run is writing it, or a crash cut it off"


def _incomplete(content: JournalContent) -> str:
    unread = [escape(origin) for origin in sorted(content.unread)]
    if content.cut_off:
        unread.append(f"a list of {pluralize(content.cut_off, 'target')}")
    return f"no, not read to the end: {'; '.join(unread)}" if unread else "no"


def _complete(content: JournalContent) -> str:
    text = "yes, the last run read its whole input and"
    outcomes = content.outcomes.values()
    # A run leaves them if it does not poll, or is interrupted while it polls.
    left = sum(map(is_only_accepted, outcomes))
    return f"{text} left {left:,} that may still be running" if left else f"{text} had no failures"


def _total(counts: Counter[StopResult]) -> str:
    """Return the total of counts, followed by those that are not 0."""
    return ": ".join(filter(None, (f"{counts.total():,}", format_counts(counts))))
