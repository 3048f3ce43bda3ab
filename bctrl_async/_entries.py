"""The lines of a journal: its header, and an entry for each outcome.

Each line is a JSON object that ends with its checksum. An entry has the fields of
`StopOutcome.to_dict`, without those that are at their defaults.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Self, TypeVar
from zlib import crc32

import msgspec
from msgspec.structs import replace

from bctrl_async import _config, errors
from bctrl_async.errors import BctrlError
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.outcomes import StopOutcome, StopResult, error_fields

_T = TypeVar("_T")

MAGIC = b'{"journal":"bctrl_async"'
MAX_LINE = 1 << 16  # bytes
VERSION = 1
_MAX_TEXT = 1000  # characters to which texts are cut if a line is too long
_CHECKSUM = b',"crc":"%08x"}\n'
_CHECKSUM_LENGTH = len(_CHECKSUM % 0)


class Header(msgspec.Struct, frozen=True):
    """The first line of a journal."""

    journal: str
    version: int
    base_url: str
    started: Annotated[datetime, msgspec.Meta(tz=True)]


class EntryTarget(msgspec.Struct, frozen=True, gc=False):
    """The target of an entry, which is decoded alone because that is faster."""

    workspace_id: str
    alias: str


class ErrorRecord(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """An error in an entry."""

    type: str
    message: str
    advice: str | None = None
    status: int | None = None
    code: str | None = None
    request_id: str | None = None
    may_have_stopped: bool = False

    def error(self, target: RuntimeRef, attempts: int) -> BctrlError:
        """Return the error of a stop as it was recorded."""
        # A later version may have recorded a class that this version lacks.
        name = BctrlError.__name__
        if self.type in errors.__all__:
            name = self.type
        error_class: type[BctrlError] = getattr(errors, name)
        error = error_class(
            self.message,
            advice=self.advice,
            attempts=attempts,
            may_have_stopped=self.may_have_stopped,
            status=self.status,
            code=self.code,
            request_id=self.request_id,
        )
        # An invalid item has no workspace.
        if target.workspace_id:
            error.workspace_id, error.alias = target
        return error


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """An outcome in a journal."""

    index: int
    workspace_id: str
    alias: str
    result: StopResult
    at: Annotated[datetime, msgspec.Meta(tz=True)]
    sent_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    ok: bool = False
    running: bool | None = None
    attempts: int = 0
    elapsed: float = 0.0
    request_id: str | None = None
    resumed: bool = False
    runtime: Runtime | None = None
    error: ErrorRecord | None = None

    @classmethod
    def of(cls, outcome: StopOutcome) -> Self:
        """Make the entry of an outcome, without a check of its types."""
        error = None
        if outcome.error is not None:
            error = msgspec.convert(error_fields(outcome.error), ErrorRecord)
        return cls(
            index=outcome.index,
            workspace_id=outcome.target.workspace_id,
            alias=outcome.target.alias,
            result=outcome.result,
            at=outcome.at,
            sent_at=outcome.sent_at,
            ok=outcome.ok,
            running=outcome.running,
            attempts=outcome.attempts,
            elapsed=round(outcome.elapsed, 6),
            request_id=outcome.request_id,
            resumed=outcome.resumed,
            runtime=outcome.runtime,
            error=error,
        )

    def shortened(self) -> Self:
        """Return the entry as short as its line must be, and as UTF-8 can encode it."""
        error = self.error
        if error is not None:
            error = ErrorRecord(error.type, shorten(error.message))
        return replace(
            self,
            workspace_id=shorten(self.workspace_id),
            alias=shorten(self.alias),
            runtime=None,
            request_id=None,
            error=error,
        )

    def outcome(self) -> StopOutcome:
        """Return the outcome as it was recorded."""
        target = RuntimeRef(self.workspace_id, self.alias)
        error = None
        if self.error is not None:
            error = self.error.error(target, self.attempts)
        return StopOutcome(
            index=self.index,
            target=target,
            result=self.result,
            running=self.running,
            runtime=self.runtime,
            error=error,
            attempts=self.attempts,
            elapsed=self.elapsed,
            at=self.at,
            sent_at=self.sent_at,
            request_id=self.request_id,
            resumed=self.resumed,
        )


_encode = msgspec.json.Encoder().encode
_check_entry = msgspec.json.Decoder(Entry).decode


def header_line(base_url: str) -> bytes:
    """Return the first line of a journal that starts now."""
    return _seal(_encode(Header("bctrl_async", VERSION, base_url, datetime.now(UTC))))


def entry_line(outcome: StopOutcome) -> bytes:
    """Return the line of an outcome, which can be read and is at most `MAX_LINE`."""
    _config.check_type(outcome, StopOutcome, "outcome", "a StopOutcome")
    _config.check_type(outcome.target, RuntimeRef, "target", "a RuntimeRef")
    if outcome.error is not None:
        _config.check_type(outcome.error, BctrlError, "error", "a BctrlError or None")
    if outcome.ok:
        # The runtime adds nothing, and would make the line three times as long.
        outcome = replace(outcome, runtime=None)
    try:
        line = _line_of(Entry.of(outcome))
        _check_entry(line)
    except msgspec.ValidationError as error:
        # msgspec says "Expected `int`, got `str`".
        problem = str(error).replace("Expected", "expected").replace("got", "not")
        raise _config.invalid("outcome", problem) from error
    return line


def _line_of(entry: Entry) -> bytes:
    # An invalid target, or a header of the answer, may have a lone surrogate.
    with suppress(UnicodeEncodeError):
        line = _seal(_encode(entry))
        if len(line) <= MAX_LINE:
            return line
    return _seal(_encode(entry.shortened()))


def shorten(text: str) -> str:
    """Return a text as it is written if its line would be too long, or not UTF-8."""
    if len(text) > _MAX_TEXT:
        # The ellipsis makes a name too long to be the name of a valid target.
        text = f"{text[:_MAX_TEXT]}…"
    return text.encode("utf-8", "backslashreplace").decode()


class DamageError(ValueError):
    """The fault of a line that is not as it was written."""


def decode(line: bytes, struct: type[_T]) -> _T:
    """Decode a line; raise DamageError if it is not as it was written."""
    with suppress(msgspec.MsgspecError, RecursionError):
        if line[-_CHECKSUM_LENGTH:] == _CHECKSUM % crc32(line[:-_CHECKSUM_LENGTH]):
            return msgspec.json.decode(line, type=struct)
    raise DamageError("it is damaged")


def _seal(json_object: bytes) -> bytes:
    """Return a JSON object as a line that ends with its checksum."""
    # The checksum comes before the last brace, as a field of the object.
    content = json_object[:-1]
    return content + _CHECKSUM % crc32(content)
