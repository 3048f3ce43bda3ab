"""The command `get`."""

import asyncio
from functools import partial
from typing import Annotated

import typer

from bctrl_async import BctrlSession, Runtime
from bctrl_async.cli._connection import Connection, with_quick_connection
from bctrl_async.cli._exit_codes import FAILED
from bctrl_async.cli._output import Output
from bctrl_async.cli._records import OutputFormat, OutputOption, print_json, runtime_fields
from bctrl_async.cli._runtimes import print_runtime
from bctrl_async.cli._waiting import describe_read, show_waiting

_Workspace = Annotated[str, typer.Argument(metavar="WORKSPACE", help="Workspace id.")]
_Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="Alias of the runtime.")]
EXAMPLES = """
Examples:
  bctrl-async get WORKSPACE crm
  bctrl-async get WORKSPACE crm -o json | jq -r .status

Environment variables:
  BCTRL_API_KEY    the API key
  BCTRL_CONFIG     the config file, which has profiles
"""


@with_quick_connection
def get_runtime(
    workspace: _Workspace,
    alias: _Alias,
    *,
    output_format: OutputOption = OutputFormat.TABLE,
    connection: Connection,
) -> int:
    """Show a runtime.

    Exit codes: 0 it was found, 1 it was not, or the server did not answer, 2 usage or
    configuration error.
    """
    output = Output()
    runtime = asyncio.run(_get(connection.session(), workspace, alias, output))
    if output_format is OutputFormat.JSON:
        print_json(output, runtime_fields(workspace, runtime))
    else:
        print_runtime(output, runtime)
    return FAILED if output.write_failed else 0


async def _get(session: BctrlSession, workspace: str, alias: str, output: Output) -> Runtime:
    async with session, show_waiting(output, partial(describe_read, session)):
        return await session.get_runtime(workspace, alias)
