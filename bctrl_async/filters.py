"""Filters for the runtimes of a workspace."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import msgspec

from bctrl_async import _config
from bctrl_async.errors import MAY_MATCH, BctrlResponseError, quote
from bctrl_async.models import Runtime, RuntimeKind, RuntimeRef, RuntimeStatus

__all__ = ["RuntimeFilter"]

_KNOWN = frozenset(RuntimeStatus)
_begins_with_date = re.compile(r"\d{4}-\d\d-\d\d").match


class RuntimeFilter(msgspec.Struct, frozen=True, kw_only=True):
    """A predicate for runtimes; any function of a `Runtime` can take its place.

    Args:
        status: The status to match; None matches any. It is `active` by default: stopping another
            runtime is answered with a conflict.
        kind: The kind to match; None matches any.
        older_than: Seconds or a `timedelta`, above 0, since the runtime was created; None matches
            any age. The contract gives `created_at` no format: a text that is not an ISO 8601 date
            and time with a UTC offset matches no age. `stop_workspace` rejects such a runtime.

    Raises:
        BctrlConfigError: `older_than` is not above 0, or an argument is of another type.
    """

    status: str | None = RuntimeStatus.ACTIVE
    kind: str | None = None
    older_than: float | timedelta | None = None

    def __post_init__(self) -> None:
        # Anything else would match nothing, and leave every runtime running.
        _config.check_type(self.status, str | None, "status", "a str or None")
        _config.check_type(self.kind, str | None, "kind", "a str or None")
        if self.older_than is not None:
            _config.seconds(self._age, "older_than")

    def __call__(self, runtime: Runtime) -> bool:
        """Return True if the runtime matches now, by the clock of this machine."""
        return self.matches(runtime, datetime.now(UTC))

    def matches(self, runtime: Runtime, now: datetime) -> bool:
        """Return True if the runtime matches at a time, which must be timezone-aware."""
        if self.status is not None and runtime.status != self.status:
            return False
        if self.kind is not None and runtime.kind != self.kind:
            return False
        if self.older_than is None:
            return True
        created = parse_time(runtime.created_at)
        return created is not None and (now - created).total_seconds() > self._age

    @property
    def _age(self) -> float:
        age = self.older_than
        return age.total_seconds() if isinstance(age, timedelta) else age or 0.0


class ListedRuntimes:
    """The runtimes in a list of a workspace that may run.

    Args:
        workspace_id: The workspace's id.
    """

    def __init__(self, workspace_id: str) -> None:
        self.workspace_id: str = workspace_id
        self._running: set[str] = set()
        self._has_unnamed = False

    def add(self, item: Runtime | BctrlResponseError) -> None:
        """Add an item of the list: a runtime, or the error of one that cannot be parsed."""
        if isinstance(item, Runtime) and item.status.is_final:
            return
        if item.alias is None:
            self._has_unnamed = True
        else:
            self._running.add(item.alias)

    def may_run(self, target: RuntimeRef) -> bool:
        """Return True unless the list says that a target does not run."""
        is_listed = target.workspace_id == self.workspace_id
        return not is_listed or self._has_unnamed or target.alias in self._running


class Listed:
    """Targets that a list of a workspace has: they run, whatever a journal has of them.

    Attributes:
        listed: The list.
    """

    listed: ListedRuntimes


class FoundTargets(list[RuntimeRef | BctrlResponseError], Listed):
    """Targets found in a list, and the errors of runtimes that may be targets."""

    def __init__(self, listed: ListedRuntimes) -> None:
        super().__init__()
        self.listed = listed


def why_it_may_match(
    where: object, workspace_id: str, runtime: Runtime
) -> BctrlResponseError | None:
    """Return an error for a runtime that may match a filter, and may run.

    Its status is unknown to this version, and may mean active; or its age cannot be read. Without
    the error, a report would say that all have stopped. Such a runtime is not stopped either: it
    may as well be one to keep.

    Args:
        where: The condition that the runtime does not match.
        workspace_id: The workspace's id.
        runtime: The runtime.

    Returns:
        The error, whose `argument` is `status` or `older_than`; None if `where` is not a filter or
        excludes the runtime by another condition, or if the runtime no longer runs.
    """
    if not isinstance(where, RuntimeFilter) or runtime.status.is_final:
        return None
    known = where
    argument = summary = advice = ""
    if where.older_than is not None and parse_time(runtime.created_at) is None:
        known = msgspec.structs.replace(known, older_than=None)
        argument = "older_than"
        summary = (
            f"its age cannot be read: {quote(runtime.created_at)} is not an ISO 8601 date and time "
            "with a UTC offset"
        )
        advice = "Stop it by its alias, or select it without older_than"
    if where.status == RuntimeStatus.ACTIVE and runtime.status not in _KNOWN:
        known = msgspec.structs.replace(known, status=None)
        argument = "status"
        summary = f"the status {quote(str(runtime.status))} is unknown to this version"
        advice = "Select it by this status, or by any, to stop it"
    if known is where or not known(runtime):
        return None
    return BctrlResponseError(
        summary,
        advice=advice,
        operation="list",
        workspace_id=workspace_id,
        alias=runtime.alias,
        reason_class=MAY_MATCH,
        argument=argument,
    )


def unknown_values(
    where: object, runtimes: Iterable[Runtime]
) -> Iterator[tuple[str, str, type[StrEnum]]]:
    """Yield the values of a filter that may be mistyped: those that are unknown and no runtime has.

    Args:
        where: The condition; there is nothing to yield if it is not a filter.
        runtimes: All runtimes of the workspace.

    Yields:
        The name of the condition, its value, and the known values.
    """
    for name, known in (("status", RuntimeStatus), ("kind", RuntimeKind)):
        value = getattr(where, name) if isinstance(where, RuntimeFilter) else None
        if value is None or value in frozenset(known):
            continue
        if all(getattr(runtime, name) != value for runtime in runtimes):
            yield name, value, known


def parse_time(text: str) -> datetime | None:
    """Return the time of an ISO 8601 text with a UTC offset, None for any other text."""
    # `fromisoformat` would read a Unix time in milliseconds as a date.
    if not _begins_with_date(text):
        return None
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return None
    return date if date.tzinfo else None
