"""The lines of an input, each of which is a target: CSV or JSON, parsed without I/O."""

import logging
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from bctrl_async import RuntimeRef

MAX_LINE = 2**20
"""The most bytes of a line."""
MAX_DOCUMENT = 2**26
"""The most bytes of a JSON document, which is read whole."""

_log = logging.getLogger("bctrl_async.cli")

_MAX_SHOWN = 60
# `_find_table` puts columns in lower case, without underscores: `workspaceid`.
_WORKSPACE_KEYS = ("workspace_id", "workspaceId", "workspaceid", "workspace")
_KEYS = {"workspace_id": _WORKSPACE_KEYS, "alias": ("alias", "name")}
_BAD_QUOTES = (
    "a quote is missing, or a cell has several lines: export the two columns only"
)
_HEADER_OR_PAIR = "it is a pair, or a header without workspace_id: put alias first"
_DOCUMENT = 'expected JSON Lines (jq -c), or ≤ 64 MiB of […] or {"runtimes": […]}'
_UNREADABLE = "it has a control character, or was not saved as UTF-8"
_UTF_16 = "the file is UTF-16: save it as UTF-8"
_FORMATS = {
    rb"\xff\xfe|\xfe\xff": _UTF_16,
    # Without a mark, one of the two bytes of a Latin letter is zero.
    rb"[^\0]?\0(?!\0)": _UTF_16,
    rb"\x1f\x8b": "the file is compressed: unpack it with gunzip",
    rb"\xfd7zXZ\0": "the file is compressed: unpack it with unxz",
    rb"BZh[1-9]1AY&SY": "the file is compressed: unpack it with bunzip2",
    rb"\x28\xb5\x2f\xfd": "the file is compressed: unpack it with unzstd",
    rb"PK\x03\x04": "the file is a workbook: export it as CSV UTF-8",
}
"""Patterns of the start of files that are no text in UTF-8, and what to do then."""
_find_unreadable = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\udc80-\udcff]").search


class BadLine(ValueError):  # noqa: N818 - it is raised only if the rest cannot be read.
    """A line that is not a target.

    The bulk stop rejects it, and shows its repr and its reason.
    """

    def __init__(self, position: str, text: str, reason: str) -> None:
        super().__init__(reason)
        self._repr = f"{text[:_MAX_SHOWN]!r} {position}"

    def __repr__(self) -> str:
        return self._repr


Item = RuntimeRef | BadLine


class _Table(NamedTuple):
    """The format of rows; the header is empty if the first line is a row."""

    delimiter: str
    columns: Sequence[str]
    header: Sequence[str] = ()


class LineParser:
    """A parser of lines; a line without a workspace is in `workspace`.

    The first line that is not blank, a comment or `sep=;` sets the format.
    """

    def __init__(
        self, workspace: str | None = None, *, rejects_other_workspaces: bool = False
    ) -> None:
        self._workspace = workspace
        self._rejects_other_workspaces = rejects_other_workspaces
        self._number = 0
        self._is_json = False
        self._table: _Table | None = None
        self._document: bytearray | None = None

    def parse(self, line: bytes) -> Iterable[Item]:
        """Return the items of a line, or of a part of a line beyond MAX_LINE.

        An empty line, without its newline, ends the input.
        """
        if self._document is None:
            item = self._parse_line(line)
            return [] if item is None else [item]
        self._document += line
        if line and len(self._document) <= MAX_DOCUMENT:
            return []
        # The document has ended, or is rejected because it is too long.
        return self._read_document(self._document)

    def _parse_line(self, line: bytes) -> Item | None:
        self._number += 1
        text = line.decode(errors="surrogateescape").removeprefix("\ufeff")
        # A tab stays, for it may delimit cells that are empty.
        text = text.strip(" \r\n")
        if self._table is None and not self._is_json:
            self._check_format(text)
            self._is_json = text.startswith(("[", "{"))
            if self._is_json and not _is_line(_decode(text)):
                self._document = bytearray(line.removeprefix(BOM_UTF8))
                return None
        if len(line) > MAX_LINE:
            raise self._bad(text, "it is longer than 1 MiB")
        if not text.strip() or text.startswith("#"):
            return None
        if self._is_json:
            return self._to_item(text, _decode(text))
        if self._table is None:
            return self._parse_first_row(text)
        return self._parse_row(text, self._table)

    def _check_format(self, text: str) -> None:
        """Raise an error if a first line is of a file that is no text in UTF-8."""
        content = text.encode(errors="surrogateescape")
        for start, reason in _FORMATS.items():
            match = re.match(start, content)
            if match is not None:
                raise self._bad(text[: match.end()], reason)

    def _parse_first_row(self, text: str) -> Item | None:
        if re.fullmatch(r"sep=[\t;,]", text):
            return None
        if _find_unreadable(text):
            raise self._bad(text, _UNREADABLE)
        self._table = self._find_table(text)
        if self._table.header:
            return None
        return self._parse_row(text, self._table)

    def _read_document(self, document: bytearray) -> Iterator[Item]:
        values = None
        if len(document) <= MAX_DOCUMENT:
            values = _decode(document)
        if isinstance(values, dict):
            # An object without runtimes is a single target on several lines.
            values = values.get("runtimes", [values])
        if not isinstance(values, list):
            raise self._bad(document.decode(errors="replace").strip(), _DOCUMENT)
        for number, value in enumerate(values, start=1):
            text = msgspec.json.encode(value).decode()
            yield self._to_item(text, value, f"in item {number}")

    def _find_table(self, text: str) -> _Table:
        """Return the format of a table by its first line, or raise an error."""
        rows = {delimiter: _cells(text, delimiter) for delimiter in "\t;,"}
        has_one_column = all(len(cells) <= 1 for cells in rows.values())
        is_alias_list = has_one_column and self._workspace is not None
        for delimiter, cells in rows.items():
            columns = [re.sub(r"[\s_]", "", cell).lower() for cell in cells]
            if self._is_header(text, columns):
                return _Table(delimiter, columns, cells)
        if not is_alias_list:
            return _Table(self._find_delimiter(text, rows), [*_KEYS])
        if "  " in text:
            raise self._bad(text, "it looks like the table of list: use its -o json")
        return _Table("\t", ["alias"])

    def _is_header(self, text: str, columns: list[str]) -> bool:
        """Return True for a header; raise an error if a column is missing."""
        missing = [key for key, names in _KEYS.items() if not set(names) & set(columns)]
        if len(missing) == len(_KEYS):
            return False
        if missing == ["workspace_id"] and self._workspace is not None:
            # A runtime may be named like a column, and is the second of its pair.
            if len(columns) == len(_KEYS) and columns[0] not in _KEYS["alias"]:
                raise self._bad(text, _HEADER_OR_PAIR)
            return True
        if missing:
            raise self._bad(text, f"the header has no column {missing[0]}")
        return True

    def _find_delimiter(self, text: str, rows: dict[str, list[str]]) -> str:
        """Return the only delimiter that makes a pair of a line."""
        if not any(rows.values()):
            raise self._bad(text, _BAD_QUOTES)
        # Prose often has one comma, but no id has a space.
        delimiters = [
            delimiter
            for delimiter, cells in rows.items()
            if len(cells) == len(_KEYS) and " " not in cells[0]
        ]
        if len(delimiters) == 1:
            return delimiters[0]
        reason = "it is neither a header nor a pair: expected WORKSPACE,ALIAS or JSON"
        if delimiters:
            reason = "two delimiters fit: add a header, or quote the alias"
        elif re.fullmatch(r"[\w.-]+", text):
            reason = "a list of aliases needs a workspace"
        raise self._bad(text, reason)

    def _parse_row(self, text: str, table: _Table) -> Item | None:
        cells = _cells(text, table.delimiter)
        if not cells:
            raise self._bad(text, _BAD_QUOTES)
        # Joined files have a header each, and a spreadsheet has rows of empty cells.
        if cells == table.header:
            if len(cells) == 1:
                # The line may be meant as an alias, so its loss must be seen.
                _log.warning(
                    "line %d is skipped: it repeats the header",
                    self._number,
                    extra={"bctrl.event": "header_repeated"},
                )
            return None
        if not any(cells):
            return None
        if len(cells) < len(table.columns):
            return self._bad(text, "it has fewer columns than the first line")
        if len(cells) > len(table.columns):
            return self._bad(text, "it has more columns than the first line")
        # The first of two columns with the same name counts.
        pairs = zip(reversed(table.columns), reversed(cells), strict=True)
        return self._to_item(text, dict(pairs))

    def _to_item(self, text: str, value: object, position: str = "") -> Item:
        """Return a row or a JSON value as a target, or as a bad line."""
        match value:
            case [workspace_id, alias]:
                pass
            case dict():
                workspace_id = _first_value(value, _KEYS["workspace_id"])
                alias = _first_value(value, _KEYS["alias"])
            case _:
                return self._bad(text, self._no_value_reason(text), position)
        if workspace_id is None:
            workspace_id = self._workspace
        problem = self._problem(text, workspace_id, alias)
        if problem:
            return self._bad(text, problem, position)
        return RuntimeRef(str(workspace_id), str(alias))

    def _no_value_reason(self, text: str) -> str:
        """Return why a text has no value; raise an error if it may not be whole."""
        # A backslash escapes a quote or another backslash.
        quotes = text.replace(r"\\", "").replace(r"\"", "").count('"')
        if quotes % 2:
            raise self._bad(text, "a quote is not closed on this line")
        if _find_unreadable(text):
            return _UNREADABLE
        return "it is not a JSON object or pair"

    def _problem(self, text: str, workspace_id: object, alias: object) -> str:
        """Return why two values are not a target; an empty text if they are."""
        for field, name in (("workspace id", workspace_id), ("alias", alias)):
            if name is None:
                return f"the {field} is missing"
            if not name:
                return f"the {field} is empty"
            if not isinstance(name, str):
                return f"the {field} is not text"
        names = f"{workspace_id}{alias}"
        # A tab may delimit cells, but a name with a tab is unreadable.
        if "\t" in names or _find_unreadable(text + names):
            return _UNREADABLE
        if self._rejects_other_workspaces and workspace_id != self._workspace:
            return f"it names another workspace than {self._workspace}"
        return ""

    def _bad(self, text: str, reason: str, position: str = "") -> BadLine:
        return BadLine(position or f"on line {self._number}", text, reason)


def _is_line(value: object) -> bool:
    """Return True if a JSON value can be one target of JSON Lines, be it a bad one."""
    match value:
        case dict():
            return "runtimes" not in value
        case [workspace_id, _]:
            # Two pairs or objects are a document, a list of two targets.
            return not isinstance(workspace_id, list | dict)
    return False


def _decode(text: str | bytearray) -> object:
    """Return the JSON value of a text; None if it is not JSON."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _first_value(fields: Mapping[str, object], keys: Iterable[str]) -> object:
    """Return the value of the first key that an object has; None if it has none."""
    for key in keys:
        if key in fields:
            return fields[key]
    return None


def _cells(text: str, delimiter: str) -> list[str]:
    """Return the cells of a row, or none of them if a quote is misplaced.

    A quote encloses a cell, or is doubled within it.
    """
    if '"' not in text:
        return [cell.strip(" ") for cell in text.split(delimiter)]
    # The csv module keeps spaces after a cell, and accepts a quote inside a cell.
    pattern = r'((?:\A|{0}) *(?:"((?:[^"]|"")*+)"|([^"{0}]*+)) *(?={0}|\Z))'
    matches = re.findall(pattern.replace("{0}", delimiter), text)
    # Nothing matches at a misplaced quote, so the matches leave out some text.
    if sum(len(whole) for whole, _, _ in matches) < len(text):
        return []
    # A cell is quoted or plain: its other text is empty.
    return [
        quoted.replace('""', '"') + plain.strip(" ") for _, quoted, plain in matches
    ]
