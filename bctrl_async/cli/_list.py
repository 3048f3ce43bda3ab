"""The commands `list` and `get`, and the runtimes of a workspace that `stop --all` finds."""

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Annotated

import msgspec
from rich.cells import cell_len, set_cell_size

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlResponseError,
    BctrlSession,
    BctrlTimeoutError,
    Runtime,
    RuntimeFilter,
    RuntimeRef,
)
from bctrl_async.cli import _options as opt, _output as out
from bctrl_async.cli._connection import CONNECTION, Connection
from bctrl_async.cli._progress import show_waiting
from bctrl_async.errors import format_duration
from bctrl_async.filters import Selection, parse_time
from bctrl_async.models import RuntimeKind, RuntimeStatus


class FoundRuntimes(Selection):
    """Runtimes of a workspace that match a filter; the bulk stop rejects unreadable runtimes."""

    @property
    def runtimes(self) -> list[Runtime]:
        """The runtimes that match."""
        return [item for item in self.items if isinstance(item, Runtime)]

    def keep(self, is_kept: Callable[[RuntimeRef | BctrlError], bool]) -> None:
        """Keep the targets for which a function returns True, except replaced runtimes."""
        pairs = zip(self.without_replaced().items, self, strict=True)
        self.items = [item for item, target in pairs if is_kept(target)]

    def confirm(self, base_url: str) -> bool:
        """Show the runtimes and ask whether to stop them."""
        kinds = Counter(out.escape(runtime.kind) for runtime in self.runtimes)
        summary = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        if unreadable := len(self) - len(self.runtimes):
            summary += f"; {unreadable:,} cannot be read"
        asked = f"In workspace {out.escape(self.workspace_id)} at {base_url}: {summary}"
        asked += f"\nStop {out.pluralize(len(self.runtimes), 'runtime')}? [y/N] "
        try:
            # The question goes to stderr, since stdout may be a file.
            print(asked, end="", file=sys.stderr, flush=True)  # noqa: T201 - rich would wrap it.
            return sys.stdin.readline().strip().lower() in {"y", "yes"}
        except KeyboardInterrupt:
            out.print_info("\nNothing was stopped")  # The line goes below the ^C.
            raise


async def find_runtimes(
    session: BctrlSession,
    workspace: str,
    wanted: RuntimeFilter,
    alias: str | None,
    output: out.Output,
    *,
    deadline: float | None = None,
) -> FoundRuntimes:
    """List the runtimes that match a filter."""
    unreadable: list[BctrlResponseError] = []
    listing = session.list_runtimes(workspace, on_unreadable=unreadable.append)
    try:
        async with session, show_waiting(output):
            runtimes = await asyncio.wait_for(listing, deadline)
    except BctrlError:
        raise
    except TimeoutError as error:
        raise BctrlTimeoutError(
            f"workspace {workspace!r} was not listed within the deadline of "
            f"{format_duration(deadline)}",
            advice="Allow a longer --deadline; nothing was stopped",
        ) from error
    listed: list[Runtime | BctrlResponseError] = [*runtimes, *unreadable]
    if alias is not None:
        listed = [i for i in listed if i.alias is None or fnmatchcase(i.alias, alias)]
    found = FoundRuntimes(workspace, wanted)
    found.add(listed)
    unknown = {wanted.status, wanted.kind} - {None, "any", *RuntimeStatus, *RuntimeKind}
    if unknown and not found:
        # The value may be mistyped, and must not look like success.
        raise BctrlConfigError(f"no runtime of {workspace!r} is {' and '.join(map(repr, unknown))}")
    return found


def list_runtimes(
    workspace: opt.Workspace = None,
    *,
    status: Annotated[opt.Text | None, opt.with_status(help="Only with this status.")] = None,
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
    wanted = RuntimeFilter(status=status or "any", kind=kind, older_than=older_than)
    output = out.Output()
    session = connection.session(reads=True)
    found = asyncio.run(find_runtimes(session, workspace, wanted, alias, output))
    runtimes = found.runtimes
    errors = [item for item in found.items if not isinstance(item, Runtime)]
    if output_format == "json":
        for runtime in runtimes:
            _print_json(output, workspace, runtime)
    else:
        rows = ((each.status, each.kind, _age(each), each.alias) for each in runtimes)
        _print_table(output, [("STATUS", "KIND", "AGE", "ALIAS"), *rows])
    for error in errors[: out.MAX_SHOWN]:
        out.print_error(error)
    if (more := len(errors) - out.MAX_SHOWN) > 0:
        out.print_error(f"could not list {out.pluralize(more, 'more runtime')}")
    if output_format == "table" and not (output.write_failed or output.in_pipe):
        # The count goes to stderr, so that each line of stdout after the header is a runtime. The
        # reader of a pipe would print its rows around it.
        out.print_info(out.pluralize(len(runtimes), "runtime"))
    return out.FAILED if errors or output.write_failed else 0


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
    place, aliases = connection.split_names(names, workspace, "get")
    if not aliases:
        raise BctrlConfigError("nothing to get: add ALIAS")
    output = out.Output()
    session = connection.session(reads=True)
    found = asyncio.run(_get_all(session, place, dict.fromkeys(aliases), output))
    runtimes = [each for each in found if isinstance(each, Runtime)]
    errors = [each for each in found if isinstance(each, BctrlError)]
    for number, runtime in enumerate(runtimes):
        if output_format == "json":
            _print_json(output, place, runtime)
        else:
            output.print_result("") if number else None
            _print_table(output, _details(runtime))
    for error in errors:
        connection.explain(error)
        out.print_error(error)
    return out.exit_code(errors) if errors or output.write_failed else 0


async def _get_all(
    session: BctrlSession, workspace: str, aliases: Iterable[str], output: out.Output
) -> list[Runtime | BctrlError]:
    async def get(alias: str) -> Runtime | BctrlError:
        try:
            return await session.get_runtime(workspace, alias)
        except BctrlError as error:
            return error

    async with session, show_waiting(output):
        return await asyncio.gather(*map(get, aliases))


def _print_json(output: out.Output, workspace: str, runtime: Runtime) -> None:
    """Print a runtime as a line, which `--from` reads: it has the fields of a target."""
    fields = {name: getattr(runtime, name) for name in ("alias", "status", "kind", "created_at")}
    api = {"runtime": msgspec.to_builtins(runtime)}
    output.print_object({"workspace_id": workspace, **fields, **api})


def _print_table(output: out.Output, rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns; in a pipe, a table of rich would be cut at 80 columns."""
    escaped = [[*map(out.escape, row)] for row in rows]
    widths = [min(max(map(cell_len, each)), out.MAX_WIDTH) for each in zip(*escaped, strict=True)]
    for row in escaped:
        sizes = map(max, widths, map(cell_len, row))
        output.print_result("  ".join(map(set_cell_size, row, sizes)).rstrip())


def _details(runtime: Runtime) -> list[tuple[str, str]]:
    """Return the names and values of the fields that a runtime has."""
    fields = msgspec.to_builtins(runtime)
    fields |= fields.pop("summary") or {}
    words = {True: "yes", False: "no"}
    known = [(key, words.get(value, value)) for key, value in fields.items() if value is not None]
    return [*known, ("age", _age(runtime))]


def _age(runtime: Runtime) -> str:
    """Return the age in the format of --older-than, or `?` if it cannot be read."""
    created = parse_time(runtime.created_at)
    if created is None:
        return "?"
    return format_duration(int((datetime.now(UTC) - created).total_seconds()))
