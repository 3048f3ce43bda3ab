"""The operations that the emulator serves, and the names in their paths."""

import re
from typing import Literal, NamedTuple
from urllib.parse import unquote_to_bytes

Operation = Literal["stop", "get", "list"]


def _decode(segment: str) -> str:
    if not segment.isascii() or re.search("%(?![0-9A-Fa-f]{2})", segment):
        raise ValueError(segment)
    return unquote_to_bytes(segment).decode()


class Route(NamedTuple):
    operation: Operation
    workspace_id: str
    alias: str | None = None

    @property
    def method(self) -> str:
        """The HTTP method of the operation."""
        return "POST" if self.operation == "stop" else "GET"


def parse_route(raw_path: str) -> Route | None:
    """Return the operation of a path, None for an unknown path.

    The paths are those of openapi.yaml (`runtimes-stop`) and of contract errors.md (`runtimes-get`
    and `runtimes-list`).

    Raises:
        ValueError: A segment is not percent-encoded UTF-8.
    """
    operation: Operation
    match raw_path.partition("?")[0].split("/"):
        case ["", "v1", "workspaces", workspace_id, "runtimes", alias, "stop"]:
            operation, names = "stop", [workspace_id, alias]
        case ["", "v1", "workspaces", workspace_id, "runtimes", alias]:
            operation, names = "get", [workspace_id, alias]
        case ["", "v1", "workspaces", workspace_id, "runtimes"]:
            operation, names = "list", [workspace_id]
        case _:
            return None
    # Dot segments are not names (RFC 3986 5.2.4). Accepting them would hide a bug of the client
    # that a real gateway turns into a 404.
    if {*names} & {"", ".", ".."}:
        return None
    return Route(operation, *map(_decode, names))
