"""The command `bctrl-async`: stop runtimes, list them, run the emulator, see a demonstration."""

import logging
from collections.abc import Sequence
from typing import Annotated

import typer

from bctrl_async import __version__
from bctrl_async.cli import _output
from bctrl_async.cli._demo import demo
from bctrl_async.cli._emulator import emulator
from bctrl_async.cli._list import ListCommand, list_
from bctrl_async.cli._options import FAILED, USAGE, UsageError, option
from bctrl_async.cli._stop import StopCommand, stop
from bctrl_async.emulator import Fault

# Python would print warnings for which there is no handler into the display, which says it all.
_NO_LOG = logging.NullHandler()

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
    except UsageError as error:
        see = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _output.complain(error.format_message().strip().rstrip(".") + see)
        return USAGE
    except OSError as error:
        # Of the help, which click prints by itself.
        _output.lose(error)
        return FAILED
    return int(code)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    *,
    version: Annotated[bool, option("Show the version and exit.", None, "--version")] = False,
) -> None:
    """Stop bctrl runtimes, and know what became of each one.

    New here? `bctrl-async demo` needs no key and no network.
    """
    if version or context.invoked_subcommand is None:
        output = _output.Output()
        output.say(f"bctrl-async {__version__}" if version else context.get_help())
        raise typer.Exit(FAILED if output.lost else 0)


app.command("stop", cls=StopCommand)(stop)
app.command("list", cls=ListCommand)(list_)
app.command("emulator", epilog=f"The faults: {', '.join(Fault)}.")(emulator)
app.command("demo")(demo)
