"""A pace in a file, which each process locks for a moment."""

from __future__ import annotations

import asyncio
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from bctrl_async import _config
from bctrl_async.pace._leases import Lease, Pace, Schedule

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # pragma: no cover - Windows has no flock; it was not tried there.
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
else:

    def _lock(file: int) -> None:
        flock(file, LOCK_EX | LOCK_NB)


_BUSY = 0.2
"""Seconds to wait for the other processes of a file."""
_HEADER = b"bctrl-async pace\n"
_ADVICE = "Use a file of its own, such as /run/stop-runtimes/pace"


class FilePace(Pace):
    """A pace shared by the processes of one machine, through a file that they lock in turn.

    Args:
        path: The file; created if it does not exist, in a folder that does. It must be on a local
            disk or in memory, such as below `/run`. It may be deleted at any time.
        rate: The most attempts a second of all processes together, above 0; the same in each.

    Raises:
        BctrlConfigError: The rate is invalid, the folder does not exist, or the file is another
            one.
    """

    def __init__(self, path: str | os.PathLike[str], *, rate: float) -> None:
        super().__init__(rate=rate)
        _config.check_type(path, str | os.PathLike, "path", "the path of a file")
        self._path = Path(path)
        if self._path.exists() and not self._path.is_file():
            # To open a pipe would wait for its other end.
            raise _config.invalid("path", f"{str(path)!r} is not a regular file", _ADVICE)
        if not self._path.absolute().parent.is_dir():
            raise _config.invalid("path", f"the folder of {str(path)!r} does not exist", _ADVICE)
        try:
            with self._path.open("rb") as file:
                begins = file.read(len(_HEADER))
        except OSError:
            return  # The file may appear, or become readable, while a session runs.
        except ValueError:
            problem = f"{str(path)!r} is not the name of a file"
            raise _config.invalid("path", problem, _ADVICE) from None
        if not _HEADER.startswith(begins):
            raise _config.invalid("path", f"{str(path)!r} is another file", _ADVICE)

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
        return await asyncio.get_running_loop().run_in_executor(self._thread, take)

    async def close(self) -> None:
        try:
            # The thread may be at a lease that was cancelled, with the file open.
            await asyncio.get_running_loop().run_in_executor(self._thread, self._path.exists)
        finally:
            self._thread.shutdown(wait=False)

    def _take(self, member: str, slots: int) -> Lease:
        # It is opened each time, because the others use the new one if it was deleted or replaced.
        with open(self._path, "r+b", buffering=0, opener=_create) as file:
            _wait_for_lock(file.fileno())
            schedule = self._read(file.read())
            # This clock is the same in all processes, and starts again only with the machine.
            lease = schedule.lease(time.monotonic(), self._rate, member, slots, math.inf)
            file.seek(0)
            file.write(_HEADER + msgspec.json.encode(schedule) + b"\n")
        return lease

    def _read(self, content: bytes) -> Schedule:
        if not _HEADER.startswith(content[: len(_HEADER)]):
            raise ValueError(f"{str(self._path)!r} is another file")
        # A longer schedule was there before, and its end may remain.
        line = content.removeprefix(_HEADER).partition(b"\n")[0]
        try:
            return msgspec.json.decode(line, type=Schedule)
        except msgspec.DecodeError:
            return Schedule()  # The file is new, or a crash has cut it off.


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _wait_for_lock(file: int) -> None:
    until = time.monotonic() + _BUSY
    while True:
        try:
            return _lock(file)
        except OSError as error:
            if time.monotonic() >= until:
                raise TimeoutError("another process has locked the file") from error
        time.sleep(0.001)
