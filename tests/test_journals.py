"""Journals of several runs, merged: one outcome for each target."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from helpers import Connect
from journal_lines import read_lines
from runtimes import runtime

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlResponseError,
    BctrlSession,
    BctrlTimeoutError,
    Runtime,
    RuntimeRef,
    RuntimeState,
    RuntimeStatus,
    StopOutcome,
    StopResult,
    shard,
)
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.journal import (
    Journal,
    JournalOutcome,
    merge_journals,
    read_journal,
    read_journals,
)
from bctrl_async.journal._format import (
    BegunMark,
    EndedMark,
    Mark,
    entry_line,
    header_line,
    mark_line,
    read_line,
)

SERVER = "https://api.test/v1"
STARTED = datetime(2026, 11, 24, 2, 30, tzinfo=UTC)

A, B, C = (RuntimeRef("ws", alias) for alias in "abc")


def outcome(
    target: RuntimeRef = A,
    result: StopResult = StopResult.STOPPED,
    *,
    after: float = 1.0,
    attempts: int = 1,
    error: BctrlError | None = None,
    runtime: Runtime | None = None,
) -> StopOutcome:
    at = STARTED + timedelta(seconds=after)
    return StopOutcome(
        index=0,
        target=target,
        result=result,
        attempts=attempts,
        at=at,
        error=error,
        runtime=runtime,
    )


ODD_AGE = BctrlResponseError("its age cannot be read")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(
    name: str,
    *outcomes: StopOutcome,
    server: str = SERVER,
    started: float = 0,
    complete: bool = True,
    shard: tuple[int, int] | None = None,
) -> Path:
    """Write a journal that was begun this many seconds after `STARTED`."""
    lines = [header_line(server, STARTED + timedelta(seconds=started))]
    lines += map(entry_line, outcomes)
    lines += [mark_line(Mark(STARTED + timedelta(hours=1), shard))] if complete else []
    path = Path(name)
    path.write_bytes(b"".join(lines))
    return path


def entries_of(name: str) -> list[dict[str, object]]:
    return read_lines(Path(name).read_bytes()).entries


def merge(*outcomes: StopOutcome) -> JournalOutcome:
    """Merge journals with an outcome each, in every order; return the only one that is kept."""
    paths = [write(f"{number}.jsonl", each) for number, each in enumerate(outcomes)]
    (kept,) = merge_journals(paths).outcomes.values()
    (again,) = merge_journals(reversed(paths)).outcomes.values()
    assert again.journals == kept.journals[::-1] == tuple(reversed(paths))
    assert (again.result, again.at) == (kept.result, kept.at)
    return kept


@pytest.mark.usefixtures("folder")
class TestReport:
    def test_the_counts_of_several_journals_add_up(self) -> None:
        first = write("1", outcome(A, after=3), outcome(B, StopResult.NOT_FOUND, after=4))
        second = write("2", outcome(C, attempts=3, after=9), started=2)

        report = read_journals([first, str(second)])
        assert report.total == report.counts.total() == 3
        assert report.counts == {StopResult.STOPPED: 2, StopResult.NOT_FOUND: 1}
        assert [failure.target for failure in report.failures] == [B]
        assert (report.elapsed, report.retries, report.throttled) == (9.0, 2, 0)
        assert report.resumed == 0
        assert not report.ok

    def test_a_target_that_was_not_found_is_no_failure_if_that_is_allowed(self) -> None:
        report = read_journals([write("1", outcome(A, StopResult.NOT_FOUND))], missing_ok=True)
        assert report.ok

    def test_failures_are_in_the_order_of_completion_and_have_their_errors(self) -> None:
        """Fault: `raise_for_failures` of a report that was read from files raises nothing."""
        timeout = BctrlTimeoutError("no answer", may_have_stopped=True)
        denied = BctrlPermissionError("no access", status=403, code="denied", request_id="req_1")
        first = write("1", outcome(A, StopResult.UNKNOWN, after=5, error=timeout, attempts=4))
        second = write("2", outcome(B, StopResult.REJECTED, after=2, error=denied))

        report = read_journals([first, second])
        assert [failure.target for failure in report.failures] == [B, A]
        with pytest.raises(ExceptionGroup) as raised:
            report.raise_for_failures()
        rejected, unknown = raised.value.exceptions
        assert isinstance(rejected, BctrlPermissionError)
        assert (rejected.status, rejected.code, rejected.request_id) == (403, "denied", "req_1")
        assert (rejected.workspace_id, rejected.alias) == B
        assert isinstance(unknown, BctrlTimeoutError)
        assert (unknown.may_have_stopped, unknown.attempts) == (True, 4)

    def test_only_an_answer_that_cannot_be_used_was_accepted(self) -> None:
        """Fault: the 404 of a poll says that the server accepted the stop."""
        unusable = BctrlResponseError("not JSON", status=200, accepted=True)
        gone = BctrlNotFoundError("gone", code="runtime.not_found")
        accepted = StopResult.ACCEPTED
        path = write("1", outcome(A, accepted, error=unusable), outcome(B, accepted, error=gone))

        found = merge_journals([path]).outcomes
        errors = [found[target].error for target in (A, B)]
        assert [error and error.accepted for error in errors] == [True, False]

    def test_an_invalid_target_is_known_as_such(self) -> None:
        invalid = BctrlConfigError("invalid target 'x'", reason_class="invalid_input")
        path = write("1", outcome(RuntimeRef("", "x"), StopResult.REJECTED, error=invalid))

        (failure,) = read_journals([path]).failures
        assert isinstance(failure.error, BctrlConfigError)
        assert failure.error.reason_class == "invalid_input"
        assert str(failure.error) == "invalid target 'x'"

    def test_an_error_of_a_later_version_is_an_error_all_the_same(self) -> None:
        class BctrlNewError(BctrlError):
            pass

        path = write("1", outcome(A, StopResult.UNKNOWN, error=BctrlNewError("new")))
        (failure,) = read_journals([path]).failures
        assert type(failure.error) is BctrlError

    def test_a_journal_whose_run_is_not_complete_ends_it_early(self) -> None:
        paths = [write(str(number), complete=number == 0) for number in range(5)]
        Path("4").write_bytes(b"")

        report = read_journals(paths)
        assert not report.ok
        assert str(report.ended_early) == (
            "4 of 5 journals are not complete: '1', '2', '3' and 1 more. "
            "Their runs go on, ended early or had failures; repeat each with its whole input"
        )
        assert merge_journals(paths).incomplete == paths[1:]
        assert str(read_journals(paths[:2]).ended_early).startswith("1 of 2 journals")

    def test_empty_journals_make_an_empty_report(self) -> None:
        Path("1").write_bytes(b"")
        report = read_journals(["1"])
        assert (report.total, report.elapsed, report.counts) == (0, 0.0, Counter())
        assert merge_journals(["1"]).base_url is None

    def test_a_clock_that_is_behind_makes_no_negative_time(self) -> None:
        assert read_journals([write("1", outcome(after=-5))]).elapsed == 0.0
        assert read_journals([write("1")]).elapsed == 0.0


@pytest.mark.usefixtures("folder")
class TestTwoJournals:
    @pytest.mark.parametrize(
        ("better", "worse"),
        [
            (StopResult.STOPPED, StopResult.ACCEPTED),
            (StopResult.ALREADY_STOPPED, StopResult.ACCEPTED),
            (StopResult.ALREADY_STOPPED, StopResult.UNKNOWN),
            (StopResult.ACCEPTED, StopResult.NOT_FOUND),
            (StopResult.STOPPED, StopResult.NOT_FOUND),
            (StopResult.NOT_FOUND, StopResult.UNKNOWN),
            (StopResult.NOT_FOUND, StopResult.NOT_SENT),
        ],
    )
    def test_the_outcome_that_says_most_is_kept(
        self, better: StopResult, worse: StopResult
    ) -> None:
        for after in (0, 2):
            # A later stop that was accepted says that the runtime ran again.
            if worse is not StopResult.ACCEPTED or after == 0:
                kept = merge(outcome(result=better, after=1), outcome(result=worse, after=after))
                assert kept.result is better

    def test_the_first_that_settled_it_is_kept(self) -> None:
        first = outcome(result=StopResult.STOPPED, after=1)
        assert merge(first, outcome(result=StopResult.ALREADY_STOPPED, after=2)).at == first.at

    @pytest.mark.parametrize(
        "known",
        [
            {"runtime": runtime("failed")},
            {"error": BctrlNotFoundError("gone", code="runtime.not_found")},
        ],
        ids=["failed", "gone"],
    )
    def test_an_accepted_stop_whose_runtime_has_ended_says_more_than_an_open_one(
        self, known: dict[str, Runtime | BctrlError]
    ) -> None:
        """Fault: the first by time is kept, so a runtime that is gone is unknown."""
        accepted, active = StopResult.ACCEPTED, runtime("active")
        ended = outcome(result=accepted, after=1, **known)  # type: ignore[arg-type]
        assert merge(ended, outcome(result=accepted, after=0, runtime=active)).at == ended.at
        assert merge(ended, outcome(result=accepted, after=0)).at == ended.at

    @pytest.mark.parametrize(
        "later",
        [
            outcome(result=StopResult.ACCEPTED, after=2),
            outcome(result=StopResult.ACCEPTED, after=2, runtime=runtime("stopping")),
            outcome(result=StopResult.UNKNOWN, after=2, runtime=runtime("stopping")),
        ],
        ids=["accepted", "accepted and stopping", "unknown and stopping"],
    )
    def test_one_that_may_run_later_is_an_unconfirmed_failure(self, later: StopOutcome) -> None:
        """Fault: the report was good, though a stop that is accepted finds a runtime that runs."""
        assert merge(outcome(after=1), later).at == later.at

        merged = merge_journals(["0.jsonl", "1.jsonl"])
        assert merged.running_again == {A}
        assert merged.report().states == {RuntimeState.UNCONFIRMED: 1}
        with pytest.raises(ExceptionGroup) as raised:
            merged.report().raise_for_failures()
        assert str(raised.value.exceptions[0]) == (
            "stop of 'a' in workspace 'ws': it may have run after another journal has it as no "
            "longer running. Stop it again, with a new journal"
        )

    @pytest.mark.parametrize(
        "later",
        [
            outcome(result=StopResult.UNKNOWN, after=2, error=BctrlTimeoutError("no answer")),
            outcome(result=StopResult.UNKNOWN, after=2, error=BctrlResponseError("of another")),
            outcome(result=StopResult.NOT_SENT, after=2, error=BctrlError("the run has ended")),
            outcome(
                result=StopResult.REJECTED,
                after=2,
                error=BctrlPermissionError("no access", status=403, code="denied"),
            ),
            outcome(
                result=StopResult.REJECTED,
                after=2,
                error=BctrlResponseError("200, but item 3 is not a Runtime", status=200),
            ),
        ],
        ids=["no answer", "answer of another", "not sent", "no access", "unreadable"],
    )
    def test_an_attempt_that_says_nothing_of_the_runtime_leaves_it_stopped(
        self, later: StopOutcome
    ) -> None:
        assert merge(outcome(after=1), later).result is StopResult.STOPPED
        assert read_journals(["0.jsonl", "1.jsonl"]).ok
        (failure,) = read_journals(["1.jsonl"]).failures
        assert failure.error is not None
        assert failure.error.reason_class is None
        # In one journal it was sent again, because it ran again.
        path = write("both.jsonl", outcome(after=1), later)
        assert merge_journals([path]).outcomes[A].result is later.result

    def test_one_that_another_run_may_have_sent_again_and_died_is_a_failure(self) -> None:
        """Fault: with the doubt of that run, the unknown status was forgotten."""
        write("1", outcome(after=1))
        listed = outcome(
            result=StopResult.REJECTED, after=2, error=ODD_AGE, runtime=runtime("starting")
        )
        died = write("2", listed, complete=False)
        with died.open("ab") as file:
            file.write(mark_line(BegunMark(listed.at)))

        report = read_journals(["1", "2"])
        assert report.counts == {StopResult.UNKNOWN: 1}
        assert report.states == {RuntimeState.UNCONFIRMED: 1}

    @pytest.mark.parametrize("result", [StopResult.STOPPED, StopResult.ACCEPTED])
    def test_in_one_journal_an_unknown_status_replaces_a_settled_outcome(
        self, result: StopResult
    ) -> None:
        """Fault: the report of the journal was good, and a resumed run did not send it again."""
        listed = outcome(
            result=StopResult.REJECTED, after=2, error=ODD_AGE, runtime=runtime("starting")
        )
        path = write("1", outcome(result=result, after=1), listed)

        content = read_journal(path)
        assert content is not None
        assert (content.pending, content.not_running) == (1, {})
        assert [each.result for each in read_journals([path]).failures] == [StopResult.REJECTED]

    def test_one_that_still_runs_without_having_been_stopped_keeps_its_error(self) -> None:
        """Fault: it was said to run again."""
        timeout = BctrlTimeoutError("no answer", may_have_stopped=True)
        active = runtime("active")
        later = outcome(result=StopResult.UNKNOWN, after=2, runtime=active, error=timeout)
        kept = merge(outcome(result=StopResult.ACCEPTED, after=1, runtime=active), later)
        assert kept.error is not None
        assert kept.error.summary == "no answer"
        assert merge_journals(["0.jsonl", "1.jsonl"]).running_again == set()

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_a_stop_between_two_times_of_running_is_out_of_date(
        self, order: tuple[int, ...]
    ) -> None:
        active = runtime("active")
        outcomes = [
            outcome(result=StopResult.ACCEPTED, after=1, runtime=active),
            outcome(after=2),
            outcome(result=StopResult.ACCEPTED, after=3, runtime=active),
        ]
        paths = [write(str(number), outcomes[number]) for number in order]
        merged = merge_journals(paths)
        assert merged.outcomes[A].at == outcomes[2].at
        assert merged.running_again == {A}

    @pytest.mark.parametrize("result", [StopResult.ACCEPTED, StopResult.UNKNOWN])
    @pytest.mark.parametrize(
        "known",
        [{"result": StopResult.STOPPED}, {"result": StopResult.ACCEPTED, "runtime": "failed"}],
        ids=["stopped", "failed"],
    )
    def test_one_that_runs_later_is_a_failure(
        self, known: dict[str, str], result: StopResult
    ) -> None:
        """Fault: `stopped` was kept, and the report said that the runtime no longer runs."""
        status = known.get("runtime")
        ended = outcome(
            result=StopResult(known["result"]),
            after=1,
            runtime=None if status is None else runtime(status),
        )
        later = outcome(result=result, after=2, runtime=runtime("active"))
        kept = merge(ended, later)
        assert kept.at == later.at

        report = read_journals(["0.jsonl", "1.jsonl"])
        assert not report.ok
        assert report.states == {RuntimeState.STILL_RUNNING: 1}
        with pytest.raises(ExceptionGroup) as raised:
            report.raise_for_failures()
        assert str(raised.value.exceptions[0]) == (
            "stop of 'a' in workspace 'ws': it still ran after another journal has it as no longer "
            "running. Stop it again, with a new journal"
        )

    @pytest.mark.parametrize("afters", list(itertools.permutations([1, 2, 3])))
    def test_one_that_is_stopped_after_that_is_not(self, afters: tuple[int, ...]) -> None:
        for number, after in enumerate(afters):
            if after == 2:
                each = outcome(result=StopResult.ACCEPTED, after=2, runtime=runtime("active"))
            else:
                each = outcome(after=after)
            write(str(number), each)
        merged = merge_journals(["0", "1", "2"])
        assert merged.outcomes[A].at == outcome(after=3).at
        assert merged.report().ok

    def test_the_last_that_was_not_found_is_kept(self) -> None:
        last = outcome(result=StopResult.NOT_FOUND, after=2)
        assert merge(outcome(result=StopResult.NOT_FOUND, after=1), last).at == last.at

    def test_the_last_is_kept_if_the_target_is_sent_again(self) -> None:
        last = outcome(result=StopResult.REJECTED, after=2)
        assert merge(outcome(result=StopResult.UNKNOWN, after=1), last).at == last.at

    def test_of_two_at_the_same_time_that_of_the_first_journal_is_kept(self) -> None:
        write("1", outcome(result=StopResult.NOT_SENT))
        write("2", outcome(result=StopResult.REJECTED))
        for paths, result in (("12", StopResult.NOT_SENT), ("21", StopResult.REJECTED)):
            assert merge_journals(list(paths)).outcomes[A].result is result

    def test_it_is_in_the_counts_once_and_is_named(self) -> None:
        paths = [write("1", outcome(A), outcome(B)), write("2", outcome(A)), write("3", outcome(A))]
        merged = merge_journals(paths)

        assert merged.report().counts == {StopResult.STOPPED: 2}
        assert merged.repeated == [A]
        assert merged.outcomes[A].journals == tuple(paths)
        assert merged.outcomes[B].journals == (paths[0],)

    def test_a_file_that_is_given_twice_is_read_once(self) -> None:
        path = write("1", outcome(A))
        Path("link").symlink_to(path)

        merged = merge_journals([path, "./1", path.resolve(), "link"])
        assert (merged.repeated, len(merged.paths)) == ([], 1)

    def test_journals_of_two_servers_are_an_error(self) -> None:
        Path("0").write_bytes(b"")
        paths = [Path("0"), write("1"), write("2", server="https://other.test/v1")]
        with pytest.raises(BctrlConfigError) as raised:
            read_journals(paths)
        assert str(raised.value) == (
            "the journals are of two servers: '1' of https://api.test/v1, '2' of "
            "https://other.test/v1. Read those of each server on their own"
        )


@pytest.mark.usefixtures("folder")
class TestAges:
    def test_journals_of_two_nights_are_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        """Fault: yesterday's journal settles what runs again, and the report is good."""
        write("new", started=30 * 3600)
        write("old", outcome(A))
        read_journals(["new", "old"])
        (record,) = caplog.records
        assert record.getMessage() == (
            "the journal 'old' was begun 1d6h before 'new': if it is of an earlier night, what it "
            "has as stopped may run again"
        )

    def test_one_beyond_the_greatest_age_is_rejected(self) -> None:
        path = write("old", started=-3 * 3600)
        assert read_journals([path], max_age=1e9).total == 0
        with pytest.raises(BctrlConfigError, match=r"'old' cannot be read: it was begun .* ago"):
            read_journals([path], max_age=3600)
        with pytest.raises(BctrlConfigError, match="invalid max_age 0: expected a positive"):
            read_journals([path], max_age=0)

    def test_journals_of_one_night_are_not(self, caplog: pytest.LogCaptureFixture) -> None:
        read_journals([write("1"), write("2", started=23 * 3600)])
        assert caplog.records == []


@pytest.mark.usefixtures("folder")
class TestFiles:
    def test_a_torn_tail_is_left_out(self) -> None:
        path = write("1", outcome(A), outcome(B), complete=False)
        path.write_bytes(path.read_bytes()[:-3])
        assert merge_journals([path]).outcomes.keys() == {A}

    def test_a_damaged_or_foreign_file_is_an_error(self) -> None:
        path = write("1", outcome(A))
        path.write_bytes(path.read_bytes().replace(b'"alias":"a"', b'"alias":"b"'))
        for bad in (path, __file__, "missing"):
            with pytest.raises(BctrlConfigError, match="cannot be read"):
                read_journals([write("0"), bad])

    def test_no_file_and_a_single_path_are_errors(self) -> None:
        with pytest.raises(BctrlConfigError, match="no journals"):
            read_journals([])
        for single in ("1", b"1", Path("1")):
            with pytest.raises(BctrlConfigError, match="invalid paths: expected an iterable"):
                read_journals(single)  # type: ignore[arg-type]

    def test_a_path_that_no_file_can_have_is_an_error(self) -> None:
        """Fault: it is a ValueError of `Path.resolve`, not one of this package."""
        with pytest.raises(BctrlConfigError, match=r"cannot be read: .*embedded null"):
            merge_journals([write("0"), "a\0b"])

    def test_a_journal_that_a_run_writes_can_be_read(self) -> None:
        journal = Journal("1", SERVER)
        journal.write(outcome(A))
        report = read_journals(["1"])
        journal.close(complete=True)

        assert (report.total, report.ok) == (1, False)
        assert read_journals(["1"]).ok


@pytest.mark.usefixtures("folder")
class TestRuntimes:
    """The state of a runtime that accepted its stop, which `report` shows as `stop` does."""

    @pytest.mark.parametrize("result", [StopResult.ACCEPTED, StopResult.UNKNOWN])
    def test_one_that_may_run_keeps_its_description(self, result: StopResult) -> None:
        path = write("1", outcome(A, result, runtime=runtime("active")))
        assert merge_journals([path]).outcomes[A].runtime == runtime("active")

    def test_one_that_is_stopped_does_not(self) -> None:
        record = read_line(entry_line(outcome(A, runtime=runtime("stopped"))))
        assert getattr(record, "runtime", "") is None

    @pytest.mark.parametrize(
        "known",
        [
            {"runtime": runtime("failed")},
            {"error": BctrlNotFoundError("gone", code="runtime.not_found")},
        ],
        ids=["failed", "gone"],
    )
    def test_a_resumed_run_does_not_send_one_again_that_has_ended(
        self, known: dict[str, Runtime | BctrlError]
    ) -> None:
        path = write("1", outcome(A, StopResult.ACCEPTED, **known))  # type: ignore[arg-type]
        content = read_journal(path)

        assert content is not None
        assert (set(content.not_running), content.pending) == ({A}, 0)

    @pytest.mark.parametrize(
        "known",
        [{}, {"runtime": runtime("active")}, {"error": BctrlNotFoundError("a gateway's")}],
        ids=["unknown", "active", "other error"],
    )
    def test_a_resumed_run_sends_any_other_again(
        self, known: dict[str, Runtime | BctrlError]
    ) -> None:
        path = write("1", outcome(A, StopResult.ACCEPTED, **known))  # type: ignore[arg-type]
        content = read_journal(path)

        assert content is not None
        assert (content.not_running, content.pending) == ({}, 1)
        assert (content.outcomes[A].runtime, content.outcomes[A].error) == (None, None)

    async def test_a_resumed_run_writes_what_it_learns_of_an_accepted_stop(
        self, session: BctrlSession, emulator: Emulator
    ) -> None:
        """Fault: `stop` knows that a runtime failed, `report` has it as unknown for ever."""
        emulator.add_runtime(*A)
        emulator.inject(Fault.FAILED)
        at = datetime.now(UTC)
        path = Path("1")
        accepted = StopOutcome(index=0, target=A, result=StopResult.ACCEPTED, at=at)
        journal = Journal(path, session.base_url)
        journal.write(accepted)
        journal.close()

        for _ in range(2):
            report = await session.stop_runtimes([A], journal=path, verify=True)
            assert report.counts == {StopResult.ACCEPTED: 1}
        found = merge_journals([path]).outcomes[A].runtime
        assert found is not None
        assert found.status is RuntimeStatus.FAILED
        # Nothing is sent after it.
        assert len(emulator.requests) == 1

    def test_what_a_run_that_did_not_complete_has_recorded_stays_unfinished(self) -> None:
        """Fault: after a few of them, a run made the journal complete."""
        path = write("1", outcome(A, StopResult.UNKNOWN), outcome(B), complete=False)
        with path.open("ab") as file:
            file.write(mark_line(BegunMark(STARTED)) + mark_line(EndedMark(STARTED)))

        content = read_journal(path)
        assert content is not None
        assert content.unfinished == {A, B}

    async def test_a_resumed_run_writes_nothing_of_what_it_does_not_send_again(
        self, session: BctrlSession, emulator: Emulator
    ) -> None:
        emulator.add_runtime(*A)
        emulator.inject(Fault.FAILED)
        await session.stop_runtimes([A], journal="1")
        before = entries_of("1")

        report = await session.stop_runtimes([A, A], journal="1")
        assert report.resumed == 2
        assert entries_of("1") == before


async def test_the_journals_of_all_shards_are_the_account_of_the_list(
    connect: Connect, emulator: Emulator, tmp_path: Path
) -> None:
    targets = [RuntimeRef("ws", f"r{number}") for number in range(60)]
    for target in targets[1:]:
        emulator.add_runtime(*target)
    paths = [tmp_path / f"{number}.jsonl" for number in range(1, 5)]

    async def stop(number: int) -> None:
        async with connect() as session:
            await session.stop_runtimes(
                shard(targets, number, 4), journal=paths[number - 1], missing_ok=True
            )

    await asyncio.gather(*map(stop, range(1, 5)))

    merged = merge_journals(paths)
    report = merged.report(missing_ok=True)
    assert merged.outcomes.keys() == set(targets)
    assert merged.repeated == []
    assert report.counts == {StopResult.STOPPED: 59, StopResult.NOT_FOUND: 1}
    assert report.ok


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("shards", "named"),
    [
        ([(1, 2), (2, 2)], None),
        ([(1, 2)], "2/2"),
        ([(2, 4), (4, 4)], "1/4, 3/4"),
        ([(1, 2), (2, 2), (2, 3)], "1/3, 3/3"),
        ([(1, 999_999_999)], "2/999999999, 3/999999999, 4/999999999 and 999,999,995 more"),
        ([], None),
        # A mark of another program: a number that is not valid is not one of the shards.
        ([(0, 2), (2, 2)], "1/2"),
        ([(3, 2), (1, 2)], "2/2"),
        ([(1, 0), (1, -2)], None),
    ],
)
def test_a_report_names_the_shards_that_have_no_journal(
    shards: list[tuple[int, int]], named: str | None
) -> None:
    """Fault: a job that never ran goes unnoticed, and its runtimes go on."""
    paths = [write(f"{number}.jsonl", shard=each) for number, each in enumerate(shards)]
    error = read_journals([*paths, write("whole.jsonl", outcome())]).ended_early

    if named is None:
        assert error is None
    else:
        assert error is not None
        assert error.summary == f"no journal is of shard {named}"
