"""`FilePace`: its arguments and its file."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_UN, flock
from pathlib import Path
from unittest.mock import Mock

import pytest
from helpers import BOUND

from bctrl_async import BctrlConfigError
from bctrl_async.pace import FilePace
from bctrl_async.pace._leases import Lease


@pytest.fixture(autouse=True)
def _members_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    # Members count until a busy machine has asked again.
    monkeypatch.setattr("bctrl_async.pace._leases._MEMBERSHIP", BOUND)


async def lease(pace: FilePace, member: str = "a") -> Lease:
    store = pace.open()
    try:
        return await store.lease(member, 100, math.inf)
    finally:
        await store.close()


class TestArguments:
    @pytest.mark.parametrize(
        ("path", "problem"),
        [
            (None, "expected the path of a file"),
            (b"pace", "expected the path of a file"),
            # Fault: it was a bare ValueError.
            ("x\0", "is not the name of a file"),
            ("x\ud800", "is not the name of a file"),
            ("folder/pace", "the folder of 'folder/pace' does not exist"),
        ],
    )
    def test_an_invalid_path_is_an_error(self, path: str, problem: str) -> None:
        with pytest.raises(BctrlConfigError, match=f"^invalid path: .*{problem}") as raised:
            FilePace(path, rate=200)
        assert raised.value.argument == "path"
        # Fault: the repr of a pace without a path was an AttributeError.
        traceback.TracebackException.from_exception(raised.value, capture_locals=True)

    @pytest.mark.parametrize(
        ("occupy", "problem"),
        [
            (Path.mkdir, "is not a regular file"),
            # Fault: a named pipe that nobody writes to hangs the constructor.
            (os.mkfifo, "is not a regular file"),
            # Fault: it makes the file of another user's choice.
            (lambda path: path.symlink_to("elsewhere"), "is not a regular file"),
            # Fault: a mistyped path that overwrites a journal or a list.
            (lambda path: path.write_text("ws-1,crm\n"), "is another file"),
            (lambda path: path.parent.rmdir(), "the folder of .* does not exist"),
        ],
        ids=["folder", "pipe", "link", "text", "nowhere"],
    )
    async def test_a_path_of_anything_else_is_an_error_then_and_later(
        self, tmp_path: Path, occupy: Callable[[Path], object], problem: str
    ) -> None:
        path = tmp_path / "folder" / "pace"
        path.parent.mkdir()
        earlier = FilePace(path, rate=200)
        occupy(path)
        with pytest.raises(BctrlConfigError, match=problem):
            FilePace(path, rate=200)
        with pytest.raises(BctrlConfigError, match=problem):
            await lease(earlier)
        assert not path.is_file() or path.read_text() == "ws-1,crm\n"
        assert not path.with_name("elsewhere").exists()

    def test_an_invalid_rate_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(BctrlConfigError, match="invalid rate") as raised:
            FilePace(tmp_path / "pace", rate=0)
        assert raised.value.argument == "rate"

    def test_it_has_a_repr_and_can_be_pickled(self) -> None:
        pace = FilePace("pace", rate=190)
        copied = pickle.loads(pickle.dumps(pace))  # noqa: S301 - our own.
        assert repr(pace) == repr(copied) == "FilePace('pace', rate=190)"


class TestFile:
    async def test_it_is_made_with_the_first_lease_in_the_working_directory_and_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        relative = FilePace("pace", rate=200)
        assert os.listdir() == []  # noqa: PTH208 - only names.
        assert (await lease(relative, "a")).members == 1
        assert (await lease(FilePace(tmp_path / "pace", rate=200), "b")).members == 2
        assert os.listdir() == ["pace"]  # noqa: PTH208 - only names.

    async def test_a_process_waits_for_another_one_that_has_it_locked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "pace"
        with path.open("wb") as file:
            flock(file, LOCK_EX)
            monkeypatch.setattr("bctrl_async.pace._file._BUSY", 0.0)
            with pytest.raises(TimeoutError, match="another process has locked the file"):
                await lease(FilePace(path, rate=200))

            monkeypatch.setattr("bctrl_async.pace._file._BUSY", BOUND)
            monkeypatch.setattr("bctrl_async.pace._file.time.sleep", lambda _: flock(file, LOCK_UN))
            assert (await lease(FilePace(path, rate=200))).members == 1

    @pytest.mark.parametrize("length", [0, 1, 17, 30])
    async def test_a_file_that_a_crash_has_cut_off_begins_anew(
        self, tmp_path: Path, length: int
    ) -> None:
        pace = FilePace(tmp_path / "pace", rate=200)
        await lease(pace)
        os.truncate(tmp_path / "pace", length)
        assert [(await lease(pace, member)).members for member in "abc"] == [1, 2, 3]

    async def test_what_remains_of_a_longer_schedule_does_not_matter(self, tmp_path: Path) -> None:
        path = tmp_path / "pace"
        path.write_bytes(b'bctrl-async pace\n{"members": {"long": -1e9}}' + b" " * 1000)
        pace = FilePace(path, rate=200)
        assert [(await lease(pace, member)).members for member in "ab"] == [1, 2]
        assert len(path.read_bytes()) < 1000


@contextmanager
def without_root() -> Iterator[None]:
    """Act as a user that permissions apply to."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


class TestPermissions:
    @pytest.mark.parametrize(
        ("name", "mode"),
        [
            ("pace", 0o755),
            ("new", 0o555),
            ("folder/pace", 0),
            ("n" * 300, 0o755),
            (f"{'n' * 300}/pace", 0o755),
        ],
        ids=["file", "folder", "hidden", "long", "long-folder"],
    )
    def test_a_file_that_may_not_be_written_is_an_error(self, name: str, mode: int) -> None:
        """Fault: each process went on with the whole rate, as if the file were away."""
        # Other users may not enter pytest's folders.
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "pace").touch(0o444)
            Path(folder).chmod(mode)
            # Newer versions of Python do not say whether a folder exists that may not be seen.
            problem = "Permission denied|does not exist|name too long"
            with without_root(), pytest.raises(BctrlConfigError, match=problem):
                asyncio.run(lease(FilePace(f"{folder}/{name}", rate=200)))
            Path(folder).chmod(0o755)

    async def test_a_disk_that_is_full_is_no_error_of_the_configuration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space left"):
            await lease(FilePace(tmp_path / "pace", rate=200))
