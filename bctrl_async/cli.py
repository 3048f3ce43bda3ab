"""The command `bctrl-async`: stop runtimes, run the emulator, see a demonstration."""

import asyncio
import errno
import logging
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    RuntimeRef,
    StopOutcome,
    StopResult,
    __version__,
    _demo,
    _display,
    _source,
    _stopping,
)
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.journal import Journal

_FAILED, _USAGE = 1, 2
# Python would print warnings for which there is no handler into the display, which says it all.
_NO_LOG = logging.NullHandler()
_MOST_RUNTIMES = 100_000

# What the session says of an argument, and what to do about it here.
_URL_CURE = "use https, or http on this machine"
_ARGUMENTS = {
    "base_url": ("--base-url", _URL_CURE),
    "BCTRL_BASE_URL": ("BCTRL_BASE_URL", _URL_CURE),
    "timeout": ("--timeout", "give seconds above 0"),
    "max_connections": ("--concurrency", "give a whole number from 1"),
    "rate": ("--rate", "give a number above 0"),
    "deadline": ("--deadline", "give seconds above 0"),
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
        _display.complain(error.format_message().strip().rstrip(".") + see)
        return _USAGE
    except OSError as error:
        # Of the help, which click prints by itself.
        _display.lose(error)
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
        output = _display.Output()
        output.say(f"bctrl-async {__version__}" if version else context.get_help())
        raise typer.Exit(_FAILED if output.lost else 0)


class _StopCommand(TyperCommand):
    """Typer's versions differ in how they spell arguments in the usage; this is how we do."""

    def collect_usage_pieces(self, ctx: object) -> list[str]:  # noqa: ARG002 - click passes it.
        return ["[OPTIONS]", "(WORKSPACE ALIAS... | --from FILE)"]


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
    timeout: Annotated[float, _option("What one attempt may take; default 60.", "SECONDS")] = 60.0,
    base_url: Annotated[
        str | None, _option("Where the API is; default is BCTRL_BASE_URL.", "URL")
    ] = None,
    dry_run: Annotated[bool, _option("Show what would be stopped.", None, "--dry-run")] = False,
    json: Annotated[bool, _option("Print a line of JSON for each target.", None, "--json")] = False,
) -> int:
    """Stop runtimes: aliases of a workspace, or those in a file.

    The API key is read from BCTRL_API_KEY: on the command line, every user of the machine could
    see it. Put -- before WORKSPACE if an alias begins with a dash.

    A line of the file is WORKSPACE,ALIAS as in CSV, or JSON: ["ws", "crm"] or {"workspace_id":
    "ws", "alias": "crm"}. With --journal, the same command resumes a run that was cut short: what
    is settled is not sent again.

    Each alias gets one line that says what became of it; of the targets of a file, those that were
    begun and are not settled. Settled, nothing is left to do: stopped, accepted, already_stopped,
    not_found. Not settled: rejected, not_sent, unknown. It is safe to run the command again.

    The first Ctrl-C begins nothing new and waits for what is under way, the second cuts it off.

    The exit code is 0 if all are settled, 1 if some are not, 2 if the command cannot be run as it
    stands, 130 after Ctrl-C.
    """
    if files is not None and (len(files) > 1 or not files[0]):
        raise _UsageError("give --from once, with the name of a file or -")
    if journal == "":
        raise _UsageError("--journal is empty: give the name of a file")
    file = files[0] if files else None
    source = _targets(workspace, aliases or [], file)
    key = os.environ.get("BCTRL_API_KEY") or ("dry-run" if dry_run else None)
    if key is None:
        raise _UsageError("there is no API key: set BCTRL_API_KEY")
    output = _display.Output()
    lines = _display.Lines(output, None if file else aliases)

    def show(outcome: StopOutcome) -> None:
        if json:
            output.say(_display.as_json(outcome))
        elif file is None or not (outcome.result.settled or _was_not_begun(outcome)):
            lines.show(outcome)

    try:
        session = BctrlSession(
            key, base_url=base_url, timeout=timeout, max_connections=concurrency, rate=rate
        )
        if dry_run:
            return _rehearse(session, source, journal, output)
        ended = asyncio.run(
            _stopping.stop(session, source, show, output, deadline=deadline, journal=journal)
        )
    except BctrlConfigError as error:
        raise _mistake(error) from error
    except BctrlError as error:
        _display.complain(str(error))
        return _FAILED
    return _conclude(ended, output, json=json)


def _was_not_begun(outcome: StopOutcome) -> bool:
    return outcome.result is StopResult.NOT_SENT and not outcome.attempts


_Targets = Iterable[RuntimeRef] | AsyncIterable[RuntimeRef]


def _targets(workspace: str | None, aliases: list[str], file: str | None) -> _Targets:
    """Find out what is to be stopped."""
    if file is None:
        if workspace is None or not aliases:
            raise _UsageError("nothing to stop: give WORKSPACE and ALIASes, or --from FILE")
        return [RuntimeRef(workspace, alias) for alias in aliases]
    if workspace is not None:
        raise _UsageError("give either WORKSPACE and ALIASes or --from FILE, not both")
    try:
        if file == "-":
            return cast("_Targets", _source.pipe_targets(sys.stdin.fileno()))
        return cast("_Targets", _source.from_file(Path(file)))
    except (OSError, AttributeError) as error:
        why = getattr(error, "strerror", None) or "it is closed"
        raise _UsageError(f"cannot read {'stdin' if file == '-' else file}: {why}") from error


def _rehearse(
    session: BctrlSession,
    source: _Targets,
    journal: str | None,
    output: _display.Output,
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
            _display.complain(outcome.error.summary if outcome.error else "")
        elif outcome.target in settled:
            counts["settled"] += 1
        else:
            counts["left"] += 1
            output.say(_display.as_line(outcome.target))

    asyncio.run(_stopping.rehearse(session, source, show))
    before = f", {counts['settled']} are settled already" if settled else ""
    _display.note(
        f"Dry run: {counts['left']} would be stopped{before}, {counts['bad']} are no targets"
    )
    return _FAILED if counts["bad"] or output.lost else 0


def _conclude(ended: _stopping.Ended, output: _display.Output, *, json: bool) -> int:
    """Sum up a bulk stop, and find its exit code."""
    report = ended.report
    if ended.failure is not None:
        _display.complain(f"cannot read all targets: {ended.failure.strerror}")
    elif report.ended_early is not None and not ended.interrupted:
        _display.complain(f"ended early: {report.ended_early}")
    account = _display.summary(report, unread=ended.unread)
    account = f"{'Interrupted: ' * ended.interrupted}{account}"
    if json:
        _display.note(account)
    else:
        output.say(account, wrap=True)
    if report.counts[StopResult.NOT_FOUND] > report.total / 2:
        _display.complain("most are not found: check the workspace id, the aliases and base URL")
    if ended.interrupted:
        raise KeyboardInterrupt
    return 0 if report.ok and ended.failure is None and not output.lost else _FAILED


def _mistake(error: BctrlConfigError) -> Exception:
    """Say of an argument's error which option it is."""
    name, _, problem = error.summary.partition(" ")
    if name in _ARGUMENTS:
        name, cure = _ARGUMENTS[name]
        return _UsageError(f"{name} {problem}: {cure}")
    cure = "correct BCTRL_API_KEY" if "API key" in error.summary else error.cure or ""
    return _UsageError(f"{error.summary}: {cure[:1].lower()}{cure[1:]}")


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

    It has a workspace called demo with active runtimes: runtime-0001, runtime-0002 and so on. With
    --fault rate_limited=0.1, one in ten answers is a 429.
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
    for alias in _demo.aliases(runtimes):
        emulator.add_runtime(_demo.WORKSPACE, alias)
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
        output = _display.Output()
        _display.note("The emulator is running; Ctrl-C ends it. In another terminal:")
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
            received = len(emulator.requests)
            _display.note(f"{received} {'request' if received == 1 else 'requests'} received")


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
