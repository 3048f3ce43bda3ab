"""What journals say of a list: one file or more, old, damaged, or of another server."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from helpers import Connect
from journal_lines import entry_line, header_line, seal, sealed
from msgspec.structs import replace
from runtimes import runtime

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlPermissionError,
    Runtime,
    RuntimeRef,
    RuntimeState,
    StopOutcome,
    StopResult,
)
from bctrl_async.emulator import Emulator, Reply
from bctrl_async.journal import Journal, read_journals

SERVER = "https://api.test/v1"
NOW = datetime.now(UTC)
DONE, RUNS = "not_running", "still_running"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def header(base_url: str = SERVER, hours: float = 0.0, version: int = 3) -> bytes:
    """Return the header of a journal that was started so many hours ago."""
    return header_line(base_url, NOW - timedelta(hours=hours), version)


def entry(alias: str, state: str = DONE, *, minute: float = 0.0, **fields: object) -> bytes:
    return entry_line(("ws-1", alias), NOW + timedelta(minutes=minute), state, **fields)


def write(path: Path, *lines: bytes, first: bytes | None = None) -> Path:
    path.write_bytes(b"".join((header() if first is None else first, *lines)))
    return path


def states(outcomes: Iterable[StopOutcome]) -> dict[str, str]:
    return {each.target.alias: each.state.value for each in outcomes}


class TestList:
    def test_each_target_has_an_outcome_in_the_order_of_the_list(self, folder: Path) -> None:
        path = write(folder / "1", entry("a"), entry("b", RUNS, attempts=3), entry("other"))
        of_list = replace(runtime(), alias="b", workspace_id=UUID(int=7))

        targets: list[RuntimeRef | Runtime | tuple[str, str]]
        targets = [("ws-1", "b"), RuntimeRef("ws-1", "a"), of_list]
        outcomes = list(read_journals([path], targets))

        assert [
            (each.index, each.target, each.state.value, each.ok, each.attempts) for each in outcomes
        ] == [
            (0, ("ws-1", "b"), RUNS, False, 3),
            (1, ("ws-1", "a"), DONE, True, 0),
            (2, (str(UUID(int=7)), "b"), "unconfirmed", False, 0),
        ]
        assert not any(each.resumed for each in outcomes)
        assert outcomes[2].result is StopResult.NOT_SENT
        assert str(outcomes[2].error) == (
            f"stop of 'b' in workspace '{UUID(int=7)}': no journal has it"
        )

    def test_without_a_list_each_target_of_the_journals_has_one(self, folder: Path) -> None:
        paths = [
            write(folder / "1", entry("a"), entry("b", workspace_id="ws-2")),
            write(folder / "2", entry("b", RUNS), entry("a", RUNS, minute=1), entry("c")),
        ]

        outcomes = list(read_journals(paths))

        assert [(each.index, *each.target, each.ok) for each in outcomes] == [
            (0, "ws-1", "a", False),
            (1, "ws-2", "b", True),
            (2, "ws-1", "b", False),
            (3, "ws-1", "c", True),
        ]

    @pytest.mark.parametrize("item", ["a", ("ws-1",), ("ws-1", 1), None, 3])
    def test_an_item_that_is_not_a_target_is_an_error(self, folder: Path, item: object) -> None:
        path = write(folder / "1", entry("a"))
        with pytest.raises(BctrlConfigError, match="invalid targets: expected pairs"):
            list(read_journals([path], [item]))  # type: ignore[list-item]

    async def test_the_journals_of_all_parts_are_the_account_of_the_list(
        self, connect: Connect, emulator: Emulator, folder: Path
    ) -> None:
        targets = [("ws-1", f"r{number}") for number in range(60)]
        for target in targets:
            emulator.add_runtime(*target)
        emulator.inject(Reply(403), alias="r7")
        paths = [folder / f"{part}.jsonl" for part in range(3)]
        async with connect() as session:
            for number, path in enumerate(paths):
                await session.stop_runtimes(targets[number::3], journal=path)
        part = [each for each in read_journals(paths[:2], targets) if not each.ok]
        whole = [each for each in read_journals(paths, targets) if not each.ok]

        assert {each.target for each in part} == {*targets[2::3], targets[7]}
        assert [(each.index, each.target) for each in whole] == [(7, targets[7])]
        assert isinstance(whole[0].error, BctrlPermissionError)
        assert whole[0].error.status == 403
        assert whole[0].error.request_id == whole[0].request_id is not None


class TestLatest:
    @pytest.mark.parametrize("state", [RUNS, "unconfirmed", "invalid"])
    def test_the_latest_of_several_files_counts(self, folder: Path, state: str) -> None:
        for first, second, latest in ((0, 1, state), (1, 0, DONE), (0, 0, state)):
            paths = [
                write(folder / "1", entry("a", minute=first)),
                write(folder / "2", entry("a", state, minute=second)),
            ]
            assert states(read_journals(paths)) == {"a": latest}
            assert states(read_journals(paths[::-1])) == {"a": latest}

    def test_the_last_of_one_file_counts_whatever_the_clock_says(self, folder: Path) -> None:
        path = write(folder / "1", entry("a", minute=5), entry("a", RUNS, minute=1))
        assert states(read_journals([path])) == {"a": RUNS}

    @pytest.mark.parametrize("state", [DONE, RUNS])
    def test_an_entry_of_the_future_is_not_believed(self, folder: Path, state: str) -> None:
        """Fault: `report` said "1 of 1 done" by a clock that was days ahead."""
        ahead = write(folder / "1", entry("a", state, minute=60), entry("b"))
        paths = [ahead, write(folder / "2", entry("a", RUNS))]
        with pytest.raises(
            BctrlConfigError, match=r"/1' .* its entry at byte .* is dated in the future"
        ):
            list(read_journals(paths, [("ws-1", "a")]))
        assert states(read_journals(paths, [("ws-1", "b")])) == {"b": DONE}
        journal = Journal(ahead, SERVER)
        assert journal.done(RuntimeRef("ws-1", "a")) is None
        assert journal.done(RuntimeRef("ws-1", "b")) is not None
        journal.write(next(read_journals([paths[1]])))
        journal.close()
        # The run that sends the target again mends the file.
        assert states(read_journals(paths)) == {"a": RUNS, "b": DONE}

    def test_a_file_that_is_given_twice_is_the_same_file(self, folder: Path) -> None:
        path = write(folder / "1", entry("a"), entry("b", RUNS))
        assert states(read_journals([path, path, folder / ".." / folder.name / "1"])) == {
            "a": DONE,
            "b": RUNS,
        }


class TestEntry:
    def test_an_error_of_a_later_version_is_an_error_all_the_same(self, folder: Path) -> None:
        error = {"type": "BctrlLunarError", "message": "the moon is full", "new": 1}
        [outcome] = read_journals([write(folder / "1", entry("a", RUNS, error=error, new=[]))])

        assert type(outcome.error) is BctrlError
        assert str(outcome.error) == "stop of 'a' in workspace 'ws-1': the moon is full"

    def test_an_item_that_was_not_a_target_is_invalid(self, folder: Path) -> None:
        error = {"type": "BctrlConfigError", "message": "invalid target 3"}
        line = entry("3", "invalid", workspace_id="", error=error)
        [outcome] = read_journals([write(folder / "1", line)])

        assert (outcome.target, outcome.state) == (("", "3"), RuntimeState.INVALID)
        assert str(outcome.error) == "invalid target 3"


NESTED = b"[" * 100_000 + b"]" * 100_000
NOT_JOURNALS = [b"my notes", b"ws-1,a\n", b"\0" * 100, b"[]\n", b"{}\n"]


class TestUnusable:
    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            *((data, "it is not a journal") for data in NOT_JOURNALS),
            (header(version=4), "another version wrote it"),
            (header() + entry("a").replace(b"a", b"b", 1) + entry("b"), "damaged at byte"),
            (header() + b"\n" + entry("a"), "damaged at byte"),
            (header() + sealed({"alias": "a"}) + entry("a"), "damaged at byte"),
            (header() + seal(b'{"alias":"a","x":' + NESTED), "damaged at byte"),
            (header(hours=13), r"it is 13:\d\d:\d\d old; the limit is 12:00:00"),
            (header(hours=-13), r"it is 1[23]:\d\d:\d\d old; the limit is 12:00:00"),
            (
                header("https://other.test/v1"),
                "it belongs to another server, https://other.test/v1",
            ),
            (b'{"journal":"bctrl_async"' + b" " * (1 << 20), "damaged at byte 0"),
        ],
    )
    def test_a_file_that_is_damaged_old_or_foreign_is_an_error(
        self, folder: Path, data: bytes, reason: str
    ) -> None:
        paths = [write(folder / "1", entry("a")), folder / "2"]
        paths[1].write_bytes(data)

        with pytest.raises(BctrlConfigError, match=reason) as caught:
            list(read_journals(paths, max_age=12 * 3600.0))

        assert repr(str(paths[1])) in str(caught.value)
        assert paths[1].read_bytes() == data
        with pytest.raises(BctrlConfigError, match=reason):
            Journal(paths[1], SERVER, 12 * 3600.0)
        assert paths[1].read_bytes() == data

    def test_files_that_cannot_be_read_are_errors_that_leave_nothing_behind(
        self, folder: Path
    ) -> None:
        pipe = folder / "pipe"
        os.mkfifo(pipe)
        for path, reason in (
            (folder / "no" / "such", "No such file or directory"),
            (folder, "it is not a regular file"),
            ("/dev/zero", "it is not a regular file"),
            (pipe, "it is not a regular file"),
            ("a\0b", "embedded null byte"),
        ):
            with pytest.raises(BctrlConfigError, match=reason):
                list(read_journals([path]))
            with pytest.raises(BctrlConfigError, match=reason):
                Journal(path, SERVER)
        with pytest.raises(BctrlConfigError, match="No such file or directory"):
            list(read_journals([folder / "missing"]))
        assert list(folder.iterdir()) == [pipe]

    def test_no_file_and_a_single_path_are_errors(self, folder: Path) -> None:
        with pytest.raises(BctrlConfigError, match="there are no journals"):
            list(read_journals([]))
        with pytest.raises(BctrlConfigError, match="expected an iterable of paths"):
            list(read_journals(str(folder)))

    def test_a_file_that_is_changed_while_it_is_read_is_an_error(self, folder: Path) -> None:
        path = write(folder / "1", entry("a"), entry("b"))
        outcomes = read_journals([path])
        next(outcomes)
        path.write_bytes(header())
        with pytest.raises(BctrlConfigError, match="it is damaged at byte"):
            next(outcomes)

    def test_a_list_that_cannot_be_read_is_no_fault_of_the_journal(self, folder: Path) -> None:
        def broken() -> Iterator[RuntimeRef]:
            yield RuntimeRef("ws-1", "a")
            raise OSError("the list")

        with pytest.raises(OSError, match="the list"):
            list(read_journals([write(folder / "1", entry("a"))], broken()))


class TestCutShort:
    """Only the last line may be cut short."""

    def test_a_last_line_cut_anywhere_is_left_out(self, folder: Path) -> None:
        path = folder / "1"
        whole, last = header() + entry("a"), entry("b")
        for end in (*range(0, len(last) - 1, 5), len(last) - 1):
            path.write_bytes(whole + last[:end])
            assert states(read_journals([path])) == {"a": DONE}
            Journal(path, SERVER).close()
            assert path.read_bytes() == whole

    @pytest.mark.parametrize("end", range(0, len(header()), 7))
    def test_a_header_cut_anywhere_is_an_empty_journal(self, folder: Path, end: int) -> None:
        path = folder / "1"
        path.write_bytes(header()[:end])
        assert list(read_journals([path])) == []
        Journal(path, SERVER).close()
        assert path.read_bytes().startswith(b'{"journal":"bctrl_async","version":3')

    def test_a_tail_of_nul_after_a_power_failure_is_cut_off(self, folder: Path) -> None:
        path = write(folder / "1", entry("a"), entry("b")[:-7], b"\0" * (1 << 20))
        assert states(read_journals([path])) == {"a": DONE}
        Journal(path, SERVER).close()
        assert path.read_bytes() == header() + entry("a")

    def test_a_journal_is_read_while_it_is_written(self, folder: Path) -> None:
        path = write(folder / "1", entry("a"), entry("b")[:-1])
        with path.open("ab") as file:
            outcomes = read_journals([path])
            next(outcomes)
            file.write(b"\n" + entry("c"))
            file.flush()
            assert list(outcomes) == []
        assert states(read_journals([path])) == {"a": DONE, "b": DONE, "c": DONE}


TRUE = {"a": DONE, "b": RUNS}
LINES = [entry("a", RUNS), *(entry(alias, state) for alias, state in TRUE.items())]


class TestDamage:
    """No damage makes a target done that is not."""

    def check(self, path: Path, data: bytes) -> bool:
        """Check what these bytes make done, for a reader and a run; False if they are rejected."""
        path.write_bytes(data)
        done = {alias for alias, state in TRUE.items() if state == DONE}
        targets = [("ws-1", alias) for alias in TRUE]
        try:
            outcomes = [each for each in read_journals([path], targets) if each.ok]
            journal = Journal(path, SERVER)
        except BctrlConfigError:
            assert path.read_bytes() == data
            return False
        assert {each.target.alias for each in outcomes} <= done
        assert {alias for alias in TRUE if journal.done(RuntimeRef("ws-1", alias))} <= done
        journal.close()
        return True

    def test_no_flipped_bit_is_accepted_before_the_last_line(self, folder: Path) -> None:
        whole = header() + b"".join(LINES)
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            # Of a last line without its end, it cannot be said that it was ever whole.
            assert self.check(folder / "1", bytes(damaged)) == (position == len(whole) - 1)

    def test_no_random_damage_makes_a_target_done(self, folder: Path) -> None:
        rng = random.Random(7)
        whole = header() + b"".join(LINES)
        for _ in range(100):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(len(whole))] = rng.randrange(256)
            start = rng.randrange(len(whole))
            if rng.random() < 0.5:
                del damaged[start : start + rng.randint(1, 400)]
            self.check(folder / "1", bytes(damaged))


@pytest.mark.parametrize(("hours", "warns"), [(49, True), (23, False)])
async def test_what_is_skipped_because_of_an_old_journal_is_a_warning(
    emulator: Emulator,
    connect: Connect,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    *,
    hours: float,
    warns: bool,
) -> None:
    first = header(f"{emulator.url}/v1", hours)
    path = write(folder / "1", entry("a"), entry("b"), first=first)
    async with connect() as session:
        report = await session.stop_runtimes([("ws-1", "a"), ("ws-1", "b")], journal=path)
    assert (report.ok, report.resumed) == (True, 2)

    assert len(caplog.records) == warns
    for record in caplog.records:
        assert "is 2 days, 1:" in record.message
        assert "runtimes started anew since then count as stopped" in record.message
        fields = vars(record)
        assert fields["bctrl.event"] == "old_journal"
        assert fields["bctrl.journal"] == str(path)
        assert fields["bctrl.age"] >= 49 * 3600
