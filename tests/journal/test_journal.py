"""The journal of a bulk stop: what it has, and what the next run sends because of it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers import BOUND, Connect, add_runtimes, await_batch, until, wait_for_requests
from journal_lines import entry_line, header_line, read_lines
from servers import answering, http_answer, raw_server
from test_observer import Recorder

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    RetryPolicy,
    RuntimeRef,
    RuntimeState,
    StopBatch,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.bulk._targets import Targets
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


@dataclass
class Stops:
    """Bulk stops by one session, with the same journal."""

    emulator: Emulator
    session: BctrlSession
    path: Path

    def run(self, targets: Targets, **options: Any) -> StopBatch:  # noqa: ANN401
        return self.session.stop_runtimes(targets, journal=self.path, **options)

    def run_workspace(self, **options: Any) -> StopBatch:  # noqa: ANN401
        return self.session.stop_workspace("ws-1", journal=self.path, **options)

    def content(self) -> bytes:
        return self.path.read_bytes()

    def fill(self, data: bytes) -> None:
        self.path.write_bytes(data)

    def results(self) -> list[tuple[str, str]]:
        """Return the alias and result of each entry."""
        return [(each["alias"], each["result"]) for each in read_lines(self.content()).entries]

    def states(self) -> dict[str, RuntimeState]:
        return {each.target.alias: each.state for each in read_journals([self.path])}


@pytest.fixture
def stops(emulator: Emulator, session: BctrlSession, path: Path) -> Stops:
    for target in (A, B, C):
        emulator.add_runtime(*target)
    return Stops(emulator, session, path)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Limit the size of every file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_leaving_the_block_while_the_journal_is_closed_ends_the_run_as_it_was(
    connect: Connect, stops: Stops, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, released = threading.Event(), threading.Event()
    close = Journal.close

    def close_late(journal: Journal) -> None:
        closing.set()
        released.wait(BOUND)
        close(journal)

    monkeypatch.setattr(Journal, "close", close_late)
    recorder = Recorder()
    async with connect(observer=recorder) as session:
        async with session.stop_runtimes([A, B], journal=stops.path) as batch:
            await anext(batch)
            await until(closing.is_set)
            asyncio.get_running_loop().call_soon(released.set)

        assert batch.report.ok
        assert recorder.begun == 0


class TestFile:
    async def test_it_is_a_header_and_a_line_of_json_for_each_outcome(self, stops: Stops) -> None:
        stops.emulator.inject(Fault.ACCEPTED, alias="b")
        stops.emulator.add_runtime("ws-1", "c", status="stopped")
        targets = [A, B, C, ("ws-1", "gone"), ("ws-1", "x y\u2028é"), ("ws-1", "..")]

        await stops.run(targets, verify=False)

        header, found, is_torn = read_lines(stops.content())
        assert (header["version"], header["base_url"]) == (3, f"{stops.emulator.url}/v1")
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

    async def test_an_outcome_is_written_before_it_is_delivered(self, stops: Stops) -> None:
        late: list[StopOutcome] = []

        def check(outcome: StopOutcome) -> None:
            if (outcome.target.alias, outcome.result) not in stops.results():
                late.append(outcome)

        await stops.run([A, B], on_outcome=check)

        assert late == []
        assert len(stops.results()) == 2

    async def test_a_lone_surrogate_and_an_endless_name_spoil_neither_run_nor_journal(
        self, stops: Stops
    ) -> None:
        targets = [("ws-1", "\ud800"), A, ("\udfff", "b"), ("ws-1", "é" * 100_000)]
        for _ in range(2):
            report = await stops.run(targets)
            assert report.counts == {StopResult.REJECTED: 3, StopResult.STOPPED: 1}
            assert report.ended_early is None

        assert [alias for alias, _ in stops.results()].count("a") == 1
        assert max(map(len, stops.content().splitlines())) < 6_000
        # The shortened name is too long for that of a runtime.
        assert f"{'é' * 1000}…" in stops.states()

    async def test_an_endless_description_leaves_the_names_of_its_runtime(
        self, stops: Stops
    ) -> None:
        # Each character of these texts takes six bytes of a line.
        texts = dict.fromkeys(("driver", "createdAt", "updatedAt"), "\1" * 10_000)
        active = {**stops.emulator.runtimes[A], **texts}
        stops.emulator.inject(Reply(200, body=active, takes_effect=False), alias="a")

        await stops.run([A], verify=False)

        assert len(stops.content()) < 2_000
        assert stops.states() == {"a": RuntimeState.STILL_RUNNING}

    async def test_a_key_echoed_by_the_server_is_redacted(self, stops: Stops) -> None:
        body = json.dumps(dict.fromkeys(("code", "error", "hint", KEY), f"Bearer {KEY}"))
        answer = http_answer("400 Bad Request", body.encode(), f"x-request-id: {KEY}")
        async with (
            raw_server(answering(answer)) as url,
            BctrlSession(KEY, base_url=url) as session,
        ):
            await session.stop_runtimes([A], journal=stops.path)

        assert len(stops.results()) == 1
        assert KEY.encode() not in stops.content()
        assert b"***" in stops.content()


class TestResume:
    async def test_what_no_longer_runs_is_not_sent_again(self, stops: Stops) -> None:
        stops.emulator.inject(Fault.SERVER_ERROR, alias="a")  # It takes two attempts.
        stops.emulator.inject(Fault.FAILED, alias="b")
        stops.emulator.add_runtime("ws-1", "c", status="stopped")
        firsts: list[StopOutcome] = []
        first = await stops.run([A, B, C], on_outcome=firsts.append)
        received, written = stops.emulator.received.copy(), stops.content()
        outcomes: list[StopOutcome] = []

        second = await stops.run([C, B, A, A], on_outcome=outcomes.append)

        assert (stops.emulator.received, stops.content()) == (received, written)
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

    async def test_all_else_is_sent_again(self, stops: Stops) -> None:
        active = dict(stops.emulator.runtimes[A])
        stops.emulator.inject(Reply(200, body=active, takes_effect=False), alias="a")
        stops.emulator.inject(Fault.SERVER_ERROR, alias="b")
        stops.emulator.inject(Reply(403), alias="c")
        first = await stops.run([A, B, C], retry=ONCE, verify=False)
        assert {each.result for each in first.failures} == {"accepted", "unknown", "rejected"}

        second = await stops.run([A, B, C])

        assert (second.counts, second.resumed) == ({StopResult.STOPPED: 3}, 0)
        assert [stops.emulator.received[target] for target in (A, B, C)] == [2, 2, 2]
        assert set(stops.states().values()) == {RuntimeState.NOT_RUNNING}

    @pytest.mark.parametrize("missing_ok", [False, True])
    async def test_a_target_that_was_not_found_is_always_sent_again(
        self, stops: Stops, *, missing_ok: bool
    ) -> None:
        late = ("ws-1", "late")
        await stops.run([late, A], missing_ok=missing_ok)
        stops.emulator.add_runtime(*late)

        report = await stops.run([late, A])

        assert (report.counts, report.resumed) == ({StopResult.STOPPED: 2}, 1)
        assert stops.emulator.status(*late) == "stopped"

    async def test_the_last_entry_of_a_target_wins(self, stops: Stops) -> None:
        stops.emulator.inject(None, Reply(403), alias="a")
        first = await stops.run([A, A], concurrency=1)
        assert first.counts == {StopResult.STOPPED: 1, StopResult.REJECTED: 1}
        assert stops.states() == {"a": RuntimeState.UNCONFIRMED}

        second = await stops.run([A])

        assert (second.counts, second.resumed) == ({StopResult.ALREADY_STOPPED: 1}, 0)
        assert stops.states() == {"a": RuntimeState.NOT_RUNNING}

    async def test_an_input_that_raises_leaves_its_outcomes_and_no_lock(self, stops: Stops) -> None:
        def broken() -> Iterator[RuntimeRef]:
            yield A
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            await stops.run(broken())

        assert stops.results() == [("a", "stopped")]
        assert (await stops.run([A, B])).ok

    async def test_an_entry_that_cannot_be_read_again_is_sent_again(self, stops: Stops) -> None:
        await stops.run([A, B], concurrency=1)
        done: list[StopOutcome] = []

        def spoil(outcome: StopOutcome) -> None:
            done.append(outcome)
            data = stops.content()
            stops.fill(data.replace(b'"stopped"', b'"STOPPED"'))

        report = await stops.run([C, A, B], concurrency=1, on_outcome=spoil)

        assert report.ok
        assert [each.resumed for each in done] == [False, False, False]
        assert [stops.emulator.received[target] for target in (A, B, C)] == [2, 2, 1]


class TestList:
    """The list of `stop_workspace` decides what is sent, never the journal."""

    async def test_what_is_listed_as_running_is_stopped_whatever_the_journal_has(
        self, stops: Stops, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert (await stops.run_workspace()).ok
        stops.emulator.add_runtime(*A)

        report = await stops.run_workspace()

        assert (report.counts, report.resumed) == ({StopResult.STOPPED: 1}, 0)
        assert stops.emulator.status(*A) == "stopped"
        assert caplog.records == []

    async def killed_at_the_first_stop(self, stops: Stops) -> list[StopOutcome]:
        """Return what the journal has if the run is killed during its first stop."""
        stops.emulator.inject(Fault.HANG, method="POST")
        async with stops.run_workspace(concurrency=1):
            await wait_for_requests(stops.emulator, len(stops.emulator.requests) + 2)
            return list(read_journals([stops.path]))

    async def test_all_of_it_is_in_the_journal_and_on_disk_before_the_first_stop(
        self, stops: Stops, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert (await stops.run_workspace()).ok
        for target in (A, B, C):
            stops.emulator.add_runtime(*target)
        before, flushed = len(stops.emulator.stops), list[int]()
        monkeypatch.setattr(
            os, "fsync", lambda _: flushed.append(len(stops.emulator.stops) - before)
        )

        killed = await self.killed_at_the_first_stop(stops)

        # It is flushed at the end of the run as well.
        assert flushed == [0, 1]
        again = [each for each in killed if each.target.alias != "crm"]
        assert len(again) == 3
        for each in again:
            assert each.state is RuntimeState.STILL_RUNNING
            assert each.runtime is not None
            assert "the workspace was listed, and it runs" in str(each.error)

    @pytest.mark.parametrize("is_missing", [False, True])
    async def test_what_is_not_sent_again_for_certain_is_written_as_well(
        self, stops: Stops, *, is_missing: bool
    ) -> None:
        """Fault: it was done by `report`, and by the next run once the future had come."""
        ahead = datetime.now(UTC) + timedelta(hours=1)
        if is_missing:
            assert (await stops.run([("ws-1", "late")], missing_ok=True)).ok
            stops.emulator.add_runtime("ws-1", "late")
        else:
            stops.fill(header_line(f"{stops.emulator.url}/v1", ahead) + entry_line(A, ahead))

        killed = await self.killed_at_the_first_stop(stops)

        assert [each.state for each in killed] == [RuntimeState.STILL_RUNNING]

    async def test_one_that_cannot_be_parsed_may_run_again(self, stops: Stops) -> None:
        assert (await stops.run([A])).ok
        listed = {"runtimes": [{"alias": "a"}, dict(stops.emulator.runtimes[B])]}
        stops.emulator.inject(Reply(200, body=listed), method="GET")

        [killed] = await self.killed_at_the_first_stop(stops)

        assert (killed.target, killed.state) == (A, RuntimeState.UNCONFIRMED)

    async def test_one_that_is_listed_as_active_and_cannot_be_stopped_is_sent_by_the_next_run(
        self, stops: Stops
    ) -> None:
        assert (await stops.run_workspace()).ok
        stops.emulator.add_runtime(*A)
        stops.emulator.inject(Reply(403))
        assert not (await stops.run_workspace()).ok
        assert stops.states()["a"] is RuntimeState.STILL_RUNNING

        report = await stops.run([A, B, C])

        assert (report.ok, report.resumed) == (True, 2)
        assert stops.emulator.status(*A) == "stopped"

    async def test_one_that_the_list_no_longer_has_stays_pending(self, stops: Stops) -> None:
        stops.emulator.inject(Reply(403), alias="a")
        assert not (await stops.run_workspace()).ok
        stops.emulator.inject(Reply(200, body={"runtimes": []}), method="GET")

        assert (await stops.run_workspace()).total == 0
        assert stops.states()["a"] is not RuntimeState.NOT_RUNNING

    async def test_a_list_that_cannot_be_written_ends_the_run_early(self, stops: Stops) -> None:
        assert (await stops.run_workspace()).ok
        stops.emulator.add_runtime(*A)
        with disk_of(len(stops.content()) + 10):
            report = await stops.run_workspace()

        assert (report.ok, report.counts) == (False, {StopResult.NOT_SENT: 1})
        assert "cannot be written" in str(report.ended_early)
        assert stops.emulator.status(*A) == "active"


class TestUnusable:
    async def test_another_file_is_rejected_unchanged_before_anything_is_sent(
        self, stops: Stops
    ) -> None:
        stops.fill(b"my notes\n")
        batch = stops.run([A])
        with pytest.raises(BctrlConfigError, match="it is not a journal"):
            await batch
        async with stops.run([A]) as entered:
            with pytest.raises(BctrlConfigError, match="it is not a journal"):
                await anext(entered)

        assert stops.emulator.requests == []
        assert not batch.report.ok
        assert stops.content() == b"my notes\n"

    async def test_a_file_system_without_locks_is_a_clear_error(
        self, stops: Stops, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(BctrlConfigError, match="cannot be used: No locks available"):
            await stops.run([A])


class TestLock:
    async def test_two_runs_cannot_share_one(self, stops: Stops) -> None:
        link = stops.path.with_name("link")
        link.symlink_to(stops.path)
        stops.emulator.inject(Fault.HANG)
        async with stops.run([A]):
            await wait_for_requests(stops.emulator, 1)
            before = stops.content()
            for name in (stops.path, link):
                with pytest.raises(JournalInUseError, match=IN_USE) as caught:
                    await stops.session.stop_runtimes([B], journal=name)
            # Reading is no use of it.
            assert list(read_journals([stops.path])) == []
            assert stops.content() == before
        assert str(link) in str(caught.value)
        assert stops.emulator.received[B] == 0
        assert (await stops.run([A, B])).ok

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
    async def test_a_descriptor_inherited_by_a_child_does_not_keep_it(self, stops: Stops) -> None:
        # A child that was forked meanwhile has the same open file as a duplicate.
        duplicates: list[int] = []

        def duplicate(_: StopOutcome) -> None:
            links = list(Path("/proc/self/fd").iterdir())
            same = [link for link in links if link.exists() and link.samefile(stops.path)]
            duplicates.extend(os.dup(int(link.name)) for link in same)

        await stops.run([A], on_outcome=duplicate)
        assert duplicates
        assert (await stops.run([B])).ok
        for number in duplicates:
            os.close(number)

    @pytest.mark.parametrize("error", [None, BlockingIOError()])
    @pytest.mark.parametrize("times", [1, 2])
    async def test_a_run_cancelled_while_its_journal_is_opened_leaves_none(
        self,
        stops: Stops,
        monkeypatch: pytest.MonkeyPatch,
        *,
        times: int,
        error: OSError | None,
    ) -> None:
        asked, go_on = threading.Event(), threading.Event()
        real = fcntl.flock

        def slow(file: int, operation: int) -> None:
            asked.set()
            go_on.wait(BOUND)
            if error is not None:
                raise error
            real(file, operation)

        monkeypatch.setattr(fcntl, "flock", slow)
        batch = stops.run([A, B])
        run = asyncio.create_task(await_batch(batch))
        await until(asked.is_set)
        for _ in range(times):
            run.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert not run.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await run
        monkeypatch.undo()

        assert (batch.report.total, batch.report.ok) == (0, False)
        assert stops.emulator.requests == []
        assert (await stops.run([A, B])).ok


class TestFullDisk:
    def agrees(self, report: StopReport, stops: Stops) -> None:
        """Check the report of a first run against the server's state."""
        active = sum(stops.emulator.status(*target) == "active" for target in MANY)
        assert report.counts.total() == report.total
        assert report.counts[StopResult.STOPPED] == stops.emulator.received.total() == 40 - active
        assert set(report.counts) <= {StopResult.STOPPED, StopResult.NOT_SENT}
        assert len(report.failures) == report.counts[StopResult.NOT_SENT]
        assert not report.ok
        assert type(report.ended_early) is BctrlError
        assert f"the journal {str(stops.path)!r} cannot be written" in str(report.ended_early)

    @pytest.mark.parametrize("workers", [1, 8])
    @pytest.mark.parametrize("room", [240, 900, 930, 960])
    async def test_it_ends_the_run_with_a_true_report_and_a_journal_that_resumes(
        self, stops: Stops, room: int, workers: int
    ) -> None:
        add_runtimes(stops.emulator, 40)
        delivered: list[StopOutcome] = []
        with disk_of(room):
            first = await stops.run(MANY, concurrency=workers, on_outcome=delivered.append)
        assert sorted(each.index for each in delivered) == list(range(40))

        assert len(stops.content()) <= room
        self.agrees(first, stops)
        assert first.total == 40
        assert first.counts[StopResult.NOT_SENT] >= 40 - 6 - workers
        sent, kept = stops.emulator.received.total(), stops.states()

        second = await stops.run(MANY)

        assert (second.ok, second.resumed) == (True, len(kept))
        assert second.counts[StopResult.ALREADY_STOPPED] == sent - len(kept)
        assert all(stops.emulator.status(*target) == "stopped" for target in MANY)
        total = stops.emulator.received.total()
        assert (await stops.run(MANY)).resumed == 40
        assert stops.emulator.received.total() == total

    async def test_what_the_journal_has_is_still_resumed(self, stops: Stops) -> None:
        add_runtimes(stops.emulator, 40)
        await stops.run(MANY[20:])
        with disk_of(len(stops.content()) + 10):
            report = await stops.run(MANY, concurrency=1)

        assert report.counts == {StopResult.STOPPED: 21, StopResult.NOT_SENT: 19}
        assert report.resumed == 20

    async def test_an_input_without_a_length_is_read_no_further(self, stops: Stops) -> None:
        add_runtimes(stops.emulator, 40)
        left = iter(MANY)
        with disk_of(600):
            report = await stops.run((target for target in left), concurrency=2)

        self.agrees(report, stops)
        assert report.total < 10
        assert len(list(left)) == 40 - report.total
        assert (await stops.run(MANY)).ok

    async def test_one_without_room_for_the_header_is_raised_before_anything_is_sent(
        self, stops: Stops
    ) -> None:
        with disk_of(30), pytest.raises(BctrlError, match="cannot be written") as caught:
            await stops.run([A])

        assert "Free some space" in str(caught.value)
        assert stops.emulator.requests == []
        assert (await stops.run([A])).ok

    async def test_a_failed_flush_is_in_the_report(
        self, stops: Stops, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)
        report = await stops.run([A, B])
        monkeypatch.undo()

        assert (report.counts, report.failures) == ({StopResult.STOPPED: 2}, ())
        assert not report.ok
        assert "Input/output error" in str(report.ended_early)
        assert (await stops.run([A, B])).resumed == 2
