"""Recognize the plain answer to a stop, and read it without an HTTP parser. Sans-IO."""

from __future__ import annotations

import re
from typing import ClassVar

import msgspec
from multidict import CIMultiDict, CIMultiDictProxy

_MAX_HEAD = 4096
_STATUS_LINE = b"HTTP/1.1 200 "
_BLANK_LINE = b"\r\n\r\n"

# In lower case. Left out are all headers that mean something to an HTTP parser, such as
# `Transfer-Encoding`, `Upgrade` and `Proxy-Connection`.
_is_plain = re.compile(
    rb"http/1\.1 200 ok"
    rb"(?:\r\n(?:[abdfgijklnoqrvwxyz][a-z0-9-]*"
    rb"|c(?:ontent-(?:length|type|language|security-policy)|onnection(?=: keep-alive\r)"
    rb"|ache-control|f-[a-z0-9-]+|ross-origin-[a-z-]+)"
    rb"|etag|expires|permissions-policy|pragma"
    rb"|s(?:erver|erver-timing|et-cookie|trict-transport-security)|trace(?:parent|state)"
    rb"): [ -~]*){1,60}\r\n\r\n"
).fullmatch
_find_length = re.compile(rb"\r\ncontent-length: ([1-9][0-9]{0,6})\r\n").search
_LENGTH = b"\r\ncontent-length:"


class PlainAnswer(msgspec.Struct, frozen=True, gc=False):
    """A complete response, in place of aiohttp's message.

    Args:
        head: Its head, with the blank line.
        lower: The head in lower case.
        body: Its body.
    """

    head: bytes
    lower: bytes
    body: bytes
    code: ClassVar[int] = 200

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        """The headers."""
        lines = self.head.decode().splitlines()[1:-1]
        pairs = (line.split(": ", 1) for line in lines)
        return CIMultiDictProxy(CIMultiDict((name, value) for name, value in pairs))

    def header(self, name: str) -> str | None:
        """Return the first header of a name, which is in lower case; the others are not read."""
        start = self.lower.find(b"\r\n%b: " % name.encode())
        if start < 0:
            return None
        start += len(name) + 4
        return self.head[start : self.head.index(b"\r\n", start)].decode()


def plain_answer(data: bytes) -> PlainAnswer | None:
    """Return a response if the bytes are exactly one, and in the common form.

    It is `HTTP/1.1 200 OK`, short, in ASCII, has a `Content-Length` and no encoding, and keeps the
    connection alive. For any other this returns None, and aiohttp parses it.
    """
    end = data.find(_BLANK_LINE, 0, _MAX_HEAD) + len(_BLANK_LINE)
    if not data.startswith(_STATUS_LINE):
        return None
    head = data[:end].lower()
    length = _find_length(head)
    if length is None or int(length[1]) != len(data) - end:
        return None
    # Versions of aiohttp differ in whether they keep the spaces around a value.
    has_spaces = b" \r\n" in head or b":  " in head
    if has_spaces or head.count(_LENGTH) > 1 or not _is_plain(head):
        return None
    return PlainAnswer(data[:end], head, data[end:])
