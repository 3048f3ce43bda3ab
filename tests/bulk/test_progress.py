"""The progress display of a bulk stop."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import cast

import pytest
from rich.cells import cell_len
from rich.console import Console

from bctrl_async import BctrlSession, SessionStats, StopBatch, StopResult
from bctrl_async.bulk import Progress
from bctrl_async.cli._progress import Display

STOPPED = StopResult.STOPPED
IDLE = Progress(0)


@dataclass
class Batch:
    """The attributes of a batch that a display reads."""

    total: int | None
    counts: Counter[StopResult] = field(default_factory=Counter)
    retries: int = 0
    progress: Progress = IDLE


@dataclass
class Session:
    """The attribute of a session that a display reads."""

    stats: SessionStats = field(default_factory=SessionStats)


class Shown:
    """A display of a batch on eighty columns, whose clock stands still."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.stats = SessionStats(in_flight=batch.progress.in_flight)
        self.now = 100.0
        console = Console(
            file=StringIO(),
            width=80,
            height=30,
            force_terminal=True,
            get_time=lambda: self.now,
        )
        session = cast("BctrlSession", Session(self.stats))
        self.display = Display(cast("StopBatch", batch), session, console)

    def advance(self, per_second: int) -> None:
        """Complete stops at a constant rate for four seconds."""
        for _ in range(4):
            self.display.line()
            self.now += 1.0
            self.batch.counts[STOPPED] += per_second
            self.stats.succeeded += per_second

    def drawn(self) -> list[str]:
        console = Console(file=StringIO(), width=80, record=True)
        console.print(self.display.view())
        return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


LINES = {
    # Each line has its batch, and the stops a second of the last four seconds.
    "0 of 1,200 done, 7 in flight": (Batch(1200, progress=Progress(7)), 0),
    "1,238 done, 0 in flight, 1,234 stopped, 4 unknown": (
        Batch(None, Counter({StopResult.UNKNOWN: 4, STOPPED: 1234})),
        0,
    ),
    "80 of 10,000 done, 20/s, 0:08:16 left, 3 in flight, 1,500 retries, 80 stopped": (
        Batch(10_000, retries=1500, progress=Progress(3)),
        20,
    ),
    "12 done, 3.0/s, 0 in flight, 1 retry, 12 stopped": (Batch(None, retries=1), 3),
    # There is no time left: runtimes that are polled stop when they stop.
    "80 of 1,000 done, 20/s, 420 to go, 500 asked to stop, polled for "
    "up to 1m55s, 7 in flight, 80 stopped": (
        Batch(1000, progress=Progress(7, polling=500, polling_for=114.5)),
        20,
    ),
    # Fault: invalid targets, and those of an earlier run, counted as asked.
    "20 of 25 done, 5 asked to stop, polled for up to 2m, 0 in flight, 15 stopped, "
    "5 invalid": (
        Batch(
            25,
            Counter({STOPPED: 15, StopResult.INVALID: 5}),
            progress=Progress(0, polling=5, polling_for=120.0),
        ),
        0,
    ),
    # Fault: polls that failed for two minutes were shown nowhere.
    "0 of 3 done, 3 asked to stop, polled for up to 2m, 2 cannot be polled: "
    "502, 1 in flight": (
        Batch(
            3,
            progress=Progress(
                1, polling=3, polling_for=120.0, polling_failures=Counter({"502": 2})
            ),
        ),
        0,
    ),
    "0 done, 1 asked to stop, polled for up to 1s, 1 cannot be polled: no answer, "
    "0 in flight": (
        Batch(
            None,
            progress=Progress(
                0,
                polling=1,
                polling_for=0.1,
                polling_failures=Counter({"BctrlTimeoutError": 1}),
            ),
        ),
        0,
    ),
    # The next polls are not due yet.
    "0 done, 100,000 asked to stop, polled for up to 12s, 0 in flight, "
    "no more are asked until some have ended": (
        Batch(
            None,
            progress=Progress(0, polling=100_000, polling_for=12.0, is_full=True),
        ),
        0,
    ),
    # The rate before an outage does not predict its end.
    "12 done, 0 in flight, no answer from the server, probing, 12 stopped": (
        Batch(None, progress=Progress(0, is_unanswered=True, is_throttled=True)),
        3,
    ),
    "9 done, looking once more, 1 in flight, 9 stopped": (
        Batch(None, Counter({STOPPED: 9}), progress=Progress(1, is_looking=True)),
        0,
    ),
    # It meets a share of 429 that slowing down does not change.
    "0 done, 0 in flight, throttled by the server": (
        Batch(
            None, progress=Progress(0, is_throttled=True, retrying=Counter({"429": 9}))
        ),
        0,
    ),
    "0 done, 0 in flight, throttled by the server, waiting 1h": (
        Batch(None, progress=Progress(0, retry_after=3599.5)),
        0,
    ),
    "0 done, 0 in flight, 1,235 waiting to retry after 500": (
        Batch(
            None,
            progress=Progress(
                0, retrying=Counter({"500": 1234, "BctrlTimeoutError": 1})
            ),
        ),
        0,
    ),
    "0 done, 0 in flight, 7 waiting to retry after no answer": (
        Batch(None, progress=Progress(0, retrying=Counter({"BctrlTimeoutError": 7}))),
        0,
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_says_how_far_the_run_is_and_what_it_waits_for(line: str) -> None:
    batch, per_second = LINES[line]
    shown = Shown(replace(batch, counts=batch.counts.copy()))
    if per_second:
        shown.advance(per_second)
    assert shown.display.line() == line


def test_after_ctrl_c_nothing_is_polled_any_longer() -> None:
    """Fault: it went on to count down the two minutes of the polls."""
    shown = Shown(Batch(4, progress=Progress(0, polling=3)))
    shown.display.is_interrupted = True
    assert shown.display.line() == (
        "0 of 4 done, 3 asked to stop, no longer polled, 0 in flight, "
        "Ctrl-C again to abort"
    )


def test_a_rate_is_shown_only_while_something_is_done() -> None:
    shown = Shown(Batch(1000, progress=Progress(3)))
    shown.advance(20)
    assert "20/s, 0:00:46 left" in shown.display.line()
    shown.now += 10.1
    assert (
        shown.display.line()
        == "80 of 1,000 done, 3 in flight, no answer for 10s, 80 stopped"
    )
    shown.advance(20)
    assert "20/s, " in shown.display.line()


def test_no_time_left_is_said_once_the_server_has_throttled() -> None:
    """Fault: a quota of 200 in 15 s had 0:01:41 left in a pause, then 0:00:07."""
    shown = Shown(Batch(600, progress=Progress(1)))
    shown.stats.failed["429"] = 1
    shown.advance(50)
    assert shown.display.line() == "200 of 600 done, 50/s, 1 in flight, 200 stopped"


def test_a_rate_includes_the_time_before_and_after_a_burst() -> None:
    """Fault: a list that ended 145 runtimes gave 689/s, and the next gap no rate."""
    shown = Shown(Batch(1000, progress=Progress(0, polling=900, polling_for=60.0)))
    shown.display.line()
    shown.now += 5.0
    for _ in range(2):
        shown.batch.counts[STOPPED] += 50
        assert f", {shown.batch.counts.total() // 5}/s, " in shown.display.line()
        shown.now += 0.01
    shown.now += 4.0
    assert ", 11/s, " in shown.display.line()


def test_a_server_that_hangs_is_shown_by_the_time_without_an_answer() -> None:
    """Fault: it had "0 of 300 done, 100 in flight" for a minute."""
    shown = Shown(Batch(300, progress=Progress(100)))
    silent = "0 of 300 done, 100 in flight, no answer for "
    shown.now += 4.9
    assert shown.display.line() == "0 of 300 done, 100 in flight"
    shown.now += 7.9
    assert shown.display.line() == f"{silent}12s"
    # A time limit is no answer.
    shown.stats.failed["BctrlTimeoutError"] = 9
    shown.now += 60
    assert shown.display.line() == f"{silent}1m12s"
    shown.batch.progress = Progress(100, is_unanswered=True)
    assert shown.display.line().endswith(
        "in flight, no answer from the server, probing"
    )
    shown.batch.progress = Progress(100)
    shown.stats.failed["500"] = 1
    assert "no answer" not in shown.display.line()


def test_a_pause_of_the_run_is_no_silence_of_the_server() -> None:
    shown = Shown(Batch(300))
    shown.now += 60
    assert "no answer" not in shown.display.line()
    shown.batch.progress = Progress(1)
    shown.stats.in_flight = 1
    shown.now += 3
    assert "no answer" not in shown.display.line()


def test_the_view_shows_a_bar_the_state_and_the_results() -> None:
    shown = Shown(Batch(100, retries=2, progress=Progress(3, is_throttled=True)))
    shown.advance(10)
    bar, state, results = shown.drawn()

    assert bar.startswith("40 of 100 ━━━")
    assert bar.endswith(" 10/s, 0:00:06 left 0:00:04")
    assert state == "3 in flight, 2 retries, throttled by the server"
    assert results == "40 stopped"

    shown.batch.counts[StopResult.NOT_SENT] = 60
    shown.display.is_interrupted = True
    bar, state, results = shown.drawn()

    assert bar.startswith("40 of 100 ━━━")
    # The bar has room for fifty, so two fifths are twenty.
    assert 15 < bar.count("━") < 25
    assert bar.endswith(" 0:00:04")
    assert " left" not in bar
    assert state.endswith(", Ctrl-C again to abort")
    assert results == "40 stopped, 60 not_sent"


def test_what_is_polled_has_a_line_of_its_own_in_the_view() -> None:
    """Fault: the state was broken within "throttled by the server" by turns."""
    progress = Progress(16, is_throttled=True, polling=1234, polling_for=120.0)
    shown = Shown(Batch(3000, retries=69, progress=progress))

    _, *state = shown.drawn()
    assert state == [
        "1,766 to go, 1,234 asked to stop, polled for up to 2m",
        "16 in flight, 69 retries, throttled by the server",
    ]

    shown.batch.progress = Progress(0, polling=1234, polling_for=120.0)
    shown.batch.retries = 0
    _, *state = shown.drawn()
    # A line that came with each poll would move the line below it.
    assert state == [
        "1,766 to go, 1,234 asked to stop, polled for up to 2m",
        "0 in flight",
    ]


def test_time_goes_on_in_the_last_look_and_none_is_left() -> None:
    """Fault: a last look of a minute had "119/s, 0:00:00 left 0:00:06" throughout."""
    shown = Shown(Batch(40, progress=Progress(1, is_looking=True)))
    shown.advance(10)
    shown.drawn()
    shown.now += 5.0
    bar, *_ = shown.drawn()

    assert bar.startswith("40 of 40 ━")
    assert bar.endswith("━ 4.4/s 0:00:09")


@pytest.mark.parametrize("interrupted", [True, False])
def test_the_fullest_view_fits_eighty_columns(*, interrupted: bool) -> None:
    counts = Counter(dict.fromkeys(StopResult, 12_345))
    progress = Progress(100, is_throttled=True)
    shown = Shown(Batch(1_000_000, counts, retries=123_456, progress=progress))
    shown.advance(1234)
    shown.display.is_interrupted = interrupted
    lines = shown.drawn()

    assert all(cell_len(line) <= 80 for line in lines)
    assert len(lines) <= 5
    assert all(f" {result}" in " ".join(lines) for result in StopResult)


def test_a_run_whose_stops_are_all_throttled_shows_how_many_wait() -> None:
    shown = Shown(Batch(100, progress=Progress(0, is_throttled=True)))
    shown.stats.waiting = 60
    shown.batch.counts[STOPPED] = 40

    assert (
        shown.display.line()
        == "40 of 100 done, 60 waiting, throttled by the server, 40 stopped"
    )


def test_the_wait_for_the_next_poll_is_not_shown_as_a_call_that_waits() -> None:
    progress = Progress(0, polling=5, polling_for=60.0, is_throttled=True)
    shown = Shown(Batch(5, progress=progress))
    shown.stats.waiting = 1

    assert shown.display.line() == (
        "0 of 5 done, 5 asked to stop, polled for up to 1m, 0 in flight, "
        "throttled by the server"
    )
