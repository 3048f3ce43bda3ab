"""The progress display of a bulk stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import StringIO
from typing import cast

import pytest
from rich.cells import cell_len
from rich.console import Console

from bctrl_async import StopBatch, StopResult
from bctrl_async.cli._progress import Display


@dataclass
class Batch:
    """The attributes of a batch that a display reads."""

    total: int | None
    counts: Counter[StopResult] = field(default_factory=Counter)
    in_flight: int = 0
    polling: int = 0
    retries: int = 0
    is_throttled: bool = False
    retry_after: float = 0.0
    is_unanswered: bool = False
    retrying: Counter[str] = field(default_factory=Counter)


class Clock:
    """A clock that stands still until it is advanced."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


Make = Callable[[Batch], Display]


@pytest.fixture
def make(clock: Clock) -> Make:
    def make(batch: Batch) -> Display:
        console = Console(file=StringIO(), width=80, height=30, force_terminal=True, get_time=clock)
        return Display(cast("StopBatch", batch), console)

    return make


def drawn(display: Display) -> list[str]:
    console = Console(file=StringIO(), width=80, record=True)
    console.print(display.view())
    return [line.rstrip() for line in console.export_text().splitlines()]


def advance(display: Display, batch: Batch, clock: Clock, *, per_second: int) -> None:
    """Complete stops at a constant rate."""
    for _ in range(4):
        display.line()
        clock.now += 1.0
        batch.counts[StopResult.STOPPED] += per_second


@pytest.mark.parametrize(
    ("batch", "per_second", "line"),
    [
        (Batch(1200, in_flight=7), 0, "0 of 1,200 done, 7 in flight"),
        (
            Batch(None, Counter({StopResult.UNKNOWN: 4, StopResult.STOPPED: 1234})),
            0,
            "1,238 done, 0 in flight, 1,234 stopped, 4 unknown",
        ),
        (
            Batch(10_000, in_flight=3, retries=1500),
            20,
            "80 of 10,000 done, 20/s, 0:08:16 left, 3 in flight, 1,500 retries, 80 stopped",
        ),
        # There is no time left: runtimes that are polled stop when they stop.
        (
            Batch(1000, in_flight=3, polling=500),
            20,
            "80 of 1,000 done, 20/s, 3 in flight, waiting for 500 to stop, 80 stopped",
        ),
        (Batch(None), 3, "12 done, 3.0/s, 0 in flight, 12 stopped"),
        # The rate before an outage does not predict its end.
        (
            Batch(None, is_unanswered=True),
            3,
            "12 done, 0 in flight, no answer from the server, probing, 12 stopped",
        ),
        (Batch(100, in_flight=3, retries=1), 0, "0 of 100 done, 3 in flight, 1 retry"),
    ],
)
def test_a_line_says_how_far_the_run_is(
    make: Make, clock: Clock, batch: Batch, per_second: int, line: str
) -> None:
    display = make(batch)
    if per_second:
        advance(display, batch, clock, per_second=per_second)
    assert display.line() == line


def test_a_rate_is_shown_only_while_something_is_done(make: Make, clock: Clock) -> None:
    batch = Batch(1000, in_flight=3)
    display = make(batch)
    advance(display, batch, clock, per_second=20)
    assert "20/s, 0:00:46 left" in display.line()
    clock.now += 10.1
    assert display.line() == "80 of 1,000 done, 3 in flight, 80 stopped"
    advance(display, batch, clock, per_second=20)
    assert "20/s, " in display.line()


RETRYING = Counter({"429": 9})


@pytest.mark.parametrize(
    ("batch", "state"),
    [
        # It meets a share of 429 that slowing down does not change.
        (Batch(100, is_throttled=True, retrying=RETRYING), "throttled by the server"),
        (Batch(100, retry_after=0.2, retrying=RETRYING), "throttled by the server, waiting 1s"),
        (Batch(100, retry_after=3599.5), "throttled by the server, waiting 1h"),
        (
            Batch(100, retrying=Counter({"500": 1234, "BctrlTimeoutError": 1})),
            "1,235 waiting to retry after 500",
        ),
        (
            Batch(100, retrying=Counter({"BctrlTimeoutError": 7})),
            "7 waiting to retry after no answer",
        ),
        (
            Batch(100, is_throttled=True, is_unanswered=True),
            "no answer from the server, probing",
        ),
    ],
)
def test_the_state_says_what_the_run_waits_for(make: Make, batch: Batch, state: str) -> None:
    assert drawn(make(batch))[1] == f"0 in flight, {state}"


# Live display


def test_the_view_shows_a_bar_the_state_and_the_results(make: Make, clock: Clock) -> None:
    batch = Batch(100, in_flight=3, retries=2, is_throttled=True)
    display = make(batch)
    advance(display, batch, clock, per_second=10)

    bar, state, results = drawn(display)

    assert bar.startswith("40 of 100 ━━━")
    assert bar.endswith(" 10/s, 0:00:06 left 0:00:04")
    assert state == "3 in flight, 2 retries, throttled by the server"
    assert results == "40 stopped"

    batch.counts[StopResult.NOT_SENT] = 60
    display.is_interrupted = True
    bar, state, results = drawn(display)

    assert bar.startswith("40 of 100 answered ━━━")
    # The bar has room for fifty, so two fifths are twenty.
    assert 15 < bar.count("━") < 25
    assert bar.endswith(" 0:00:04")
    assert " left" not in bar
    assert state.endswith(", Ctrl-C again to abort")
    assert results == "40 stopped, 60 not_sent"


def test_the_view_has_no_bar_if_the_total_is_unknown_and_no_results_at_first(make: Make) -> None:
    display = make(Batch(None, in_flight=1))
    first, state = drawn(display)
    assert first.split() == ["0", "0:00:00"]
    assert state == "1 in flight"


@pytest.mark.parametrize("length", [None, 1_000_000])
@pytest.mark.parametrize("interrupted", [True, False])
def test_the_fullest_view_fits_eighty_columns(
    make: Make, clock: Clock, length: int | None, *, interrupted: bool
) -> None:
    before = Counter(dict.fromkeys(StopResult, 12_345))
    batch = Batch(length, before, in_flight=100, retries=123_456, is_throttled=True)
    display = make(batch)
    advance(display, batch, clock, per_second=1234)
    display.is_interrupted = interrupted

    lines = drawn(display)

    assert all(cell_len(line) <= 80 for line in lines)
    assert len(lines) <= 5
    assert all(f" {result}" in " ".join(lines) for result in StopResult)
