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
    build_filter,
    complete_status,
    require_api_key,
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
    session = BctrlSession(require_api_key(context), base_url=base_url, timeout=timeout)
    found = asyncio.run(
        _find.find_runtimes(session, workspace, build_filter(status, kind, older_than))
    )
    output = _output.Output()
    if json:
        for runtime in found.runtimes:
            output.print_result(_output.runtime_json(workspace, runtime))
    else:
        _output.print_runtimes(output, found.runtimes)
    return FAILED if found.incomplete or output.write_failed else 0
