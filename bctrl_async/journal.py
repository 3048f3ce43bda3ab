"""The journal of a bulk stop: a file of outcomes from which an interrupted run can be resumed.

The file is append-only JSON Lines: a header, then one entry for each outcome. An entry that settles
a target is final.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec.structs import replace

from bctrl_async.errors import BctrlConfigError, BctrlError
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import OutcomeRecord, StopOutcome

__all__ = ["Journal"]

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


_MAGIC = b'{"journal":"bctrl_async"'
_VERSION = 1
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)


class _Header(msgspec.Struct, frozen=True):
    journal: str
    version: int
    base_url: str


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(OutcomeRecord).decode


class Journal:
    """A journal that is open for one run and locked against others.

    Args:
        path: The file; created if it does not exist.
        base_url: The server of the run.

    Attributes:
        settled: The outcomes of settled targets that the file had when it was opened.

    Raises:
        BctrlConfigError: The file cannot be opened, is in use by another run, or is not a journal
            of this version and server. It is left unchanged.
        BctrlError: The header could not be written, for example on a full disk.
    """

    def __init__(self, path: str | os.PathLike[str], base_url: str) -> None:
        self._path = Path(path)
        self._header = msgspec.json.encode(_Header("bctrl_async", _VERSION, base_url)) + b"\n"
        try:
            self._file = os.open(self._path, _FLAGS, 0o666)
        except (OSError, ValueError) as error:
            raise self._open_error(error) from error
        try:
            self._lock()
            self.settled: Mapping[RuntimeRef, StopOutcome] = self._read()
        except OSError as error:
            os.close(self._file)
            raise self._open_error(error) from error
        except BaseException:
            os.close(self._file)
            raise

    def write(self, outcome: StopOutcome) -> None:
        """Append an outcome.

        Raises:
            BctrlError: It could not be written, for example on a full disk.
        """
        # A resume needs neither, and the runtime would make the entry three times as long.
        record = replace(OutcomeRecord.of(outcome), resumed=False, runtime=None)
        try:
            line = _encode(record)
        except UnicodeEncodeError:
            # A lone surrogate in an invalid target; `json` writes it as an escape.
            line = json.dumps(msgspec.to_builtins(record)).encode()
        self._append(line + b"\n")

    def close(self) -> None:
        """Flush the file to disk, then unlock and close it.

        Raises:
            BctrlError: The flush failed.
        """
        try:
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
            raise self._write_error(error) from error

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise self._resume_error("it is not a regular file")
        try:
            _lock(self._file)
        except BlockingIOError as error:
            raise BctrlConfigError(
                f"the journal {str(self._path)!r} is in use by another run",
                advice="Wait until that run has ended, or use another file",
            ) from error

    def _read(self) -> dict[RuntimeRef, StopOutcome]:
        """Return the settled outcomes, and cut off a torn tail."""
        settled: dict[RuntimeRef, StopOutcome] = {}
        torn = None
        with os.fdopen(os.dup(self._file), "rb") as lines:
            lines.seek(0)
            end = self._read_header(lines.readline())
            for number, line in enumerate(lines, start=2):
                if torn is not None:
                    # A crash tears the last line only.
                    raise self._resume_error(f"line {torn} is damaged")
                record = _read_record(line)
                if record is None:
                    torn = number
                    continue
                end += len(line)
                if record.result.settled:
                    target = RuntimeRef(record.workspace_id, record.alias)
                    settled[target] = StopOutcome(
                        index=record.index,
                        target=target,
                        result=record.result,
                        attempts=record.attempts,
                        elapsed=record.elapsed,
                        resumed=True,
                    )
        if torn is not None:
            os.ftruncate(self._file, end)
        return settled

    def _read_header(self, line: bytes) -> int:
        """Check the header, or write it to an empty file; return its length."""
        if line != self._header:
            # A crash while the file was created leaves a part of the header.
            if not self._header.startswith(line):
                raise self._resume_error(_difference(line))
            os.ftruncate(self._file, 0)
            self._append(self._header)
        return len(self._header)

    def _open_error(self, error: OSError | ValueError) -> BctrlConfigError:
        reason = getattr(error, "strerror", None) or error
        return BctrlConfigError(
            f"the journal {str(self._path)!r} cannot be opened: {reason}",
            advice="Use a file that can be read, written and locked",
        )

    def _resume_error(self, reason: str) -> BctrlConfigError:
        return BctrlConfigError(
            f"the journal {str(self._path)!r} cannot be resumed: {reason}",
            advice="Use another file; this one is unchanged",
        )

    def _write_error(self, error: OSError) -> BctrlError:
        return BctrlError(
            f"the journal {str(self._path)!r} cannot be written: {error.strerror}",
            advice="Free some space, then run again with the same journal",
        )


def _difference(header: bytes) -> str:
    if not header.startswith(_MAGIC):
        return "it is not a journal"
    with suppress(msgspec.MsgspecError):
        if (other := msgspec.json.decode(header, type=_Header)).version == _VERSION:
            return f"it belongs to another server, {other.base_url}"
    return "another version wrote it"


def _read_record(line: bytes) -> OutcomeRecord | None:
    """Return the record of a line, None if it is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        try:
            return _decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # A lone surrogate, see `write`.
            return msgspec.convert(json.loads(line), OutcomeRecord)
    except (ValueError, msgspec.ValidationError):
        return None
