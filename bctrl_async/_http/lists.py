"""Parse a list of any length, in slices that do not stall the event loop. Sans-IO."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from http import HTTPStatus

import msgspec

from bctrl_async._http.response import (
    DECODE_ERRORS,
    MAX_TEXT,
    MIB,
    decode,
    decode_runtime,
    names_in,
    unreadable,
)
from bctrl_async.errors import BctrlResponseError
from bctrl_async.models import Runtime

_SLICE = 64 * 1024
"""The number of bytes that are decoded before other tasks get a turn."""
_MAX_RUNTIME = MIB // 4
"""The most bytes of a runtime."""
_MAX_INVALID = 100
"""The most invalid runtimes in a list; beyond them, the whole list is rejected."""
_IS_A_PAGE = "it is a page of a longer list, the rest of which this version cannot read"
_MAX_COMMAS = 4_000_000
"""The most commas in a list, as each may end an item; 64 MiB of runtimes have half."""


_find_relations = re.compile(r';\s*rel\s*=\s*"?([^",;]*)', re.IGNORECASE).findall
"""Return the relation types of each link of a Link header (RFC 8288 section 3.3)."""


class _RawList(msgspec.Struct, frozen=True, rename="camel"):
    runtimes: list[msgspec.Raw]
    next_cursor: object = None


_split = msgspec.json.Decoder(_RawList).decode

RuntimeList = list[Runtime | BctrlResponseError]
"""A list as it is parsed, with an error for each invalid runtime."""


async def parse_runtimes(body: bytes) -> RuntimeList:
    """Parse a list, with an error for each invalid runtime, or raise an error."""
    runtimes: RuntimeList = []
    invalid_count = bytes_in_slice = 0
    for item in await _items(body):
        bytes_in_slice += len(item)
        if bytes_in_slice > _SLICE:
            bytes_in_slice = 0
            await asyncio.sleep(0)
        try:
            if len(item) > _MAX_RUNTIME:
                raise msgspec.ValidationError(
                    f"it has more than {_MAX_RUNTIME // 1024} KiB"
                )
            runtimes.append(decode_runtime(item))
        except DECODE_ERRORS as error:
            invalid_count += 1
            if invalid_count > _MAX_INVALID:
                problem = f"more than {_MAX_INVALID} runtimes in it are invalid"
                raise msgspec.ValidationError(f"{problem}; the last: {error}") from None
            runtimes.append(_error_of_item(f"runtimes[{len(runtimes)}]", item, error))
    return runtimes


def _error_of_item(part: str, item: bytes, cause: Exception) -> BctrlResponseError:
    failure = unreadable(HTTPStatus.OK, part, "Runtime", cause)
    names = names_in(item)
    alias = None
    if names is not None:
        alias = names.alias[:MAX_TEXT]
    error = BctrlResponseError(failure.summary, alias=alias, status=failure.status)
    error.__cause__ = failure.cause
    return error


def check_whole(status: int, links: Iterable[str]) -> None:
    """Raise one of `DECODE_ERRORS` if the head of a 2xx promises no whole list."""
    if status != HTTPStatus.OK:
        # 206 is a part of a list; 202 and 203 may be something else.
        raise msgspec.ValidationError("only 200 is a whole list")
    for relations in _find_relations(", ".join(links)):
        if "next" in relations.lower().split():
            raise msgspec.ValidationError(f"its Link header says that {_IS_A_PAGE}")


async def _items(body: bytes) -> Iterable[bytes]:
    """Split a list into its items, which need not be valid."""
    commas = 0
    for start in range(0, len(body), MIB):
        if start:
            await asyncio.sleep(0)
        commas += body.count(b",", start, start + MIB)
    if commas > _MAX_COMMAS:
        raise msgspec.ValidationError(f"it has more than {_MAX_COMMAS:,} commas")
    # A raw item is not decoded here, so a lone surrogate can stay in it as these bytes,
    # which `decode_runtime` replaces.
    raw_list = decode(_split, body, b"\xed\xa0\x80")
    if raw_list.next_cursor:
        raise msgspec.ValidationError(f"its nextCursor says that {_IS_A_PAGE}")
    return (bytes(item) for item in raw_list.runtimes)
