"""The progress of a bulk stop, its early end by Ctrl-C, and the notice of a read that waits."""

import asyncio
import math
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from bctrl_async import BctrlSession, StopBatch, StopResult
from bctrl_async.cli._output import Output, format_counts, print_info
from bctrl_async.errors import format_duration

_SHOW_AFTER, _SHOW_WAITING_AFTER, _REFRESH_EVERY = 0.4, 2.0, 0.2
"""Seconds until the live display, until its first notice of waiting, and between its updates."""
_LINE_EVERY = 5.0
"""Seconds between lines where there is no terminal."""
_SILENT_AFTER = 6.0
"""Seconds without an answer that are shown: more than between two lines, where a pause may end."""
_RATE_PERIOD = 10.0
"""Seconds over which the rate is measured; it is hidden if they bring no outcome."""
_DECIMALS_BELOW = 10
"""The rate, in stops per second, from which a decimal would be noise."""

# A terminal that is closed sends SIGHUP.
_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


class Display:
    """The progress display of a bulk stop."""

    def __init__(self, batch: StopBatch, session: BctrlSession, console: Console) -> None:
        self._batch = batch
        self._session = session
        self._console = console
        self.is_interrupted = False
        """True after the first interrupt: show what was sent, and that Ctrl-C aborts the run."""
        has_total = batch.total is not None
        self._progress = Progress(
            TextColumn("{task.description}"),
            *[BarColumn(bar_width=None)] * has_total,
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            expand=has_total,
            speed_estimate_period=_RATE_PERIOD,
        )
        self._task = self._progress.add_task("", total=batch.total, rate="")
        self.is_drawn = False
        self._answers = 0
        self._answered_at = console.get_time()

    async def run(self, *, live: bool) -> None:
        """Show progress until cancelled, redrawn in place if live, else in lines."""
        if not live:
            while True:
                await asyncio.sleep(_LINE_EVERY)
                print_info(self.line())
        await asyncio.sleep(_SHOW_AFTER)
        self.is_drawn = True
        with Live(
            get_renderable=self.view, console=self._console, auto_refresh=False, transient=True
        ) as drawn:
            while True:
                drawn.refresh()
                await asyncio.sleep(_REFRESH_EVERY)

    def view(self) -> Group:
        """Return the live display: a bar, the state and the results so far."""
        self._update()
        lines = [self._state_text(), format_counts(self._batch.counts)]
        return Group(self._progress, *(Text(line) for line in lines if line))

    def line(self) -> str:
        """Return the progress as one line."""
        task = self._update()
        done = f"{task.description}{'' if self.is_interrupted else ' done'}"
        counts = format_counts(self._batch.counts)
        parts = [done, task.fields["rate"], self._state_text(), counts]
        return ", ".join(part for part in parts if part)

    def _update(self) -> Task:
        counts, total = self._batch.counts, self._batch.total
        # Outcomes that are `not_sent` after an interrupt do not count as done.
        done = counts.total() - counts[StopResult.NOT_SENT] * self.is_interrupted
        text = f"{done:,}" if total is None else f"{done:,} of {total:,}"
        text += " answered" * self.is_interrupted
        self._progress.update(self._task, completed=done, description=text)
        task = self._progress.tasks[0]
        task.fields["rate"] = self._rate_text(task)
        return task

    def _rate_text(self, task: Task) -> str:
        """Return the rate and the time left, which is unknown while runtimes are polled."""
        progress = self._batch.progress
        if not task.speed or progress.is_unanswered or self.is_interrupted:
            return ""
        decimals = 1 if task.speed < _DECIMALS_BELOW else 0
        rate = f"{task.speed:,.{decimals}f}/s"
        if task.time_remaining is None or progress.polling:
            return rate
        return f"{rate}, {timedelta(seconds=int(task.time_remaining))} left"

    def _silence(self) -> float:
        """Return for how many seconds requests were in flight and none was answered."""
        stats, now = self._session.stats, self._console.get_time()
        failed = stats.failed
        answers = stats.succeeded + sum(failed[name] for name in failed if name.isdecimal())
        if answers != self._answers or not stats.in_flight:
            self._answers = answers
            self._answered_at = now
        return now - self._answered_at

    def _state_text(self) -> str:
        progress, retries = self._batch.progress, self._batch.retries
        parts = [f"{progress.in_flight} in flight"]
        calls = self._session.stats.waiting
        if progress.is_throttled and calls and not progress.in_flight:
            parts = [f"{calls:,} waiting"]
        silence = self._silence()
        if silence >= _SILENT_AFTER and not progress.is_unanswered:
            parts.append(f"no answer for {format_duration(int(silence))}")
        if progress.polling:
            parts.append(f"waiting for {progress.polling:,} to stop")
        if retries:
            parts.append(f"{retries:,} {'retry' if retries == 1 else 'retries'}")
        if progress.is_unanswered:
            parts.append("no answer from the server, probing")
        elif (wait := progress.retry_after) or progress.is_throttled:
            waiting = f", waiting {format_duration(math.ceil(wait))}" if wait else ""
            parts.append(f"throttled by the server{waiting}")
        elif retrying := progress.retrying:
            [(reason, _)] = retrying.most_common(1)
            after = f"after {reason}" if reason.isdecimal() else "after no answer"
            parts.append(f"{retrying.total():,} waiting to retry {after}")
        if self.is_interrupted:
            parts.append("Ctrl-C again to abort")
        return ", ".join(parts)


async def run_with_progress(batch: StopBatch, session: BctrlSession, output: Output) -> bool:
    """Run a bulk stop and show its progress; return True if it was interrupted.

    The first Ctrl-C (or SIGTERM) ends sending, the second aborts the run.
    """
    console, live = output.progress_console()
    display = Display(batch, session, console)
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
        display.is_interrupted = True
        if not display.is_drawn:
            print_info(display.line())

    try:
        with _signal_handlers(interrupt):
            await asyncio.wait([running])
    except asyncio.CancelledError:
        # Ctrl-C cancels this task if there are no signal handlers, as on Windows.
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
    with ExitStack() as stack:
        with suppress(NotImplementedError, RuntimeError, ValueError):  # Some loops have none.
            for number in _SIGNALS:
                # `nohup` has SIGHUP ignored, which must stay so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    loop.add_signal_handler(number, interrupt)
                    stack.callback(loop.remove_signal_handler, number)
        yield


@asynccontextmanager
async def show_waiting(output: Output) -> AsyncIterator[None]:
    """Show a notice on the terminal if the answer within the block takes long."""
    console, live = output.progress_console()
    status = console.status("Waiting for an answer")
    timer = asyncio.get_running_loop().call_later(_SHOW_WAITING_AFTER, status.start)
    if not live:
        timer.cancel()
    try:
        yield
    finally:
        timer.cancel()
        status.stop()
