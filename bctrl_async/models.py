"""What the API speaks of: runtimes, and the names by which a stop finds them.

The wire format is the schema of `docs/contract/openapi.yaml`. It is read leniently: a field or an
enum value that a later server adds must never turn a stop that worked into an error.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, Self
from uuid import UUID

import msgspec

__all__ = ["LaunchMode", "Runtime", "RuntimeKind", "RuntimeRef", "RuntimeStatus", "RuntimeSummary"]


class _OpenEnum(StrEnum):
    """A `StrEnum` that keeps a value it does not know, as an equal and picklable member."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        # Not remembered: the values are the server's, so a table of them could grow for ever.
        member = str.__new__(cls, value)
        member._name_ = value
        member._value_ = value
        return member

    def __reduce_ex__(self, _protocol: object) -> tuple[type[Self], tuple[str]]:
        # Python 3.11.2 pickles a member by its name, under which an unknown value is not found.
        return type(self), (self.value,)


class RuntimeKind(_OpenEnum):
    """What runs; a value that is not listed is kept as it came."""

    BROWSER = "browser"
    DESKTOP = "desktop"
    SPREADSHEET = "spreadsheet"


class RuntimeStatus(_OpenEnum):
    """The state of a runtime; a value that is not listed is kept as it came."""

    ACTIVE = "active"
    STOPPED = "stopped"
    FAILED = "failed"


class LaunchMode(_OpenEnum):
    """How a runtime was launched; a value that is not listed is kept as it came."""

    PROFILE = "profile"
    EPHEMERAL = "ephemeral"


class RuntimeSummary(msgspec.Struct, frozen=True, rename="camel"):
    """Details of a runtime; each is None where the server left it out."""

    browser_running: bool | None = None
    current_driver: str | None = None
    default_context_id: str | None = None
    default_page_id: str | None = None
    launch_mode: LaunchMode | None = None
    profile_id: UUID | None = None
    storage_workspace: str | None = None


class Runtime(msgspec.Struct, frozen=True, rename="camel"):
    """A runtime as the server described it in its answer.

    `created_at` and `updated_at` are the server's own text: the contract gives them no format.
    """

    id: UUID
    alias: str
    workspace_id: UUID
    kind: RuntimeKind
    status: RuntimeStatus
    driver: str
    created_at: str
    updated_at: str
    summary: RuntimeSummary | None = None


class RuntimeRef(NamedTuple):
    """The address of one runtime; a plain `(workspace_id, alias)` tuple serves as well."""

    workspace_id: str
    alias: str
