"""A journal that is open for a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from pathlib import Path

from msgspec.structs import replace

from bctrl_async.errors import BctrlConfigError, BctrlError
from bctrl_async.filters import ListedRuntimes
from bctrl_async.journal._content import NotAJournalError, open_file, read_file, resume_error
from bctrl_async.journal._format import (
    BegunMark,
    EndedMark,
    Mark,
    entry_line,
    header_line,
    mark_line,
)
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import StopOutcome, StopResult

try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
except ImportError:  # pragma: no cover - Windows has no flock, so a second run is not detected.

    def _lock(file: int) -> None: ...

    def _unlock(file: int) -> None: ...

else:

    def _lock(file: int) -> None:
        flock(file, LOCK_EX | LOCK_NB)

    def _unlock(file: int) -> None:
        # Closing is not enough: a forked child may have the file open as well.
        flock(file, LOCK_UN)


_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)


class JournalInUseError(BctrlConfigError):
    """Another run has the journal, or a file server still holds the lock of a client that died.

    The same call may succeed later. Nothing was sent.
    """


class Journal:
    """A journal that is open for one run and locked against others.

    Args:
        path: The file; created if it does not exist.
        base_url: The server of the run.
        max_age: The age in seconds beyond which the file is rejected, or None.
        targets: The number of targets of the run, None if it is not known.
        origin: What the input is, if the number of targets does not tell it from another.
        warns: Log a warning if the file is old, or leaves nothing to be sent.

    Attributes:
        not_running: The outcomes of runtimes that no longer ran when it was opened.

    Raises:
        JournalInUseError: The file is in use by another run.
        BctrlConfigError: The file cannot be opened, is older than `max_age`, or is not an intact
            journal of this version and server. It is left unchanged.
        BctrlError: The header could not be written, for example on a full disk.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        base_url: str,
        max_age: float | None = None,
        *,
        targets: int | None = None,
        origin: str | None = None,
        warns: bool = True,
    ) -> None:
        self._path = Path(path)
        self._has_begun = False
        self._left = 0
        self._left_inputs: AbstractSet[str] = frozenset()
        self._left_targets: set[RuntimeRef] = set()
        self._pending: dict[RuntimeRef, StopOutcome] = {}
        try:
            self._file = open_file(self._path, _FLAGS)
            try:
                self._lock()
                self.not_running: Mapping[RuntimeRef, StopOutcome] = self._resume(
                    base_url, max_age, warns=warns
                )
                self._left_inputs -= {origin}
                if self._has_begun or targets is not None or origin is not None:
                    count = targets if origin is None else None
                    self._append(mark_line(BegunMark(datetime.now(UTC), count, origin)))
                    self._has_begun = True
            except BaseException:
                os.close(self._file)
                raise
        except OSError as error:
            raise self._open_error(error) from error
        except NotAJournalError as error:
            raise resume_error(self._path, str(error)) from error

    def mark_read(self, target: RuntimeRef) -> None:
        """Take note that the run read a target, also if it writes no outcome of it."""
        self._left_targets.discard(target)
        self._pending.pop(target, None)
        self._left -= 1

    def mark_listed(self, listed: ListedRuntimes) -> None:
        """Take note that the run listed a workspace: what no longer runs needs not be stopped.

        Raises:
            BctrlError: It could not be written, for example on a full disk.
        """
        self._left_targets = set(filter(listed.may_run, self._left_targets))
        for target, known in self._pending.items():
            if listed.has_ended(target):
                result = StopResult.ALREADY_STOPPED
                self.write(replace(known, result=result, attempts=0, at=listed.at))

    def write(self, outcome: StopOutcome) -> None:
        """Append an outcome.

        Raises:
            BctrlError: It could not be written, for example on a full disk.
        """
        self._append(entry_line(outcome))

    def close(
        self,
        *,
        complete: bool = False,
        unread: bool = False,
        shard: tuple[int, int] | None = None,
    ) -> None:
        """Flush the file to disk, then unlock and close it.

        Args:
            complete: True if the run read its whole input and had no failures. If an earlier run
                had not, the journal is complete only if this one read every target of that one: a
                few stops do not make up for a list that was not read to its end. Of an input that
                was not read to its end, this one must have read as many targets as that had, or be
                of the same origin.
            unread: True if the run did not read its whole input.
            shard: The shard that the input was, and the number of shards.

        Raises:
            BctrlError: The mark could not be written, or the flush failed.
        """
        try:
            is_left = self._left_targets or self._left_inputs or self._left > 0
            if complete and not is_left:
                self._append(mark_line(Mark(datetime.now(UTC), shard)))
            elif self._has_begun:
                self._append(mark_line(EndedMark(datetime.now(UTC), unread)))
            os.fsync(self._file)
        except OSError as error:
            raise self._write_error(error) from error
        finally:
            _unlock(self._file)
            os.close(self._file)

    def _append(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            # A mark behind a line that was cut short would be lost with it.
            self._has_begun = False
            raise self._write_error(error) from error

    def _lock(self) -> None:
        try:
            _lock(self._file)
        except BlockingIOError as error:
            raise JournalInUseError(
                f"the journal {str(self._path)!r} is in use by another run",
                advice="Wait until that run has ended, or use another file",
            ) from error

    def _resume(
        self, base_url: str, max_age: float | None, *, warns: bool
    ) -> Mapping[RuntimeRef, StopOutcome]:
        """Return the outcomes to resume from, and cut off a torn tail; begin an empty file."""
        content = read_file(self._path, self._file)
        if content is None:
            # A crash while the file was created leaves a part of the header.
            os.ftruncate(self._file, 0)
            self._append(header_line(base_url, datetime.now(UTC)))
            return {}
        content.check_resumable(base_url, max_age, warns=warns)
        if content.is_torn:
            os.ftruncate(self._file, content.size)
        self._left = content.cut_off
        self._left_inputs = content.unread
        self._left_targets = set(content.unfinished)
        not_running = content.not_running
        self._pending = {
            target: outcome
            for target, outcome in content.outcomes.items()
            if target not in not_running
        }
        # What it says is out of date from now on.
        self._has_begun = content.is_complete or content.pending > 0
        return not_running

    def _open_error(self, error: OSError) -> BctrlConfigError:
        return BctrlConfigError(
            f"the journal {str(self._path)!r} cannot be opened: {error.strerror}",
            advice="Use a file that can be read, written and locked",
        )

    def _write_error(self, error: OSError) -> BctrlError:
        return BctrlError(
            f"the journal {str(self._path)!r} cannot be written: {error.strerror}",
            advice="Free some space, then run again with the same journal",
        )
