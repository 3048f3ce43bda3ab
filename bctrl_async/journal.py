"""The journal of a bulk stop: a line for each outcome, so that a run that died can be resumed.

A file of JSON lines. The first one says what it is; each further one is an outcome. Nothing is
ever rewritten, and what is settled stays so.
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
except ImportError:  # pragma: no cover - Windows has no such locks, so there nobody is warned.

    def _lock(file: int) -> None: ...

    def _unlock(file: int) -> None: ...

else:

    def _lock(file: int) -> None:
        flock(file, LOCK_EX | LOCK_NB)

    def _unlock(file: int) -> None:
        # A child that was forked meanwhile has the file open as well.
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
    """A journal that is open for one run, and locked against others.

    Args:
        path: The file; it is made if it is not there.
        base_url: The server that the outcomes are about.

    Attributes:
        settled: What is settled, according to the lines that were there.

    Raises:
        BctrlConfigError: The file cannot be opened, another run has it open, or it is not a journal
            of this version about this server; it is left as it is.
        BctrlError: There is no room for its first line.
    """

    def __init__(self, path: str | os.PathLike[str], base_url: str) -> None:
        self._path = Path(path)
        self._header = msgspec.json.encode(_Header("bctrl_async", _VERSION, base_url)) + b"\n"
        try:
            self._file = os.open(self._path, _FLAGS, 0o666)
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        try:
            self._lock()
            self.settled: Mapping[RuntimeRef, StopOutcome] = self._read()
        except OSError as error:
            os.close(self._file)
            raise self._unusable(error) from error
        except BaseException:
            os.close(self._file)
            raise

    def write(self, outcome: StopOutcome) -> None:
        """Append an outcome.

        Raises:
            BctrlError: It could not be written, as on a full disk.
        """
        # A resume needs neither, and the runtime would make the line three times as long.
        line = replace(OutcomeRecord.of(outcome), resumed=False, runtime=None)
        try:
            text = _encode(line)
        except UnicodeEncodeError:
            # Half of a surrogate pair, in a target that was refused for it.
            text = json.dumps(msgspec.to_builtins(line)).encode()
        self._append(text + b"\n")

    def close(self) -> None:
        """Bring everything to the disk, and let others open the file.

        Raises:
            BctrlError: The disk failed.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            _unlock(self._file)
            os.close(self._file)

    def _append(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> BctrlError:
        return BctrlError(
            f"the journal {str(self._path)!r} cannot be written: {error.strerror}",
            advice="Make room, then run it again with the same journal",
        )

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise self._refusal("it is not a file")
        try:
            _lock(self._file)
        except BlockingIOError as error:
            raise BctrlConfigError(
                f"the journal {str(self._path)!r} is in use by another run",
                advice="Wait for its end, or give each run a journal of its own",
            ) from error

    def _read(self) -> dict[RuntimeRef, StopOutcome]:
        settled: dict[RuntimeRef, StopOutcome] = {}
        torn = None
        with os.fdopen(os.dup(self._file), "rb") as lines:
            lines.seek(0)
            end = self._read_header(lines.readline())
            for number, text in enumerate(lines, start=2):
                if torn is not None:
                    # A crash tears the end of a file, never its middle.
                    raise self._refusal(f"its line {torn} is damaged")
                line = _read_line(text)
                if line is None:
                    torn = number
                    continue
                end += len(text)
                if line.result.settled:
                    target = RuntimeRef(line.workspace_id, line.alias)
                    settled[target] = StopOutcome(
                        index=line.index,
                        target=target,
                        result=line.result,
                        attempts=line.attempts,
                        elapsed=line.elapsed,
                        resumed=True,
                    )
        if torn is not None:
            os.ftruncate(self._file, end)
        return settled

    def _read_header(self, text: bytes) -> int:
        """Check the first line, or write it if there is none; return its length."""
        if text != self._header:
            # Else it is new, or was torn while it was made.
            if not self._header.startswith(text):
                raise self._refusal(_difference(text))
            os.ftruncate(self._file, 0)
            self._append(self._header)
        return len(self._header)

    def _unusable(self, error: OSError | ValueError) -> BctrlConfigError:
        why = getattr(error, "strerror", None) or error
        return BctrlConfigError(
            f"the journal {str(self._path)!r} cannot be used: {why}",
            advice="Give a file that can be read, written and locked",
        )

    def _refusal(self, why: str) -> BctrlConfigError:
        return BctrlConfigError(
            f"the journal {str(self._path)!r} cannot be resumed: {why}",
            advice="Give another file; this one was left as it is",
        )


def _difference(header: bytes) -> str:
    if not header.startswith(_MAGIC):
        return "it is something else"
    with suppress(msgspec.MsgspecError):
        if (other := msgspec.json.decode(header, type=_Header)).version == _VERSION:
            return f"it is about another server, {other.base_url}"
    return "it was written by another version"


def _read_line(text: bytes) -> OutcomeRecord | None:
    if not text.endswith(b"\n"):
        return None
    try:
        try:
            return _decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # Half of a surrogate pair, see `write`.
            return msgspec.convert(json.loads(text), OutcomeRecord)
    except (ValueError, msgspec.ValidationError):
        return None
