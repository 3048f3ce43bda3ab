"""Results for programs: the option `--output`, JSON Lines, and a list as CSV."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import partial
from typing import Annotated, Literal

import msgspec
import typer

from bctrl_async import Runtime, RuntimeRef
from bctrl_async.cli._output import Output

_CSV_COLUMNS = ("workspace_id", "alias", "status", "kind", "created_at")
_escape_controls = partial(
    re.compile(r"[\x00-\x1f\x7f-\x9f]").sub, lambda found: ascii(found[0])[1:-1]
)
_has_edge = re.compile(r"[\s#{\[\ufeff].*|.*\s", re.DOTALL).fullmatch
"""Matches a name whose edge `--from` reads as something else unless it is quoted."""


class OutputFormat(StrEnum):
    """The format of results."""

    TABLE = "table"
    """Lines and tables for people."""
    JSON = "json"


class ListFormat(StrEnum):
    """The format of a list."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


output_option = partial(typer.Option, "-o", "--output", metavar="FORMAT", rich_help_panel="Output")
OutputOption = Annotated[OutputFormat, output_option(help="table, or json (an object per line).")]
ListOption = Annotated[ListFormat, output_option(help="table, json (an object per line) or csv.")]


def print_json(output: Output, fields: Mapping[str, object]) -> None:
    """Print an object on one line, in ASCII."""
    output.print_result(json.dumps(fields))


def print_csv(output: Output, workspace: str, runtimes: Iterable[Runtime]) -> None:
    """Print a header and a row for each runtime, which `--from` reads."""
    _print_row(output, _CSV_COLUMNS)
    for runtime in runtimes:
        fields = runtime_fields(workspace, runtime)
        _print_row(output, [str(fields[column]) for column in _CSV_COLUMNS])


def _print_row(output: Output, cells: Iterable[str]) -> None:
    line = io.StringIO()
    cells = [output.escape_unencodable(_escape_controls(cell)) for cell in cells]
    quoting: Literal[0, 1] = csv.QUOTE_ALL if any(map(_has_edge, cells)) else csv.QUOTE_MINIMAL
    csv.writer(line, quoting=quoting, lineterminator="").writerow(cells)
    output.print_result(line.getvalue(), exact=True)


def target_fields(target: RuntimeRef) -> dict[str, object]:
    """Return the fields of a target, which `--from` reads."""
    return {"workspace_id": target.workspace_id, "alias": target.alias}


def runtime_fields(workspace: str, runtime: Runtime) -> dict[str, object]:
    """Return the fields of a runtime; as a target has them, `--from` reads them."""
    return {
        "workspace_id": workspace,
        "alias": runtime.alias,
        "status": runtime.status,
        "kind": runtime.kind,
        "created_at": runtime.created_at,
        "runtime": msgspec.to_builtins(runtime),
    }
