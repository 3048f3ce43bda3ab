"""The progress of a bulk stop, its end by Ctrl-C, and the notice of a slow read."""

import asyncio
import math
import signal
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from bctrl_async import StopResult
from bctrl_async.cli._output import Output, format_counts, print_info
from bctrl_async.errors import format_duration

if TYPE_CHECKING:
    from bctrl_async import BctrlSession, StopBatch
    from bctrl_async.bulk import Progress as RunProgress

_SHOW_AFTER = 0.4
"""Seconds until the live display."""
_SHOW_WAITING_AFTER = 2.0
"""Seconds until the notice of a read that waits."""
_REFRESH_EVERY = 0.2
"""Seconds between updates of the live display."""
_LINE_EVERY = 5.0
"""Seconds between lines where there is no terminal."""
_SILENT_AFTER = 6.0
"""Seconds without an answer after which they are shown. Where there is no terminal,
each line measures them, so they must exceed `_LINE_EVERY`."""
_RATE_PERIOD = 10.0
"""Seconds over which the rate is measured; it is hidden if they bring no outcome."""
_DECIMALS_BELOW = 10
"""The rate, in stops per second, from which a decimal would be noise."""

# A terminal that is closed sends SIGHUP.
_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


class Display:
    """The progress display of a bulk stop."""

    def __init__(
        self, batch: "StopBatch", session: "BctrlSession", console: Console
    ) -> None:
        self._batch = batch
        self._session = session
        self._console = console
        self.is_interrupted = False
        """True after the first interrupt: another aborts the run."""
        has_total = batch.total is not None
        bars = [BarColumn(bar_width=None)] if has_total else []
        self._progress = Progress(
            TextColumn("{task.description}"),
            *bars,
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            expand=has_total,
        )
        self._task = self._progress.add_task("", total=batch.total, rate="")
        self.is_drawn = False
        self._samples: deque[tuple[float, int]] = deque()
        """Times in the last `_RATE_PERIOD`, and the number of outcomes at each."""
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
            get_renderable=self.view,
            console=self._console,
            auto_refresh=False,
            transient=True,
        ) as display:
            while True:
                display.refresh()
                await asyncio.sleep(_REFRESH_EVERY)

    def view(self) -> Group:
        """Return the live display: a bar, the state and the results so far."""
        self._update()
        counts = format_counts(self._batch.counts)
        lines = [self._asked_text(), self._state_text(), counts]
        return Group(self._progress, *(Text(line) for line in lines if line))

    def line(self) -> str:
        """Return the progress as one line."""
        task = self._update()
        text = f"{task.description} done"
        counts = format_counts(self._batch.counts)
        rate = task.fields["rate"]
        parts = [text, rate, self._asked_text(), self._state_text(), counts]
        return ", ".join(part for part in parts if part)

    def _update(self) -> Task:
        counts = self._batch.counts
        done = counts.total()
        if self.is_interrupted:
            # Outcomes that are `not_sent` after an interrupt do not count as done.
            done -= counts[StopResult.NOT_SENT]
        text = f"{done:,}"
        if self._batch.total is not None:
            text += f" of {self._batch.total:,}"
        self._progress.update(self._task, completed=done, description=text)
        task = self._progress.tasks[0]
        # The clock would stop at the last outcome, which a last look may follow.
        task.finished_time = None
        task.fields["rate"] = self._rate_text(self._measure_rate(done), task.remaining)
        return task

    def _rate_text(self, speed: float, remaining: float | None) -> str:
        """Return the rate, and the time left where the rate predicts it."""
        progress = self._batch.progress
        if not speed or progress.is_unanswered or self.is_interrupted:
            return ""
        decimals = 1 if speed < _DECIMALS_BELOW else 0
        rate = f"{speed:,.{decimals}f}/s"
        # A quota comes in windows: the rate of neither a burst nor a pause lasts.
        if not remaining or progress.polling or self._session.stats.throttled:
            return rate
        return f"{rate}, {timedelta(seconds=math.ceil(remaining / speed))} left"

    def _measure_rate(self, done: int) -> float:
        """Return how many outcomes a second came in the last `_RATE_PERIOD`.

        Rich measures from the first of them to the last, which is no time at all for
        the polls that one list ends.
        """
        now = self._console.get_time()
        self._samples.append((now, done))
        while now - self._samples[0][0] > _RATE_PERIOD:
            self._samples.popleft()
        start, before = self._samples[0]
        if now == start:
            return 0.0
        return (done - before) / (now - start)

    def _measure_silence(self) -> float:
        """Return for how many seconds requests were in flight and none was answered."""
        stats = self._session.stats
        now = self._console.get_time()
        # A failure that is named by a status was answered.
        answers = stats.succeeded
        answers += sum(
            count for name, count in stats.failed.items() if name.isdecimal()
        )
        if answers != self._answers or not stats.in_flight:
            self._answers = answers
            self._answered_at = now
        return now - self._answered_at

    def _state_text(self) -> str:
        """Return what the requests do, and what holds them up."""
        progress = self._batch.progress
        retries = self._batch.retries
        parts = []
        if progress.is_looking:
            parts.append("looking once more")
        parts.append(self._calls_text(progress))
        silence = self._measure_silence()
        if silence >= _SILENT_AFTER and not progress.is_unanswered:
            parts.append(f"no answer for {format_duration(int(silence))}")
        if retries == 1:
            parts.append("1 retry")
        elif retries:
            parts.append(f"{retries:,} retries")
        parts.append(_obstacle_text(progress))
        if self.is_interrupted:
            parts.append(self._abort_text)
        return ", ".join(part for part in parts if part)

    @property
    def _abort_text(self) -> str:
        # A supervisor, which has no terminal, sends a signal such as SIGTERM.
        if self._console.is_terminal:
            return "Ctrl-C again to abort"
        return "another signal aborts"

    def _asked_text(self) -> str:
        """Return how many are to go, and how many were asked to stop and are polled."""
        progress = self._batch.progress
        if not progress.polling:
            return ""
        text = f"{progress.polling:,} asked to stop"
        if self.is_interrupted:
            return f"{text}, no longer polled"
        count = self._count_left(progress)
        if count:
            text = f"{count:,} to go, {text}"
        text += f", polled for up to {format_duration(math.ceil(progress.polling_for))}"
        failures = progress.polling_failures
        if failures:
            text += f", {failures.total():,} cannot be polled: {_most_common(failures)}"
        return text

    def _count_left(self, progress: "RunProgress") -> int:
        """Return how many are neither done nor polled; 0 if the total is unknown."""
        if self._batch.total is None:
            return 0
        done = int(self._progress.tasks[0].completed)
        return self._batch.total - done - progress.polling

    def _calls_text(self, progress: "RunProgress") -> str:
        if progress.in_flight:
            return f"{progress.in_flight} in flight"
        waiting = self._session.stats.waiting
        # The wait for the next poll counts as waiting, too.
        if progress.is_throttled and waiting and not progress.polling:
            return f"{waiting:,} waiting"
        return "0 in flight"


def _obstacle_text(progress: "RunProgress") -> str:
    """Return what holds up a run; an empty text if nothing does."""
    if progress.is_unanswered:
        return "no answer from the server, probing"
    if progress.retry_after:
        seconds = math.ceil(progress.retry_after)
        return f"throttled by the server, waiting {format_duration(seconds)}"
    if progress.is_throttled:
        return "throttled by the server"
    if progress.is_full:
        return "no more are asked until some have ended"
    if progress.retrying:
        count = progress.retrying.total()
        return f"{count:,} waiting to retry after {_most_common(progress.retrying)}"
    return ""


def _most_common(failures: Counter[str]) -> str:
    """Return the most common of failures: a status, or `no answer`."""
    [(failure, _)] = failures.most_common(1)
    return failure if failure.isdecimal() else "no answer"


async def run_with_progress(
    batch: "StopBatch", session: "BctrlSession", output: Output
) -> bool:
    """Run a bulk stop and show its progress; return True if it was interrupted.

    The first Ctrl-C (or SIGTERM) ends sending, the second aborts the run.
    """
    console, live = output.progress_console()
    display = Display(batch, session, console)
    run = asyncio.ensure_future(batch)
    drawing = asyncio.create_task(display.run(live=live))
    if not output.shows_progress:
        drawing.cancel()
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
            await asyncio.wait([run])
    except asyncio.CancelledError:
        # Ctrl-C cancels this task if there are no signal handlers, as on Windows.
        interrupts += 1
        batch.abort()
        await asyncio.wait([run])
    finally:
        drawing.cancel()
        await asyncio.wait([drawing])
    # The run may have failed: this raises its error.
    run.result()
    return interrupts > 0


@contextmanager
def _signal_handlers(interrupt: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        # Some loops have no signal handlers.
        with suppress(NotImplementedError, RuntimeError, ValueError):
            for number in _SIGNALS:
                # `nohup` has SIGHUP ignored, which must stay so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    loop.add_signal_handler(number, interrupt)
                    stack.callback(loop.remove_signal_handler, number)
        yield


@asynccontextmanager
async def show_waiting(output: Output, awaited: str) -> AsyncIterator[None]:
    """Say what is awaited if the block takes long: live on a terminal, or in a line."""
    console, live = output.progress_console()
    text = f"Waiting for {awaited}"
    status = console.status(Text(text))
    call_later = asyncio.get_running_loop().call_later
    if live:
        timer = call_later(_SHOW_WAITING_AFTER, status.start)
    else:
        timer = call_later(_LINE_EVERY, print_info, text)
    try:
        yield
    finally:
        timer.cancel()
        status.stop()
