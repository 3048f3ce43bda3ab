"""The contract restated: operations, the JSON of a runtime, checks of arguments."""

import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from types import NoneType
from typing import NamedTuple, TypedDict
from urllib.parse import unquote_to_bytes

_CHOICES = {
    "kind": ("browser", "desktop", "spreadsheet"),
    "status": ("active", "stopped", "failed"),
}
# Dot segments are not names (RFC 3986 5.2.4). Accepting them would hide a bug of the
# client that a real gateway turns into a 404.
_NAME = r"(?!\.\.?(?:/|$))((?:[!-$&-.0-~]|%[0-9A-Fa-f]{2})+)"
_RUNTIMES = f"/v1/workspaces/{_NAME}/runtimes"
_OPERATIONS = (
    ("stop", "POST", re.compile(f"{_RUNTIMES}/{_NAME}/stop")),
    ("get", "GET", re.compile(f"{_RUNTIMES}/{_NAME}")),
    ("list", "GET", re.compile(_RUNTIMES)),
)


class Route(NamedTuple):
    """The operation of a request, None if its path does not allow its method."""

    operation: str | None
    allowed_method: str
    workspace_id: str
    alias: str | None = None

    @property
    def target(self) -> tuple[str, str]:
        """The workspace and the alias, which is empty for a list."""
        return self.workspace_id, self.alias or ""


_UNKNOWN = Route(None, "", "")


def parse_route(method: str, raw_path: str, names: Mapping[str, str]) -> Route:
    """Return the route of a request; an unknown path allows no method.

    Args:
        method: The method of the request.
        raw_path: The path, with its query.
        names: The names of workspaces, by all that a path may have in their place.
    """
    path = raw_path.partition("?")[0]
    for operation, allowed_method, pattern in _OPERATIONS:
        match = pattern.fullmatch(path)
        if match is None:
            continue
        try:
            # The path of a list has no alias.
            name, *alias = [unquote_to_bytes(part).decode() for part in match.groups()]
        except UnicodeDecodeError:
            return _UNKNOWN
        is_allowed = method == allowed_method
        workspace_id = names.get(name, name)
        return Route(
            operation if is_allowed else None, allowed_method, workspace_id, *alias
        )
    return _UNKNOWN


class WireRuntime(TypedDict):
    """A Runtime on the wire (openapi.yaml, `components.schemas.Runtime`)."""

    alias: str
    createdAt: str
    driver: str
    id: str
    kind: str
    status: str
    summary: dict[str, bool | str | None]
    updatedAt: str
    workspaceId: str


def next_id(runtime_id: str) -> str:
    """Return the id of the runtime that replaces another."""
    return str(uuid.uuid5(uuid.UUID(runtime_id), "next"))


def make_runtime(
    workspace_id: str, alias: str, kind: str, status: str, created_at: str
) -> WireRuntime:
    """Make a runtime from the arguments of `Emulator.add_runtime`."""
    check(str, workspace_id=workspace_id, alias=alias, created_at=created_at)
    for name, value in {"workspace_id": workspace_id, "alias": alias}.items():
        if not value:
            raise ValueError(
                f"{name} is empty, which a path cannot express: give some text"
            )
    for name, value in {"kind": kind, "status": status}.items():
        if value not in _CHOICES[name]:
            raise ValueError(
                f"{name} is {value!r}: give one of {', '.join(_CHOICES[name])}"
            )
    try:
        workspace_uuid = uuid.UUID(workspace_id)
    except ValueError:
        workspace_uuid = uuid.uuid5(uuid.NAMESPACE_URL, workspace_id)
    return {
        "alias": alias,
        "createdAt": created_at,
        "driver": "playwright",
        "id": str(uuid.uuid5(workspace_uuid, alias)),
        "kind": kind,
        "status": status,
        "summary": {
            "browserRunning": status == "active",
            "currentDriver": None,
            "defaultContextId": None,
            "defaultPageId": None,
            "launchMode": "ephemeral",
            "profileId": None,
            "storageWorkspace": None,
        },
        "updatedAt": created_at,
        "workspaceId": str(workspace_uuid),
    }


def time_of_start(replaced: WireRuntime | None) -> str:
    """Return the `createdAt` of a runtime, later than the replaced runtime's."""
    if replaced is None:
        return "2026-01-01T00:00:00.000Z"
    return time_after(replaced["createdAt"])


def time_after(created_at: str) -> str:
    """Return the present time, or a time after a `createdAt` that is in the future."""
    time = datetime.now(UTC)
    # The contract specifies no format for a time, and a test may create a runtime in
    # the future.
    with suppress(ValueError, OverflowError):
        created = datetime.fromisoformat(created_at)
        if created.tzinfo is None:
            created = created.replace(tzinfo=UTC)
        time = max(time, created + timedelta(milliseconds=1))
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def check(*types: type, **values: object) -> None:
    """Raise a ValueError unless each value has one of these types; bool is not int."""
    for name, value in values.items():
        is_wrong_bool = isinstance(value, bool) and bool not in types
        if is_wrong_bool or not isinstance(value, types):
            names = " or ".join(cls.__name__ for cls in types if cls is not NoneType)
            actual = type(value).__name__
            raise ValueError(f"{name} is {value!r:.50}: give {names}, not {actual}")


def check_range(low: float, high: float, **values: float) -> None:
    """Raise a ValueError unless all values are numbers from `low` to `high`."""
    check(int, float, **values)
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}: give {low} to {high}")
