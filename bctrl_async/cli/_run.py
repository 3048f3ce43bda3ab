"""A bulk stop as the command runs it: with progress, and an end that the user may call for."""

import asyncio
import signal
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from bctrl_async import BctrlSession, RuntimeRef, StopBatch, StopOutcome, StopReport
from bctrl_async.cli import _output
from bctrl_async.cli._progress import Display

# The last one is a terminal that is gone; nohup has it ignored.
_SIGNALS = [
    number
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if (number := getattr(signal, name, None)) is not None
    and (name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN)
]
_INTERRUPT_NOTICE = "ending: Ctrl-C again cuts off what is under way"


class FinishedRun(NamedTuple):
    """How a bulk stop ended.

    Attributes:
        report: Its report.
        interrupted: Whether the user called for its end.
        input_left: Whether there may be targets that were not even read.
        read_error: Why the targets could not be read.
    """

    report: StopReport
    interrupted: bool
    input_left: bool
    read_error: OSError | None


async def run_stops(
    session: BctrlSession,
    source: Iterable[RuntimeRef] | AsyncIterable[RuntimeRef],
    show: Callable[[StopOutcome], object],
    output: _output.Output,
    *,
    deadline: float | None = None,
    journal: str | None = None,
    verify: bool = False,
) -> FinishedRun:
    """Run a bulk stop to its end, however that comes, and show every outcome.

    Args:
        session: What it goes through.
        source: The targets.
        show: Called with each outcome.
        output: Where the results go.
        deadline: Seconds until it is cut off.
        journal: Where the outcomes are noted.
        verify: Whether to look after what the server left open.

    Raises:
        BctrlError: It cannot be run.
    """
    interrupted, failure = False, None
    async with session:
        batch = session.stop_runtimes(
            source, on_outcome=show, deadline=deadline, journal=journal, verify=verify
        )
        try:
            interrupted = await run_with_progress(batch, output)
        except OSError as error:
            failure = error
    input_left = batch.total is None and batch.report.ended_early is not None
    return FinishedRun(batch.report, interrupted, input_left, failure)


async def dry_run(
    session: BctrlSession,
    source: Iterable[RuntimeRef] | AsyncIterable[RuntimeRef],
    show: Callable[[StopOutcome], object],
) -> None:
    """Give every target the outcome that it has if nothing is sent."""
    if isinstance(source, AsyncIterable):
        source = [target async for target in source]
    async with session:
        batch = session.stop_runtimes(source, on_outcome=show)
        batch.stop_reading()
        await batch


async def run_with_progress(batch: StopBatch, output: _output.Output) -> bool:
    """Run it, and show how far it is.

    The first Ctrl-C (or SIGTERM) begins nothing new, the second cuts off what is under way.

    Returns:
        Whether it was interrupted; the batch's report is true either way.

    Raises:
        Exception: What the batch raised.
    """
    console, live = output.progress_console()
    display = Display(batch, console)
    running = asyncio.ensure_future(batch)
    showing = asyncio.create_task(display.run(live=live))
    interrupts = 0

    def interrupt() -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            batch.abort()
            return
        batch.stop_reading()
        display.notice = _INTERRUPT_NOTICE
        if not live:
            _output.print_info(display.line())
        elif not display.is_drawn:
            output.end_line()

    try:
        with _signal_handlers(interrupt):
            await asyncio.wait([running])
    except asyncio.CancelledError:
        # Where there are no such handlers, as on Windows, this is what Ctrl-C does.
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
