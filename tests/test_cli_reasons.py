"""Targets that may still run: each reason is explained once."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from commands import Terminal, start
from conftest import KEY
from helpers import BOUND, Command
from warm_server import program

from bctrl_async.emulator import Emulator, Fault, Reply

FORBIDDEN = Reply(403, code="workspace.forbidden")
ADVICE = "Use a key with access to this workspace"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator, tmp_path: Path) -> None:
    for number in range(30):
        emulator.add_runtime("ws", f"r{number}")
        emulator.poison("ws", f"r{number}", FORBIDDEN if number % 3 else Fault.ACCEPTED)
    lines = "".join(f"ws,r{number}\n" for number in range(30))
    (tmp_path / "all.csv").write_text(lines, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)


async def test_each_reason_gets_a_line_and_then_a_count(command: Command) -> None:
    """Fault: the same answer was printed for each target, a hundred times with its advice."""
    args = ("stop", "--no-verify", "--concurrency", "1", "--from", "all.csv")
    code, out, err = await command(*args)
    lines = out.splitlines()
    assert len(lines) == 5
    assert lines[0].split()[:3] == ["ws", "r0", "accepted"]
    assert lines[1].split()[:3] == ["ws", "r1", "rejected"]
    assert lines[2] == (
        "19 more rejected (403 workspace.forbidden): ws r2, ws r4, ws r5 and 16 more"
    )
    assert lines[3] == "9 more accepted (status active): ws r3, ws r6, ws r9 and 6 more"
    assert out.count(ADVICE) == 1
    assert err == "All of them: use -o json, or a --journal\n"
    assert code == 1


async def test_the_command_that_prints_all_of_them_names_the_journal(command: Command) -> None:
    args = ("stop", "--no-verify", "--journal", "to night.jsonl", "--from", "all.csv")
    _, _, err = await command(*args)
    assert err == "All of them: bctrl-async report 'to night.jsonl' -o json\n"
    _, out, err = await command("report", "to night.jsonl")
    assert "19 more rejected (403 workspace.forbidden)" in out
    assert "All of them: add -o json\n" in err


async def test_every_alias_has_a_line_but_the_advice_stands_once(command: Command) -> None:
    args = ("stop", "--no-verify", "--concurrency", "1", "ws", "r0", "r1", "r2", "r3", "r4")
    _, out, err = await command(*args)
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["r0", "r1", "r2", "r3", "r4"]
    assert (
        lines[2] == lines[4].replace("r4", "r2") == "r2  rejected         403 workspace.forbidden"
    )
    assert "status active (still running)" in lines[3]
    assert out.count(ADVICE) == 1
    assert err == ""


async def test_a_run_that_an_invalid_key_ends_gives_its_advice_once(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the advice stood in the line of each alias, and in the error below."""
    monkeypatch.setenv("BCTRL_API_KEY", "wrong-key")
    code, out, err = await command("stop", "--concurrency", "1", "ws", "r0", "r1", "r2")
    assert (out + err).count("Check the API key") == 1
    assert "error: ended early: " in err
    assert code == 2


async def test_a_long_line_wraps_between_words_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault: the reason of a target of a list had 33 columns of 80."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    options = ("--no-verify", "--concurrency", "1", "-q", "--from", "all.csv")
    process = await start(
        *program(), "stop", *options, stdout=terminal.fd, stderr=asyncio.subprocess.DEVNULL
    )
    text = await terminal.rest()
    async with asyncio.timeout(BOUND):
        assert await process.wait() == 1
    assert re.search(r"ws r1 +rejected +the\s+server\s+answered\s+403 ", text)
    assert all(len(line) <= 80 for line in text.splitlines())
