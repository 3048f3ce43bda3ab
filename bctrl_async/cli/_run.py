"""A bulk stop with progress, which Ctrl-C ends early."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from bctrl_async import StopBatch
from bctrl_async.cli._output import Output, print_info
from bctrl_async.cli._progress import Display

# SIGHUP comes from a terminal that is closed; under nohup it is ignored.
_SIGNALS = [
    number
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if (number := getattr(signal, name, None)) is not None
    and (name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN)
]


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

    def interrupt() -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            batch.abort()
            return
        batch.stop_reading()
        display.interrupt()
        if not display.is_drawn:
            print_info(display.line())

    try:
        with _signal_handlers(interrupt):
            await asyncio.wait([running])
    except asyncio.CancelledError:
        # Without signal handlers, as on Windows, Ctrl-C cancels this task.
        interrupts += 1
        batch.abort()
        await asyncio.wait([running])
    finally:
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
