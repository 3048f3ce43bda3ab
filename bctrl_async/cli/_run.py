"""A bulk stop with progress, which Ctrl-C ends early."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from bctrl_async import BctrlSession, StopBatch, StopReport
from bctrl_async.cli._output import Output, print_info
from bctrl_async.cli._progress import Display

# SIGHUP comes from a terminal that is closed; under nohup it is ignored.
_SIGNALS = [
    number
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if (number := getattr(signal, name, None)) is not None
    and (name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN)
]
_NOTICE_AFTER = 0.1
"""Seconds from a Ctrl-C to the line that follows: meanwhile targets become `not_sent`."""


class FinishedRun(NamedTuple):
    """A bulk stop that has ended."""

    report: StopReport
    interrupted: bool
    input_left: bool
    """True if there may be targets that were not read."""
    read_error: OSError | None


async def run_stops(
    session: BctrlSession, make_batch: Callable[[], StopBatch], output: Output
) -> FinishedRun:
    """Run a bulk stop with progress, and close its session."""
    interrupted, read_error = False, None
    async with session:
        batch = make_batch()
        try:
            interrupted = await run_with_progress(batch, output)
        except OSError as error:
            read_error = error
    report = batch.report
    ended_early = batch.total is None and report.ended_early is not None
    input_left = ended_early or read_error is not None
    return FinishedRun(report, interrupted, input_left, read_error)


async def run_with_progress(batch: StopBatch, output: Output) -> bool:
    """Run a bulk stop and show its progress; return True if it was interrupted.

    After the first Ctrl-C (or SIGTERM) nothing more is sent, the second one aborts the run.
    """
    console, live = output.progress_console()
    display = Display(batch, console)
    running = asyncio.ensure_future(batch)
    shows = display.run(live=live) if output.shows_progress else asyncio.sleep(0)
    showing = asyncio.create_task(shows)
    interrupts = 0
    notices: list[asyncio.TimerHandle] = []

    def show_line() -> None:
        print_info(display.line())

    def interrupt() -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            batch.abort()
            return
        batch.stop_reading()
        display.interrupt()
        if not live:
            notices.append(running.get_loop().call_later(_NOTICE_AFTER, show_line))
        elif not display.is_drawn:
            output.end_line()

    try:
        with _signal_handlers(interrupt):
            await asyncio.wait([running])
    except asyncio.CancelledError:
        # Without signal handlers, as on Windows, Ctrl-C cancels this task.
        interrupts += 1
        batch.abort()
        await asyncio.wait([running])
    finally:
        for notice in notices:
            notice.cancel()
        showing.cancel()
        await asyncio.wait([showing])
    running.result()
    return interrupts > 0


@contextmanager
def _signal_handlers(interrupt: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    handled = []
    with suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, or another thread.
        for number in _SIGNALS:
            loop.add_signal_handler(number, interrupt)
            handled.append(number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
