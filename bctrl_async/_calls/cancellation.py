"""Tell the cancellation of a task from a CancelledError that code in it raised by itself."""

from __future__ import annotations

import asyncio

from bctrl_async.errors import BctrlError


def is_cancelled() -> bool:
    """Return True if the current task was asked to cancel."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def as_failure(raised: asyncio.CancelledError, source: str) -> BctrlError:
    """Return the error of code that awaited something that was cancelled.

    Args:
        raised: The exception that left the code.
        source: The name of the code, for the error's text.
    """
    error = BctrlError(f"{source} raised CancelledError")
    error.__cause__ = raised
    return error
