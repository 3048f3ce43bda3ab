"""The command `report`: the targets of a list that its journals have as done."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bctrl_async import BctrlConfigError, RuntimeRef, StopOutcome, StopResult
from bctrl_async.cli import _options as opt, _output as out
from bctrl_async.cli._lines import BadLine, LineParser
from bctrl_async.cli._outcomes import OutcomePrinter
from bctrl_async.cli._targets import collect, open_targets
from bctrl_async.journal import read_journals
from bctrl_async.outcomes import accept_missing


def report(
    *journals: Annotated[
        opt.File, Parameter("JOURNAL", help="The journals, such as night-*.jsonl.")
    ],
    file: Annotated[
        opt.File | None,
        opt.in_files(help="Say of each target in FILE whether it is done; - is stdin."),
    ] = None,
    workspace: Annotated[
        opt.Text | None,
        opt.in_workspace(
            env_var="BCTRL_WORKSPACE", help="Workspace of a FILE of aliases only."
        ),
    ] = None,
    allow_empty: opt.AllowEmpty = False,
    journal_max_age: opt.JournalMaxAge = None,
    ignore_not_found: opt.IgnoreNotFound = False,
    output_format: opt.Format = "table",
    quiet: opt.Quiet = False,  # noqa: ARG001 - `main` applies it.
) -> int:
    """Say which targets of a list are done, by the journals of one or more runs.

    A target is done if its runtime no longer runs. Any other target is pending:
    stop the list again, with the same journals. Without --from, the outcomes
    are only counted, for a journal does not know which targets it lacks. A
    JOURNAL is only read, and may be in use by a run.

    Exit codes: 0 every target in FILE is done, 1 some are pending or there is
    no FILE, 2 usage error, or a JOURNAL that is not intact.

    For example:
      bctrl-async report night-*.jsonl --from runtimes.csv
    """
    if not journals:
        raise BctrlConfigError("nothing to report: add JOURNAL")
    if allow_empty and file is None:
        raise BctrlConfigError("--allow-empty needs --from")
    output = out.Output(prints_json=output_format == "json")
    targets = None
    bad_lines: list[BadLine] = []
    if file is not None:
        targets, bad_lines = _read_list(file, workspace, allow_empty=allow_empty)
    outcomes = read_journals(journals, targets, max_age=journal_max_age)
    if ignore_not_found:
        outcomes = (accept_missing(outcome) for outcome in outcomes)
    counts, done = _print_outcomes(output, outcomes)
    for line in bad_lines[: out.MAX_SHOWN]:
        out.print_error(f"invalid target {line!r}: {line}")
    counts[StopResult.INVALID] += len(bad_lines)
    is_failure = file is None or done < counts.total()
    output.print_summary(_summarize(counts, done), is_needed=is_failure)
    if file is None:
        out.print_info(
            "A journal does not know which targets it lacks: add --from FILE"
        )
    return output.exit_code(is_failure=is_failure)


def _read_list(
    file: Path, workspace: str | None, *, allow_empty: bool
) -> tuple[list[RuntimeRef], list[BadLine]]:
    """Return the targets and the bad lines of a file, each once."""
    items = open_targets(file, LineParser(workspace), allow_empty=allow_empty)
    unique = dict.fromkeys(asyncio.run(collect(items)))
    targets = [item for item in unique if isinstance(item, RuntimeRef)]
    return targets, [item for item in unique if isinstance(item, BadLine)]


def _print_outcomes(
    output: out.Output, outcomes: Iterable[StopOutcome]
) -> tuple[Counter[StopResult], int]:
    """Print outcomes, and return how many have each result, and how many are done."""
    printer = OutcomePrinter(output)
    counts: Counter[StopResult] = Counter()
    done = 0
    for outcome in outcomes:
        counts[outcome.result] += 1
        done += outcome.ok
        printer.print(outcome)
    printer.finish()
    return counts, done


def _summarize(counts: Counter[StopResult], done: int) -> str:
    total = counts.total()
    results = out.format_counts(counts) or "no target"
    return f"{done:,} of {total:,} done, {total - done:,} pending: {results}"
