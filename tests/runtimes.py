"""A runtime for tests without a server."""

from __future__ import annotations

from uuid import UUID

from bctrl_async import Runtime, RuntimeKind, RuntimeStatus


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
