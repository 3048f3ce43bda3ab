"""The lines of an input, each of which is a target: CSV or JSON, parsed without I/O."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from bctrl_async import RuntimeRef, StopOutcome

MAX_LINE = 2**20
"""Bytes of a line."""
MAX_DOCUMENT = 2**26
"""Bytes of a JSON document, which is read whole."""

_MAX_SHOWN = 60
_DELIMITERS = "\t;,"
_WORKSPACE_NAMES = ("workspaceid", "workspace")
_ALIAS_NAMES = ("alias", "name")
_PAIR = 2
_BOM = "\ufeff"
_NOT_JSON = (msgspec.DecodeError, ValueError, RecursionError)
_DOCUMENT = 'JSON is a value on each line (jq -c), an array, or {"runtimes": […]}'
_BAD_QUOTES = "a quote is missing, or a cell has several lines: export the two columns only"
_CELL = r' *"((?:[^"]|"")*+)" *|([^"{0}]*+)'
_ROWS = {
    delimiter: (
        re.compile(rf"(?:{cell})(?:{delimiter}(?:{cell}))*+").fullmatch,
        re.compile(rf"(?:\A|{delimiter})(?:{cell})").findall,
    )
    for delimiter in _DELIMITERS
    if (cell := _CELL.format(delimiter))
}

_is_name = re.compile(r"[\w.-]+").fullmatch
_is_separator = re.compile(r"sep=[\t;,]").fullmatch
_find_control = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]").search
_unescaped_quotes = re.compile(r'(?<!\\)(?:\\\\)*"').findall
_plain = re.compile(r"[\s_]").sub


class BadLine(ValueError):  # noqa: N818 - it takes the place of a target, and is not raised.
    """A line that is not a target; the bulk stop rejects it and shows its repr and its reason."""

    def __init__(self, place: str, text: str, reason: str, *, ends_input: bool = False) -> None:
        super().__init__(f"{reason}{'; nothing after it was read' * ends_input}")
        self._place = place
        self._text = text[:_MAX_SHOWN]
        self.reason = reason
        self.ends_input = ends_input

    def __repr__(self) -> str:
        return f"{self._text!r} {self._place}"


Item = RuntimeRef | BadLine


def ends_input(outcome: StopOutcome) -> bool:
    """Return True if this is the outcome of a bad line after which nothing is read."""
    bad = None if outcome.error is None else outcome.error.__cause__
    return isinstance(bad, BadLine) and bad.ends_input


class _Layout(NamedTuple):
    """The columns of a table, by its first line."""

    delimiter: str
    workspace: int | None
    alias: int
    width: int
    header: Sequence[str] | None = None


class LineParser:
    """A parser of an input that is fed bytes as they arrive.

    The first line that is not blank, a comment or `sep=;` decides about the format.

    Args:
        workspace: The workspace of lines that have none: a table of one column, its aliases.
        is_only: A line of another workspace is not a target.
    """

    def __init__(self, workspace: str | None = None, *, is_only: bool = False) -> None:
        self._workspace = workspace
        self._is_only = is_only
        self.ended = False
        """True once nothing more is read."""
        self._rest = b""
        self._number = 0
        self._layout = _Layout(",", 0, 1, _PAIR)
        self._parse: Callable[[str], Item | None] | None = None
        self._document: bytearray | None = None

    def feed(self, data: bytes) -> Iterator[Item]:
        """Yield the items that these bytes complete; b"" is the end of the input."""
        if self._document is not None:
            self._document += data
        elif not self.ended:
            yield from self._feed_lines(data)
        if self._document is not None and not self.ended:
            if len(self._document) > MAX_DOCUMENT:
                yield self._end("", "it is more than 64 MiB of JSON in one document")
            elif not data:
                yield from self._read_document(bytes(self._document))

    def _feed_lines(self, data: bytes) -> Iterator[Item]:
        text = self._rest + data
        *lines, self._rest = text.split(b"\n")
        is_last = not data or len(self._rest) > MAX_LINE
        position = 0
        for line in (*lines, *[self._rest] * is_last):
            self._number += 1
            if (item := self._read(line)) is not None:
                yield item
            if self.ended:
                return
            if self._document is not None:
                self._document += text[position:]
                return
            position += len(line) + 1

    def _read(self, line: bytes) -> Item | None:
        """Return the item of a line; None if it has none, or if it begins a document."""
        if len(line) > MAX_LINE and not (self._parse is None and line.lstrip()[:1] in {b"[", b"{"}):
            return self._end(line[:_MAX_SHOWN].decode(errors="replace"), "it is longer than 1 MiB")
        try:
            # A document may be cut off within a character, and is decoded later.
            text = line.decode(errors="ignore" if len(line) > MAX_LINE else "strict")
        except UnicodeDecodeError:
            shown = line.decode(errors="replace").strip()
            reason = "it is not UTF-8: save the file as UTF-8"
            return self._end(shown, reason) if self._parse is None else self._bad(shown, reason)
        text = text.removeprefix(_BOM).strip(" \r")
        if not text or text.isspace() or text[0] == "#":
            return None
        return self._begin(text) if self._parse is None else self._parse(text)

    def _begin(self, text: str) -> Item | None:
        """Decide about the format by the first line, and return its item if it has one."""
        if text[0] in "[{":
            self._parse = self._json
            try:
                value = msgspec.json.decode(text)
            except _NOT_JSON:
                value = None
            # A whole object that is not a list is a line, and no other text can begin it.
            if self._is_target(value) or (isinstance(value, dict) and "runtimes" not in value):
                return self._json(text)
            self._document = bytearray()
            return None
        if _is_separator(text):
            return None
        self._parse = self._row
        layout = _find_layout(text, has_workspace=self._workspace is not None)
        if isinstance(layout, str):
            return self._end(text, layout)
        self._layout = layout
        return None if layout.header else self._row(text)

    def _row(self, text: str) -> Item | None:
        layout = self._layout
        cells = _cells(text, layout.delimiter)
        if cells is None:
            return self._end(text, _BAD_QUOTES)
        # Joined files have a header each, and a spreadsheet has rows of empty cells.
        is_whole = len(cells) == layout.width
        if cells == layout.header or not (any(cells) or ('"' in text and not is_whole)):
            return None
        if not is_whole:
            few = "fewer" if len(cells) < layout.width else "more"
            return self._bad(text, f"it has {few} columns than the first line")
        if _find_control(text):
            return self._bad(text, "it contains a control character")
        workspace_id = None if layout.workspace is None else cells[layout.workspace]
        return self._to_item(self._place, text, [workspace_id, cells[layout.alias]])

    def _json(self, text: str) -> Item:
        try:
            return self._to_item(self._place, text, msgspec.json.decode(text))
        except _NOT_JSON:
            if len(_unescaped_quotes(text)) % 2:
                return self._end(text, "a quote is not closed on this line")
            return self._bad(text, "it is not JSON")

    def _read_document(self, data: bytes) -> Iterator[Item]:
        try:
            value = msgspec.json.decode(data.removeprefix(_BOM.encode()))
        except _NOT_JSON:
            value = None
        values = value.get("runtimes") if isinstance(value, dict) else value
        if not isinstance(values, list):
            yield self._end(data[:_MAX_SHOWN].decode(errors="replace").strip(), _DOCUMENT)
            return
        for number, value in enumerate(values, start=1):
            text = "" if self._is_target(value) else msgspec.json.encode(value).decode()
            yield self._to_item(f"in item {number}", text, value)

    def _is_target(self, value: object) -> bool:
        return isinstance(self._to_item("", "", value), RuntimeRef)

    def _to_item(self, place: str, text: str, value: object) -> Item:
        """Return the target that a JSON value or a pair is, or a bad line."""
        match value:
            case [workspace_id, alias]:
                pass
            case dict():
                workspace_id = _first(value, "workspace_id", "workspaceId", "workspace")
                alias = _first(value, "alias", "name")
            case _:
                return BadLine(place, text, "it is neither an object nor a pair")
        if workspace_id is None:
            workspace_id = self._workspace
        reason = _reason("workspace id", workspace_id) or _reason("alias", alias)
        if reason is None and self._is_only and workspace_id != self._workspace:
            reason = f"it names another workspace than {self._workspace}"
        if reason is not None:
            return BadLine(place, text, reason)
        return RuntimeRef(str(workspace_id), str(alias))

    @property
    def _place(self) -> str:
        return f"on line {self._number}"

    def _bad(self, text: str, reason: str) -> BadLine:
        return BadLine(self._place, text, reason)

    def _end(self, text: str, reason: str) -> BadLine:
        self.ended = True
        return BadLine(self._place, text, reason, ends_input=True)


def _cells(text: str, delimiter: str) -> list[str] | None:
    """Return the cells of a row; None unless each quote encloses a cell or is doubled in one."""
    if '"' not in text:
        return [cell.strip(" ") for cell in text.split(delimiter)]
    # The csv module keeps spaces after a cell, and takes a quote within one for a character.
    is_row, find_cells = _ROWS[delimiter]
    if not is_row(text):
        return None
    return [quoted.replace('""', '"') or plain.strip(" ") for quoted, plain in find_cells(text)]


def _find_layout(  # noqa: PLR0911 - a table of rules.
    text: str, *, has_workspace: bool
) -> _Layout | str:
    """Return the layout that the first line shows, or the reason if it shows none."""
    rows = [(delimiter, _cells(text, delimiter) or []) for delimiter in _DELIMITERS]
    if not any(cells for _, cells in rows):
        return _BAD_QUOTES
    if has_workspace and all(len(cells) == 1 for _, cells in rows):
        cells = rows[0][1]
        is_header = _column(cells, _ALIAS_NAMES) is not None
        return _Layout(_DELIMITERS[0], None, 0, 1, cells if is_header else None)
    for delimiter, cells in rows:
        workspace, alias = _column(cells, _WORKSPACE_NAMES), _column(cells, _ALIAS_NAMES)
        if workspace is not None and alias is not None:
            return _Layout(delimiter, workspace, alias, len(cells), cells)
        if workspace is not None or alias is not None:
            return f"the header has no column {'alias' if alias is None else 'workspace_id'}"
    # Prose often has one comma, but no id has a space.
    fitting = [d for d, cells in rows if len(cells) == _PAIR and " " not in cells[0]]
    if len(fitting) == 1:
        return _Layout(fitting[0], 0, 1, _PAIR)
    if fitting:
        return "two delimiters fit: add a header, or quote the alias"
    if _is_name(text):
        return "it has no workspace: a list of aliases needs WORKSPACE"
    return "it is no header and no pair: expected WORKSPACE,ALIAS or JSON"


def _column(cells: Sequence[str], names: Sequence[str]) -> int | None:
    """Return the index of the first of these columns, whatever its case, spaces and underlines."""
    plain = [_plain("", cell).lower() for cell in cells]
    return next((plain.index(name) for name in names if name in plain), None)


def _first(value: Mapping[object, object], *keys: str) -> object:
    return next((value[key] for key in keys if key in value), None)


def _reason(kind: str, name: object) -> str | None:
    """Return the reason why a value is not a name, None if it is one."""
    if not isinstance(name, str):
        return f"the {kind} is {'missing' if name is None else 'not text'}"
    if not name:
        return f"the {kind} is empty"
    is_plain = name.isprintable() or not ("\t" in name or _find_control(name))
    return None if is_plain else f"the {kind} contains a control character"
