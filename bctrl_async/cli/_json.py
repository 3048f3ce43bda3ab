"""Targets from JSON, parsed without I/O: JSON Lines, a stream of values, or an array of them."""

import json
import re
from collections.abc import Iterator
from enum import Enum, auto

from bctrl_async.cli._items import MAX_LENGTH, BadLine, Item, from_json

_decode = json.JSONDecoder().raw_decode
_not_blank = re.compile(r"\S").search
_not_blank_or_comma = re.compile(r"[^\s,]").search
_flat_value = re.compile(r'[{\[](?:[^{}\[\]"\n]|"[^"\\\n]*+")*+[}\]]').match
_symbol = re.compile(r'"[^"\\\n]*"|["{}\[\]\n]').search
_symbol_in_string = re.compile(r'["\\\n]').search
_line_with_value = re.compile(r"\n(?=[{\[])").search


class _State(Enum):
    BETWEEN = auto()
    """Between values."""
    COMMENT = auto()
    """In a comment between values."""
    OPENED = auto()
    """After a bracket that begins an array of targets, or a pair."""
    VALUE = auto()
    """In a value."""
    LOST = auto()
    """After text that is not JSON: the next line that begins with a bracket begins a value."""
    ENDED = auto()
    """Nothing more is read."""


class JsonParser:
    """A parser of JSON that is fed text as it arrives.

    It finds the end of each value by its brackets, so that values may be broken over lines in any
    way, and `#` begins a comment between them.
    """

    def __init__(self) -> None:
        self._state = _State.BETWEEN
        self._in_array = False
        self._text = ""
        self._position = 0
        self._number = 1
        """The number of the line at this position."""
        self._begins_line = True
        self._value = _Value(1)

    def feed(self, text: str) -> Iterator[Item]:
        """Yield the items that this text completes."""
        self._text, self._position = text, 0
        while self._position < len(self._text):
            if (item := self._step()) is not None:
                yield item

    def finish(self) -> Iterator[Item]:
        """Yield the items that only the end shows: bad lines, and the targets below them."""
        while self._state is _State.VALUE:
            yield self._bad_value("it has no end")
            yield from self.feed(self._text[self._position :])
        if self._state is _State.OPENED or (self._in_array and self._state is not _State.ENDED):
            yield BadLine(self._number, "", "the array has no end")

    def _step(self) -> Item | None:
        match self._state:
            case _State.BETWEEN:
                return self._begin()
            case _State.COMMENT:
                end = self._text.find("\n", self._position)
                self._position = len(self._text) if end < 0 else end
                self._state = _State.COMMENT if end < 0 else _State.BETWEEN
            case _State.OPENED:
                self._open()
            case _State.VALUE:
                return self._read_value()
            case _State.LOST:
                self._find_value()
            case _:
                self._position = len(self._text)
        return None

    def _begin(self) -> Item | None:
        """Begin what is at the position: a value, an array, or a comment."""
        self._skip_blank()
        match self._text[self._position : self._position + 1]:
            case "":
                pass
            case "#":
                self._state = _State.COMMENT
            case "]" if self._in_array:
                self._in_array = False
                self._position += 1
            case "[" if not self._in_array:
                self._state = _State.OPENED
                self._value = _Value(self._number, "[")
                self._position += 1
            case "{" | "[":
                self._state = _State.VALUE
                self._value = _Value(self._number)
            case _:
                line, _, _ = self._text[self._position :].partition("\n")
                return self._lose(self._number, line, "it is not JSON")
        return None

    def _open(self) -> None:
        self._skip_blank()
        match self._text[self._position : self._position + 1]:
            case "":
                pass
            case "]" | "{" | "[":
                self._in_array = True
                self._state = _State.BETWEEN
            case _:
                self._state = _State.VALUE

    def _skip_blank(self) -> None:
        search = _not_blank_or_comma if self._in_array else _not_blank
        found = search(self._text, self._position)
        self._advance(len(self._text) if found is None else found.start())

    def _advance(self, position: int) -> None:
        self._number += self._text.count("\n", self._position, position)
        self._position = position

    def _read_value(self) -> Item | None:
        value = self._value
        self._advance(value.scan(self._text, self._position))
        if value.depth and not value.is_broken:
            return None
        decoded, error_at = _parse(value.text)
        if error_at is not None:
            return self._bad_value("it is not JSON")
        self._state = _State.BETWEEN
        return from_json(value.number, value.text, decoded)

    def _bad_value(self, reason: str) -> BadLine:
        """Return a bad line for the value, and read its text again from where it is bad."""
        text, number = self._value.text, self._value.number
        if len(text) > MAX_LENGTH:
            return self._lose(number, text, "it is longer than 1 MiB")
        _, error_at = _parse(text)
        if error_at is not None and 0 <= error_at < len(text.rstrip()):
            # An error below the first line may be the begin of another value.
            begin = max(text.find("\n"), text.rfind("\n", 0, error_at))
            self._read_again(text[begin:] if begin >= 0 else "")
        return self._lose(number, text, reason)

    def _read_again(self, text: str) -> None:
        """Move the position back before this text, which ends there."""
        self._number -= text.count("\n")
        self._position -= len(text)
        if self._position < 0:
            # It began in a text before this one.
            self._text = text[: -self._position] + self._text
            self._position = 0

    def _lose(self, number: int, text: str, reason: str) -> BadLine:
        """Return a bad line, and begin to search for the next value."""
        # In a broken array, a bracket may begin any part of a target.
        self._state = _State.ENDED if self._in_array else _State.LOST
        self._begins_line = text.endswith("\n")
        return BadLine(number, text, reason, ends_input=self._in_array)

    def _find_value(self) -> None:
        if self._begins_line and self._text[self._position] in "{[":
            self._state = _State.BETWEEN
        elif (found := _line_with_value(self._text, self._position)) is not None:
            self._advance(found.end())
            self._state = _State.BETWEEN
        else:
            self._advance(len(self._text))
            self._begins_line = self._text.endswith("\n")


class _Value:
    """A value whose text arrives in parts.

    Attributes:
        number: The number of the line on which it begins.
        depth: The number of brackets that are open; 0 before it begins and once it has ended.
        is_broken: True if it is known not to be JSON, or is too long.
    """

    def __init__(self, number: int, text: str = "") -> None:
        self.number = number
        self.depth = len(text)
        self.is_broken = False
        self._parts = [text]
        self._length = self._checked_length = 0
        self._is_quoted = self._is_escaped = False

    @property
    def text(self) -> str:
        """The text so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def scan(self, text: str, begin: int) -> int:
        """Add text up to the end of the value, and return the position after it."""
        if not self.depth and (flat := _flat_value(text, begin)) is not None:
            # Nearly every value is one of these, and found at a fraction of the cost.
            self._add(flat[0])
            return flat.end()
        position = begin
        while position < len(text) and not self.is_broken:
            position, symbol = self._next_symbol(text, position)
            if symbol in {"{", "["}:
                self.depth += 1
            elif symbol in {"}", "]"}:
                self.depth -= 1
                if not self.depth:
                    break
            elif symbol == "\n":
                self._add(text[begin:position])
                begin = position
                self.is_broken = self._is_quoted or self._is_long or self._cannot_continue()
        self._add(text[begin:position])
        self.is_broken = self.is_broken or self._is_long
        return position

    @property
    def _is_long(self) -> bool:
        return self._length > MAX_LENGTH

    def _add(self, text: str) -> None:
        self._parts.append(text)
        self._length += len(text)

    def _next_symbol(self, text: str, position: int) -> tuple[int, str]:
        """Return the position after the next symbol, and the symbol."""
        if self._is_escaped:
            self._is_escaped = False
            return position + 1, ""
        found = (_symbol_in_string if self._is_quoted else _symbol)(text, position)
        if found is None:
            return len(text), ""
        if found[0] == '"':
            self._is_quoted = not self._is_quoted
        elif found[0] == "\\":
            self._is_escaped = True
        return found.end(), found[0]

    def _cannot_continue(self) -> bool:
        """Return True if no text after this line can make it JSON."""
        # Only once the text has doubled, so that the time is in proportion to it.
        if self._length < 2 * self._checked_length:
            return False
        self._checked_length = self._length
        _, error_at = _parse(self.text)
        return error_at is not None and error_at < len(self.text.rstrip())


def _parse(text: str) -> tuple[object, int | None]:
    """Return the value of a text, and the position of an error or None."""
    try:
        return _decode(text)[0], None
    except json.JSONDecodeError as error:
        return None, error.pos
    except (ValueError, RecursionError):
        # A number of too many digits, or brackets that are nested too deeply: all of it is bad.
        return None, -1
