"""The arguments of a bulk stop."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import msgspec

from bctrl_async import _config
from bctrl_async._calls.retry import RetryPolicy
from bctrl_async._http import transport
from bctrl_async.journal import Journal
from bctrl_async.outcomes import StopOutcome

OnOutcome = Callable[[StopOutcome], Awaitable[object] | object]
"""Takes an outcome; may return an awaitable, for which the worker waits."""
_VERIFY_FOR = 120.0
"""Seconds of polling by default; a stop without effect would be polled for ever."""


def verify_for(verify: bool | float) -> float:  # noqa: FBT001 - the value of `verify=`.
    """Return the seconds of polling for a value of `verify=`; 0 for no polling."""
    if verify is True:
        return _VERIFY_FOR
    if verify is False:
        return 0.0
    return _config.seconds(verify, "verify", "a positive number of seconds, or False")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of a bulk stop; raises BctrlConfigError if any is invalid."""

    concurrency: int | None
    deadline: float | None
    on_outcome: OnOutcome | None
    timeout: float | None
    retry: RetryPolicy | None
    journal: Journal | str | os.PathLike[str] | None
    verify: bool | float
    missing_ok: bool

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.concurrency is not None:
            _config.count(self.concurrency, "concurrency")
        if self.deadline is not None:
            _config.seconds(self.deadline, "deadline")
        if self.timeout is not None:
            transport.time_limit(self.timeout)
        verify_for(self.verify)
        _config.check_type(self.retry, RetryPolicy | None, "retry", "a RetryPolicy")
        _config.check_type(
            self.journal,
            Journal | str | os.PathLike | None,
            "journal",
            "the path of a file, or a Journal",
        )
        _config.check_type(self.missing_ok, bool, "missing_ok", "a bool")
        if self.on_outcome is not None and not callable(self.on_outcome):
            raise _config.invalid_type(
                "on_outcome", type(self.on_outcome), "a function"
            )
