"""The help of the commands: options in groups, then examples."""

from __future__ import annotations

import inspect
import textwrap
from collections import defaultdict
from typing import TYPE_CHECKING

from rich.text import Text
from typer.core import TyperArgument, TyperGroup, TyperOption

from bctrl_async.cli._output import Output

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typer._click import Command as BaseCommand
    from typer._click import Context

_Row = tuple[str, str]

MAX_WIDTH = 100
"""Columns from which longer lines would be hard to read."""
_INDENT = "  "
_SPACING = 2
_NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
_NO_SHORT = " " * len("-h, ")
_PANELS = (
    *("Arguments", "Commands", "Targets", "Filters", "Run", "Pace"),
    *("Output", "Connection", "Options"),
)
"""The groups of options in their order; any others follow them."""
# Only at the beginning of a paragraph, since text may have a colon anywhere.
_TITLES = r"(?m)(?:\A|(?<=\n\n))(?:Usage|Exit codes|\w+(?: \w+)?(?=:$)):"
# Not in the text of an option, which is indented further.
_OPTIONS = r"(?m)^ {2,6}--?\w[\w-]*(?:(?:, | / )--[\w-]+)*"


def format_help(
    command: BaseCommand, context: Context, width: int, commands: Iterable[_Row] = ()
) -> str:
    """Return the help of a command, styled if stdout is a terminal that shows it."""
    parts = [_usage(command, context), *_paragraphs(command, width)]
    groups: defaultdict[str, list[_Row]] = defaultdict(list)
    for name in _PANELS:
        groups[name] = []
    groups["Commands"] += commands
    parameters = command.get_params(context)
    for argument in (p for p in parameters if isinstance(p, TyperArgument)):
        groups["Arguments"].append((argument.metavar or argument.name, argument.help or ""))
    for option in (p for p in parameters if isinstance(p, TyperOption)):
        groups[option.rich_help_panel or "Options"].append(_option_row(option))
    first = max(len(name) for rows in groups.values() for name, _ in rows) + _SPACING
    parts += [
        "\n".join([f"{title}:", *(_format_row(*row, first, width) for row in rows)])
        for title, rows in groups.items()
        if rows
    ]
    # Examples, which are not wrapped, so that they can be pasted.
    parts += [inspect.cleandoc(command.epilog)] if command.epilog else []
    text = Text("\n\n".join(parts))
    text.highlight_regex(_TITLES, "bold")
    text.highlight_regex(_OPTIONS, "cyan")
    console = Output()
    with console.capture() as capture:
        console.print(text, soft_wrap=True)
    return capture.get()


def _usage(command: BaseCommand, context: Context) -> str:
    pieces = [context.command_path, "[OPTIONS]"]
    for parameter in command.params:
        if isinstance(parameter, TyperArgument):
            name = parameter.metavar or parameter.name
            pieces.append(
                (name if parameter.required else f"[{name}]") + "..." * (parameter.nargs != 1)
            )
    pieces += ["COMMAND"] * isinstance(command, TyperGroup)
    return f"Usage: {' '.join(pieces)}"


def _paragraphs(command: BaseCommand, width: int) -> Iterator[str]:
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield _wrap(paragraph, width)


def first_paragraph(command: BaseCommand) -> str:
    return inspect.cleandoc(command.help or "").partition("\n\n")[0]


def _option_row(option: TyperOption) -> _Row:
    """Return the names of an option, and its help with its default and variable."""
    short = [name for name in option.opts if not name.startswith("--")]
    long = [name for name in option.opts if name.startswith("--")]
    names = ", ".join([*short, *long])
    names = " / ".join([names, *option.secondary_opts])
    metavar = "" if option.is_flag or option.count else f" {option.metavar}"
    notes = []
    default = option.show_default
    if default is True and not option.is_flag and option.default is not None:
        default = str(option.default)
    if isinstance(default, str):
        notes.append(f"[default: {default}]")
    if option.show_envvar and isinstance(option.envvar, str):
        notes.append(f"[env: {option.envvar}]")
    text = " ".join([option.help or "", *(note.replace(" ", _NO_BREAK_SPACE) for note in notes)])
    return f"{_NO_SHORT * (not short)}{names}{metavar}", text


def _format_row(name: str, text: str, first: int, width: int) -> str:
    lines = _wrap(text, width - len(_INDENT) - first).split("\n")
    return textwrap.indent(f"{name.ljust(first)}{lines[0]}", _INDENT) + "".join(
        f"\n{_INDENT}{' ' * first}{line}" for line in lines[1:]
    )


def _wrap(text: str, width: int) -> str:
    """Wrap a paragraph between its words; not in --an-option or a name."""
    lines = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    return lines.replace(_NO_BREAK_SPACE, " ")
