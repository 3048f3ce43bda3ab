"""Results for programs: the option `--output`, and records as JSON or CSV."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from typing import Annotated, Literal, Self

import msgspec
import typer

from bctrl_async import Runtime, RuntimeRef, StopOutcome
from bctrl_async.cli._output import Output, escape_unprintable
from bctrl_async.journal import JournalOutcome

TARGET_COLUMNS = ("workspace_id", "alias")
_OUTCOME = (
    *("index", *TARGET_COLUMNS, "result", "attempts", "resumed", "elapsed", "at"),
    *("runtime.status", "error.type", "error.status", "error.code", "error.request_id"),
    *("error.may_have_stopped", "error.message"),
)
_FORMULA = ("=", "+", "-", "@")
"""The characters with which a formula begins in a spreadsheet."""
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
    CSV = "csv"


OutputOption = Annotated[
    OutputFormat,
    typer.Option(
        "-o",
        "--output",
        metavar="FORMAT",
        rich_help_panel="Output",
        help="table, json (an object per line) or csv.",
    ),
]


class Records:
    """Prints records as lines of JSON or CSV.

    Args:
        output: The output to print to.
        is_json: Print JSON; otherwise CSV.
        columns: The columns of CSV: keys of the records; `runtime.id` is the key `id` of `runtime`.
    """

    def __init__(self, output: Output, columns: Sequence[str], *, is_json: bool) -> None:
        self._output = output
        self._is_json = is_json
        self._columns = columns
        self._paths = [column.split(".") for column in columns]
        self._has_header = is_json

    @classmethod
    def of(cls, output: Output, output_format: OutputFormat, columns: Sequence[str]) -> Self | None:
        """Return the records of a format, None if that is for people."""
        if output_format is OutputFormat.TABLE:
            return None
        return cls(output, columns, is_json=output_format is OutputFormat.JSON)

    @classmethod
    def of_outcomes(cls, output: Output, output_format: OutputFormat, *further: str) -> Self | None:
        """Return the records of outcomes that may have further columns."""
        return cls.of(output, output_format, (*_OUTCOME, *further))

    def print(self, fields: Mapping[str, object]) -> None:
        """Print a record."""
        if self._is_json:
            self._output.print_result(json.dumps(fields))
            return
        self.print_header()
        names = [str(fields[name]) for name in TARGET_COLUMNS if name in fields]
        values = (_find(fields, path) for path in self._paths)
        cells = [
            self._cell(value, is_name=column in TARGET_COLUMNS)
            for column, value in zip(self._columns, values, strict=True)
        ]
        self._print_row(cells, quotes=any(map(_has_edge, names)))

    def print_all(self, records: Iterable[Mapping[str, object]]) -> None:
        """Print records, and the header if there are none."""
        for fields in records:
            self.print(fields)
        self.print_header()

    def print_header(self) -> None:
        """Print the header of CSV, unless that was done."""
        if not self._has_header:
            self._has_header = True
            self._print_row([column.replace(".", "_") for column in self._columns])

    def _cell(self, value: object, *, is_name: bool) -> object:
        match value:
            case bool():
                return str(value).lower()
            case list():
                return self._cell(";".join(map(str, value)), is_name=is_name)
            case str() if is_name:
                # Exact, since --from reads it: a quote mark before it would name another runtime.
                return self._output.escape_unencodable(_escape_controls(value))
            case str():
                text = escape_unprintable(value.replace("\n", " "))
                text = f"'{text}" if text.startswith(_FORMULA) else text
                return self._output.escape_unencodable(text)
        return value

    def _print_row(self, cells: Sequence[object], *, quotes: bool = False) -> None:
        line = io.StringIO()
        quoting: Literal[0, 1] = csv.QUOTE_ALL if quotes else csv.QUOTE_MINIMAL
        csv.writer(line, quoting=quoting, lineterminator="").writerow(cells)
        self._output.print_result(line.getvalue(), exact=True)


def _find(fields: object, path: Sequence[str]) -> object:
    for key in path:
        fields = fields.get(key) if isinstance(fields, Mapping) else None
    return fields


def outcome_fields(outcome: StopOutcome) -> dict[str, object]:
    """Return the fields of an outcome."""
    fields = outcome.to_dict()
    if isinstance(outcome, JournalOutcome):
        fields["journals"] = [str(path) for path in outcome.journals]
    return fields


def target_fields(target: RuntimeRef) -> dict[str, object]:
    """Return the fields of a target, which `--from` reads."""
    return {"workspace_id": target.workspace_id, "alias": target.alias}


RUNTIME_COLUMNS = (*TARGET_COLUMNS, "status", "kind", "created_at", "runtime.id")


def runtime_fields(workspace: str, runtime: Runtime) -> dict[str, object]:
    """Return the fields of a runtime; as those of a target, `--from` reads them."""
    return {
        "workspace_id": workspace,
        "alias": runtime.alias,
        "status": runtime.status,
        "kind": runtime.kind,
        "created_at": runtime.created_at,
        "runtime": msgspec.to_builtins(runtime),
    }
