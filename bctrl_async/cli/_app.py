"""The command `bctrl-async`: stop runtimes, list them, run the emulator, see a demonstration."""

import asyncio
import errno
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import typer
from typer.core import TyperCommand

from bctrl_async import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    RuntimeFilter,
    RuntimeRef,
    RuntimeStatus,
    StopOutcome,
    StopResult,
    __version__,
)
from bctrl_async.cli import _demo, _find, _output, _run, _targets
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.journal import Journal

_FAILED, _USAGE = 1, 2
# Python would print warnings for which there is no handler into the display, which says it all.
_NO_LOG = logging.NullHandler()
_MOST_RUNTIMES = 100_000
_NO_TIME = 0.001
"""Seconds in which nothing can be stopped, so that everything is accounted for as not sent."""
_DESKTOP = 10
"""One in so many runtimes of the emulator is a desktop."""

# What the session says of an argument, and what to do about it here.
_URL_ADVICE = "use https, or http on this machine"
_SECONDS_ADVICE = "give seconds above 0"
_ARGUMENTS = {
    "base_url": ("--base-url", _URL_ADVICE),
    "BCTRL_BASE_URL": ("BCTRL_BASE_URL", _URL_ADVICE),
    "timeout": ("--timeout", _SECONDS_ADVICE),
    "max_connections": ("--concurrency", "give a whole number from 1"),
    "rate": ("--rate", "give a number above 0"),
    "deadline": ("--deadline", _SECONDS_ADVICE),
}

# Typer brings its own click or imports it, by version; this is either one's class.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

app: typer.Typer = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; whatever a user can cause is one line on stderr.

    Args:
        args: The command line without the program's name; that of the process when None.

    Returns:
        The exit code.
    """
    logging.getLogger("bctrl_async").addHandler(_NO_LOG)
    try:
        code = app(args, prog_name="bctrl-async", standalone_mode=False)
    except _UsageError as error:
        see = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _output.complain(error.format_message().strip().rstrip(".") + see)
        return _USAGE
    except OSError as error:
        # Of the help, which click prints by itself.
        _output.lose(error)
        return _FAILED
    return int(code)


def _option(text: str, metavar: str | None = None, *names: str) -> Any:  # noqa: ANN401 - what typer.Option returns.
    # Typer's versions differ in how they show a default, so the text has it.
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    *,
    version: Annotated[bool, _option("Show the version and exit.", None, "--version")] = False,
) -> None:
    """Stop bctrl runtimes, and know what became of each one.

    New here? `bctrl-async demo` needs no key and no network.
    """
    if version or context.invoked_subcommand is None:
        output = _output.Output()
        output.say(f"bctrl-async {__version__}" if version else context.get_help())
        raise typer.Exit(_FAILED if output.lost else 0)


class _StopCommand(TyperCommand):
    """Typer's versions differ in how they spell arguments in the usage; this is how we do."""

    def collect_usage_pieces(self, ctx: object) -> list[str]:  # noqa: ARG002 - click passes it.
        return ["[OPTIONS]", "(WORKSPACE ALIAS... | --from FILE | --workspace WORKSPACE --all)"]


class _ListCommand(TyperCommand):
    """The same."""

    def collect_usage_pieces(self, ctx: object) -> list[str]:  # noqa: ARG002 - click passes it.
        return ["[OPTIONS]", "WORKSPACE"]


_Kind = Annotated[str | None, _option("Only of this kind, such as browser.", "KIND")]
_OlderThan = Annotated[str | None, _option("Only older ones; such as 90s, 15m, 2h, 1d.", "AGE")]
_BaseUrl = Annotated[str | None, _option("Where the API is; default is BCTRL_BASE_URL.", "URL")]
_Timeout = Annotated[float, _option("What one attempt may take; default 60.", "SECONDS")]


@app.command("stop", cls=_StopCommand)
def _stop(
    workspace: Annotated[str | None, typer.Argument(hidden=True)] = None,
    aliases: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    *,
    files: Annotated[
        list[str] | None, _option("Read the targets from a file; - is stdin.", "FILE", "--from")
    ] = None,
    journal: Annotated[
        str | None, _option("Note each outcome there; resume what it has.", "FILE")
    ] = None,
    concurrency: Annotated[int, _option("Stops under way at most; default 100.", "N")] = 100,
    rate: Annotated[float | None, _option("Requests a second at most.", "N")] = None,
    deadline: Annotated[float | None, _option("Cut everything off then.", "SECONDS")] = None,
    timeout: _Timeout = 60.0,
    base_url: _BaseUrl = None,
    whole: Annotated[
        str | None, _option("Stop what is in it; needs --all.", "WORKSPACE", "--workspace")
    ] = None,
    everything: Annotated[
        bool, _option("All that is active there, or fits.", None, "--all")
    ] = False,
    status: Annotated[
        str | None, _option("Only with this status; default active, or any.", "STATUS")
    ] = None,
    kind: _Kind = None,
    older_than: _OlderThan = None,
    yes: Annotated[bool, _option("Do not ask before it stops them.", None, "--yes")] = False,
    verify: Annotated[
        bool, _option("Look until what was stopped is stopped.", None, "--verify")
    ] = False,
    dry_run: Annotated[bool, _option("Show what would be stopped.", None, "--dry-run")] = False,
    json: Annotated[bool, _option("Print a line of JSON for each target.", None, "--json")] = False,
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
        raise _UsageError("give --workspace without ALIASes and --from")
    key = _key(needed=search is not None or not dry_run)
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

    def stop(targets: _Targets, deadline: float | None) -> int:
        if dry_run:
            return _rehearse(connect(), targets, journal, output)
        stopping = _run.stop(
            connect(), targets, show, output, deadline=deadline, journal=journal, verify=verify
        )
        return _conclude(asyncio.run(stopping), output, json=json)

    if search is None:
        return _told(lambda: stop(source, deadline))
    return _told(lambda: _stop_found(connect(), search, stop, deadline))


def _only(files: list[str] | None, journal: str | None) -> str | None:
    """Check what names a file, and return the one with the targets."""
    if journal == "":
        raise _UsageError("--journal is empty: give the name of a file")
    if files is not None and (len(files) > 1 or not files[0]):
        raise _UsageError("give --from once, with the name of a file or -")
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
            raise _UsageError("--all, --status, --kind and --older-than need --workspace")
        return None
    if not everything:
        raise _UsageError("--workspace needs --all")
    if asks and not _find.can_ask():
        raise _UsageError("there is no terminal to ask on: give --yes to stop without a question")
    return _Search(workspace, _wanted(status or RuntimeStatus.ACTIVE, kind, older_than), asks)


def _stop_found(
    session: BctrlSession,
    search: _Search,
    stop: Callable[[Sequence[RuntimeRef], float | None], int],
    deadline: float | None,
) -> int:
    """Stop what is found, if it is wanted; the time that the answer takes does not count."""
    if deadline is not None and not 0 < deadline < math.inf:
        raise _UsageError(f"--deadline is {deadline}: {_SECONDS_ADVICE}")
    began = time.monotonic()
    finding = _find.find(session, search.workspace, search.wanted, deadline=deadline)
    found = asyncio.run(finding)
    if deadline is not None:
        deadline = max(deadline - (time.monotonic() - began), _NO_TIME)
    code = _FAILED if found.doubtful else 0
    if not found.targets:
        _output.note(f"Nothing to stop: no runtime of {_output.visible(search.workspace)} fits")
        return code
    if search.asks and not _find.is_agreed(found):
        _output.note("Nothing was stopped")
        return _FAILED
    return stop(found.targets, deadline) or code


def _wanted(status: str | None, kind: str | None, older_than: str | None) -> RuntimeFilter:
    try:
        return _find.condition(status, kind, older_than)
    except ValueError as error:
        raise _UsageError(str(error)) from error


def _key(*, needed: bool) -> str:
    key = os.environ.get("BCTRL_API_KEY")
    if needed and not key:
        raise _UsageError("there is no API key: set BCTRL_API_KEY")
    return key or "dry-run"


def _told(run: Callable[[], int]) -> int:
    """Run something of which errors are one line on stderr."""
    try:
        return run()
    except BctrlConfigError as error:
        raise _mistake(error) from error
    except BctrlError as error:
        _output.complain(str(error))
        return _code_of(error)


def _code_of(*errors: BctrlError | None) -> int:
    """Return the exit code of what has failed: the same again is of use, or it is not."""
    is_refused = any(isinstance(error, BctrlAuthenticationError) for error in errors)
    return _USAGE if is_refused else _FAILED


@app.command("list", cls=_ListCommand)
def _list(
    workspace: Annotated[str | None, typer.Argument(hidden=True)] = None,
    *,
    status: Annotated[str | None, _option("Only with this status.", "STATUS")] = None,
    kind: _Kind = None,
    older_than: _OlderThan = None,
    timeout: _Timeout = 60.0,
    base_url: _BaseUrl = None,
    json: Annotated[
        bool, _option("Print a line of JSON for each, as stop --from reads it.", None, "--json")
    ] = False,
) -> int:
    """List the runtimes of a workspace.

    A runtime whose time of creation cannot be read is not older than anything. One that cannot be
    read at all is named on stderr, and the exit code is 1.
    """
    wanted = _wanted(status, kind, older_than)
    if not workspace:
        raise _UsageError("nothing to list: give a WORKSPACE")
    key = _key(needed=True)
    output = _output.Output()

    def show() -> int:
        session = BctrlSession(key, base_url=base_url, timeout=timeout)
        found = asyncio.run(_find.find(session, workspace, wanted))
        if json:
            for runtime in found.runtimes:
                output.say(_output.as_found(workspace, runtime))
        else:
            _output.listing(output, found.runtimes)
        return _FAILED if found.doubtful or output.lost else 0

    return _told(show)


def _was_not_begun(outcome: StopOutcome) -> bool:
    return outcome.result is StopResult.NOT_SENT and not outcome.attempts


_Targets = Iterable[RuntimeRef] | AsyncIterable[RuntimeRef]


def _targets_of(workspace: str | None, aliases: list[str], file: str | None) -> _Targets:
    """Find out what is to be stopped."""
    if file is None:
        if workspace is None or not aliases:
            raise _UsageError("nothing to stop: give WORKSPACE and ALIASes, or --from FILE")
        return [RuntimeRef(workspace, alias) for alias in aliases]
    if workspace is not None:
        raise _UsageError("give either WORKSPACE and ALIASes or --from FILE, not both")
    try:
        if file == "-":
            return cast("_Targets", _targets.pipe_targets(sys.stdin.fileno()))
        return cast("_Targets", _targets.from_file(Path(file)))
    except (OSError, AttributeError) as error:
        why = getattr(error, "strerror", None) or "it is closed"
        raise _UsageError(f"cannot read {'stdin' if file == '-' else file}: {why}") from error


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
    return _FAILED if counts["bad"] or output.lost else 0


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
    return _code_of(*(outcome.error for outcome in report.failures))


def _mistake(error: BctrlConfigError) -> Exception:
    """Say of an argument's error which option it is."""
    name, _, problem = error.summary.partition(" ")
    if name in _ARGUMENTS:
        name, advice = _ARGUMENTS[name]
        return _UsageError(f"{name} {problem}: {advice}")
    advice = "correct BCTRL_API_KEY" if "API key" in error.summary else error.advice or ""
    return _UsageError(f"{error.summary}: {advice[:1].lower()}{advice[1:]}")


@app.command("emulator", epilog=f"The faults: {', '.join(Fault)}.")
def _emulator(
    *,
    host: Annotated[str, _option("Where to listen; default 127.0.0.1.", "ADDRESS")] = "127.0.0.1",
    port: Annotated[int, _option("Default 8787; 0 is any free one.", "N")] = 8787,
    api_key: Annotated[
        str, _option(f"What clients must send; default {_demo.KEY}.", "KEY")
    ] = _demo.KEY,
    runtimes: Annotated[int, _option("How many are active; default 10.", "N")] = 10,
    fault: Annotated[
        list[str] | None, _option("What goes wrong, how often; repeatable.", "NAME=PROBABILITY")
    ] = None,
    rate_limit: Annotated[
        float | None, _option("Stops a second at most; faster ones get a 429.", "N")
    ] = None,
    seed: Annotated[int, _option("What the faults are drawn from; default 0.", "N")] = 0,
    latency: Annotated[float, _option("Time before every answer; default 0.", "SECONDS")] = 0.0,
) -> int:
    """Run a local server to try clients against, until Ctrl-C.

    It has a workspace called demo with active runtimes: runtime-0001, runtime-0002 and so on. Each
    is a minute older than the one before it, and one in ten is a desktop. With --fault
    rate_limited=0.1, one in ten answers is a 429.
    """
    _check_runtimes(runtimes, at_least=0)
    try:
        emulator = Emulator(
            host=host,
            port=port,
            api_key=api_key,
            faults=_faults(fault or []),
            seed=seed,
            latency=latency,
            rate_limit=rate_limit,
        )
    except ValueError as error:
        raise _UsageError(str(error)) from error
    now = datetime.now(UTC)
    for number, alias in enumerate(_demo.aliases(runtimes), start=1):
        # So that there is something for filters to choose from.
        kind = "browser" if number % _DESKTOP else "desktop"
        created = now - timedelta(minutes=number)
        created_at = f"{created:%Y-%m-%dT%H:%M:%S}.000Z"
        emulator.add_runtime(_demo.WORKSPACE, alias, kind=kind, created_at=created_at)
    try:
        asyncio.run(_serve(emulator, api_key))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem = f"port {port} of {host} is in use: choose another with --port"
        else:
            problem = f"cannot listen on {host} port {port}: {error.strerror}"
        raise _UsageError(problem) from error
    return 0


def _faults(given: Sequence[str]) -> dict[Fault, float]:
    faults = {}
    for text in given:
        name, _, probability = text.partition("=")
        try:
            faults[Fault(name)] = float(probability)
        except ValueError:
            known = "is no NAME=PROBABILITY" if name in set(Fault) else "names no fault"
            raise ValueError(f"--fault {text} {known}: give such as rate_limited=0.1") from None
    return faults


async def _serve(emulator: Emulator, api_key: str) -> None:
    async with emulator:
        output = _output.Output()
        _output.note("The emulator is running; Ctrl-C ends it. In another terminal:")
        output.say(f"export BCTRL_BASE_URL={_callable(emulator.url)}")
        output.say(f"export BCTRL_API_KEY={shlex.quote(api_key)}")
        output.say(f"bctrl-async stop {_demo.WORKSPACE} {next(_demo.aliases(1))}")
        ended = asyncio.Event()
        with suppress(NotImplementedError):  # On Windows a SIGTERM is the end in any case.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            output.leave_line()
            raise
        finally:
            _output.note(f"{_output.several(len(emulator.requests), 'request')} received")


def _callable(url: str) -> str:
    """Name this machine, where the URL names every address that it listens on."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


@app.command("demo")
def _run_demo(
    *,
    runtimes: Annotated[int, _option("How many to stop; default 300.", "N")] = 300,
    seed: Annotated[int, _option("What the faults are drawn from; default 4.", "N")] = 4,
) -> int:
    """Watch many stops on a misbehaving server; no key, no network.

    A local emulator answers late, refuses, fails and drops connections. At the end its own state
    is compared with what was reported; the exit code is 0 if they agree.
    """
    _check_runtimes(runtimes, at_least=1)
    return 0 if _demo.run(runtimes, seed) else _FAILED


def _check_runtimes(count: int, *, at_least: int) -> None:
    if not at_least <= count <= _MOST_RUNTIMES:
        raise _UsageError(f"--runtimes is {count}: give {at_least} to {_MOST_RUNTIMES}")
