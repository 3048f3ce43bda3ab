"""The command's journals, and dry runs, which only read them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from commands import outcomes_of, save, without_times
from conftest import KEY
from helpers import Command, HoldingEmulator
from journal_lines import entry_line, header_line

from bctrl_async.journal import Journal

pytestmark = pytest.mark.usefixtures("holding")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("tonight.jsonl")


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


# Journals


async def test_a_journal_in_use_exits_with_75_and_a_dry_run_reads_it(
    holding: HoldingEmulator, command: Command, path: Path
) -> None:
    """Fault: it is 2, and a supervisor gives up while a file server holds a dead client's lock."""
    journal = Journal(path, f"{holding.url}/v1")
    code, out, err = await command("stop", "--journal", path, "ws", "a")
    assert err.startswith(f"bctrl-async: error: the journal '{path}' is in use by another run. ")
    assert (code, out, err.count("\n")) == (75, "", 1)
    assert not holding.requests
    code, _, err = await command("stop", "--dry-run", "--journal", path, "ws", "a")
    journal.close()
    assert (code, err) == (0, "Dry run: 1 to stop, 0 invalid\n")


@pytest.mark.parametrize("option", [(), ("--dry-run",)], ids=["run", "dry run"])
async def test_a_journal_that_is_too_old_exits_with_2_and_is_unchanged(
    holding: HoldingEmulator, command: Command, path: Path, option: tuple[str, ...]
) -> None:
    data = header_line(f"{holding.url}/v1", datetime.now(UTC) - timedelta(hours=13))
    save(path, data)
    args = ("stop", *option, "--journal-max-age", "12h", "--journal", path, "ws", "a")
    code, out, err = await command(*args)
    assert f"error: the journal '{path}' cannot be used: it is 13:00:" in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert content(path) == data
    assert not holding.requests


async def test_a_shard_without_runtimes_has_a_journal_too(command: Command, path: Path) -> None:
    """Fault: the report on all shards failed, because one had no journal."""
    args = ("stop", "ws", "--all", "--yes", "--kind", "desktop", "--journal", path)
    code, out, _ = await command(*args)
    assert (code, without_times(out)) == (0, "0 of 0 no longer running after 0.0 s\n")
    assert content(path)


# Dry runs


async def test_a_dry_run_needs_no_key_and_prints_lines_for_from(
    holding: HoldingEmulator, command: Command, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.delenv("BCTRL_API_KEY")
    code, out, err = await command("stop", "--dry-run", "--journal", path, "ws", "a", "b")
    assert outcomes_of(out) == [{"workspace_id": "ws", "alias": alias} for alias in "ab"]
    assert (code, err) == (0, "Dry run: 2 to stop, 0 invalid\n")
    assert not holding.requests
    assert not content(path)

    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    save(path, out)
    assert (await command("stop", "--from", path))[0] == 0
    assert holding.received == {("ws", "a"): 1, ("ws", "b"): 1}


@pytest.mark.parametrize("has_entry", [True, False])
@pytest.mark.parametrize("torn", [b"", b'{"journal"'])
async def test_a_dry_run_leaves_a_journal_as_a_crash_left_it(
    holding: HoldingEmulator, command: Command, path: Path, torn: bytes, *, has_entry: bool
) -> None:
    """Fault: a dry run cut off the torn tail, or wrote a header."""
    now = datetime.now(UTC)
    lines = header_line(f"{holding.url}/v1", now) + entry_line(("ws", "a"), now)
    before = lines * has_entry + torn
    save(path, before)
    code, out, err = await command("stop", "--dry-run", "--journal", path, "ws", "a", "b")
    assert [target["alias"] for target in outcomes_of(out)] == ["a", "b"][has_entry:]
    assert f"Dry run: {2 - has_entry} to stop, " in err
    assert ("1 no longer running" in err) is has_entry
    assert (code, content(path)) == (0, before)
