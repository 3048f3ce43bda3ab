"""The operations of the API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from bctrl_async._http.response import read_runtime, read_runtimes
from bctrl_async.errors import BctrlResponseError

MIB = 1024 * 1024
MAX_BODY = MIB
"""Bytes of an answer that are read, after decompression; a Runtime takes about 500."""
_MAX_LIST = 64 * MIB
"""The same for a list: room for a hundred thousand runtimes."""

_T = TypeVar("_T")


class Operation(msgspec.Struct, Generic[_T], frozen=True):
    """One operation of the API.

    Args:
        name: What it is called in errors.
        method: The HTTP method.
        read: Reads the body of a 2xx answer, given its status and the key that was sent.
        max_body: Bytes of that body that are read, after decompression.
    """

    name: str
    method: str
    read: Callable[[int, bytes, str], _T | BctrlResponseError]
    max_body: int = MAX_BODY

    @property
    def stops(self) -> bool:
        """Whether a request changes anything; what only reads leaves every runtime as it is."""
        return self.method == "POST"


STOP = Operation("stop", "POST", read_runtime)
"""Contract: `runtimes-stop`."""
GET = Operation("get", "GET", read_runtime)
"""Contract errors.md: `runtimes-get`."""
LIST = Operation("list", "GET", read_runtimes, _MAX_LIST)
"""Contract errors.md: `runtimes-list`."""
