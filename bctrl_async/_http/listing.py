"""Parse a list of runtimes of any length, in slices that do not stall the event loop. Sans-IO."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Generator
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from bctrl_async._http.redaction import bearer_key, excerpt_of
from bctrl_async._http.response import DECODE_ERRORS, convert_runtime, invalid_body
from bctrl_async.errors import BctrlResponseError
from bctrl_async.models import Runtime

_SLICE = 64 * 1024
"""The bytes that are decoded at once."""
_MAX_VALUE = 256 * 1024
"""The most characters of a runtime, or of a value beside the list."""
_MAX_INVALID = 100
"""The most invalid runtimes in a list whose valid ones are kept."""
_MAX_MEMBERS = 100
"""The most members of the object that has the list."""

_T = TypeVar("_T")

Slices = Generator[None, None, _T]
"""A computation that yields between slices."""

_Listed = list[Runtime | BctrlResponseError]

_raw_decode = json.JSONDecoder().raw_decode
_find_token = re.compile(r"[^ \t\n\r]").search


class _RuntimeList(msgspec.Struct, frozen=True):
    runtimes: list[Runtime]


class _RawList(msgspec.Struct, frozen=True):
    runtimes: list[Any]


_decode_list = msgspec.json.Decoder(_RuntimeList).decode


def parse_runtimes(status: int, body: bytes, authorization: str) -> _Listed | BctrlResponseError:
    """Parse the body of a 2xx response to a list (contract errors.md: `{"runtimes": […]}`).

    Args:
        status: The HTTP status, for the error.
        body: The whole body.
        authorization: The `Authorization` header that was sent, to keep the key out of the error.

    Returns:
        The runtimes in order, with an error in place of an invalid one, which has its alias if
        known; or a single error if the body is not a list, or has more than 100 invalid runtimes.
    """
    with suppress(*DECODE_ERRORS):
        return list(_decode_list(body).runtimes)
    slices = parse_long_list(status, body, authorization)
    while True:
        try:
            next(slices)
        except StopIteration as finished:
            parsed: _Listed | BctrlResponseError = finished.value
            return parsed


def parse_long_list(
    status: int, body: bytes, authorization: str
) -> Slices[_Listed | BctrlResponseError]:
    """Parse a list as `parse_runtimes` does, but in slices.

    A valid list is decoded value by value, and so takes several times as long.
    """
    excerpt = excerpt_of(body, bearer_key(authorization))
    try:
        return (yield from _parse_body(_JsonText(body), status, excerpt))
    except DECODE_ERRORS as error:
        return invalid_body(status, "the body", "list of runtimes", error, excerpt)


def _parse_body(text: _JsonText, status: int, excerpt: str) -> Slices[_Listed]:
    if not (yield from text.skip("{")):
        return msgspec.convert((yield from text.value()), _RawList).runtimes
    found: _Listed | None = None
    members = 0
    more = not (yield from text.skip("}"))
    while more:
        members += 1
        if members > _MAX_MEMBERS:
            raise msgspec.ValidationError(f"it has more than {_MAX_MEMBERS} members")
        name = yield from text.value()
        if not (isinstance(name, str) and (yield from text.skip(":"))):
            raise ValueError("expected a name and a colon")
        if name == "runtimes" and (yield from text.skip("[")):
            found = yield from _parse_items(text, status, excerpt)
        else:
            value = yield from text.value()
            if name == "runtimes":
                msgspec.convert({name: value}, _RawList)
        more = yield from text.continues("}")
    if (yield from text.next_character()):
        raise ValueError("expected nothing after the list")
    return msgspec.convert({}, _RawList).runtimes if found is None else found


def _parse_items(text: _JsonText, status: int, excerpt: str) -> Slices[_Listed]:
    runtimes: _Listed = []
    invalid = 0
    more = not (yield from text.skip("]"))
    while more:
        item = yield from text.value()
        try:
            runtimes.append(convert_runtime(item))
        except DECODE_ERRORS as error:
            invalid += 1
            if invalid > _MAX_INVALID:
                raise msgspec.ValidationError(
                    f"more than {_MAX_INVALID} runtimes in it are invalid; the last: {error}"
                ) from None
            part = f"runtimes[{len(runtimes)}]"
            problem = invalid_body(status, part, "Runtime", error, excerpt)
            alias = item.get("alias") if isinstance(item, dict) else None
            problem.alias = alias if isinstance(alias, str) else None
            runtimes.append(problem)
        more = yield from text.continues("]")
    return runtimes


class _JsonText:
    """A JSON text that is decoded in slices, and read value by value.

    Args:
        body: The text, in any encoding that JSON allows.
    """

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._decoded = 0
        decoder = codecs.getincrementaldecoder(json.detect_encoding(body))
        # `json.loads` accepts surrogates as well.
        self._decode = decoder("surrogatepass").decode
        self._text = ""
        self._at = 0

    def next_character(self) -> Slices[str]:
        """Skip whitespace, and return the character after it; "" at the end."""
        while True:
            token = _find_token(self._text, self._at)
            if token is not None:
                self._at = token.start()
                return token[0]
            self._at = len(self._text)
            if not self._decode_slice():
                return ""
            yield

    def skip(self, character: str) -> Slices[bool]:
        """Skip a character if it is the next one; return True if it was."""
        found = (yield from self.next_character()) == character
        self._at += found
        return found

    def continues(self, end: str) -> Slices[bool]:
        """Skip a comma, or the end of an array or object; return True if it was a comma.

        Raises:
            ValueError: There is neither.
        """
        if (yield from self.skip(",")):
            return True
        if (yield from self.skip(end)):
            return False
        raise ValueError(f"expected a comma or {end}")

    def value(self) -> Slices[Any]:
        """Read a value.

        Raises:
            ValueError: The value is not JSON.
            msgspec.ValidationError: It is too long, if it is JSON.
            RecursionError: It is nested too deeply.
        """
        yield from self.next_character()
        while True:
            problem = ValueError("expected a value")
            try:
                value, end = _raw_decode(self._text, self._at)
            except ValueError as error:
                problem = error
            else:
                # A number may go on in the next slice.
                token = _find_token(self._text, end)
                if token[0] in ",:]}" if token else self._decoded == len(self._body):
                    self._at = end
                    return value
            if len(self._text) - self._at > _MAX_VALUE:
                raise msgspec.ValidationError(
                    f"a part of it takes more than {_MAX_VALUE // 1024} KiB or is not JSON"
                )
            if not self._decode_slice():
                raise problem
            yield

    def _decode_slice(self) -> bool:
        """Decode the next slice; return False at the end of the text."""
        encoded = self._body[self._decoded : self._decoded + _SLICE]
        self._decoded += len(encoded)
        is_last = self._decoded == len(self._body)
        self._text = self._text[self._at :] + self._decode(encoded, is_last)
        self._at = 0
        return bool(encoded)
