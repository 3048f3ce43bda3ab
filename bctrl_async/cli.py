"""The command `bctrl-async`: stop runtimes, run the emulator, see a demonstration."""

import asyncio
import errno
import os
import shlex
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from bctrl_async import (
    BctrlConfigError,
    RuntimeRef,
    StopOutcome,
    StopResult,
    __version__,
    _demo,
    _display,
)
from bctrl_async._fan_out import stop_all
from bctrl_async.emulator import Emulator, Fault

_FAILED, _USAGE = 1, 2
_MOST_RUNTIMES = 100_000

# What the session says of an argument, and what to do about it here.
_URL_CURE = "use https, or http on this machine"
_ARGUMENTS = {
    "base_url": ("--base-url", _URL_CURE),
    "BCTRL_BASE_URL": ("BCTRL_BASE_URL", _URL_CURE),
    "timeout": ("--timeout", "give seconds above 0"),
    "max_connections": ("--max-connections", "give a whole number from 1"),
}

# Typer brings its own click or imports it, by version; this is either one's class.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

app = typer.Typer(
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
        return ["[OPTIONS]", "WORKSPACE", "ALIAS..."]


@app.command("stop", cls=_StopCommand)
def _stop(
    workspace: Annotated[str, typer.Argument(metavar="WORKSPACE", hidden=True)],
    aliases: Annotated[list[str], typer.Argument(metavar="ALIAS", hidden=True)],
    *,
    base_url: Annotated[
        str | None, _option("Where the API is; default is BCTRL_BASE_URL.", "URL")
    ] = None,
    timeout: Annotated[float, _option("What one attempt may take; default 60.", "SECONDS")] = 60.0,
    max_connections: Annotated[int, _option("Stops in flight at most; default 100.", "N")] = 100,
    json: Annotated[bool, _option("Print a line of JSON for each alias.", None, "--json")] = False,
) -> int:
    """Stop runtimes of a workspace by their aliases, all at once.

    The API key is read from BCTRL_API_KEY: on the command line, every user of the machine could
    see it. Put -- before WORKSPACE if an alias begins with a dash.

    Each alias gets one line that says what became of it. Settled, nothing is left to do: stopped,
    accepted, already_stopped, not_found. Not settled: rejected, not_sent, unknown. It is safe to
    run the command again.

    The exit code is 0 if all are settled, 1 if some are not, 2 if the command cannot be run as it
    stands, 130 after Ctrl-C.
    """
    if not os.environ.get("BCTRL_API_KEY"):
        raise _UsageError("there is no API key: set BCTRL_API_KEY")
    targets = [RuntimeRef(workspace, alias) for alias in aliases]
    output = _display.Output()
    lines = _display.Lines(output, targets)
    counts: Counter[StopResult] = Counter()

    def report(outcome: StopOutcome) -> None:
        counts[outcome.result] += 1
        if json:
            output.say(_display.as_json(outcome))
        else:
            lines.show(outcome)

    began = time.monotonic()
    try:
        cut_short = asyncio.run(
            stop_all(
                targets,
                report,
                base_url=base_url,
                timeout=timeout,
                max_connections=max_connections,
            )
        )
    except BctrlConfigError as error:
        name, _, problem = error.summary.partition(" ")
        name, cure = _ARGUMENTS.get(name, (name, "correct BCTRL_API_KEY"))
        raise _UsageError(f"{name} {problem}: {cure}") from error
    if cut_short:
        output.leave_line()
    for outcome in cut_short:
        report(outcome)
    if not json:
        count = _display.summary(counts, time.monotonic() - began)
        output.say(f"Interrupted: {count}" if cut_short else count)
    if cut_short:
        raise KeyboardInterrupt
    return 0 if all(result.settled for result in counts) and not output.lost else _FAILED


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
