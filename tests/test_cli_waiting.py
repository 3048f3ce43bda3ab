"""The line that says what `list`, `get` and `doctor` wait for."""

from __future__ import annotations

import asyncio
from io import StringIO
from typing import cast

import pytest
from rich.console import Console

from bctrl_async import BctrlSession
from bctrl_async.cli._output import Output
from bctrl_async.cli._progress import show_waiting
from bctrl_async.stats import SessionStats


class Session:
    """The attribute of a session that a description reads."""

    def __init__(self, in_flight: int, **failed: int) -> None:
        self.stats = SessionStats(
            attempts=4,
            retries=0,
            succeeded=0,
            failed={name.lstrip("_"): count for name, count in failed.items()},
            cancelled=0,
            in_flight=in_flight,
            waiting=0,
        )


@pytest.mark.parametrize(
    ("session", "text"),
    [
        (Session(0), "Waiting for an answer, 0 s"),
        (Session(1, BctrlTimeoutError=1), "Waiting for an answer, 1 failed attempt so far, 0 s"),
        (Session(0, _500=1, _429=3), "Waiting to retry, 4 failed attempts so far, 0 s"),
    ],
)
@pytest.mark.parametrize("width", [80, 20])
async def test_it_says_what_came_of_the_attempts_on_one_line_that_is_erased(
    monkeypatch: pytest.MonkeyPatch, session: Session, text: str, width: int
) -> None:
    monkeypatch.setattr("bctrl_async.cli._progress._SHOW_WAITING_AFTER", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    written = StringIO()
    console = Console(file=written, force_terminal=True, width=width)
    monkeypatch.setattr(Output, "progress_console", lambda _: (console, True))
    async with show_waiting(Output(), cast("BctrlSession", session)):
        while text[: width - 1] not in written.getvalue():
            await asyncio.sleep(0)
        assert "\n" not in written.getvalue()
    assert written.getvalue().rstrip("\x1b[?25h").endswith("\x1b[2K")
