"""Parse responses into a Runtime or an error, and match them to their request. Sans-IO.

The contract is `docs/contract/openapi.yaml`, with its companion
`docs/contract/errors.md`.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http import HTTPStatus
from http.client import responses
from typing import ClassVar, TypeVar
from unicodedata import normalize
from uuid import UUID

import msgspec
from msgspec.structs import asdict, replace

from bctrl_async._http.redaction import bearer_key, detached, excerpt_of, sanitize
from bctrl_async._kinds import Doubt, Failure, Kind, is_code, kind_of_status
from bctrl_async.errors import BctrlConflictError
from bctrl_async.models import Runtime

_T = TypeVar("_T")
_Model = TypeVar("_Model", bound=msgspec.Struct)

# An hour is longer than any call waits, and a Retry-After may be wrong by years.
_MAX_RETRY_AFTER = 3600.0

_SUCCESS = 2
"""The first digit of a 2xx."""
MIB = 1024 * 1024
MAX_TEXT = 4096
"""The most characters of a Runtime's text; an alias in a request has fewer in any
Unicode form."""

_is_decimal = re.compile(r"[0-9]{1,30}(\.[0-9]{1,30})?").fullmatch
_is_identifier = re.compile(r"[A-Za-z0-9._:-]{1,200}").fullmatch
_KEY_START = slice(len("Bearer "), len("Bearer ") + 4)
"""The key's start in an `Authorization` header; an id without it has no key."""
_is_uuid = re.compile(
    r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE
).fullmatch
# A redirect to a login has tokens in its query or fragment.
_secrets_of_url = re.compile(r"(?<=//)[^/?#]*@|[?#].*", re.DOTALL)
_is_page_type = re.compile(
    r"\s*(text/html|application/xhtml\+xml)\b", re.IGNORECASE
).match
# JSON never starts with "<". A byte order mark and blank lines may come first.
_begins_like_page = re.compile(rb"[\xef\xbb\xbf\xff\xfe\x00\s]*+<").match

# A server that truncates UTF-16 leaves a lone surrogate, half of a character, as an
# escape or as bytes. RFC 8259 section 8.2 allows it, but text with a lone surrogate
# cannot be encoded.
_lone_surrogates = re.compile(
    rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F]..)"
    rb"|\xed[\xa0-\xbf].",
    re.DOTALL,
)
_UNUSED_BYTE = b"\xff"
"""UTF-8 never contains this byte."""
_MAX_REPLACED = 1_000_000
"""The most lone surrogates that are replaced in a body; this takes a quarter of a
second."""
_NAME_MARK = b"\x7f"
"""The replacement for a lone surrogate in a name; no name in a request contains it."""

# The errors of msgspec 0.19 are not ValueErrors.
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)

Header = Callable[[str], str | None]
"""Returns the value of the first header with a name; None if there is none."""


class Answer(msgspec.Struct):
    """A response that was read, up to the most bytes that its body may have."""

    status: int
    header: Header
    body: bytes
    problem: BaseException | None = None
    """The error that truncated the body."""
    links: Sequence[str] = ()
    """The values of the Link headers."""
    # A `PlainAnswer` alone looks whether a header can be an id.
    may_have_id: ClassVar[bool] = True

    @property
    def is_success(self) -> bool:
        """True for a 2xx."""
        return is_success(self.status)


def is_success(status: int) -> bool:
    """Return True for a 2xx."""
    return status // 100 == _SUCCESS


def decode(decode_json: Callable[[bytes], _T], body: bytes, mark: bytes = b"?") -> _T:
    """Decode a body, with `mark` for each lone surrogate; or raise `DECODE_ERRORS`."""
    try:
        return decode_json(body)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError):
        return decode_json(_mended(body, mark))


_decode_runtime = msgspec.json.Decoder(Runtime).decode


def decode_runtime(body: bytes) -> Runtime:
    """Decode a Runtime; shorten its texts, because journals and reports keep them."""
    runtime = decode(_decode_runtime, body)
    # If this "?" replaced a lone surrogate, the alias may be another runtime's. Then it
    # differs from the alias that is decoded with another mark.
    if (
        "?" in runtime.alias
        and runtime.alias != decode(_decode_names, body, _NAME_MARK).alias
    ):
        raise msgspec.ValidationError("its alias has half of a character")
    # A text has at most as many characters as the body has bytes.
    if len(body) <= MAX_TEXT:
        return runtime
    if runtime.summary is not None:
        runtime = replace(runtime, summary=_shortened(runtime.summary))
    return _shortened(runtime)


def _shortened(model: _Model) -> _Model:
    # The text of a status or a kind keeps its type, a class of str.
    texts = {
        name: text for name, text in asdict(model).items() if isinstance(text, str)
    }
    return replace(
        model, **{name: type(text)(text[:MAX_TEXT]) for name, text in texts.items()}
    )


def _mended(body: bytes, mark: bytes) -> bytes:
    """Return JSON that msgspec may accept, in UTF-8, with `mark` for lone surrogates.

    Raise ValueError if that would hold up the event loop for long.
    """
    body = _in_utf8(body)
    if _UNUSED_BYTE in body:
        raise ValueError("it is not UTF-8")
    # An escaped backslash starts no escape, so the unused byte hides it meanwhile.
    body = body.replace(rb"\\", _UNUSED_BYTE)
    return _lone_surrogates.sub(mark, body, _MAX_REPLACED).replace(_UNUSED_BYTE, rb"\\")


def _in_utf8(body: bytes) -> bytes:
    encoding = json.detect_encoding(body)
    if encoding == "utf-8":
        return body
    if encoding == "utf-8-sig":
        return body.removeprefix(BOM_UTF8)
    if len(body) > MIB:
        raise ValueError(f"it is longer than 1 MiB and in {encoding}")
    return body.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")


def unreadable(status: int, part: str, schema: str, cause: Exception) -> Failure:
    """Return the failure of a 2xx response, a part of which cannot be decoded."""
    problem = "not JSON"
    if isinstance(cause, msgspec.ValidationError):
        problem = f"not a valid {schema}: {cause}"
    summary = f"the server answered {status}, but {part} is {problem}"
    return Failure(
        kind=Kind.UNREADABLE, summary=summary, status=status, cause=detached(cause)
    )


def with_body(
    failure: Failure, content_type: str, body: bytes, authorization: str
) -> Failure:
    """Return the failure of a 2xx with its body, which may be a login page."""
    failure = replace(failure, body=excerpt_of(body, bearer_key(authorization)))
    if not _is_page_type(content_type) and not _begins_like_page(body, 0, MIB):
        return failure
    return replace(
        failure,
        kind=Kind.PAGE,
        summary=f"the server answered {failure.status} with a page, such as a login "
        "page, instead of JSON",
    )


class _Names(msgspec.Struct, rename="camel"):
    alias: str
    id: object = ""
    workspace_id: object = ""


_decode_names = msgspec.json.Decoder(_Names).decode


def names_in(body: bytes) -> _Names | None:
    """Return the alias and the ids in a body that is not a valid Runtime, if any."""
    with suppress(*DECODE_ERRORS):
        return decode(_decode_names, body, _NAME_MARK)
    return None


def check_answer(
    parsed: object,
    body: bytes,
    workspace_id: str,
    alias: str | None,
    authorization: str,
) -> Failure | None:
    """Return a failure if an answer belongs to another request.

    A list is compared by its first runtime, an invalid Runtime by its names, and a
    workspace only if it is a UUID. The alias may be the runtime's id, or differ in case
    or normalization form.
    """
    # This comparison is the cheapest, and nearly all answers match exactly.
    if (
        type(parsed) is Runtime
        and parsed.alias == alias
        and _is_in(parsed, workspace_id)
    ):
        return None
    runtime = _runtime_in(parsed, body)
    if runtime is None:
        return None
    if (alias is None or _is_named(runtime, alias)) and _is_in(runtime, workspace_id):
        return None
    key = bearer_key(authorization)
    name = sanitize(runtime.alias, key)
    workspace = sanitize(str(runtime.workspace_id), key)
    description = f"{name!r} in workspace {workspace!r}"
    # The answer says nothing about this request, so the failure has no status.
    return Failure(
        kind=Kind.FOREIGN,
        summary=f"the answer describes another runtime, {description}",
        advice="Retrying is safe. If a mock server answers with made-up data, pass "
        "check_answers=False to the session",
    )


def _runtime_in(parsed: object, body: bytes) -> Runtime | _Names | None:
    """Return the runtime that an answer describes, or the first of a list, if any."""
    if isinstance(parsed, Failure):
        return names_in(body)
    if not isinstance(parsed, list):
        parsed = [parsed]
    for item in parsed:
        if isinstance(item, Runtime):
            return item
    return None


def _is_named(runtime: Runtime | _Names, alias: str) -> bool:
    folded = _fold(alias)
    runtime_id = str(runtime.id).replace("-", "").lower()
    if runtime_id and folded.replace("-", "") == runtime_id:
        return True
    # The answer's alias may be decomposed: each character of the requested alias is at
    # most four in it. A longer alias cannot match, and its normalization would take
    # quadratic time.
    return len(runtime.alias) <= 4 * len(alias) and folded == _fold(runtime.alias)


def _fold(text: str) -> str:
    # Case folding may undo the normalization.
    return normalize("NFC", normalize("NFC", text).casefold())


def _is_in(runtime: Runtime | _Names, workspace_id: str) -> bool:
    # The name of a workspace is not compared: an answer has only the id.
    uuid = _as_uuid(workspace_id)
    actual = runtime.workspace_id
    if uuid is None or actual == uuid:
        return True
    # An invalid Runtime has text, which is empty if the workspace is missing.
    return isinstance(actual, str) and actual.lower() in {"", workspace_id.lower()}


@lru_cache(maxsize=64)
def _as_uuid(text: str) -> UUID | None:
    """Parse a UUID in its usual form, with hyphens; return None for any other text."""
    if not _is_uuid(text):
        return None
    return UUID(text)


ADVICE_BY_STATUS = {407: "Check the user and the password of the proxy"}
_NOT_FORWARDED = frozenset({400, 405, 407, 411, 413, 414, 421, 425, 431, 451})
"""Statuses with which a gateway rejects a request; after others, the API may have
received it."""


def parse_error(
    status: int, header: Header, body: bytes, authorization: str, *, now: datetime
) -> Failure:
    """Return the failure of a response other than 2xx (contract errors.md)."""
    key = bearer_key(authorization)
    phrase = responses.get(status, "(no reason given)")
    if status < HTTPStatus.BAD_REQUEST:
        location = _secrets_of_url.sub("", header("Location") or "")
        return _redirect(status, phrase, sanitize(location, key))
    fields = _ErrorFields(body, key)
    code = fields.first("code")
    message = fields.first("error", "message", "detail", "title")
    kind = kind_of_status(status, code)
    in_doubt = _doubt(kind, status, code)
    advice = ADVICE_BY_STATUS.get(status)
    if in_doubt:
        # The user must look at the runtime, as after a conflict.
        advice = BctrlConflictError.advice
    reason = ": ".join(part for part in (code, message) if part)
    return Failure(
        kind=kind,
        summary=f"the server answered {status} {reason or phrase}",
        advice=advice,
        in_doubt=in_doubt,
        status=status,
        code=code,
        message=message,
        reason_class=fields.first("reasonClass"),
        request_id=fields.first("requestId") or request_id_in(header, authorization),
        hint=fields.first("hint"),
        retry_after=parse_retry_after(header, now),
        body=excerpt_of(body, key),
    )


def _doubt(kind: Kind, status: int, code: str | None) -> bool | None:
    """Return True if a gateway may have forwarded a request; None to ask the kind."""
    if kind.doubt is not Doubt.MAYBE:
        return None
    if code is not None and is_code(code):
        # The API itself has answered, not a gateway.
        return None
    return status not in _NOT_FORWARDED


class _ErrorFields:
    """The texts of an error body, without the key."""

    def __init__(self, body: bytes, key: str) -> None:
        self._fields = _fields_of(body)
        self._key = key

    def first(self, *names: str) -> str | None:
        """Return the first text with one of some names, if any."""
        for name in names:
            text = sanitize(self._fields.get(name), self._key)
            if text:
                return text
        return None


def _redirect(status: int, phrase: str, location: str) -> Failure:
    problem = f"{status} {phrase}, an unexpected status"
    advice = None
    if location:
        problem = (
            f"{status}, a redirect to {location}: not followed, to protect the API key"
        )
        advice = "Point the base URL at the API itself"
    return Failure(
        kind=kind_of_status(status, None),
        summary=f"the server answered {problem}",
        advice=advice,
        status=status,
    )


def _fields_of(body: bytes) -> dict[str, object]:
    """Return the fields of an error body of any shape in contract errors.md."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        # A proxy's HTML page tells a reader nothing beyond the status.
        fields = None
        if not _begins_like_page(body):
            fields = body.decode(errors="replace")
    if not isinstance(fields, dict):
        return {"error": fields}
    inner = fields.get("error")
    if isinstance(inner, dict):
        # The API puts its code at the top level; a gateway may nest its own code.
        return {**fields, **inner, "code": fields.get("code")}
    return fields


def request_id_in(header: Header, authorization: str) -> str | None:
    """Return the server's id of a request."""
    for name in ("x-request-id", "x-bctrl-request-id"):
        text = header(name)
        if not text:
            continue
        # A `Secret` slices itself in Python; `str` is faster.
        key_start = str.__getitem__(authorization, _KEY_START)
        if _is_identifier(text) and key_start not in text:
            return text
        text = sanitize(text, bearer_key(authorization))
        if text:
            return text
    return None


def parse_retry_after(header: Header, now: datetime) -> float | None:
    """Return the seconds that the server asks to wait, or None."""
    milliseconds = _decimal(header("retry-after-ms"))
    if milliseconds is not None:
        # They are more precise than the header of RFC 9110.
        return min(milliseconds / 1000, _MAX_RETRY_AFTER)
    # Retry-After is seconds or a date (RFC 9110 section 10.2.3).
    value = header("Retry-After")
    seconds = _decimal(value)
    if seconds is None:
        date = _http_date(value)
        if date is None:
            return None
        # The clocks may differ, so the date is compared with the response's own date.
        response_date = _http_date(header("Date")) or now
        seconds = max((date - response_date).total_seconds(), 0.0)
    return min(seconds, _MAX_RETRY_AFTER)


def _decimal(value: str | None) -> float | None:
    if value is None or not _is_decimal(value.strip()):
        return None
    return float(value)


def _http_date(value: str | None) -> datetime | None:
    try:
        date = parsedate_to_datetime(value or "")
    except (ValueError, TypeError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return date
