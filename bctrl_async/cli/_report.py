"""The command `report`: what journals have of the targets of a list."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterable, Iterable
from typing import Annotated

import typer
from msgspec.structs import replace

from bctrl_async import RuntimeRef, RuntimeState, StopOutcome, StopResult
from bctrl_async.cli._exit_codes import FAILED
from bctrl_async.cli._format import (
    INPUT_LEFT,
    MAX_SHOWN,
    escape,
    format_counts,
    pluralize,
    print_read_error,
)
from bctrl_async.cli._lines import BadLine, Item
from bctrl_async.cli._options import (
    AllowEmpty,
    IgnoreNotFound,
    JournalMaxAge,
    check_not_empty,
    target_option,
)
from bctrl_async.cli._outcomes import OutcomePrinter
from bctrl_async.cli._output import Output, print_error, print_info
from bctrl_async.cli._records import OutputFormat, OutputOption, print_json, target_fields
from bctrl_async.cli._targets import open_targets
from bctrl_async.journal import read_journals

_Journals = Annotated[
    list[str], typer.Argument(metavar="JOURNAL", help="The journals, such as night-*.jsonl.")
]
_File = Annotated[
    str | None,
    target_option(
        "--from",
        metavar="FILE",
        callback=check_not_empty,
        help="Say of each target in FILE whether it is done; - is stdin.",
    ),
]

EXAMPLES = """
Examples:
  bctrl-async report night-*.jsonl --from runtimes.csv
"""


def report(
    context: typer.Context,
    journals: _Journals,
    *,
    file: _File = None,
    allow_empty: AllowEmpty = False,
    journal_max_age: JournalMaxAge = None,
    ignore_not_found: IgnoreNotFound = False,
    output_format: OutputOption = OutputFormat.TABLE,
) -> int:
    """Say which targets of a list are done, by the journals of one or more runs.

    A target is done if its runtime no longer runs. Any other is pending: stop the list again,
    with the same journals. Without --from, the outcomes are only counted, for a journal does
    not know which targets it lacks. A JOURNAL is only read, and may be in use by a run.

    Exit codes: 0 every target in FILE is done, 1 some are pending or there is no FILE,
    2 usage error, or a JOURNAL that is not intact.
    """
    if allow_empty and file is None:
        context.fail("--allow-empty needs --from")
    items = None if file is None else open_targets(context, file, allow_empty=allow_empty)
    outcomes = {each.target: each for each in read_journals(journals, max_age=journal_max_age)}
    output = Output()
    prints_json = output_format is OutputFormat.JSON
    account = _Account(output, missing_ok=ignore_not_found, prints_json=prints_json)
    try:
        listed = None if items is None else _collected(items)
    except OSError as error:
        print_read_error(error)
        return FAILED
    if listed is None:
        for outcome in outcomes.values():
            account.add(outcome)
    else:
        for index, item in enumerate(listed):
            if isinstance(item, BadLine):
                account.add_invalid(item)
            elif (found := outcomes.get(item)) is None:
                account.add_missing(index, item)
            else:
                account.add(replace(found, index=index))
    return account.finish(has_list=listed is not None)


class _Account:
    """The targets so far."""

    def __init__(self, output: Output, *, missing_ok: bool, prints_json: bool) -> None:
        self._output = output
        self._missing_ok = missing_ok
        self._prints_json = prints_json
        self._printer = OutcomePrinter(
            output, None, prints_json=prints_json, complete="add -o json"
        )
        self._counts: Counter[StopResult] = Counter()
        self._done = self._invalid = self._missing = 0
        self._input_left = False

    def add(self, outcome: StopOutcome) -> None:
        """Add a target that has an outcome."""
        self._counts[outcome.result] += 1
        if self._missing_ok and outcome.result is StopResult.NOT_FOUND:
            outcome = replace(outcome, state=RuntimeState.NOT_RUNNING, error=None)
        self._done += outcome.ok
        self._printer.print(outcome)

    def add_missing(self, index: int, target: RuntimeRef) -> None:
        """Add a target that is in no journal."""
        self._missing += 1
        if self._prints_json:
            unknown = {"result": None, "ok": False, "state": RuntimeState.UNCONFIRMED}
            print_json(self._output, {"index": index, **target_fields(target), **unknown})
        elif self._missing <= MAX_SHOWN:
            name = f"{escape(target.workspace_id)} {escape(target.alias)}"
            self._output.print_result(f"{self._output.escape_unencodable(name)}  in no journal")

    def add_invalid(self, line: BadLine) -> None:
        """Add a line of the list that is not a target."""
        self._invalid += 1
        self._input_left |= line.ends_input
        if self._invalid <= MAX_SHOWN or line.ends_input:
            print_error(f"invalid target {line!r}: {line}")

    def finish(self, *, has_list: bool) -> int:
        """Print the summary, and return the exit code."""
        self._printer.finish()
        if self._missing > MAX_SHOWN and not self._prints_json:
            more = pluralize(self._missing - MAX_SHOWN, "more target")
            print_info(f"{more} in no journal: add -o json")
        total = self._counts.total() + self._missing + self._invalid
        pending = total - self._done - self._invalid
        counts = [format_counts(self._counts)]
        counts += [f"{self._missing:,} in no journal"] * bool(self._missing)
        parts = [f"{self._done:,} of {total:,} done", f"{pending:,} pending"]
        parts += [f"{self._invalid:,} invalid"] * bool(self._invalid)
        summary = f"{', '.join(parts)}: {', '.join(filter(None, counts)) or 'no target'}"
        summary += f"; {INPUT_LEFT}" * self._input_left
        if self._prints_json:
            print_info(summary)
        else:
            self._output.print_result(summary, wrap=True)
        if not has_list:
            print_info("A journal does not know which targets it lacks: add --from FILE")
        is_done = has_list and self._done == total
        return 0 if is_done and not self._output.write_failed else FAILED


def _collected(items: Iterable[Item] | AsyncIterable[Item]) -> Iterable[Item]:
    """Return the items of a list, each target once."""

    async def collect(awaited: AsyncIterable[Item]) -> list[Item]:
        return [item async for item in awaited]

    read = asyncio.run(collect(items)) if isinstance(items, AsyncIterable) else items
    return dict.fromkeys(read)
