"""Read a journal."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec.structs import replace

from bctrl_async import _config
from bctrl_async.errors import BctrlConfigError, BctrlError
from bctrl_async.journal._format import (
    MAX_LINE,
    SETTLED,
    AnyMark,
    BegunMark,
    EndedMark,
    Mark,
    is_invalid,
    is_only_accepted,
    may_run,
    outcome_of_entry,
    read_header,
    read_line,
    resumed_outcome,
)
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import (
    OutcomeRecord,
    StopOutcome,
    StopResult,
)

_log = logging.getLogger("bctrl_async.journal")

MakeOutcome = Callable[[OutcomeRecord, RuntimeRef], StopOutcome]

OLD: timedelta = timedelta(days=1)
"""The age from which on a journal may be of an earlier night."""
_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Non-blocking, since a pipe would wait for its other end."""


class JournalContent(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a journal.

    Args:
        path: The file.
        base_url: The server of its runs.
        started: The time at which the file was begun.
        updated: The time of its last entry, or None if it has none.
        outcomes: The outcome of each target, marked as resumed. It has neither runtime nor error,
            unless they say that a runtime that accepted its stop no longer runs. One that is not
            settled is `unknown` if a later run may have sent it again and died, or goes on.
        is_complete: True if the last run has ended, read its whole input, had no failures, and
            read all that was `unfinished` or cut off.
        unfinished: The targets with an entry since the last complete run.
        cut_off: The number of targets of the longest run since then that did not read them all: it
            was cut off, such as by a SIGKILL, or goes on; 0 if there is none.
        unread: Such inputs of which the number of targets is not known: a stream, or a list of a
            workspace with its filter.
        shards: The shards that complete runs have stopped, each with the number of shards.
        is_torn: True if the last line is not whole: a run is writing it, or a crash cut it off.
            The next run removes it.
        size: The length of all whole lines in bytes.
    """

    path: Path
    base_url: str
    started: datetime
    updated: datetime | None
    outcomes: Mapping[RuntimeRef, StopOutcome]
    is_complete: bool
    unfinished: AbstractSet[RuntimeRef]
    cut_off: int
    unread: AbstractSet[str]
    shards: AbstractSet[tuple[int, int]]
    is_torn: bool
    size: int

    @property
    def not_running(self) -> dict[RuntimeRef, StopOutcome]:
        """The outcomes of runtimes that no longer run: a resumed run does not send them again."""
        return {target: known for target, known in self.outcomes.items() if _is_not_running(known)}

    @property
    def age(self) -> timedelta:
        """The time since the file was begun; negative if the clock was set back since."""
        return datetime.now(UTC) - self.started

    @property
    def age_text(self) -> str:
        """The age in its two largest units, such as `2d3h ago`."""
        return format_age(self.age)

    @property
    def pending(self) -> int:
        """The number of targets that a resumed run sends again."""
        return len(self.outcomes) - sum(map(_is_not_running, self.outcomes.values()))

    def excess_age(self, max_age: float) -> str | None:
        """Return the reason why it is older than this many seconds, or None if it is not."""
        # After the clock was set, a date in the future says as little as one in the past.
        if abs(self.age.total_seconds()) <= max_age:
            return None
        limit = format_duration(timedelta(seconds=max_age))
        return f"it was begun {format_age(self.age)}, and the limit is {limit}"

    def check_resumable(
        self, base_url: str, max_age: float | None = None, *, warns: bool = True
    ) -> None:
        """Check that a run may resume from this content.

        Args:
            base_url: The server of the run.
            max_age: The age in seconds beyond which it is rejected, or None.
            warns: Log a warning if it is old, or leaves nothing to be sent.

        Raises:
            BctrlConfigError: It belongs to another server, or is too old.
        """
        if self.base_url != base_url:
            raise resume_error(self.path, f"it belongs to another server, {self.base_url}")
        age = self.age
        if max_age is not None and (reason := self.excess_age(max_age)) is not None:
            raise resume_error(self.path, reason)
        is_done = self.is_complete and not self.pending
        if warns and (is_done or abs(age) > OLD):
            _log.warning(
                "the journal %r was begun %s%s: what it has as stopped is not sent "
                "again. Use another file for runtimes that were started anew",
                str(self.path),
                format_age(age),
                ", and its last run is complete" if is_done else "",
                extra={
                    "bctrl.event": "old_journal",
                    "bctrl.journal": str(self.path),
                    "bctrl.age": age.total_seconds(),
                },
            )


def read_journal(path: str | os.PathLike[str]) -> JournalContent | None:
    """Read a journal, also while a run writes it; the file is neither locked nor changed.

    Args:
        path: The file.

    Returns:
        The content, or None if the file is empty or was cut within its first line.

    Raises:
        BctrlConfigError: The file cannot be read, or is not an intact journal of this version.
    """
    return read_content(checked_path(path, "path"), resumed_outcome)


def checked_path(path: str | os.PathLike[str], argument: str) -> Path:
    """Return the path of a journal.

    Raises:
        BctrlConfigError: The argument is not a path.
    """
    _config.check_type(path, str | os.PathLike, argument, "the path of a file")
    return Path(path)


def read_content(path: Path, make_outcome: MakeOutcome) -> JournalContent | None:
    """Read a journal as `read_journal` does, with outcomes that are made from its entries.

    Args:
        path: The file.
        make_outcome: Makes an outcome of an entry and its target.

    Raises:
        BctrlConfigError: The file cannot be read, or is not an intact journal of this version.
    """
    try:
        file = open_file(path, _READ)
        try:
            return read_file(path, file, make_outcome)
        finally:
            os.close(file)
    except OSError as error:
        raise read_error(path, str(error.strerror)) from error
    except NotAJournalError as error:
        raise read_error(path, str(error)) from error


class NotAJournalError(Exception):
    """A file that is not an intact journal of this version; the text is the reason."""


def open_file(path: Path, flags: int) -> int:
    """Open the file, and return its descriptor.

    Raises:
        OSError: It cannot be opened.
        NotAJournalError: It is not a regular file.
    """
    try:
        file = os.open(path, flags, 0o666)
    except ValueError as error:
        raise OSError(None, str(error)) from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise NotAJournalError("it is not a regular file")
    return file


def read_file(
    path: Path, file: int, make_outcome: MakeOutcome = resumed_outcome
) -> JournalContent | None:
    """Read an open file; return None if it is empty or torn within its header.

    Raises:
        OSError: It cannot be read.
        NotAJournalError: It is not an intact journal of this version.
    """
    with os.fdopen(os.dup(file), "rb") as lines:
        lines.seek(0)
        return _read(path, lines, make_outcome)


def format_age(age: timedelta) -> str:
    """Return an age in its two largest units, such as `2d3h ago` or `4m in the future`."""
    return f"{format_duration(abs(age))} {'in the future' if age < timedelta() else 'ago'}"


def resume_error(path: Path, reason: str) -> BctrlConfigError:
    """Return the error of a file that is not the journal that a run can use."""
    return BctrlConfigError(
        f"the journal {str(path)!r} cannot be resumed: {reason}",
        advice="Use another file; this one is unchanged",
    )


def read_error(path: Path, reason: str) -> BctrlConfigError:
    return BctrlConfigError(
        f"the journal {str(path)!r} cannot be read: {reason}",
        advice="Use the path of an intact journal",
    )


def format_duration(duration: timedelta) -> str:
    """Return a duration in its two largest units, such as `2d3h`."""
    left = int(duration.total_seconds())
    counts: list[tuple[int, str]] = []
    for unit, seconds in _UNITS:
        count, left = divmod(left, seconds)
        if count or counts:
            counts.append((count, unit))
    return "".join(f"{count}{unit}" for count, unit in counts[:2] if count) or "0s"


def _read(path: Path, lines: BinaryIO, make_outcome: MakeOutcome) -> JournalContent | None:
    # No further than the current end, since another run may append meanwhile.
    left = os.fstat(lines.fileno()).st_size
    line = lines.readline(min(left, MAX_LINE + 1))
    try:
        header = read_header(line)
    except ValueError as error:
        raise NotAJournalError(str(error)) from error
    if header is None:
        return None
    entries = _Entries(make_outcome)
    size, number, torn = len(line), 1, None
    left -= len(line)
    while line := lines.readline(min(left, MAX_LINE + 1)):
        left -= len(line)
        number += 1
        if torn is not None:
            # A crash tears the last line only; after a power failure it may be all NUL.
            if line.strip(b"\0"):
                raise NotAJournalError(f"line {torn} is damaged")
            continue
        record = read_line(line)
        if record is None:
            if len(line.rstrip(b"\0")) > MAX_LINE:
                raise NotAJournalError(f"line {number} is longer than 1 MiB")
            torn = number
            continue
        size += len(line)
        entries.add(record)
    return JournalContent(
        path=path,
        base_url=header.base_url,
        started=header.started,
        updated=entries.updated,
        outcomes=entries.outcomes(),
        # What was torn off may have been the begin of a further run.
        is_complete=entries.is_complete and torn is None,
        unfinished=entries.unfinished,
        cut_off=entries.cut_off,
        unread=entries.unread,
        shards=entries.shards,
        is_torn=torn is not None,
        size=size,
    )


class _Entries:
    """The entries of a journal, and what its marks say of them.

    Args:
        make_outcome: Makes an outcome of an entry and its target.

    Attributes:
        updated: The time of the last entry, or None.
        is_complete: True if the last line is a completion mark.
        unfinished: The targets with an entry since the last completion mark.
        cut_off: The most targets of a run since then that did not read them all.
        unread: The other inputs that were not read to their end since then.
        shards: The shards of all completion marks.
    """

    def __init__(self, make_outcome: MakeOutcome) -> None:
        self._make_outcome = make_outcome
        self._outcomes: dict[RuntimeRef, StopOutcome] = {}
        # One for all entries that have it: a sixth of the memory.
        self._workspace_ids: dict[str, str] = {}
        # Those of the last run that sends some again, and all that such a run may have sent.
        self._sent_again: set[RuntimeRef] = set()
        self._in_doubt: set[RuntimeRef] = set()
        self.updated: datetime | None = None
        self.is_complete: bool = False
        self.unfinished: set[RuntimeRef] = set()
        self.cut_off: int = 0
        self.unread: frozenset[str] = frozenset()
        self._before: tuple[int, frozenset[str]] = (0, frozenset())
        self.shards: set[tuple[int, int]] = set()

    def add(self, record: OutcomeRecord | AnyMark) -> None:
        """Add an entry or a mark."""
        self.is_complete = isinstance(record, Mark)
        if isinstance(record, BegunMark):
            self._before = self.cut_off, self.unread
            self.cut_off = max(self.cut_off, record.targets or 0)
            if record.origin is not None:
                self.unread |= {record.origin}
            known = self._outcomes.items()
            # `accepted` and `not_found` hold, whatever came of a further stop.
            again = {target for target, outcome in known if outcome.result not in SETTLED}
            # A run that died leaves its doubts to those that follow.
            self._sent_again = again - self._in_doubt
            self._in_doubt |= again
        elif isinstance(record, Mark | EndedMark):
            self._in_doubt -= self._sent_again
            if isinstance(record, Mark):
                self.unfinished.clear()
                self.cut_off, self.unread = 0, frozenset()
                if record.shard is not None:
                    self.shards.add(record.shard)
            elif not record.unread:
                self.cut_off, self.unread = self._before
        else:
            self._add_entry(record)

    def _add_entry(self, record: OutcomeRecord) -> None:
        self.updated = record.at
        workspace_id = self._workspace_ids.setdefault(record.workspace_id, record.workspace_id)
        outcome = self._make_outcome(record, RuntimeRef(workspace_id, record.alias))
        # An item that is not a target may be corrected before the next run.
        if workspace_id and not is_invalid(record):
            self.unfinished.add(outcome.target)
        known = self._outcomes.get(outcome.target)
        if known is None or _supersedes(record, outcome, known):
            self._outcomes[outcome.target] = outcome
            self._in_doubt.discard(outcome.target)

    def outcomes(self) -> dict[RuntimeRef, StopOutcome]:
        """Return the outcome of each target."""
        doubtful = {target: _in_doubt(self._outcomes[target]) for target in self._in_doubt}
        return self._outcomes | doubtful if doubtful else self._outcomes


def _supersedes(record: OutcomeRecord, outcome: StopOutcome, known: StopOutcome) -> bool:
    """Return True if the outcome of an entry takes the place of the one above it."""
    # A failure says less than `accepted`, although such a target is sent again. One that has ended
    # is sent again only if it may run again: a list says so, or a stream has it twice.
    if outcome.result in SETTLED or not is_only_accepted(known):
        return True
    return may_run(outcome_of_entry(record, outcome.target))


def _in_doubt(outcome: StopOutcome) -> StopOutcome:
    error = BctrlError(
        "a run that has not ended may have sent it again",
        advice="Run again with the same journal",
        workspace_id=outcome.target.workspace_id,
        alias=outcome.target.alias,
        may_have_stopped=True,
    )
    return replace(outcome, result=StopResult.UNKNOWN, error=error)


def _is_not_running(outcome: StopOutcome) -> bool:
    return outcome.ok and outcome.result is not StopResult.NOT_FOUND
