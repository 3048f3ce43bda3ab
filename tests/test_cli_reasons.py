"""Targets that may still run: each reason is explained once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import finish, start_on_terminal
from helpers import Command

from bctrl_async.emulator import Emulator, Fault, Reply

FORBIDDEN = Reply(403, code="workspace.forbidden")
ADVICE = "Use a key with access to this workspace"
ONE_AT_A_TIME = ("stop", "--no-verify", "--concurrency", "1")


@pytest.fixture(autouse=True)
def _runtimes(
    monkeypatch: pytest.MonkeyPatch,
    emulator: Emulator,
    emulator_environment: None,
    tmp_path: Path,
) -> None:
    del emulator_environment
    for number in range(30):
        emulator.add_runtime("ws", f"r{number}")
        emulator.poison("ws", f"r{number}", FORBIDDEN if number % 3 else Fault.ACCEPTED)
    (tmp_path / "all.csv").write_text("".join(f"ws,r{number}\n" for number in range(30)), "utf-8")
    monkeypatch.chdir(tmp_path)


async def test_each_reason_gets_a_line_and_then_a_count(command: Command) -> None:
    """Fault: the same answer was printed for each target, a hundred times with its advice."""
    code, out, err = await command(*ONE_AT_A_TIME, "--from", "all.csv", "--journal", "j.jsonl")
    first, second, *others, _ = out.splitlines()
    assert first.split()[:3] == ["ws", "r0", "accepted"]
    assert second.split()[:3] == ["ws", "r1", "rejected"]
    assert others == [
        "19 more rejected (403 workspace.forbidden): ws r2, ws r4, ws r5 and 16 more",
        "9 more accepted (status active): ws r3, ws r6, ws r9 and 6 more",
    ]
    assert out.count(ADVICE) == 1
    assert (code, err) == (1, "All of them: add -o json\n")
    _, out, err = await command("report", "j.jsonl")
    assert others[0] in out
    assert "All of them: add -o json\n" in err


async def test_reasons_that_differ_in_numbers_only_are_one(
    command: Command, emulator: Emulator
) -> None:
    for number in range(3):
        emulator.poison("ws", f"r{number}", Reply(403, code=f"quota.of_{number}"))
    _, out, _ = await command(*ONE_AT_A_TIME, "--from", "all.csv")
    assert "\n2 more rejected (403 quota.of_0): ws r1, ws r2\n" in out


async def test_every_alias_has_a_line_but_the_advice_stands_once(command: Command) -> None:
    aliases = ("r0", "r1", "r2", "r3", "r4")
    _, out, err = await command(*ONE_AT_A_TIME, "ws", *aliases)
    lines = out.splitlines()
    assert tuple(line.split()[0] for line in lines[:5]) == aliases
    assert "rejected         the server answered 403 workspace.forbidden" in lines[4]
    assert "status active (still running)" in lines[3]
    assert out.count(ADVICE) == 1
    assert err == ""


async def test_a_long_line_wraps_between_words_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault: the reason of a target of a list had 33 columns of 80."""
    monkeypatch.setenv("TERM", "xterm")
    args = (*ONE_AT_A_TIME, "-q", "--from", "all.csv")
    process, terminal = await start_on_terminal(*args, streams=("stdout",))
    text = await terminal.rest()
    assert (await finish(process))[0] == 1
    assert re.search(r"ws r1 +rejected +the\s+server\s+answered\s+403 ", text)
    assert all(len(line) <= 80 for line in text.splitlines())


async def test_a_name_is_cut_at_a_bound(command: Command) -> None:
    _, out, _ = await command("stop", "ws", "a" * 300)
    assert out.startswith(f"{'a' * 100}...  not_found")
