"""The command `stop`."""

import asyncio
import sys
import time
from collections.abc import AsyncIterable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, cast

from msgspec.structs import replace

from bctrl_async import (
    BctrlConfigError,
    BctrlSession,
    RuntimeFilter,
    RuntimeRef,
    StopBatch,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.cli import _options as opt, _output as out, _targets
from bctrl_async.cli._connection import CONNECTION, Connection
from bctrl_async.cli._lines import LineParser
from bctrl_async.cli._list import find_runtimes
from bctrl_async.cli._outcomes import OutcomePrinter
from bctrl_async.cli._progress import run_with_progress
from bctrl_async.journal import Journal, JournalReader

_NOTHING = "nothing to stop: give WORKSPACE and ALIAS, WORKSPACE --all, or --from FILE"
_Targets = Iterable[RuntimeRef] | AsyncIterable[RuntimeRef]


def stop(
    *names: opt.Names,
    workspace: opt.Workspace = None,
    file: Annotated[
        opt.File | None, opt.in_files(help="Read targets from FILE; - is stdin.")
    ] = None,
    allow_empty: opt.AllowEmpty = False,
    shard: Annotated[
        _targets.Shard,
        opt.in_targets(
            metavar="K/N",
            converter=opt.converter(_targets.parse_shard),
            accepts_keys=False,
            n_tokens=1,
            show_default=False,
            help="Stop only shard K of N, such as 3/16.",
        ),
    ] = _targets.WHOLE,
    everything: Annotated[
        bool, opt.in_flags("--all", help="Stop all runtimes of WORKSPACE that match.")
    ] = False,
    yes: Annotated[bool, opt.in_flags(alias="-y", help="Do not ask for confirmation.")] = False,
    status: Annotated[
        opt.Text | None,
        opt.with_status(show_default="not ended", help="Only with this status, or any."),
    ] = None,
    kind: opt.Kind = None,
    older_than: opt.OlderThan = None,
    alias: opt.Alias = None,
    journal: Annotated[
        opt.File | None, opt.in_run(help="Record outcomes in FILE and skip what it has as stopped.")
    ] = None,
    journal_max_age: opt.JournalMaxAge = None,
    verify: Annotated[
        bool,
        opt.in_run_flags(
            negative="--no-verify", help="Poll until each runtime has stopped; the default."
        ),
    ] = True,
    ignore_not_found: opt.IgnoreNotFound = False,
    dry_run: Annotated[bool, opt.in_run_flags(help="Print the targets, stop nothing.")] = False,
    concurrency: Annotated[opt.Count, opt.in_pace(help="Maximum number of stops in flight.")] = 100,
    rate: Annotated[opt.Rate | None, opt.in_pace(help="Maximum requests per second.")] = None,
    pace: Annotated[
        opt.Text | None,
        opt.in_pace(
            metavar="FILE|URL",
            env_var="BCTRL_PACE",
            help="Share --rate with the other processes that use this file or Redis server.",
        ),
    ] = None,
    deadline: Annotated[
        opt.Duration | None,
        opt.in_pace(help="Abort the whole run after DURATION, such as 90s or 1h."),
    ] = None,
    output_format: opt.Format = "table",
    connection: Connection = CONNECTION,
) -> int:
    """Stop runtimes and report the outcome of each.

    Give WORKSPACE and ALIAS..., or WORKSPACE --all, or --from FILE. FILE is
    CSV with the columns workspace_id and alias, or WORKSPACE,ALIAS in each
    line, or JSON: {"workspace_id": "ws", "alias": "crm"} or ["ws", "crm"], one
    after the other or in an array. With WORKSPACE, FILE may have one column,
    the aliases. Put -- before WORKSPACE if an alias starts with a dash.

    With -w, every word is an ALIAS. While BCTRL_WORKSPACE or the profile has a
    workspace, so is a single word; of more, the first must be that workspace.

    Every ALIAS gets a line of output. With --from or --all, targets that were
    attempted and may still be running are grouped by reason. The last line
    counts the runtimes that are no longer running, still running, and
    unconfirmed. It is safe to run the command again.

    After Ctrl-C nothing new is sent, and requests in flight are waited for; a
    second Ctrl-C aborts them.

    Exit codes: 0 none is running, 1 some are or may be, 2 usage or
    configuration error, 75 the journal is in use: try later, 130 interrupted.

    For example:
      bctrl-async stop WORKSPACE crm mail
      bctrl-async stop -w WORKSPACE crm mail
      bctrl-async stop WORKSPACE --all --alias 'ci-*' --older-than 2h
      bctrl-async stop --from runtimes.csv --journal tonight.jsonl
      some-program | bctrl-async stop --from - --rate 50 -o json
    """
    is_list = bool(everything or file)
    workspace, aliases = connection.split_names(names, workspace, "stop", has_aliases=not is_list)
    filters = status or kind or older_than or alias
    problems = {
        "--journal-max-age needs --journal": journal_max_age and not journal,
        "--allow-empty needs --from": allow_empty and not file,
        "--all cannot be combined with ALIAS or --from": everything and (aliases or file),
        "--from cannot be combined with ALIAS": aliases and file,
        "--status, --kind, --older-than and --alias need --all": filters and not everything,
        _NOTHING: not (aliases or is_list),
    }
    if problem := next(filter(problems.get, problems), None):
        raise BctrlConfigError(problem)
    place = connection.workspace(workspace, is_needed=everything)
    asks = everything and not (yes or dry_run)
    if asks and not all(stream and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        raise BctrlConfigError("cannot ask for confirmation without a terminal: add --yes")
    # A session belongs to one event loop; listing and stopping run in two.
    connect = partial(
        connection.session,
        needs_key=everything or not dry_run,
        max_connections=concurrency,
        rate=rate,
        pace=pace,
    )
    output = out.Output()
    output.shows_progress = not _targets.is_typed(file)
    left = deadline
    items: Iterable[object] | AsyncIterable[object]
    if file is not None:
        # A bad line is an invalid target, which the bulk stop rejects.
        parser = LineParser(place or None, is_only=bool(workspace))
        items = _targets.open_targets(file, parser, allow_empty=allow_empty, shard=shard)
    elif everything:
        began, lister = time.monotonic(), connect()
        wanted = RuntimeFilter(status=status, kind=kind, older_than=older_than)
        finding = find_runtimes(lister, place, wanted, alias, output, deadline=deadline)
        items = found = asyncio.run(finding)
        found.keep(shard.keeps)
        # The user's time to answer does not count. If no time is left, 1 ms sends nothing.
        left = deadline and max(round(deadline - (time.monotonic() - began), 2), 0.001)
        if not found:
            where = f" in shard {shard.number}/{shard.total}" if shard != _targets.WHOLE else ""
            out.print_info(f"Nothing to stop: no runtime of {out.escape(place)}{where} matches")
            if journal is None:
                return 0
        elif asks and found.runtimes and not found.confirm(lister.base_url):
            out.print_info("Nothing was stopped")
            return out.FAILED
    else:
        named = dict.fromkeys(map(partial(RuntimeRef, place), aliases))
        items = [*filter(shard.keeps, named)]
    session, targets = connect(), cast("_Targets", items)
    if dry_run:
        # With --all, the list decides what is sent, not the journal.
        return _dry_run(session, targets, None if everything else journal, journal_max_age)
    shown = None if is_list else aliases
    printer = OutcomePrinter(output, shown, prints_json=output_format == "json")
    explain = partial(connection.explain, deadline=deadline)

    def show(outcome: StopOutcome) -> None:
        explain(outcome.error)
        printer.print(outcome)

    with _open_journal(journal, session, journal_max_age) as opened:
        batch = session.stop_runtimes(
            targets,
            on_outcome=show,
            deadline=left,
            journal=opened,
            verify=verify,
            missing_ok=ignore_not_found,
        )
        interrupted = _run(session, batch, output)
        explain(batch.ended_early)
        # The journal may raise when it is closed, so the report comes before.
        return _report(batch, printer, interrupted=interrupted, has_journal=journal is not None)


def _open_journal(
    path: Path | None, session: BctrlSession, max_age: float | None
) -> AbstractContextManager[Journal | None]:
    """Open the journal of a run, if it has a journal."""
    if path is None:
        return nullcontext()
    return Journal(path, base_url=session.base_url, max_age=max_age)


def _run(session: BctrlSession, batch: StopBatch, output: out.Output) -> bool | None:
    """Run a bulk stop; return True if it was interrupted, None if its input cannot be read."""

    async def run() -> bool:
        async with session:
            return await run_with_progress(batch, session, output)

    try:
        return asyncio.run(run())
    except _targets.UnreadInputError as error:
        out.print_error(error)
        return None


def _report(
    batch: StopBatch, printer: OutcomePrinter, *, interrupted: bool | None, has_journal: bool
) -> int:
    """Print the summary of a bulk stop, and return the exit code."""
    printer.finish()
    report, output = batch.report, printer.output
    if report.ended_early is not None and interrupted is False:
        out.print_error(f"ended early: {printer.describe(report.ended_early)}")
    failed = (each.error for each in report.failures)
    errors = (each for each in failed if each is None or each.reason_class != "invalid_input")
    code = 0 if report.ok and not output.write_failed else out.exit_code(errors)
    summary = f"{'Interrupted: ' * bool(interrupted)}{replace(report, ended_early=None)}"
    if batch.total is None and report.ended_early is not None:
        summary += "; the input was not read to its end"
    if printer.prints_json:
        out.print_info(summary)
    elif code or not out.is_quiet.get():
        output.print_result(summary)
    missing = sum(outcome.result is StopResult.NOT_FOUND for outcome in report.failures)
    if missing:
        remedy = "check the workspace ids, the aliases and the base URL"
        remedy += ", or add --ignore-not-found" * (missing < report.total)
        out.print_error(f"{missing:,} of {report.total:,} targets not found: {remedy}")
    if interrupted and has_journal and code:
        out.print_info("Run the same command again to resume")
    return out.INTERRUPTED if interrupted else code


def _dry_run(
    session: BctrlSession, targets: _Targets, journal: Path | None, max_age: float | None
) -> int:
    """Print the targets to stop as JSON Lines, without targets that a journal has as stopped."""

    async def run() -> StopReport:
        read = await _targets.collect(targets)
        async with session:
            batch = session.stop_runtimes(read)
            # Nothing has been sent, so valid targets become `not_sent`.
            batch.stop_reading()
            return await batch

    failures, output = asyncio.run(run()).failures, out.Output()
    invalid = [each.error for each in failures if each.result is not StopResult.NOT_SENT]
    pending = [each.target for each in failures if each.result is StopResult.NOT_SENT]
    skipped = ""
    if journal is not None and journal.exists():
        known = JournalReader(journal, session.base_url, max_age)
        with known.file:
            left = [target for target in pending if known.done(target) is None]
        if done := len(pending) - len(left):
            known.warn_if_old()
            pending, skipped = left, f", {done:,} no longer running"
    for target in pending:
        output.print_object(target._asdict())
    for error in invalid[: out.MAX_SHOWN]:
        out.print_error(error or "")
    out.print_info(f"Dry run: {len(pending):,} to stop{skipped}, {len(invalid):,} invalid")
    return out.FAILED if invalid or output.write_failed else 0
