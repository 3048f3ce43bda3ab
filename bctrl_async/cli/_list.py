"""The command `list`."""

import asyncio
from typing import Annotated

import typer
from typer.core import TyperCommand

from bctrl_async import BctrlSession
from bctrl_async.cli import _find, _output
from bctrl_async.cli._options import (
    FAILED,
    BaseUrl,
    Kind,
    OlderThan,
    Timeout,
    UsageError,
    api_key,
    option,
    told,
    wanted,
)


class ListCommand(TyperCommand):
    """Typer's versions differ in how they spell arguments in the usage; this is how we do."""

    def collect_usage_pieces(self, ctx: object) -> list[str]:  # noqa: ARG002 - click passes it.
        return ["[OPTIONS]", "WORKSPACE"]


def list_(
    workspace: Annotated[str | None, typer.Argument(hidden=True)] = None,
    *,
    status: Annotated[str | None, option("Only with this status.", "STATUS")] = None,
    kind: Kind = None,
    older_than: OlderThan = None,
    timeout: Timeout = 60.0,
    base_url: BaseUrl = None,
    json: Annotated[
        bool, option("Print a line of JSON for each, as stop --from reads it.", None, "--json")
    ] = False,
) -> int:
    """List the runtimes of a workspace.

    A runtime whose time of creation cannot be read is not older than anything. One that cannot be
    read at all is named on stderr, and the exit code is 1.
    """
    fitting = wanted(status, kind, older_than)
    if not workspace:
        raise UsageError("nothing to list: give a WORKSPACE")
    key = api_key(needed=True)
    output = _output.Output()

    def show() -> int:
        session = BctrlSession(key, base_url=base_url, timeout=timeout)
        found = asyncio.run(_find.find(session, workspace, fitting))
        if json:
            for runtime in found.runtimes:
                output.say(_output.as_found(workspace, runtime))
        else:
            _output.listing(output, found.runtimes)
        return FAILED if found.doubtful or output.lost else 0

    return told(show)
