"""Filters for the runtimes of a workspace."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Self

import msgspec

from bctrl_async import _config
from bctrl_async.errors import BctrlResponseError, quote
from bctrl_async.models import Runtime, RuntimeKind, RuntimeRef, RuntimeStatus

__all__ = ["RuntimeFilter"]

WHERE = "a RuntimeFilter or a plain function of a Runtime"
"""The type of a `where` argument, in the words of errors."""

_log = logging.getLogger("bctrl_async.filters")

_starts_with_date = re.compile(r"\d{4}-\d\d-\d\d").match


class RuntimeFilter(msgspec.Struct, frozen=True, kw_only=True):
    """A predicate for runtimes; any function of a `Runtime` can take its place.

    Args:
        status: The status to match; None, the default, matches each status but
            `stopped` and `failed`, including statuses unknown to this version. `any`
            matches all.
        kind: The kind to match; None matches any.
        older_than: The least age, above 0, in seconds or as a `timedelta`; None matches
            any age. The contract specifies no format for `created_at`: text that is not
            an ISO 8601 date and time with a UTC offset matches no age. If all but that
            age matches, `stop_workspace` rejects the runtime instead of stopping it.

    A status or kind unknown to this version is logged as a warning: it may be mistyped.

    Raises:
        BctrlConfigError: `older_than` is not above 0, or an argument has a wrong type.
    """

    status: str | None = None
    kind: str | None = None
    older_than: float | timedelta | None = None

    def __post_init__(self) -> None:
        # A value of another type would match no runtime, and leave all of them running.
        _config.check_type(self.status, str | None, "status", "a str or None")
        _config.check_type(self.kind, str | None, "kind", "a str or None")
        if self.older_than is not None:
            _config.seconds(_in_seconds(self.older_than), "older_than")
        _warn_if_unknown("status", self.status, (*RuntimeStatus, "any"))
        _warn_if_unknown("kind", self.kind, tuple(RuntimeKind))

    def __call__(self, runtime: Runtime) -> bool:
        """Return True if the runtime matches now, by the clock of this machine."""
        return self.decide(runtime, datetime.now(UTC)) is True

    def decide(self, runtime: Runtime, now: datetime) -> bool | None:
        """Return whether it matches at a time; None if an unreadable age decides."""
        if self.status is None:
            has_status = not runtime.status.is_final
        else:
            has_status = self.status in {"any", runtime.status}
        if not has_status or self.kind not in {None, runtime.kind}:
            return False
        if self.older_than is None:
            return True
        created = parse_time(runtime.created_at)
        if created is None:
            return None
        return (now - created).total_seconds() > _in_seconds(self.older_than)


def _warn_if_unknown(name: str, value: str | None, values: tuple[str, ...]) -> None:
    if value is not None and value not in values:
        _log.warning(
            "unknown %s %s in a filter: this version knows %s",
            name,
            quote(value),
            ", ".join(values),
            extra={"bctrl.event": "filter_unknown", "bctrl.filter": name},
        )


class Selection:
    """The listed runtimes that a condition selects, and errors of unreadable items."""

    def __init__(self, workspace_id: str, where: Callable[[Runtime], object]) -> None:
        self.workspace_id: str = workspace_id
        self._where = where
        self.at: datetime = datetime.now(UTC)
        """The time of the list."""
        self.seconds: float = 0.0
        """The seconds that the list took before the run; its deadline includes them."""
        self._ages_at: datetime = self.at
        """The time by which ages are judged."""
        self.running: dict[str, Runtime | None] = {}
        """The listed runtimes that may run, by alias; None if it cannot be parsed."""
        self.items: list[Runtime | BctrlResponseError] = []
        self._conditions: list[Callable[[RuntimeRef | BctrlResponseError], bool]] = []

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[RuntimeRef | BctrlResponseError]:
        for item in self.items:
            if isinstance(item, Runtime):
                yield RuntimeRef(self.workspace_id, item.alias)
            else:
                yield item

    def add(self, items: Iterable[Runtime | BctrlResponseError]) -> None:
        """Add the items that the condition selects, or whose age it cannot read."""
        for item in items:
            if isinstance(item, Runtime):
                self._add_runtime(item)
                continue
            # An error is kept whatever the condition is, because its runtime may run.
            self.items.append(item)
            if item.alias is not None:
                self.running[item.alias] = None

    def _add_runtime(self, runtime: Runtime) -> None:
        if not runtime.status.is_final:
            self.running[runtime.alias] = runtime
        if self._selects(runtime):
            self.items.append(runtime)
        elif self._may_be_old(runtime):
            # If the runtime was left out, it could run for ever.
            self.items.append(_unreadable_age(self.workspace_id, runtime))

    def _selects(self, runtime: Runtime) -> bool:
        if isinstance(self._where, RuntimeFilter):
            return self._where.decide(runtime, self._ages_at) is True
        return _is_selected(runtime, self._where)

    def _may_be_old(self, runtime: Runtime) -> bool:
        """Return True if its unreadable age alone leaves out a running runtime."""
        if runtime.status.is_final or not isinstance(self._where, RuntimeFilter):
            return False
        return self._where.decide(runtime, self._ages_at) is None

    def keep(
        self, condition: Callable[[RuntimeRef | BctrlResponseError], bool]
    ) -> None:
        """Keep the items for whose targets a condition holds."""
        self._conditions.append(condition)
        # A selection is iterated as the targets of its items.
        pairs = zip(self.items, self, strict=True)
        self.items = [item for item, target in pairs if condition(target)]

    @property
    def nameless(self) -> int:
        """The number of items whose alias cannot be read."""
        return sum(item.alias is None for item in self.items)

    def runtime_of(self, item: Runtime | BctrlResponseError) -> Runtime | None:
        """Return the runtime of an item; None if it cannot be parsed."""
        if isinstance(item, Runtime):
            return item
        if item.alias is None:
            return None
        # A runtime whose age alone cannot be read is an error among the items.
        return self.running.get(item.alias)

    def anew(self) -> Selection:
        """Return an empty selection of the same workspace, for a later list.

        It judges ages by the same time: a runtime has not started since because it has
        reached an age.
        """
        later = Selection(self.workspace_id, self._where)
        later._ages_at = self._ages_at
        return later

    def keep_as(self, earlier: Selection) -> None:
        """Keep what the conditions of an earlier selection would have kept."""
        self.drop_replaced()
        for condition in earlier._conditions:
            self.keep(condition)

    def drop_replaced(self) -> Self:
        """Drop ended runtimes under whose alias another runs: a stop would end it."""
        self.items = [item for item in self.items if not self._is_replaced(item)]
        return self

    def _is_replaced(self, item: Runtime | BctrlResponseError) -> bool:
        return (
            item.alias in self.running
            and isinstance(item, Runtime)
            and item.status.is_final
        )


def _is_selected(runtime: Runtime, where: Callable[[Runtime], object]) -> bool:
    answer = where(runtime)
    if inspect.isawaitable(answer) or callable(answer):
        # A coroutine or a function is truthy, so every runtime would be stopped.
        if inspect.iscoroutine(answer):
            answer.close()
        raise _config.invalid_type(
            "where", type(answer), f"{WHERE}, which returns a bool"
        )
    return bool(answer)


def _unreadable_age(workspace_id: str, runtime: Runtime) -> BctrlResponseError:
    return BctrlResponseError(
        f"its age cannot be read: {quote(runtime.created_at)} is not an ISO 8601 date "
        "and time with a UTC offset",
        advice="Stop it by its alias, or select it without its age",
        operation="list",
        workspace_id=workspace_id,
        alias=runtime.alias,
    )


def _in_seconds(age: float | timedelta) -> float:
    return age.total_seconds() if isinstance(age, timedelta) else age


def parse_time(text: str) -> datetime | None:
    """Return the time of an ISO 8601 text with a UTC offset, or None."""
    # `fromisoformat` would read a Unix time in milliseconds as a date.
    if not _starts_with_date(text):
        return None
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return None
    if date.tzinfo is None:
        return None
    return date
