"""A line on the terminal while the command waits for the server."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rich.live import Live
from rich.text import Text

from bctrl_async import BctrlSession
from bctrl_async.cli._format import pluralize
from bctrl_async.cli._output import Output

_SHOW_AFTER, _REFRESH_EVERY = 2.0, 0.2
"""Seconds until the line appears, and between its updates."""


@asynccontextmanager
async def show_waiting(output: Output, describe: Callable[[], str]) -> AsyncIterator[None]:
    """Show within the block, on a terminal, what it waits for and since when."""
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
    """Describe what the call of a session waits for; a listing makes one for each page."""
    stats = session.stats
    if not stats.failed:
        return "Waiting for an answer"
    doing = "Waiting for an answer" if stats.in_flight else "Waiting to retry"
    if stats.succeeded or len(stats.failed) > 1:
        # Neither the attempts of this page nor the last failure is known.
        return f"{doing}, {pluralize(sum(stats.failed.values()), 'failed attempt')} so far"
    [reason] = stats.failed
    attempt = f", attempt {stats.attempts}" if stats.in_flight else ""
    return f"{doing}{attempt} after {reason if reason.isdecimal() else 'no answer'}"
