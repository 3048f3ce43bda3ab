"""A runtime for tests without the emulator, and the body of a response about it."""

from __future__ import annotations

from uuid import UUID

from bctrl_async import Runtime, RuntimeKind, RuntimeStatus

RUNTIME = (
    b'{"alias":"crm","createdAt":"","driver":"","id":"7b1f6a54-9d2c-4a5e-8f10-3c2b1a0d9e8f",'
    b'"kind":"browser","status":"stopped","updatedAt":"",'
    b'"workspaceId":"7b1f6a54-9d2c-4a5e-8f10-3c2b1a0d9e8f"}'
)
"""The body of a response about a runtime that is stopped."""


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
