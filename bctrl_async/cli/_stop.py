"""The command `stop`."""

import asyncio
import re
import shlex
import time
from collections import Counter
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, cast

from cyclopts import Parameter
from msgspec.structs import replace

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlResponseError,
    BctrlSession,
    RuntimeFilter,
    RuntimeRef,
    StopOutcome,
    StopResult,
)
from bctrl_async.cli import _options as opt
from bctrl_async.cli._connection import CONNECTION, Connection
from bctrl_async.cli._lines import LineParser
from bctrl_async.cli._list import FoundRuntimes, check_workspace, find_runtimes
from bctrl_async.cli._outcomes import OutcomePrinter
from bctrl_async.cli._output import (
    FAILED,
    INPUT_LEFT,
    MAX_SHOWN,
    Output,
    can_ask,
    describe,
    escape,
    exit_code,
    is_quiet,
    name_call,
    print_error,
    print_info,
    print_read_error,
)
from bctrl_async.cli._run import FinishedRun, run_stops
from bctrl_async.cli._targets import WHOLE, Shard, is_typed, open_targets, parse_shard
from bctrl_async.journal import Journal
from bctrl_async.pace import FilePace, Pace

_COMPLETE = "use -o json, or a --journal"
_MIN_DEADLINE = 0.001
"""Seconds left to a run whose deadline has passed: every target becomes `not_sent`."""
_of_deadline = re.compile(r"the deadline of \S+ s ").sub
_is_address = re.compile(r"(redis|rediss|unix):(?!//).*|[\w.-]+:\d+(/.*)?").fullmatch
"""Matches an address without its scheme: as a file, each machine would have a pace of its own."""

_Targets = Iterable[RuntimeRef] | AsyncIterable[RuntimeRef]


def stop(
    workspace: opt.Workspace = None,
    /,
    *aliases: Annotated[opt.Text, Parameter("ALIAS", help="Aliases of the runtimes to stop.")],
    file: Annotated[
        opt.File | None, opt.in_files(help="Read targets from FILE; - is stdin.")
    ] = None,
    allow_empty: opt.AllowEmpty = False,
    shard: Annotated[
        Shard,
        opt.in_targets(
            metavar="K/N",
            converter=opt.converter(parse_shard),
            accepts_keys=False,
            n_tokens=1,
            show_default=False,
            help="Stop only shard K of N, such as 3/16.",
        ),
    ] = WHOLE,
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
    the aliases. Put -- before WORKSPACE if an alias begins with a dash.

    Every ALIAS gets a line of output. With --from or --all, targets that were
    attempted and may still be running are grouped by reason. The last line
    counts the runtimes that are no longer running, still running, and
    unconfirmed. It is safe to run the command again.

    After Ctrl-C nothing new is sent, and requests in flight are waited for; a
    second one aborts them.

    Exit codes: 0 none is running, 1 some are or may be, 2 usage or
    configuration error, 75 the journal is in use: try later, 130 interrupted.

    For example:
      bctrl-async stop WORKSPACE crm mail
      bctrl-async stop WORKSPACE --all --alias 'ci-*' --older-than 2h
      bctrl-async stop --from runtimes.csv --journal tonight.jsonl
      some-program | bctrl-async stop --from - --rate 50 -o json
    """
    given = {name for name, value in locals().items() if value}
    pace_from = connection.profile.origins.get("pace", "--pace")
    _check_usage(given, pace_from)
    place = check_workspace(connection.workspace(workspace)) if everything else ""
    asks = everything and not (yes or dry_run)
    if asks and not can_ask():
        raise BctrlConfigError("cannot ask for confirmation without a terminal: add --yes")
    # A session belongs to one event loop; listing and stopping each run one.
    connect = partial(
        connection.session,
        needs_key=everything or not dry_run,
        max_connections=concurrency,
        rate=None if pace else rate,
        pace=_open_pace(pace, pace_from, rate) if pace and rate else None,
    )
    output = Output()
    output.shows_progress = not is_typed(file)
    prints_json = output_format == "json"
    complete = f"bctrl-async report {shlex.quote(str(journal))} -o json" if journal else _COMPLETE
    printer = OutcomePrinter(
        output,
        None if file or everything else aliases,
        prints_json=prints_json,
        complete=complete,
    )

    def show(outcome: StopOutcome) -> None:
        connection.explain(outcome.error)
        _restate(outcome.error, deadline)
        printer.print(outcome)

    def run(targets: _Targets, left: float | None) -> int:
        if dry_run:
            return _dry_run(connect(), targets, output, journal, journal_max_age)
        session = connect()
        make_batch = partial(
            session.stop_runtimes,
            targets,
            on_outcome=show,
            deadline=left,
            journal=journal,
            journal_max_age=journal_max_age,
            verify=verify,
            missing_ok=ignore_not_found,
        )
        finished = asyncio.run(run_stops(session, make_batch, output))
        connection.explain(finished.report.ended_early)
        _restate(finished.report.ended_early, deadline)
        printer.finish()
        code = _report(finished, output, printer, prints_json=prints_json)
        if finished.interrupted:
            if journal is not None:
                print_info("Run the same command again to resume")
            raise KeyboardInterrupt
        return code

    if file is not None:
        # A bad line is an invalid target, which the bulk stop rejects.
        parser = LineParser(connection.workspace(workspace), is_only=workspace is not None)
        items = open_targets(file, parser, allow_empty=allow_empty, shard=shard)
        return run(cast("_Targets", items), deadline)
    if not everything:
        named = dict.fromkeys(RuntimeRef(workspace or "", alias) for alias in aliases)
        return run([*filter(shard.keeps, named)], deadline)
    wanted = RuntimeFilter(status=status, kind=kind, older_than=older_than)
    finding = find_runtimes(connect(), place, wanted, alias, output, deadline=deadline)
    return _stop_found(finding, shard, run, deadline, asks=asks, has_journal=journal is not None)


def _restate(error: BctrlError | None, deadline: float | None) -> None:
    """Give the deadline as it was given, and not what is left of it after a listing."""
    if error is not None and deadline is not None:
        given = f"the deadline of {opt.format_seconds(deadline)} "
        error.summary = _of_deadline(given, error.summary)


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
    found.keep(shard.keeps)
    targets = cast("_Targets", found)
    if deadline is not None:
        # Rounded, because errors show it.
        deadline = max(round(deadline - (time.monotonic() - began), 2), _MIN_DEADLINE)
    if not found:
        place = f" in shard {shard.number}/{shard.total}" if shard != WHOLE else ""
        print_info(f"Nothing to stop: no runtime of {escape(found.workspace_id)}{place} matches")
        # The report on all shards takes the journal of each, also of one without runtimes.
        return run(targets, deadline) if has_journal else 0
    if asks and found.runtimes and not found.confirm():
        print_info("Nothing was stopped")
        return FAILED
    # The bulk stop rejects the runtimes that cannot be read.
    return run(targets, deadline)


def _check_usage(given: AbstractSet[str], pace_from: str) -> None:
    """Raise an error unless the targets are given in exactly one way."""
    problems = {
        "--journal-max-age needs --journal": "journal_max_age" in given and "journal" not in given,
        "--allow-empty needs --from": "allow_empty" in given and "file" not in given,
        "--all cannot be combined with ALIAS or --from": (
            "everything" in given and bool(given & {"file", "aliases"})
        ),
        "--from cannot be combined with ALIAS": given >= {"aliases", "file"},
        "--status, --kind, --older-than and --alias need --all": (
            bool(given & {"status", "kind", "older_than", "alias"}) and "everything" not in given
        ),
        "nothing to stop: add ALIAS, or --all for all runtimes of WORKSPACE": (
            "workspace" in given and not given & {"aliases", "everything", "file"}
        ),
        "nothing to stop: give WORKSPACE and ALIAS, WORKSPACE --all, or --from FILE": (
            not given & {"workspace", "everything", "file"}
        ),
        f"{pace_from} needs --rate, the rate of all processes together": (
            "pace" in given and "rate" not in given
        ),
    }
    for problem, is_so in problems.items():
        if is_so:
            raise BctrlConfigError(problem)


def _open_pace(place: str, origin: str, rate: float) -> Pace:
    """Return a shared pace, or raise an error if it cannot be used."""
    if _is_address(place):
        raise BctrlConfigError(
            f"invalid {origin}: expected the path of a file or a URL",
            advice="Begin the address of a server with redis://, and such a path with ./",
        )
    try:
        if "://" in place:
            from bctrl_async.redis import RedisPace  # noqa: PLC0415 - an extra.

            return RedisPace(place, rate=rate)
        return FilePace(place, rate=rate)
    except BctrlConfigError as error:
        # The session names its arguments; here they are an option, a variable or a key.
        summary = error.summary.replace(f"invalid {error.argument}", f"invalid {origin}", 1)
        raise BctrlConfigError(summary, advice=error.advice) from error
    except ModuleNotFoundError as error:
        raise BctrlConfigError(f"cannot use {origin}: {error}") from error


def _report(
    finished: FinishedRun, output: Output, printer: OutcomePrinter, *, prints_json: bool
) -> int:
    """Print the summary of a bulk stop, and return the exit code."""
    report = finished.report
    if finished.read_error is not None:
        print_read_error(finished.read_error)
    elif report.ended_early is not None and not finished.interrupted:
        error = report.ended_early
        # The line of the target has the advice.
        is_explained = not prints_json and printer.has_explained(error)
        text = f"{name_call(error)}{error.summary}" if is_explained else describe(error)
        print_error(f"ended early: {text}")
    summary = f"{replace(report, ended_early=None)}{INPUT_LEFT * finished.input_left}"
    summary = f"{'Interrupted: ' * finished.interrupted}{summary}"
    code = exit_code(outcome.error for outcome in report.failures)
    if report.ok and finished.read_error is None and not output.write_failed:
        code = 0
    if prints_json:
        print_info(summary)
    elif code or not is_quiet.get():
        output.print_result(summary)
    missing = sum(outcome.result is StopResult.NOT_FOUND for outcome in report.failures)
    if missing:
        remedy = "check the workspace ids, the aliases and the base URL, or add --ignore-not-found"
        print_error(f"{missing:,} of {report.total:,} targets not found: {remedy}")
    return code


def _dry_run(
    session: BctrlSession,
    targets: _Targets,
    output: Output,
    journal: Path | None,
    journal_max_age: float | None,
) -> int:
    """Print the targets to stop as JSON Lines, without what a journal has as stopped."""
    known: Journal | None = None
    # What a list has is sent, whatever the journal has.
    if journal is not None and journal.exists() and not isinstance(targets, FoundRuntimes):
        known = Journal(journal, session.base_url, journal_max_age, only_read=True)
    counts: Counter[str] = Counter()

    def show(outcome: StopOutcome) -> None:
        if outcome.result is StopResult.REJECTED and outcome.error is not None:
            counts["invalid"] += 1
            if counts["invalid"] <= MAX_SHOWN:
                # A runtime that could not be parsed has no other name than that of the error.
                is_listed = isinstance(outcome.error, BctrlResponseError)
                print_error(describe(outcome.error) if is_listed else outcome.error.summary)
        elif known is not None and known.done(outcome.target) is not None:
            counts["stopped"] += 1
        else:
            counts["to stop"] += 1
            output.print_object(outcome.target._asdict())

    async def run() -> None:
        plain = [t async for t in targets] if isinstance(targets, AsyncIterable) else targets
        async with session:
            batch = session.stop_runtimes(plain, on_outcome=show)
            # Before anything is sent, so that valid targets are `not_sent`.
            batch.stop_reading()
            await batch

    try:
        with nullcontext() if known is None else known.file:
            asyncio.run(run())
    except OSError as error:
        print_read_error(error)
        return FAILED
    if known is not None and counts["stopped"]:
        known.warn_if_old()
    skipped = f", {counts['stopped']:,} no longer running" if counts["stopped"] else ""
    print_info(f"Dry run: {counts['to stop']:,} to stop{skipped}, {counts['invalid']:,} invalid")
    return FAILED if counts["invalid"] or output.write_failed else 0
