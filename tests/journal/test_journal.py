"""The journal of a bulk stop: its lines, and what the next run sends."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import resource
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.helpers import (
    BOUND,
    add_runtimes,
    await_batch,
    until,
    wait_for_requests,
)
from support.journal_lines import entry_line, header_line, read_lines
from support.runtimes import Name

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    RuntimeRef,
    StopBatch,
    StopOutcome,
    StopResult,
)
from bctrl_async.bulk._input import Targets
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.journal import Journal, JournalFile, JournalInUseError, read_journals

A, B, C = (RuntimeRef("ws-1", alias) for alias in "abc")
LATE = RuntimeRef("ws-1", "late")
MANY = [("ws-1", f"r{number}") for number in range(40)]
STOPPED, NOT_SENT = StopResult.STOPPED, StopResult.NOT_SENT


@dataclass
class Stops:
    """Bulk stops by one session, with the same journal."""

    emulator: Emulator
    session: BctrlSession
    path: Path
    patch: pytest.MonkeyPatch

    def run(self, targets: Targets, **options: Any) -> StopBatch:  # noqa: ANN401 - passed on.
        return self.session.stop_runtimes(targets, journal=self.path, **options)

    def run_workspace(self, **options: Any) -> StopBatch:  # noqa: ANN401 - passed on.
        return self.session.stop_workspace("ws-1", journal=self.path, **options)

    def results(self) -> list[tuple[str, str]]:
        """Return the alias and result of each entry."""
        entries = read_lines(self.path.read_bytes()).entries
        return [(entry["alias"], entry["result"]) for entry in entries]

    def running(self) -> dict[str, bool | None]:
        return {
            outcome.target.alias: outcome.running
            for outcome in read_journals([self.path])
        }


@pytest.fixture
def stops(
    emulator: Emulator,
    session: BctrlSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Stops:
    for target in (A, B, C):
        emulator.add_runtime(*target)
    return Stops(emulator, session, tmp_path / "stops.jsonl", monkeypatch)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Limit the size of every file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFile:
    async def test_it_is_a_header_and_a_line_of_json_for_each_outcome(
        self, stops: Stops
    ) -> None:
        stops.emulator.inject(Fault.ACCEPTED, alias="b")

        await stops.run([A, B, ("ws-1", "x y\u2028é"), ("ws-1", "..")], verify=False)

        header, found, _ = read_lines(stops.path.read_bytes())
        assert (header["version"], header["base_url"]) == (
            1,
            f"{stops.emulator.url}/v1",
        )
        stopped, accepted, missing, invalid = sorted(
            found, key=lambda entry: entry["index"]
        )
        assert (stopped["alias"], stopped["ok"], stopped["running"]) == (
            "a",
            True,
            False,
        )
        assert "runtime" not in stopped
        assert accepted["runtime"]["status"] == "active"
        assert accepted["error"]["type"] == "BctrlError"
        assert (missing["alias"], missing["result"]) == ("x y\u2028é", "not_found")
        assert (invalid["alias"], invalid["result"]) == ("..", "invalid")

    async def test_an_outcome_is_written_before_it_is_delivered(
        self, stops: Stops
    ) -> None:
        written: list[bool] = []

        def check(outcome: StopOutcome) -> None:
            written.append((outcome.target.alias, outcome.result) in stops.results())

        await stops.run([A, B], on_outcome=check)

        assert written == [True, True]

    async def test_an_endless_text_leaves_a_short_line_with_the_names(
        self, stops: Stops
    ) -> None:
        # Each character of these texts takes six bytes of a line.
        texts = dict.fromkeys(("driver", "createdAt", "updatedAt"), "\1" * 10_000)
        active = {**stops.emulator.runtimes[A], **texts}
        stops.emulator.inject(Reply(200, body=active, takes_effect=False), alias="a")

        await stops.run([A, ("ws-1", "é" * 100_000)], verify=False)

        assert max(map(len, stops.path.read_bytes().splitlines())) < 6_000
        assert stops.running() == {
            "a": True,
            # The shortened name is too long for a runtime's.
            f"{'é' * 1000}…": None,
        }

    async def test_a_target_has_the_same_result_in_the_run_and_in_the_journal(
        self, stops: Stops
    ) -> None:
        """Fault: an enum's member, or an invalid name, was in no journal."""
        names = ["\ud800", "..", "é" * 100_000]
        targets = [(Name.WORKSPACE, "a"), *(("ws-1", name) for name in names)]
        report = await stops.run(targets)
        assert report.counts == {STOPPED: 1, StopResult.INVALID: 3}

        outcomes = list(read_journals([stops.path], targets))

        assert [outcome.result for outcome in outcomes] == [
            STOPPED,
            *[StopResult.INVALID] * 3,
        ]
        assert [outcome.target.alias for outcome in outcomes] == ["a", *names]
        assert outcomes[0].target == A

    async def test_leaving_the_block_while_it_is_closed_is_no_early_end(
        self, stops: Stops
    ) -> None:
        closing, released = threading.Event(), threading.Event()
        close = JournalFile.close

        def close_late(file: JournalFile) -> None:
            closing.set()
            released.wait(BOUND)
            close(file)

        stops.patch.setattr(JournalFile, "close", close_late)
        async with stops.run([A, B]) as batch:
            await anext(batch)
            await until(closing.is_set)
            asyncio.get_running_loop().call_soon(released.set)

        assert batch.report.ok


class TestClose:
    async def test_without_a_thread_it_is_flushed_and_unlocked_even_so(
        self, stops: Stops
    ) -> None:
        """Fault: it was not, and nothing said so."""
        flushed: list[int] = []
        stops.patch.setattr(os, "fsync", lambda _: flushed.append(len(stops.results())))

        async def start_no_thread(*_: object) -> None:
            await asyncio.sleep(0)
            raise RuntimeError("can't start new thread")

        def use_up_threads(_: StopOutcome) -> None:
            stops.patch.setattr(asyncio, "to_thread", start_no_thread)

        batch = stops.run([A, B], on_outcome=use_up_threads)
        report = await batch

        assert (report.ok, flushed) == (True, [2])
        Journal(stops.path, base_url=stops.emulator.url).close()

    @pytest.mark.parametrize(
        ("function", "error"),
        [
            ("os.fsync", MemoryError("no memory is left")),
            ("fcntl.flock", OSError(errno.ENOLCK, "no locks available")),
        ],
    )
    async def test_whatever_goes_wrong_is_in_the_report_and_it_is_unlocked(
        self, stops: Stops, function: str, error: Exception
    ) -> None:
        """Fault: some errors were not, and left it locked."""

        def fail(*_: object) -> None:
            raise error

        def break_function(_: StopOutcome) -> None:
            patch.setattr(function, fail)

        with stops.patch.context() as patch:
            batch = stops.run([A, B], on_outcome=break_function)
            report = await batch

        assert (report.ok, report.counts) == (False, {STOPPED: 2})
        assert str(error.args[-1]) in str(report.ended_early)
        Journal(stops.path, base_url=stops.emulator.url).close()


def delete(path: Path) -> None:
    path.unlink()


def move(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def replace_file(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").replace(path)


class TestPlace:
    @pytest.mark.parametrize("change", [delete, move, replace_file])
    async def test_a_run_whose_journal_has_left_its_place_says_so(
        self, stops: Stops, change: Callable[[Path], object]
    ) -> None:
        """Fault: its report was ok, and the next run knew nothing of it."""

        def lose_journal(_: StopOutcome) -> None:
            if batch.read == 2:
                change(stops.path)

        batch = stops.run([A, B], on_outcome=lose_journal, concurrency=1)
        report = await batch

        assert (report.ok, report.counts) == (False, {STOPPED: 2})
        assert "it was moved or deleted" in str(report.ended_early)

    async def test_nothing_is_sent_if_it_has_left_its_place_before(
        self, stops: Stops
    ) -> None:
        with Journal(stops.path, base_url=stops.emulator.url) as journal:
            replace_file(stops.path)
            with pytest.raises(BctrlConfigError, match="it was moved or deleted"):
                await stops.session.stop_runtimes([A], journal=journal)
            with pytest.raises(BctrlError, match="it was moved or deleted"):
                journal.flush()

        assert stops.emulator.requests == []

    async def test_its_place_does_not_depend_on_the_current_folder(
        self, stops: Stops
    ) -> None:
        stops.patch.chdir(stops.path.parent)
        with Journal(stops.path.name, base_url=stops.emulator.url) as journal:
            stops.patch.chdir("/")
            assert (await stops.session.stop_runtimes([A], journal=journal)).ok

        assert stops.results() == [("a", "stopped")]


def spoil_results(journal: bytes) -> bytes:
    return journal.replace(b'"stopped"', b'"STOPPED"')


def swap_entries(journal: bytes) -> bytes:
    header, first, second, *rest = journal.splitlines(keepends=True)
    return b"".join([header, second, first, *rest])


class TestResume:
    async def test_what_no_longer_runs_is_not_sent_again(self, stops: Stops) -> None:
        stops.emulator.inject(Fault.SERVER_ERROR, alias="a")  # It takes two attempts.
        stops.emulator.inject(Fault.FAILED, alias="b")
        stops.emulator.add_runtime("ws-1", "c", status="stopped")
        firsts: list[StopOutcome] = []
        first = await stops.run([A, B, C], on_outcome=firsts.append)
        received, written = stops.emulator.received.copy(), stops.path.read_bytes()
        outcomes: list[StopOutcome] = []

        second = await stops.run([C, B, A, A], on_outcome=outcomes.append)

        assert (stops.emulator.received, stops.path.read_bytes()) == (received, written)
        assert (first.ok, first.retries, first.resumed) == (True, 1, 0)
        assert (second.ok, second.retries, second.resumed) == (True, 0, 4)
        known = {outcome.target: outcome for outcome in firsts}
        for index, target in enumerate([C, B, A, A]):
            kept = {"index": index, "runtime": None, "error": None, "resumed": True}
            elapsed = round(known[target].elapsed, 6)
            assert outcomes[index] == replace(known[target], **kept, elapsed=elapsed)

    @pytest.mark.parametrize("missing_ok", [False, True])
    async def test_all_else_is_sent_again(
        self, stops: Stops, *, missing_ok: bool
    ) -> None:
        active = dict(stops.emulator.runtimes[A])
        stops.emulator.inject(Reply(200, body=active, takes_effect=False), alias="a")
        stops.emulator.inject(Fault.SERVER_ERROR, alias="b")
        stops.emulator.inject(Reply(403), alias="c")
        options = {
            "retry": RetryPolicy(attempts=1),
            "verify": False,
            "missing_ok": missing_ok,
        }
        first = await stops.run([A, B, C, LATE], **options)
        assert set(first.counts) == {"accepted", "unknown", "rejected", "not_found"}
        stops.emulator.add_runtime(*LATE)

        second = await stops.run([A, B, C, LATE])

        assert (second.counts, second.resumed) == ({STOPPED: 4}, 0)
        assert set(stops.running().values()) == {False}

    async def test_what_one_run_did_not_send_another_may_have_sent(
        self, stops: Stops
    ) -> None:
        """Fault: it was `not_sent`, though the next run died after it sent the stop."""
        first = stops.run([A])
        first.stop_reading()
        assert (await first).counts == {NOT_SENT: 1}
        stops.emulator.inject(Fault.HANG)
        async with stops.run([A]):
            await wait_for_requests(stops.emulator, 1)
            # If it were killed now, it would leave no entry.
            [killed] = read_journals([stops.path])

        assert (killed.result, killed.running) == (StopResult.UNKNOWN, None)
        assert str(killed.error) == (
            "stop of 'a' in workspace 'ws-1': not sent: the run was asked to start no "
            "more stops; another run may have sent it (the runtime may have stopped)"
        )

    async def test_an_input_that_raises_leaves_its_outcomes_and_no_lock(
        self, stops: Stops
    ) -> None:
        def broken() -> Iterator[RuntimeRef]:
            yield A
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            await stops.run(broken())

        assert stops.results() == [("a", "stopped")]
        assert (await stops.run([A, B])).resumed == 1

    @pytest.mark.parametrize("change", [spoil_results, swap_entries])
    async def test_an_entry_that_the_file_has_no_more_is_sent_again(
        self, stops: Stops, change: Callable[[bytes], bytes]
    ) -> None:
        """Fault: a journal rewritten in place gave another target's outcome."""
        await stops.run([A, B], concurrency=1)

        def rewrite(_: StopOutcome) -> None:
            stops.path.write_bytes(change(stops.path.read_bytes()))

        report = await stops.run([C, A], concurrency=1, on_outcome=rewrite)

        assert (report.ok, report.resumed) == (True, 0)


class TestList:
    """The list of `stop_workspace` decides what is sent, never the journal."""

    async def killed_at_the_first_stop(self, stops: Stops) -> list[StopOutcome]:
        """Return what the journal has if the run is killed during its first stop."""
        stops.emulator.inject(Fault.HANG, method="POST")
        async with stops.run_workspace(concurrency=1):
            await wait_for_requests(stops.emulator, len(stops.emulator.requests) + 2)
            return list(read_journals([stops.path]))

    async def test_what_is_listed_as_running_is_stopped_again(
        self, stops: Stops
    ) -> None:
        assert (await stops.run_workspace()).ok
        stops.emulator.add_runtime(*A)

        report = await stops.run_workspace()

        assert (report.counts, report.resumed) == ({STOPPED: 1}, 0)

    async def test_what_it_selects_not_is_corrected_too(self, stops: Stops) -> None:
        """Fault: the next run took a listed runtime that runs for stopped."""
        assert (await stops.run([A, B])).ok
        for target in (A, B):
            stops.emulator.add_runtime(*target)

        assert (
            await stops.run_workspace(where=lambda runtime: runtime.alias == "b")
        ).ok
        assert stops.running() == {"a": None, "b": False}
        report = await stops.run([A, B])

        assert (report.ok, report.resumed) == (True, 1)
        assert stops.emulator.status(*A) == "stopped"

    async def test_other_tasks_run_while_entries_are_corrected(
        self, stops: Stops
    ) -> None:
        """Faults: correcting a hundred thousand took one turn; its flush took one."""
        targets = add_runtimes(stops.emulator, 10)
        assert (await stops.run(targets)).ok
        add_runtimes(stops.emulator, 10)
        calls: list[tuple[str, bool]] = []

        def watch(name: str) -> None:
            function = getattr(os, name)

            def call(*args: Any) -> Any:  # noqa: ANN401 - passed on.
                is_in_loop = threading.current_thread() is threading.main_thread()
                calls.append((name, is_in_loop))
                return function(*args)

            stops.patch.setattr(os, name, call)

        watch("write")
        watch("fsync")
        await stops.run_workspace(where=lambda _: False)

        # The header of the run's own end is no write.
        assert calls == [("write", False)] * 10 + [("fsync", False)] * 2

    async def test_a_run_that_is_aborted_meanwhile_corrects_all_of_them(
        self, stops: Stops
    ) -> None:
        """Fault: the next run skipped what the list has as running."""
        targets = add_runtimes(stops.emulator, 300)
        assert (await stops.run(targets)).ok
        add_runtimes(stops.emulator, 300)
        batch = stops.run_workspace(where=lambda runtime: runtime.alias == "a")
        write, loop = os.write, asyncio.get_running_loop()

        def write_and_abort(descriptor: int, data: bytes) -> int:
            loop.call_soon_threadsafe(batch.abort)
            return write(descriptor, data)

        with stops.patch.context() as patch:
            patch.setattr(os, "write", write_and_abort)
            await batch

        assert batch.report.ended_early is not None
        assert set(stops.running().values()) == {None}
        assert (await stops.run(targets)).resumed == 0

    async def test_nothing_is_sent_if_no_thread_can_correct_it(
        self, stops: Stops
    ) -> None:
        async def start_no_thread(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        def use_up_threads(_: Runtime) -> bool:
            stops.patch.setattr(asyncio, "to_thread", start_no_thread)
            return True

        report = await stops.run_workspace(where=use_up_threads)

        assert (set(report.counts), stops.emulator.stops) == ({NOT_SENT}, [])
        assert "can't start new thread" in str(report.ended_early)

    async def test_all_of_it_is_on_disk_before_the_first_stop(
        self, stops: Stops
    ) -> None:
        assert (await stops.run([A, B], concurrency=1)).ok
        listed = {
            "runtimes": [{"alias": "a"}, dict(stops.emulator.runtimes[C], alias="b")]
        }
        stops.emulator.inject(Reply(200, body=listed), method="GET")
        before, flushed = len(stops.emulator.stops), list[int]()
        stops.patch.setattr(
            os, "fsync", lambda _: flushed.append(len(stops.emulator.stops) - before)
        )

        [unreadable, listed_again] = await self.killed_at_the_first_stop(stops)

        # It is flushed at the end of the run as well.
        assert flushed == [0, 1]
        assert (unreadable.target, unreadable.running) == (A, None)
        # It was listed as running, and its stop may be the first.
        assert (listed_again.target, listed_again.running) == (B, None)
        assert "the workspace was listed, and it runs; another run may" in str(
            listed_again.error
        )

    @pytest.mark.parametrize("is_missing", [False, True])
    async def test_what_is_sent_anyway_is_written(
        self, stops: Stops, *, is_missing: bool
    ) -> None:
        """Fault: it was done by `report`, and later by the next run."""
        ahead = datetime.now(UTC) + timedelta(hours=1)
        if is_missing:
            assert (await stops.run([LATE], missing_ok=True)).ok
            stops.emulator.add_runtime(*LATE)
        else:
            header = header_line(f"{stops.emulator.url}/v1", ahead)
            stops.path.write_bytes(header + entry_line(A, ahead))

        killed = await self.killed_at_the_first_stop(stops)

        assert [(outcome.result, outcome.running) for outcome in killed] == [
            (StopResult.UNKNOWN, None)
        ]


class TestOpening:
    async def test_another_file_is_an_error_and_nothing_is_sent(
        self, stops: Stops
    ) -> None:
        stops.path.write_bytes(b"my notes\n")
        batch = stops.run([A])
        with pytest.raises(BctrlConfigError, match="it is not a journal"):
            await batch

        assert (batch.report.ok, stops.emulator.requests) == (False, [])
        assert stops.path.read_bytes() == b"my notes\n"

    async def test_two_runs_cannot_share_one(self, stops: Stops) -> None:
        link = stops.path.with_name("link")
        stops.emulator.inject(Fault.HANG)
        async with stops.run([A]):
            await wait_for_requests(stops.emulator, 1)
            link.hardlink_to(stops.path)
            with pytest.raises(
                JournalInUseError, match="link' is in use by another run"
            ):
                await stops.session.stop_runtimes([B], journal=link)
            # Reading is no use of it.
            assert stops.results() == []
        assert stops.emulator.received[B] == 0
        assert (await stops.run([A, B])).ok

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
    async def test_a_descriptor_inherited_by_a_child_does_not_keep_it(
        self, stops: Stops
    ) -> None:
        # A child that was forked meanwhile has the same open file as a duplicate.
        duplicates: list[int] = []

        def duplicate(_: StopOutcome) -> None:
            links = list(Path("/proc/self/fd").iterdir())
            same = [
                link for link in links if link.exists() and link.samefile(stops.path)
            ]
            duplicates.extend(os.dup(int(link.name)) for link in same)

        await stops.run([A], on_outcome=duplicate)
        assert duplicates
        assert (await stops.run([B])).ok
        for number in duplicates:
            os.close(number)

    @pytest.mark.parametrize("error", [None, BlockingIOError()])
    @pytest.mark.parametrize("times", [1, 2])
    async def test_a_run_cancelled_while_its_journal_is_opened_leaves_none(
        self, stops: Stops, times: int, error: OSError | None
    ) -> None:
        asked, go_on = threading.Event(), threading.Event()
        real = fcntl.flock

        def slow(file: int, operation: int) -> None:
            asked.set()
            go_on.wait(BOUND)
            if error is not None:
                raise error
            real(file, operation)

        batch = stops.run([A, B])
        with stops.patch.context() as patch:
            patch.setattr(fcntl, "flock", slow)
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

        assert (batch.report.total, batch.report.ok) == (0, False)
        assert stops.emulator.requests == []
        assert (await stops.run([A, B])).ok


async def stop_elsewhere(stops: Stops) -> StopOutcome:
    """Stop a runtime in a run elsewhere, start it again, and return that outcome."""
    outcomes: list[StopOutcome] = []
    await stops.session.stop_runtimes([A], on_outcome=outcomes.append)
    stops.emulator.add_runtime(*A)
    return outcomes[0]


class TestOfTheCaller:
    """A `Journal` that the caller made: several runs use it, and so does the caller."""

    @pytest.fixture
    def journal(self, stops: Stops) -> Iterator[Journal]:
        with Journal(stops.path, base_url=stops.emulator.url) as journal:
            yield journal

    async def test_a_run_leaves_it_open_and_locked_with_all_on_disk(
        self, stops: Stops, journal: Journal
    ) -> None:
        flushed: list[int] = []
        stops.patch.setattr(os, "fsync", lambda _: flushed.append(len(stops.results())))
        assert (await stops.session.stop_runtimes([A, B], journal=journal)).ok

        assert flushed == [2]
        with pytest.raises(JournalInUseError, match="is in use by another run"):
            Journal(stops.path, base_url=stops.emulator.url)
        journal.close()
        journal.close()
        assert (await stops.run([A, B])).resumed == 2

    async def test_the_next_run_skips_what_was_written_since(
        self, stops: Stops, journal: Journal
    ) -> None:
        elsewhere = (await stops.session.stop_runtimes([("ws-1", "gone")])).failures[0]
        assert (await stops.session.stop_runtimes([A], journal=journal)).ok
        journal.write(replace(elsewhere, target=B, running=False, error=None))
        journal.write(replace(elsewhere, target=C))

        report = await stops.session.stop_runtimes([A, B, C], journal=journal)

        # Another run says only that C was not found, which may have changed.
        assert (report.ok, report.resumed) == (True, 1)
        assert stops.emulator.received[A] == 1
        assert stops.emulator.received[C] == 1

    async def test_a_list_corrects_what_an_earlier_run_wrote(
        self, stops: Stops, journal: Journal
    ) -> None:
        """Fault: after a crash, a runtime that was started anew counted as stopped."""
        assert (await stops.session.stop_runtimes([A], journal=journal)).ok
        stops.emulator.add_runtime(*A)

        await stops.session.stop_workspace(
            "ws-1", where=lambda _: False, journal=journal
        )

        assert stops.running() == {"a": None}

    async def test_what_was_written_since_a_run_began_is_not_its_past(
        self, stops: Stops, journal: Journal
    ) -> None:
        """Fault: a runtime that was started anew was `stopped`, as if by a resume."""

        async def targets() -> AsyncIterator[RuntimeRef]:
            yield A
            await until(stops.results)
            stops.emulator.add_runtime(*A)
            # Another run reads the entry that this run has written.
            assert (await stops.session.stop_runtimes([B], journal=journal)).ok
            yield A

        report = await stops.session.stop_runtimes(targets(), journal=journal)

        assert (report.counts, report.resumed) == ({STOPPED: 2}, 0)
        assert stops.emulator.status(*A) == "stopped"

    async def test_a_list_corrects_what_was_written_since_its_run_began(
        self, stops: Stops, journal: Journal
    ) -> None:
        """Fault: a runtime that was listed as running counted as stopped."""
        stopped = await stop_elsewhere(stops)

        def write(_: Runtime) -> bool:
            # It comes back late, from a run elsewhere.
            journal.write(stopped)
            return False

        assert (
            await stops.session.stop_workspace("ws-1", where=write, journal=journal)
        ).ok

        assert stops.running() == {"a": None}

    async def test_a_stop_that_was_sent_after_a_list_stands(
        self, stops: Stops, journal: Journal
    ) -> None:
        """Fault: what another run had stopped since the list counted as running."""
        stopped = await stop_elsewhere(stops)

        def write(_: Runtime) -> bool:
            now = datetime.now(UTC)
            journal.write(replace(stopped, sent_at=now, at=now))
            return False

        assert (
            await stops.session.stop_workspace("ws-1", where=write, journal=journal)
        ).ok

        [known] = read_journals([stops.path], [A])
        assert known.ok

    @pytest.mark.parametrize("shares", [True, False])
    async def test_a_stop_that_was_sent_before_a_list_is_older(
        self, stops: Stops, journal: Journal, *, shares: bool
    ) -> None:
        """Fault: its answer was later, so what was started in between was done."""
        other: Journal | Path = journal
        paths = [stops.path]
        if not shares:
            other = stops.path.with_name("other")
            paths.append(other)
            assert (await stops.session.stop_runtimes([A], journal=other)).ok
            stops.emulator.add_runtime(*A)
        stops.emulator.hold(*A)
        requests = len(stops.emulator.requests)
        async with stops.session.stop_runtimes([A], journal=journal) as batch:
            await wait_for_requests(stops.emulator, requests + 1)
            stops.emulator.add_runtime(*A)
            # Its last look has another list.
            await stops.session.stop_workspace(
                "ws-1", where=lambda runtime: runtime.alias == "b", journal=other
            )
            stops.emulator.release(*A)
            assert (await anext(batch)).ok

        [known] = read_journals(paths, [A])
        assert (known.result, known.running) == (StopResult.UNKNOWN, None)

    async def test_a_journal_of_another_server_is_refused(self, stops: Stops) -> None:
        stops.patch.setenv("BCTRL_BASE_URL", "http://127.0.0.1:1/v1/")
        with Journal(stops.path) as journal:
            assert journal.base_url == "http://127.0.0.1:1/v1"
            with pytest.raises(
                BctrlConfigError, match=r"another server, http://127\.0\.0\.1:1/v1"
            ):
                await stops.session.stop_runtimes([A], journal=journal)
        assert stops.emulator.requests == []

    async def test_without_a_url_it_is_of_the_default_server(
        self, stops: Stops
    ) -> None:
        with Journal(stops.path) as journal:
            assert journal.base_url == BctrlSession("k").base_url

    async def test_a_closed_journal_is_refused(
        self, stops: Stops, journal: Journal
    ) -> None:
        outcome = (await stops.session.stop_runtimes([("ws-1", "gone")])).failures[0]
        journal.close()
        journal.flush()

        with pytest.raises(
            BctrlConfigError, match=r"it is closed.*Use it within its `with`"
        ):
            await stops.session.stop_runtimes([A], journal=journal)
        with pytest.raises(BctrlConfigError, match="it is closed"):
            journal.write(outcome)
        assert stops.emulator.received[A] == 0

    async def test_a_run_whose_journal_is_closed_ends_early(
        self, stops: Stops, journal: Journal
    ) -> None:
        report = await stops.session.stop_runtimes(
            [A, B, C],
            journal=journal,
            concurrency=1,
            on_outcome=lambda _: journal.close(),
        )

        assert "it is closed" in str(report.ended_early)
        assert report.counts == {STOPPED: 2, NOT_SENT: 1}

    async def test_a_file_that_was_damaged_since_is_an_error(
        self, stops: Stops, journal: Journal
    ) -> None:
        with stops.path.open("ab") as file:
            file.write(b"my notes\n")
        with pytest.raises(BctrlConfigError, match=r"line [0-9]+ is damaged"):
            await stops.session.stop_runtimes([A], journal=journal)

    async def test_after_a_failed_write_all_others_fail(
        self, stops: Stops, journal: Journal
    ) -> None:
        """Fault: only the first said so, and later outcomes were lost in silence."""
        outcome = (await stops.session.stop_runtimes([("ws-1", "gone")])).failures[0]
        with (
            disk_of(stops.path.stat().st_size + 10),
            pytest.raises(BctrlError, match="too large"),
        ):
            journal.write(outcome)

        with pytest.raises(BctrlError, match=r"cannot be written.*too large"):
            journal.write(outcome)
        with pytest.raises(BctrlError, match="cannot be written"):
            await stops.session.stop_runtimes([A], journal=journal)
        assert stops.emulator.received[A] == 0

    async def test_a_run_ends_early_if_another_has_found_the_disk_full(
        self, stops: Stops, journal: Journal
    ) -> None:
        """Fault: its outcomes were not written, and its report was ok."""

        def fill_disk(outcome: StopOutcome) -> None:
            with disk_of(stops.path.stat().st_size + 10), suppress(BctrlError):
                journal.write(outcome)

        report = await stops.session.stop_runtimes(
            [A, B, C], journal=journal, on_outcome=fill_disk, concurrency=1
        )

        assert "cannot be written" in str(report.ended_early)
        assert report.counts == {StopResult.STOPPED: 2, StopResult.NOT_SENT: 1}

    async def test_closing_it_raises_a_failure_only_if_it_is_the_first(
        self, stops: Stops, journal: Journal
    ) -> None:
        """Fault: its `with` block raised the same error, and lost the report."""

        def fail(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        stops.patch.setattr(os, "fsync", fail)
        with Journal(
            stops.path.with_name("other"), base_url=stops.emulator.url
        ) as other:
            report = await stops.session.stop_runtimes([A], journal=other)
        assert "Input/output error" in str(report.ended_early)
        with pytest.raises(BctrlError, match="Input/output error"):
            journal.close()
        # It is closed and unlocked even so.
        stops.patch.undo()
        assert (await stops.run([A])).ok

    async def test_no_thread_writes_after_the_half_line_of_another(
        self, stops: Stops, journal: Journal
    ) -> None:
        """Fault: a thread that waited for its turn damaged the file."""
        outcome = (await stops.session.stop_runtimes([("ws-1", "gone")])).failures[0]
        waits, write = threading.Event(), os.write

        def fail(descriptor: int, data: bytes) -> int:
            stops.patch.setattr(os, "write", write)
            write(descriptor, data[:10])
            waits.wait(BOUND)
            # It takes its turn in this time.
            threading.Event().wait(0.02)
            raise OSError(errno.ENOSPC, "No space left on device")

        def write_later() -> None:
            waits.set()
            journal.write(outcome)

        stops.patch.setattr(os, "write", fail)
        first = asyncio.create_task(asyncio.to_thread(journal.write, outcome))
        await until(lambda: os.write is write)
        results = await asyncio.gather(
            first, asyncio.to_thread(write_later), return_exceptions=True
        )

        assert all("No space left" in str(result) for result in results)
        assert read_lines(stops.path.read_bytes()).is_torn

    async def test_an_outcome_is_on_disk_if_it_is_written_so(
        self, stops: Stops, journal: Journal
    ) -> None:
        outcome = (await stops.session.stop_runtimes([("ws-1", "gone")])).failures[0]
        flushed: list[int] = []
        stops.patch.setattr(os, "fsync", lambda _: flushed.append(len(stops.results())))

        journal.write(outcome)
        journal.write(outcome, flush=True)

        assert flushed == [2]

    async def test_a_flush_of_one_run_does_not_hold_up_the_others(
        self, stops: Stops, journal: Journal
    ) -> None:
        """Fault: each write waited in the loop for the disk."""
        outcome = (await stops.session.stop_runtimes([("ws-1", "gone")])).failures[0]
        flushing, written = threading.Event(), threading.Event()

        def flush_slowly(_: int) -> None:
            flushing.set()
            in_time.append(written.wait(2.0))

        in_time: list[bool] = []
        with stops.patch.context() as patch:
            patch.setattr(os, "fsync", flush_slowly)
            run = asyncio.create_task(asyncio.to_thread(journal.flush))
            await until(flushing.is_set)
            journal.write(outcome)
            written.set()
            await run

        assert in_time == [True]

    async def test_threads_may_share_it(self, stops: Stops, journal: Journal) -> None:
        """Fault: lines of two threads were mixed, and the file was damaged."""
        outcome = (await stops.session.stop_runtimes([("ws-1", "gone")])).failures[0]
        write = os.write

        def write_half(descriptor: int, data: bytes) -> int:
            size = write(descriptor, data[: len(data) // 2 + 1])
            threading.Event().wait(0.0001)
            return size

        def write_some(thread: int) -> None:
            for number in range(10):
                target = RuntimeRef("ws-1", f"{thread} {number}")
                journal.write(replace(outcome, target=target))

        with stops.patch.context() as patch:
            patch.setattr(os, "write", write_half)
            await asyncio.gather(
                *(asyncio.to_thread(write_some, thread) for thread in range(4))
            )

        assert len(stops.running()) == 40


class TestFullDisk:
    @pytest.mark.parametrize("has_length", [True, False])
    @pytest.mark.parametrize("workers", [1, 8])
    @pytest.mark.parametrize("room", [240, 900, 930, 960])
    async def test_it_ends_the_run_with_a_true_report_and_a_journal_that_resumes(
        self, stops: Stops, room: int, workers: int, *, has_length: bool
    ) -> None:
        left = iter(add_runtimes(stops.emulator, 40))
        targets = list(left) if has_length else (target for target in left)
        delivered: list[StopOutcome] = []
        with disk_of(room):
            first = await stops.run(
                targets, concurrency=workers, on_outcome=delivered.append
            )

        # An input without a length is read no more.
        assert first.total == 40 - len(list(left))
        assert sorted(outcome.index for outcome in delivered) == list(
            range(first.total)
        )
        sent, kept = stops.emulator.received.total(), stops.running()
        assert first.counts == Counter({STOPPED: sent, NOT_SENT: first.total - sent})
        assert [outcome.result for outcome in first.failures] == [NOT_SENT] * (
            first.total - sent
        )
        assert sent == sum(
            stops.emulator.status(*target) == "stopped" for target in MANY
        )
        assert sent <= 6 + workers
        assert f"the journal {str(stops.path)!r} cannot be written" in str(
            first.ended_early
        )

        second = await stops.run(MANY)

        assert (second.ok, second.resumed) == (True, len(kept))
        assert second.counts[StopResult.ALREADY_STOPPED] == sent - len(kept)

    async def test_what_the_journal_has_is_still_resumed(self, stops: Stops) -> None:
        add_runtimes(stops.emulator, 40)
        await stops.run(MANY[20:])
        with disk_of(stops.path.stat().st_size + 10):
            report = await stops.run(MANY, concurrency=1)

        assert report.counts == {STOPPED: 21, NOT_SENT: 19}
        assert report.resumed == 20

    async def test_it_writes_no_more_though_there_is_room_again(
        self, stops: Stops
    ) -> None:
        add_runtimes(stops.emulator, 40)
        with ExitStack() as stack:
            stack.enter_context(disk_of(900))

            def free_some_space(_: StopOutcome) -> None:
                if batch.ended_early is not None:
                    stack.close()

            batch = stops.run(MANY, concurrency=8, on_outcome=free_some_space)
            await batch

        assert (await stops.run(MANY)).ok

    async def test_no_room_for_the_header_is_an_error(self, stops: Stops) -> None:
        with (
            disk_of(30),
            pytest.raises(BctrlError, match=r"cannot be written.*Free some space"),
        ):
            await stops.run([A])

        assert stops.emulator.requests == []

    async def test_no_room_for_a_list_ends_the_run_before_a_stop(
        self, stops: Stops
    ) -> None:
        assert (await stops.run_workspace()).ok
        stops.emulator.add_runtime(*A)
        with disk_of(stops.path.stat().st_size + 10):
            report = await stops.run_workspace()

        assert (report.ok, report.counts) == (False, {NOT_SENT: 1})
        assert "cannot be written" in str(report.ended_early)
        assert stops.emulator.status(*A) == "active"

    async def test_no_room_for_the_last_entry_is_in_the_report(
        self, stops: Stops
    ) -> None:
        assert (await stops.run([A])).ok
        with disk_of(stops.path.stat().st_size + 10):
            report = await stops.run([B])

        assert (report.ok, report.counts, report.failures) == (False, {STOPPED: 1}, ())
        assert "cannot be written" in str(report.ended_early)

    async def test_a_failed_flush_is_in_the_report(self, stops: Stops) -> None:
        def fail(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with stops.patch.context() as patch:
            patch.setattr(os, "fsync", fail)
            report = await stops.run([A, B])

        assert (report.counts, report.failures, report.ok) == ({STOPPED: 2}, (), False)
        assert "Input/output error" in str(report.ended_early)
        assert (await stops.run([A, B])).resumed == 2
