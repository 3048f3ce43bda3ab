"""The operations of the API: method, path and parser of each."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import Generic, TypeVar
from uuid import UUID

import msgspec

from bctrl_async._http.listing import Slices, parse_long_list, parse_runtimes
from bctrl_async._http.request import path_segment
from bctrl_async._http.response import parse_runtime
from bctrl_async.errors import BctrlResponseError

MIB = 1024 * 1024
MAX_BODY = MIB
"""The most bytes of a body that are read, after decompression; a Runtime takes about 500."""
LONG_BODY = MIB // 4
"""The bytes of a body from which `parse_long` is used."""
_MAX_LIST = 64 * MIB
"""The limit for a list: enough for a hundred thousand runtimes."""

_cached_segment = lru_cache(maxsize=64)(path_segment)

_T = TypeVar("_T")


class Effect(Enum):
    """The effect of a request, from which errors, retries and observers follow."""

    READS = "reads"
    CHANGES = "changes"
    """It changes the runtime, and does not stop it."""
    STOPS = "stops"


class Operation(msgspec.Struct, Generic[_T], frozen=True, kw_only=True):
    """One operation of the API, and what a request of it does.

    Args:
        name: The name in errors.
        method: The HTTP method.
        suffix: The end of the path, after the alias; None for an operation on a whole workspace.
        effect: What a request does.
        repeat_in_doubt: True if a request may be sent again after one that may have taken effect.
        parse: Parses the body of a 2xx response, given the status, the body and the
            `Authorization` header that was sent.
        max_body: The most bytes of that body that are read, after decompression.
        parse_long: Parses a body of more than 256 KiB in slices; None if `parse` is fast enough.
    """

    name: str
    method: str
    suffix: str | None
    effect: Effect
    repeat_in_doubt: bool
    parse: Callable[[int, bytes, str], _T | BctrlResponseError]
    max_body: int = MAX_BODY
    parse_long: Callable[[int, bytes, str], Slices[_T | BctrlResponseError]] | None = None

    @property
    def template(self) -> str:
        """The path, with placeholders in place of the names."""
        path = "/v1/workspaces/{id}/runtimes"
        return path if self.suffix is None else f"{path}/{{alias}}{self.suffix}"

    @property
    def reads(self) -> bool:
        """True if a request has no effect."""
        return self.effect is Effect.READS

    @property
    def stops(self) -> bool:
        """True if a request may stop a runtime."""
        return self.effect is Effect.STOPS

    def path(self, root: str, workspace_id: str | UUID, alias: str | None) -> str:
        """Return the encoded path.

        Args:
            root: The path of the base URL.
            workspace_id: The workspace's id.
            alias: The runtime's alias, unless the operation is on a whole workspace.

        Raises:
            BctrlConfigError: As `path_segment` raises it.
        """
        # Most calls are about the same few workspaces.
        encode = _cached_segment if type(workspace_id) is str else path_segment
        path = f"{root}/workspaces/{encode(workspace_id, 'workspace id')}/runtimes"
        if self.suffix is None:
            return path
        return f"{path}/{path_segment(alias, 'alias')}{self.suffix}"


STOP = Operation(
    name="stop",
    method="POST",
    suffix="/stop",
    effect=Effect.STOPS,
    repeat_in_doubt=True,
    parse=parse_runtime,
)
"""Contract: `runtimes-stop`."""
GET = Operation(
    name="get",
    method="GET",
    suffix="",
    effect=Effect.READS,
    repeat_in_doubt=True,
    parse=parse_runtime,
)
"""Contract errors.md: `runtimes-get`."""
LIST = Operation(
    name="list",
    method="GET",
    suffix=None,
    effect=Effect.READS,
    repeat_in_doubt=True,
    parse=parse_runtimes,
    max_body=_MAX_LIST,
    parse_long=parse_long_list,
)
"""Contract errors.md: `runtimes-list`."""
