"""The journal of a bulk stop: its format, its errors, and resumed runs."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock
from uuid import UUID

import pytest
from helpers import BOUND, wait_for_requests
from servers import http_answer, raw_server

from bctrl_async import (
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlSession,
    BctrlTimeoutError,
    RetryPolicy,
    RuntimeFilter,
    RuntimeRef,
    RuntimeState,
    StopBatch,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.filters import list_origin
from bctrl_async.journal import (
    Journal,
    JournalContent,
    JournalInUseError,
    read_journal,
    read_journals,
)
from bctrl_async.journal import _run as module
from bctrl_async.journal._content import format_age
from bctrl_async.journal._format import BegunMark, _seal, header_line, mark_line

Connect = Callable[..., BctrlSession]

KEY = "emulator-key"
SERVER = "https://api.test/v1"
HEADER = header_line(SERVER, datetime.now(UTC))
is_header = re.compile(
    rb'\{"journal":"bctrl_async","version":2,"base_url":"https://api.test/v1",'
    rb'"started":"[-0-9T:.]+Z","crc":"[0-9a-f]{8}"\}\n'
).fullmatch
MAGIC = len('{"journal":"bctrl_async"')
ONCE = RetryPolicy(attempts=1, base=0.001, cap=0.001)
TWO = [("ws-1", "a"), ("ws-1", "b")]
NAMES = [f"r{number}" for number in range(40)]
MANY = [("ws-1", name) for name in NAMES]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stops.jsonl"


@pytest.fixture
def runtimes(emulator: Emulator) -> None:
    for name in ("a", "b", "c", "d"):
        emulator.add_runtime("ws-1", name)


def outcome(
    index: int,
    alias: str,
    result: StopResult = StopResult.STOPPED,
    error: BctrlError | None = None,
    **rest: float,
) -> StopOutcome:
    return StopOutcome(
        index=index,
        target=RuntimeRef("ws-1", alias),
        result=result,
        error=error,
        attempts=int(rest.get("attempts", 1)),
        elapsed=rest.get("elapsed", 0.0),
    )


def write(path: Path, *outcomes: StopOutcome, server: str = SERVER) -> bytes:
    """Write a journal and return its content."""
    journal = Journal(path, server)
    for each in outcomes:
        journal.write(each)
    journal.close()
    return path.read_bytes()


def header(path: Path) -> bytes:
    return path.read_bytes().splitlines(keepends=True)[0]


def read(path: str | Path) -> JournalContent:
    content = read_journal(path)
    assert content is not None
    return content


def content(path: Path) -> bytes:
    return path.read_bytes()


def fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def settled(path: Path, server: str = SERVER) -> set[str]:
    """Open and close a journal; return the aliases that it has settled."""
    journal = Journal(path, server)
    journal.close()
    return {target.alias for target in journal.not_running}


def not_sent(alias: str) -> StopOutcome:
    return outcome(0, alias, StopResult.NOT_SENT, BctrlError("not sent"), attempts=0)


def read_outcomes(path: Path) -> list[StopOutcome]:
    content = read_journal(path)
    assert content is not None
    return list(content.outcomes.values())


def lines(path: Path) -> list[dict[str, object]]:
    """Return the entries, without the marks."""
    found = [json.loads(line) for line in path.read_bytes().splitlines()[1:]]
    return [line for line in found if "alias" in line]


def results(path: Path) -> dict[object, object]:
    return {line["alias"]: line["result"] for line in lines(path)}


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Limit the size of every file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND):
        while not happened():
            await asyncio.sleep(0.001)


async def done(batch: StopBatch) -> StopReport:
    return await batch


class TestFile:
    def test_a_new_file_starts_with_a_header_that_names_server_and_time(self, path: Path) -> None:
        before = datetime.now(UTC)

        assert is_header(write(path))
        started = datetime.fromisoformat(json.loads(header(path))["started"])
        assert before <= started <= datetime.now(UTC)

    def test_each_outcome_is_one_line_of_json_after_the_header(self, path: Path) -> None:
        error = BctrlConflictError(
            "the server answered 409 runtime.busy: in use",
            status=409,
            code="runtime.busy",
            message="in use",
            request_id="req_7",
            hint="wait",
            body='{"code": "runtime.busy"}',
        )
        silence = BctrlTimeoutError("no answer", may_have_stopped=True)

        written = write(
            path,
            outcome(0, "a", elapsed=0.12345678, attempts=3),
            outcome(1, "b", StopResult.REJECTED, error, attempts=0, elapsed=2.5),
            outcome(2, "c", StopResult.UNKNOWN, silence, attempts=0, elapsed=0.5),
        )

        assert is_header(header(path))
        assert written.count(b"\n") == 4
        busy = {
            "type": "BctrlConflictError",
            "message": "the server answered 409 runtime.busy: in use",
            "status": 409,
            "code": "runtime.busy",
            "request_id": "req_7",
        }
        silent = {"type": "BctrlTimeoutError", "message": "no answer", "may_have_stopped": True}
        ws = {"workspace_id": "ws-1"}
        found = lines(path)
        for line in found:
            assert re.fullmatch(r"[0-9a-f]{8}", str(line.pop("crc")))
            assert datetime.fromisoformat(str(line.pop("at"))).utcoffset() == timedelta()
        assert found == [
            ws
            | {"index": 0, "alias": "a", "result": "stopped", "attempts": 3, "elapsed": 0.123457},
            ws | {"index": 1, "alias": "b", "result": "rejected", "elapsed": 2.5, "error": busy},
            ws | {"index": 2, "alias": "c", "result": "unknown", "elapsed": 0.5, "error": silent},
        ]

    @pytest.mark.parametrize("alias", ["a\nb", "a\r\nb", "a\u2028b", '"}', "\x00", "é", "💥"])
    def test_no_alias_breaks_a_line(self, path: Path, alias: str) -> None:
        write(path, outcome(0, alias), outcome(1, "last"))

        assert path.read_bytes().count(b"\n") == 3
        assert settled(path) == {alias, "last"}

    @pytest.mark.parametrize("half", ["\ud800", "a\udfffb"])
    def test_a_lone_surrogate_is_written_and_read_back(self, path: Path, half: str) -> None:
        error = BctrlConfigError(f"alias {half!r} is no text, nor is {half}")

        written = write(
            path,
            outcome(0, half),
            outcome(1, "b", StopResult.REJECTED, error, attempts=0),
            outcome(2, half + "x", StopResult.REJECTED, error),
            outcome(3, "last"),
        )

        assert written.decode("ascii").count("\n") == 5
        assert [line["alias"] for line in lines(path)] == [half, "b", half + "x", "last"]
        assert settled(path) == {half, "last"}
        assert path.read_bytes().startswith(written)

    def test_partial_writes_are_completed(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = os.write

        def slow(file: int, data: bytes) -> int:
            return whole(file, data[:1])

        monkeypatch.setattr(os, "write", slow)
        write(path, outcome(0, "a"), outcome(1, "b"))
        monkeypatch.undo()

        assert is_header(header(path))
        assert settled(path) == {"a", "b"}

    def test_a_line_is_in_the_file_before_the_journal_is_closed(self, path: Path) -> None:
        journal = Journal(path, SERVER)
        journal.write(outcome(0, "a"))
        seen = results(path)
        journal.close()

        assert seen == {"a": "stopped"}

    def test_the_file_is_only_appended_to(self, path: Path) -> None:
        before = write(path, outcome(0, "a"))
        after = write(path, outcome(0, "b"))

        assert after.startswith(before)
        assert settled(path) == {"a", "b"}


class TestSettled:
    def test_only_runtimes_that_have_stopped_are_read_back(self, path: Path) -> None:
        error = BctrlError("why")
        write(
            path, *(outcome(0, result, result, error) for result in StopResult), outcome(9, "last")
        )

        assert settled(path) == {
            *("stopped", "already_stopped"),
            "last",
        }

    def test_an_earlier_outcome_is_read_back_and_marked_as_resumed(self, path: Path) -> None:
        first = outcome(7, "a", StopResult.ALREADY_STOPPED, attempts=3, elapsed=1.25)
        write(path, first)
        journal = Journal(path, SERVER)
        journal.close()

        assert journal.not_running == {
            RuntimeRef("ws-1", "a"): StopOutcome(
                index=7,
                target=RuntimeRef("ws-1", "a"),
                result=StopResult.ALREADY_STOPPED,
                attempts=3,
                elapsed=1.25,
                at=first.at,
                resumed=True,
            )
        }

    def test_an_entry_that_settles_a_target_overrides_an_earlier_one(self, path: Path) -> None:
        write(path, outcome(0, "a", StopResult.UNKNOWN, BctrlError("why")))
        assert settled(path) == set()

        write(path, outcome(4, "a", StopResult.ALREADY_STOPPED))
        journal = Journal(path, SERVER)
        journal.close()

        known = journal.not_running["ws-1", "a"]  # type: ignore[index]  # Equal to a target.
        assert known.result is StopResult.ALREADY_STOPPED

    def test_the_same_alias_of_another_workspace_is_another_runtime(self, path: Path) -> None:
        write(path, outcome(0, "a"))
        journal = Journal(path, SERVER)
        journal.close()

        assert RuntimeRef("ws-2", "a") not in journal.not_running


class TestTornTail:
    """A crash or a full disk can cut the last line anywhere."""

    @pytest.mark.parametrize("half", ["b", "\ud800"])
    @pytest.mark.parametrize("filler", [b"", b"\0"], ids=["cut", "NUL"])
    def test_a_last_line_cut_anywhere_is_dropped_and_the_rest_is_kept(
        self, path: Path, filler: bytes, half: str
    ) -> None:
        whole = write(path, outcome(0, "a"), outcome(1, half))
        kept = b"".join(whole.splitlines(keepends=True)[:2])
        length = len(whole) - len(kept)
        for cut in range(length):
            path.write_bytes(whole[: len(kept) + cut] + filler * (length - cut))

            assert settled(path) == {"a"}, cut
            assert path.read_bytes() == kept, cut

    @pytest.mark.parametrize(
        "end",
        [b"\0", b"\0" * 5000, b"\0\0\n", b"\n", b"{}\n", b"[]\n", b"\xff\n", b"{", b"}\n", b"3"],
    )
    def test_an_invalid_last_line_is_dropped(self, path: Path, end: bytes) -> None:
        whole = write(path, outcome(0, "a"), outcome(1, "b"))
        path.write_bytes(whole + end)

        assert settled(path) == {"a", "b"}
        assert path.read_bytes() == whole

    def test_the_next_entry_starts_a_new_line(self, path: Path) -> None:
        whole = write(path, outcome(0, "a"), outcome(1, "b"))
        path.write_bytes(whole[:-5])

        write(path, outcome(0, "c"))

        assert settled(path) == {"a", "c"}
        assert [line["alias"] for line in lines(path)] == ["a", "c"]

    def test_a_header_cut_after_its_magic_is_rewritten(self, path: Path) -> None:
        for cut in range(MAGIC, len(HEADER)):
            path.write_bytes(HEADER[:cut])
            write(path, outcome(0, "a"))
            assert is_header(header(path)), cut
            assert settled(path) == {"a"}, cut

    def test_a_header_cut_within_its_magic_is_rewritten(self, path: Path) -> None:
        for cut in range(1, MAGIC):
            path.write_bytes(HEADER[:cut])
            assert is_header(write(path)), cut

    def test_an_empty_file_becomes_a_journal(self, path: Path) -> None:
        path.touch()

        assert is_header(write(path))


# Beyond what msgspec reads in any version of Python, within the limit of a line.
_DEEP = 450_000
ENTRY = (
    b'{"index":0,"workspace_id":"ws-1","alias":"a","result":"stopped",'
    b'"at":"2026-11-26T02:30:00.5Z"}'
)
LINE = _seal(ENTRY)

DAMAGES = {
    "NUL": b"\0" * 20 + b"\n",
    "cut": LINE[:20] + b"\n",
    "two in one": LINE[:20] + LINE,
    "empty": b"\n",
    "a list": b"[1]\n",
    "text": b"hello\n",
    "another alias": LINE.replace(b'"a"', b'"b"'),
    "no checksum": ENTRY + b"\n",
}
CRAFTED = {
    "not UTF-8": ENTRY.replace(b'"a"', b'"\xff"'),
    "a field is missing": ENTRY.replace(b'"alias":"a",', b""),
    "an unknown result": ENTRY.replace(b"stopped", b"vanished"),
    "a wrong type": ENTRY.replace(b'"a"', b"7"),
    "NaN for JSON": ENTRY.replace(b":0", b":NaN"),
    "a number of 10,000 digits": ENTRY.replace(b":0", b":1" + b"0" * 9999),
    "deep nesting": ENTRY[:-1] + b',"x":' + b"[" * _DEEP + b"]" * _DEEP + b"}",
    "deep nesting and a lone surrogate": ENTRY.replace(b'"a"', rb'"\ud800"')[:-1]
    + b',"x":'
    + b"[" * _DEEP
    + b"]" * _DEEP
    + b"}",
    "a time without a zone": ENTRY.replace(b"5Z", b"5"),
    "a time that is none": ENTRY.replace(b"-11-", b"-13-"),
    "a mark without a time": b'{"completed":"yes"}',
}
"""Lines that a checksum does not protect: it is right."""

FOREIGN = {
    "text": b"ws-1,crm\nws-1,mail\n",
    "text without a line end": b"ws-1,crm",
    "binary": bytes(range(256)) * 10,
    "NUL": b"\0" * len(HEADER),
    "an empty line": b"\n",
    "JSON": b'{"targets": []}\n',
    "other JSON lines": b'{"index": 1}\n{"index": 2}\n',
    "another journal": b'{"journal":"systemd","version":1,"base_url":"x"}\n',
    "outcomes without a header": LINE,
    "a header in the middle": LINE + HEADER,
    "a header after a space": b" " + HEADER,
    "a header as UTF-16": HEADER.decode().encode("utf-16"),
}

VERSIONS = {
    "an earlier one": b'{"journal":"bctrl_async","version":1,"base_url":"https://api.test/v1"}\n',
    "a later one": HEADER.replace(b":2,", b":3,"),
    "a later one with outcomes": HEADER.replace(b":2,", b":3,") + b'{"anything":"else"}\n',
    "a later one of another kind": b'{"journal":"bctrl_async","version":3}\n',
}
HEADERS = {
    "a version of another type": b'{"journal":"bctrl_async","version":"2b"}',
    "no server": b'{"journal":"bctrl_async","version":2}',
    "no JSON": b'{"journal":"bctrl_async" version 2',
    "not UTF-8": HEADER.replace(b"api", b"ap\xff"),
    "NUL": HEADER.replace(b"api", b"ap\0"),
    "deep nesting": b'{"journal":"bctrl_async","version":2,"x":' + b"[" * _DEEP + b"}",
    "a time without a zone": b'{"journal":"bctrl_async","version":2,"base_url":"x",'
    b'"started":"2026-11-26T02:30:00"}',
}


class TestRejectedFile:
    """A file that is not a journal of this version and server is left unchanged."""

    def rejected(self, path: Path, data: bytes) -> str:
        path.write_bytes(data)
        before = path.stat()
        with pytest.raises(BctrlConfigError) as caught:
            Journal(path, SERVER)
        after = path.stat()
        assert path.read_bytes() == data
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
        assert str(path) in str(caught.value)
        assert "this one is unchanged" in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
    def test_a_damaged_line_in_the_middle_is_an_error(self, path: Path, damage: bytes) -> None:
        assert "line 3 is damaged" in self.rejected(path, HEADER + LINE + damage + LINE)

    @pytest.mark.parametrize("entry", CRAFTED.values(), ids=CRAFTED.keys())
    def test_an_unreadable_entry_in_the_middle_is_an_error(self, path: Path, entry: bytes) -> None:
        data = HEADER + LINE + _seal(entry) + LINE

        assert "line 3 is damaged" in self.rejected(path, data)

    @pytest.mark.parametrize("damage", HEADERS.values(), ids=HEADERS.keys())
    def test_a_damaged_header_is_an_error(self, path: Path, damage: bytes) -> None:
        damage = damage.removesuffix(b"\n")
        for line in (damage + b"\n", _seal(damage)):
            assert "line 1 is damaged" in self.rejected(path, line + LINE)

    def test_a_flipped_bit_in_the_server_is_a_damaged_header(self, path: Path) -> None:
        data = HEADER.replace(b"api", b"bpi") + LINE

        assert "line 1 is damaged" in self.rejected(path, data)

    def test_a_damaged_line_before_a_torn_one_is_an_error(self, path: Path) -> None:
        assert "line 2 is damaged" in self.rejected(path, HEADER + b"{}\n" + LINE[:10])

    @pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN.keys())
    def test_a_file_of_another_kind_is_an_error(self, path: Path, data: bytes) -> None:
        assert "it is not a journal" in self.rejected(path, data)

    @pytest.mark.parametrize("data", VERSIONS.values(), ids=VERSIONS.keys())
    def test_another_version_is_an_error(self, path: Path, data: bytes) -> None:
        assert "another version wrote it" in self.rejected(path, data)

    def test_another_server_is_an_error(self, path: Path) -> None:
        data = header_line("https://staging.test/v1", datetime.now(UTC)) + LINE

        assert "it belongs to another server, https://staging.test/v1" in self.rejected(path, data)

    def test_a_rejected_file_is_unlocked(self, path: Path) -> None:
        self.rejected(path, b"hello\n")
        path.write_bytes(b"")

        assert is_header(write(path))


def test_a_descriptor_inherited_by_a_child_does_not_keep_the_lock(path: Path) -> None:
    journal = Journal(path, SERVER)
    inherited = os.dup(journal._file)  # As after a fork: one more descriptor of the same open file.
    journal.close()
    Journal(path, SERVER).close()
    os.close(inherited)


class TestPath:
    def test_a_folder_is_rejected(self, tmp_path: Path) -> None:
        with pytest.raises(BctrlConfigError, match=r"cannot be opened: Is a directory") as caught:
            Journal(tmp_path, SERVER)
        assert repr(str(tmp_path)) in str(caught.value)

    def test_a_file_in_a_missing_folder_is_rejected(self, tmp_path: Path) -> None:
        with pytest.raises(BctrlConfigError, match="cannot be opened: No such file"):
            Journal(tmp_path / "missing" / "file", SERVER)
        assert not (tmp_path / "missing").exists()

    def test_an_invalid_file_name_is_rejected(self, tmp_path: Path) -> None:
        with pytest.raises(BctrlConfigError, match=r"cannot be opened: .*null"):
            Journal(tmp_path / "a\0b", SERVER)

    def test_a_read_error_is_a_clear_error(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        path.write_bytes(HEADER)
        monkeypatch.setattr(os, "dup", fail)
        with pytest.raises(BctrlConfigError, match="cannot be opened: Input/output error"):
            Journal(path, SERVER)

    def test_a_file_system_without_locks_is_a_clear_error(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(module, "_lock", fail)
        with pytest.raises(BctrlConfigError, match="cannot be opened: No locks available"):
            Journal(path, SERVER)

    @pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
    def test_a_device_is_rejected(self, device: str) -> None:
        with pytest.raises(BctrlConfigError, match=f"{device}' cannot be resumed: it is not a reg"):
            Journal(device, SERVER)

    def test_a_pipe_is_rejected_without_blocking(self, path: Path) -> None:
        os.mkfifo(path)
        with pytest.raises(BctrlConfigError, match="it is not a regular file"):
            Journal(path, SERVER)
        assert path.is_fifo()

    def test_a_path_may_be_a_string(self, path: Path) -> None:
        Journal(str(path), SERVER).close()

        assert is_header(path.read_bytes())


class TestLock:
    def test_a_journal_that_is_open_cannot_be_opened_again(self, path: Path) -> None:
        first = Journal(path, SERVER)
        first.write(outcome(0, "a"))
        before = path.read_bytes()
        with pytest.raises(JournalInUseError, match="in use by another run") as caught:
            Journal(path, SERVER)
        assert str(path) in str(caught.value)
        assert path.read_bytes() == before

        first.write(outcome(1, "b"))  # The failed attempts did not unlock it.
        with pytest.raises(BctrlConfigError, match="in use by another run"):
            Journal(path, SERVER)
        first.close()
        assert settled(path) == {"a", "b"}

    def test_the_lock_is_on_the_file_not_on_its_name(self, path: Path) -> None:
        first = Journal(path, SERVER)
        other = path.with_name("link")
        other.symlink_to(path)
        with pytest.raises(BctrlConfigError, match="in use by another run"):
            Journal(other, SERVER)
        first.close()

    def test_a_file_in_use_is_not_read(self, path: Path) -> None:
        """A line that another run is writing may look torn; it must not be cut off."""
        first = Journal(path, SERVER)
        with path.open("ab") as half:
            half.write(LINE[:20])
        before = path.read_bytes()
        with pytest.raises(BctrlConfigError, match="in use by another run"):
            Journal(path, SERVER)
        assert path.read_bytes() == before
        first.close()

    def test_the_lock_holds_against_other_processes(self, path: Path) -> None:
        program = (
            "import sys\nfrom bctrl_async.journal import Journal\n"
            "try: Journal(*sys.argv[1:])\nexcept ValueError as error: print(error)"
        )
        first = Journal(path, SERVER)
        run = subprocess.run(
            [sys.executable, "-c", program, str(path), SERVER],
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=True,
        )
        first.close()

        assert "in use by another run" in run.stdout

    def test_a_killed_process_leaves_its_lines_and_no_lock(self, path: Path) -> None:
        program = (
            "import os, signal, sys\nfrom bctrl_async import RuntimeRef, StopOutcome, StopResult\n"
            "from bctrl_async.journal import Journal\njournal = Journal(*sys.argv[1:])\n"
            "target = RuntimeRef('ws-1', 'a')\n"
            "journal.write(StopOutcome(index=0, target=target, result=StopResult.STOPPED))\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )
        run = subprocess.run(
            [sys.executable, "-c", program, str(path), SERVER],
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=False,
        )

        assert (run.returncode, run.stderr) == (-9, "")
        assert settled(path) == {"a"}


class TestDisk:
    def test_a_full_disk_is_an_error_that_names_the_file(self, path: Path) -> None:
        journal = Journal(path, SERVER)
        with (
            disk_of(len(HEADER) + 10),
            pytest.raises(BctrlError, match="cannot be written: File too large") as caught,
        ):
            journal.write(outcome(0, "a"))
        journal.close()

        assert repr(str(path)) in str(caught.value)
        assert "Free some space" in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)
        assert path.stat().st_size == len(HEADER) + 10
        assert settled(path) == set()
        assert is_header(path.read_bytes())

    def test_a_disk_without_room_for_the_header_is_an_error_and_leaves_no_lock(
        self, path: Path
    ) -> None:
        with disk_of(MAGIC + 10), pytest.raises(BctrlError, match="cannot be written"):
            Journal(path, SERVER)

        assert path.read_bytes() == HEADER[: MAGIC + 10]
        assert is_header(write(path))

    def test_a_failed_flush_is_an_error_and_leaves_no_lock(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        journal = Journal(path, SERVER)
        journal.write(outcome(0, "a"))
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(BctrlError, match="cannot be written: Input/output error"):
            journal.close()
        monkeypatch.undo()

        assert settled(path) == {"a"}

    def test_close_flushes_the_whole_file(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes: list[int] = []

        def record(file: int) -> None:
            sizes.append(os.fstat(file).st_size)

        monkeypatch.setattr(os, "fsync", record)
        write(path, outcome(0, "a"))

        assert sizes == [path.stat().st_size]


@pytest.mark.usefixtures("runtimes")
class TestRun:
    async def test_every_outcome_is_one_line_after_the_header(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        emulator.inject(Fault.ACCEPTED, alias="b")
        emulator.add_runtime("ws-1", "c", status="stopped")
        emulator.inject(Fault.SERVER_ERROR, alias="d")
        targets = ["ws-1 a", "ws-1 b", "ws-1 c", "ws-1 gone", "ws-1 d", "a b c", " .."]

        report = await session.stop_runtimes(
            [tuple(target.split(" ")) for target in targets],  # type: ignore[misc]
            journal=path,
            retry=ONCE,
        )

        assert json.loads(header(path))["base_url"] == f"{emulator.url}/v1"
        assert sorted(line["index"] for line in lines(path)) == list(range(7))  # type: ignore[type-var]
        assert results(path) == {
            "a": "stopped",
            "b": "accepted",
            "c": "already_stopped",
            "gone": "not_found",
            "d": "unknown",
            "('a', 'b', 'c')": "rejected",
            "..": "rejected",
        }
        assert report.total == report.counts.total() == 7

    async def test_a_second_run_skips_settled_targets_and_reports_all(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        emulator.inject(Fault.SERVER_ERROR, alias="a")  # It takes two attempts.
        emulator.inject(Fault.FAILED, alias="b")
        emulator.add_runtime("ws-1", "c", status="stopped")
        targets = [("ws-1", name) for name in ("a", "b", "c")]
        first = await session.stop_runtimes(targets, journal=path)
        received = emulator.received.copy()
        written = lines(path)
        outcomes: list[StopOutcome] = []

        second = await session.stop_runtimes(
            [*reversed(targets), ("ws-1", "a")], journal=path, on_outcome=outcomes.append
        )

        assert emulator.received == received
        assert received["ws-1", "a"] == 2
        assert lines(path) == written
        assert first.ok
        assert second.ok
        assert second.total == 4
        assert second.counts == first.counts + Counter({StopResult.STOPPED: 1})
        assert (first.retries, second.retries) == (1, 0)
        found = {each.index: each for each in outcomes}
        assert [
            (found[index].target.alias, str(found[index].result), found[index].attempts)
            for index in range(4)
        ] == [
            ("c", "already_stopped", 1),
            ("b", "accepted", 1),
            ("a", "stopped", 2),
            ("a", "stopped", 2),
        ]
        assert all(each.resumed for each in outcomes)

    async def test_a_target_that_was_not_found_is_sent_again(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        """Fault: a runtime that was started later was never stopped, and counted as settled."""
        await session.stop_runtimes([("ws-1", "late"), ("ws-1", "a")], journal=path)
        emulator.add_runtime("ws-1", "late")

        report = await session.stop_runtimes([("ws-1", "late"), ("ws-1", "a")], journal=path)

        assert report.counts == {StopResult.STOPPED: 2}
        assert report.resumed == 1
        assert emulator.status("ws-1", "late") == "stopped"

    async def test_a_resumed_outcome_keeps_the_time_at_which_it_became_known(
        self, session: BctrlSession, path: Path
    ) -> None:
        began = datetime.now(UTC)
        times: list[dict[str, datetime]] = []
        for targets in (TWO, [*TWO, ("ws-1", "c")]):
            outcomes: list[StopOutcome] = []
            await session.stop_runtimes(targets, journal=path, on_outcome=outcomes.append)
            times.append({each.target.alias: each.at for each in outcomes})

        first, second = times
        assert all(began <= at <= datetime.now(UTC) for at in first.values())
        assert {alias: second[alias] for alias in first} == first
        assert second["c"] > max(first.values())

    async def test_a_first_run_resumes_nothing(self, session: BctrlSession, path: Path) -> None:
        outcomes: list[StopOutcome] = []
        await session.stop_runtimes(TWO, journal=path, on_outcome=outcomes.append)

        assert [each.resumed for each in outcomes] == [False, False]

    async def test_unsettled_and_new_targets_are_sent(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        emulator.inject(Fault.SERVER_ERROR, alias="b")
        emulator.inject(Fault.REDIRECT, alias="c")
        targets = [("ws-1", name) for name in "abc"]
        first = await session.stop_runtimes(targets, journal=path, retry=ONCE)
        assert {str(each.result) for each in first.failures} == {"unknown", "rejected"}
        outcomes: list[StopOutcome] = []

        second = await session.stop_runtimes(
            [*targets, ("ws-1", "d")], journal=path, on_outcome=outcomes.append
        )

        assert second.ok
        assert {each.target.alias: each.resumed for each in outcomes} == {
            "a": True,
            "b": False,
            "c": False,
            "d": False,
        }
        assert [emulator.received["ws-1", name] for name in "abcd"] == [1, 2, 2, 1]
        assert [line["alias"] for line in lines(path)[3:]].count("a") == 0
        assert len(lines(path)) == 6
        assert settled(path, f"{emulator.url}/v1") == {"a", "b", "c", "d"}

    async def test_a_uuid_and_its_string_are_the_same_workspace(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        workspace = UUID(int=7)
        emulator.add_runtime(str(workspace), "a")
        await session.stop_runtimes([(workspace, "a")], journal=path)
        report = await session.stop_runtimes([(str(workspace), "a")], journal=path)

        assert report.counts == {StopResult.STOPPED: 1}
        assert emulator.received[str(workspace), "a"] == 1

    async def test_an_outcome_is_written_before_it_is_delivered(
        self, session: BctrlSession, path: Path
    ) -> None:
        missing: list[str] = []

        def check(each: StopOutcome) -> None:
            if results(path).get(each.target.alias) != each.result:
                missing.append(each.target.alias)

        await session.stop_runtimes(TWO, journal=path, on_outcome=check)

        assert missing == []
        assert len(lines(path)) == 2

    async def test_a_torn_journal_is_resumed(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        await session.stop_runtimes(TWO, journal=path, concurrency=1)
        whole = content(path).splitlines(keepends=True)
        fill(path, b"".join(whole[:3]) + whole[3][:-3])

        report = await session.stop_runtimes(TWO, journal=path)

        assert report.counts == {StopResult.STOPPED: 1, StopResult.ALREADY_STOPPED: 1}
        assert [emulator.received[target] for target in TWO] == [1, 2]
        assert results(path) == {"a": "stopped", "b": "already_stopped"}

    async def test_a_rejected_journal_is_raised_before_anything_is_sent(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        fill(path, b"my notes\n")
        batch = session.stop_runtimes(TWO, journal=path)
        with pytest.raises(BctrlConfigError, match="it is not a journal"):
            await batch
        async with session.stop_runtimes(TWO, journal=path) as entered:
            with pytest.raises(BctrlConfigError, match="it is not a journal"):
                await anext(entered)

        assert emulator.requests == []
        assert (batch.read, entered.read) == (0, 0)
        assert content(path) == b"my notes\n"

    async def test_a_journal_of_another_server_is_rejected(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        before = write(path, outcome(0, "a"))
        with pytest.raises(BctrlConfigError, match=r"another server, https://api\.test/v1"):
            await session.stop_runtimes(TWO, journal=path)

        assert emulator.requests == []
        assert content(path) == before

    async def test_two_runs_cannot_share_one(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        emulator.inject(None, Fault.HANG)
        async with session.stop_runtimes(TWO, journal=path) as first:
            await anext(first)
            with pytest.raises(BctrlConfigError, match="in use by another run"):
                await session.stop_runtimes([("ws-1", "c")], journal=path)

        assert emulator.received["ws-1", "c"] == 0
        assert (await session.stop_runtimes(TWO, journal=path)).ok

    async def test_what_a_run_sends_again_is_unknown_until_it_has_an_outcome_or_the_run_ended(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        """Fault: after a SIGKILL, what an earlier run had not sent was said not to be sent."""
        journal = Journal(path, f"{emulator.url}/v1")
        journal.write(not_sent("a"))
        journal.write(not_sent("b"))
        journal.close()

        emulator.inject(Fault.HANG, Fault.HANG)
        batch = session.stop_runtimes([("ws-1", "a"), ("ws-1", "b")], journal=path)
        run = asyncio.ensure_future(batch)
        await wait_for_requests(emulator, 2)
        # As it is left if the run is killed now.
        killed = read_journals([path])
        batch.abort()
        await run

        assert killed.counts == {StopResult.UNKNOWN: 2}
        assert all(each.error and each.error.may_have_stopped for each in killed.failures)

    def test_a_run_that_ended_leaves_the_outcome_of_what_it_did_not_send(self, path: Path) -> None:
        write(path, not_sent("a"), not_sent("b"))
        Journal(path, SERVER).close()
        assert {each.result for each in read_outcomes(path)} == {StopResult.NOT_SENT}

    def test_no_mark_follows_a_line_that_could_not_be_written(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(path, not_sent("a"))
        journal = Journal(path, SERVER)
        before = path.read_bytes()
        full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(BctrlError, match="cannot be written"):
                journal.write(not_sent("a"))
        journal.close()

        assert path.read_bytes() == before
        assert [each.result for each in read_outcomes(path)] == [StopResult.UNKNOWN]

    def test_the_doubts_of_a_run_that_died_outlive_the_runs_after_it(self, path: Path) -> None:
        data = write(path, not_sent("a"), not_sent("b"))
        fill(path, data + mark_line(BegunMark(datetime.now(UTC))))
        assert {each.result for each in read_outcomes(path)} == {StopResult.UNKNOWN}

        journal = Journal(path, SERVER)
        journal.write(not_sent("a"))
        journal.close()

        assert {each.target.alias: each.result for each in read_outcomes(path)} == {
            "a": StopResult.NOT_SENT,
            "b": StopResult.UNKNOWN,
        }

    async def test_a_lone_surrogate_spoils_neither_run_nor_journal(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        targets = [("ws-1", "\ud800"), ("ws-1", "a"), ("\udfff", "b")]
        for _ in range(2):
            report = await session.stop_runtimes(targets, journal=path)
            assert report.counts == {StopResult.REJECTED: 2, StopResult.STOPPED: 1}
            assert report.ended_early is None

        assert results(path) == {"\ud800": "rejected", "a": "stopped", "b": "rejected"}
        assert len(lines(path)) == 5
        assert emulator.received.total() == 1

    async def test_an_alias_of_a_subclass_of_str_is_written(
        self, session: BctrlSession, path: Path
    ) -> None:
        class Name(str):
            __slots__ = ()

        report = await session.stop_runtimes(
            [("ws-1", Name("a")), ("ws-1", "b")], journal=path, concurrency=1
        )
        gc.collect()  # A dead worker task warns when it is collected: let that be here.

        assert report.total == report.counts.total() == 2
        assert results(path) == {"a": "stopped", "b": "stopped"}


@pytest.mark.usefixtures("runtimes")
class TestEndOfARun:
    async def test_an_abandoned_stop_is_recorded_and_sent_again(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        emulator.inject(Fault.HANG, alias="b")
        run = asyncio.create_task(done(session.stop_runtimes(TWO, journal=path)))
        await until(lambda: len(emulator.requests) == 2 and bool(lines(path)))
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

        assert results(path) == {"a": "stopped", "b": "unknown"}
        report = await session.stop_runtimes(TWO, journal=path)
        assert report.counts == {StopResult.STOPPED: 1, StopResult.ALREADY_STOPPED: 1}
        assert [emulator.received[target] for target in TWO] == [1, 2]

    async def test_an_input_that_raises_leaves_a_complete_journal_and_no_lock(
        self, session: BctrlSession, path: Path
    ) -> None:
        def broken() -> Iterator[tuple[str, str]]:
            yield from TWO
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            await session.stop_runtimes(broken(), journal=path)

        assert results(path) == {"a": "stopped", "b": "stopped"}
        assert (await session.stop_runtimes(TWO, journal=path)).ok

    async def test_leaving_the_block_early_leaves_a_complete_journal_and_no_lock(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        async with session.stop_runtimes(TWO, journal=path, concurrency=1) as batch:
            await anext(batch)
        assert {line["alias"] for line in lines(path)} == {"a", "b"}
        assert len(lines(path)) == 2

        assert (await session.stop_runtimes(TWO, journal=path)).ok
        assert emulator.received["ws-1", "a"] == 1

    @pytest.mark.parametrize("again", [False, True])
    async def test_a_run_cancelled_while_its_journal_is_opened_leaves_no_lock(
        self,
        emulator: Emulator,
        session: BctrlSession,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        again: bool,
    ) -> None:
        asked, go_on = threading.Event(), threading.Event()
        real = module._lock

        def slow(file: int) -> None:
            asked.set()
            go_on.wait(10)
            real(file)

        monkeypatch.setattr(module, "_lock", slow)
        run = asyncio.create_task(done(session.stop_runtimes(TWO, journal=path)))
        await until(asked.is_set)
        for _ in range(1 + again):
            run.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert not run.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await run
        monkeypatch.undo()

        assert emulator.requests == []
        # Fault: it passed for a run that had read its whole input.
        await session.stop_runtimes([("ws-1", "crm")], journal=path)
        assert not read(path).is_complete
        assert (await session.stop_runtimes(TWO, journal=path)).ok

    async def test_the_report_of_a_run_cancelled_while_its_journal_is_opened_is_not_ok(
        self, session: BctrlSession, path: Path
    ) -> None:
        """Fault: `report.ok` was true although nothing was read."""
        batch = session.stop_runtimes(TWO, journal=path)
        run = asyncio.create_task(done(batch))
        await asyncio.sleep(0)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

        assert batch.report.total == 0
        assert not batch.report.ok

    async def test_a_run_cancelled_while_its_journal_is_rejected_is_cancelled(
        self, session: BctrlSession, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked, go_on = threading.Event(), threading.Event()

        def slow(_: int) -> None:
            asked.set()
            go_on.wait(10)
            raise BlockingIOError

        monkeypatch.setattr(module, "_lock", slow)
        run = asyncio.create_task(done(session.stop_runtimes(TWO, journal=path)))
        await until(asked.is_set)
        run.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await run

    async def test_a_failed_flush_is_in_the_report(
        self, session: BctrlSession, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)
        report = await session.stop_runtimes(TWO, journal=path)
        async with session.stop_runtimes(TWO, journal=path) as batch:
            assert [each.resumed async for each in batch] == [True, True]
        monkeypatch.undo()

        for each in (report, batch.report):
            assert each.counts == {StopResult.STOPPED: 2}
            assert each.failures == ()
            assert not each.ok
            assert type(each.ended_early) is BctrlError
            assert repr(str(path)) in str(each.ended_early)
            assert "Input/output error" in str(each.ended_early)
        assert (await session.stop_runtimes(TWO, journal=path)).ok


class TestFullDisk:
    @pytest.fixture(autouse=True)
    def _runtimes(self, emulator: Emulator) -> None:
        for target in MANY:
            emulator.add_runtime(*target)

    def agrees(self, report: StopReport, emulator: Emulator) -> None:
        """Check the report of a first run against the server's state."""
        active = sum(1 for target in MANY if emulator.status(*target) == "active")
        assert report.counts.total() == report.total
        assert report.counts[StopResult.STOPPED] == emulator.received.total() == 40 - active
        assert set(report.counts) <= {StopResult.STOPPED, StopResult.NOT_SENT}
        assert len(report.failures) == report.counts[StopResult.NOT_SENT]

    def names_the_journal(self, report: StopReport, path: Path) -> None:
        assert not report.ok
        assert type(report.ended_early) is BctrlError
        assert f"the journal {str(path)!r} cannot be written" in str(report.ended_early)

    @pytest.mark.parametrize("workers", [1, 8])
    @pytest.mark.parametrize("room", [240, 800, 830, 860])
    async def test_it_ends_the_run_early_with_a_true_report_and_a_journal_that_resumes(
        self, emulator: Emulator, session: BctrlSession, path: Path, room: int, workers: int
    ) -> None:
        with disk_of(room):
            first = await session.stop_runtimes(MANY, journal=path, concurrency=workers)

        assert len(content(path)) <= room
        self.names_the_journal(first, path)
        self.agrees(first, emulator)
        assert first.total == 40
        assert first.counts[StopResult.NOT_SENT] >= 40 - 6 - workers
        assert all("not sent: the journal" in str(each.error) for each in first.failures)
        sent = emulator.received.total()
        kept = {target.alias for target in self.settled(path, emulator)}

        second = await session.stop_runtimes(MANY, journal=path)

        assert second.ok
        assert second.counts == {
            StopResult.STOPPED: len(kept) + 40 - sent,
            StopResult.ALREADY_STOPPED: sent - len(kept),
        }
        assert all(emulator.status(*target) == "stopped" for target in MANY)
        assert {name for name in NAMES if emulator.received["ws-1", name] == 2} == {
            name for name in NAMES[:sent] if name not in kept
        }
        total = emulator.received.total()
        assert (await session.stop_runtimes(MANY, journal=path)).ok
        assert emulator.received.total() == total

    def settled(self, path: Path, emulator: Emulator) -> set[RuntimeRef]:
        journal = Journal(path, f"{emulator.url}/v1")
        journal.close()
        return set(journal.not_running)

    async def test_an_input_without_a_length_is_read_no_further(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        left = iter(MANY)
        with disk_of(500):
            report = await session.stop_runtimes(
                (target for target in left), journal=path, concurrency=2
            )

        self.names_the_journal(report, path)
        self.agrees(report, emulator)
        assert report.total < 10
        assert len(list(left)) == 40 - report.total
        assert (await session.stop_runtimes(MANY, journal=path)).ok

    async def test_nothing_is_written_after_a_torn_line(
        self,
        emulator: Emulator,
        session: BctrlSession,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """If space returned, a torn tail would become a damaged middle."""
        whole, written = os.write, 0

        def full_once(file: int, data: bytes) -> int:
            nonlocal written
            written += 1
            if written == 6:
                return whole(file, data[:10])
            if written == 7:
                raise OSError(errno.ENOSPC, "No space left on device")
            return whole(file, data)

        monkeypatch.setattr(os, "write", full_once)
        report = await session.stop_runtimes(MANY, journal=path, concurrency=2)
        monkeypatch.undo()

        self.names_the_journal(report, path)
        self.agrees(report, emulator)
        assert len(self.settled(path, emulator)) == 3
        assert (await session.stop_runtimes(MANY, journal=path)).ok

    async def test_outcomes_are_still_delivered(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        with disk_of(500):
            async with session.stop_runtimes(MANY, journal=path, concurrency=2) as batch:
                delivered = [each async for each in batch]

        assert sorted(each.index for each in delivered) == list(range(40))
        self.names_the_journal(batch.report, path)
        self.agrees(batch.report, emulator)

    async def test_a_disk_without_room_for_the_header_is_raised_before_anything_is_sent(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        with disk_of(30), pytest.raises(BctrlError, match="cannot be written"):
            await session.stop_runtimes(MANY, journal=path)

        assert emulator.requests == []
        assert (await session.stop_runtimes(MANY, journal=path)).ok


class TestKey:
    """Fault: the key in debug logs (openai-python#1082)."""

    async def test_the_key_is_not_in_the_file(self, session: BctrlSession, path: Path) -> None:
        await session.stop_runtimes([("ws-1", "crm"), ("ws-1", "gone")], journal=path)

        assert len(lines(path)) == 2
        assert KEY.encode() not in content(path)

    @pytest.mark.parametrize("form", ["json", "text", "header"])
    @pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "409 Conflict"])
    async def test_a_key_echoed_by_the_server_is_redacted(
        self, path: Path, status: str, form: str
    ) -> None:
        async def echo(head: bytes, writer: asyncio.StreamWriter) -> None:
            found = re.search(rb"authorization: (Bearer (\S+))", head, re.IGNORECASE)
            assert found is not None
            bearer, key = (part.decode() for part in found.groups())
            fields = {"code": key, "error": bearer, "requestId": key, "hint": key, key: key}
            body = {"json": json.dumps(fields), "text": f"no such key: {bearer}", "header": "{}"}
            writer.write(http_answer(status, body[form].encode(), f"x-request-id: {key}"))

        async with raw_server(echo) as url, BctrlSession(KEY, base_url=url) as session:
            report = await session.stop_runtimes([("ws-1", "a")], journal=path)

        assert report.counts == {StopResult.REJECTED: 1}
        assert KEY.encode() not in content(path)
        assert b"***" in content(path)


class TestAge:
    """A journal of an earlier night makes a run skip runtimes that were started anew."""

    def began(self, path: Path, age: timedelta, *entries: bytes) -> None:
        path.write_bytes(header_line(SERVER, datetime.now(UTC) - age) + b"".join(entries))

    def warnings(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        assert {record.levelname for record in caplog.records} <= {"WARNING"}
        assert all(record.name == "bctrl_async.journal" for record in caplog.records)
        return caplog.messages

    def test_a_journal_older_than_a_day_warns_with_its_age(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fault: the second night skipped every runtime and ended with exit code 0."""
        self.began(path, timedelta(days=2, hours=3, minutes=5), LINE)

        assert settled(path) == {"a"}
        assert self.warnings(caplog) == [
            (
                f"the journal {str(path)!r} was begun 2d3h ago: what it has as stopped is "
                "not sent again. Use another file for runtimes that were started anew"
            )
        ]

    def test_a_complete_journal_warns_with_its_age(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.began(path, timedelta(hours=5, minutes=2), LINE)
        journal = Journal(path, SERVER)
        journal.mark_read(RuntimeRef("ws-1", "a"))
        journal.close(complete=True)
        assert self.warnings(caplog) == []

        assert settled(path) == {"a"}
        [warning] = self.warnings(caplog)
        assert "was begun 5h2m ago, and its last run is complete: what" in warning

    def test_a_complete_journal_whose_targets_are_sent_again_does_not_warn(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fault: it said of targets that were sent again that they were not."""
        journal = Journal(path, SERVER)
        journal.write(outcome(0, "a", StopResult.ACCEPTED))
        journal.close(complete=True)

        assert settled(path) == set()
        assert self.warnings(caplog) == []

    def test_a_journal_of_today_that_is_not_complete_does_not_warn(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.began(path, timedelta(hours=23, minutes=59), LINE)
        Journal(path, SERVER).close(complete=True)
        # A crash in the run after it: that run was not complete.
        with path.open("ab") as file:
            file.write(LINE)

        assert settled(path) == {"a"}
        assert self.warnings(caplog) == []

    @pytest.mark.parametrize("age", [timedelta(hours=13), timedelta(hours=-13)])
    def test_a_journal_beyond_the_maximal_age_is_rejected_and_unchanged(
        self, path: Path, age: timedelta
    ) -> None:
        self.began(path, age, LINE, LINE[:20])
        before = path.read_bytes()
        with pytest.raises(BctrlConfigError, match=r"was begun 1[23]h.*, and the limit is 12h\."):
            Journal(path, SERVER, max_age=12 * 3600)
        assert path.read_bytes() == before

        Journal(path, SERVER, max_age=14 * 3600).close()

    async def test_a_journal_that_is_too_old_is_raised_before_anything_is_sent(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        fill(path, header_line(session.base_url, datetime.now(UTC) - timedelta(hours=2)))
        for batch in (
            session.stop_runtimes(TWO, journal=path, journal_max_age=3600),
            session.stop_workspace("ws-1", journal=path, journal_max_age=3600),
        ):
            with pytest.raises(BctrlConfigError, match="begun 2h ago, and the limit is 1h"):
                await batch

        assert emulator.requests == []

    def test_a_new_file_has_no_age(self, path: Path) -> None:
        Journal(path, SERVER, max_age=1).close()

        assert is_header(path.read_bytes())

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "0s ago"),
            (0.9, "0s ago"),
            (59, "59s ago"),
            (60, "1m ago"),
            (3661, "1h1m ago"),
            (3601, "1h ago"),
            (86400 * 400 + 3599, "400d ago"),
            (-90, "1m30s in the future"),
        ],
    )
    def test_an_age_has_its_two_largest_units(self, seconds: float, text: str) -> None:
        assert format_age(timedelta(seconds=seconds)) == text


class TestCompletion:
    def is_complete(self, path: Path) -> bool:
        return read(path).is_complete

    @pytest.mark.usefixtures("runtimes")
    async def test_a_run_that_settled_its_whole_input_is_complete(
        self, session: BctrlSession, path: Path
    ) -> None:
        await session.stop_runtimes(iter(TWO), journal=path)

        assert self.is_complete(path)
        assert [*json.loads(content(path).splitlines()[-1])] == ["completed", "crc"]

    @pytest.mark.usefixtures("runtimes")
    async def test_a_run_with_an_unsettled_target_is_not(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        emulator.inject(Fault.REDIRECT, alias="b")
        await session.stop_runtimes(TWO, journal=path)
        assert not self.is_complete(path)

        await session.stop_runtimes(TWO, journal=path)
        assert self.is_complete(path)

    @pytest.mark.usefixtures("runtimes")
    async def test_a_run_that_ended_early_is_not(self, session: BctrlSession, path: Path) -> None:
        batch = session.stop_runtimes(iter(TWO), journal=path, concurrency=1)
        async with batch:
            await anext(batch)
            batch.stop_reading()

        assert not self.is_complete(path)

    @pytest.mark.usefixtures("runtimes")
    async def test_a_run_whose_callback_raised_is_not(
        self, session: BctrlSession, path: Path
    ) -> None:
        def fail(_: StopOutcome) -> None:
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            await session.stop_runtimes([("ws-1", "a")], journal=path, on_outcome=fail)

        assert not self.is_complete(path)

    def test_a_mark_cut_short_is_removed(self, path: Path) -> None:
        Journal(path, SERVER).close(complete=True)
        whole = content(path)
        fill(path, whole[:-4])
        assert not self.is_complete(path)
        Journal(path, SERVER).close()

        assert is_header(content(path))

    def test_a_disk_without_room_for_the_mark_is_an_error_and_leaves_no_lock(
        self, path: Path
    ) -> None:
        journal = Journal(path, SERVER)
        with disk_of(len(HEADER) + 10), pytest.raises(BctrlError, match="cannot be written"):
            journal.close(complete=True)

        assert settled(path) == set()


class TestReading:
    def test_the_outcomes_are_those_that_say_most(self, path: Path) -> None:
        first, last = outcome(0, "a"), outcome(3, "b", StopResult.NOT_FOUND)
        unknown = BctrlTimeoutError("why")
        write(
            path,
            outcome(0, "a", StopResult.UNKNOWN, unknown),
            first,
            outcome(2, "b", StopResult.NOT_FOUND),
            outcome(2, "b", StopResult.UNKNOWN, unknown),
            last,
            outcome(4, "c", StopResult.ACCEPTED),
            outcome(4, "c", StopResult.REJECTED, unknown),
        )
        found = read(str(path))

        assert (found.path, found.base_url, found.size) == (path, SERVER, len(content(path)))
        assert (found.is_complete, found.is_torn) == (False, False)
        assert found.updated is not None
        assert found.updated > last.at
        assert timedelta() <= found.age < timedelta(minutes=1)
        assert {target.alias: each.result for target, each in found.outcomes.items()} == {
            "a": StopResult.STOPPED,
            "b": StopResult.NOT_FOUND,
            "c": StopResult.ACCEPTED,
        }
        assert [target.alias for target in found.not_running] == ["a"]
        assert found.not_running[RuntimeRef("ws-1", "a")].at == first.at

    def test_a_journal_in_use_is_read_without_its_last_half_line(self, path: Path) -> None:
        """Fault: reading cut off a line that a run was writing."""
        journal = Journal(path, SERVER)
        journal.write(outcome(0, "a"))
        with path.open("ab") as half:
            half.write(LINE[:20])
        before = content(path)

        found = read(path)

        assert found.is_torn
        assert [target.alias for target in found.outcomes] == ["a"]
        assert content(path) == before
        with pytest.raises(BctrlConfigError, match="in use"):
            Journal(path, SERVER)
        journal.close()

    def test_a_file_that_grows_is_read_to_its_first_end(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A line that is completed between two reads must not look damaged."""
        write(path, outcome(0, "a"))
        with path.open("ab") as file:
            file.write(LINE[:20])
        size = path.stat().st_size
        with path.open("ab") as file:
            file.write(LINE[20:])
        real = os.fstat

        def fstat(file: int) -> os.stat_result:
            found = list(real(file))
            found[6] = size
            return os.stat_result(found)

        monkeypatch.setattr(os, "fstat", fstat)
        found = read(path)

        assert (found.is_torn, len(found.outcomes)) == (True, 1)

    def test_a_journal_that_cannot_be_written_is_read(self, path: Path) -> None:
        write(path, outcome(0, "a"))
        path.chmod(0o400)

        assert len(read(path).outcomes) == 1

    @pytest.mark.parametrize("data", [b"", HEADER[:40]])
    def test_a_file_without_a_header_has_no_content(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        assert read_journal(path) is None
        assert path.read_bytes() == data

    def test_a_missing_file_is_rejected_and_not_created(self, path: Path) -> None:
        with pytest.raises(BctrlConfigError, match="cannot be read: No such file") as caught:
            read_journal(path)
        assert str(caught.value).endswith(". Use the path of an intact journal")
        assert not path.exists()

    def test_a_folder_a_device_and_a_pipe_are_rejected(self, path: Path, tmp_path: Path) -> None:
        os.mkfifo(path)
        for name in (path, tmp_path, Path("/dev/zero")):
            with pytest.raises(BctrlConfigError, match="it is not a regular file"):
                read_journal(name)

    @pytest.mark.parametrize("data", [b"root:x:0:0\n", HEADER + b"x\n" + LINE])
    def test_the_error_of_another_file_is_for_a_reader(self, path: Path, data: bytes) -> None:
        """Fault: it said that the file could not be resumed, and was unchanged."""
        path.write_bytes(data)
        with pytest.raises(BctrlConfigError, match=r"cannot be read: .* Use the path") as caught:
            read_journal(path)
        assert "resume" not in str(caught.value)

    def test_an_invalid_file_name_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(BctrlConfigError, match=r"cannot be read: .*null"):
            read_journal(tmp_path / "a\0b")

    def test_a_run_that_writes_to_a_complete_journal_completes_it_again(self, path: Path) -> None:
        for number, alias in enumerate("ab"):
            journal = Journal(path, SERVER)
            journal.write(outcome(number, alias))
            journal.close(complete=True)
        assert read(path).is_complete


class TestUnfinished:
    """Fault: a run of one target made a journal complete whose list was never read to its end."""

    def start(self, session: BctrlSession, path: Path) -> None:
        journal = Journal(path, session.base_url)
        journal.write(outcome(0, "a"))
        journal.close()

    def kill(
        self,
        path: Path,
        server: str,
        *,
        targets: int | None = None,
        origin: str | None = None,
    ) -> None:
        """Leave a journal as a run does that gets SIGKILL before its first outcome."""
        now = datetime.now(UTC)
        before = content(path) if path.exists() else header_line(server, now)
        fill(path, before + mark_line(BegunMark(now, targets, origin)))

    @pytest.mark.usefixtures("runtimes")
    async def test_a_run_of_a_part_does_not_complete_it(
        self, session: BctrlSession, path: Path
    ) -> None:
        self.start(session, path)
        assert (await session.stop_runtimes(TWO[1:], journal=path)).ok
        assert not read(path).is_complete

        assert (await session.stop_runtimes(TWO, journal=path)).resumed == 2
        assert read(path).is_complete
        assert (await session.stop_runtimes(TWO[1:], journal=path)).ok
        assert read(path).is_complete

    def test_the_targets_of_complete_runs_need_not_be_read_again(self, path: Path) -> None:
        for alias, complete in (("a", True), ("b", False)):
            journal = Journal(path, SERVER)
            journal.write(outcome(0, alias))
            journal.close(complete=complete)
        assert read(path).unfinished == {RuntimeRef("ws-1", "b")}

        journal = Journal(path, SERVER)
        journal.mark_read(RuntimeRef("ws-1", "b"))
        journal.close(complete=True)
        assert read(path).is_complete

    @pytest.mark.parametrize("item", [("ws-1", "a\x07"), "ws-1,a"])
    @pytest.mark.usefixtures("runtimes")
    async def test_an_item_that_is_not_a_target_may_be_corrected(
        self, session: BctrlSession, path: Path, item: tuple[str, str] | str
    ) -> None:
        items: list[tuple[str, str]] = [item]  # type: ignore[list-item]  # Not all are targets.
        assert not (await session.stop_runtimes(items, journal=path)).ok
        assert (await session.stop_runtimes(TWO[:1], journal=path)).ok
        assert read(path).is_complete

    def test_a_torn_line_may_be_the_begin_of_a_further_run(self, path: Path) -> None:
        """Fault: a power failure in a later run left the journal complete."""
        Journal(path, SERVER).close(complete=True)
        fill(path, content(path) + mark_line(BegunMark(datetime.now(UTC), 2))[:20])
        assert not read(path).is_complete

    async def test_a_run_that_lists_the_workspace_anew_completes_it(
        self, session: BctrlSession, emulator: Emulator, path: Path
    ) -> None:
        emulator.add_runtime("ws-1", "b")
        self.start(session, path)
        assert (await session.stop_workspace("ws-1", journal=path)).ok
        assert read(path).is_complete

    @pytest.mark.usefixtures("runtimes")
    async def test_a_run_that_was_killed_before_its_first_outcome_leaves_it_incomplete(
        self, session: BctrlSession, path: Path
    ) -> None:
        """Fault: after it, `report` took the mark of an earlier run, or a run of one target."""
        assert (await session.stop_runtimes(TWO[:1], journal=path)).ok
        self.kill(path, session.base_url, targets=2)
        assert not read(path).is_complete
        assert (await session.stop_runtimes(TWO[:1], journal=path)).ok
        assert not read(path).is_complete
        assert (await session.stop_runtimes(TWO, journal=path)).ok
        assert read(path).is_complete

    def test_a_list_that_was_cut_off_is_still_left_after_runs_that_ended(self, path: Path) -> None:
        self.kill(path, SERVER, targets=2)
        self.kill(path, SERVER, targets=1)
        Journal(path, SERVER, targets=3).close()
        assert read(path).cut_off == 2

    async def test_a_workspace_whose_run_was_killed_must_be_listed_again(
        self, session: BctrlSession, emulator: Emulator, path: Path
    ) -> None:
        """Fault: a list with a narrower filter completed the journal."""
        emulator.add_runtime("ws-1", "a")
        emulator.add_runtime("ws-1", "b")
        origin = list_origin("ws-1", RuntimeFilter())
        self.kill(path, session.base_url, origin=origin)
        assert read(path).unread == {origin}
        assert (await session.stop_runtimes(TWO, journal=path)).ok
        assert not read(path).is_complete
        nothing = RuntimeFilter(kind="desktop")
        assert (await session.stop_workspace("ws-1", journal=path, where=nothing)).ok
        assert not read(path).is_complete
        assert (await session.stop_workspace("ws-1", journal=path)).ok
        assert read(path).is_complete

    @pytest.mark.usefixtures("runtimes")
    async def test_a_stream_that_was_cut_off_must_be_read_to_its_end(
        self, session: BctrlSession, path: Path
    ) -> None:
        """Fault: a few stops completed the journal of a stream of unknown length."""
        assert not (await self.cut_off(session, iter(TWO), path)).ok
        assert (await session.stop_runtimes(TWO[:1], journal=path)).ok
        assert read(path).unread == {"stream"}
        assert not read(path).is_complete
        assert (await session.stop_runtimes(iter(TWO), journal=path)).ok
        assert read(path).is_complete

    async def cut_off(
        self, session: BctrlSession, targets: Iterable[tuple[str, str]], path: Path
    ) -> StopReport:
        """Stop the first of these targets, and read no further."""
        batch = session.stop_runtimes(
            targets, journal=path, concurrency=1, on_outcome=lambda _: batch.stop_reading()
        )
        return await batch

    @pytest.mark.usefixtures("runtimes")
    async def test_an_input_that_failed_must_be_read_to_its_end(
        self, session: BctrlSession, path: Path
    ) -> None:
        """Fault: a run of what it had yielded made the journal complete."""

        class Failing(list[tuple[str, str]]):
            def __iter__(self) -> Iterator[tuple[str, str]]:
                yield self[0]
                raise OSError("the disk is gone")

        with pytest.raises(OSError, match="the disk is gone"):
            await session.stop_runtimes(Failing(TWO), journal=path)
        assert (await session.stop_runtimes(TWO[:1], journal=path)).ok
        assert not read(path).is_complete
        assert (await session.stop_runtimes(TWO, journal=path)).ok
        assert read(path).is_complete

    async def test_a_workspace_that_could_not_be_listed_must_be_listed(
        self, session: BctrlSession, emulator: Emulator, path: Path
    ) -> None:
        """Fault: a run of one other target made the journal complete."""
        emulator.add_runtime("ws-1", "a")
        emulator.inject(Reply(403), method="GET")
        with pytest.raises(BctrlError, match="403"):
            await session.stop_workspace("ws-1", journal=path)
        assert (await session.stop_runtimes([("ws-1", "crm")], journal=path)).ok
        assert not read(path).is_complete
        assert (await session.stop_workspace("ws-1", journal=path)).ok
        assert read(path).is_complete

    async def test_a_list_does_not_make_up_for_what_still_runs(
        self, session: BctrlSession, emulator: Emulator, path: Path
    ) -> None:
        """Fault: a run with a narrower filter completed the journal of the whole workspace."""
        emulator.add_runtime("ws-1", "a")
        emulator.add_runtime("ws-1", "b")
        self.start(session, path)
        nothing = RuntimeFilter(kind="desktop")
        assert (await session.stop_workspace("ws-1", journal=path, where=nothing)).ok
        assert not read(path).is_complete
        assert (await session.stop_workspace("ws-1", journal=path)).ok
        assert read(path).is_complete

    async def test_a_runtime_that_is_listed_as_active_is_stopped_whatever_the_journal_has(
        self,
        session: BctrlSession,
        emulator: Emulator,
        path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Fault: one that was started anew was reported as stopped by an earlier run."""
        emulator.add_runtime("ws-1", "a")
        assert (await session.stop_workspace("ws-1", journal=path)).ok
        emulator.add_runtime("ws-1", "a")
        report = await session.stop_workspace("ws-1", journal=path)
        assert (report.counts, report.resumed) == ({StopResult.STOPPED: 1}, 0)
        assert emulator.status("ws-1", "a") == "stopped"
        assert caplog.records == []

    async def test_one_that_is_listed_as_active_and_cannot_be_stopped_is_left(
        self, session: BctrlSession, emulator: Emulator, path: Path
    ) -> None:
        """Fault: the journal kept the earlier stop, and the next run did not send it again."""
        emulator.add_runtime("ws-1", "a")
        assert (await session.stop_workspace("ws-1", journal=path)).ok
        emulator.add_runtime("ws-1", "a")
        emulator.inject(Reply(403))
        assert not (await session.stop_workspace("ws-1", journal=path)).ok
        assert not read_journals([path]).ok
        assert (await session.stop_runtimes(TWO[:1], journal=path)).resumed == 0
        assert emulator.status("ws-1", "a") == "stopped"

    async def test_all_that_are_listed_as_active_run_until_their_stops_are_answered(
        self, session: BctrlSession, emulator: Emulator, path: Path
    ) -> None:
        """Fault: if the run was killed before, the journal had them as stopped."""

        def start() -> None:
            for workspace_id, alias in TWO:
                emulator.add_runtime(workspace_id, alias)

        start()
        assert (await session.stop_workspace("ws-1", journal=path)).ok
        start()
        emulator.inject(Fault.HANG, alias="a", method="POST")
        async with session.stop_workspace("ws-1", journal=path, concurrency=1):
            await wait_for_requests(emulator, len(emulator.requests) + 2)
            assert read_journals([path]).states[RuntimeState.STILL_RUNNING] == 2
            assert read(path).pending == 2

    async def test_one_that_has_ended_by_itself_is_known_from_the_list(
        self, session: BctrlSession, emulator: Emulator, path: Path
    ) -> None:
        """Fault: it was pending for ever, since no run with the same journal sent it again."""
        emulator.add_runtime("ws-1", "a")
        emulator.inject(Reply(403), alias="a")
        assert not (await session.stop_workspace("ws-1", journal=path)).ok
        emulator.add_runtime("ws-1", "a", status="stopped")
        assert (await session.stop_workspace("ws-1", journal=path)).total == 0
        assert (read(path).is_complete, read(path).pending) == (True, 0)
        assert read_journals([path]).all_stopped

    async def test_one_that_the_list_no_longer_has_stays_pending(
        self, session: BctrlSession, emulator: Emulator, path: Path
    ) -> None:
        emulator.add_runtime("ws-1", "a")
        emulator.inject(Reply(403), alias="a")
        assert not (await session.stop_workspace("ws-1", journal=path)).ok
        emulator.inject(Reply(200, json={"runtimes": []}), method="GET")
        assert (await session.stop_workspace("ws-1", journal=path)).total == 0
        assert read(path).pending == 1
        assert not read_journals([path]).all_stopped

    async def test_a_list_that_cannot_be_written_ends_the_run_early(
        self,
        session: BctrlSession,
        emulator: Emulator,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        emulator.inject(Reply(403), alias="crm")
        assert not (await session.stop_workspace("ws-1", journal=path)).ok
        emulator.add_runtime("ws-1", "crm", status="stopped")
        full = BctrlError("the disk is full")
        monkeypatch.setattr(Journal, "write", Mock(side_effect=full))
        assert (await session.stop_workspace("ws-1", journal=path)).ended_early is full

    def test_a_run_that_leaves_what_was_not_found_keeps_it_complete(self, path: Path) -> None:
        journal = Journal(path, SERVER)
        journal.write(outcome(0, "a", StopResult.NOT_FOUND))
        journal.close(complete=True)

        Journal(path, SERVER).close(complete=True)
        assert read(path).is_complete
