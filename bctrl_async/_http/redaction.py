"""Text of the server for use in errors: short, printable and without the API key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache

from bctrl_async._config import Secret

_MAX_EXCERPT = 2048
_MAX_TEXT = 500
_MIN_KEY_LENGTH = 4
"""A shorter key is a placeholder in tests, and would match ordinary words."""
_MAX_REQUIRED = 8
"""The most characters of a key that must match: a text may cut off the others."""
_MAX_EXACT = 64
"""The most characters of a key that its pattern spells out, as each costs time; after
them, all text up to the next space is redacted."""
_MAX_ESCAPE = 6
"""The most characters that escape a character of a key, such as `\\u0041`."""
_MAX_UTF = 4
"""The most bytes of a character in UTF-8, UTF-16 or UTF-32."""

_may_be_escaped = re.compile(r"[\\%]").search


def sanitize(value: object, key: str) -> str:
    """Return a text of the server as one short printable line without the key.

    Return an empty text for any value but a text.
    """
    if not isinstance(value, str):
        return ""
    text = _redact_beginning(value, key, _MAX_TEXT)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def excerpt_of(body: bytes, key: str) -> str:
    """Return the start of a body, without the key."""
    # The rest need not be decoded: `_redact_beginning` looks at no more characters.
    beginning = body[: _MAX_UTF * (_MAX_EXCERPT + _MAX_ESCAPE * len(key))]
    return _redact_beginning(beginning.decode(errors="replace"), key, _MAX_EXCERPT)


def redacted(text: str, secrets: Iterable[str]) -> str:
    """Return text without these secrets."""
    for secret in secrets:
        text = _redact_beginning(text, secret, len(text))
    return text


def bearer_key(authorization: str) -> Secret:
    """Return the API key in an `Authorization` header."""
    return Secret(authorization.removeprefix("Bearer "))


def detached(error: BaseException) -> BaseException:
    """Return an error without traceback, causes and input: they may have the key."""
    if isinstance(error, UnicodeError | json.JSONDecodeError):
        error = ValueError(str(error))
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _redact_beginning(text: str, key: str, length: int) -> str:
    # A key that starts within the length ends within this window, even if escaped.
    window = length + _MAX_ESCAPE * len(key)
    # ASCII in UTF-16 or UTF-32 can be read as UTF-8 once its NULs are dropped.
    text = text[: _MAX_UTF * window].replace("\0", "")[:window]
    # Few texts can match, and the search for the pattern is slow.
    if len(key) >= _MIN_KEY_LENGTH and (
        key[:_MIN_KEY_LENGTH] in text or _may_be_escaped(text)
    ):
        text = _pattern(key).sub("***", text)
    # The text is truncated after it is redacted, else a part of the key could be left.
    return text[:length]


@lru_cache(maxsize=4)
def _pattern(key: str) -> re.Pattern[str]:
    """Return a pattern for a key or its long prefix, plain or escaped (JSON, URLs)."""
    characters = [
        rf"(?:\\?{re.escape(character)}"
        rf"|(?i:\\u00{ord(character):02x}|%{ord(character):02x}))"
        for character in key[:_MAX_EXACT]
    ]
    if len(key) > _MAX_EXACT:
        characters[-1] += "[!-~]*"
    required = max(_MIN_KEY_LENGTH, min(_MAX_REQUIRED, len(key) // 2))
    optional = "".join(f"(?:{character})?" for character in characters[required:])
    return re.compile("".join(characters[:required]) + optional)
