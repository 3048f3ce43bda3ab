"""The run of `stop`: its options, the bulk stop or the dry run, and the exit code."""

import re
from collections.abc import AsyncIterable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter

from bctrl_async import (
    BctrlConfigError,
    RuntimeRef,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.cli import _loop as loop, _options as opt, _output as out
from bctrl_async.cli._connection import Connection
from bctrl_async.cli._load import measured, propose_connections
from bctrl_async.cli._outcomes import OutcomePrinter
from bctrl_async.cli._pace import open_rate
from bctrl_async.cli._progress import run_with_progress
from bctrl_async.cli._targets import UnreadInputError, collect
from bctrl_async.errors import quote
from bctrl_async.journal import Journal, JournalReader

if TYPE_CHECKING:
    from bctrl_async import BctrlSession, StopBatch

_VERIFY_FOR = 120.0
"""Seconds of polling by default, as without the command."""
_find_wildcard = re.compile(r"[*?[]").search

Targets = Iterable[Any] | AsyncIterable[Any]
"""Targets, and items that the bulk stop rejects: bad lines and unreadable runtimes."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options that say how targets are stopped, however they are selected."""

    journal: Annotated[
        opt.File | None,
        opt.in_run(help="Record outcomes in FILE and skip what it has as stopped."),
    ] = None
    journal_max_age: opt.JournalMaxAge = None
    verify: Annotated[
        opt.Wait | None,
        opt.in_run(
            negative="--no-verify",
            allow_repeating=True,
            show_default="2m",
            help="Poll each runtime for up to DURATION until it has stopped.",
        ),
    ] = _VERIFY_FOR
    ignore_not_found: opt.IgnoreNotFound = False
    dry_run: Annotated[
        bool, opt.in_run_flags(help="Print the targets, stop nothing.")
    ] = False
    concurrency: Annotated[
        opt.Count, opt.in_pace(help="Maximum number of stops in flight.")
    ] = 100
    rate: Annotated[
        opt.Rate | None, opt.in_pace(help="Maximum requests per second.")
    ] = None
    pace: Annotated[
        opt.Text | None,
        opt.in_pace(
            metavar="FILE|URL",
            env_var="BCTRL_PACE",
            help="Share --rate with the other processes that use this file "
            "or Redis server.",
        ),
    ] = None
    deadline: Annotated[
        opt.Duration | None,
        opt.in_pace(help="Abort the whole run after DURATION, such as 90s or 1h."),
    ] = None

    def check(self) -> None:
        """Raise an error if an option lacks the option that it needs."""
        if self.journal_max_age and not self.journal:
            raise BctrlConfigError("--journal-max-age needs --journal")


RUN_OPTIONS = RunOptions()


@dataclass(frozen=True)
class Job:
    """A run of the command, however its targets are selected."""

    options: RunOptions
    connection: Connection
    output: out.Output
    workspace: str
    """The workspace as the user names it; empty if it is not named."""

    def connect(self, *, needs_key: bool = True) -> "BctrlSession":
        """Make a session, for one event loop: listing and stopping run in two."""
        options = self.options
        origin = self.connection.profile.origins.get("pace", "--pace")
        rate = open_rate(options.rate, options.pace, origin)
        return self.connection.session(
            needs_key=needs_key, max_connections=options.concurrency, rate=rate
        )

    def run(self, targets: Targets, aliases: Sequence[str] = ()) -> int:
        """Stop targets, or print them if the run is dry; return the exit code."""
        if self.options.dry_run:
            return self.print_targets(targets, self.options.journal)
        return self.stop(targets, aliases)

    def stop(self, targets: Targets, aliases: Sequence[str] = ()) -> int:
        """Stop targets, print their outcomes, and return the exit code."""
        session = self.connect()
        printer = OutcomePrinter(self.output, aliases)

        def show(outcome: StopOutcome) -> None:
            self.connection.explain(outcome.error)
            printer.print(outcome)

        with self._open_journal(session) as journal:
            batch = session.stop_runtimes(
                targets,
                on_outcome=show,
                deadline=self.options.deadline,
                journal=journal,
                verify=self.options.verify or False,
                missing_ok=self.options.ignore_not_found,
            )
            return loop.run(self._run_batch(session, batch, printer))

    async def _run_batch(
        self, session: "BctrlSession", batch: "StopBatch", printer: OutcomePrinter
    ) -> int:
        """Run a bulk stop, print its account, and return the exit code.

        The account comes before anything that may raise or take long, such as closing
        the session and the journal.
        """
        connections = self.options.concurrency
        async with session, measured(session, connections) as load:
            try:
                is_interrupted = await run_with_progress(batch, session, self.output)
            except UnreadInputError as error:
                out.print_error(error)
                return self._report(batch, printer, has_raised=True)
            except BaseException:
                # Its error is printed where it is caught.
                if batch.read:
                    self._report(batch, printer, has_raised=True)
                raise
            code = self._report(batch, printer, is_interrupted=is_interrupted)
            proposal = propose_connections(
                load, session.stats, batch.report, self.options.rate
            )
            if proposal and not self.output.prints_json:
                out.print_info(proposal)
            return code

    def _open_journal(
        self, session: "BctrlSession"
    ) -> AbstractContextManager[Journal | None]:
        """Open the journal of the run, if it has a journal."""
        path = self.options.journal
        if path is None:
            return nullcontext()
        max_age = self.options.journal_max_age
        return Journal(path, base_url=session.base_url, max_age=max_age)

    def _report(
        self,
        batch: "StopBatch",
        printer: OutcomePrinter,
        *,
        is_interrupted: bool = False,
        has_raised: bool = False,
    ) -> int:
        """Print the summary of a bulk stop, and return the exit code.

        The error of a run that has raised is not printed here.
        """
        self.connection.explain(batch.ended_early)
        printer.finish()
        report = batch.report
        reason = report.ended_early
        summary = out.summarize(report, is_interrupted=is_interrupted)
        if reason is not None and batch.total is None:
            summary += "; the input was not read to its end"
        if reason is not None and not (is_interrupted or has_raised):
            out.print_error(f"ended early: {printer.describe(reason)}")
        is_needed = not report.ok or report.look_error is not None
        self.output.print_summary(summary, is_needed=is_needed)
        # The summary may be what stdout does not take.
        code = _exit_code(report, self.output)
        _print_missing(report)
        self._print_started(report)
        if not is_interrupted:
            return code
        if code and self.options.journal is not None:
            out.print_info("Run the same command again to resume")
        return out.INTERRUPTED

    def _print_started(self, report: StopReport) -> None:
        """Print the runtimes that a last look found, which were not stopped."""
        runtimes = report.started_since
        if not runtimes:
            return
        if self.output.prints_json:
            for runtime in runtimes:
                self.output.print_object(
                    {
                        # The API gives a UUID, which would be another target.
                        "workspace_id": self.workspace,
                        "alias": runtime.alias,
                        "started_since": True,
                        "runtime": msgspec.to_builtins(runtime),
                    }
                )
        first = runtimes[: out.MAX_SHOWN]
        names = ", ".join(out.escape(runtime.alias) for runtime in first)
        if len(runtimes) > out.MAX_SHOWN:
            names += f" and {len(runtimes) - out.MAX_SHOWN:,} more"
        out.print_info(
            f"Started since, and not stopped: {names}. "
            "Run the same command again to stop them"
        )

    def print_targets(self, targets: Targets, journal: Path | None) -> int:
        """Print targets as JSON Lines, except targets that a journal has as stopped."""
        session = self.connect(needs_key=False)
        failures = loop.run(_send_nothing(session, targets)).failures
        # An invalid target is `invalid`, not `not_sent`.
        valid = [
            outcome.target
            for outcome in failures
            if outcome.result is StopResult.NOT_SENT
        ]
        errors = [
            outcome.error
            for outcome in failures
            if outcome.error and outcome.result is not StopResult.NOT_SENT
        ]
        pending = self._pending(valid, journal, session.base_url)
        for target in pending:
            self.output.print_object(target._asdict())
        for error in errors[: out.MAX_SHOWN]:
            out.print_error(error)
        counts = [f"{len(pending):,} to stop"]
        if len(pending) < len(valid):
            counts.append(f"{len(valid) - len(pending):,} no longer running")
        counts.append(f"{len(errors):,} invalid")
        out.print_info(f"Dry run: {', '.join(counts)}")
        return self.output.exit_code(is_failure=bool(errors))

    def _pending(
        self, targets: list[RuntimeRef], journal: Path | None, base_url: str
    ) -> list[RuntimeRef]:
        """Return the targets that a journal does not have as stopped."""
        if journal is None or not journal.exists():
            return targets
        reader = JournalReader(journal, base_url, self.options.journal_max_age)
        with reader.file:
            pending = [target for target in targets if reader.done(target) is None]
        if len(pending) < len(targets):
            reader.warn_if_old()
        return pending


def _exit_code(report: StopReport, output: out.Output) -> int:
    if report.ok:
        return output.exit_code()
    # An invalid target is a failure, not a usage error.
    errors = (outcome.error for outcome in report.failures)
    return out.exit_code_of(
        error for error in errors if error and error.reason_class != "invalid_input"
    )


def _print_missing(report: StopReport) -> None:
    """Print how many targets were not found, and what to check."""
    missing = [
        outcome.target.alias
        for outcome in report.failures
        if outcome.result is StopResult.NOT_FOUND
    ]
    if not missing:
        return
    remedy = "check the workspace ids, the aliases and the base URL"
    patterns = [alias for alias in missing if _find_wildcard(alias)]
    if patterns:
        remedy = f"for a pattern, use --all --alias {quote(patterns[0])}"
    elif len(missing) < report.total:
        remedy += ", or add --ignore-not-found"
    out.print_error(f"{len(missing):,} of {report.total:,} targets not found: {remedy}")


async def _send_nothing(session: "BctrlSession", targets: Targets) -> StopReport:
    """Return a report in which every valid target is `not_sent`."""
    items = await collect(targets)
    async with session:
        batch = session.stop_runtimes(items)
        batch.stop_reading()
        return await batch
