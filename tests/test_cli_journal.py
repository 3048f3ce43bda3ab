"""The command's journals: `journal show`, their age, and dry runs that only read them."""

from __future__ import annotations

import asyncio
import io
import json
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import KEY
from helpers import BOUND, Command
from warm_server import program

from bctrl_async import BctrlTimeoutError, RuntimeRef, StopOutcome, StopResult
from bctrl_async.cli._redirects import check_redirects
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.journal import Journal
from bctrl_async.journal._format import Mark, entry_line, header_line, mark_line

SERVER = "https://api.test/v1"
STARTED = datetime(2026, 11, 24, 2, 30, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    for alias in "ab":
        emulator.add_runtime("ws", alias)
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tonight.jsonl"


def entry(alias: str, result: StopResult = StopResult.STOPPED) -> bytes:
    error = None if result.settled else BctrlTimeoutError("no answer")
    at = STARTED + timedelta(seconds=1.5)
    target = RuntimeRef("ws", alias)
    return entry_line(StopOutcome(index=0, target=target, result=result, error=error, at=at))


def write(path: Path, *entries: bytes, server: str = SERVER, started: datetime = STARTED) -> bytes:
    data = header_line(server, started) + b"".join(entries)
    path.write_bytes(data)
    return data


def fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def content(path: Path) -> bytes:
    return path.read_bytes()


def rows(out: str) -> dict[str, str]:
    return {line[:12].strip(): line[12:] for line in out.splitlines()}


class TestShow:
    async def test_it_shows_server_age_results_and_pending_targets(
        self, command: Command, path: Path
    ) -> None:
        before = write(
            path,
            *(entry("a"), entry("b", StopResult.UNKNOWN), entry("c", StopResult.NOT_FOUND)),
            *(entry("d"), entry("e")),
        )

        code, out, err = await command("journal", "show", path)

        found = rows(out)
        assert found.pop("started").startswith("2026-11-24T02:30:00Z, ")
        assert found == {
            "server": SERVER,
            "last entry": "2026-11-24T02:30:01.500000Z",
            "targets": "5: 3 stopped, 1 not_found, 1 unknown",
            "pending": "2: 1 not_found, 1 unknown",
            "complete": "no",
        }
        assert (code, err) == (0, "")
        assert content(path) == before

    async def test_it_shows_the_age(self, command: Command, path: Path) -> None:
        write(path, started=datetime.now(UTC) - timedelta(days=2, hours=3, minutes=1))

        found = rows((await command("journal", "show", path))[1])

        assert found["started"].endswith("Z, 2d3h ago")
        assert (found["last entry"], found["targets"]) == ("none", "0")

    async def test_it_prints_json(self, command: Command, path: Path) -> None:
        write(path, entry("a"), entry("b", StopResult.UNKNOWN), entry("c")[:30])

        code, out, err = await command("journal", "show", "-o", "json", path)

        found = json.loads(out)
        age = (datetime.now(UTC) - STARTED).total_seconds()
        assert found.pop("age") == pytest.approx(age, abs=60)
        assert found == {
            "file": str(path),
            "base_url": SERVER,
            "started": "2026-11-24T02:30:00Z",
            "updated": "2026-11-24T02:30:01.500000Z",
            "targets": 2,
            "counts": dict.fromkeys(StopResult, 0) | {"stopped": 1, "unknown": 1},
            "pending": 1,
            "complete": False,
            "torn": True,
        }
        assert (code, err) == (0, "")

    async def test_a_complete_run_is_shown(self, command: Command, path: Path) -> None:
        await command("stop", "--journal", path, "ws", "a")

        found = rows((await command("journal", "show", path))[1])

        assert found["complete"] == "yes, the last run read its whole input and had no failures"
        assert found["pending"] == "0"
        assert "torn" not in found

    async def test_what_was_not_read_to_its_end_is_named(
        self, command: Command, path: Path
    ) -> None:
        for targets, origin in ((3, None), (None, "stream")):
            journal = Journal(path, SERVER, targets=targets, origin=origin)
            journal.close(unread=True)

        found = rows((await command("journal", "show", path))[1])

        assert found["complete"] == "no, not read to the end: stream; a list of 3 targets"

    async def test_a_complete_run_may_have_pending_targets_that_were_not_found(
        self, command: Command, path: Path
    ) -> None:
        """Fault: a target was pending beside a run that "settled every target"."""
        await command("stop", "--ignore-not-found", "--journal", path, "ws", "a", "nobody")

        found = rows((await command("journal", "show", path))[1])

        assert found["complete"] == "yes, the last run read its whole input and had no failures"
        assert found["pending"] == "1: 1 not_found"

    async def test_a_complete_run_may_have_left_runtimes_running(
        self, command: Command, path: Path
    ) -> None:
        """Fault: it "had no failures", also if Ctrl-C ended it while it polled them."""
        mark = mark_line(Mark(STARTED + timedelta(seconds=2)))
        write(path, entry("a", StopResult.ACCEPTED), entry("b"), mark)

        found = rows((await command("journal", "show", path))[1])

        assert found["complete"] == (
            "yes, the last run read its whole input and left 1 that may still be running"
        )

    async def test_a_journal_in_use_is_shown_and_stays_as_it_is(
        self, command: Command, path: Path
    ) -> None:
        write(path, entry("a"))
        running = Journal(path, SERVER)
        before = content(path) + entry("b")[:30]
        fill(path, before)

        code, out, _ = await command("journal", "show", path)

        assert rows(out)["torn"].startswith("the last line is cut short: a run is writing it")
        assert code == 0
        assert content(path) == before
        running.close()

    async def test_no_text_of_a_crafted_file_reaches_the_terminal_raw(
        self, command: Command, path: Path
    ) -> None:
        write(path, server="https://\x1b[31m\u202e.test")

        code, out, _ = await command("journal", "show", path)

        assert rows(out)["server"] == r"'https://\x1b[31m\u202e.test'"
        assert code == 0

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"", "is empty"),
            (b"my notes\n", "it is not a journal"),
            (header_line(SERVER, STARTED) + b"x\n" + entry("a"), "line 2 is damaged"),
        ],
    )
    async def test_a_file_that_is_not_a_journal_exits_with_2(
        self, command: Command, path: Path, data: bytes, said: str
    ) -> None:
        fill(path, data)

        code, out, err = await command("journal", "show", path)

        assert err.startswith(f"bctrl-async: error: the journal '{path}' ")
        assert said in err
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert content(path) == data

    def test_a_full_disk_for_its_output_exits_with_1(self, path: Path) -> None:
        write(path)
        with Path("/dev/full").open("wb") as full:
            ended = subprocess.run(
                [*program(), "journal", "show", path],
                stdout=full,
                stderr=subprocess.PIPE,
                timeout=BOUND,
                check=False,
            )
        assert ended.stderr.startswith(b"bctrl-async: error: cannot write to stdout: ")
        assert ended.returncode == 1

    async def test_journal_alone_shows_its_help(self, command: Command) -> None:
        code, out, err = await command("journal")

        assert "Usage: bctrl-async journal " in out
        assert (code, err) == (0, "")


class TestAge:
    async def test_an_old_journal_warns_once_on_stderr(
        self, emulator: Emulator, command: Command, path: Path
    ) -> None:
        """Fault: the second night skipped every runtime, printed nothing and exited with 0."""
        old = datetime.now(UTC) - timedelta(days=1, hours=2, minutes=3)
        write(path, entry("a"), server=f"{emulator.url}/v1", started=old)
        for option in (("--dry-run",), ()):
            code, _, err = await command("stop", *option, "--journal", path, "ws", "a")

            assert err.startswith(f"bctrl-async: warning: the journal '{path}' was begun 1d2h ago:")
            assert err.count("warning") == 1
            assert code == 0
        assert not emulator.requests

    async def test_a_complete_journal_warns(self, command: Command, path: Path) -> None:
        _, _, first = await command("stop", "--journal", path, "ws", "a")
        _, _, second = await command("stop", "--journal", path, "ws", "a")

        assert first == ""
        assert "s ago, and its last run is complete: what it has as stopped" in second

    async def test_a_journal_beyond_the_maximal_age_exits_with_2_and_stops_nothing(
        self, emulator: Emulator, command: Command, path: Path
    ) -> None:
        old = datetime.now(UTC) - timedelta(hours=13)
        before = write(path, server=f"{emulator.url}/v1", started=old)
        args = ("--journal", path, "--journal-max-age", "12h", "ws", "a")
        for option in ((), ("--dry-run",)):
            code, out, err = await command("stop", *option, *args)

            assert "cannot be resumed: it was begun 13h ago, and the limit is 12h. " in err
            assert (code, out, err.count("\n")) == (2, "", 1)
        assert not emulator.requests
        assert content(path) == before

        code, _, err = await command("stop", *args[:3], "1d", "ws", "a")
        assert (code, err) == (0, "")

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ("--journal f --journal-max-age 12 ws a", "'12' has no unit: write 12s, 12m or 12h"),
            ("--journal f --journal-max-age 0s ws a", "'--journal-max-age': 0 is not a positive"),
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

    async def test_it_exits_with_2_for_a_journal_of_another_server(
        self, command: Command, path: Path
    ) -> None:
        write(path)
        code, _, err = await command("stop", "--dry-run", "--journal", path, "ws", "a")

        assert "it belongs to another server, https://api.test/v1" in err
        assert code == 2


async def test_a_target_that_was_not_found_is_asked_for_by_the_next_run(
    emulator: Emulator, command: Command, path: Path
) -> None:
    emulator.inject(Fault.SERVER_ERROR, alias="late")
    await command("stop", "--journal", path, "ws", "late")
    emulator.add_runtime("ws", "late")

    code, out, _ = await command("stop", "--journal", path, "ws", "late")

    assert "1 stopped" in out
    assert code == 0


class TestRedirects:
    """Fault: with `--journal X > X`, records overwrote the journal, and the exit code was 0."""

    async def run(self, command: str, path: Path) -> tuple[int | None, str, str]:
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", f"{shlex.join(program())} {command}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=path.parent,
        )
        async with asyncio.timeout(30):
            out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    @pytest.mark.parametrize(
        ("command", "problem"),
        [
            (
                "stop --journal X -o json ws a >> X",
                "stdout and --journal are the same file: X",
            ),
            ("stop --journal ./X ws a >> X", "stdout and --journal are the same file: ./X"),
            ("stop --from X >> X", "stdout and --from are the same file: X"),
            ("stop --dry-run --from X >> X", "stdout and --from are the same file: X"),
            ("stop --from - < X >> X", "stdout and --from are the same file"),
            ("stop --journal X ws a 2>> X", "stderr and --journal are the same file: X"),
            ("stop --from X --journal Y 2>> X", "stderr and --from are the same file: X"),
            ("stop --from X --all 2>> X", "stderr and --from are the same file: X"),
            ("report X >> X", "stdout and JOURNAL are the same file: X"),
            ("report Y X >> X", "stdout and JOURNAL are the same file: X"),
            ("report Y --from X >> X", "stdout and --from are the same file: X"),
            ("journal show X >> X", "stdout and FILE are the same file: X"),
        ],
    )
    async def test_output_that_would_damage_a_file_of_the_command_is_rejected(
        self, path: Path, emulator: Emulator, command: str, problem: str
    ) -> None:
        path = path.with_name("X")
        before = write(path, entry("a"))
        code, out, err = await self.run(command, path)
        stream = problem.split(maxsplit=1)[0]
        message = f"bctrl-async: error: {problem}. Redirect {stream} to another file\n"
        assert (code, out + err) == (2, message)
        assert content(path) == before
        assert emulator.requests == []

    @pytest.mark.parametrize(
        "command",
        [
            "stop --from X >> X 2>&1",
            "stop --journal X ws a >> X 2>> X",
            "stop --from X --journal Y >> X 2>> Y",
            "report X >> X 2>&1",
            "journal show X >> X 2>&1",
        ],
    )
    async def test_without_a_stream_for_the_error_only_the_exit_code_tells_of_it(
        self, path: Path, emulator: Emulator, command: str
    ) -> None:
        """Fault: the error itself was appended to the file."""
        path = path.with_name("X")
        before, other = write(path, entry("a")), write(path.with_name("Y"), entry("a"))
        assert await self.run(command, path) == (2, "", "")
        assert (content(path), content(path.with_name("Y"))) == (before, other)
        assert emulator.requests == []

    async def test_a_journal_that_the_shell_has_emptied_is_named_and_nothing_is_sent(
        self, path: Path, emulator: Emulator
    ) -> None:
        write(path, entry("a"))
        code, _, err = await self.run(f"stop --journal {path} -o json ws a > {path}", path)
        assert (code, content(path)) == (2, b"")
        assert f"stdout and --journal are the same file: {path}" in err
        assert emulator.requests == []

    def test_a_stream_without_a_descriptor_is_no_file(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(path)
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.StringIO())
        check_redirects([("--from", str(path))])

    @pytest.mark.parametrize(
        "redirects", ["> out 2> err", ">> out 2>> out", "> /dev/null 2> /dev/null", ">&- 2>&-"]
    )
    async def test_output_to_other_files_is_not_rejected(
        self, path: Path, emulator: Emulator, redirects: str
    ) -> None:
        path.with_name("targets").write_text("ws,a\n")
        command = f"stop --journal {path} --from targets {redirects}"
        code, _, _ = await self.run(command, path)
        assert code == 0
        assert len(emulator.requests) == 1
