"""A runtime for tests: as an object, and as an answer of a server."""

from __future__ import annotations

import json
from enum import Enum
from uuid import UUID

from bctrl_async import Runtime, RuntimeKind, RuntimeStatus

WIRE: dict[str, object] = {
    "id": "7b1f6a54-9d2c-4a5e-8f10-3c2b1a0d9e8f",
    "alias": "crm",
    "workspaceId": "0b2f6a54-9d2c-4a5e-8f10-3c2b1a0d9e8f",
    "kind": "browser",
    "status": "stopped",
    "driver": "playwright",
    "createdAt": "2026-11-25T08:00:00Z",
    "updatedAt": "whenever",
}
"""The required fields of a runtime."""


class Name(str, Enum):  # noqa: UP042 - unlike a StrEnum, str() gives the name of the member.
    """Names of a runtime, as an app may have them."""

    WORKSPACE = "ws-1"
    ALIAS = "crm"


def wire(**fields: object) -> bytes:
    """Return the body of an answer about a runtime with these wire fields."""
    return json.dumps(WIRE | fields).encode()


RUNTIME = wire()
"""The body of an answer about a runtime that is stopped."""


def runtime(status: str = "stopped", alias: str = "crm") -> Runtime:
    return Runtime(
        id=UUID(int=1),
        alias=alias,
        workspace_id=UUID(int=2),
        kind=RuntimeKind.BROWSER,
        status=RuntimeStatus(status),
        driver="playwright",
        created_at="",
        updated_at="",
    )
