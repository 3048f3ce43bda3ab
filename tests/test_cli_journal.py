"""The command's journals: their age, and dry runs that only read them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import KEY
from helpers import Command
from journal_lines import entry_line, header_line

from bctrl_async.emulator import Emulator
from bctrl_async.journal import Journal

SERVER = "https://api.test/v1"
STARTED = datetime(2026, 11, 24, 2, 30, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    for alias in "ab":
        emulator.add_runtime("ws", alias)
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tonight.jsonl"


def entry(alias: str) -> bytes:
    return entry_line(("ws", alias), STARTED)


def write(path: Path, *entries: bytes, server: str = SERVER, started: datetime = STARTED) -> bytes:
    data = header_line(server, started) + b"".join(entries)
    path.write_bytes(data)
    return data


def fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def content(path: Path) -> bytes:
    return path.read_bytes()


class TestAge:
    async def test_an_old_journal_warns_once_on_stderr(
        self, emulator: Emulator, command: Command, path: Path
    ) -> None:
        """Fault: the second night skipped every runtime, printed nothing and exited with 0."""
        old = datetime.now(UTC) - timedelta(days=1, hours=2, minutes=3)
        write(path, entry("a"), server=f"{emulator.url}/v1", started=old)
        for option in (("--dry-run",), ()):
            code, _, err = await command("stop", *option, "--journal", path, "ws", "a")

            assert f"warning: the journal '{path}' is 1 day, 2:03:" in err.replace("\n", " ")
            assert err.count("warning") == 1
            assert code == 0
        assert not emulator.requests

    async def test_a_journal_beyond_the_maximal_age_exits_with_2_and_stops_nothing(
        self, emulator: Emulator, command: Command, path: Path
    ) -> None:
        old = datetime.now(UTC) - timedelta(hours=13)
        before = write(path, server=f"{emulator.url}/v1", started=old)
        args = ("--journal", path, "--journal-max-age", "12h", "ws", "a")
        for option in ((), ("--dry-run",)):
            code, out, err = await command("stop", *option, *args)

            assert "cannot be used: it is 13:00:" in err
            assert "old; the limit is 12:00:00. " in err
            assert (code, out, err.count("\n")) == (2, "", 1)
        assert not emulator.requests
        assert content(path) == before

        code, _, err = await command("stop", *args[:3], "1d", "ws", "a")
        assert (code, err) == (0, "")

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ("--journal f --journal-max-age 12 ws a", "'12' is not a duration such as 500ms"),
            ("--journal f --journal-max-age 0s ws a", "for --journal-max-age. Must be > 0"),
            ("--journal-max-age 12h ws a", "--journal-max-age needs --journal"),
        ],
    )
    async def test_an_age_that_cannot_be_used_is_a_usage_error(
        self, command: Command, args: str, said: str
    ) -> None:
        code, out, err = await command("stop", *args.split())

        assert said in err
        assert (code, out, err.count("\n")) == (2, "", 1)


class TestDryRun:
    async def test_it_leaves_a_torn_journal_unchanged(
        self, emulator: Emulator, command: Command, path: Path
    ) -> None:
        """Fault: a dry run cut off the torn tail."""
        now = datetime.now(UTC)
        before = write(path, entry("a"), entry("b")[:30], server=f"{emulator.url}/v1", started=now)

        code, out, err = await command("stop", "--dry-run", "--journal", path, "ws", "a", "b")

        assert [json.loads(line)["alias"] for line in out.splitlines()] == ["b"]
        assert err == "Dry run: 1 to stop, 1 no longer running, 0 invalid\n"
        assert code == 0
        assert content(path) == before

    async def test_it_reads_a_journal_in_use(
        self, emulator: Emulator, command: Command, path: Path
    ) -> None:
        """Fault: a dry run locked the journal, so that it failed beside a run or made one fail."""
        running = Journal(path, f"{emulator.url}/v1")
        code, _, err = await command("stop", "--dry-run", "--journal", path, "ws", "a")
        running.close()

        assert (code, err) == (0, "Dry run: 1 to stop, 0 invalid\n")

    @pytest.mark.parametrize("data", [b"", b'{"journal"'])
    async def test_it_leaves_an_empty_journal_empty(
        self, command: Command, path: Path, data: bytes
    ) -> None:
        """Fault: a dry run wrote a header."""
        fill(path, data)
        code, _, _ = await command("stop", "--dry-run", "--journal", path, "ws", "a")

        assert code == 0
        assert content(path) == data
