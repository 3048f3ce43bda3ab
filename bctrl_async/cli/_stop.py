"""The command `stop`."""

import asyncio
import math
import sys
import time
from collections import Counter
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, cast

import typer
from typer.core import TyperCommand

from bctrl_async import (
    BctrlSession,
    RuntimeFilter,
    RuntimeRef,
    RuntimeStatus,
    StopOutcome,
    StopResult,
)
from bctrl_async.cli import _find, _output, _run, _targets
from bctrl_async.cli._options import (
    FAILED,
    SECONDS_ADVICE,
    BaseUrl,
    Kind,
    OlderThan,
    Timeout,
    UsageError,
    api_key,
    code_of,
    option,
    told,
    wanted,
)
from bctrl_async.journal import Journal

_NO_TIME = 0.001
"""Seconds in which nothing can be stopped, so that everything is accounted for as not sent."""


class StopCommand(TyperCommand):
    """Typer's versions differ in how they spell arguments in the usage; this is how we do."""

    def collect_usage_pieces(self, ctx: object) -> list[str]:  # noqa: ARG002 - click passes it.
        return ["[OPTIONS]", "(WORKSPACE ALIAS... | --from FILE | --workspace WORKSPACE --all)"]


def stop(
    workspace: Annotated[str | None, typer.Argument(hidden=True)] = None,
    aliases: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    *,
    files: Annotated[
        list[str] | None, option("Read the targets from a file; - is stdin.", "FILE", "--from")
    ] = None,
    journal: Annotated[
        str | None, option("Note each outcome there; resume what it has.", "FILE")
    ] = None,
    concurrency: Annotated[int, option("Stops under way at most; default 100.", "N")] = 100,
    rate: Annotated[float | None, option("Requests a second at most.", "N")] = None,
    deadline: Annotated[float | None, option("Cut everything off then.", "SECONDS")] = None,
    timeout: Timeout = 60.0,
    base_url: BaseUrl = None,
    whole: Annotated[
        str | None, option("Stop what is in it; needs --all.", "WORKSPACE", "--workspace")
    ] = None,
    everything: Annotated[
        bool, option("All that is active there, or fits.", None, "--all")
    ] = False,
    status: Annotated[
        str | None, option("Only with this status; default active, or any.", "STATUS")
    ] = None,
    kind: Kind = None,
    older_than: OlderThan = None,
    yes: Annotated[bool, option("Do not ask before it stops them.", None, "--yes")] = False,
    verify: Annotated[
        bool, option("Look until what was stopped is stopped.", None, "--verify")
    ] = False,
    dry_run: Annotated[bool, option("Show what would be stopped.", None, "--dry-run")] = False,
    json: Annotated[bool, option("Print a line of JSON for each target.", None, "--json")] = False,
) -> int:
    """Stop runtimes: some of a workspace, those in a file, or all.

    The API key is read from BCTRL_API_KEY: on the command line, every user of the machine could
    see it. Put -- before WORKSPACE if an alias begins with a dash.

    A line of the file is WORKSPACE,ALIAS as in CSV, or JSON: ["ws", "crm"] or {"workspace_id":
    "ws", "alias": "crm"}. With --journal, the same command resumes a run that was cut short: what
    is settled is not sent again.

    With --workspace and --all it lists what is active there, or what fits --status, --kind and
    --older-than, and asks before it stops that. A runtime whose time of creation cannot be read is
    not older than anything.

    Each alias gets one line that says what became of it; of the targets of a file or a workspace,
    those that were begun and are not settled. Settled, nothing is left to do: stopped, accepted,
    already_stopped, not_found. Not settled: rejected, not_sent, unknown. It is safe to run the
    command again.

    The first Ctrl-C begins nothing new and waits for what is under way, the second cuts it off.

    The exit code is 0 if all are settled, 1 if some are not, 2 if the command cannot be run as it
    stands, 130 after Ctrl-C.
    """
    file = _only(files, journal)
    asks = not (yes or dry_run)
    search = _search(whole, status, kind, older_than, everything=everything, asks=asks)
    if search is None:
        source = _targets_of(workspace, aliases or [], file)
    elif workspace is not None or file is not None:
        raise UsageError("give --workspace without ALIASes and --from")
    key = api_key(needed=search is not None or not dry_run)
    output = _output.Output()
    some = search is None and file is None
    lines = _output.Lines(output, aliases if some else None)

    def connect() -> BctrlSession:
        # A session belongs to one loop, and the question is asked between two.
        return BctrlSession(
            key, base_url=base_url, timeout=timeout, max_connections=concurrency, rate=rate
        )

    def show(outcome: StopOutcome) -> None:
        if json:
            output.say(_output.as_json(outcome))
        elif some or not (outcome.result.settled or _was_not_begun(outcome)):
            lines.show(outcome)

    def run(targets: _Targets, deadline: float | None) -> int:
        if dry_run:
            return _rehearse(connect(), targets, journal, output)
        stopping = _run.stop(
            connect(), targets, show, output, deadline=deadline, journal=journal, verify=verify
        )
        return _conclude(asyncio.run(stopping), output, json=json)

    if search is None:
        return told(lambda: run(source, deadline))
    return told(lambda: _stop_found(connect(), search, run, deadline))


def _only(files: list[str] | None, journal: str | None) -> str | None:
    """Check what names a file, and return the one with the targets."""
    if journal == "":
        raise UsageError("--journal is empty: give the name of a file")
    if files is not None and (len(files) > 1 or not files[0]):
        raise UsageError("give --from once, with the name of a file or -")
    return files[0] if files else None


class _Search(NamedTuple):
    workspace: str
    wanted: RuntimeFilter
    asks: bool


def _search(
    workspace: str | None,
    status: str | None,
    kind: str | None,
    older_than: str | None,
    *,
    everything: bool,
    asks: bool,
) -> _Search | None:
    """Find out whether what is to be stopped has to be searched for, and where."""
    if workspace is None:
        if everything or status or kind or older_than:
            raise UsageError("--all, --status, --kind and --older-than need --workspace")
        return None
    if not everything:
        raise UsageError("--workspace needs --all")
    if asks and not _find.can_ask():
        raise UsageError("there is no terminal to ask on: give --yes to stop without a question")
    return _Search(workspace, wanted(status or RuntimeStatus.ACTIVE, kind, older_than), asks)


def _stop_found(
    session: BctrlSession,
    search: _Search,
    stop: Callable[[Sequence[RuntimeRef], float | None], int],
    deadline: float | None,
) -> int:
    """Stop what is found, if it is wanted; the time that the answer takes does not count."""
    if deadline is not None and not 0 < deadline < math.inf:
        raise UsageError(f"--deadline is {deadline}: {SECONDS_ADVICE}")
    began = time.monotonic()
    finding = _find.find(session, search.workspace, search.wanted, deadline=deadline)
    found = asyncio.run(finding)
    if deadline is not None:
        deadline = max(deadline - (time.monotonic() - began), _NO_TIME)
    code = FAILED if found.doubtful else 0
    if not found.targets:
        _output.note(f"Nothing to stop: no runtime of {_output.visible(search.workspace)} fits")
        return code
    if search.asks and not _find.is_agreed(found):
        _output.note("Nothing was stopped")
        return FAILED
    return stop(found.targets, deadline) or code


def _was_not_begun(outcome: StopOutcome) -> bool:
    return outcome.result is StopResult.NOT_SENT and not outcome.attempts


_Targets = Iterable[RuntimeRef] | AsyncIterable[RuntimeRef]


def _targets_of(workspace: str | None, aliases: list[str], file: str | None) -> _Targets:
    """Find out what is to be stopped."""
    if file is None:
        if workspace is None or not aliases:
            raise UsageError("nothing to stop: give WORKSPACE and ALIASes, or --from FILE")
        return [RuntimeRef(workspace, alias) for alias in aliases]
    if workspace is not None:
        raise UsageError("give either WORKSPACE and ALIASes or --from FILE, not both")
    try:
        if file == "-":
            return cast("_Targets", _targets.pipe_targets(sys.stdin.fileno()))
        return cast("_Targets", _targets.from_file(Path(file)))
    except (OSError, AttributeError) as error:
        why = getattr(error, "strerror", None) or "it is closed"
        raise UsageError(f"cannot read {'stdin' if file == '-' else file}: {why}") from error


def _rehearse(
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
            _output.complain(outcome.error.summary if outcome.error else "")
        elif outcome.target in settled:
            counts["settled"] += 1
        else:
            counts["left"] += 1
            output.say(_output.as_line(outcome.target))

    asyncio.run(_run.rehearse(session, source, show))
    before = f", {counts['settled']:,} are settled already" if settled else ""
    _output.note(
        f"Dry run: {counts['left']:,} would be stopped{before}, {counts['bad']:,} are no targets"
    )
    return FAILED if counts["bad"] or output.lost else 0


def _conclude(ended: _run.Ended, output: _output.Output, *, json: bool) -> int:
    """Sum up a bulk stop, and find its exit code."""
    report = ended.report
    if ended.failure is not None:
        _output.complain(f"cannot read all targets: {ended.failure.strerror}")
    elif report.ended_early is not None and not ended.interrupted:
        _output.complain(f"ended early: {report.ended_early}")
    account = _output.summary(report, unread=ended.unread)
    account = f"{'Interrupted: ' * ended.interrupted}{account}"
    if json:
        _output.note(account)
    else:
        output.say(account, wrap=True)
    if report.counts[StopResult.NOT_FOUND] > report.total / 2:
        _output.complain("most are not found: check the workspace id, the aliases and base URL")
    if ended.interrupted:
        raise KeyboardInterrupt
    if report.ok and ended.failure is None and not output.lost:
        return 0
    return code_of(*(outcome.error for outcome in report.failures))
