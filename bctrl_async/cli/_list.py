"""The commands `list` and `get`, and the runtimes of a workspace that `stop --all` finds."""

import asyncio
import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter
from rich.cells import cell_len

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
from bctrl_async.cli import _options as opt
from bctrl_async.cli._connection import READING, ReadConnection
from bctrl_async.cli._output import (
    FAILED,
    MAX_SHOWN,
    USAGE,
    Output,
    ask,
    escape,
    exit_code,
    pluralize,
    print_error,
    print_info,
    runtime_fields,
)
from bctrl_async.cli._progress import show_waiting
from bctrl_async.filters import FoundTargets, parse_time

_COLUMNS = ("workspace_id", "alias", "status", "kind", "created_at")
_NO_AGE = "?"
"""The age of a runtime whose creation time cannot be read."""
_NEVER = datetime.max.replace(tzinfo=UTC)
_escape_controls = partial(
    re.compile(r"[\x00-\x1f\x7f-\x9f]").sub, lambda found: ascii(found[0])[1:-1]
)
_has_edge = re.compile(r"[\s#{\[\ufeff].*|.*\s", re.DOTALL).fullmatch
"""Matches a name whose edge `--from` reads as something else unless it is quoted."""


class FoundRuntimes(FoundTargets):
    """Runtimes of a workspace that match a filter; the bulk stop rejects the unreadable ones."""

    def __init__(self, workspace: str, wanted: RuntimeFilter, base_url: str) -> None:
        super().__init__(workspace, wanted)
        self.base_url: str = base_url

    @property
    def runtimes(self) -> list[Runtime]:
        """The runtimes that match."""
        return [item for item in self.items if isinstance(item, Runtime)]

    @property
    def unreadable(self) -> list[BctrlResponseError]:
        """The errors of the runtimes that may match, and cannot be read."""
        return [item for item in self.items if not isinstance(item, Runtime)]

    def keep(self, is_kept: Callable[[RuntimeRef | BctrlError], bool]) -> None:
        """Keep only some of the targets."""
        pairs = zip(self.items, self, strict=True)
        self.items = [item for item, target in pairs if is_kept(target)]

    def confirm(self) -> bool:
        """Show the runtimes and ask whether to stop them."""
        kinds = Counter(escape(runtime.kind) for runtime in self.runtimes)
        summary = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        if self.unreadable:
            summary += f"; {len(self.unreadable):,} cannot be read"
        return ask(
            f"In workspace {escape(self.workspace_id)} at {self.base_url}: {summary}\n"
            f"Stop {pluralize(len(self.runtimes), 'runtime')}?"
        )


async def find_runtimes(
    session: BctrlSession,
    workspace: str,
    wanted: RuntimeFilter,
    alias: str | None,
    output: Output,
    *,
    deadline: float | None = None,
) -> FoundRuntimes:
    """List the runtimes that match a filter."""
    unreadable: list[BctrlResponseError] = []
    listing = session.list_runtimes(workspace, on_unreadable=unreadable.append)
    try:
        async with session, show_waiting(output, session):
            runtimes = await asyncio.wait_for(listing, deadline)
    except BctrlError:
        raise
    except TimeoutError as error:
        raise BctrlTimeoutError(
            f"workspace {workspace!r} was not listed within the deadline of "
            f"{opt.format_seconds(deadline or 0)}",
            advice="Allow a longer --deadline; nothing was stopped",
        ) from error
    found = FoundRuntimes(workspace, wanted, session.base_url)
    found.add(chain(runtimes, unreadable))
    if alias is not None:
        found.keep(lambda target: target.alias is None or fnmatchcase(target.alias, alias))
    return found


def check_workspace(workspace: str | None) -> str:
    """Return the workspace, or raise an error that says how to give it."""
    if workspace is None:
        raise BctrlConfigError("give a WORKSPACE, set BCTRL_WORKSPACE, or name a profile with it")
    return workspace


def list_runtimes(
    workspace: opt.Workspace = None,
    /,
    *,
    status: Annotated[opt.Text | None, opt.with_status(help="Only with this status.")] = None,
    kind: opt.Kind = None,
    older_than: opt.OlderThan = None,
    alias: opt.Alias = None,
    sort: Annotated[
        Literal["age", "alias", "status", "kind"] | None,
        opt.in_output(metavar="KEY", help="Sort by KEY; by age means the oldest first."),
    ] = None,
    limit: Annotated[opt.Count | None, opt.in_output(help="Show only the first N.")] = None,
    output_format: Annotated[
        Literal["table", "json", "csv"],
        opt.in_output(("--output", "-o"), metavar="FORMAT", help="json is an object per line."),
    ] = "table",
    connection: ReadConnection = READING,
) -> int:
    """List the runtimes of a workspace.

    A runtime that cannot be read is reported on stderr, and the exit code is 1.
    So is one that may run and whose creation time cannot be read, with
    --older-than.

    For example:
      bctrl-async list WORKSPACE --status active --older-than 2h
      bctrl-async list WORKSPACE --alias 'ci-*' --sort age --limit 10
      bctrl-async list WORKSPACE -o csv > runtimes.csv
    """
    workspace = check_workspace(connection.workspace(workspace))
    wanted = RuntimeFilter(status=status or "any", kind=kind, older_than=older_than)
    output = Output()
    found = asyncio.run(find_runtimes(connection.session(), workspace, wanted, alias, output))
    runtimes, unreadable = found.runtimes, found.unreadable
    for error in unreadable[:MAX_SHOWN]:
        print_error(error)
    if len(unreadable) > MAX_SHOWN:
        more = len(unreadable) - MAX_SHOWN
        print_error(f"{pluralize(more, 'more runtime')} cannot be read")
    shown = _sorted(runtimes, sort)[:limit]
    match output_format:
        case "table":
            _print_runtimes(output, shown)
        case "json":
            for runtime in shown:
                output.print_object(runtime_fields(workspace, runtime))
        case _:
            print_csv(output, workspace, shown)
    count = pluralize(len(runtimes), "runtime")
    if len(shown) < len(runtimes):
        print_info(f"{count}, {len(shown):,} shown")
    elif output_format == "table" and not output.write_failed:
        # On stderr, so that each line but the header is a runtime to a program that reads them.
        print_info(count)
    return FAILED if unreadable or output.write_failed else 0


def get_runtimes(
    workspace: Annotated[opt.Text, Parameter(help="Workspace id.")],
    /,
    *aliases: Annotated[opt.Text, Parameter("ALIAS", help="Aliases of the runtimes.")],
    output_format: opt.Format = "table",
    connection: ReadConnection = READING,
) -> int:
    """Show runtimes.

    Exit codes: 0 each was found, 1 one was not, or the server did not answer,
    2 usage or configuration error.

    For example:
      bctrl-async get WORKSPACE crm mail
      bctrl-async get WORKSPACE crm -o json | jq -r .status
    """
    if not aliases:
        raise BctrlConfigError("nothing to get: add ALIAS")
    output = Output()
    found = asyncio.run(_get_all(connection.session(), workspace, dict.fromkeys(aliases), output))
    runtimes = [each for each in found if isinstance(each, Runtime)]
    errors = [each for each in found if isinstance(each, BctrlError)]
    for number, runtime in enumerate(runtimes):
        if output_format == "json":
            output.print_object(runtime_fields(workspace, runtime))
        else:
            output.print_result("") if number else None
            _print_runtime(output, runtime)
    for error in errors:
        connection.explain(error)
        print_error(error)
    if any(isinstance(error, BctrlConfigError) for error in errors):
        return USAGE
    if errors:
        return exit_code(errors)
    return FAILED if output.write_failed else 0


async def _get_all(
    session: BctrlSession, workspace: str, aliases: Iterable[str], output: Output
) -> list[Runtime | BctrlError]:
    async def get(alias: str) -> Runtime | BctrlError:
        try:
            return await session.get_runtime(workspace, alias)
        except BctrlError as error:
            return error

    async with session, show_waiting(output, session):
        return await asyncio.gather(*map(get, aliases))


def _sorted(runtimes: Sequence[Runtime], key: str | None) -> Sequence[Runtime]:
    """Sort by a key; ties, and no key, keep the server's order."""
    if key is None:
        return runtimes
    if key == "age":
        return sorted(runtimes, key=lambda runtime: parse_time(runtime.created_at) or _NEVER)
    return sorted(runtimes, key=lambda runtime: str(getattr(runtime, key)))


def _print_runtimes(output: Output, runtimes: Sequence[Runtime]) -> None:
    """Print a table of runtimes, a line for each, never truncated."""
    now = datetime.now(UTC)
    rows: list[tuple[str, ...]] = [("STATUS", "KIND", "AGE", "ALIAS")]
    for runtime in runtimes:
        cells = (runtime.status, runtime.kind, _age_text(runtime, now), runtime.alias)
        rows.append(tuple(escape(cell) for cell in cells))
    widths = [max(cell_len(row[column]) for row in rows) for column in range(3)]
    for *columns, alias in rows:
        padded = (
            cell + " " * (width - cell_len(cell))
            for cell, width in zip(columns, widths, strict=True)
        )
        output.print_result("  ".join([*padded, alias]))


def print_csv(output: Output, workspace: str, runtimes: Iterable[Runtime]) -> None:
    """Print a header and a row for each runtime, which `--from` reads."""
    _print_row(output, _COLUMNS)
    for runtime in runtimes:
        fields = runtime_fields(workspace, runtime)
        _print_row(output, [str(fields[column]) for column in _COLUMNS])


def _print_row(output: Output, cells: Iterable[str]) -> None:
    line = io.StringIO()
    cells = [_escape_controls(cell) for cell in cells]
    quoting: Literal[0, 1] = csv.QUOTE_ALL if any(map(_has_edge, cells)) else csv.QUOTE_MINIMAL
    csv.writer(line, quoting=quoting, lineterminator="").writerow(cells)
    output.print_result(line.getvalue(), exact=True)


def _print_runtime(output: Output, runtime: Runtime) -> None:
    """Print the fields of a runtime, a line for each that it has, and a blank one."""
    age = _age_text(runtime, datetime.now(UTC))
    rows = [*_rows(msgspec.to_builtins(runtime)), ("age", age)]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        output.print_result(f"{name:<{width}}  {escape(text)}")


def _rows(fields: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        match value:
            case dict():
                yield from _rows(value)
            case bool():
                yield name, "yes" if value else "no"
            case str():
                yield name, value


def _age_text(runtime: Runtime, now: datetime) -> str:
    """Return the age as --older-than takes it; the clocks of two machines may differ."""
    created = parse_time(runtime.created_at)
    return _NO_AGE if created is None else opt.format_duration((now - created).total_seconds())
