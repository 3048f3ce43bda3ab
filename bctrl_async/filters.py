"""Filters for the runtimes of a workspace."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import msgspec

from bctrl_async import _config
from bctrl_async.errors import MAY_MATCH, BctrlResponseError, quote
from bctrl_async.models import Runtime, RuntimeKind, RuntimeRef, RuntimeStatus

__all__ = ["RuntimeFilter"]

WHERE = "a RuntimeFilter or a plain function of a Runtime"
"""The type of a condition, in words."""

_KNOWN = frozenset(RuntimeStatus)
_ADVICE = {
    "status": "Select it by this status, or by any, to stop it",
    "older_than": "Stop it by its alias, or select it without older_than",
}
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
            _config.seconds(_in_seconds(self.older_than), "older_than")

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
        age = _in_seconds(self.older_than)
        return created is not None and (now - created).total_seconds() > age


class ListedRuntimes:
    """The runtimes in a list of a workspace that may run.

    Args:
        workspace_id: The workspace's id.

    Attributes:
        at: The time at which the list was there.
    """

    def __init__(self, workspace_id: str) -> None:
        self.workspace_id: str = workspace_id
        self.at: datetime = datetime.now(UTC)
        # None for one that cannot be parsed.
        self._running: dict[str, Runtime | None] = {}
        self._ended: set[str] = set()
        self._has_unnamed = False

    def add(self, item: Runtime | BctrlResponseError) -> None:
        """Add an item of the list: a runtime, or the error of one that cannot be parsed."""
        runtime = item if isinstance(item, Runtime) else None
        if runtime is not None and runtime.status.is_final:
            self._ended.add(runtime.alias)
            return
        if item.alias is None:
            self._has_unnamed = True
        else:
            self._running[item.alias] = runtime

    def may_run(self, target: RuntimeRef) -> bool:
        """Return True unless the list says that a target does not run."""
        is_listed = target.workspace_id == self.workspace_id
        return not is_listed or self._has_unnamed or target.alias in self._running

    def has_ended(self, target: RuntimeRef) -> bool:
        """Return True if the list says that a target no longer runs."""
        return target.workspace_id == self.workspace_id and target.alias in self._ended

    def running(self, target: RuntimeRef) -> Runtime | None:
        """Return the runtime of a target as listed; None unless the list says that it may run."""
        is_listed = target.workspace_id == self.workspace_id
        return self._running.get(target.alias) if is_listed else None


class FoundTargets:
    """Targets that were found in a list of a workspace, and the errors of those that may be.

    The targets may run, whatever a journal has of them.

    Args:
        workspace_id: The workspace's id.
        where: The condition that selects them.

    Attributes:
        origin: What is listed, the same in each run.
        listed: The list.
        items: The runtimes that were selected, and the errors of those that cannot be parsed or may
            match.
    """

    def __init__(self, workspace_id: str, where: Callable[[Runtime], object]) -> None:
        self._where = where
        self.origin: str = list_origin(workspace_id, where)
        self.listed: ListedRuntimes = ListedRuntimes(workspace_id)
        self.items: list[Runtime | BctrlResponseError] = []

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[RuntimeRef | BctrlResponseError]:
        for item in self.items:
            if isinstance(item, Runtime):
                yield RuntimeRef(self.listed.workspace_id, item.alias)
            else:
                yield item

    def add(self, listed: Iterable[Runtime | BctrlResponseError]) -> None:
        """Add the items of a list that the condition selects, or may select.

        Args:
            listed: The runtimes, and the errors of those that cannot be parsed.

        Raises:
            BctrlConfigError: `where` returns an awaitable.
        """
        where = self._where
        for item in listed:
            self.listed.add(item)
            if not isinstance(item, Runtime) or _is_selected(item, where):
                self.items.append(item)
            elif (doubt := _why_it_may_match(where, self.listed.workspace_id, item)) is not None:
                self.items.append(doubt)


def list_origin(workspace_id: str, where: object) -> str:
    """Return what is listed, in words that are the same in each run of the same call."""
    if isinstance(where, RuntimeFilter):
        values = {"status": where.status, "kind": where.kind}
        if where.older_than is not None:
            values["older_than"] = f"{_in_seconds(where.older_than)!r}"
        wanted = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    else:
        wanted = _describe(where)
    return f"list of {workspace_id}: {wanted or 'all'}"


def _describe(where: object) -> str:
    """Return a text that tells a condition from any other; in each run if its values have one."""
    if not inspect.isfunction(where):
        return repr(where)
    values = inspect.getclosurevars(where).nonlocals, where.__defaults__, where.__kwdefaults__
    line = where.__code__.co_firstlineno
    return f"{where.__module__}.{where.__qualname__}, line {line}, {values!r}"


def _is_selected(runtime: Runtime, where: Callable[[Runtime], object]) -> bool:
    answer = where(runtime)
    if inspect.isawaitable(answer):
        # A coroutine is truthy, so every runtime would be stopped.
        if inspect.iscoroutine(answer):
            answer.close()
        raise _config.invalid_type("where", answer, f"{WHERE}, which returns a bool")
    return bool(answer)


def _why_it_may_match(
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
        The error, whose `argument` is `status` or `older_than`, and None if it is about both. None
        if `where` is not a filter or excludes the runtime by another condition, or if the runtime
        no longer runs.
    """
    if not isinstance(where, RuntimeFilter) or runtime.status.is_final:
        return None
    doubts: dict[str, str] = {}
    if where.status == RuntimeStatus.ACTIVE and runtime.status not in _KNOWN:
        doubts["status"] = f"the status {quote(str(runtime.status))} is unknown to this version"
    if where.older_than is not None and parse_time(runtime.created_at) is None:
        doubts["older_than"] = (
            f"its age cannot be read: {quote(runtime.created_at)} is not an ISO 8601 date and time "
            "with a UTC offset"
        )
    known = msgspec.structs.replace(where, **dict.fromkeys(doubts))
    if not doubts or not known(runtime):
        return None
    # Without one of two conditions, the other would still be in doubt.
    argument = next(iter(doubts)) if len(doubts) == 1 else None
    return BctrlResponseError(
        ", and ".join(doubts.values()),
        advice=advise(argument),
        operation="list",
        workspace_id=workspace_id,
        alias=runtime.alias,
        reason_class=MAY_MATCH,
        argument=argument,
    )


def advise(argument: str | None) -> str:
    """Return the advice for a runtime that may match.

    Args:
        argument: The condition that is in doubt; None if there are two, or it is not known.
    """
    return _ADVICE.get(argument or "", "Stop it by its alias")


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


def _in_seconds(age: float | timedelta) -> float:
    return age.total_seconds() if isinstance(age, timedelta) else age


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
