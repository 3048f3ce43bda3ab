"""The command `report`: the outcomes of several journals, compared with a list of targets."""

import asyncio
from collections.abc import AsyncIterable, Iterable, Sequence
from typing import Annotated

import typer
from msgspec.structs import replace

from bctrl_async import RuntimeRef, RuntimeState
from bctrl_async.cli._exit_codes import FAILED
from bctrl_async.cli._format import (
    MAX_SHOWN,
    escape,
    pluralize,
    print_not_found,
    summarize,
)
from bctrl_async.cli._items import BadLine, Item
from bctrl_async.cli._options import (
    check_positive,
    duration,
    from_option,
    run_option,
    target_option,
)
from bctrl_async.cli._outcomes import OutcomePrinter
from bctrl_async.cli._output import Output, print_info, print_warning
from bctrl_async.cli._records import (
    OutputFormat,
    OutputOption,
    Records,
    outcome_fields,
    target_fields,
)
from bctrl_async.cli._redirects import check_redirects
from bctrl_async.cli._targets import open_targets, print_read_error
from bctrl_async.errors import quote
from bctrl_async.journal import JournalOutcome, MergedJournals, merge_journals
from bctrl_async.outcomes import OutcomeRecord, StopOutcome

_Journals = Annotated[
    list[str], typer.Argument(metavar="JOURNAL", help="The journals, such as night-*.jsonl.")
]
_File = Annotated[str | None, from_option(help="Compare with the targets in FILE; - is stdin.")]
_JournalMaxAge = Annotated[
    float | None,
    run_option(
        "--journal-max-age",
        metavar="AGE",
        parser=duration,
        callback=check_positive,
        help="Reject a JOURNAL begun longer ago than AGE.",
    ),
]
_AllowEmpty = Annotated[
    bool, target_option("--allow-empty", metavar="", help="Accept a FILE without targets.")
]
_IgnoreNotFound = Annotated[
    bool,
    run_option("--ignore-not-found", metavar="", help="Do not count not_found as a failure."),
]
_MAX_NAMED = 3
"""The number of targets that a warning names."""

EXAMPLES = """
Examples:
  bctrl-async report night-*.jsonl --from runtimes.csv
"""


def report(
    context: typer.Context,
    journals: _Journals,
    *,
    file: _File = None,
    allow_empty: _AllowEmpty = False,
    journal_max_age: _JournalMaxAge = None,
    ignore_not_found: _IgnoreNotFound = False,
    output_format: OutputOption = OutputFormat.TABLE,
) -> int:
    """Report on the journals of several runs, such as those of shards.

    Each target counts once, with the outcome that says most about its runtime.
    With --from, only the targets in FILE count, also those without an outcome.
    Without it, each JOURNAL must be complete, and there must be one of each shard.
    A JOURNAL is only read, and may be in use by a run.

    Exit codes: 0 none is running, 1 some are or may be, also without an outcome,
    2 usage error, or a JOURNAL that is not intact.
    """
    if allow_empty and file is None:
        context.fail("--allow-empty needs --from")
    check_redirects([("--from", file), *(("JOURNAL", journal) for journal in journals)])
    items = None if file is None else open_targets(context, file, allow_empty=allow_empty)
    merged = merge_journals(journals, max_age=journal_max_age)
    output = Output()
    records = Records.of_outcomes(output, output_format, "journals")
    printer = OutcomePrinter(
        output,
        None,
        missing_ok=ignore_not_found,
        records=records,
        to_fields=_unlisted_fields if items is None else outcome_fields,
        complete="add -o json or csv",
    )
    account = _Account(merged, printer, output, records)
    if items is None:
        account.add_all()
    else:
        try:
            account.add_listed(_collected(items))
        except OSError as error:
            print_read_error(error)
            return FAILED
    account.print_warnings()
    return account.print_summary(missing_ok=ignore_not_found)


class _Account:
    """The targets that count, and their outcomes.

    Args:
        merged: The journals.
        printer: Prints the outcomes.
        output: The output to print to.
        records: Prints all outcomes as records; None to print lines.
    """

    def __init__(
        self,
        merged: MergedJournals,
        printer: OutcomePrinter,
        output: Output,
        records: Records | None,
    ) -> None:
        self._merged = merged
        self._printer = printer
        self._output = output
        self._records = records
        self._outcomes: dict[RuntimeRef, JournalOutcome] = {}
        self._missing: set[RuntimeRef] = set()
        self._duplicates = 0
        self._input_left = False
        self._unlisted: Sequence[JournalOutcome] = ()
        self._has_list = False

    def add_all(self) -> None:
        """Count and print all outcomes."""
        for target, outcome in self._merged.outcomes.items():
            self._outcomes[target] = outcome
            self._printer.print(outcome)

    def add_listed(self, items: Iterable[Item]) -> None:
        """Count and print the outcomes of a list, and the targets that have none."""
        self._has_list = True
        for index, item in enumerate(items):
            target = _key(item)
            self._input_left |= isinstance(item, BadLine) and item.ends_input
            if target in self._outcomes or target in self._missing:
                self._duplicates += 1
            elif (outcome := self._merged.outcomes.get(target)) is None:
                self._add_missing(target, index)
            else:
                # Not the equal names of the item: those of the outcome are in memory already.
                self._outcomes[outcome.target] = outcome
                self._printer.print(replace(outcome, index=index))
        self._unlisted = [
            outcome
            for target, outcome in self._merged.outcomes.items()
            if target not in self._outcomes
        ]
        if self._records is not None:
            self._records.print_all(map(_unlisted_fields, self._unlisted))

    def _add_missing(self, target: RuntimeRef, index: int) -> None:
        self._missing.add(target)
        if self._records is not None:
            self._records.print(_missing_fields(target, index))
        elif len(self._missing) <= MAX_SHOWN:
            self._printer.print_missing(target)

    def print_warnings(self) -> None:
        """Print on stderr what the lines and the summary do not say."""
        self._printer.finish()
        if self._records is None and len(self._missing) > MAX_SHOWN:
            more = len(self._missing) - MAX_SHOWN
            print_info(f"{more:,} more targets without an outcome are not shown: add -o json")
        if self._unlisted:
            names = _named([outcome.target for outcome in self._unlisted])
            print_warning(f"{pluralize(len(self._unlisted), 'outcome')} not in the list: {names}")
        repeated = self._merged.repeated
        if repeated:
            paths = self._merged.outcomes[repeated[0]].journals
            print_warning(
                f"{pluralize(len(repeated), 'target')} in two journals: {_named(repeated)} "
                f"(the first in {' and '.join(escape(str(path)) for path in paths[:2])})"
            )

    def print_summary(self, *, missing_ok: bool) -> int:
        """Print the summary, and return the exit code."""
        of_outcomes = replace(self._merged, outcomes=self._outcomes).report(missing_ok=missing_ok)
        total = len(self._outcomes) + len(self._missing)
        whole = replace(of_outcomes, total=total)
        if whole.ended_early is not None:
            print_warning(str(whole.ended_early))
        summary = summarize(whole, input_left=self._input_left, missing=len(self._missing))
        if self._duplicates:
            summary += f"; {pluralize(self._duplicates, 'duplicate')} in the list"
        summary += f"; {self._journals_text()}"
        if self._records is None:
            self._output.print_result(summary, wrap=True)
        else:
            print_info(summary)
        print_not_found(whole)
        # An input that is not read to its end has a line that is invalid, or has no outcome.
        all_ended = whole.states[RuntimeState.NOT_RUNNING] == total
        # Without a list, only complete journals show that there are no further targets.
        is_whole = self._has_list or whole.ended_early is None
        return 0 if all_ended and is_whole and not self._output.write_failed else FAILED

    def _journals_text(self) -> str:
        count = len(self._merged.paths)
        text = pluralize(count, "journal")
        if count > 1:
            repeated = len(self._merged.repeated)
            text += f", {pluralize(repeated, 'target') if repeated else 'no target'} in two of them"
        return text


def _collected(items: Iterable[Item] | AsyncIterable[Item]) -> Iterable[Item]:
    async def collect(awaited: AsyncIterable[Item]) -> list[Item]:
        return [item async for item in awaited]

    return asyncio.run(collect(items)) if isinstance(items, AsyncIterable) else items


def _key(item: Item) -> RuntimeRef:
    """Return the target of an item as journals have it."""
    return RuntimeRef("", quote(item)) if isinstance(item, BadLine) else item


def _named(targets: Sequence[RuntimeRef]) -> str:
    names = [f"{escape(ref.workspace_id)} {escape(ref.alias)}" for ref in targets[:_MAX_NAMED]]
    more = len(targets) - _MAX_NAMED
    return ", ".join(names) + (f" and {more:,} more" if more > 0 else "")


def _unlisted_fields(outcome: StopOutcome) -> dict[str, object]:
    return outcome_fields(outcome) | {"index": None}


def _missing_fields(target: RuntimeRef, index: int) -> dict[str, object]:
    fields: dict[str, object] = dict.fromkeys(OutcomeRecord.__struct_fields__)
    fields |= target_fields(target) | {"index": index, "attempts": 0}
    return fields | {"resumed": False, "journals": []}
