"""Find the tasks that a bulk stop leaked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import CoroutineType

import bctrl_async.bulk

_BULK = Path(bctrl_async.bulk.__file__).parent


def bulk_tasks() -> set[asyncio.Task[object]]:
    """Return the tasks that run code of the bulk stop."""
    return {
        task for task in asyncio.all_tasks() if _file_of(task).is_relative_to(_BULK)
    }


def _file_of(task: asyncio.Task[object]) -> Path:
    coroutine = task.get_coro()
    assert isinstance(coroutine, CoroutineType)
    return Path(coroutine.cr_code.co_filename)
