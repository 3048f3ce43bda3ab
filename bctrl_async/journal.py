"""The journal of a bulk stop: a file of outcomes, from which a run is resumed.

It is JSON Lines: a header, then an entry for each outcome. The last entry of a target
wins: the target is done if that entry says that its runtime no longer runs, and is sent
again otherwise. Each line ends with its checksum, and only the last line may be cut
short. A journal does not contain its run's list of targets: `read_journals` takes the
list, and finds the outcome of each target.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from os.path import samestat
from pathlib import Path
from typing import BinaryIO, Literal, Self, TypeVar
from uuid import UUID

from msgspec.structs import replace

from bctrl_async import _config, _refs
from bctrl_async._entries import (
    MAGIC,
    MAX_LINE,
    VERSION,
    DamageError,
    Entry,
    EntryTarget,
    Header,
    decode,
    entry_line,
    header_line,
    shorten,
)
from bctrl_async.errors import BctrlConfigError, BctrlError
from bctrl_async.filters import Selection
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.outcomes import StopOutcome, StopResult

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    # It has no flock, so a second run is not detected.
    fcntl = None  # type: ignore[assignment]

__all__ = ["Journal", "JournalInUseError", "read_journals"]

_T = TypeVar("_T")

_log = logging.getLogger("bctrl_async.journal")

_PATHS = "an iterable of paths"
_MAX_AHEAD = timedelta(minutes=5)  # the clocks of two machines may differ


class JournalInUseError(BctrlConfigError):
    """Another run has the journal, or a file server holds the lock of a dead client.

    The same call may succeed later. Nothing was sent.
    """


def read_journals(
    paths: Iterable[str | os.PathLike[str]],
    targets: Iterable[RuntimeRef | Runtime | tuple[str | UUID, str]] | None = None,
    *,
    max_age: float | None = None,
) -> Iterator[StopOutcome]:
    """Yield the latest outcome of each target in one or more journals of one server.

        pending = [each.target for each in read_journals(paths, targets) if not each.ok]

    The last entry of a target in a file counts, and among several files the latest:
    what is `ok` was known when its request was sent (`sent_at`), all else at `at`. The
    files are read when the iteration starts, even while runs write to them, and are not
    changed.

    Args:
        paths: The files.
        targets: The list: `RuntimeRef`s, pairs (workspace id, alias) or `Runtime`s.
            Each has one outcome, in the order of the list. A target that no file has,
            or only as `not_sent`, is `unknown`, since a process may have died after it
            sent the stop. None yields only targets in the files: those without an entry
            are not reported.
        max_age: The greatest age of a file in seconds, above 0; an older file, such as
            last night's, is rejected. None accepts any age.

    Yields:
        Outcomes; `index` numbers them from 0, and `runtime` is None if they are `ok`.

    Raises:
        BctrlConfigError: A file cannot be read, is not an intact journal of this
            version, belongs to another server than the first file, is older than
            `max_age`, or has an entry dated more than five minutes in the future.
            `paths` is empty, or an item of the list is not a target.
    """
    if isinstance(paths, str | bytes | os.PathLike):
        raise _config.invalid_type("paths", type(paths), _PATHS)
    _config.check_type(paths, Iterable, "paths", _PATHS)
    _config.check_type(targets, Iterable | None, "targets", "an iterable of targets")
    with ExitStack() as stack:
        journals = _open_all(paths, max_age, stack)
        if targets is None:
            targets = dict.fromkeys(
                RuntimeRef(workspace_id, alias)
                for journal in journals
                for workspace_id, aliases in journal.offsets.items()
                for alias in aliases
            )
        for index, item in enumerate(targets):
            target = _refs.as_target(item)
            yield replace(_outcome_of(journals, target), index=index, target=target)


def _open_all(
    paths: Iterable[str | os.PathLike[str]], max_age: float | None, stack: ExitStack
) -> list[JournalReader]:
    """Open journals of one server, which the stack closes."""
    journals: list[JournalReader] = []
    base_url = ""
    for path in paths:
        _config.check_type(path, str | os.PathLike, "paths", _PATHS)
        journal = JournalReader(path, base_url, max_age)
        stack.enter_context(journal.file)
        journal.warn_if_old()
        # The next journals must be of the same server.
        base_url = journal.base_url
        journals.append(journal)
    if not journals:
        raise BctrlConfigError("there are no journals", argument="paths")
    return journals


def _outcome_of(journals: list[JournalReader], target: RuntimeRef) -> StopOutcome:
    """Return the latest outcome of a target; `unknown` if no journal has it sent."""
    latest = _latest(journals, target)
    if latest is None:
        # A name that cannot be sent may be written in a shorter form.
        workspace_id, alias = target
        latest = _latest(journals, RuntimeRef(shorten(workspace_id), shorten(alias)))
    # A program may write an entry that is not sent, and ok.
    if latest is None or (latest.result is StopResult.NOT_SENT and not latest.ok):
        return _unknown_outcome(target, latest)
    return latest


def _latest(journals: list[JournalReader], target: RuntimeRef) -> StopOutcome | None:
    outcomes = [journal.outcome(target) for journal in journals]
    recorded = [outcome for outcome in outcomes if outcome is not None]
    return max(recorded, key=_rank, default=None)


def _rank(outcome: StopOutcome) -> tuple[datetime, bool]:
    # An outcome that is not ok wins a tie, so that its target is sent again.
    return _known_at(outcome), not outcome.ok


def _known_at(outcome: StopOutcome) -> datetime:
    """Return the time of what an outcome says about its runtime."""
    if outcome.ok and outcome.sent_at is not None:
        # It may have been started again before the answer arrived.
        return min(outcome.sent_at, outcome.at)
    return outcome.at


def _unknown_outcome(target: RuntimeRef, latest: StopOutcome | None) -> StopOutcome:
    """Return the outcome of a target that no journal has as sent."""
    problem = "no journal has it"
    if latest is not None and latest.error is not None:
        problem = f"{latest.error.summary}; another run may have sent it"
    # A process may have died after it sent the stop, and before it wrote an entry.
    error = BctrlError(problem, **target._asdict(), may_have_stopped=True)
    return StopOutcome(
        index=0, target=target, result=StopResult.UNKNOWN, error=error, attempts=0
    )


class JournalReader:
    """The entries of a journal that is read, of any server if `base_url` is empty."""

    _mode: Literal["rb", "a+b"] = "rb"
    _opener: Callable[[str, int], int] | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        base_url: str = "",
        max_age: float | None = None,
    ) -> None:
        if max_age is not None:
            max_age = _config.seconds(max_age, "max_age")
        self.base_url: str = base_url
        self._path = Path(path)
        self._age = timedelta()
        self._lock = threading.Lock()
        self.end: int = 0
        """The offset after the last entry that was read."""
        # These are offsets of last entries, by workspace and alias. The dicts are
        # nested: a single dict of pairs would take twice the memory.
        self.offsets: defaultdict[str, dict[str, int]] = defaultdict(dict)
        try:
            # The file stays open unless its entries cannot be read.
            with ExitStack() as stack:
                self.file: BinaryIO = stack.enter_context(self._open())
                self._load(max_age)
                stack.pop_all()
        except BlockingIOError as error:
            raise JournalInUseError(
                f"the journal {str(self._path)!r} is in use by another run",
                advice="Wait until that run has ended, or use another file",
            ) from error
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error

    def _open(self) -> BinaryIO:
        if self._path.exists() and not self._path.is_file():
            raise ValueError("it is not a regular file")
        return open(self._path, self._mode, buffering=0, opener=self._opener)

    def _load(self, max_age: float | None) -> None:
        """Read the header, if it is complete, and all entries."""
        with open(self.file.fileno(), "rb", closefd=False) as lines:
            lines.seek(0)
            line = lines.readline(MAX_LINE)
            # A crash may have cut the line within its first words.
            if not line.startswith(MAGIC) and not MAGIC.startswith(line):
                raise ValueError("it is not a journal")
            if not line.endswith(b"\n") and len(line) < MAX_LINE:
                # The file is new, or a crash cut its header short.
                return
            self._check_header(self._decode(line, Header, 0), max_age)
            self.end = len(line)
            self._read_entries(lines)

    def _read_entries(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            if not line.endswith(b"\n"):
                # The line is still being written, or a crash cut it short.
                return
            entry = self._decode(line, EntryTarget, self.end)
            self.offsets[entry.workspace_id][entry.alias] = self.end
            self.end += len(line)

    def _decode(self, line: bytes, struct: type[_T], offset: int) -> _T:
        """Decode the line at an offset; if it is damaged, say which line it is."""
        try:
            return decode(line, struct)
        except DamageError as error:
            number = 1
            for earlier in self._lines_from(0):
                if offset <= 0:
                    break
                offset -= len(earlier)
                number += 1
            raise DamageError(f"line {number} is damaged") from error

    def _check_header(self, header: Header, max_age: float | None) -> None:
        if header.version != VERSION:
            raise ValueError("another version wrote it")
        if self.base_url not in {"", header.base_url}:
            raise ValueError(f"it belongs to another server, {header.base_url}")
        self.base_url = header.base_url
        # A header dated in the future is as doubtful as an old header.
        age = abs((datetime.now(UTC) - header.started).total_seconds())
        self._age = timedelta(seconds=int(age))
        if max_age is not None and age > max_age:
            raise ValueError(
                f"it is {self._age} old; the limit is {timedelta(seconds=max_age)}"
            )

    def outcome(self, target: RuntimeRef, end: float = math.inf) -> StopOutcome | None:
        """Return the outcome of a target, None if its last entry is not before this."""
        offset = self.offsets.get(target.workspace_id, {}).get(target.alias)
        if offset is None or offset >= end:
            return None
        try:
            line = self._line_at(offset)
            outcome = self._decode(line, Entry, offset).outcome()
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        if outcome.target != target:
            # The file was rewritten in place after it was opened.
            raise self._unusable(f"its entry at byte {offset} has another target now")
        if outcome.at > datetime.now(UTC) + _MAX_AHEAD:
            raise self._unusable(f"its entry at byte {offset} is dated in the future")
        return outcome

    def _line_at(self, offset: int) -> bytes:
        return next(self._lines_from(offset, size=1024), b"")

    def _lines_from(self, offset: int, size: int = 65_536) -> Iterator[bytes]:
        """Yield the whole lines from an offset on."""
        tail = b""
        while True:
            # A write of another thread would move the position in the file.
            with self._lock:
                self.file.seek(offset)
                part = self.file.read(size)
            if not part:
                break
            offset += len(part)
            *lines, tail = (tail + part).split(b"\n")
            for line in lines:
                yield line + b"\n"

    def _unusable(
        self,
        problem: OSError | ValueError | str,
        advice: str = "Check its path, or use another file",
    ) -> BctrlConfigError:
        if isinstance(problem, OSError):
            problem = str(problem.strerror)
        if isinstance(problem, DamageError):
            advice = "Use another file: sending its targets again is safe"
        return BctrlConfigError(
            f"the journal {str(self._path)!r} cannot be used: {problem}", advice=advice
        )

    def done(self, target: RuntimeRef, end: float = math.inf) -> StopOutcome | None:
        """Return the outcome of a target that is done in the file, or None."""
        try:
            outcome = self.outcome(target, end)
        except BctrlConfigError:
            # The entry cannot be used, and sending the target again is safe.
            return None
        # A target that was not found may have been started since.
        if outcome is None or not outcome.ok or outcome.result is StopResult.NOT_FOUND:
            return None
        return replace(outcome, resumed=True)

    def warn_if_old(self) -> None:
        """Warn if it is over a day old: runtimes started since count as stopped."""
        if self._age > timedelta(days=1):
            _log.warning(
                "the journal %r is %s old, and runtimes started anew since then "
                "count as stopped",
                str(self._path),
                self._age,
                extra={
                    "bctrl.event": "old_journal",
                    "bctrl.journal": str(self._path),
                    "bctrl.age": self._age.total_seconds(),
                },
            )


class JournalFile(JournalReader):
    """The file of a journal that is open, locked, and appended to."""

    _mode = "a+b"
    _failure: str | None = None

    @staticmethod
    def _opener(path: str, flags: int) -> int:
        # A link may lead to anyone's file, and whoever can open a file can lock it.
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)

    def __init__(
        self,
        path: str | os.PathLike[str],
        base_url: str = "",
        max_age: float | None = None,
    ) -> None:
        # A write takes neither of these: it waits for no flush and no reading.
        self._reading = threading.Lock()
        self._flushing = threading.Lock()
        self._listed: defaultdict[str, dict[str, datetime]] = defaultdict(dict)
        """The times of the last lists in which runtimes run, as `offsets`."""
        super().__init__(path, base_url, max_age)

    def _open(self) -> BinaryIO:
        # The current folder may be another when the file is read again.
        self._place = self._path.absolute()
        if self._path.is_symlink():
            raise ValueError("it is a symbolic link")
        return super()._open()

    def _load(self, max_age: float | None) -> None:
        """Lock the file, read it, and make it end with a whole line."""
        if fcntl is not None:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        super()._load(max_age)
        os.ftruncate(self.file.fileno(), self.end)
        if not self.end:
            line = header_line(self.base_url)
            self._append(line)
            self.end: int = len(line)

    def check_server(self, base_url: str) -> None:
        """Raise BctrlConfigError unless it belongs to this server."""
        if base_url != self.base_url:
            raise self._unusable(
                f"it belongs to another server, {self.base_url}",
                "Give it the base_url of the session, or use another file",
            )

    def refresh(self) -> None:
        """Read the entries that were written since."""
        self._check_writable()
        try:
            self._check_place()
            # The machine may have no file descriptor left to open it again.
            with self._reading:
                self._read_entries(self._lines_from(self.end))
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error

    def correct(self, selection: Selection) -> None:
        """Append that listed runtimes run, where the file has an older entry; flush."""
        workspace_id = selection.workspace_id
        listed = self._listed[workspace_id]
        for alias in selection.running:
            # A stop in flight has no entry yet.
            listed[alias] = max(selection.at, listed.get(alias, selection.at))
        self.refresh()
        entries = self.offsets.get(workspace_id, {})
        is_wrong = False
        for alias in selection.running:
            target = RuntimeRef(workspace_id, alias)
            if alias in entries and not self._is_done_since(target, selection.at):
                self._append(_correction(target, selection.at))
                is_wrong = True
        if is_wrong:
            self.flush()
            # The corrected entries are no other run's past.
            self.refresh()

    def _is_done_since(self, target: RuntimeRef, listed_at: datetime) -> bool:
        outcome = self.done(target)
        return outcome is not None and _known_at(outcome) > listed_at

    def write(self, outcome: StopOutcome, *, flush: bool = False) -> None:
        """Append an outcome, as `Journal.write` says."""
        data = entry_line(outcome)
        workspace_id, alias = outcome.target
        listed_at = self._listed.get(workspace_id, {}).get(alias)
        if outcome.ok and listed_at is not None and _known_at(outcome) < listed_at:
            # The last entry counts, and the list is newer.
            data += _correction(outcome.target, listed_at)
        self._append(data)
        if flush:
            self.flush()

    def flush(self) -> None:
        """Flush the file, as `Journal.flush` says."""
        with self._flushing:
            if not self.file.closed:
                self._flush()

    def close(self) -> None:
        """Close the file, as `Journal.close` says."""
        with self._flushing:
            if self.file.closed:
                return
            is_intact = self._failure is None
            try:
                self._flush()
            except BctrlError:
                # The first failure was raised before; here it would hide a report.
                if is_intact:
                    raise
            finally:
                self._unlock()

    def _unlock(self) -> None:
        try:
            with self._lock, self.file:
                if fcntl is not None:  # pragma: no branch
                    # Closing is not enough: a forked child may have the file open.
                    fcntl.flock(self.file, fcntl.LOCK_UN)
        except OSError as error:
            raise self._fail(error) from error

    def _check_writable(self) -> None:
        if self.file.closed:
            raise self._unusable("it is closed", "Use it within its `with` block")
        if self._failure is not None:
            raise self._unwritable(self._failure)

    def _append(self, data: bytes) -> None:
        with self._lock:
            self._check_writable()
            try:
                while data:
                    count = os.write(self.file.fileno(), data)
                    data = data[count:]
            except OSError as error:
                # Another line after a truncated line would make the file unreadable.
                raise self._fail(error) from error

    def _flush(self) -> None:
        try:
            os.fsync(self.file.fileno())
            self._check_place()
        except OSError as error:
            raise self._fail(error) from error
        # Even if a write has failed, the lines before it were flushed.
        self._check_writable()

    def _check_place(self) -> None:
        """Raise OSError unless the path still leads to the file."""
        with suppress(FileNotFoundError):
            if samestat(os.lstat(self._place), os.fstat(self.file.fileno())):
                return
        raise FileNotFoundError(errno.ENOENT, "it was moved or deleted")

    def _fail(self, error: OSError) -> BctrlError:
        """Return an error, which all later calls raise as well."""
        self._failure = str(error.strerror)
        return self._unwritable(self._failure)

    def _unwritable(self, reason: str) -> BctrlError:
        return BctrlError(
            f"the journal {str(self._path)!r} cannot be written: {reason}",
            advice="Free some space, or put the file back; then run again with it",
        )


def _correction(target: RuntimeRef, at: datetime) -> bytes:
    """Return the line of a runtime that a list has as running at this time."""
    error = BctrlError("the workspace was listed, and it runs")
    return entry_line(
        StopOutcome(
            index=0,
            target=target,
            result=StopResult.NOT_SENT,
            error=error,
            attempts=0,
            at=at,
        )
    )


class Journal:
    """A journal that is open, locked, and appended to; use it as a context manager.

        with Journal("night.jsonl", max_age=43_200) as journal:
            report = await session.stop_runtimes(targets, journal=journal)

    A program that runs bulk stops elsewhere, such as on a cluster, writes their
    outcomes to it, and asks `read_journals` what is pending. It may be shared by
    threads, and by the bulk stops of a session, each of which skips what the file has
    as stopped when it starts.

    Args:
        path: The file, not a symbolic link; if there is none, it is made for its owner
            alone (0600). It is read here, about a million entries a second; in async
            code, `await asyncio.to_thread(Journal, path)` does not block the loop.
        base_url: The URL of the API that the outcomes come from. None reads
            `BCTRL_BASE_URL`, or uses `https://api.bctrl.ai` if that is not set.
        max_age: The greatest age of the file in seconds, above 0; an older file, such
            as last night's, is rejected. None accepts any age.

    Attributes:
        base_url: The URL of the API, with the `/v1`.

    Raises:
        JournalInUseError: Another `Journal` has the file.
        BctrlConfigError: The file cannot be used: it is damaged, too old, of another
            server or of another version. Or an argument is invalid.
        BctrlError: The header of a new file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        base_url: str | None = None,
        max_age: float | None = None,
    ) -> None:
        _config.check_type(path, str | os.PathLike, "path", "the path of a file")
        self.base_url: str = str(_config.base_url(base_url, allow_plaintext=True))
        self._file = JournalFile(path, self.base_url, max_age)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, outcome: StopOutcome, *, flush: bool = False) -> None:
        """Append an outcome, which is then the last entry of its target.

        Args:
            outcome: The outcome; its `index` is written as it is.
            flush: Flush the file to disk (`fsync`), so that a power failure loses
                nothing. By default it is flushed when it is closed.

        Raises:
            BctrlConfigError: The journal is closed; or a field of the outcome has a
                wrong type, or `at` has no time zone. Nothing is written.
            BctrlError: The file cannot be written. All later calls raise this as well,
                because a line after half a line would make the file unreadable.
        """
        self._file.write(outcome, flush=flush)

    def flush(self) -> None:
        """Flush the file to disk (`fsync`).

        Raises:
            BctrlError: The file cannot be flushed, is no longer at its path, or an
                earlier write failed.
        """
        self._file.flush()

    def close(self) -> None:
        """Flush the file to disk, unlock and close it; a second call does nothing.

        Raises:
            BctrlError: The file cannot be flushed, or is no longer at its path; it is
                closed even so. An earlier failure is not raised again.
        """
        self._file.close()


def open_journal(
    journal: Journal | str | os.PathLike[str], base_url: str
) -> JournalFile:
    """Return the file of a journal, from its path or the caller's, with all entries."""
    if not isinstance(journal, Journal):
        return JournalFile(journal, base_url)
    file = journal._file  # noqa: SLF001 - users shall not see it.
    file.check_server(base_url)
    file.refresh()
    return file
