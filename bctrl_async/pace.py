"""A rate that several processes share, so that together they keep within a server's limit.

    session = BctrlSession(pace=FilePace("/run/stop-runtimes/pace", rate=190))

Every process leases slots of one schedule, for 0.05 s at most. So the processes take turns, and
together never start more attempts than the rate allows in any second, plus one lease. A process
that dies costs one lease. No attempt waits for the store for longer than 0.25 s: a session that
cannot ask it goes on with its share of the rate, and logs a warning.

`FilePace` is for the processes of one machine, `bctrl_async.redis.RedisPace` for those of many. For
another store, subclass `Pace` and `PaceStore`; `Schedule` has the arithmetic.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from bctrl_async._limiter.pace import (
    LEASE,
    MAX_CLOSED,
    Lease,
    Pace,
    PaceStore,
    longest_queue,
)
from bctrl_async.errors import BctrlConfigError

__all__ = ["FilePace", "Lease", "Pace", "PaceStore", "Schedule"]

_MEMBERSHIP = 2.0
"""Seconds after the end of its last lease until a member no longer counts."""
_BUSY = 0.2
"""Seconds to wait for the other processes of a file."""
_HEADER = b"SQLite format 3\0"


class Schedule(msgspec.Struct):
    """The schedule of a pace, as its store keeps it: a pure function of the store's clock.

    Args:
        ends_at: The time at which the slots leased so far end.
        closed_until: The time until which a server has asked all to stay away.
        members: The times until which members count, by name.
    """

    ends_at: float = 0.0
    closed_until: float = 0.0
    members: dict[str, float] = {}

    def lease(self, now: float, rate: float, member: str, slots: int, closed_for: float) -> Lease:
        """Lease the next slots to a member.

        Args:
            now: The time of the store's clock in seconds. It may be set back.
            rate: The rate of the pace.
            member: The name of the member.
            slots: The most slots that it can use.
            closed_for: Seconds for which the server has asked this member to stay away, or 0.
        """
        closed_for = min(max(self.closed_until - now, closed_for, 0.0), MAX_CLOSED)
        # A schedule that is further ahead was made before the clock was set back.
        latest = now + closed_for + longest_queue(rate, len(self.members))
        members = {
            name: until
            for name, until in self.members.items()
            if now < until < latest + _MEMBERSHIP
        }
        members.setdefault(member, now)
        slots = min(slots, max(int(rate * LEASE / len(members)), 1))
        begins = max(min(self.ends_at, latest), now + closed_for)
        self.ends_at = begins + slots / rate
        members[member] = self.ends_at + _MEMBERSHIP
        # The time of a lease must not become a Retry-After when the clock is set back.
        self.closed_until, self.members = now + closed_for if closed_for else 0.0, members
        return Lease(slots=slots, delay=begins - now, closed_for=closed_for, members=len(members))


class FilePace(Pace):
    """A pace shared by the processes of one machine, through a file that SQLite locks.

    Args:
        path: The file; created if it does not exist, in a folder that does. It must be on a local
            disk or in memory, such as below `/run`. SQLite keeps two more files beside it.
        rate: The most attempts a second of all processes together, above 0; the same in each.

    Raises:
        BctrlConfigError: The rate is invalid, the folder does not exist, or the file is another
            one.
    """

    def __init__(self, path: str | os.PathLike[str], *, rate: float) -> None:
        super().__init__(rate=rate)
        if not isinstance(path, str | os.PathLike):
            raise _invalid_path(f"expected the path of a file, not {type(path).__name__}")
        self._path = Path(path)
        if self._path.is_dir():
            raise _invalid_path(f"{str(path)!r} is a folder")
        if self._path.exists() and not self._path.is_file():
            # To open a pipe would wait for its other end.
            raise _invalid_path(f"{str(path)!r} is not a regular file")
        if not self._path.absolute().parent.is_dir():
            raise _invalid_path(f"the folder of {str(path)!r} does not exist")
        try:
            with self._path.open("rb") as file:
                begins = file.read(len(_HEADER))
        except OSError:
            return  # The file may appear, or become readable, while a session runs.
        except ValueError:
            raise _invalid_path(f"{str(path)!r} is not the name of a file") from None
        if begins and begins != _HEADER:
            raise _invalid_path(f"{str(path)!r} is another file")

    def __repr__(self) -> str:
        return f"FilePace({str(self._path)!r}, rate={self.rate:g})"

    def open(self) -> PaceStore:
        """Return a connection to the file; it is opened with the first lease."""
        return _FileStore(self._path, self.rate)


class _FileStore(PaceStore):
    def __init__(self, path: Path, rate: float) -> None:
        self._path = path
        self._rate = rate
        self._file: tuple[sqlite3.Connection, os.stat_result] | None = None
        # A connection belongs to its thread, and a file that hangs must hold up nothing else.
        self._thread = ThreadPoolExecutor(1, "bctrl-async-pace")

    async def lease(self, member: str, slots: int, closed_for: float) -> Lease:
        take = partial(self._take, member, slots, closed_for)
        return await asyncio.get_running_loop().run_in_executor(self._thread, take)

    async def close(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        finally:
            self._thread.shutdown(wait=False)

    def _take(self, member: str, slots: int, closed_for: float) -> Lease:
        connection = self._open()
        try:
            # Locked before it is read, so that the step is atomic.
            connection.execute("BEGIN IMMEDIATE")
            row = connection.execute("SELECT schedule FROM pace").fetchone()
            schedule = Schedule() if row is None else _decode(row[0])
            lease = schedule.lease(time.time(), self._rate, member, slots, closed_for)
            connection.execute("REPLACE INTO pace VALUES (1, ?)", (_encode(schedule),))
            connection.execute("COMMIT")
        except BaseException:
            self._close()
            raise
        return lease

    def _open(self) -> sqlite3.Connection:
        if self._file is not None:
            connection, opened = self._file
            with suppress(FileNotFoundError):
                if os.path.samestat(self._path.stat(), opened):
                    return connection
            # Deleted or replaced: the others use the new file.
            self._close()
        # SQLite takes some relative names for a schedule in memory.
        path = self._path.absolute()
        connection = sqlite3.connect(path, timeout=_BUSY, isolation_level=None)
        try:
            # A schedule need not survive a power failure, so nothing waits for the disk.
            connection.execute("PRAGMA synchronous = OFF")
            _write_ahead(connection)
            connection.execute("CREATE TABLE IF NOT EXISTS pace (id INTEGER PRIMARY KEY, schedule)")
            self._file = connection, self._path.stat()
        except BaseException:
            connection.close()
            raise
        return connection

    def _close(self) -> None:
        if self._file is not None:
            self._file[0].close()
            self._file = None


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Set the journal mode, which the file keeps."""
    # SQLite itself does not wait for another process that does the same.
    until = time.monotonic() + _BUSY
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # The lower byte is the primary code; after a crash, another process may recover.
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() >= until:
                raise
            time.sleep(0.001)
        else:
            return


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Schedule).decode


def _invalid_path(problem: str) -> BctrlConfigError:
    return BctrlConfigError(
        f"invalid path: {problem}",
        advice="Use a file of its own, such as /run/stop-runtimes/pace",
        argument="path",
    )
