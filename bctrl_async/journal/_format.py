"""The lines of a journal, without I/O.

A journal is JSON Lines: a header, one entry for each outcome, and marks. A run begins with a mark
and ends with another: if it dies between them, the entries of the targets that it sends again are
out of date. A completion mark ends a run that had no failures and read all that runs before it left
unfinished. Each line ends with a checksum of itself: a flipped bit must not settle a target.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated
from zlib import crc32

import msgspec
from msgspec.structs import replace

from bctrl_async import errors
from bctrl_async.errors import BctrlError, BctrlNetworkError
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import OutcomeRecord, StopOutcome, StopResult

MAX_LINE: int = 1 << 20
"""The length of the longest line, in bytes."""

_VERSION = 2
_MAGIC = b'{"journal":"bctrl_async"'
_CHECKSUM = b',"crc":"%08x"}\n'
_CHECKSUM_LENGTH = len(_CHECKSUM % 0)
_MAX_NAME = 1000
"""The characters of a name that remain if its entry would be too long."""

SETTLED = frozenset(
    {StopResult.STOPPED, StopResult.ACCEPTED, StopResult.ALREADY_STOPPED, StopResult.NOT_FOUND}
)
_STOPPED = frozenset({StopResult.STOPPED, StopResult.ALREADY_STOPPED})
_ERRORS = frozenset(errors.__all__)

_Time = Annotated[datetime, msgspec.Meta(tz=True)]


class Header(msgspec.Struct, frozen=True):
    """The first line: the server of the runs, and the time at which the file was begun."""

    journal: str
    version: int
    base_url: str
    started: _Time


class Mark(msgspec.Struct, frozen=True, omit_defaults=True):
    """The completion mark: a run read its whole input, and what was unfinished; none failed.

    Args:
        completed: The time.
        shard: The shard that the input was, and the number of shards; None if it was not divided.
    """

    completed: _Time
    shard: tuple[int, int] | None = None


class BegunMark(msgspec.Struct, frozen=True, omit_defaults=True):
    """A run begins: what is not settled above may be out of date from here on.

    Args:
        begun: The time.
        targets: The number of its targets; None if their number does not tell the input.
        origin: What the input is then: a stream, or a list of a workspace. None for any other.
    """

    begun: _Time
    targets: int | None = None
    origin: str | None = None


class EndedMark(msgspec.Struct, frozen=True, omit_defaults=True):
    """A run has ended that is not complete: what it sent again has an entry of its own.

    Args:
        ended: The time.
        unread: True if it did not read its whole input.
    """

    ended: _Time
    unread: bool = False


AnyMark = Mark | BegunMark | EndedMark
_MARKS: dict[bytes, type[AnyMark]] = {
    b'{"completed":': Mark,
    b'{"begun":': BegunMark,
    b'{"ended":': EndedMark,
}


class _AnyVersion(msgspec.Struct, frozen=True):
    version: int


_UNREADABLE = (ValueError, msgspec.MsgspecError, RecursionError)
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(OutcomeRecord).decode


def header_line(base_url: str, started: datetime) -> bytes:
    """Return the first line of a new file."""
    return _seal(_encode(Header("bctrl_async", _VERSION, base_url, started)))


def entry_line(outcome: StopOutcome) -> bytes:
    """Return the line of an outcome, which is never longer than `MAX_LINE`."""
    # The runtime of nearly every entry would say no more, and make it three times as long.
    runtime = None if outcome.result in _STOPPED else outcome.runtime
    record = replace(OutcomeRecord.of(outcome), resumed=False, runtime=runtime)
    line = _seal(_to_json(record))
    if len(line) > MAX_LINE:
        record = replace(record, runtime=None, error=None)
        line = _seal(_to_json(record))
    if len(line) > MAX_LINE:
        # Such a target is invalid. The ellipsis makes the short name too long for a valid one.
        workspace_id, alias = (f"{name[:_MAX_NAME]}…" for name in outcome.target)
        line = _seal(_to_json(replace(record, workspace_id=workspace_id, alias=alias)))
    return line


def mark_line(mark: AnyMark) -> bytes:
    """Return the line of a mark."""
    return _seal(_encode(mark))


def read_header(line: bytes) -> Header | None:
    """Return the header; None if the file is empty, or was cut within this line.

    Raises:
        ValueError: It is not the header of a journal of this version.
    """
    if not line.startswith(_MAGIC) and not _MAGIC.startswith(line):
        raise ValueError("it is not a journal")
    if len(line) > MAX_LINE:
        raise ValueError("line 1 is longer than 1 MiB")
    if not line.endswith(b"\n"):
        return None
    damaged = ValueError("line 1 is damaged")
    try:
        # Version 1 had no checksums.
        if msgspec.json.decode(line, type=_AnyVersion).version != _VERSION:
            damaged = ValueError("another version wrote it")
        elif _is_sealed(line):
            return msgspec.json.decode(line, type=Header)
    except _UNREADABLE as error:
        raise damaged from error
    raise damaged


def read_line(line: bytes) -> OutcomeRecord | AnyMark | None:
    """Return the entry or mark of a line, None if it is damaged."""
    if not _is_sealed(line):
        return None
    try:
        for prefix, kind in _MARKS.items():
            if line.startswith(prefix):
                return msgspec.json.decode(line, type=kind)
        try:
            return _decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # A lone surrogate, see `_to_json`.
            return msgspec.convert(json.loads(line), OutcomeRecord)
    except _UNREADABLE:
        return None


def resumed_outcome(record: OutcomeRecord, target: RuntimeRef) -> StopOutcome:
    """Return the outcome of an entry for a run that resumes from it.

    It has neither runtime nor error, unless they say that an accepted runtime no longer runs.
    """
    bare = _bare_outcome(record, target)
    if record.result is StopResult.ACCEPTED:
        known = outcome_of_entry(record, target)
        return known if known.ok else bare
    return bare


def outcome_of_entry(record: OutcomeRecord, target: RuntimeRef) -> StopOutcome:
    """Return the outcome of an entry, with its runtime and its error."""
    bare = _bare_outcome(record, target)
    return replace(bare, runtime=record.runtime, error=error_of(record))


def _bare_outcome(record: OutcomeRecord, target: RuntimeRef) -> StopOutcome:
    return StopOutcome(
        index=record.index,
        target=target,
        result=record.result,
        state=record.state,
        request_id=record.request_id,
        attempts=record.attempts,
        elapsed=record.elapsed,
        at=record.at,
        resumed=True,
    )


def error_of(record: OutcomeRecord) -> BctrlError | None:
    """Return the error of an entry; None if it has none, or if its runtime is stopped."""
    error = record.error
    if error is None or record.result in _STOPPED:
        return None
    known: type[BctrlError] = getattr(errors, error.type) if error.type in _ERRORS else BctrlError
    is_accepted = record.result is StopResult.ACCEPTED and issubclass(known, BctrlNetworkError)
    return known(
        error.message,
        workspace_id=record.workspace_id or None,
        alias=record.alias if record.workspace_id else None,
        attempts=record.attempts,
        may_have_stopped=error.may_have_stopped,
        accepted=is_accepted,
        status=error.status,
        code=error.code,
        reason_class="invalid_input" if is_invalid(record) else None,
        request_id=error.request_id,
    )


def is_invalid(record: OutcomeRecord) -> bool:
    """Return True if the item of an entry was not a target."""
    # Only these are rejected without an answer, and are not of the server.
    return (
        record.result is StopResult.REJECTED
        and record.error is not None
        and record.error.status is None
        and record.error.type == "BctrlConfigError"
    )


def is_only_accepted(outcome: StopOutcome) -> bool:
    """Return True if a stop was accepted whose runtime may not have ended."""
    return outcome.result is StopResult.ACCEPTED and not outcome.ok


def may_run(outcome: StopOutcome) -> bool:
    """Return True if the server said of the runtime that it runs, or may run."""
    if is_only_accepted(outcome):
        return True
    return outcome.runtime is not None and not outcome.runtime.status.is_final


def _to_json(record: OutcomeRecord) -> bytes:
    try:
        return _encode(record)
    except UnicodeEncodeError:
        # A lone surrogate in an invalid target; `json` writes it as an escape.
        return json.dumps(msgspec.to_builtins(record)).encode()


def _seal(line: bytes) -> bytes:
    """Return a JSON object as a line that ends with its checksum."""
    content = line[:-1]
    return content + _CHECKSUM % crc32(content)


def _is_sealed(line: bytes) -> bool:
    return line[-_CHECKSUM_LENGTH:] == _CHECKSUM % crc32(line[:-_CHECKSUM_LENGTH])
