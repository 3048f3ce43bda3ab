"""Journals of a list: one file or more, old, damaged, or of another server."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from msgspec.structs import replace
from support.journal_lines import entry_line, header_line, seal, sealed
from support.runtimes import runtime

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    Runtime,
    RuntimeRef,
    StopOutcome,
    StopResult,
)
from bctrl_async.journal import Journal, open_journal, read_journals

SERVER = "https://api.test/v1"
NOW = datetime.now(UTC)
DONE, RUNS = False, True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "1"


def header(base_url: str = SERVER, hours: float = 0.0, version: int = 1) -> bytes:
    """Return the header of a journal that was started so many hours ago."""
    return header_line(base_url, NOW - timedelta(hours=hours), version)


def entry(
    alias: str,
    running: bool | None = DONE,  # noqa: FBT001 - it has a name, DONE or RUNS.
    *,
    minute: float = 0.0,
    **fields: object,
) -> bytes:
    at = NOW + timedelta(minutes=minute)
    return entry_line(("ws-1", alias), at, running=running, **fields)


def write(path: Path, *lines: bytes, first: bytes = header()) -> Path:
    path.write_bytes(b"".join((first, *lines)))
    return path


def running(outcomes: Iterable[StopOutcome]) -> dict[str, bool | None]:
    return {outcome.target.alias: outcome.running for outcome in outcomes}


class TestList:
    def test_each_target_has_an_outcome_in_the_order_of_the_list(
        self, path: Path
    ) -> None:
        write(path, entry("a"), entry("b", RUNS, attempts=3), entry("other"))
        of_list = replace(runtime(), alias="b", workspace_id=UUID(int=7))

        targets: list[RuntimeRef | Runtime | tuple[str, str]]
        targets = [("ws-1", "b"), RuntimeRef("ws-1", "a"), of_list]
        outcomes = list(read_journals([path], targets))

        assert [
            (outcome.index, outcome.target, outcome.running, outcome.attempts)
            for outcome in outcomes
        ] == [
            (0, ("ws-1", "b"), RUNS, 3),
            (1, ("ws-1", "a"), DONE, 0),
            (2, (str(UUID(int=7)), "b"), None, 0),
        ]
        assert not any(outcome.resumed for outcome in outcomes)

    def test_a_target_that_no_file_has_may_have_been_sent(self, path: Path) -> None:
        """Fault: it was `not_sent`, though its process died after it sent the stop."""
        [outcome] = read_journals([write(path)], [("ws-1", "a")])

        assert outcome.result is StopResult.UNKNOWN
        subject, _, problem = str(outcome.error).partition(": ")
        assert subject == "stop of 'a' in workspace 'ws-1'"
        assert problem == "no journal has it (the runtime may have stopped)"

    @pytest.mark.parametrize(
        ("is_running", "result"),
        [(DONE, StopResult.NOT_SENT), (RUNS, StopResult.UNKNOWN)],
    )
    def test_a_target_that_was_not_sent_is_done_only_if_a_list_says_so(
        self, path: Path, *, is_running: bool, result: StopResult
    ) -> None:
        line = entry("a", is_running, result="not_sent", error=None)
        [outcome] = read_journals([write(path, line)])

        assert (outcome.result, outcome.ok) == (result, not is_running)

    def test_without_a_list_each_target_of_the_journals_has_one(
        self, path: Path
    ) -> None:
        write(path, entry("a"), entry("b", workspace_id="ws-2"))
        second = write(
            path.with_name("2"), entry("b", RUNS), entry("a", RUNS, minute=1)
        )

        outcomes = read_journals([path, second])

        assert [
            (outcome.index, *outcome.target, outcome.ok) for outcome in outcomes
        ] == [
            (0, "ws-1", "a", False),
            (1, "ws-2", "b", True),
            (2, "ws-1", "b", False),
        ]

    @pytest.mark.parametrize("item", ["a", ("ws-1",), ("ws-1", 1), None, 3])
    def test_an_item_that_is_not_a_target_is_an_error(
        self, path: Path, item: object
    ) -> None:
        write(path, entry("a"))
        with pytest.raises(BctrlConfigError, match=r"invalid target .*: expected"):
            list(read_journals([path], [item]))  # type: ignore[list-item]

    def test_no_file_is_an_error(self) -> None:
        with pytest.raises(BctrlConfigError, match="there are no journals"):
            list(read_journals([]))


class TestLatest:
    @pytest.mark.parametrize(
        ("done", "runs", "latest"),
        [
            (0, 1, RUNS),
            (1, 0, DONE),
            # The target is sent again in doubt.
            (0, 0, RUNS),
        ],
    )
    def test_the_latest_of_several_files_counts(
        self, path: Path, done: float, runs: float, *, latest: bool
    ) -> None:
        write(path, entry("a", minute=done))
        paths = [path, write(path.with_name("2"), entry("a", RUNS, minute=runs))]
        assert running(read_journals(paths)) == {"a": latest}
        assert running(read_journals(paths[::-1])) == {"a": latest}

    @pytest.mark.parametrize(
        ("sent", "runs", "latest"), [(0, 1, RUNS), (1, 0, DONE), (9, 3, RUNS)]
    )
    def test_a_runtime_that_was_stopped_may_run_again_since_the_stop_was_sent(
        self, path: Path, sent: float, runs: float, *, latest: bool
    ) -> None:
        """Fault: an answer that took long was newer than a list with a new runtime."""
        sent_at = (NOW + timedelta(minutes=sent)).isoformat()
        write(path, entry("a", minute=2, sent_at=sent_at))
        other = entry("a", RUNS, minute=runs, sent_at=sent_at)
        paths = [path, write(path.with_name("2"), other)]

        assert running(read_journals(paths)) == {"a": latest}

    def test_the_last_of_one_file_counts_whatever_the_clock_says(
        self, path: Path
    ) -> None:
        write(path, entry("a", minute=5), entry("a", RUNS, minute=1))
        assert running(read_journals([path])) == {"a": RUNS}
        journal = open_journal(path, SERVER)
        assert journal.done(RuntimeRef("ws-1", "a")) is None
        journal.close()

    @pytest.mark.parametrize("is_running", [DONE, RUNS])
    def test_an_entry_of_the_future_is_not_believed(
        self, path: Path, *, is_running: bool
    ) -> None:
        """Fault: `report` said "1 of 1 done" by a clock that was days ahead."""
        write(path, entry("a", is_running, minute=60), entry("b"))
        paths = [path, write(path.with_name("2"), entry("a", RUNS))]
        with pytest.raises(
            BctrlConfigError,
            match=r"/1' .* its entry at byte .* is dated in the future",
        ):
            list(read_journals(paths, [("ws-1", "a")]))
        assert running(read_journals(paths, [("ws-1", "b")])) == {"b": DONE}
        journal = open_journal(path, SERVER)
        assert journal.done(RuntimeRef("ws-1", "a")) is None
        assert journal.done(RuntimeRef("ws-1", "b")) is not None
        journal.write(next(read_journals([paths[1]])))
        journal.close()
        # The run that sends the target again mends the file.
        assert running(read_journals(paths)) == {"a": RUNS, "b": DONE}


def test_an_error_of_a_later_version_is_still_an_error(path: Path) -> None:
    error = {"type": "BctrlLunarError", "message": "the moon is full", "new": 1}
    [outcome] = read_journals([write(path, entry("a", RUNS, error=error, new=[]))])

    assert type(outcome.error) is BctrlError
    assert str(outcome.error) == "stop of 'a' in workspace 'ws-1': the moon is full"


def test_an_item_that_was_not_a_target_is_invalid(path: Path) -> None:
    error = {"type": "BctrlConfigError", "message": "invalid target 3"}
    line = entry("3", None, workspace_id="", error=error, result="invalid")
    [outcome] = read_journals([write(path, line)])

    assert (outcome.target, outcome.result) == (("", "3"), StopResult.INVALID)
    assert str(outcome.error) == "invalid target 3"


def test_a_journal_has_only_names_that_are_for_users(path: Path) -> None:
    with Journal(path, base_url=SERVER) as journal:
        names = {name for name in dir(journal) if not name.startswith("_")}

    assert names == {"base_url", "close", "flush", "write"}


def test_an_outcome_is_written_without_a_request_id_that_is_not_utf_8(
    path: Path,
) -> None:
    with Journal(path, base_url=SERVER) as journal:
        journal.write(replace(STOPPED, request_id="\udc80"))

    [outcome] = read_journals([path])
    assert (outcome.target, outcome.ok, outcome.request_id) == (
        STOPPED.target,
        True,
        None,
    )


STOPPED = StopOutcome(
    index=0, target=RuntimeRef("ws-1", "b"), result=StopResult.STOPPED, running=False
)
INVALID = {
    "another object": ({"index": 0}, "outcome: expected a StopOutcome, not dict"),
    "a tuple as target": (
        replace(STOPPED, target=("ws-1", "b")),
        "target: expected a RuntimeRef, not tuple",
    ),
    "another error": (
        replace(STOPPED, error=OSError()),
        "error: expected a BctrlError or None, not OSError",
    ),
    "a time without a zone": (
        replace(STOPPED, at=NOW.replace(tzinfo=None)),
        "outcome: expected `datetime` with a timezone component - at `$.at`",
    ),
    "an unknown result": (
        replace(STOPPED, result="nonsense"),
        "outcome: Invalid enum value 'nonsense' - at `$.result`",
    ),
    "a number as workspace": (
        replace(STOPPED, target=RuntimeRef(1, "b")),  # type: ignore[arg-type]
        "outcome: expected `str`, not `int` - at `$.workspace_id`",
    ),
    "a text as index": (
        replace(STOPPED, index="1"),
        "outcome: expected `int`, not `str` - at `$.index`",
    ),
    "no number": (
        replace(STOPPED, elapsed=math.nan),
        "outcome: expected `float`, not `null` - at `$.elapsed`",
    ),
}


@pytest.mark.parametrize(("outcome", "problem"), INVALID.values(), ids=INVALID)
def test_an_outcome_that_could_not_be_read_again_is_not_written(
    path: Path, outcome: StopOutcome, problem: str
) -> None:
    """Faults: a time without a zone damaged the file; a tuple was an AttributeError."""
    with Journal(write(path, entry("a")), base_url=SERVER) as journal:
        with pytest.raises(BctrlConfigError) as caught:
            journal.write(outcome)
        journal.write(STOPPED)

    assert str(caught.value) == f"invalid {problem}"
    assert running(read_journals([path])) == {"a": DONE, "b": DONE}


NESTED = b"[" * 100_000 + b"]" * 100_000
DAMAGED = "line 2 is damaged. Use another file: sending its targets again is safe"
UNUSABLE = {
    "notes": (b"my notes", "it is not a journal"),
    "a list": (b"ws-1,a\n", "it is not a journal"),
    "other JSON": (b"{}\n", "it is not a journal"),
    "a later version": (header(version=2), "another version wrote it"),
    "a changed entry": (
        header() + entry("a").replace(b"a", b"b", 1),
        DAMAGED,
    ),
    "a line between": (header() + b"\n" + entry("a"), DAMAGED),
    "a sealed line without a result": (
        header() + sealed({"alias": "a"}) + entry("a"),
        DAMAGED,
    ),
    "JSON too deep": (
        header() + seal(b'{"alias":"a","x":' + NESTED),
        DAMAGED,
    ),
    "an old one": (header(hours=13), r"it is 13:\d\d:\d\d old; the limit is 12:00:00"),
    "a header of the future": (
        header(hours=-13),
        r"it is 1[23]:\d\d:\d\d old; the limit",
    ),
    "another server's": (
        header("https://other.test/v1"),
        "another server, https://other.test/v1",
    ),
    "an endless header": (
        b'{"journal":"bctrl_async"' + b" " * (1 << 20),
        "line 1 is damaged",
    ),
}


@pytest.mark.parametrize(("data", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_damaged_old_or_foreign_file_is_an_error(
    path: Path, data: bytes, reason: str
) -> None:
    unusable = write(path.with_name("2"), data, first=b"")

    with pytest.raises(BctrlConfigError, match=f"'{unusable}' .*{reason}"):
        list(read_journals([write(path, entry("a")), unusable], max_age=12 * 3600.0))
    with pytest.raises(BctrlConfigError, match=reason):
        Journal(unusable, base_url=SERVER, max_age=12 * 3600.0)
    assert unusable.read_bytes() == data


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no/such", "No such file or directory"),
        ("", "it is not a regular file"),
        ("/dev/zero", "it is not a regular file"),
        ("pipe", "it is not a regular file"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_a_path_that_cannot_be_read_is_an_error(
    tmp_path: Path, name: str, reason: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BctrlConfigError, match=reason):
        list(read_journals([tmp_path / name]))
    with pytest.raises(BctrlConfigError, match=reason):
        Journal(tmp_path / name, base_url=SERVER)


@pytest.mark.parametrize("content", [None, b"", b"{", header() + entry("a")])
def test_nothing_is_written_through_a_link(path: Path, content: bytes | None) -> None:
    """Fault: a file of another user's choice was made, or overwritten."""
    file = path.with_name("file")
    if content is not None:
        file.write_bytes(content)
    path.symlink_to(file)

    with pytest.raises(BctrlConfigError, match=r"/1' .* it is a symbolic link"):
        Journal(path, base_url=SERVER)

    found = file.read_bytes() if file.exists() else None
    assert found == content


def test_a_link_to_a_journal_is_read(path: Path) -> None:
    path.symlink_to(write(path.with_name("file"), entry("a")))
    assert running(read_journals([path])) == {"a": DONE}


@pytest.mark.parametrize("mode", [None, 0o640])
def test_a_new_file_is_for_its_owner_alone(path: Path, mode: int | None) -> None:
    """Fault: whoever could read it could lock it."""
    if mode is not None:
        path.touch()
        path.chmod(mode)

    Journal(path, base_url=SERVER).close()

    assert stat.S_IMODE(path.stat().st_mode) == (mode or 0o600)


def test_reading_makes_no_file(path: Path) -> None:
    with pytest.raises(BctrlConfigError, match="No such file or directory"):
        list(read_journals([path]))
    assert not path.exists()


def test_a_file_that_is_changed_while_it_is_read_is_an_error(path: Path) -> None:
    outcomes = read_journals([write(path, entry("a"), entry("b"))])
    next(outcomes)
    path.write_bytes(header())
    with pytest.raises(BctrlConfigError, match="line 2 is damaged"):
        next(outcomes)


class TestCutShort:
    """Only the last line may be cut short, by a crash or while it is written."""

    @pytest.mark.parametrize("end", [1, 9, 99, -1])
    @pytest.mark.parametrize("nul", [0, 1 << 20])
    def test_a_last_line_cut_anywhere_is_left_out(
        self, path: Path, end: int, nul: int
    ) -> None:
        """After a power failure, there may be NUL where data was not written."""
        write(path, entry("a"), entry("b")[:end], b"\0" * nul)
        assert running(read_journals([path])) == {"a": DONE}
        Journal(path, base_url=SERVER).close()
        assert path.read_bytes() == header() + entry("a")

    @pytest.mark.parametrize("end", range(0, len(header()), 7))
    def test_a_header_cut_anywhere_is_an_empty_journal(
        self, path: Path, end: int
    ) -> None:
        write(path, first=header()[:end])
        assert list(read_journals([path])) == []
        Journal(path, base_url=SERVER).close()
        assert path.read_bytes().startswith(b'{"journal":"bctrl_async","version":1')

    def test_a_journal_is_read_while_it_is_written(self, path: Path) -> None:
        write(path, entry("a"), entry("b")[:-1])
        with path.open("ab", buffering=0) as file:
            outcomes = read_journals([path])
            next(outcomes)
            file.write(b"\n" + entry("c"))
            assert list(outcomes) == []
        assert running(read_journals([path])) == {"a": DONE, "b": DONE, "c": DONE}


def test_no_flipped_bit_is_accepted_before_the_last_line(path: Path) -> None:
    """No damage makes a target done that is not."""
    whole = header() + entry("a", RUNS) + entry("a") + entry("b", RUNS)
    b = RuntimeRef("ws-1", "b")
    for position in range(len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        write(path, bytes(damaged), first=b"")
        for use in (
            lambda: list(read_journals([path], [b])),
            lambda: Journal(path, base_url=SERVER),
        ):
            with pytest.raises(BctrlConfigError, match="cannot be used"):
                use()
        assert path.read_bytes() == damaged


@pytest.mark.parametrize(("hours", "warns"), [(49, True), (23, False)])
def test_what_is_skipped_because_of_an_old_journal_is_a_warning(
    path: Path, caplog: pytest.LogCaptureFixture, *, hours: float, warns: bool
) -> None:
    list(read_journals([write(path, entry("a"), first=header(hours=hours))]))

    assert len(caplog.records) == warns
    for record in caplog.records:
        assert "is 2 days, 1:" in record.message
        assert "runtimes started anew since then count as stopped" in record.message
        fields = vars(record)
        assert fields["bctrl.event"] == "old_journal"
        assert fields["bctrl.journal"] == str(path)
        assert fields["bctrl.age"] >= 49 * 3600
