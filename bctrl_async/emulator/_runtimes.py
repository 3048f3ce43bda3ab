"""A Runtime on the wire, as openapi.yaml has it."""

import uuid
from typing import TypedDict

from bctrl_async.emulator._arguments import check_type

_KINDS = ("browser", "desktop", "spreadsheet")
_STATUSES = ("active", "stopped", "failed")


class _WireSummary(TypedDict):
    browserRunning: bool
    currentDriver: str | None
    defaultContextId: str | None
    defaultPageId: str | None
    launchMode: str
    profileId: str | None
    storageWorkspace: str | None


class WireRuntime(TypedDict):
    """A Runtime on the wire (openapi.yaml, `components.schemas.Runtime`)."""

    alias: str
    createdAt: str
    driver: str
    id: str
    kind: str
    status: str
    summary: _WireSummary
    updatedAt: str
    workspaceId: str


def make_runtime(
    workspace_id: str, alias: str, *, kind: str, status: str, created_at: str
) -> WireRuntime:
    """Make a runtime; the arguments are those of `Emulator.add_runtime`."""
    texts = {"workspace_id": workspace_id, "alias": alias, "created_at": created_at}
    for name, value in texts.items():
        check_type(name, value, str)
        if not value and name != "created_at":
            raise ValueError(f"{name} is empty, which a path cannot express: give some text")
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}: give one of {', '.join(_KINDS)}")
    if status not in _STATUSES:
        raise ValueError(f"status is {status!r}: give one of {', '.join(_STATUSES)}")
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


def end_runtime(runtime: WireRuntime, status: str) -> None:
    """Give a runtime its final status."""
    runtime["status"] = status
    runtime["summary"]["browserRunning"] = False
    runtime["updatedAt"] = "2026-01-01T00:00:01.000Z"
