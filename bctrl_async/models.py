"""The models of the API: runtimes, and references to them.

The wire format is specified in `docs/contract/openapi.yaml`. Unknown fields and enum
values are accepted, so that a newer server cannot turn a successful stop into an error.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, Self
from uuid import UUID

import msgspec

__all__ = [
    "LaunchMode",
    "Runtime",
    "RuntimeKind",
    "RuntimeRef",
    "RuntimeStatus",
    "RuntimeSummary",
]


class _OpenEnum(StrEnum):
    """A `StrEnum` that accepts unknown values as comparable and picklable members."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        # The server chooses values, so a cache of members could grow without bound.
        member = str.__new__(cls, value)
        # The name is escaped, because a member's repr prints it as it is.
        member._name_ = repr(value)[1:-1]
        member._value_ = value
        return member

    def __reduce_ex__(self, _protocol: object) -> tuple[type[Self], tuple[str]]:
        # Python 3.11.2 pickles members by name, which an unknown value does not have.
        return type(self), (self.value,)


class RuntimeKind(_OpenEnum):
    """The kind of a runtime. Unknown values are kept."""

    BROWSER = "browser"
    DESKTOP = "desktop"
    SPREADSHEET = "spreadsheet"


class RuntimeStatus(_OpenEnum):
    """The status of a runtime. Unknown values are kept."""

    ACTIVE = "active"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """True if a runtime with this status no longer runs: `stopped` or `failed`."""
        return self in {RuntimeStatus.STOPPED, RuntimeStatus.FAILED}


class LaunchMode(_OpenEnum):
    """The launch mode of a runtime. Unknown values are kept."""

    PROFILE = "profile"
    EPHEMERAL = "ephemeral"


class RuntimeSummary(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """Details of a runtime. A field that the server omitted is None."""

    browser_running: bool | None = None
    current_driver: str | None = None
    default_context_id: str | None = None
    default_page_id: str | None = None
    launch_mode: LaunchMode | None = None
    profile_id: UUID | None = None
    storage_workspace: str | None = None


class Runtime(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """A runtime as described by the server; texts are cut at 4,096 characters.

    `created_at` and `updated_at` are text: the contract specifies no format for them.
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
    """A reference to a runtime; a plain `(workspace_id, alias)` tuple works as well."""

    workspace_id: str
    alias: str
