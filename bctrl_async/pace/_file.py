"""A pace in a file, which each process locks for a moment."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from errno import EACCES, ENAMETOOLONG, EPERM, EROFS
from functools import partial
from pathlib import Path
from stat import S_ISREG

import msgspec

from bctrl_async import _config
from bctrl_async.errors import BctrlConfigError
from bctrl_async.pace._leases import Lease, Pace, Schedule

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # pragma: no cover - only Windows lacks it; no test runs there.
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
else:

    def _lock(file: int) -> None:
        flock(file, LOCK_EX | LOCK_NB)


_BUSY = 0.2
"""Seconds to wait while another process holds the lock of the file."""
_HEADER = b"bctrl-async pace\n"


class FilePace(Pace):
    """A pace shared by the processes of one machine, through a file that they lock in turn.

    Args:
        path: The file; created if it does not exist, in a folder that does. It must be on a local
            disk or in memory, such as below `/run`. It may be deleted at any time.
        rate: The most attempts a second of all processes together, above 0; the same in each.

    Raises:
        BctrlConfigError: The rate is invalid, the folder does not exist, or the path is a folder, a
            link, or a file with other content.
    """

    def __init__(self, path: str | os.PathLike[str], *, rate: float) -> None:
        self._path = Path()
        super().__init__(rate=rate)
        _config.check_type(path, str | os.PathLike, "path", "the path of a file")
        self._path = Path(path)
        with _permitted(self._path):
            _check_place(self._path)
        # The file may appear, or become readable, while a session runs.
        with suppress(OSError), self._path.open("rb") as file:
            _parse(self._path, file.read(4096))

    def __repr__(self) -> str:
        return f"FilePace({str(self._path)!r}, rate={self.rate:g})"

    def open(self) -> _FileStore:
        """Return a store that opens the file for each lease."""
        return _FileStore(self._path, self.rate)


class _FileStore:
    def __init__(self, path: Path, rate: float) -> None:
        self._path = path
        self._rate = rate
        # A disk that hangs must hold up nothing else.
        self._thread = ThreadPoolExecutor(1, "bctrl-async-pace")

    async def lease(self, member: str, slots: int, _: float) -> Lease:
        take = partial(self._take, member, slots)
        with _permitted(self._path):
            return await asyncio.get_running_loop().run_in_executor(self._thread, take)

    async def close(self) -> None:
        try:
            # A cancelled lease may still run in the thread, with the file open.
            await asyncio.get_running_loop().run_in_executor(self._thread, lambda: None)
        finally:
            self._thread.shutdown(wait=False)

    def _take(self, member: str, slots: int) -> Lease:
        _check_place(self._path)
        # The file is opened each time: after it was deleted or replaced, others use the new file.
        with self._path.open("a+b", buffering=0) as file:
            file.seek(0)
            _wait_for_lock(file.fileno())
            schedule = _parse(self._path, file.read())
            # This clock is the same in all processes, and starts again only with the machine.
            lease = schedule.lease(time.monotonic(), self._rate, member, slots, math.inf)
            file.truncate(0)
            file.write(_HEADER + msgspec.json.encode(schedule) + b"\n")
        return lease


def _check_place(path: Path) -> None:
    """Raise an error for a path that cannot become the file of a pace."""
    try:
        is_other = not S_ISREG(path.lstat().st_mode)
    except ValueError:
        raise _unusable(f"{str(path)!r} is not the name of a file") from None
    except OSError:
        is_other = False
    if is_other:
        # Opening a pipe would wait for its other end, and a link may lead to anyone's file.
        raise _unusable(f"{str(path)!r} is not a regular file")
    if not path.absolute().parent.is_dir():
        raise _unusable(f"the folder of {str(path)!r} does not exist")


@contextmanager
def _permitted(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {EACCES, ENAMETOOLONG, EPERM, EROFS}:
            raise
        raise _unusable(f"{str(path)!r} cannot be written: {error.strerror}") from None


def _parse(path: Path, content: bytes) -> Schedule:
    if not _HEADER.startswith(content[: len(_HEADER)]):
        raise _unusable(f"{str(path)!r} is another file")
    try:
        return msgspec.json.decode(content.removeprefix(_HEADER), type=Schedule)
    except msgspec.DecodeError:
        return Schedule()  # The file is new, or a crash has cut it off.


def _unusable(problem: str) -> BctrlConfigError:
    advice = "Use a file of its own, such as /run/stop-runtimes/pace"
    return _config.invalid("path", problem, advice)


def _wait_for_lock(file: int) -> None:
    until = time.monotonic() + _BUSY
    while True:
        try:
            return _lock(file)
        except OSError as error:
            if time.monotonic() >= until:
                raise TimeoutError("another process has locked the file") from error
        time.sleep(0.001)
