"""A line on the terminal while the command waits for the server."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rich.live import Live
from rich.text import Text

from bctrl_async import BctrlSession
from bctrl_async.cli._output import Output

_SHOW_AFTER, _REFRESH_EVERY = 2.0, 0.2
"""Seconds until the line appears, and between its updates."""


@asynccontextmanager
async def show_waiting(output: Output, describe: Callable[[], str]) -> AsyncIterator[None]:
    """Show within the block, on a terminal, what it waits for and since when.

    Args:
        output: The command's stdout.
        describe: Returns what it waits for.
    """
    console, live = output.progress_console()
    if not live:
        yield
        return
    began = time.monotonic()

    def line() -> Text:
        return Text(f"{describe()}, {time.monotonic() - began:.0f} s", no_wrap=True)

    async def show() -> None:
        await asyncio.sleep(_SHOW_AFTER)
        with Live(
            get_renderable=line, console=console, auto_refresh=False, transient=True
        ) as shown:
            while True:
                shown.refresh()
                await asyncio.sleep(_REFRESH_EVERY)

    showing = asyncio.create_task(show())
    try:
        yield
    finally:
        showing.cancel()
        await asyncio.wait([showing])


def describe_read(session: BctrlSession) -> str:
    """Describe what the only call of a session waits for."""
    stats = session.stats
    reason = next(reversed(stats.failed), "")
    after = f" after {reason if reason.isdecimal() else 'no answer'}" if reason else ""
    if not stats.in_flight and reason:
        return f"Waiting to retry{after}"
    return f"Waiting for an answer{after and f', attempt {stats.attempts}{after}'}"
