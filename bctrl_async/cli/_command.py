"""The classes of the commands: their help, and options that may be given once."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from typer.core import TyperCommand, TyperGroup, TyperOption

from bctrl_async.cli._help import MAX_WIDTH, first_paragraph, format_help

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": MAX_WIDTH}
_SINGLE = frozenset({"Targets", "Filters", "Run"})
"""The groups of options that decide what is stopped and where that is recorded.

Of other options the last value wins, so that a script can put its own before those of its user.
"""


class Command(TyperCommand):
    """A command whose help has its options in groups."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Parse the arguments, and reject a second value of an option in some groups."""
        given = [*args]
        # First, since --help ends it.
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=given)
            for option, count in Counter(order).items():
                if count > 1 and isinstance(option, TyperOption) and _is_single(option):
                    name = option.opts[0]
                    ctx.fail(f"{name} takes one {option.metavar}, and was given {count}")
        return rest

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the help."""
        formatter.write(format_help(self, ctx, formatter.width))


class Group(TyperGroup):
    """A command that has subcommands, which its help lists."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the help."""
        commands = [(name, first_paragraph(command)) for name, command in self.commands.items()]
        formatter.write(format_help(self, ctx, formatter.width, commands))


def _is_single(option: TyperOption) -> bool:
    takes_value = not (option.is_flag or option.multiple or option.count)
    return takes_value and option.rich_help_panel in _SINGLE
