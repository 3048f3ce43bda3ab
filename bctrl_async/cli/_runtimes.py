"""Runtimes as tables, and their order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import msgspec
from rich.cells import cell_len

from bctrl_async import Runtime
from bctrl_async.cli._format import escape
from bctrl_async.cli._options import format_duration
from bctrl_async.cli._output import Output
from bctrl_async.filters import parse_time

_NO_AGE = "?"
"""The age of a runtime whose creation time cannot be read."""


class SortKey(StrEnum):
    """A key by which runtimes are sorted."""

    AGE = "age"
    """The oldest first; those whose age is not known are the last."""
    ALIAS = "alias"
    STATUS = "status"
    KIND = "kind"


_NEVER = datetime.max.replace(tzinfo=UTC)
_KEYS: dict[SortKey, Callable[[Runtime], Any]] = {
    SortKey.AGE: lambda runtime: parse_time(runtime.created_at) or _NEVER,
    SortKey.ALIAS: lambda runtime: runtime.alias,
    SortKey.STATUS: lambda runtime: runtime.status,
    SortKey.KIND: lambda runtime: runtime.kind,
}


def sort_runtimes(runtimes: Sequence[Runtime], key: SortKey | None) -> Sequence[Runtime]:
    """Return runtimes in order; without a key, and if equal, in that of the server."""
    return runtimes if key is None else sorted(runtimes, key=_KEYS[key])


def print_runtimes(output: Output, runtimes: Sequence[Runtime]) -> None:
    """Print a table of runtimes, a line for each, never truncated."""
    now = datetime.now(UTC)
    rows: list[tuple[str, ...]] = [("STATUS", "KIND", "AGE", "ALIAS")]
    for runtime in runtimes:
        cells = (runtime.status, runtime.kind, _age_text(runtime, now), runtime.alias)
        rows.append(tuple(output.escape_unencodable(escape(cell)) for cell in cells))
    widths = [max(cell_len(row[column]) for row in rows) for column in range(3)]
    for *columns, alias in rows:
        padded = (
            cell + " " * (width - cell_len(cell))
            for cell, width in zip(columns, widths, strict=True)
        )
        output.print_result("  ".join([*padded, alias]))


def print_runtime(output: Output, runtime: Runtime) -> None:
    """Print the fields of a runtime, a line for each that it has."""
    age = _age_text(runtime, datetime.now(UTC))
    rows = [*_rows(msgspec.to_builtins(runtime)), ("age", age)]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        output.print_result(f"{name:<{width}}  {output.escape_unencodable(escape(text))}")


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
    return _NO_AGE if created is None else format_duration((now - created).total_seconds())
