"""The command `doctor`: print what is in effect, and try it with one list."""

import platform
from importlib.metadata import version

from yarl import URL

from bctrl_async import RuntimeFilter, __version__
from bctrl_async.cli import _loop as loop
from bctrl_async.cli._connection import CONNECTION, Connection
from bctrl_async.cli._list import find_runtimes
from bctrl_async.cli._options import Workspace
from bctrl_async.cli._output import Output, pluralize


def doctor(workspace: Workspace = None, *, connection: Connection = CONNECTION) -> int:
    """Print what is in effect and try it with one list.

    It prints the versions, the URL, the proxy and where the key comes from,
    lists WORKSPACE with one attempt, and stops nothing.

    Exit codes: 0 all is well, 1 the server cannot be used, 2 usage or
    configuration error, also a key that is missing or that the API rejects.

    For example:
      bctrl-async doctor
      bctrl-async doctor WORKSPACE --profile staging
    """
    output = Output()
    # Here and below, what is unusable raises its error before the next line is printed.
    connection.session(needs_key=False)
    profile = connection.profile
    proxy = connection.proxy_in_effect()
    versions = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "msgspec"))
    python = f"Python {platform.python_version()}"
    system = f"{platform.system()} {platform.machine()}"
    line = f"versions  bctrl_async {__version__}, {versions}, {python}, {system}"
    output.print_result(line)
    output.print_result(f"config    {profile.title or 'no profile is in use'}")
    origins = {"base_url": "the default", "proxy": "HTTPS_PROXY", **profile.origins}
    output.print_result(f"URL       {connection.base_url} ({origins['base_url']})")
    if proxy is not None:
        url = URL(proxy).with_user(None)
        output.print_result(f"proxy     {url} ({origins['proxy']})")
    connection.key()
    output.print_result(f"key       {profile.key_origin}")
    session = connection.read_session(attempts=1)
    workspace = connection.workspace(workspace)
    if not workspace:
        output.print_result(
            "API       not tried: name a workspace that the key may list"
        )
    else:
        finding = find_runtimes(session, workspace, RuntimeFilter(status="any"), output)
        count = pluralize(len(loop.run(finding)), "runtime")
        output.print_result(f"API       the key is accepted: {count} in {workspace}")
    return output.exit_code()
