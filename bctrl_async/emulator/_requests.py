"""The record of a request."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bctrl_async.emulator._faults import Fault
from bctrl_async.emulator._reply import Reply
from bctrl_async.emulator._routes import Operation


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """A request as received, and the emulator's reaction to it.

    Attributes:
        workspace_id: The decoded workspace id, None if the path is unknown.
        alias: The decoded alias, None if the path is unknown or that of a list.
        method: The HTTP method.
        raw_path: The request target exactly as on the wire, with its query.
        headers: The headers, with case-insensitive names.
        body: The body as on the wire, not decompressed.
        fault: The fault or reply that was applied, None for normal behaviour.
        status: The HTTP status of the response, None if there was no response.
        operation: `stop`, `get` or `list`; None if the path is unknown, or the method is not that
            of its operation.
        received_at: Seconds from the emulator's start until the request had arrived, on a clock
            that never goes back.
    """

    workspace_id: str | None
    alias: str | None
    method: str
    raw_path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes
    fault: Fault | Reply | None
    status: int | None
    operation: Operation | None
    received_at: float
