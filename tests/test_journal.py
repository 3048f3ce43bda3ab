"""The journal of a bulk stop: what it has, and what the next run sends because of it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from helpers import BOUND, Connect, add_runtimes, await_batch, wait_for_requests
from journal_lines import Record, read_lines
from servers import http_answer, raw_server
from test_observer import Recorder

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    RetryPolicy,
    RuntimeRef,
    RuntimeState,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.journal import Journal, JournalInUseError, read_journals

KEY = "emulator-key"
ONCE = RetryPolicy(attempts=1, base=0.001, cap=0.001)
A, B, C = (RuntimeRef("ws-1", alias) for alias in "abc")
MANY = [("ws-1", f"r{number}") for number in range(40)]
IN_USE = "in use by another run"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stops.jsonl"


@pytest.fixture(autouse=True)
def _runtimes(emulator: Emulator) -> None:
    for target in (A, B, C):
        emulator.add_runtime(*target)


def entries(path: Path) -> list[Record]:
    return read_lines(path.read_bytes()).entries


def content(path: Path) -> bytes:
    return path.read_bytes()


def fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def results(path: Path) -> list[tuple[str, str]]:
    return [(entry["alias"], entry["result"]) for entry in entries(path)]


def states(path: Path) -> dict[str, RuntimeState]:
    return {each.target.alias: each.state for each in read_journals([path])}


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


async def test_leaving_the_block_while_the_journal_is_closed_ends_the_run_as_it_was(
    connect: Connect, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: its observer was never told the end, and its report was not ok."""
    closing, released = threading.Event(), threading.Event()
    close = Journal.close

    def close_late(journal: Journal) -> None:
        closing.set()
        released.wait(BOUND)
        close(journal)

    monkeypatch.setattr(Journal, "close", close_late)
    recorder = Recorder()
    async with connect(observer=recorder) as session:
        async with session.stop_runtimes([A, B], journal=path) as batch:
            await anext(batch)
            await until(closing.is_set)
            asyncio.get_running_loop().call_soon(released.set)

        assert batch.report.ok
        assert recorder.begun == 0


class TestFile:
    async def test_it_is_a_header_and_a_line_of_json_for_each_outcome(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        emulator.inject(Fault.ACCEPTED, alias="b")
        emulator.add_runtime("ws-1", "c", status="stopped")
        targets = [A, B, C, ("ws-1", "gone"), ("ws-1", "x y\u2028é"), ("ws-1", "..")]

        await session.stop_runtimes(targets, journal=path, verify=False)

        header, found, is_torn = read_lines(content(path))
        assert (header["version"], header["base_url"]) == (3, f"{emulator.url}/v1")
        assert not is_torn
        assert {entry["index"]: (entry["alias"], entry["result"]) for entry in found} == {
            0: ("a", "stopped"),
            1: ("b", "accepted"),
            2: ("c", "already_stopped"),
            3: ("gone", "not_found"),
            4: ("x y\u2028é", "not_found"),
            5: ("..", "rejected"),
        }
        stopped = next(entry for entry in found if entry["alias"] == "a")
        assert stopped["ok"]
        assert stopped["state"] == "not_running"
        assert "runtime" not in stopped
        accepted = next(entry for entry in found if entry["alias"] == "b")
        assert accepted["runtime"]["status"] == "active"
        assert accepted["error"]["type"] == "BctrlError"

    async def test_an_outcome_is_written_before_it_is_delivered(
        self, session: BctrlSession, path: Path
    ) -> None:
        late: list[StopOutcome] = []

        def check(outcome: StopOutcome) -> None:
            if (outcome.target.alias, outcome.result) not in results(path):
                late.append(outcome)

        await session.stop_runtimes([A, B], journal=path, on_outcome=check)

        assert late == []
        assert len(entries(path)) == 2

    async def test_a_lone_surrogate_and_an_endless_name_spoil_neither_run_nor_journal(
        self, session: BctrlSession, path: Path
    ) -> None:
        """Fault: a journal could hold a line that no run would read again."""
        targets = [("ws-1", "\ud800"), A, ("\udfff", "b"), ("ws-1", "é" * 100_000)]
        for _ in range(2):
            report = await session.stop_runtimes(targets, journal=path)
            assert report.counts == {StopResult.REJECTED: 3, StopResult.STOPPED: 1}
            assert report.ended_early is None

        assert [alias for alias, _ in results(path)].count("a") == 1
        assert max(map(len, content(path).splitlines())) < 6_000
        # The shortened name is too long for that of a runtime.
        assert f"{'é' * 1000}…" in states(path)

    async def test_an_endless_description_leaves_the_names_of_its_runtime(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        # Each character of these texts takes six bytes of a line.
        texts = dict.fromkeys(("driver", "createdAt", "updatedAt"), "\1" * 10_000)
        active = {**emulator.runtimes[A], **texts}
        emulator.inject(Reply(200, body=active, takes_effect=False), alias="a")

        await session.stop_runtimes([A], journal=path, verify=False)

        assert len(content(path)) < 2_000
        assert states(path) == {"a": RuntimeState.STILL_RUNNING}

    @pytest.mark.parametrize("form", ["json", "text", "header"])
    @pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "409 Conflict"])
    async def test_a_key_echoed_by_the_server_is_redacted(
        self, path: Path, status: str, form: str
    ) -> None:
        """Fault: the key in debug logs (openai-python#1082)."""

        async def echo(head: bytes, writer: asyncio.StreamWriter) -> None:
            found = re.search(rb"authorization: (Bearer (\S+))", head, re.IGNORECASE)
            assert found is not None
            bearer, key = (part.decode() for part in found.groups())
            fields = {"code": key, "error": bearer, "requestId": key, "hint": key, key: key}
            body = {"json": json.dumps(fields), "text": f"no such key: {bearer}", "header": "{}"}
            writer.write(http_answer(status, body[form].encode(), f"x-request-id: {key}"))

        async with raw_server(echo) as url, BctrlSession(KEY, base_url=url) as session:
            await session.stop_runtimes([A], journal=path)

        assert len(entries(path)) == 1
        assert KEY.encode() not in content(path)
        assert b"***" in content(path)


class TestResume:
    async def test_what_no_longer_runs_is_not_sent_again(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        emulator.inject(Fault.SERVER_ERROR, alias="a")  # It takes two attempts.
        emulator.inject(Fault.FAILED, alias="b")
        emulator.add_runtime("ws-1", "c", status="stopped")
        firsts: list[StopOutcome] = []
        first = await session.stop_runtimes([A, B, C], journal=path, on_outcome=firsts.append)
        received, written = emulator.received.copy(), content(path)
        outcomes: list[StopOutcome] = []

        second = await session.stop_runtimes([C, B, A, A], journal=path, on_outcome=outcomes.append)

        assert (emulator.received, content(path)) == (received, written)
        assert (first.ok, second.ok) == (True, True)
        assert (second.total, second.resumed) == (4, 4)
        assert (first.retries, second.retries) == (1, 0)
        known = {each.target: each for each in firsts}
        assert sorted(each.index for each in outcomes) == [0, 1, 2, 3]
        for outcome in outcomes:
            assert outcome.target == [C, B, A, A][outcome.index]
            before = known[outcome.target]
            assert (outcome.resumed, before.resumed) == (True, False)
            assert (outcome.result, outcome.state) == (before.result, before.state)
            assert (outcome.attempts, outcome.at) == (before.attempts, before.at)
            assert outcome.request_id == before.request_id
            assert outcome.error is None

    async def test_all_else_is_sent_again(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        active = dict(emulator.runtimes[A])
        emulator.inject(Reply(200, body=active, takes_effect=False), alias="a")
        emulator.inject(Fault.SERVER_ERROR, alias="b")
        emulator.inject(Reply(403), alias="c")
        first = await session.stop_runtimes([A, B, C], journal=path, retry=ONCE, verify=False)
        assert {each.result for each in first.failures} == {"accepted", "unknown", "rejected"}

        second = await session.stop_runtimes([A, B, C], journal=path)

        assert (second.counts, second.resumed) == ({StopResult.STOPPED: 3}, 0)
        assert [emulator.received[target] for target in (A, B, C)] == [2, 2, 2]
        assert set(states(path).values()) == {RuntimeState.NOT_RUNNING}

    @pytest.mark.parametrize("missing_ok", [False, True])
    async def test_a_target_that_was_not_found_is_always_sent_again(
        self, emulator: Emulator, session: BctrlSession, path: Path, *, missing_ok: bool
    ) -> None:
        """Fault: a runtime that was started later was never stopped."""
        late = ("ws-1", "late")
        await session.stop_runtimes([late, A], journal=path, missing_ok=missing_ok)
        emulator.add_runtime(*late)

        report = await session.stop_runtimes([late, A], journal=path)

        assert (report.counts, report.resumed) == ({StopResult.STOPPED: 2}, 1)
        assert emulator.status(*late) == "stopped"

    async def test_the_last_entry_of_a_target_wins(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        emulator.inject(None, Reply(403), alias="a")
        first = await session.stop_runtimes([A, A], journal=path, concurrency=1)
        assert first.counts == {StopResult.STOPPED: 1, StopResult.REJECTED: 1}
        assert states(path) == {"a": RuntimeState.UNCONFIRMED}

        second = await session.stop_runtimes([A], journal=path)

        assert (second.counts, second.resumed) == ({StopResult.ALREADY_STOPPED: 1}, 0)
        assert states(path) == {"a": RuntimeState.NOT_RUNNING}

    async def test_a_uuid_and_its_string_are_the_same_workspace(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        workspace = UUID(int=7)
        emulator.add_runtime(str(workspace), "a")
        await session.stop_runtimes([(workspace, "a")], journal=path)

        report = await session.stop_runtimes([(str(workspace), "a"), A], journal=path)

        assert (report.ok, report.resumed) == (True, 1)

    async def test_an_abandoned_stop_is_recorded_and_sent_again(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        emulator.inject(Fault.HANG, alias="b")
        run = asyncio.create_task(await_batch(session.stop_runtimes([A, B], journal=path)))
        await until(lambda: len(emulator.requests) == 2 and bool(entries(path)))
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert results(path) == [("a", "stopped"), ("b", "unknown")]

        report = await session.stop_runtimes([A, B], journal=path)

        assert report.counts == {StopResult.STOPPED: 1, StopResult.ALREADY_STOPPED: 1}
        assert [emulator.received[target] for target in (A, B)] == [1, 2]

    async def test_an_input_that_raises_leaves_its_outcomes_and_no_lock(
        self, session: BctrlSession, path: Path
    ) -> None:
        def broken() -> Iterator[RuntimeRef]:
            yield A
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            await session.stop_runtimes(broken(), journal=path)

        assert results(path) == [("a", "stopped")]
        assert (await session.stop_runtimes([A, B], journal=path)).ok

    async def test_an_entry_that_cannot_be_read_again_is_sent_again(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        await session.stop_runtimes([A, B], journal=path, concurrency=1)
        done: list[StopOutcome] = []

        def spoil(outcome: StopOutcome) -> None:
            done.append(outcome)
            data = content(path)
            fill(path, data.replace(b'"stopped"', b'"STOPPED"'))

        report = await session.stop_runtimes(
            [C, A, B], journal=path, concurrency=1, on_outcome=spoil
        )

        assert report.ok
        assert [each.resumed for each in done] == [False, False, False]
        assert [emulator.received[target] for target in (A, B, C)] == [2, 2, 1]


class TestList:
    """The list of `stop_workspace` decides what is sent, never the journal."""

    async def test_what_is_listed_as_running_is_stopped_whatever_the_journal_has(
        self,
        emulator: Emulator,
        session: BctrlSession,
        path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Fault: one that was started anew was reported as stopped by an earlier run."""
        assert (await session.stop_workspace("ws-1", journal=path)).ok
        emulator.add_runtime(*A)

        report = await session.stop_workspace("ws-1", journal=path)

        assert (report.counts, report.resumed) == ({StopResult.STOPPED: 1}, 0)
        assert emulator.status(*A) == "stopped"
        assert caplog.records == []

    async def test_all_of_it_is_in_the_journal_before_the_first_stop(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        """Fault: if the run was killed before, the journal had them as stopped."""
        assert (await session.stop_workspace("ws-1", journal=path)).ok
        for target in (A, B, C):
            emulator.add_runtime(*target)
        emulator.inject(Fault.HANG, method="POST")
        async with session.stop_workspace("ws-1", journal=path, concurrency=1):
            await wait_for_requests(emulator, len(emulator.requests) + 2)
            # As it is left if the run is killed now.
            killed = list(read_journals([path]))

        again = [each for each in killed if each.target.alias != "crm"]
        assert len(again) == 3
        for each in again:
            assert each.state is RuntimeState.STILL_RUNNING
            assert each.runtime is not None
            assert "the workspace was listed, and it runs again" in str(each.error)

    async def test_all_of_it_is_on_disk_before_the_first_stop(
        self,
        emulator: Emulator,
        session: BctrlSession,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Fault: after a power failure, the journal had them as stopped."""
        assert (await session.stop_workspace("ws-1", journal=path)).ok
        for target in (A, B, C):
            emulator.add_runtime(*target)
        before, flushed = len(emulator.stops), list[int]()
        monkeypatch.setattr(os, "fsync", lambda _: flushed.append(len(emulator.stops) - before))
        assert (await session.stop_workspace("ws-1", journal=path)).ok

        # Once before the first stop, and at the end of the run.
        assert flushed == [0, 3]

    async def test_one_that_cannot_be_parsed_may_run_again(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        assert (await session.stop_runtimes([A], journal=path)).ok
        listed = {"runtimes": [{"alias": "a"}, dict(emulator.runtimes[B])]}
        emulator.inject(Reply(200, body=listed), method="GET")
        emulator.inject(Fault.HANG, method="POST")
        async with session.stop_workspace("ws-1", journal=path, concurrency=1):
            await wait_for_requests(emulator, len(emulator.requests) + 2)
            killed = states(path)

        assert killed == {"a": RuntimeState.UNCONFIRMED}

    async def test_one_that_is_listed_as_active_and_cannot_be_stopped_is_sent_by_the_next_run(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        """Fault: the journal kept the earlier stop, and the next run did not send it again."""
        assert (await session.stop_workspace("ws-1", journal=path)).ok
        emulator.add_runtime(*A)
        emulator.inject(Reply(403))
        assert not (await session.stop_workspace("ws-1", journal=path)).ok
        assert states(path)["a"] is RuntimeState.STILL_RUNNING

        report = await session.stop_runtimes([A, B, C], journal=path)

        assert (report.ok, report.resumed) == (True, 2)
        assert emulator.status(*A) == "stopped"

    async def test_one_that_the_list_no_longer_has_stays_pending(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        emulator.inject(Reply(403), alias="a")
        assert not (await session.stop_workspace("ws-1", journal=path)).ok
        emulator.inject(Reply(200, body={"runtimes": []}), method="GET")

        assert (await session.stop_workspace("ws-1", journal=path)).total == 0
        assert states(path)["a"] is not RuntimeState.NOT_RUNNING

    async def test_a_list_that_cannot_be_written_ends_the_run_early(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        assert (await session.stop_workspace("ws-1", journal=path)).ok
        emulator.add_runtime(*A)
        with disk_of(len(content(path)) + 10):
            report = await session.stop_workspace("ws-1", journal=path)

        assert (report.ok, report.counts) == (False, {StopResult.NOT_SENT: 1})
        assert "cannot be written" in str(report.ended_early)
        assert emulator.status(*A) == "active"


class TestUnusable:
    @pytest.mark.parametrize("data", [b"my notes\n", b"ws-1,a\n", b"\0" * 100, b"[]\n", b"{}\n"])
    async def test_another_file_is_rejected_unchanged_before_anything_is_sent(
        self, emulator: Emulator, session: BctrlSession, path: Path, data: bytes
    ) -> None:
        fill(path, data)
        batch = session.stop_runtimes([A], journal=path)
        with pytest.raises(BctrlConfigError, match="it is not a journal"):
            await batch
        async with session.stop_runtimes([A], journal=path) as entered:
            with pytest.raises(BctrlConfigError, match="it is not a journal"):
                await anext(entered)

        assert emulator.requests == []
        assert not batch.report.ok
        assert content(path) == data

    @pytest.mark.parametrize(
        ("old", "new", "reason"),
        [
            (b'"version":3', b'"version":2', "it is damaged at byte 0"),
            (b"127.0.0.1", b"127.0.0.2", "it is damaged at byte 0"),
            (b"bctrl_async", b"bctrl_other", "it is not a journal"),
        ],
    )
    async def test_a_changed_header_is_an_error(
        self, session: BctrlSession, path: Path, old: bytes, new: bytes, reason: str
    ) -> None:
        await session.stop_runtimes([A], journal=path)
        fill(path, content(path).replace(old, new))

        with pytest.raises(BctrlConfigError, match=reason):
            await session.stop_runtimes([A], journal=path)

    async def test_a_folder_a_device_a_missing_folder_and_a_pipe_are_rejected(
        self, emulator: Emulator, session: BctrlSession, tmp_path: Path
    ) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        for path, reason in (
            (tmp_path, "it is not a regular file"),
            ("/dev/zero", "it is not a regular file"),
            (pipe, "it is not a regular file"),
            (tmp_path / "no" / "such", "No such file or directory"),
            ("a\0b", "embedded null byte"),
        ):
            async with asyncio.timeout(BOUND):
                with pytest.raises(BctrlConfigError, match=reason):
                    await session.stop_runtimes([A], journal=path)
        assert emulator.requests == []

    async def test_a_file_system_without_locks_is_a_clear_error(
        self, session: BctrlSession, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(BctrlConfigError, match="cannot be used: No locks available"):
            await session.stop_runtimes([A], journal=path)


class TestLock:
    async def test_two_runs_cannot_share_one(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        link = path.with_name("link")
        link.symlink_to(path)
        emulator.inject(Fault.HANG)
        async with session.stop_runtimes([A], journal=path):
            await wait_for_requests(emulator, 1)
            before = content(path)
            for name in (path, link):
                with pytest.raises(JournalInUseError, match=IN_USE) as caught:
                    await session.stop_runtimes([B], journal=name)
            # Reading is no use of it.
            assert list(read_journals([path])) == []
            assert content(path) == before
        assert str(link) in str(caught.value)
        assert emulator.received[B] == 0
        assert (await session.stop_runtimes([A, B], journal=path)).ok

    async def test_it_holds_against_other_processes(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        program = (
            "import asyncio, sys\nfrom bctrl_async import BctrlSession\n"
            "async def main(url, path):\n"
            "    async with BctrlSession('key', base_url=url) as session:\n"
            "        try: await session.stop_runtimes([('ws-1', 'b')], journal=path)\n"
            "        except ValueError as error: print(error)\n"
            "asyncio.run(main(*sys.argv[1:]))"
        )
        emulator.inject(Fault.HANG)
        async with session.stop_runtimes([A], journal=path):
            await wait_for_requests(emulator, 1)
            run = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-c", program, emulator.url, str(path)],
                capture_output=True,
                text=True,
                timeout=BOUND,
                check=True,
            )

        assert IN_USE in run.stdout
        assert emulator.received[B] == 0

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
    async def test_a_descriptor_inherited_by_a_child_does_not_keep_it(
        self, session: BctrlSession, path: Path
    ) -> None:
        # A child that was forked meanwhile has the same open file as a duplicate.
        duplicates: list[int] = []

        def duplicate(_: StopOutcome) -> None:
            links = list(Path("/proc/self/fd").iterdir())
            same = [link for link in links if link.exists() and link.samefile(path)]
            duplicates.extend(os.dup(int(link.name)) for link in same)

        await session.stop_runtimes([A], journal=path, on_outcome=duplicate)
        assert duplicates
        assert (await session.stop_runtimes([B], journal=path)).ok
        for number in duplicates:
            os.close(number)

    @pytest.mark.parametrize("again", [False, True])
    async def test_a_run_cancelled_while_its_journal_is_opened_leaves_none(
        self,
        emulator: Emulator,
        session: BctrlSession,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        again: bool,
    ) -> None:
        asked, go_on = threading.Event(), threading.Event()
        real = fcntl.flock

        def slow(file: int, operation: int) -> None:
            asked.set()
            go_on.wait(10)
            real(file, operation)

        monkeypatch.setattr(fcntl, "flock", slow)
        batch = session.stop_runtimes([A, B], journal=path)
        run = asyncio.create_task(await_batch(batch))
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

        # Fault: `report.ok` was true although nothing was read.
        assert (batch.report.total, batch.report.ok) == (0, False)
        assert emulator.requests == []
        assert (await session.stop_runtimes([A, B], journal=path)).ok

    async def test_a_run_cancelled_while_its_journal_is_rejected_is_cancelled(
        self, session: BctrlSession, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked, go_on = threading.Event(), threading.Event()

        def slow(*_: object) -> None:
            asked.set()
            go_on.wait(10)
            raise BlockingIOError

        monkeypatch.setattr(fcntl, "flock", slow)
        run = asyncio.create_task(await_batch(session.stop_runtimes([A], journal=path)))
        await until(asked.is_set)
        run.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await run


class TestFullDisk:
    def agrees(self, report: StopReport, emulator: Emulator, path: Path) -> None:
        """Check the report of a first run against the server's state."""
        active = sum(emulator.status(*target) == "active" for target in MANY)
        assert report.counts.total() == report.total
        assert report.counts[StopResult.STOPPED] == emulator.received.total() == 40 - active
        assert set(report.counts) <= {StopResult.STOPPED, StopResult.NOT_SENT}
        assert len(report.failures) == report.counts[StopResult.NOT_SENT]
        assert not report.ok
        assert type(report.ended_early) is BctrlError
        assert f"the journal {str(path)!r} cannot be written" in str(report.ended_early)

    @pytest.mark.parametrize("workers", [1, 8])
    @pytest.mark.parametrize("room", [240, 900, 930, 960])
    async def test_it_ends_the_run_with_a_true_report_and_a_journal_that_resumes(
        self, emulator: Emulator, session: BctrlSession, path: Path, room: int, workers: int
    ) -> None:
        add_runtimes(emulator, 40)
        with disk_of(room):
            first = await session.stop_runtimes(MANY, journal=path, concurrency=workers)

        assert len(content(path)) <= room
        self.agrees(first, emulator, path)
        assert first.total == 40
        assert first.counts[StopResult.NOT_SENT] >= 40 - 6 - workers
        sent, kept = emulator.received.total(), states(path)

        second = await session.stop_runtimes(MANY, journal=path)

        assert (second.ok, second.resumed) == (True, len(kept))
        assert second.counts[StopResult.ALREADY_STOPPED] == sent - len(kept)
        assert all(emulator.status(*target) == "stopped" for target in MANY)
        total = emulator.received.total()
        assert (await session.stop_runtimes(MANY, journal=path)).resumed == 40
        assert emulator.received.total() == total

    async def test_what_the_journal_has_is_still_resumed(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        add_runtimes(emulator, 40)
        await session.stop_runtimes(MANY[20:], journal=path)
        with disk_of(len(content(path)) + 10):
            report = await session.stop_runtimes(MANY, journal=path, concurrency=1)

        assert report.counts == {StopResult.STOPPED: 21, StopResult.NOT_SENT: 19}
        assert report.resumed == 20

    async def test_an_input_without_a_length_is_read_no_further(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        add_runtimes(emulator, 40)
        left = iter(MANY)
        with disk_of(600):
            report = await session.stop_runtimes(
                (target for target in left), journal=path, concurrency=2
            )

        self.agrees(report, emulator, path)
        assert report.total < 10
        assert len(list(left)) == 40 - report.total
        assert (await session.stop_runtimes(MANY, journal=path)).ok

    async def test_outcomes_are_still_delivered(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        add_runtimes(emulator, 40)
        with disk_of(600):
            async with session.stop_runtimes(MANY, journal=path, concurrency=2) as batch:
                delivered = [each async for each in batch]

        assert sorted(each.index for each in delivered) == list(range(40))
        self.agrees(batch.report, emulator, path)

    async def test_one_without_room_for_the_header_is_raised_before_anything_is_sent(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        with disk_of(30), pytest.raises(BctrlError, match="cannot be written") as caught:
            await session.stop_runtimes([A], journal=path)

        assert "Free some space" in str(caught.value)
        assert emulator.requests == []
        assert (await session.stop_runtimes([A], journal=path)).ok

    async def test_a_failed_flush_is_in_the_report(
        self, session: BctrlSession, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)
        report = await session.stop_runtimes([A, B], journal=path)
        monkeypatch.undo()

        assert (report.counts, report.failures) == ({StopResult.STOPPED: 2}, ())
        assert not report.ok
        assert "Input/output error" in str(report.ended_early)
        assert (await session.stop_runtimes([A, B], journal=path)).resumed == 2
