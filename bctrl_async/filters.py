"""Which runtimes of a workspace are meant."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import msgspec

from bctrl_async import _config
from bctrl_async.models import Runtime, RuntimeStatus

_begins_with_date = re.compile(r"\d{4}-\d\d-\d\d").match


class RuntimeFilter(msgspec.Struct, frozen=True, kw_only=True):
    """A condition on runtimes; it is called with one, as any function in its place.

    Args:
        status: Its status, None for any. It is `active` unless given: to stop another one is
            answered with a conflict that says that nothing runs.
        kind: Its kind, None for any.
        older_than: Seconds or a `timedelta`, above 0, since it was created; None for any age. The
            contract gives `created_at` no format: what is no ISO 8601 date and time with an offset
            from UTC is not known to be old, and matches no age.

    Raises:
        BctrlConfigError: `older_than` is not above 0.
    """

    status: str | None = RuntimeStatus.ACTIVE
    kind: str | None = None
    older_than: float | timedelta | None = None

    def __post_init__(self) -> None:
        if self.older_than is not None:
            _config.seconds(self._age, "older_than")

    def __call__(self, runtime: Runtime) -> bool:
        """Whether this runtime is meant, by the clock of this machine."""
        return self.matches(runtime, datetime.now(UTC))

    def matches(self, runtime: Runtime, now: datetime) -> bool:
        """Whether this runtime is meant at this time, which has a time zone."""
        if self.status is not None and runtime.status != self.status:
            return False
        if self.kind is not None and runtime.kind != self.kind:
            return False
        if self.older_than is None:
            return True
        created = _point_in_time(runtime.created_at)
        return created is not None and (now - created).total_seconds() > self._age

    @property
    def _age(self) -> float:
        age = self.older_than
        return age.total_seconds() if isinstance(age, timedelta) else age or 0.0


def _point_in_time(text: str) -> datetime | None:
    # Python reads much as a date, digits of a time in milliseconds among it.
    if not _begins_with_date(text):
        return None
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return None
    return date if date.tzinfo else None
