"""Targets from CSV as people have it, parsed without I/O."""

import csv
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bctrl_async.cli._items import MAX_LENGTH, BadLine, Item, to_item

_DELIMITERS = "\t,;"
"""In the order in which they are tried; a tab cannot be a part of a name."""
_WORKSPACE_COLUMNS = ("workspaceid", "workspace")
_ALIAS_COLUMNS = ("alias", "name")
_PAIR = 2

_pieces = re.compile(r"[^\n]*\n|[^\n]+").findall
_closing_quote = re.compile(r'(?:[^"]|"")*+"').match


class _Layout(NamedTuple):
    """The delimiter, the indices of the two columns, and the number of all columns."""

    delimiter: str
    workspace: int
    alias: int
    width: int


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
        """Return the item of a record; None for a blank line, a comment or the header."""
        if isinstance(record, BadLine):
            return record
        number, text = record
        # Not tabs: they may delimit empty cells.
        text = text.strip(" \r\n")
        if not text or text.isspace() or text.startswith("#"):
            return None
        if self._layout is not None:
            return _parse_row(self._layout, number, text)
        layout, is_header, reason = _find_layout(text)
        if layout is None:
            return BadLine(number, text, reason)
        self._layout, self._records.delimiters = layout, layout.delimiter
        return None if is_header else _parse_row(layout, number, text)


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
            return BadLine(self._number, text, "a quote is not closed")
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
        if not is_quoted and '"' not in line:
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


def _find_layout(text: str) -> tuple[_Layout | None, bool, str]:
    """Return the layout that the first row shows.

    Returns:
        The layout or None, whether the row is a header, and the reason if there is no layout.
    """
    rows = [(delimiter, _cells(text, delimiter)) for delimiter in _DELIMITERS]
    missing = None
    for delimiter, cells in rows:
        workspace, alias = _column(cells, _WORKSPACE_COLUMNS), _column(cells, _ALIAS_COLUMNS)
        if workspace is not None and alias is not None:
            return _Layout(delimiter, workspace, alias, len(cells)), True, ""
        if workspace is not None or alias is not None:
            missing = "an alias" if alias is None else "a workspace_id"
    if missing is not None:
        return None, False, f"the header has no column with {missing}"
    for delimiter, cells in rows:
        # Prose often has one comma, but no id has a space.
        if len(cells) == _PAIR and not any(map(str.isspace, cells[0])):
            return _Layout(delimiter, 0, 1, _PAIR), False, ""
    return None, False, "it is neither a header nor a pair"


def _parse_row(layout: _Layout, number: int, text: str) -> Item | None:
    """Return the item of a row, None if all its cells are empty."""
    cells = _cells(text, layout.delimiter)
    if cells and not any(cells):
        return None
    if any(cells[layout.width :]):
        return BadLine(number, text, "it has more columns than the first line")
    if max(layout.workspace, layout.alias) >= len(cells):
        return BadLine(number, text, "it has too few columns")
    return to_item(number, text, cells[layout.workspace], cells[layout.alias])


def _cells(text: str, delimiter: str) -> Sequence[str]:
    if '"' not in text:
        return [cell.lstrip(" ") for cell in text.split(delimiter)]
    try:
        return next(csv.reader([text], delimiter=delimiter, skipinitialspace=True))
    except csv.Error:
        return []


def _column(cells: Sequence[str], names: Sequence[str]) -> int | None:
    """Return the index of the first of these columns, written in any way."""
    plain = [re.sub(r"[\s_]", "", cell).lower() for cell in cells]
    return next((plain.index(name) for name in names if name in plain), None)
