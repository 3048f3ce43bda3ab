"""`FilePace`: its arguments and its file."""

from __future__ import annotations

import os
import pickle
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from helpers import BOUND

from bctrl_async import BctrlConfigError
from bctrl_async.pace import FilePace, Lease


async def lease(pace: FilePace, member: str) -> Lease:
    store = pace.open()
    try:
        # After a Retry-After it counts as a member for as long.
        return await store.lease(member, 100, 30.0)
    finally:
        await store.close()


class TestArguments:
    @pytest.mark.parametrize("path", [None, 1, b"pace"])
    def test_a_path_of_another_type_is_an_error(self, path: str) -> None:
        with pytest.raises(BctrlConfigError, match="expected the path of a file") as raised:
            FilePace(path, rate=200)
        assert raised.value.argument == "path"

    def test_a_folder_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(BctrlConfigError, match="is a folder") as raised:
            FilePace(tmp_path, rate=200)
        assert raised.value.argument == "path"

    def test_a_pipe_is_an_error(self, tmp_path: Path) -> None:
        """Fault: a named pipe that nobody writes to hangs the constructor."""
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BctrlConfigError, match="is not a regular file"):
            FilePace(tmp_path / "pipe", rate=200)

    @pytest.mark.parametrize("path", ["x\0", "x\ud800"])
    def test_a_name_that_no_file_can_have_is_an_error(self, path: str) -> None:
        """Fault: it was a bare ValueError."""
        with pytest.raises(BctrlConfigError, match="is not the name of a file") as raised:
            FilePace(path, rate=200)
        assert raised.value.argument == "path"

    def test_a_folder_that_does_not_exist_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(BctrlConfigError, match="the folder of") as raised:
            FilePace(tmp_path / "folder" / "pace", rate=200)
        assert raised.value.argument == "path"

    def test_another_file_is_an_error_and_remains(self, tmp_path: Path) -> None:
        """Fault: a mistyped path that overwrites a journal or a list."""
        path = tmp_path / "targets.csv"
        path.write_text("ws-1,crm\n")
        with pytest.raises(BctrlConfigError, match="is another file"):
            FilePace(path, rate=200)
        assert path.read_text() == "ws-1,crm\n"

    @pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan"), "190", True, None])
    def test_an_invalid_rate_is_an_error(self, tmp_path: Path, rate: float) -> None:
        with pytest.raises(BctrlConfigError, match="invalid rate") as raised:
            FilePace(tmp_path / "pace", rate=rate)
        assert raised.value.argument == "rate"

    def test_its_repr_shows_its_arguments(self) -> None:
        assert repr(FilePace("pace", rate=190)) == "FilePace('pace', rate=190)"

    def test_it_can_be_pickled(self, tmp_path: Path) -> None:
        pace = FilePace(tmp_path / "pace", rate=190)
        copied = pickle.loads(pickle.dumps(pace))  # noqa: S301 - our own.
        assert (type(copied), vars(copied)) == (FilePace, vars(pace))


class TestFile:
    async def test_it_is_made_with_the_first_lease(self, tmp_path: Path) -> None:
        path = tmp_path / "pace"
        pace = FilePace(path, rate=200)
        assert os.listdir(tmp_path) == []  # noqa: PTH208 - only names.
        assert (await lease(pace, "a")).members == 1
        assert (await lease(FilePace(path, rate=200), "b")).members == 2

    async def test_an_empty_file_is_used(self, tmp_path: Path) -> None:
        path = tmp_path / "pace"
        path.touch()
        assert (await lease(FilePace(path, rate=200), "a")).members == 1

    async def test_a_relative_path_is_that_of_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert (await lease(FilePace("pace", rate=200), "a")).members == 1
        assert (await lease(FilePace(tmp_path / "pace", rate=200), "b")).members == 2

    async def test_a_name_that_sqlite_takes_for_memory_is_that_of_a_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: each process had a schedule of its own."""
        monkeypatch.chdir(tmp_path)
        store = FilePace(":memory:", rate=200).open()
        await store.lease("a", 1, 0.0)
        await store.close()
        assert (tmp_path / ":memory:").is_file()

    async def test_nothing_remains_beside_it_when_all_have_closed_it(self, tmp_path: Path) -> None:
        await lease(FilePace(tmp_path / "pace", rate=200), "a")
        assert os.listdir(tmp_path) == ["pace"]  # noqa: PTH208 - only names.

    async def test_processes_that_make_it_at_once_wait_for_each_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: all but one began with a warning that the database is locked."""
        path = tmp_path / "pace"
        # The last step of another process, as SQLite takes it.
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            monkeypatch.setattr("bctrl_async.pace._BUSY", 0.0)
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                await lease(FilePace(path, rate=200), "a")

            monkeypatch.setattr("bctrl_async.pace._BUSY", BOUND)
            monkeypatch.setattr("bctrl_async.pace.time.sleep", lambda _: other.execute("COMMIT"))
            assert (await lease(FilePace(path, rate=200), "a")).members == 1

    async def test_a_schedule_that_cannot_be_read_is_an_error_and_keeps_no_lock(
        self, tmp_path: Path
    ) -> None:
        pace = FilePace(tmp_path / "pace", rate=200)
        await lease(pace, "a")
        with closing(sqlite3.connect(tmp_path / "pace", isolation_level=None)) as connection:
            (schedule,) = connection.execute("SELECT schedule FROM pace").fetchone()
            connection.execute("UPDATE pace SET schedule = '{'")
            with pytest.raises(msgspec.DecodeError):
                await lease(pace, "b")
            connection.execute("UPDATE pace SET schedule = ?", (schedule,))
        assert (await lease(pace, "b")).members == 2
