"""The line that says what `list`, `get` and `doctor` wait for."""

from __future__ import annotations

import asyncio
from io import StringIO
from typing import cast

import pytest
from rich.console import Console

from bctrl_async import BctrlSession
from bctrl_async.cli._output import Output
from bctrl_async.cli._progress import describe_read, show_waiting
from bctrl_async.stats import SessionStats


class Session:
    """The attribute of a session that a description reads."""

    def __init__(self, attempts: int, in_flight: int, succeeded: int = 0, **failed: int) -> None:
        self.stats = SessionStats(
            attempts=attempts,
            retries=0,
            succeeded=succeeded,
            failed={name.lstrip("_"): count for name, count in failed.items()},
            cancelled=0,
            in_flight=in_flight,
            waiting=0,
        )


@pytest.mark.parametrize(
    ("session", "text"),
    [
        (Session(0, 0), "Waiting for an answer"),
        (Session(2, 1, BctrlTimeoutError=1), "Waiting for an answer, 1 failed attempt so far"),
        (Session(4, 0, _500=1, _429=3), "Waiting to retry, 4 failed attempts so far"),
    ],
)
def test_it_says_what_came_of_the_last_attempt_if_known(session: Session, text: str) -> None:
    assert describe_read(cast("BctrlSession", session)) == text


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A console of 20 columns that stands for the terminal."""
    monkeypatch.setattr("bctrl_async.cli._progress._SHOW_WAITING_AFTER", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    shown = Console(file=StringIO(), force_terminal=True, width=20)
    monkeypatch.setattr(Output, "progress_console", lambda _: (shown, True))
    return shown


async def test_the_line_fits_the_terminal_and_is_gone_at_the_end(console: Console) -> None:
    written = cast("StringIO", console.file)
    async with show_waiting(Output(), cast("BctrlSession", Session(0, 0))):
        while "Waiting for an answ" not in written.getvalue():
            await asyncio.sleep(0)
        assert "\n" not in written.getvalue()
    assert written.getvalue().rstrip("\x1b[?25h").endswith("\x1b[2K")


async def test_elsewhere_nothing_is_shown(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Output, "progress_console", lambda _: (console, False))
    async with show_waiting(Output(), cast("BctrlSession", Session(0, 0))):
        await asyncio.sleep(0.05)
    assert cast("StringIO", console.file).getvalue() == ""
