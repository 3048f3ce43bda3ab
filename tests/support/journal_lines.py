"""A reading of the journal that shares no code with the package, line by line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, NamedTuple
from zlib import crc32

Record = dict[str, Any]


class JournalLines(NamedTuple):
    """The lines of a journal: a header and entries."""

    header: Record
    entries: list[Record]
    is_torn: bool


def read_lines(data: bytes) -> JournalLines:
    """Read a journal that has at least its header; only the last line may be cut short.

    Raises:
        ValueError: A line is not what it should be.
    """
    *lines, tail = data.split(b"\n")
    header, *entries = [
        _read_line(number, line) for number, line in enumerate(lines, start=1)
    ]
    if header["journal"] != "bctrl_async":
        raise ValueError(f"line 1 is not a header: {header}")
    started, now = _time(header["started"]), datetime.now(UTC)
    for number, entry in enumerate(entries, start=2):
        if not started <= _time(entry["at"]) <= now:
            raise ValueError(
                f"line {number} was not written between the header and now: {entry}"
            )
    return JournalLines(header, entries, bool(tail))


def sealed(record: Record) -> bytes:
    """Return an object as a line with its checksum."""
    return seal(json.dumps(record, separators=(",", ":")).encode()[:-1])


def header_line(base_url: str, started: datetime, version: int = 1) -> bytes:
    """Return the header of a journal."""
    known = {"journal": "bctrl_async", "version": version, "base_url": base_url}
    return sealed(known | {"started": started.isoformat()})


def entry_line(
    target: tuple[str, str],
    at: datetime,
    *,
    running: bool | None = False,
    **fields: object,
) -> bytes:
    """Return the line of an outcome."""
    workspace_id, alias = target
    ok = running is False
    entry: Record = {
        "index": 0,
        "workspace_id": workspace_id,
        "alias": alias,
        "result": "stopped" if ok else "rejected",
        "at": at.isoformat(),
        "ok": ok,
        "running": running,
    }
    if not ok:
        entry["error"] = {"type": "BctrlError", "message": "it may run"}
    return sealed(entry | fields)


def seal(content: bytes) -> bytes:
    """Return a JSON object without its last brace as a line with its checksum."""
    return content + b',"crc":"%08x"}\n' % crc32(content)


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
