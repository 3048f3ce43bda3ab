"""The line that says that `list`, `get` and `doctor` wait for an answer."""

from __future__ import annotations

import asyncio
from io import StringIO
from typing import cast

import pytest
from helpers import BOUND
from rich.console import Console

from bctrl_async import BctrlSession
from bctrl_async.cli._output import Output
from bctrl_async.cli._progress import show_waiting
from bctrl_async.stats import SessionStats


class Session:
    """The attribute of a session that the line reads."""

    def __init__(self, **failed: int) -> None:
        self.stats = SessionStats(
            attempts=4,
            retries=0,
            succeeded=0,
            failed={name.lstrip("_"): count for name, count in failed.items()},
            cancelled=0,
            in_flight=0,
            waiting=0,
        )


@pytest.mark.parametrize(
    ("session", "text"),
    [
        (Session(), "Waiting for an answer"),
        (Session(_500=1, _429=3), "Waiting for an answer, 4 failed attempts so far"),
    ],
)
async def test_it_says_how_many_attempts_have_failed_and_is_erased(
    monkeypatch: pytest.MonkeyPatch, session: Session, text: str
) -> None:
    monkeypatch.setattr("bctrl_async.cli._progress._SHOW_WAITING_AFTER", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    written = StringIO()
    console = Console(file=written, force_terminal=True, width=80)
    monkeypatch.setattr(Output, "progress_console", lambda _: (console, True))
    async with asyncio.timeout(BOUND), show_waiting(Output(), cast("BctrlSession", session)):
        while text not in written.getvalue():
            await asyncio.sleep(0.01)
        assert "\n" not in written.getvalue()
    assert written.getvalue().replace("\x1b[?25h", "").rstrip("\r").endswith("\x1b[2K")
