"""The command `report`: what journals have of the targets of a list."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Annotated

import typer
from msgspec.structs import replace

from bctrl_async import RuntimeState, StopResult
from bctrl_async.cli._exit_codes import FAILED
from bctrl_async.cli._format import (
    INPUT_LEFT,
    MAX_SHOWN,
    format_counts,
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
from bctrl_async.cli._records import OutputFormat, OutputOption
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
    output = Output()
    printer = OutcomePrinter(
        output,
        None,
        shows_unsent=True,
        prints_json=output_format is OutputFormat.JSON,
        complete="add -o json",
    )
    targets, bad = None, list[BadLine]()
    if file is not None:
        items = open_targets(context, file, allow_empty=allow_empty)
        try:
            listed = _collected(items)
        except OSError as error:
            print_read_error(error)
            return FAILED
        targets = [item for item in listed if not isinstance(item, BadLine)]
        bad = [item for item in listed if isinstance(item, BadLine)]
    counts: Counter[StopResult] = Counter()
    done = 0
    for outcome in read_journals(journals, targets, max_age=journal_max_age):
        counts[outcome.result] += 1
        if ignore_not_found and outcome.result is StopResult.NOT_FOUND:
            outcome = replace(outcome, state=RuntimeState.NOT_RUNNING, error=None)  # noqa: PLW2901
        done += outcome.ok
        printer.print(outcome)
    printer.finish()
    _print_bad(bad)
    total = counts.total() + len(bad)
    parts = [f"{done:,} of {total:,} done", f"{counts.total() - done:,} pending"]
    parts += [f"{len(bad):,} invalid"] * bool(bad)
    summary = f"{', '.join(parts)}: {format_counts(counts) or 'no target'}"
    summary += f"; {INPUT_LEFT}" * any(line.ends_input for line in bad)
    if output_format is OutputFormat.JSON:
        print_info(summary)
    else:
        output.print_result(summary, wrap=True)
    if targets is None:
        print_info("A journal does not know which targets it lacks: add --from FILE")
        return FAILED
    return 0 if done == total and not output.write_failed else FAILED


def _print_bad(lines: Sequence[BadLine]) -> None:
    for line in (*lines[:MAX_SHOWN], *(line for line in lines[MAX_SHOWN:] if line.ends_input)):
        print_error(f"invalid target {line!r}: {line}")


def _collected(items: list[Item] | AsyncIterator[Item]) -> Iterable[Item]:
    """Return the items of a list, each target once."""

    async def collect(awaited: AsyncIterator[Item]) -> list[Item]:
        return [item async for item in awaited]

    read = items if isinstance(items, list) else asyncio.run(collect(items))
    return dict.fromkeys(read)
