"""The ends of tasks and of event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress


def close_with_loop(close: Callable[[], Awaitable[object]]) -> AsyncGenerator[None]:
    """Return a generator that calls an async function when it is advanced or closed.

    `asyncio.run` closes all async generators before it closes the loop, and a loop
    closes a generator that is garbage-collected. So the function is called in time in
    any case.
    """
    lifetime = _lifetime(close)
    # The first step, up to the `yield`, registers the generator with the loop. It does
    # not wait, so it needs no `await`.
    with suppress(StopIteration):
        lifetime.asend(None).send(None)
    return lifetime


async def _lifetime(close: Callable[[], Awaitable[object]]) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await close()


def is_cancelled() -> bool:
    """Return True if the current task was asked to cancel."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
