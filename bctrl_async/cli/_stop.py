"""The command `stop`."""

import asyncio
import shlex
import time
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable
from functools import partial
from typing import Annotated, cast

import typer

from bctrl_async import RuntimeFilter, RuntimeRef, StopOutcome
from bctrl_async.cli import _dry_run
from bctrl_async.cli._connection import Connection, with_connection
from bctrl_async.cli._exit_codes import FAILED, exit_code
from bctrl_async.cli._find import FoundRuntimes, can_prompt, confirm, find_runtimes
from bctrl_async.cli._format import (
    describe,
    escape,
    print_not_found,
    print_read_error,
    summarize,
)
from bctrl_async.cli._options import (
    AllowEmpty,
    IgnoreNotFound,
    JournalMaxAge,
    Kind,
    OlderThan,
    check_not_empty,
    check_positive,
    duration,
    run_option,
    status_option,
    target_option,
)
from bctrl_async.cli._outcomes import OutcomePrinter
from bctrl_async.cli._output import Output, print_error, print_info
from bctrl_async.cli._pace import pace_of
from bctrl_async.cli._records import OutputFormat, OutputOption
from bctrl_async.cli._run import FinishedRun, run_stops
from bctrl_async.cli._targets import WHOLE, Shard, is_typed, open_targets, parse_shard
from bctrl_async.errors import subject_of

_COMPLETE = "use -o json, or a --journal"
_MIN_DEADLINE = 0.001
"""Seconds left to a run whose deadline has passed: every target becomes `not_sent`."""
_Targets = Iterable[RuntimeRef] | AsyncIterable[RuntimeRef]

_pace = partial(typer.Option, rich_help_panel="Pace")

_Workspace = Annotated[
    str | None,
    typer.Argument(
        metavar="WORKSPACE", callback=check_not_empty, help="Workspace id of the runtimes."
    ),
]
_Aliases = Annotated[
    list[str] | None, typer.Argument(metavar="ALIAS", help="Aliases of the runtimes to stop.")
]
_File = Annotated[
    str | None,
    target_option(
        "--from",
        metavar="FILE",
        callback=check_not_empty,
        help="Read targets from FILE; - is stdin.",
    ),
]
_Shard = Annotated[
    Shard,
    target_option(
        "--shard",
        metavar="K/N",
        parser=parse_shard,
        show_default=False,
        help="Stop only shard K of N, such as 3/16.",
    ),
]
_All = Annotated[
    bool,
    target_option("--all", metavar="", help="Stop all runtimes of WORKSPACE that match."),
]
_Yes = Annotated[bool, target_option("--yes", metavar="", help="Do not ask for confirmation.")]
_Status = Annotated[
    str | None, status_option(help="Only with this status, or any.", show_default="not ended")
]
_Journal = Annotated[
    str | None,
    run_option(
        "--journal",
        metavar="FILE",
        callback=check_not_empty,
        help="Record outcomes in FILE and skip what it has as stopped.",
    ),
]
_Verify = Annotated[
    bool,
    run_option(
        "--verify/--no-verify", metavar="", help="Poll until each runtime has stopped; the default."
    ),
]
_DryRun = Annotated[
    bool, run_option("--dry-run", metavar="", help="Print the targets, stop nothing.")
]
_Concurrency = Annotated[
    int, _pace("--concurrency", metavar="N", min=1, help="Maximum number of stops in flight.")
]
_Rate = Annotated[
    float | None,
    _pace("--rate", metavar="N", callback=check_positive, help="Maximum requests per second."),
]
_Pace = Annotated[
    str | None,
    _pace(
        "--pace",
        metavar="FILE|URL",
        envvar="BCTRL_PACE",
        callback=check_not_empty,
        help="Share --rate with the other processes that use this file or Redis server.",
    ),
]
_Deadline = Annotated[
    float | None,
    _pace(
        "--deadline",
        metavar="DURATION",
        parser=duration,
        callback=check_positive,
        help="Abort the whole run after DURATION, such as 90s or 1h.",
    ),
]

EXAMPLES = """
Examples:
  bctrl-async stop WORKSPACE crm mail
  bctrl-async stop WORKSPACE --all --older-than 2h
  bctrl-async stop --from runtimes.csv --journal tonight.jsonl
  some-program | bctrl-async stop --from - --rate 50 -o json

Environment variables:
  BCTRL_API_KEY    the API key; there is no option, which other users could see
  BCTRL_CONFIG     the config file, which has profiles
"""


@with_connection
def stop(
    context: typer.Context,
    workspace: _Workspace = None,
    aliases: _Aliases = None,
    *,
    file: _File = None,
    allow_empty: AllowEmpty = False,
    shard: _Shard = WHOLE,
    everything: _All = False,
    yes: _Yes = False,
    status: _Status = None,
    kind: Kind = None,
    older_than: OlderThan = None,
    journal: _Journal = None,
    journal_max_age: JournalMaxAge = None,
    verify: _Verify = True,
    ignore_not_found: IgnoreNotFound = False,
    dry_run: _DryRun = False,
    concurrency: _Concurrency = 100,
    rate: _Rate = None,
    pace: _Pace = None,
    deadline: _Deadline = None,
    output_format: OutputOption = OutputFormat.TABLE,
    connection: Connection,
) -> int:
    """Stop runtimes and report the outcome of each.

    Give WORKSPACE and ALIAS..., or WORKSPACE --all, or --from FILE. FILE is CSV with
    the columns workspace_id and alias, or WORKSPACE,ALIAS in each line, or JSON:
    {"workspace_id": "ws", "alias": "crm"} or ["ws", "crm"], one after the other or in
    an array. Put -- before WORKSPACE if an alias begins with a dash.

    Every ALIAS gets a line of output. With --from or --all, targets that were attempted
    and may still be running are grouped by reason. The last line counts the runtimes that
    are no longer running, still running, and unconfirmed. It is safe to run the command again.

    After Ctrl-C nothing new is sent, and requests in flight are waited for; a second
    one aborts them.

    Exit codes: 0 none is running, 1 some are or may be, 2 usage or configuration
    error, 75 the journal is in use: try later, 130 interrupted.
    """
    _check_usage(context, connection)
    asks = everything and not (yes or dry_run)
    if asks and not can_prompt():
        context.fail("cannot ask for confirmation without a terminal: add --yes")
    # A session belongs to one event loop; listing and stopping each run one.
    connect = partial(
        connection.session,
        needs_key=everything or not dry_run,
        max_connections=concurrency,
        rate=None if pace else rate,
        pace=pace_of(context, pace, rate, connection.origin("pace")) if pace and rate else None,
    )
    output = Output(shows_progress=not is_typed(file))
    prints_json = output_format is OutputFormat.JSON
    printer = OutcomePrinter(
        output,
        None if file or everything else aliases,
        prints_json=prints_json,
        complete=f"bctrl-async report {shlex.quote(journal)} -o json" if journal else _COMPLETE,
    )

    def show(outcome: StopOutcome) -> None:
        connection.explain(outcome.error)
        printer.print(outcome)

    def run(targets: _Targets, deadline: float | None) -> int:
        if dry_run:
            return _dry_run.dry_run(
                connect(),
                targets,
                output,
                journal=journal,
                journal_max_age=journal_max_age,
            )
        running = run_stops(
            connect(),
            targets,
            show,
            output,
            deadline=deadline,
            journal=journal,
            journal_max_age=journal_max_age,
            verify=verify,
            missing_ok=ignore_not_found,
        )
        finished = asyncio.run(running)
        connection.explain(finished.report.ended_early)
        printer.finish()
        return _report(finished, output, printer, for_people=not prints_json)

    if file is not None:
        # A bad line is an invalid target, which the bulk stop rejects.
        items = open_targets(context, file, allow_empty=allow_empty, shard=shard)
        return run(cast("_Targets", items), deadline)
    workspace = workspace or ""
    if not everything:
        named = dict.fromkeys(RuntimeRef(workspace, alias) for alias in aliases or ())
        return run([*filter(shard.keeps, named)], deadline)
    wanted = RuntimeFilter(status=status, kind=kind, older_than=older_than)
    finding = find_runtimes(connect(), workspace, wanted, output, deadline=deadline)
    has_journal = journal is not None
    return _stop_found(finding, shard, run, deadline, asks=asks, has_journal=has_journal)


def _check_usage(context: typer.Context, connection: Connection) -> None:
    """Fail unless the targets are given in exactly one way."""
    given = {name for name, value in context.params.items() if value}
    if "journal_max_age" in given and "journal" not in given:
        context.fail("--journal-max-age needs --journal")
    if "pace" in given and "rate" not in given:
        origin = connection.origin("pace")
        context.fail(f"{origin} needs --rate, the rate of all processes together")
    if "allow_empty" in given and "file" not in given:
        context.fail("--allow-empty needs --from")
    if given >= {"everything", "file"} or given >= {"everything", "aliases"}:
        context.fail("--all cannot be combined with ALIAS or --from")
    if given >= {"workspace", "file"}:
        context.fail("--from cannot be combined with WORKSPACE and ALIAS")
    if given & {"status", "kind", "older_than"} and "everything" not in given:
        context.fail("--status, --kind and --older-than need --all")
    if "everything" in given and "workspace" not in given:
        context.fail("--all needs a WORKSPACE")
    if "workspace" in given and not given & {"aliases", "everything"}:
        context.fail("nothing to stop: add ALIAS, or --all for all runtimes of WORKSPACE")
    if not given & {"workspace", "file"}:
        context.fail("nothing to stop: give WORKSPACE and ALIAS, WORKSPACE --all, or --from FILE")


def _stop_found(
    finding: Coroutine[object, object, FoundRuntimes],
    shard: Shard,
    run: Callable[[_Targets, float | None], int],
    deadline: float | None,
    *,
    asks: bool,
    has_journal: bool,
) -> int:
    """Find the runtimes of a shard, ask for confirmation outside the deadline, and stop them."""
    began = time.monotonic()
    found = asyncio.run(finding)
    found.keep(shard)
    targets = cast("_Targets", found)
    if deadline is not None:
        # Rounded, because errors show it.
        deadline = max(round(deadline - (time.monotonic() - began), 2), _MIN_DEADLINE)
    if not found:
        place = f" in shard {shard}" if shard != WHOLE else ""
        print_info(f"Nothing to stop: no runtime of {escape(found.workspace_id)}{place} matches")
        # Without its journal, an empty shard would seem to be missing.
        return run(targets, deadline) if has_journal else 0
    if asks and found.runtimes and not confirm(found):
        print_info("Nothing was stopped")
        return FAILED
    # The bulk stop rejects the runtimes that cannot be read.
    return run(targets, deadline)


def _report(
    finished: FinishedRun, output: Output, printer: OutcomePrinter, *, for_people: bool
) -> int:
    """Print the summary of a bulk stop, and return the exit code."""
    report = finished.report
    if finished.read_error is not None:
        print_read_error(finished.read_error)
    elif report.ended_early is not None and not finished.interrupted:
        error = report.ended_early
        # The line of the target has the advice.
        explained = printer.has_explained(error)
        text = f"{subject_of(error)}{error.summary}" if explained else describe(error)
        print_error(f"ended early: {text}")
    summary = summarize(report, input_left=finished.input_left)
    summary = f"{'Interrupted: ' * finished.interrupted}{summary}"
    if for_people:
        output.print_result(summary, wrap=True)
    else:
        print_info(summary)
    print_not_found(report)
    if finished.interrupted:
        raise KeyboardInterrupt
    if report.ok and finished.read_error is None and not output.write_failed:
        return 0
    return exit_code(outcome.error for outcome in report.failures)
