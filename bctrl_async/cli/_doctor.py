"""The command `doctor`: print what is in effect, and try it with one list."""

import asyncio
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated

from cyclopts import Parameter
from yarl import URL

from bctrl_async import RuntimeFilter, __version__
from bctrl_async.cli._connection import ATTEMPTS, ReadConnection
from bctrl_async.cli._list import find_runtimes
from bctrl_async.cli._options import Count, Workspace
from bctrl_async.cli._output import FAILED, Output, pluralize


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class _Connection(ReadConnection):
    """The options of one attempt, whose error says what is wrong."""

    attempts: Annotated[Count, ATTEMPTS] = 1


_TRYING = _Connection()


def doctor(workspace: Workspace = None, /, *, connection: _Connection = _TRYING) -> int:
    """Print what is in effect, and try it with one list.

    It prints the versions, the URL, the proxy and where the key comes from,
    lists WORKSPACE with one attempt, and stops nothing.

    Exit codes: 0 all is well, 1 the server cannot be used, 2 usage or
    configuration error, also a key that is missing or that the API rejects.

    For example:
      bctrl-async doctor
      bctrl-async doctor WORKSPACE --profile staging
    """
    output = Output()
    # An invalid option is an error at once.
    connection.session(needs_key=False)
    for name, found in _settings(connection):
        output.print_result(f"{name:<8}  {found}")
    session = connection.session()
    workspace = connection.workspace(workspace)
    if workspace is None:
        output.print_result("API       not tried: name a workspace that the key may list")
    else:
        finding = find_runtimes(session, workspace, RuntimeFilter(status="any"), None, output)
        count = pluralize(len(asyncio.run(finding)), "runtime")
        output.print_result(f"API       the key is accepted: {count} in {workspace}")
    return FAILED if output.write_failed else 0


def _settings(connection: ReadConnection) -> Iterator[tuple[str, str]]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "msgspec"))
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield "versions", f"bctrl_async {__version__}, {versions}, {system}"
    profile = connection.profile
    yield "config", f"{'' if profile.exists else 'no '}{profile}"
    yield "URL", f"{connection.base_url} ({connection.base_url.origin})"
    if (proxy := connection.proxy_in_effect) is not None:
        yield "proxy", f"{URL(proxy).with_user(None)} ({proxy.origin})"
    yield "key", connection.key_source().origin
