"""Text of the server for use in errors: short, printable and without the API key."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from bctrl_async._config import Secret

_MAX_EXCERPT = 2048
_MAX_TEXT = 500
_MIN_KEY_LENGTH = 4
"""A shorter key is a placeholder in tests, and would match ordinary words."""
_MAX_PART = 8
"""The characters of a key from which its beginning is redacted: the rest may be cut off."""
_MAX_ESCAPE = 6
_MAX_UTF = 4
"""The bytes of a character in UTF-8, UTF-16 or UTF-32."""

# Escapes of JSON, URLs and HTML, also nested: `\\u002F`, `\/`, `%252f`, `&#x2F;`.
_find_escapes = re.compile(
    r"\\+u00([0-9A-Fa-f]{2})|%(?:25)*([0-9A-Fa-f]{2})|\\+(.)|(&#?[0-9A-Za-z]{2,8};)", re.DOTALL
).finditer
_may_be_escaped = re.compile(r"[\\%&]").search


def sanitize(value: object, key: str) -> str | None:
    """Return text of the server for use in an error: one short printable line without the key."""
    if not isinstance(value, str):
        return None
    text = _redact_beginning(value, key, _MAX_TEXT)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split()) or None


def excerpt_of(body: bytes, key: str) -> str:
    """Return the beginning of a body, without the key."""
    beginning = body[: _MAX_UTF * _window(key, _MAX_EXCERPT)]
    return _redact_beginning(beginning.decode(errors="replace"), key, _MAX_EXCERPT)


def bearer_key(authorization: str) -> Secret:
    """Return the API key in an `Authorization` header."""
    return Secret(authorization.removeprefix("Bearer "))


def detached(error: Exception) -> Exception:
    """Return an error without what may contain the key: its traceback, causes and input."""
    if isinstance(error, UnicodeError | json.JSONDecodeError):
        error = ValueError(str(error))
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _redact_beginning(text: str, key: str, length: int) -> str:
    window = _window(key, length)
    # Without NULs, UTF-16 and UTF-32 are read as UTF-8, as far as they are ASCII.
    text = text[: _MAX_UTF * window].replace("\0", "")
    # Truncated to the length after it is redacted, else a part of the key could be left.
    return _redact(text[:window], key)[:length]


def _window(key: str, length: int) -> int:
    return length + _MAX_ESCAPE * len(key)


def _redact(text: str, key: str) -> str:
    if len(key) < _MIN_KEY_LENGTH:
        return text
    plain, starts = _unescape(text)
    spans: list[tuple[int, int]] = []
    for part, form in _forms(key):
        if part in plain:
            spans += _find(plain, part, form)
    if not spans:
        return text
    redacted, end = [], 0
    for begin, stop in sorted(spans):
        if begin >= end:
            redacted += [text[starts[end] : starts[begin]], "***"]
        end = max(end, stop)
    return "".join([*redacted, text[starts[end] :]])


def _unescape(text: str) -> tuple[str, Sequence[int]]:
    """Return text without escapes, and the position in `text` of each character and of the end."""
    if not _may_be_escaped(text):
        return text, range(len(text) + 1)
    plain: list[str] = []
    starts: list[int] = []
    at = 0
    for found in _find_escapes(text):
        plain.append(text[at : found.start()])
        starts.extend(range(at, found.start()))
        digits = found[1] or found[2]
        characters = chr(int(digits, 16)) if digits else found[3] or html.unescape(found[4])
        plain.append(characters)
        starts.extend([found.start()] * len(characters))
        at = found.end()
    starts.extend(range(at, len(text) + 1))
    return "".join([*plain, text[at:]]), starts


@lru_cache(maxsize=4)
def _forms(key: str) -> Sequence[tuple[Secret, Secret]]:
    """Return the forms of a key in text without escapes, each after the part it is found by.

    In base64, a key within other text has one of three forms.
    """
    # Unescaped as well, for it may contain what looks like an escape.
    forms = {key, _unescape(key)[0]}
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + key.encode()).decode()
        # Of the characters at both ends, some bits belong to the text around the key.
        inner = encoded[-(-8 * before // 6) : 8 * (before + len(key)) // 6]
        forms |= {inner, inner.replace("+", "-").replace("/", "_")}
    return [
        (Secret(form[: max(_MIN_KEY_LENGTH, min(_MAX_PART, len(form) // 2))]), Secret(form))
        for form in forms
        if len(form) >= _MIN_KEY_LENGTH
    ]


def _find(text: str, part: str, form: str) -> Iterator[tuple[int, int]]:
    """Yield where text has a form of the key, or the beginning of one that was cut off."""
    begin = text.find(part)
    while begin >= 0:
        end = begin + len(part)
        while text[end : end + 1] == form[end - begin : end - begin + 1] != "":
            end += 1
        yield begin, end
        begin = text.find(part, begin + 1)
