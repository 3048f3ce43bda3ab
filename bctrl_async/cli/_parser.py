"""The parser of an input, whose format it finds out."""

import codecs
import re
from collections.abc import Iterator

from bctrl_async.cli._csv import CsvParser
from bctrl_async.cli._items import Item
from bctrl_async.cli._json import JsonParser

_EXPECTED = "expected WORKSPACE,ALIAS or JSON"
_HEAD = 512
_MAX_BLANK = 65536
_blank = re.compile(r"(?:\s|#[^\n]*\n)*").match
# In a table, since people hand over a workbook more often than one would think.
_SIGNATURES = {
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook; export it as CSV",
    b"\x1f\x8b": "compressed data; decompress it first",
    b"%PDF": "a PDF file",
    b"\x89PNG": "a PNG image",
    b"<": "HTML or XML",
}


class TargetParser:
    """A parser of an input that is fed bytes as they arrive."""

    def __init__(self) -> None:
        # Bytes that are not UTF-8 become surrogates, which cannot be a part of a name.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._parser: CsvParser | JsonParser | None = None
        self._begin = ""
        self._head = b""

    def feed(self, data: bytes) -> Iterator[Item]:
        """Yield the items that these bytes complete; b"" is the end of the input."""
        if len(self._head) < _HEAD:
            self._head += data[:_HEAD]
        text = self._decoder.decode(data, final=not data)
        if self._parser is None:
            self._begin = text = self._begin + text
            self._parser = _choose(text, is_all=not data)
        if self._parser is not None:
            yield from self._parser.feed(text)
            if not data:
                yield from self._parser.finish()

    def advise(self) -> str:
        """Say what the input looks like, or what it should be, if it is not a list of targets."""
        begin = self._head.removeprefix(codecs.BOM_UTF8).lstrip()
        found = next((kind for sign, kind in _SIGNATURES.items() if begin.startswith(sign)), None)
        if found is None and b"\0" in self._head:
            found = "binary data"
        return _EXPECTED if found is None else f"it looks like {found}"


def _choose(begin: str, *, is_all: bool) -> CsvParser | JsonParser | None:
    """Return the parser of an input, None as long as only blanks and comments have arrived."""
    blank = _blank(begin)
    first = begin[blank.end() : blank.end() + 1] if blank is not None else ""
    if first in {"", "#"}:
        return CsvParser() if is_all or len(begin) > _MAX_BLANK else None
    return JsonParser() if first in {"{", "["} else CsvParser()
