"""A reading of the journal that shares no code with the package, line by line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, NamedTuple
from zlib import crc32

Record = dict[str, Any]
MARKS = {"completed", "begun", "ended"}


class JournalLines(NamedTuple):
    """The lines of a journal: a header, entries and completion marks."""

    header: Record
    entries: list[Record]
    marks: list[Record]
    ends_with_mark: bool
    is_torn: bool


def read_lines(data: bytes) -> JournalLines:
    """Read a journal that has at least its header.

    Only the last line may be cut short.

    Raises:
        ValueError: A line is not what it should be.
    """
    *lines, tail = data.split(b"\n")
    header, *records = [_read_line(number, line) for number, line in enumerate(lines, start=1)]
    if header["journal"] != "bctrl_async":
        raise ValueError(f"line 1 is not a header: {header}")
    started, now = _time(header["started"]), datetime.now(UTC)
    for number, record in enumerate(records, start=2):
        time = next(record[name] for name in (*MARKS, "at") if name in record)
        if not started <= _time(time) <= now:
            raise ValueError(f"line {number} was not written between the header and now: {record}")
    entries = [record for record in records if not MARKS & record.keys()]
    marks = [record for record in records if "completed" in record]
    return JournalLines(header, entries, marks, records[-1:] == marks[-1:] != [], bool(tail))


def _read_line(number: int, line: bytes) -> Record:
    content, _, checksum = line.rpartition(b',"crc":')
    if checksum != b'"%08x"}' % crc32(content):
        raise ValueError(f"line {number} has a wrong checksum: {line!r}")
    record: Record = json.loads(line)
    return record


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.utcoffset() is None:
        raise ValueError(f"{text} has no time zone")
    return time
