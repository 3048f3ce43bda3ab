"""The command line `bctrl-async`: its commands, and how their errors are reported."""

import logging
from collections.abc import Sequence
from typing import Annotated

import typer

from bctrl_async import BctrlConfigError, BctrlError, __version__
from bctrl_async.cli import _output
from bctrl_async.cli._demo import demo
from bctrl_async.cli._emulator import emulator
from bctrl_async.cli._exit_codes import FAILED, USAGE, exit_code
from bctrl_async.cli._list import list_runtimes
from bctrl_async.cli._stop import stop
from bctrl_async.emulator import Fault

# Python would print warnings for which there is no handler into the display, which says it all.
_NO_LOG = logging.NullHandler()

# The session names its arguments; here they are options and variables.
_CONFIG_ERRORS: dict[str | None, str] = {
    "api_key": "invalid BCTRL_API_KEY: expected visible ASCII characters, without 'Bearer '",
    "base_url": (
        "invalid --base-url or BCTRL_BASE_URL: expected an https URL (http on this machine only) "
        "without credentials, query or fragment, such as https://api.bctrl.ai"
    ),
}

app: typer.Typer = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
app.command("stop")(stop)
app.command("list")(list_runtimes)
app.command("emulator", epilog=f"Faults: {', '.join(Fault)}.")(emulator)
app.command("demo")(demo)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; whatever a user can cause is one line on stderr.

    Args:
        args: The command line without the program's name; that of the process when None.

    Returns:
        The exit code.
    """
    logging.getLogger("bctrl_async").addHandler(_NO_LOG)
    try:
        return int(app(args, prog_name="bctrl-async", standalone_mode=False))
    except typer.TyperException as error:
        # Typer would draw a box, also into a file, and print what it was given as it is.
        context = getattr(error, "ctx", None)
        see = f" (see {context.command_path} --help)" if context else ""
        _output.print_error(error.format_message().strip().rstrip(".") + see)
        return USAGE
    except BctrlConfigError as error:
        _output.print_error(_CONFIG_ERRORS.get(error.argument, str(error)))
        return USAGE
    except BctrlError as error:
        _output.print_error(str(error))
        return exit_code([error])
    except OSError as error:
        # Of the help, which typer prints by itself.
        _output.stdout_failed(error)
        return FAILED


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    *,
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Show the version and exit.")
    ] = False,
) -> None:
    """Stop bctrl runtimes, and know what became of each one.

    New here? `bctrl-async demo` needs no key and no network.
    """
    if version or context.invoked_subcommand is None:
        typer.echo(f"bctrl-async {__version__}" if version else context.get_help())
        raise typer.Exit
