"""The app of `bctrl-async`, and how its errors are reported."""

import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Literal

from cyclopts import App, CoercionError, CycloptsError, Group, Parameter, exceptions

from bctrl_async import BctrlConfigError, BctrlError, __version__
from bctrl_async.cli._connection import STOPPING, apply_profile
from bctrl_async.cli._output import (
    FAILED,
    IN_USE,
    USAGE,
    Output,
    exit_code,
    print_error,
    report_os_error,
    set_verbosity,
)
from bctrl_async.journal import JournalInUseError

_EXAMPLES = """\
Examples:
  bctrl-async demo
  bctrl-async list WORKSPACE
  bctrl-async stop WORKSPACE ALIAS
  bctrl-async stop --from runtimes.csv --journal tonight.jsonl

The API key is read from BCTRL_API_KEY, or as a profile says.
Each command has its own --help."""

# A module is imported only when its command, or the help that lists it, needs it.
_COMMANDS = {
    "stop": ("_stop:stop", "[WORKSPACE] [ALIAS...]"),
    "list": ("_list:list_runtimes", "[WORKSPACE]"),
    "get": ("_list:get_runtimes", "WORKSPACE ALIAS..."),
    "report": ("_report:report", "JOURNAL... [--from FILE]"),
    "doctor": ("_doctor:doctor", "[WORKSPACE]"),
    "emulator": ("_emulator:emulator", ""),
    "demo": ("_emulator:demo", ""),
}

app: App = App(
    name="bctrl-async",
    help="Stop bctrl runtimes and report the outcome of each.\n\n"
    "Try `bctrl-async demo` first: it needs no key and no network.",
    help_format="plaintext",
    version=f"bctrl-async {__version__}",
    default_parameter=Parameter(negative=(), allow_repeating=True),
    group_parameters=Group("Options", sort_key=9),
    help_epilogue=_EXAMPLES,
    config=apply_profile,
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
)
_SYNONYMS = {"stop": ("delete", "kill", "rm", "terminate"), "get": ("describe", "show", "status")}
"""Names of other commands, which an error answers with the one of this command."""
for _name, (_place, _arguments) in _COMMANDS.items():
    app.command(
        f"bctrl_async.cli.{_place}",
        name=_name,
        usage=f"Usage: bctrl-async {_name} [OPTIONS] {_arguments}".rstrip(),
        help_epilogue="",
        synonym=_SYNONYMS.get(_name),
    )


@app.command(name="--show-completion")
def _show_completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print the completion of SHELL: bash, zsh or fish."""
    script = app.generate_completion(shell=shell)
    if shell == "zsh":
        # The script alone works only in a folder of `fpath`, and this also when it is sourced.
        script += "compdef _cyclopts_bctrl-async bctrl-async"
    Output().print_result(script, exact=True)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and report an error as one line on stderr.

    Args:
        args: The arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit code.
    """
    connection = STOPPING
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # An alias that the terminal's encoding lacks must not end the run.
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if args is None else args
    try:
        if not _COMMANDS.keys() & set(given):
            # The help lists what the modules say of their commands.
            app.resolved_commands()
        command, bound, _ = app.parse_args(given)
        bound.apply_defaults()
        connection = bound.arguments.get("connection", STOPPING)
        set_verbosity(verbose=connection.verbose, quiet=connection.quiet)
        return command(*bound.args, **bound.kwargs) or 0
    except CycloptsError as error:
        print_error(_plain(error))
        return USAGE
    except BctrlError as error:
        connection.explain(error)
        print_error(error)
        if isinstance(error, JournalInUseError):
            return IN_USE
        return USAGE if isinstance(error, BctrlConfigError) else exit_code([error])
    except OSError as error:
        report_os_error(error)
        return FAILED
    except Exception as error:  # noqa: BLE001 - a traceback could show what must stay secret.
        print_error(f"{_fault(error)}. This is a fault of bctrl-async: please report it")
        return FAILED


def _plain(error: CycloptsError) -> str:
    # What follows the name of an unknown option may be a secret.
    if isinstance(error, exceptions.UnknownOptionError):
        name, _, _ = (error.token.keyword or error.token.value).partition("=")
        error.token = error.token.evolve(keyword=name)
    error.unused_tokens = [token.partition("=")[0] for token in error.unused_tokens or ()]
    text = str(error).rstrip(".")
    if isinstance(error, exceptions.UnusedCliTokensError) and error.unused_tokens:
        text = f"unexpected argument {error.unused_tokens[0]!r}"
    if isinstance(error, CoercionError) and error.argument and "Invalid value" not in text:
        # It has no name of an argument that is given by its position.
        text = f"invalid value for {error.argument.name}: {text}"
    return text[:1].lower() + text[1:]


def _fault(error: Exception) -> str:
    """Return the type of an unexpected error and its place in the package, without its text."""
    places = [
        f"line {line} of {name}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if (name := frame.f_globals.get("__name__", "")).startswith("bctrl_async.")
    ]
    return f"unexpected {type(error).__name__} at {places[-1]}"
