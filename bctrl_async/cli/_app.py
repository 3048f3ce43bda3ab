"""The typer app of `bctrl-async`, and how its errors are reported."""

import logging
import re
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from bctrl_async import BctrlConfigError, BctrlError, __version__
from bctrl_async.cli import _doctor, _emulator, _get, _list, _report, _stop
from bctrl_async.cli._command import CONTEXT_SETTINGS, Command, Group
from bctrl_async.cli._demo import demo
from bctrl_async.cli._exit_codes import FAILED, JOURNAL_IN_USE, USAGE, exit_code
from bctrl_async.cli._format import describe
from bctrl_async.cli._output import print_error, report_os_error
from bctrl_async.cli._verbosity import LOG_PRINTER
from bctrl_async.journal import JournalInUseError

_PREFIX = "Value error, "
"""Text that typer puts before the reason why a value is invalid."""

_of_pydantic = re.compile("Input should be ([^,]*)(?:, unable .*)?").sub

_EXAMPLES = """
Examples:
  bctrl-async demo
  bctrl-async list WORKSPACE
  bctrl-async stop WORKSPACE ALIAS
  bctrl-async stop --from runtimes.csv --journal tonight.jsonl

The API key is read from BCTRL_API_KEY, or as a profile says.
Each command has its own --help.
"""

app: typer.Typer = typer.Typer(
    cls=Group, context_settings=CONTEXT_SETTINGS, rich_markup_mode=None, epilog=_EXAMPLES
)
app.command("stop", cls=Command, epilog=_stop.EXAMPLES)(_stop.stop)
app.command("list", cls=Command, epilog=_list.EXAMPLES)(_list.list_runtimes)
app.command("get", cls=Command, epilog=_get.EXAMPLES)(_get.get_runtime)
app.command("report", cls=Command, epilog=_report.EXAMPLES)(_report.report)
app.command("emulator", cls=Command, epilog=_emulator.EXAMPLES)(_emulator.emulator)
app.command("doctor", cls=Command, epilog=_doctor.EXAMPLES)(_doctor.doctor)
app.command("demo", cls=Command)(demo)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    *,
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Show the version and exit.")
    ] = False,
) -> None:
    """Stop bctrl runtimes and report the outcome of each.

    Try `bctrl-async demo` first: it needs no key and no network.
    """
    if version or context.invoked_subcommand is None:
        typer.echo(f"bctrl-async {__version__}" if version else context.get_help())
        raise typer.Exit


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and report an error as one line on stderr.

    Args:
        args: The arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit code.
    """
    logging.getLogger("bctrl_async").addHandler(LOG_PRINTER)
    try:
        return int(app(args, prog_name="bctrl-async", standalone_mode=False))
    except typer.TyperException as error:
        # Typer itself would draw a box, even into a file, and would not escape user input.
        context = getattr(error, "ctx", None)
        see = f" (see {context.command_path} --help)" if context else ""
        message = _of_pydantic(r"should be \1", error.format_message().replace(_PREFIX, "", 1))
        print_error(message.strip().rstrip(".") + see)
        return USAGE
    except JournalInUseError as error:
        print_error(describe(error))
        return JOURNAL_IN_USE
    except BctrlError as error:
        print_error(describe(error))
        return USAGE if isinstance(error, BctrlConfigError) else exit_code([error])
    except OSError as error:
        report_os_error(error)
        return FAILED
    except Exception as error:  # noqa: BLE001 - a traceback could show what must stay secret.
        print_error(f"{_fault(error)}. This is a fault of bctrl-async: please report it")
        return FAILED


def _fault(error: Exception) -> str:
    """Return the type of an unexpected error and its place in the package, without its text."""
    places = [
        f"line {line} of {name}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if (name := frame.f_globals.get("__name__", "")).startswith("bctrl_async.")
    ]
    return f"unexpected {type(error).__name__} at {places[-1]}"
