"""How far a bulk stop has come: a live display on a terminal, a line now and then elsewhere."""

import asyncio
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from bctrl_async import StopBatch
from bctrl_async.cli import _output

_SHOW_AFTER, _REFRESH_EVERY = 0.4, 0.2
"""Seconds until the live display appears, and between two looks at the run."""
_LINE_EVERY = 5.0
"""Seconds between two lines, where there is no terminal."""
_WHOLE_NUMBERS_FROM = 10
"""Stops a second from which tenths of one tell nothing."""


class _RateColumn(ProgressColumn):
    """How fast a run is, and how long it will take; nothing while the server answers nobody."""

    def __init__(self, batch: StopBatch) -> None:
        super().__init__()
        self._batch = batch

    def render(self, task: Task) -> Text:
        return Text(self.text(task))

    def text(self, task: Task) -> str:
        """The same as text."""
        if not task.speed or self._batch.is_unanswered:
            return ""
        digits = 0 if task.speed >= _WHOLE_NUMBERS_FROM else 1
        pace = f"{task.speed:,.{digits}f}/s"
        if task.time_remaining is None:
            return pace
        return f"{pace}, {timedelta(seconds=int(task.time_remaining))} left"


class Display:
    """What there is to see of a run.

    Args:
        batch: The run.
        console: Where it is shown.

    Attributes:
        notice: What the user should know just now.
        is_drawn: Whether the live display is there.
    """

    def __init__(self, batch: StopBatch, console: Console) -> None:
        self._batch = batch
        self._console = console
        self._rate = _RateColumn(batch)
        bar = [BarColumn(bar_width=None)] if batch.total is not None else []
        self._progress = Progress(
            TextColumn("{task.description}"),
            *bar,
            self._rate,
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            expand=batch.total is not None,
        )
        self._task = self._progress.add_task("", total=batch.total)
        self.notice = ""
        self.is_drawn = False

    async def run(self, *, live: bool) -> None:
        """Show it until cancelled.

        Args:
            live: Whether it can be drawn over, on a terminal.
        """
        if not live:
            while True:
                await asyncio.sleep(_LINE_EVERY)
                _output.print_info(self.line())
        await asyncio.sleep(_SHOW_AFTER)
        with Live(
            get_renderable=self.view, console=self._console, auto_refresh=False, transient=True
        ) as shown:
            self.is_drawn = True
            while True:
                shown.refresh()
                await asyncio.sleep(_REFRESH_EVERY)

    def view(self) -> Group:
        """The live display: a bar, the state of things, and the results so far."""
        self._update()
        lines = [self._state_text(), _output.format_counts(self._batch.counts)]
        return Group(self._progress, *(Text(line) for line in lines if line))

    def line(self) -> str:
        """The same in one line."""
        task = self._update()
        parts = [
            f"{self._done_text()} done",
            self._rate.text(task),
            self._state_text(),
            _output.format_counts(self._batch.counts),
        ]
        return ", ".join(part for part in parts if part)

    def _update(self) -> Task:
        done = self._batch.counts.total()
        self._progress.update(self._task, completed=done, description=self._done_text())
        return self._progress.tasks[0]

    def _done_text(self) -> str:
        done = f"{self._batch.counts.total():,}"
        return done if self._batch.total is None else f"{done} of {self._batch.total:,}"

    def _state_text(self) -> str:
        batch = self._batch
        parts = [f"{batch.in_flight} in flight"]
        if batch.retries:
            parts.append(f"{batch.retries:,} retries")
        if batch.is_unanswered:
            parts.append("no answer from the server, asking again")
        elif batch.is_throttled:
            parts.append("throttled by the server")
        if self.notice:
            parts.append(self.notice)
        return ", ".join(parts)
