"""The command `doctor`: check the configuration and the way to the API, and stop nothing."""

import asyncio
import platform
import ssl
import textwrap
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Annotated

import msgspec
import typer
from rich.text import Text
from yarl import URL

from bctrl_async import BctrlConfigError, BctrlError, BctrlSession, __version__
from bctrl_async.cli._connection import Connection, with_quick_connection
from bctrl_async.cli._exit_codes import FAILED, USAGE, exit_code
from bctrl_async.cli._format import pluralize
from bctrl_async.cli._output import Output, one_line
from bctrl_async.cli._reach import Check, check_way
from bctrl_async.cli._records import OutputFormat, OutputOption, Records
from bctrl_async.cli._waiting import describe_read, show_waiting

_NAME_WIDTH = len("versions")
_MARKS = {True: "✓", False: "✗", None: "-"}
_ASCII_MARKS = {True: "ok", False: "FAILED", None: "-"}
_STYLES = {True: "green", False: "red", None: ""}

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


@with_quick_connection
def doctor(
    workspace: _Workspace = None,
    *,
    output_format: OutputOption = OutputFormat.TABLE,
    connection: Connection,
) -> int:
    """Check the configuration, the way to the API and the API key; stop nothing.

    Exit codes: 0 all is well, 1 a check failed, 2 usage or configuration error,
    also a key that is missing or that the API rejects.
    """
    output = Output()
    records = Records.of(output, output_format, Check.__struct_fields__)
    code = asyncio.run(_Examination(connection).run(workspace, output, records))
    return code or (FAILED if output.write_failed else 0)


class _Examination:
    """The checks of a connection, from the configuration to an answer of the API."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._code = 0
        self._listing: BctrlSession | None = None

    async def run(self, workspace: str | None, output: Output, records: Records | None) -> int:
        """Print each check once it is made, and return the exit code."""
        async with show_waiting(output, self._describe):
            async for check in self._checks(workspace):
                if check.ok is False:
                    self._code = self._code or FAILED
                if records is None:
                    _print_check(output, check)
                else:
                    records.print(msgspec.structs.asdict(check))
        return self._code

    def _describe(self) -> str:
        """Describe what the examination waits for."""
        if self._listing is not None:
            return describe_read(self._listing)
        return "Checking the way to the API"

    async def _checks(self, workspace: str | None) -> AsyncIterator[Check]:
        connection, options = self._connection, self._connection.options
        # An invalid option is an error at once.
        connection.session(needs_key=False)
        yield Check("versions", ok=True, found=_versions())
        yield Check("config", ok=True, found=self._config())
        yield Check("URL", ok=True, found=_from(options.base_url, connection.origin("base_url")))
        proxy = None
        if connection.proxy is not None:
            proxy = URL(connection.proxy[0])
            found = _from(str(proxy.with_user(None)), connection.proxy[1])
            yield Check("proxy", ok=True, found=found)
        key = self._key()
        yield key
        way = check_way(
            connection.url,
            proxy,
            connection.tls or ssl.create_default_context(),
            options.timeout,
        )
        is_reachable = True
        async for check in way:
            is_reachable = is_reachable and check.ok is True
            yield check
        if workspace is None:
            advice = "Name a workspace that it may list"
            yield Check("API", ok=None, found="the key was not tried", advice=advice)
        elif key.ok and is_reachable:
            yield await self._list(workspace)
        else:
            yield Check("API", ok=None, found="the key was not tried")

    def _config(self) -> str:
        profile = self._connection.profile
        if profile.exists:
            return str(profile)
        return f"no {profile}" if profile.file.exists() else f"no file {profile.file}"

    def _key(self) -> Check:
        try:
            # It checks the key without sending it.
            self._connection.session()
        except BctrlConfigError as error:
            self._code = USAGE
            return Check("key", ok=False, found=error.summary, advice=error.advice)
        return Check("key", ok=True, found=f"from {self._connection.key_source()}")

    async def _list(self, workspace: str) -> Check:
        unreadable: list[BctrlError] = []
        try:
            async with self._connection.session() as session:
                self._listing = session
                runtimes = await session.list_runtimes(workspace, on_unreadable=unreadable.append)
        except BctrlError as error:
            self._code = USAGE if isinstance(error, BctrlConfigError) else exit_code([error])
            self._connection.explain(error)
            advice = error.advice or error.default_advice or None
            return Check("API", ok=False, found=error.summary, advice=advice)
        count = pluralize(len(runtimes) + len(unreadable), "runtime")
        return Check("API", ok=True, found=f"the key is accepted: {count} in {workspace!r}")


def _versions() -> str:
    aiohttp, msgspec_ = version("aiohttp"), version("msgspec")
    return (
        f"bctrl_async {__version__}, Python {platform.python_version()}, aiohttp {aiohttp}, "
        f"msgspec {msgspec_}, {platform.system()} {platform.machine()}"
    )


def _from(value: str, origin: str) -> str:
    return f"{value} ({origin})"


def _print_check(output: Output, check: Check) -> None:
    """Print a check, and its advice on a line of its own."""
    marks = _MARKS if output.escape_unencodable("✓✗") == "✓✗" else _ASCII_MARKS
    width = max(map(len, marks.values()))
    indent = width + _NAME_WIDTH + 3
    found = output.escape_unencodable(one_line(check.found))
    lines = [found, *([output.escape_unencodable(one_line(check.advice))] if check.advice else [])]
    if output.on_terminal:
        room = max(output.width - indent, 20)
        lines = [
            part
            for line in lines
            for part in textwrap.wrap(line, room, break_on_hyphens=False, break_long_words=False)
        ]
    text = f"\n{' ' * indent}".join(lines)
    mark = (marks[check.ok].ljust(width), _STYLES[check.ok])
    output.print_result(Text.assemble(mark, f" {check.check.ljust(_NAME_WIDTH)}  {text}"))
