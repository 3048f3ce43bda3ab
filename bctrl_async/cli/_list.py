"""The command `list`."""

import asyncio
from typing import Annotated

import typer

from bctrl_async import RuntimeFilter
from bctrl_async.cli._connection import Connection, with_quick_connection
from bctrl_async.cli._exit_codes import FAILED
from bctrl_async.cli._find import find_runtimes
from bctrl_async.cli._format import MAX_SHOWN, describe, pluralize
from bctrl_async.cli._options import Kind, OlderThan, status_option
from bctrl_async.cli._output import Output, print_error, print_info
from bctrl_async.cli._records import ListFormat, ListOption, print_csv, print_json, runtime_fields
from bctrl_async.cli._runtimes import SortKey, print_runtimes, sort_runtimes

_Workspace = Annotated[str, typer.Argument(metavar="WORKSPACE", help="Workspace id.")]
_Status = Annotated[str | None, status_option(help="Only with this status.")]
_Sort = Annotated[
    SortKey | None,
    typer.Option(
        "--sort",
        metavar="KEY",
        rich_help_panel="Output",
        help="Sort by age (oldest first), alias, status or kind.",
    ),
]
_Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", metavar="N", min=1, rich_help_panel="Output", help="Show only the first N."
    ),
]

EXAMPLES = """
Examples:
  bctrl-async list WORKSPACE --status active --older-than 2h
  bctrl-async list WORKSPACE --sort age --limit 10
  bctrl-async list WORKSPACE -o csv > runtimes.csv

Environment variables:
  BCTRL_API_KEY    the API key
  BCTRL_CONFIG     the config file, which has profiles
"""


@with_quick_connection
def list_runtimes(
    workspace: _Workspace,
    *,
    status: _Status = None,
    kind: Kind = None,
    older_than: OlderThan = None,
    sort: _Sort = None,
    limit: _Limit = None,
    output_format: ListOption = ListFormat.TABLE,
    connection: Connection,
) -> int:
    """List the runtimes of a workspace.

    A runtime that cannot be read is reported on stderr, and the exit code is 1. So is one that
    may run and whose creation time cannot be read, with --older-than.
    """
    wanted = RuntimeFilter(status=status or "any", kind=kind, older_than=older_than)
    output = Output()
    found = asyncio.run(find_runtimes(connection.session(), workspace, wanted, output))
    runtimes, unreadable = found.runtimes, found.unreadable
    for error in unreadable[:MAX_SHOWN]:
        print_error(describe(error))
    if len(unreadable) > MAX_SHOWN:
        more = len(unreadable) - MAX_SHOWN
        print_error(f"{pluralize(more, 'more runtime')} cannot be read")
    shown = sort_runtimes(runtimes, sort)[:limit]
    match output_format:
        case ListFormat.TABLE:
            print_runtimes(output, shown)
        case ListFormat.JSON:
            for runtime in shown:
                print_json(output, runtime_fields(workspace, runtime))
        case _:
            print_csv(output, workspace, shown)
    count = pluralize(len(runtimes), "runtime")
    if len(shown) < len(runtimes):
        print_info(f"{count}, {len(shown):,} shown")
    elif output_format is ListFormat.TABLE and not output.write_failed:
        # On stderr, so that each line but the header is a runtime to a program that reads them.
        print_info(count)
    return FAILED if unreadable or output.write_failed else 0
