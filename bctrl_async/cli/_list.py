"""The command `list`."""

import asyncio
from typing import Annotated

import typer

from bctrl_async import BctrlSession
from bctrl_async.cli import _find, _output
from bctrl_async.cli._exit_codes import FAILED
from bctrl_async.cli._options import (
    FILTERS,
    OUTPUT,
    BaseUrl,
    Kind,
    OlderThan,
    Timeout,
    api_key,
    complete_status,
    wanted,
)


def list_runtimes(
    context: typer.Context,
    workspace: Annotated[str, typer.Argument(metavar="WORKSPACE", help="The workspace's id.")],
    *,
    status: Annotated[
        str | None,
        typer.Option(
            "--status",
            metavar="STATUS",
            help="Only with this status.",
            autocompletion=complete_status,
            rich_help_panel=FILTERS,
        ),
    ] = None,
    kind: Kind = None,
    older_than: OlderThan = None,
    timeout: Timeout = 60.0,
    base_url: BaseUrl = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            metavar="",
            help="Print a line of JSON for each, as stop --from reads it.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
) -> int:
    """List the runtimes of a workspace.

    A runtime whose time of creation cannot be read is not older than anything.
    One that cannot be read at all is named on stderr, and the exit code is 1.
    """
    session = BctrlSession(api_key(context), base_url=base_url, timeout=timeout)
    found = asyncio.run(_find.find(session, workspace, wanted(status, kind, older_than)))
    output = _output.Output()
    if json:
        for runtime in found.runtimes:
            output.say(_output.as_found(workspace, runtime))
    else:
        _output.listing(output, found.runtimes)
    return FAILED if found.doubtful or output.lost else 0
