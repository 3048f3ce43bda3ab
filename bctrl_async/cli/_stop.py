"""The command `stop`, and the three ways to say which runtimes it stops."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from bctrl_async import BctrlConfigError, RuntimeFilter, RuntimeRef
from bctrl_async.cli import _loop as loop, _options as opt, _output as out
from bctrl_async.cli._connection import CONNECTION, Connection
from bctrl_async.cli._lines import LineParser
from bctrl_async.cli._list import FoundRuntimes, find_runtimes
from bctrl_async.cli._run import RUN_OPTIONS, Job, RunOptions
from bctrl_async.cli._targets import WHOLE, Shard, is_typed, open_targets, parse_shard

_NOTHING = "nothing to stop: give WORKSPACE and ALIAS, WORKSPACE --all, or --from FILE"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """The options that say which runtimes are stopped, beside their names."""

    file: Annotated[
        opt.File | None, opt.in_files(help="Read targets from FILE; - is stdin.")
    ] = None
    allow_empty: opt.AllowEmpty = False
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
    ] = WHOLE
    everything: Annotated[
        bool, opt.in_flags("--all", help="Stop all runtimes of WORKSPACE that match.")
    ] = False
    yes: Annotated[
        bool, opt.in_flags(alias="-y", help="Do not ask for confirmation.")
    ] = False
    status: Annotated[
        opt.Text | None,
        opt.with_status(
            show_default="not ended", help="Only with this status, or any."
        ),
    ] = None
    kind: opt.Kind = None
    older_than: opt.OlderThan = None
    alias: opt.Alias = None

    @property
    def is_list(self) -> bool:
        """True if a file or a workspace lists the targets, and not the command line."""
        return self.everything or self.file is not None

    def filter(self) -> RuntimeFilter:
        """Return the filter of `--all`, which matches any alias."""
        return RuntimeFilter(
            status=self.status, kind=self.kind, older_than=self.older_than
        )

    def check(self) -> None:
        """Raise an error if an option lacks the option that it needs."""
        if self.allow_empty and not self.file:
            raise BctrlConfigError("--allow-empty needs --from")
        filters = (self.status, self.kind, self.older_than, self.alias)
        if any(filters) and not self.everything:
            raise BctrlConfigError(
                "--status, --kind, --older-than and --alias need --all"
            )

    def check_names(self, aliases: Sequence[str]) -> None:
        """Raise an error unless targets are selected in exactly one way."""
        if self.everything and (aliases or self.file):
            raise BctrlConfigError("--all cannot be combined with ALIAS or --from")
        if self.file and aliases:
            raise BctrlConfigError("--from cannot be combined with ALIAS")
        if not (aliases or self.is_list):
            raise BctrlConfigError(_NOTHING)


def stop(
    *names: opt.Names,
    workspace: opt.Workspace = None,
    choice: TargetOptions = TargetOptions(),
    options: RunOptions = RUN_OPTIONS,
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

    With --all, the workspace is listed once more at the end. What has started
    since is counted, and not stopped: run the command again to stop the rest.
    The exit code is about what was listed at first.

    After Ctrl-C no other runtime is asked to stop, and none is polled: what was
    asked and has not ended may still run. Requests in flight are waited for; a
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
    workspace_name, aliases = connection.split_names(
        names, workspace, "stop", has_aliases=not choice.is_list
    )
    options.check()
    choice.check()
    choice.check_names(aliases)
    workspace = connection.workspace(workspace_name, is_needed=choice.everything)
    output = out.Output(prints_json=output_format == "json")
    job = Job(options, connection, output, workspace)
    shard = choice.shard
    if choice.everything:
        return _stop_all(job, choice)
    if choice.file is not None:
        # FILE must agree with WORKSPACE, but may name others than a default.
        parser = LineParser(
            workspace or None, rejects_other_workspaces=bool(workspace_name)
        )
        job.output.shows_progress = not is_typed(choice.file)
        allow_empty = choice.allow_empty
        return job.run(
            open_targets(choice.file, parser, allow_empty=allow_empty, shard=shard)
        )
    targets = dict.fromkeys(RuntimeRef(workspace, alias) for alias in aliases)
    return job.run([target for target in targets if shard.keeps(target)], aliases)


def _stop_all(job: Job, choice: TargetOptions) -> int:
    """List the runtimes of a workspace that match, ask, and stop them."""
    asks = not (choice.yes or job.options.dry_run)
    if asks:
        _check_terminal()
    session = job.connect()
    matches = loop.run(
        find_runtimes(
            session,
            job.workspace,
            choice.filter(),
            job.output,
            pattern=choice.alias,
            deadline=job.options.deadline,
        )
    )
    matches.drop_replaced().keep(choice.shard.keeps)
    if not matches:
        scope = out.escape(job.workspace)
        if choice.shard != WHOLE:
            scope += f" in shard {choice.shard.number}/{choice.shard.total}"
        out.print_info(f"Nothing to stop: no runtime of {scope} matches")
        # A journal is written even by an empty run, so that `report` can read it.
        if job.options.journal is None:
            return 0
    # Runtimes that cannot be read are not stopped, so they alone need no question.
    if asks and matches.runtimes and not _confirm(matches, session.base_url):
        out.print_info("Nothing was stopped")
        return out.FAILED
    if job.options.dry_run:
        # The list decides what is sent, not the journal.
        return job.print_targets(matches, journal=None)
    return job.stop(matches)


def _check_terminal() -> None:
    """Raise an error if the user cannot be asked."""
    for stream in (sys.stdin, sys.stderr):
        if stream is None or not stream.isatty():
            raise BctrlConfigError(
                "cannot ask for confirmation without a terminal: add --yes"
            )


def _confirm(matches: FoundRuntimes, base_url: str) -> bool:
    """Show runtimes and ask whether to stop them."""
    runtimes = matches.runtimes
    kinds = Counter(out.escape(runtime.kind) for runtime in runtimes)
    summary = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    unreadable = len(matches) - len(runtimes)
    if unreadable:
        summary += f"; {unreadable:,} cannot be read"
    question = (
        f"In workspace {out.escape(matches.workspace_id)} at {base_url}: {summary}"
    )
    question += f"\nStop {out.pluralize(len(runtimes), 'runtime')}? [y/N] "
    try:
        # The question goes to stderr, since stdout may be a file; rich would wrap it.
        print(question, end="", file=sys.stderr, flush=True)  # noqa: T201 - above.
        return sys.stdin.readline().strip().lower() in {"y", "yes"}
    except KeyboardInterrupt:
        out.print_info("\nNothing was stopped")  # The line goes below the ^C.
        raise
