"""The commands `list` and `get`, and the list that `stop --all` uses."""

import asyncio
import time
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

import msgspec

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlResponseError,
    BctrlTimeoutError,
    Runtime,
    RuntimeFilter,
)
from bctrl_async.cli import _loop as loop, _options as opt, _output as out
from bctrl_async.cli._connection import CONNECTION, Connection
from bctrl_async.cli._progress import show_waiting
from bctrl_async.errors import format_duration
from bctrl_async.filters import Selection, parse_time
from bctrl_async.models import RuntimeKind, RuntimeStatus

if TYPE_CHECKING:
    from bctrl_async import BctrlSession


class FoundRuntimes(Selection):
    """Runtimes that match a filter; the bulk stop rejects unreadable runtimes."""

    @property
    def runtimes(self) -> list[Runtime]:
        """The runtimes that match."""
        return [item for item in self.items if isinstance(item, Runtime)]

    def keep_aliases(self, pattern: str) -> None:
        """Keep items whose alias matches a pattern, or cannot be read."""
        self.keep(lambda item: item.alias is None or fnmatchcase(item.alias, pattern))


async def find_runtimes(
    session: "BctrlSession",
    workspace: str,
    where: RuntimeFilter,
    output: out.Output,
    *,
    pattern: str | None = None,
    deadline: float | None = None,
) -> FoundRuntimes:
    """List the runtimes that match a filter, and whose alias matches a pattern."""
    unreadable: list[BctrlResponseError] = []
    listing = session.list_runtimes(workspace, on_unreadable=unreadable.append)
    awaited = f"the list of workspace {out.escape(workspace)}"
    started = time.monotonic()
    try:
        async with session, show_waiting(output, awaited):
            runtimes = await asyncio.wait_for(listing, deadline)
    except BctrlError:
        # A `BctrlTimeoutError` is a `TimeoutError`, too, but not the deadline's.
        raise
    except TimeoutError as error:
        raise BctrlTimeoutError(
            f"workspace {workspace!r} was not listed within the deadline of "
            f"{format_duration(deadline)}",
            advice="Allow a longer --deadline; nothing was stopped",
        ) from error
    matches = FoundRuntimes(workspace, where)
    matches.seconds = time.monotonic() - started
    # The whole list corrects a journal.
    matches.add([*runtimes, *unreadable])
    if pattern is not None:
        matches.keep_aliases(pattern)
    unknown = {where.status, where.kind} - {None, "any", *RuntimeStatus, *RuntimeKind}
    if unknown and not matches:
        # The value may be mistyped, and must not look like success.
        values = " and ".join(repr(value) for value in unknown)
        raise BctrlConfigError(f"no runtime of {workspace!r} is {values}")
    return matches


def list_runtimes(
    workspace: opt.Workspace = None,
    *,
    status: Annotated[
        opt.Text | None, opt.with_status(help="Only with this status.")
    ] = None,
    kind: opt.Kind = None,
    older_than: opt.OlderThan = None,
    alias: opt.Alias = None,
    output_format: opt.Format = "table",
    connection: Connection = CONNECTION,
) -> int:
    """List the runtimes of a workspace.

    A runtime that cannot be read is reported on stderr, and the exit code is 1.
    With --older-than, its age must be readable too, unless it has ended.

    For example:
      bctrl-async list WORKSPACE --status active --older-than 2h
      bctrl-async list WORKSPACE --alias 'ci-*' -o json > runtimes.jsonl
    """
    workspace = connection.workspace(workspace, is_needed=True)
    where = RuntimeFilter(status=status or "any", kind=kind, older_than=older_than)
    output = out.Output(prints_json=output_format == "json")
    session = connection.read_session()
    matches = loop.run(find_runtimes(session, workspace, where, output, pattern=alias))
    runtimes = matches.runtimes
    if output.prints_json:
        _print_json(output, workspace, runtimes)
    else:
        rows = [(item.status, item.kind, _age(item), item.alias) for item in runtimes]
        _print_table(output, [("STATUS", "KIND", "AGE", "ALIAS"), *rows])
    errors = [item for item in matches.items if not isinstance(item, Runtime)]
    _print_unreadable(errors)
    if not (output.prints_json or output.write_failed or output.in_pipe):
        # The count goes to stderr, so that each line of stdout after the header is a
        # runtime. The reader of a pipe would print its rows around it.
        out.print_info(out.pluralize(len(runtimes), "runtime"))
    return output.exit_code(is_failure=bool(errors))


def _print_unreadable(errors: Sequence[BctrlResponseError]) -> None:
    for error in errors[: out.MAX_SHOWN]:
        out.print_error(error)
    more = len(errors) - out.MAX_SHOWN
    if more > 0:
        out.print_error(f"could not list {out.pluralize(more, 'more runtime')}")


def get_runtimes(
    *names: opt.Names,
    workspace: opt.Workspace = None,
    output_format: opt.Format = "table",
    connection: Connection = CONNECTION,
) -> int:
    """Show runtimes.

    It reads WORKSPACE and ALIAS as stop does.

    Exit codes: 0 all were found, 1 some were not, or the server did not answer,
    2 usage or configuration error.

    For example:
      bctrl-async get WORKSPACE crm mail
      bctrl-async get -w WORKSPACE crm -o json | jq -r .status
    """
    workspace, aliases = connection.split_names(names, workspace, "get")
    if not aliases:
        raise BctrlConfigError("nothing to get: add ALIAS")
    output = out.Output(prints_json=output_format == "json")
    session = connection.read_session()
    answers = loop.run(_get_all(session, workspace, dict.fromkeys(aliases), output))
    runtimes = [answer for answer in answers if isinstance(answer, Runtime)]
    errors = [answer for answer in answers if isinstance(answer, BctrlError)]
    if output.prints_json:
        _print_json(output, workspace, runtimes)
    else:
        _print_details(output, runtimes)
    for error in errors:
        connection.explain(error)
        out.print_error(error)
    if errors:
        return out.exit_code_of(errors)
    return output.exit_code()


def _print_details(output: out.Output, runtimes: Sequence[Runtime]) -> None:
    """Print the fields that runtimes have, with an empty line between two runtimes."""
    words = {True: "yes", False: "no"}
    for number, runtime in enumerate(runtimes):
        if number:
            output.print_result("")
        fields = msgspec.to_builtins(runtime)
        fields |= fields.pop("summary") or {}
        fields["age"] = _age(runtime)
        rows = [
            (key, words.get(value, value))
            for key, value in fields.items()
            if value is not None
        ]
        _print_table(output, rows)


async def _get_all(
    session: "BctrlSession",
    workspace: str,
    aliases: Collection[str],
    output: out.Output,
) -> list[Runtime | BctrlError]:
    async def get(alias: str) -> Runtime | BctrlError:
        try:
            return await session.get_runtime(workspace, alias)
        except BctrlError as error:
            return error

    awaited = f"the status of {out.pluralize(len(aliases), 'runtime')}"
    async with session, show_waiting(output, awaited):
        return await asyncio.gather(*(get(alias) for alias in aliases))


def _print_json(
    output: out.Output, workspace: str, runtimes: Iterable[Runtime]
) -> None:
    """Print runtimes as lines that `--from` reads, with the fields of a target."""
    for runtime in runtimes:
        fields = {
            "workspace_id": workspace,
            "alias": runtime.alias,
            "status": runtime.status,
            "kind": runtime.kind,
            "created_at": runtime.created_at,
            "runtime": msgspec.to_builtins(runtime),
        }
        output.print_object(fields)


def _print_table(output: out.Output, rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns; in a pipe, a table of rich would be cut at 80 columns."""
    table = [[out.escape(cell) for cell in row] for row in rows]
    widths = [out.width_of(column) for column in zip(*table, strict=True)]
    for row in table:
        cells = [out.pad(cell, width) for cell, width in zip(row, widths, strict=True)]
        output.print_result("  ".join(cells).rstrip())


def _age(runtime: Runtime) -> str:
    """Return the age in the format of --older-than, or `?` if it cannot be read."""
    created = parse_time(runtime.created_at)
    if created is None:
        return "?"
    return format_duration(int((datetime.now(UTC) - created).total_seconds()))
