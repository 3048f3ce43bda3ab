"""The lines of an input, each of which is a target: CSV or JSON, parsed without I/O."""

import logging
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator

import msgspec

from bctrl_async import RuntimeRef

MAX_LINE = 2**20
"""The most bytes of a line."""
MAX_DOCUMENT = 2**26
"""The most bytes of a JSON document, which is read whole."""

_log = logging.getLogger("bctrl_async.cli")

_MAX_SHOWN = 60
_WORKSPACE_KEYS = ("workspace_id", "workspaceId", "workspaceid", "workspace")
_KEYS = {"workspace_id": _WORKSPACE_KEYS, "alias": ("alias", "name")}
_NO_VALUE = "it is not a JSON object or pair"
_BAD_QUOTES = "a quote is missing, or a cell has several lines: export the two columns only"
_DOCUMENT = 'expected JSON Lines (jq -c), or ≤ 64 MiB of […] or {"runtimes": […]}'
_UNREADABLE = "it has a control character, or was not saved as UTF-8"
_find_unreadable = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\udc80-\udcff]").search


class BadLine(ValueError):  # noqa: N818 - it is raised only if nothing after it can be read.
    """A line that is not a target; the bulk stop rejects it and shows its repr and its reason."""

    def __init__(self, place: str, text: str, reason: str) -> None:
        super().__init__(reason)
        self._shown = f"{text[:_MAX_SHOWN]!r} {place}"

    def __repr__(self) -> str:
        return self._shown


Item = RuntimeRef | BadLine


class LineParser:
    """A parser of lines. The first line that is not blank, a comment or `sep=;` sets the format."""

    def __init__(self, workspace: str | None = None, *, is_only: bool = False) -> None:
        self._workspace = workspace
        self._is_only = is_only
        self._number = 0
        self._parse: Callable[[str], Item | None] = self._begin_table
        self._delimiter, self._columns, self._header = ",", [*_KEYS], list[str]()
        self._document: bytearray | None = None

    def parse(self, line: bytes) -> Iterator[Item]:
        """Yield the items of a line, or of a part of a line beyond MAX_LINE; b"" ends the input."""
        if self._document is not None:
            self._document += line
            if not line or len(self._document) > MAX_DOCUMENT:
                yield from self._read_document(self._document)
            return
        self._number += 1
        text = line.decode(errors="surrogateescape").removeprefix("\ufeff").strip(" \r\n")
        if text[:1] in {"[", "{"} and self._parse == self._begin_table:
            self._parse = lambda text: self._to_item(text, _decode(text))
            if not _is_line(_decode(text)):
                self._document = bytearray(line.removeprefix(BOM_UTF8))
                return
        if len(line) > MAX_LINE:
            raise self._bad(text, "it is longer than 1 MiB")
        if text and not text.isspace() and text[0] != "#":
            item = self._parse(text)
            if item is not None:
                yield item

    def _read_document(self, document: bytearray) -> Iterator[Item]:
        value = _decode(document) if len(document) <= MAX_DOCUMENT else None
        values = value.get("runtimes", [value]) if isinstance(value, dict) else value
        if not isinstance(values, list):
            raise self._bad(document.decode(errors="replace").strip(), _DOCUMENT)
        for number, each in enumerate(values, start=1):
            yield self._to_item(msgspec.json.encode(each).decode(), each, f"in item {number}")

    def _begin_table(self, text: str) -> Item | None:
        """Find the columns of a table by its first line; return that line's item, if any."""
        if re.fullmatch(r"sep=[\t;,]", text):
            return None
        if _find_unreadable(text):
            raise self._bad(text, _UNREADABLE)
        self._parse = self._row
        rows = {d: cells for d in "\t;," if (cells := _cells(text, d))}
        is_list = self._workspace is not None and all(len(cells) == 1 for cells in rows.values())
        for delimiter, cells in rows.items():
            columns = [re.sub(r"[\s_]", "", cell).lower() for cell in cells]
            missing = [key for key, keys in _KEYS.items() if not set(keys) & set(columns)]
            if not missing or (is_list and missing == ["workspace_id"]):
                self._delimiter, self._columns, self._header = delimiter, columns, cells
                return None
            if len(missing) == 1:
                raise self._bad(text, f"the header has no column {missing[0]}")
        # Prose often has one comma, but no id has a space.
        pairs = [d for d, cells in rows.items() if len(cells) == len(_KEYS) and " " not in cells[0]]
        if is_list and "  " in text:
            raise self._bad(text, "it looks like the table of list: use its -o json")
        if is_list:
            self._delimiter, self._columns = "\t", ["alias"]
        elif len(pairs) == 1:
            self._delimiter = pairs[0]
        elif rows:
            reasons = {
                "two delimiters fit: add a header, or quote the alias": pairs,
                "a list of aliases needs a workspace": re.fullmatch(r"[\w.-]+", text),
                "it is neither a header nor a pair: expected WORKSPACE,ALIAS or JSON": True,
            }
            raise self._bad(text, next(reason for reason, is_so in reasons.items() if is_so))
        return self._row(text)

    def _row(self, text: str) -> Item | None:
        cells = _cells(text, self._delimiter)
        if cells is None:
            raise self._bad(text, _BAD_QUOTES)
        # Joined files have a header each, and a spreadsheet has rows of empty cells.
        if cells == self._header:
            if len(cells) == 1:
                # An alias may have the name of the column.
                _log.warning(
                    "line %d is skipped: it repeats the header",
                    self._number,
                    extra={"bctrl.event": "header_repeated"},
                )
            return None
        if not any(cells):
            return None
        if len(cells) != len(self._columns):
            few = "fewer" if len(cells) < len(self._columns) else "more"
            return self._bad(text, f"it has {few} columns than the first line")
        # The first of two columns with the same name counts.
        return self._to_item(text, dict(zip(self._columns[::-1], cells[::-1], strict=True)))

    def _to_item(self, text: str, value: object, place: str | None = None) -> Item:
        """Return a row or a JSON value as a target, or as a bad line."""
        match value:
            case [workspace_id, alias]:
                pass
            case dict():
                workspace_id = next((value[key] for key in _WORKSPACE_KEYS if key in value), None)
                alias = value.get("alias", value.get("name"))
            case _:
                # The rest of a string could be on the next lines.
                if text.replace(r"\\", "").replace(r"\"", "").count('"') % 2:
                    raise self._bad(text, "a quote is not closed on this line")
                reason = _UNREADABLE if _find_unreadable(text) else _NO_VALUE
                return self._bad(text, reason, place)
        workspace_id = self._workspace if workspace_id is None else workspace_id
        for name, kind in ((workspace_id, "workspace id"), (alias, "alias")):
            if not (isinstance(name, str) and name):
                problem = "missing" if name is None else "not text" if name else "empty"
                return self._bad(text, f"the {kind} is {problem}", place)
        # A tab in a name is a control character; elsewhere, it may delimit cells.
        if _find_unreadable(text + f"{workspace_id}{alias}".replace("\t", "\0")):
            return self._bad(text, _UNREADABLE, place)
        if self._is_only and workspace_id != self._workspace:
            return self._bad(text, f"it names another workspace than {self._workspace}", place)
        return RuntimeRef(str(workspace_id), str(alias))

    def _bad(self, text: str, reason: str, place: str | None = None) -> BadLine:
        return BadLine(place or f"on line {self._number}", text, reason)


def _is_line(value: object) -> bool:
    """Return True if a JSON value can be one target of JSON Lines, be it a bad one."""
    match value:
        case {"runtimes": _} | [list() | dict(), _]:
            return False
        case {} | [_, _]:
            return True
    return False


def _decode(text: str | bytearray) -> object:
    """Return the JSON value of a text; None if it is not JSON."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _cells(text: str, delimiter: str) -> list[str] | None:
    """Return the cells of a row; None unless each quote encloses a cell or is doubled within it."""
    if '"' not in text:
        return [cell.strip(" ") for cell in text.split(delimiter)]
    # The csv module keeps spaces after a cell, and takes a quote inside a cell for a character.
    pattern = r'((?:\A|{0}) *(?:"((?:[^"]|"")*+)"|([^"{0}]*+)) *(?={0}|\Z))'
    cells = re.findall(pattern.replace("{0}", delimiter), text)
    if sum(len(whole) for whole, _, _ in cells) < len(text):
        return None
    return [quoted.replace('""', '"') or plain.strip(" ") for _, quoted, plain in cells]
