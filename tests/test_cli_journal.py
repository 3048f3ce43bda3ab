"""The command's journals, and dry runs, which only read them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from commands import outcomes_of, results_of, stop_piped, without_times
from conftest import KEY
from helpers import Command, HoldingEmulator
from journal_lines import entry_line, header_line

from bctrl_async.emulator import Fault
from bctrl_async.journal import Journal

STARTED = datetime(2026, 11, 24, 2, 30, tzinfo=UTC)
RUNS = pytest.mark.parametrize("option", [(), ("--dry-run",)], ids=["run", "dry run"])


@pytest.fixture(autouse=True)
def emulator(holding: HoldingEmulator) -> HoldingEmulator:
    return holding


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("tonight.jsonl")


def fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def entry(alias: str) -> bytes:
    return entry_line(("ws", alias), STARTED)


def header(emulator: HoldingEmulator, age: timedelta = timedelta()) -> bytes:
    return header_line(f"{emulator.url}/v1", datetime.now(UTC) - age)


# Journals


async def test_the_same_command_resumes_from_its_journal(
    emulator: HoldingEmulator, command: Command, path: Path
) -> None:
    fill(Path("targets.csv"), b"ws,a\nws,b\nws,c\n")
    emulator.inject(*[Fault.SERVER_ERROR] * 4, alias="b")
    args = ("stop", "--no-verify", "--journal", path, "--from", "targets.csv")
    assert (await command(*args))[0] == 1
    emulator.received.clear()

    code, out, err = await command(*args, "-o", "json")

    assert emulator.received == {("ws", "b"): 1}
    resumed = {outcome["alias"]: outcome["resumed"] for outcome in outcomes_of(out)}
    assert resumed == {"a": True, "b": False, "c": True}
    assert set(results_of(out)) == {"stopped"}
    assert (code, without_times(err)) == (
        0,
        "3 of 3 no longer running after 0.0 s: 3 stopped; 2 from an earlier run, not sent again\n",
    )
    assert KEY.encode() not in content(path)


async def test_the_line_of_an_alias_says_that_it_is_from_the_journal(
    command: Command, path: Path
) -> None:
    await command("stop", "--journal", path, "ws", "a")
    _, out, _ = await command("stop", "--journal", path, "ws", "a", "b")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[:-1])
    assert lines["a"].endswith("from the journal of an earlier run, not sent again")
    assert "journal" not in lines["b"]


async def test_the_same_command_asks_again_for_a_runtime_that_was_not_found(
    emulator: HoldingEmulator, command: Command, path: Path
) -> None:
    args = ("stop", "--journal", path, "ws", "a", "late")
    assert (await command(*args))[0] == 1
    emulator.add_runtime("ws", "late")
    _, out, _ = await command("stop", "--dry-run", *args[1:])
    assert [target["alias"] for target in outcomes_of(out)] == ["late"]
    assert (await command(*args))[0] == 0
    assert emulator.received == {("ws", "a"): 1, ("ws", "late"): 2}


async def test_a_journal_in_use_exits_with_75_and_a_dry_run_reads_it(
    emulator: HoldingEmulator, command: Command, path: Path
) -> None:
    """Fault: it is 2, and a supervisor gives up while a file server holds a dead client's lock."""
    journal = Journal(path, f"{emulator.url}/v1")
    code, out, err = await command("stop", "--journal", path, "ws", "a")
    assert err.startswith(f"bctrl-async: error: the journal '{path}' is in use by another run. ")
    assert (code, out, err.count("\n")) == (75, "", 1)
    assert not emulator.requests
    code, _, err = await command("stop", "--dry-run", "--journal", path, "ws", "a")
    journal.close()
    assert (code, err) == (0, "Dry run: 1 to stop, 0 invalid\n")


@RUNS
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"workspace,alias\n", "it is not a journal"),
        (
            header_line("https://other.test/v1", STARTED),
            "it is of another server, https://other.test/v1",
        ),
    ],
)
async def test_a_file_that_is_not_a_journal_of_this_server_exits_with_2_and_is_unchanged(
    emulator: HoldingEmulator,
    command: Command,
    path: Path,
    data: bytes,
    *,
    why: str,
    option: tuple[str, ...],
) -> None:
    fill(path, data)
    code, out, err = await command("stop", *option, "--journal", path, "ws", "a")
    assert f"error: the journal '{path}' cannot be used: {why}" in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert content(path) == data
    assert not emulator.requests


@RUNS
async def test_an_old_journal_warns_once_on_stderr(
    emulator: HoldingEmulator, command: Command, path: Path, option: tuple[str, ...]
) -> None:
    """Fault: the second night skipped every runtime, printed nothing and exited with 0."""
    fill(path, header(emulator, timedelta(days=1, hours=2, minutes=3)) + entry("a"))
    code, _, err = await command("stop", *option, "--journal", path, "ws", "a")
    assert f"warning: the journal '{path}' is 1 day, 2:03:" in err
    assert (code, err.count("warning")) == (0, 1)
    assert not emulator.requests


@RUNS
async def test_a_journal_beyond_the_maximal_age_exits_with_2_and_stops_nothing(
    emulator: HoldingEmulator, command: Command, path: Path, option: tuple[str, ...]
) -> None:
    before = header(emulator, timedelta(hours=13))
    fill(path, before)
    args = ("stop", *option, "--journal", path, "ws", "a", "--journal-max-age")
    code, out, err = await command(*args, "12h")
    assert "cannot be used: it is 13:00:" in err
    assert "old; the limit is 12:00:00. " in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not emulator.requests
    assert content(path) == before
    assert (await command(*args, "1d"))[0] == 0


async def test_a_shard_without_runtimes_has_a_journal_too(command: Command, path: Path) -> None:
    """Fault: the report on all shards failed, because one had no journal."""
    args = ("stop", "ws", "--all", "--yes", "--kind", "desktop", "--journal", path)
    code, out, _ = await command(*args)
    assert (code, without_times(out)) == (0, "0 of 0 no longer running after 0.0 s\n")
    assert content(path)


# Dry runs


async def test_a_dry_run_needs_no_key_and_prints_lines_for_from(
    emulator: HoldingEmulator, command: Command, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.delenv("BCTRL_API_KEY")
    code, out, err = await command("stop", "--dry-run", "--journal", path, "ws", "a", "b")
    assert outcomes_of(out) == [{"workspace_id": "ws", "alias": alias} for alias in "ab"]
    assert (code, err) == (0, "Dry run: 2 to stop, 0 invalid\n")
    assert not emulator.requests
    assert not content(path)

    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    fill(path, out.encode())
    assert (await command("stop", "--from", path))[0] == 0
    assert emulator.received == {("ws", "a"): 1, ("ws", "b"): 1}


async def test_a_dry_run_with_invalid_targets_exits_with_1(emulator: HoldingEmulator) -> None:
    code, out, err = await stop_piped('ws,a\n"ws","日本"\nws,..', "--dry-run")
    assert [outcome["alias"] for outcome in outcomes_of(out)] == ["a", "日本"]
    dots, account = err.splitlines()
    assert dots.startswith("bctrl-async: error: could not stop '..': alias '..' ")
    assert account == "Dry run: 2 to stop, 1 invalid"
    assert code == 1
    assert not emulator.requests


@pytest.mark.parametrize("has_entry", [True, False])
@pytest.mark.parametrize("torn", [b"", b'{"journal"'])
async def test_a_dry_run_leaves_a_journal_as_a_crash_left_it(
    emulator: HoldingEmulator, command: Command, path: Path, torn: bytes, *, has_entry: bool
) -> None:
    """Fault: a dry run cut off the torn tail, or wrote a header."""
    before = (header(emulator) + entry("a")) * has_entry + torn
    fill(path, before)
    code, out, err = await command("stop", "--dry-run", "--journal", path, "ws", "a", "b")
    assert [target["alias"] for target in outcomes_of(out)] == ["a", "b"][has_entry:]
    assert f"Dry run: {2 - has_entry} to stop, " in err
    assert ("1 no longer running" in err) is has_entry
    assert (code, content(path)) == (0, before)
