"""The command `doctor`: print what is in effect, and try it with one list."""

import asyncio
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Annotated

import typer
from yarl import URL

from bctrl_async import BctrlError, BctrlSession, __version__
from bctrl_async.cli._connection import Connection, ReadOptions, attempts_option, with_connection
from bctrl_async.cli._exit_codes import FAILED
from bctrl_async.cli._format import pluralize
from bctrl_async.cli._output import Output
from bctrl_async.cli._waiting import describe_read, show_waiting

_Workspace = Annotated[
    str | None,
    typer.Argument(metavar="WORKSPACE", help="Workspace to list, which tries the API key."),
]

EXAMPLES = """
Examples:
  bctrl-async doctor
  bctrl-async doctor WORKSPACE --profile staging

Environment variables:
  BCTRL_API_KEY    the API key
  BCTRL_CONFIG     the config file, which has profiles
"""


@dataclass(frozen=True, kw_only=True)
class _Options(ReadOptions):
    """The options of one attempt, whose error says what is wrong."""

    attempts: Annotated[int, attempts_option()] = 1


@partial(with_connection, kind=_Options)
def doctor(workspace: _Workspace = None, *, connection: Connection) -> int:
    """Print the versions, the URL, the proxy and where the key comes from; list WORKSPACE.

    It stops nothing. Exit codes: 0 all is well, 1 the server cannot be used, 2 usage or
    configuration error, also a key that is missing or that the API rejects.
    """
    output = Output()
    # An invalid option is an error at once.
    connection.session(needs_key=False)
    for name, found in _settings(connection):
        _print(output, name, found)
    session = connection.session()
    if workspace is None:
        _print(output, "API", "not tried: name a workspace that the key may list")
    else:
        count = asyncio.run(_list(session, workspace, output))
        _print(output, "API", f"the key is accepted: {pluralize(count, 'runtime')} in {workspace}")
    return FAILED if output.write_failed else 0


def _settings(connection: Connection) -> Iterator[tuple[str, str]]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "msgspec"))
    platform_ = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield "versions", f"bctrl_async {__version__}, {versions}, {platform_}"
    profile = connection.profile
    yield "config", f"{'' if profile.exists else 'no '}{profile}"
    yield "URL", f"{connection.options.base_url} ({connection.origin('base_url')})"
    if connection.proxy is not None:
        url, origin = connection.proxy
        yield "proxy", f"{URL(url).with_user(None)} ({origin})"
    yield "key", str(connection.key_source())


def _print(output: Output, name: str, found: str) -> None:
    output.print_result(f"{name:<8}  {output.escape_unencodable(found)}", wrap=True)


async def _list(session: BctrlSession, workspace: str, output: Output) -> int:
    unreadable: list[BctrlError] = []
    async with session, show_waiting(output, partial(describe_read, session)):
        runtimes = await session.list_runtimes(workspace, on_unreadable=unreadable.append)
    return len(runtimes) + len(unreadable)
