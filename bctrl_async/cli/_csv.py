"""Targets from CSV as people have it, parsed without I/O."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bctrl_async.cli._items import MAX_LENGTH, BadLine, Item, to_item

_DELIMITERS = "\t,;"
_TEXT_AFTER_QUOTE = "text follows a closing quote"
_WORKSPACE_COLUMNS = ("workspaceid", "workspace")
_ALIAS_COLUMNS = ("alias", "name")
_PAIR = 2
# Not tabs: they may delimit empty cells. Joined files have a byte order mark each.
_AROUND = " \r\n\ufeff"
"""Characters around a row that are not a part of it."""

_pieces = re.compile(r"[^\n]*\n|[^\n]+").findall
_closing_quote = re.compile(r'(?:[^"]|"")*+"').match
_quoted = re.compile(r'"(?:[^"]|"")*+"')
_has_text_after_quote = re.compile(r'"(?:[^"]|"")*+".', re.DOTALL).match
_find_cells = {
    delimiter: re.compile(rf'(?:\A|{delimiter})((?: *"(?:[^"]|"")*+")?+[^{delimiter}]*+)').findall
    for delimiter in _DELIMITERS
}


class _Layout(NamedTuple):
    """The layout of the rows, by the first of them.

    Attributes:
        delimiter: The delimiter.
        workspace: The index of the column of workspace ids.
        alias: The index of the column of aliases.
        named: The number of columns up to the last that has a name; each row has at least as many.
        width: The number of columns.
        header: The header, if any.
    """

    delimiter: str
    workspace: int
    alias: int
    named: int
    width: int
    header: Sequence[str] | None = None


class CsvParser:
    """A parser of CSV that is fed text as it arrives.

    The first row decides about the delimiter and the columns.
    """

    def __init__(self) -> None:
        self._records = _Records()
        self._layout: _Layout | None = None

    def feed(self, text: str) -> Iterator[Item]:
        """Yield the items that this text completes."""
        for record in self._records.feed(text):
            if (item := self._item(record)) is not None:
                yield item

    def finish(self) -> Iterator[Item]:
        """Yield the item of a last line without a line end."""
        if (item := self._item(self._records.last())) is not None:
            yield item

    def _item(self, record: "_Record | BadLine") -> Item | None:
        """Return the item of a record; None for a blank line, a comment or a header."""
        if isinstance(record, BadLine):
            return record
        number, text = record
        text = text.strip(_AROUND)
        if _is_blank(text):
            return None
        if self._layout is None:
            layout = _find_layout(text)
            if isinstance(layout, str):
                return BadLine(number, text, layout)
            self._layout, self._records.delimiters = layout, layout.delimiter
        return _parse_row(self._layout, number, text)


class _Record(NamedTuple):
    """The number of a line, and its text; several lines if a quoted cell contains line ends."""

    number: int
    text: str


class _Records:
    """The records in a text that arrives in parts.

    Attributes:
        delimiters: The characters after which a quote begins a quoted cell.
    """

    def __init__(self) -> None:
        self.delimiters = _DELIMITERS
        self._lines: list[str] = []
        """The lines of a record that ends in a quoted cell."""
        self._parts: list[str] = []
        """The parts of a line whose end has not arrived."""
        self._length = 0
        self._number = self._next_number = 1
        self._skips = self._ended = False

    def feed(self, text: str) -> Iterator[_Record | BadLine]:
        """Yield the records that this text completes."""
        for piece in _pieces(text):
            if not self._ended and (record := self._add(piece)) is not None:
                yield record

    def last(self) -> _Record | BadLine:
        """Return the record at the end of the text; it may be empty."""
        line = "".join(self._parts)
        text = "".join([*self._lines, line])
        if self._ends_quoted(line):
            ends_input = "\n" in text.strip()
            return BadLine(self._number, text, "a quote is not closed", ends_input=ends_input)
        return _Record(self._number, text)

    def _add(self, piece: str) -> _Record | BadLine | None:
        is_complete = piece.endswith("\n")
        self._next_number += is_complete
        if is_complete and not self._length and '"' not in piece and not self._skips:
            # Nearly every line is such a one.
            self._number = self._next_number
            return _Record(self._number - 1, piece)
        if self._skips:
            self._skips = not is_complete
            # After a quote, a line end may belong to a quoted cell, and so may the lines below.
            self._ended = '"' in piece
            return self._bad_line(piece) if self._ended else None
        self._parts.append(piece)
        self._length += len(piece)
        if self._length > MAX_LENGTH:
            text = "".join([*self._lines, *self._parts])
            self._skips, self._ended = not is_complete, '"' in text
            return self._bad_line(text)
        if not is_complete:
            return None
        line = "".join(self._parts)
        self._parts = []
        is_open = self._ends_quoted(line)
        self._lines.append(line)
        return None if is_open else _Record(*self._take())

    def _bad_line(self, text: str) -> BadLine:
        number, _ = self._take()
        return BadLine(number, text, "it is longer than 1 MiB", ends_input=self._ended)

    def _take(self) -> tuple[int, str]:
        number, text = self._number, "".join(self._lines)
        self._lines, self._parts, self._length = [], [], 0
        self._number = self._next_number
        return number, text

    def _ends_quoted(self, line: str) -> bool:
        """Return True if the next line end is in a quoted cell."""
        position = 0
        is_quoted = bool(self._lines)
        if not is_quoted and ('"' not in line or line.lstrip(_AROUND).startswith("#")):
            return False
        opening_quote = re.compile(rf'(?:\A|[{self.delimiters}]) *"')
        while True:
            if not is_quoted:
                found = opening_quote.search(line, position)
                if found is None:
                    return False
                position = found.end()
            found = _closing_quote(line, position)
            if found is None:
                return True
            position, is_quoted = found.end(), False


def _is_blank(text: str) -> bool:
    """Return True for a line without a row: a blank one or a comment."""
    return not text or text.isspace() or text.startswith("#")


def _find_layout(text: str) -> _Layout | str:
    """Return the layout that the first row shows, or the reason if it shows none."""
    rows = [(delimiter, _cells(text, delimiter)) for delimiter in _DELIMITERS]
    missing = None
    for delimiter, cells in rows:
        workspace, alias = _column(cells, _WORKSPACE_COLUMNS), _column(cells, _ALIAS_COLUMNS)
        if workspace is not None and alias is not None:
            named = max(number for number, name in enumerate(cells, start=1) if name)
            return _Layout(delimiter, workspace, alias, named, len(cells), cells)
        if workspace is not None or alias is not None:
            missing = "an alias" if alias is None else "a workspace_id"
    if missing is not None:
        return f"the header has no column with {missing}"
    fitting = [delimiter for delimiter, cells in rows if _is_pair(cells)]
    if len(fitting) > 1:
        # A delimiter within quotes is a part of a name.
        fitting = [one for one in fitting if _is_well_quoted(text, one)] or fitting
    match fitting:
        case [delimiter]:
            return _Layout(delimiter, 0, 1, _PAIR, _PAIR)
        case [_, _]:
            return "a comma and a semicolon both fit: add a header, or quote the alias"
    return "it is neither a header nor a pair"


def _is_pair(cells: Sequence[str]) -> bool:
    """Return True if these can be a workspace id and an alias."""
    # Prose often has one comma, but no id has a space. No name has a tab.
    return len(cells) == _PAIR and not any(map(str.isspace, cells[0])) and "\t" not in cells[1]


def _parse_row(layout: _Layout, number: int, text: str) -> Item | None:
    """Return the item of a row, None if it is a header or all its cells are empty."""
    if text[0] in "{[":
        return BadLine(number, text, "it looks like JSON, but the first line is CSV")
    raw = _raw_cells(text, layout.delimiter)
    cells = [_unquoted(cell) for cell in raw] if '"' in text else raw
    fault = _hidden_rows(layout, raw, text) if "\n" in text else None
    if fault is None:
        # Joined files have a header each.
        if cells == layout.header or not any(cells):
            return None
        fault = _fault(layout, raw, cells)
    if fault is not None:
        return BadLine(number, text, fault)
    return to_item(number, text, cells[layout.workspace], cells[layout.alias])


def _fault(layout: _Layout, raw: Sequence[str], cells: Sequence[str]) -> str | None:
    """Return the reason why a row does not have the cells of the layout, None if it does."""
    if any(cells[layout.width :]):
        return "it has more columns than the first line"
    # A file that was cut off may end within the alias.
    if len(cells) < layout.named:
        return "it has fewer columns than the first line"
    if any(_has_text_after_quote(raw[index]) for index in (layout.workspace, layout.alias)):
        return _TEXT_AFTER_QUOTE
    return None


def _hidden_rows(layout: _Layout, raw: Sequence[str], text: str) -> str | None:
    """Return the reason if the lines of a record may be rows, which a stray quote has joined."""
    if any(map(_has_text_after_quote, raw)):
        return _TEXT_AFTER_QUOTE
    rows, others = 0, []
    for line in text.split("\n"):
        if line.count(layout.delimiter) + 1 >= layout.named:
            rows += 1
        else:
            others.append(line.strip(_AROUND))
    if rows > 1 and all(map(_is_blank, others)):
        return "each of its lines could be a row: a quote may be missing"
    # Also those with too few columns.
    if _repeats_workspace(layout, raw):
        return "a quoted line names its workspace: a quote may be missing"
    return None


def _repeats_workspace(layout: _Layout, raw: Sequence[str]) -> bool:
    """Return True if a cell of several lines has the workspace id of its row between delimiters."""
    # In any column: a note with a delimiter shifts them. Prose hardly ever has it.
    workspace = _unquoted(raw[layout.workspace]) if len(raw) > layout.workspace else ""
    lines = "\n".join(cell for cell in raw if "\n" in cell)
    parts = lines.replace(layout.delimiter, "\n").split("\n")
    return workspace != "" and workspace in (part.strip(_AROUND + '"') for part in parts)


def _cells(text: str, delimiter: str) -> Sequence[str]:
    """Return the cells of a row, without their quotes."""
    return [_unquoted(cell) for cell in _raw_cells(text, delimiter)]


def _raw_cells(text: str, delimiter: str) -> Sequence[str]:
    """Return the cells of a row, with their quotes."""
    # Not with `csv`, which keeps the spaces after a cell, and does not tell which are quoted.
    if '"' not in text:
        return [cell.strip(" ") for cell in text.split(delimiter)]
    return [cell.strip(" ") for cell in _find_cells[delimiter](text)]


def _unquoted(cell: str) -> str:
    found = _quoted.match(cell)
    if found is None:
        return cell
    return found[0][1:-1].replace('""', '"') + cell[found.end() :]


def _is_well_quoted(text: str, delimiter: str) -> bool:
    """Return True if each quote encloses a cell, or is doubled within one."""
    cells = _raw_cells(text, delimiter)
    return all('"' not in cell or _quoted.fullmatch(cell) for cell in cells)


def _column(cells: Sequence[str], names: Sequence[str]) -> int | None:
    """Return the index of the first of these columns, written in any way."""
    plain = [re.sub(r"[\s_]", "", cell).lower() for cell in cells]
    return next((plain.index(name) for name in names if name in plain), None)
