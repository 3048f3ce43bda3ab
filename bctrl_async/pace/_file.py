"""A pace in a file, which each process locks for a moment."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import Future
from errno import EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM, EROFS
from pathlib import Path

from bctrl_async import _config
from bctrl_async.errors import BctrlConfigError
from bctrl_async.pace._leases import PATIENCE, Pace

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # pragma: no cover - only Windows lacks it; no test runs there.
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
else:

    def _lock(file: int) -> None:
        flock(file, LOCK_EX | LOCK_NB)


_PERMANENT = {EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM, EROFS}
"""Errors that do not pass: the path cannot be used."""
_HEADER = b"bctrl-async pace\n"
_LENGTH = len(_HEADER) + 42
"""The length of the file: the header, two numbers of 20 characters, two separators."""


class FilePace(Pace):
    """A pace shared by the processes of one machine, in a file that they lock in turn.

    Args:
        path: The file; created if it does not exist, in a folder that does, for its
            owner alone (0600). It must be on a local disk or in memory, such as below
            `/run`. It may be deleted at any time.
        rate: The most attempts a second of all processes together, above 0; the same in
            each.

    Raises:
        BctrlConfigError: The path is not a path, or the rate is invalid.
    """

    def __init__(self, path: str | os.PathLike[str], *, rate: float) -> None:
        super().__init__(rate=rate)
        _config.check_type(path, str | os.PathLike, "path", "the path of a file")
        self._path = Path(path)

    async def acquire(self, slots: int) -> None:
        """Wait until this many attempts may start.

        Raises:
            BctrlConfigError: `slots` is no whole number from 1; the path cannot be
                written, or is a folder, a link, or another file.
            OSError: The file cannot be used now: the disk is full or hangs, or others
                lock it for 1 s.
        """
        _config.count(slots, "slots")
        name = f"bctrl-async {self._path}"
        delay = None
        async with asyncio.timeout(PATIENCE):
            while delay is None:
                # While a thread hangs on the disk, no other is started. The running
                # threads are asked, because a fork has none of its parent's.
                if name not in {thread.name for thread in threading.enumerate()}:
                    answer = Future[float | None]()
                    # The answer then cannot be cancelled, so the thread can set it.
                    answer.set_running_or_notify_cancel()
                    # Neither the loop nor the process waits for the end of a daemon.
                    threading.Thread(
                        target=self._reserve,
                        name=name,
                        args=(slots, answer),
                        daemon=True,
                    ).start()
                    delay = await asyncio.wrap_future(answer)
                # The file is locked, or its disk hangs.
                if delay is None:
                    await asyncio.sleep(0.001)
        await asyncio.sleep(delay)

    def _reserve(self, slots: int, answer: Future[float | None]) -> None:
        """Reserve slots; answer with the seconds until the first, or None if locked."""
        try:
            # The file is opened each time: it may have been deleted, and made anew.
            with open(self._path, "r+b", opener=_open) as file:
                try:
                    _lock(file.fileno())
                except OSError:
                    answer.set_result(None)
                    return
                requested_at, ahead = _parse(file.read(_LENGTH))
                # All processes have this clock, which starts again with the machine:
                # it may then be before the last request.
                now = time.monotonic()
                elapsed = max(now - requested_at, 0.0)
                ahead = max(ahead - elapsed, 0.0)
                file.seek(0)
                # The new text is as long as the old, so that a full disk takes it.
                file.write(
                    _HEADER
                    + f"{now:020.6f} {ahead + slots / self.rate:020.6f}\n".encode()
                )
            answer.set_result(ahead)
        except ValueError as error:
            answer.set_exception(self._unusable(error))
        except OSError as error:
            if error.errno in _PERMANENT:
                answer.set_exception(self._unusable(error.strerror))
            else:
                answer.set_exception(error)

    def _unusable(self, problem: object) -> BctrlConfigError:
        return BctrlConfigError(
            f"the pace {str(self._path)!r} cannot be used: {problem}",
            advice="Use a file of its own, such as /run/stop-runtimes/pace",
            argument="path",
        )


def _open(path: str, flags: int) -> int:
    # A link may lead to anyone's file, and whoever can open a file can lock it.
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)


def _parse(content: bytes) -> tuple[float, float]:
    """Return the time of the last request, and the seconds reserved then."""
    # A new file is empty, or a crash has cut it off within the header.
    if not _HEADER.startswith(content[: len(_HEADER)]):
        raise ValueError("it is another file")
    try:
        requested_at, ahead = content.removeprefix(_HEADER).split()
        return float(requested_at), float(ahead)
    except ValueError:
        return 0.0, 0.0  # The file is new, or a crash has cut it off.
