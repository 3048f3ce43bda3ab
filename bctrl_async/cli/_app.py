"""The app of `bctrl-async`, and how its errors are reported."""

import difflib
import re
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Literal

from cyclopts import App, CoercionError, CycloptsError, Group, Parameter, exceptions

from bctrl_async import BctrlError, __version__
from bctrl_async.cli import _output
from bctrl_async.cli._connection import CONNECTION
from bctrl_async.cli._profile import apply_profile
from bctrl_async.journal import JournalInUseError

_EXAMPLES = """\
Examples:
  bctrl-async demo
  bctrl-async list WORKSPACE
  bctrl-async stop WORKSPACE ALIAS
  bctrl-async stop --from runtimes.csv --journal tonight.jsonl

The API key is read from BCTRL_API_KEY, or as a profile says.
Each command has its own --help."""

_COMMANDS = {
    "stop": ("[WORKSPACE] [ALIAS...]", "Stop runtimes and report the outcome of each"),
    "list": ("[WORKSPACE]", "List the runtimes of a workspace"),
    "get": ("[WORKSPACE] ALIAS...", "Show runtimes"),
    "report": ("JOURNAL... [--from FILE]", "Say which targets of a list are done"),
    "doctor": ("[WORKSPACE]", "Print what is in effect and try it with one list"),
    "emulator": ("", "Run a local server of the API for tests, until Ctrl-C"),
    "demo": ("", "Stop many runtimes on a misbehaving server; needs no key"),
}
"""The arguments and the summary of each command."""
_FUNCTIONS = {
    "list": "list:list_runtimes",
    "get": "list:get_runtimes",
    "demo": "emulator:demo",
}
"""The modules and functions of commands, where a name differs from the command's."""

_TYPO_SIMILARITY = 0.85
"""The least similarity of an unknown option to the option that an error suggests."""

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
_SYNONYMS = {
    "stop": ("delete", "kill", "rm", "terminate"),
    "get": ("describe", "show", "status"),
}
"""Other tools' names for a command, which an error corrects."""
for _name, (_arguments, _summary) in _COMMANDS.items():
    # The module of a command is imported only if that command is given.
    _function = _FUNCTIONS.get(_name, f"{_name}:{_name}")
    app.command(
        f"bctrl_async.cli._{_function}",
        name=_name,
        help=f"{_summary}.",
        usage=f"Usage: bctrl-async {_name} [OPTIONS] {_arguments}".rstrip(),
        help_epilogue="",
        synonym=_SYNONYMS.get(_name),
    )


@app.command(name="--show-completion")
def _show_completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print the completion of SHELL: bash, zsh or fish."""
    script = app.generate_completion(shell=shell)
    if shell == "zsh":
        # Zsh completes no option where an argument without an action may stand.
        script = script.replace(".' \\\n", '.:_guard "^-*" name\' \\\n')
        # With this line, the script can be sourced: without it, `fpath` must have it.
        script += "compdef _cyclopts_bctrl-async bctrl-async"
    if shell == "bash":
        # A workspace may be named like a command: only the first name is a command.
        script = script.replace(
            '[[ " $all_commands ', '[[ -z ${cmd_path[0]} && " $all_commands '
        )
    _output.Output().print_result(script, is_exact=True)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and report an error as one line on stderr.

    Args:
        args: The arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit code.
    """
    connection = CONNECTION
    _escape_unencodable()
    if args is None:
        args = sys.argv[1:]
    args = _spell_out(args)
    try:
        for name in _COMMANDS.keys() & set(args):
            # A command's own help is its docstring; the summary is for the list.
            app[name].help = None
        command, bound, _ = app.parse_args(args)
        bound.apply_defaults()
        connection = bound.arguments.get("connection", CONNECTION)
        # `report` has no connection, but can be quiet.
        quiet = bound.arguments.get("quiet", connection.quiet)
        _output.set_verbosity(verbose=connection.verbose, quiet=quiet)
        return command(*bound.args, **bound.kwargs) or 0
    except CycloptsError as error:
        _output.print_error(_error_text(error))
        return _output.USAGE
    except BctrlError as error:
        connection.explain(error)
        _output.print_error(error)
        if isinstance(error, JournalInUseError):
            return _output.IN_USE
        return _output.exit_code_of([error])
    except OSError as error:
        _print_os_error(error)
        return _output.FAILED
    except Exception as error:  # noqa: BLE001 - a traceback could show a secret.
        _print_fault(error)
        return _output.FAILED


def _spell_out(args: Sequence[str]) -> Sequence[str]:
    """Return the arguments with the options that `help` and -V stand for."""
    match args:
        case ["help", *names]:
            return [*names, "--help"]
        case ["-V"]:
            # Beside others it may be mistyped for -v, and nothing would be stopped.
            return ["--version"]
    return args


def _escape_unencodable() -> None:
    """Escape the characters that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _print_os_error(error: OSError) -> None:
    # The error of a write to stdout names no file.
    if error.errno in _output.WRITE_ERRORS and error.filename is None:
        _output.Output().fail(error)
    else:
        _output.print_error(str(error))


def _print_fault(error: Exception) -> None:
    """Print where this program failed, without its values, which may be secret."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = f"line {frame.lineno} of {Path(frame.filename).name}"
    problem = f"unexpected {type(error).__name__} at {line}"
    _output.print_error(f"{problem}. This is a fault of bctrl-async: please report it")


def _option_name(token: str) -> str:
    """Return the name of an option without its value, which may be a secret."""
    if re.match("-[^-]", token):
        # The value may follow the letter of a short option at once.
        return token[:2]
    return token.partition("=")[0]


def _error_text(error: CycloptsError) -> str:
    """Return the text of a wrong command line, without values of unknown options."""
    unused = [_option_name(token) for token in error.unused_tokens or ()]
    # These are the tokens that `str(error)` shows.
    error.unused_tokens = unused
    text = str(error)
    match error:
        case exceptions.UnknownOptionError():
            text = _unknown_option(error)
        case exceptions.ValidationError(argument=argument) if argument:
            # The value is shown as the user wrote it: 0m, not 0.0.
            error.value = argument.tokens[0].value
            text = str(error)
        case exceptions.UnknownCommandError() if unused[0].startswith("-"):
            text = f"options follow the command: bctrl-async COMMAND {unused[0]}"
        case exceptions.UnusedCliTokensError() if unused:
            text = f"unexpected argument {unused[0]!r}"
        case CoercionError():
            text = _invalid_value(error)
    text = text.rstrip(".")
    return text[:1].lower() + text[1:]


def _unknown_option(error: exceptions.UnknownOptionError) -> str:
    name = _option_name(error.token.keyword or error.token.value)
    error.token = error.token.evolve(keyword=name)
    text = str(error).rstrip(".")
    unknown, _, suggestion = text.partition(" Did you mean ")
    # A typo has nearly the same letters, in any order: --form is meant as --from, but
    # --no-verify-ssl is not meant as --no-verify.
    letters = sorted(suggestion.removesuffix("?"))
    if difflib.SequenceMatcher(None, letters, sorted(name)).ratio() >= _TYPO_SIMILARITY:
        return text
    return unknown


def _invalid_value(error: CoercionError) -> str:
    if error.target_type is bool and error.token:
        return f"{error.token.keyword} takes no value"
    text = str(error)
    if error.argument and "Invalid value" not in text:
        # The text of cyclopts does not name a positional argument.
        return f"invalid value for {error.argument.name}: {text}"
    return text
