"""The command `stop`."""

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, cast

import typer

from bctrl_async import BctrlSession, RuntimeRef, RuntimeStatus, StopOutcome, StopResult
from bctrl_async.cli import _find, _output, _run, _targets
from bctrl_async.cli._exit_codes import FAILED, exit_code
from bctrl_async.cli._options import (
    FILTERS,
    OUTPUT,
    BaseUrl,
    Kind,
    OlderThan,
    Timeout,
    build_filter,
    check_not_empty,
    check_positive,
    complete_status,
    require_api_key,
)
from bctrl_async.journal import Journal

_NO_TIME = 0.001
"""Seconds in which nothing can be stopped, so that everything is accounted for as not sent."""


_Targets = Iterable[RuntimeRef] | AsyncIterable[RuntimeRef]
_TARGETS, _RUN, _LIMITS = "Targets", "Run", "Limits"

_Workspace = Annotated[str | None, typer.Argument(metavar="WORKSPACE", help="The workspace's id.")]
_Aliases = Annotated[
    list[str] | None, typer.Argument(metavar="ALIAS", help="The aliases of its runtimes.")
]
_Files = Annotated[
    list[str] | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Read the targets from a file; - is stdin.",
        rich_help_panel=_TARGETS,
    ),
]
_Whole = Annotated[
    str | None,
    typer.Option(
        "--workspace",
        metavar="WORKSPACE",
        help="Stop what is in it; needs --all.",
        rich_help_panel=_TARGETS,
    ),
]
_All = Annotated[
    bool,
    typer.Option(
        "--all",
        metavar="",
        help="All that is active there, or fits.",
        rich_help_panel=_TARGETS,
    ),
]
_Status = Annotated[
    str | None,
    typer.Option(
        "--status",
        metavar="STATUS",
        show_default="active",
        help="Only with this status, or any.",
        autocompletion=complete_status,
        rich_help_panel=FILTERS,
    ),
]
_Journal = Annotated[
    str | None,
    typer.Option(
        "--journal",
        metavar="FILE",
        callback=check_not_empty,
        help="Note each outcome there; resume what it has.",
        rich_help_panel=_RUN,
    ),
]
_Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        metavar="",
        help="Look until what was stopped is stopped.",
        rich_help_panel=_RUN,
    ),
]
_DryRun = Annotated[
    bool,
    typer.Option("--dry-run", metavar="", help="Show what would be stopped.", rich_help_panel=_RUN),
]
_Yes = Annotated[
    bool,
    typer.Option(
        "--yes", metavar="", help="Do not ask before it stops them.", rich_help_panel=_RUN
    ),
]
_Json = Annotated[
    bool,
    typer.Option(
        "--json",
        metavar="",
        help="Print a line of JSON for each target.",
        rich_help_panel=OUTPUT,
    ),
]
_Concurrency = Annotated[
    int,
    typer.Option(
        "--concurrency",
        metavar="N",
        min=1,
        help="Stops under way at most.",
        rich_help_panel=_LIMITS,
    ),
]
_Rate = Annotated[
    float | None,
    typer.Option(
        "--rate",
        metavar="N",
        callback=check_positive,
        help="Requests a second at most.",
        rich_help_panel=_LIMITS,
    ),
]
_Deadline = Annotated[
    float | None,
    typer.Option(
        "--deadline",
        metavar="SECONDS",
        callback=check_positive,
        help="Cut everything off then.",
        rich_help_panel=_LIMITS,
    ),
]


def stop(
    context: typer.Context,
    workspace: _Workspace = None,
    aliases: _Aliases = None,
    *,
    files: _Files = None,
    whole: _Whole = None,
    everything: _All = False,
    status: _Status = None,
    kind: Kind = None,
    older_than: OlderThan = None,
    journal: _Journal = None,
    verify: _Verify = False,
    dry_run: _DryRun = False,
    yes: _Yes = False,
    json: _Json = False,
    concurrency: _Concurrency = 100,
    rate: _Rate = None,
    deadline: _Deadline = None,
    timeout: Timeout = 60.0,
    base_url: BaseUrl = None,
) -> int:
    """Stop runtimes: some of a workspace, those in a file, or all.

    Give WORKSPACE and ALIASes, --from FILE, or --workspace WORKSPACE --all. The
    last lists what is active there, or fits the filters, and asks before it
    stops that. Put -- before WORKSPACE if an alias begins with a dash.

    The API key is read from BCTRL_API_KEY. A line of the file is WORKSPACE,ALIAS
    or JSON: ["ws", "crm"] or {"workspace_id": "ws", "alias": "crm"}.

    Each alias gets a line; of the targets of a file or a workspace, those that
    were begun and are not settled. Settled, nothing is left to do: stopped,
    accepted, already_stopped, not_found. Not settled: rejected, not_sent,
    unknown. It is safe to run the command again.

    The first Ctrl-C begins nothing new and waits for what is under way, the
    second cuts it off. The exit code is 0 if all are settled, 1 if some are not,
    2 if the command cannot be run as it stands, 130 after Ctrl-C.
    """
    file = _check_files(context, files)
    _check_usage(
        context,
        has_aliases=workspace is not None and bool(aliases),
        has_workspace=workspace is not None,
        has_file=file is not None,
        has_filters=any((everything, status, kind, older_than)),
        whole=whole is not None,
        everything=everything,
    )
    asks = whole is not None and not (yes or dry_run)
    if asks and not _find.can_prompt():
        context.fail("there is no terminal to ask on: give --yes to stop without a question")
    needs_key = whole is not None or not dry_run
    key = require_api_key(context) if needs_key else os.environ.get("BCTRL_API_KEY") or "dry-run"
    output = _output.Output()
    printer = _output.OutcomePrinter(output, None if file or whole else aliases, json=json)
    # A session belongs to one loop, and the question is asked between two.
    connect = partial(
        BctrlSession,
        key,
        base_url=base_url,
        timeout=timeout,
        max_connections=concurrency,
        rate=rate,
    )

    def run(targets: _Targets, deadline: float | None) -> int:
        if dry_run:
            return _dry_run(connect(), targets, journal, output)
        stopping = _run.run_stops(
            connect(),
            targets,
            printer.print,
            output,
            deadline=deadline,
            journal=journal,
            verify=verify,
        )
        return _report(asyncio.run(stopping), output, json=json)

    if whole is None:
        return run(_open_targets(context, workspace, aliases, file), deadline)
    fitting = build_filter(status or RuntimeStatus.ACTIVE, kind, older_than)
    finding = _find.find_runtimes(connect(), whole, fitting, deadline=deadline)
    return _stop_found(finding, run, deadline, asks=asks)


def _check_files(context: typer.Context, files: list[str] | None) -> str | None:
    """Return the name of the file with the targets."""
    if files is not None and (len(files) > 1 or not files[0]):
        context.fail("give --from once, with the name of a file or -")
    return files[0] if files else None


def _check_usage(
    context: typer.Context,
    *,
    has_aliases: bool,
    has_workspace: bool,
    has_file: bool,
    has_filters: bool,
    whole: bool,
    everything: bool,
) -> None:
    """Check that the targets are given in one way."""
    if whole:
        if not everything:
            context.fail("--workspace needs --all")
        if has_workspace or has_file:
            context.fail("give --workspace without ALIASes and --from")
    elif has_filters:
        context.fail("--all, --status, --kind and --older-than need --workspace")
    elif has_file and has_workspace:
        context.fail("give either WORKSPACE and ALIASes or --from FILE, not both")
    elif not has_file and not has_aliases:
        context.fail("nothing to stop: give WORKSPACE and ALIASes, or --from FILE")


def _open_targets(
    context: typer.Context, workspace: str | None, aliases: list[str] | None, file: str | None
) -> _Targets:
    """Find out what is to be stopped."""
    if file is None:
        return [RuntimeRef(workspace or "", alias) for alias in aliases or ()]
    try:
        if file == "-":
            return cast("_Targets", _targets.read_pipe(sys.stdin.fileno()))
        return cast("_Targets", _targets.read_file(Path(file)))
    except (OSError, AttributeError) as error:
        why = getattr(error, "strerror", None) or "it is closed"
        context.fail(f"cannot read {'stdin' if file == '-' else file}: {why}")


def _stop_found(
    finding: Coroutine[object, object, _find.FoundRuntimes],
    run: Callable[[Sequence[RuntimeRef], float | None], int],
    deadline: float | None,
    *,
    asks: bool,
) -> int:
    """Stop what is found, if it is wanted; the time that the answer takes does not count."""
    began = time.monotonic()
    found = asyncio.run(finding)
    if deadline is not None:
        deadline = max(deadline - (time.monotonic() - began), _NO_TIME)
    code = FAILED if found.incomplete else 0
    if not found.targets:
        _output.print_info(f"Nothing to stop: no runtime of {_output.escape(found.workspace)} fits")
        return code
    if asks and not _find.confirm(found):
        _output.print_info("Nothing was stopped")
        return FAILED
    return run(found.targets, deadline) or code


def _dry_run(
    session: BctrlSession,
    source: _Targets,
    journal: str | None,
    output: _output.Output,
) -> int:
    """Show what would be stopped, in a form that --from reads."""
    settled: Mapping[RuntimeRef, object] = {}
    if journal is not None and Path(journal).exists():
        found = Journal(journal, session.base_url)
        settled = found.settled
        found.close()
    counts: Counter[str] = Counter()

    def show(outcome: StopOutcome) -> None:
        if outcome.result is StopResult.REJECTED:
            counts["bad"] += 1
            _output.print_error(outcome.error.summary if outcome.error else "")
        elif outcome.target in settled:
            counts["settled"] += 1
        else:
            counts["left"] += 1
            output.print_result(_output.target_json(outcome.target))

    asyncio.run(_run.dry_run(session, source, show))
    before = f", {counts['settled']:,} are settled already" if settled else ""
    _output.print_info(
        f"Dry run: {counts['left']:,} would be stopped{before}, {counts['bad']:,} are no targets"
    )
    return FAILED if counts["bad"] or output.write_failed else 0


def _report(finished: _run.FinishedRun, output: _output.Output, *, json: bool) -> int:
    """Sum up a bulk stop, and find its exit code."""
    report = finished.report
    if finished.read_error is not None:
        _output.print_error(f"cannot read all targets: {finished.read_error.strerror}")
    elif report.ended_early is not None and not finished.interrupted:
        _output.print_error(f"ended early: {report.ended_early}")
    account = _output.summarize(report, input_left=finished.input_left)
    account = f"{'Interrupted: ' * finished.interrupted}{account}"
    if json:
        _output.print_info(account)
    else:
        output.print_result(account, wrap=True)
    if report.counts[StopResult.NOT_FOUND] > report.total / 2:
        _output.print_error("most are not found: check the workspace id, the aliases and base URL")
    if finished.interrupted:
        raise KeyboardInterrupt
    if report.ok and finished.read_error is None and not output.write_failed:
        return 0
    return exit_code(outcome.error for outcome in report.failures)
