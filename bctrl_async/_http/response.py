"""Parse responses into a Runtime or an error, and match them to their request. Sans-IO.

The contract is `docs/contract/openapi.yaml`, with its companion `docs/contract/errors.md`.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http import HTTPStatus
from http.client import responses
from typing import TypeVar
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

# A year is longer than any call waits, and within the range of every clock.
_MAX_RETRY_AFTER = 365 * 86400.0

MIB = 1024 * 1024
MAX_TEXT = 4096
"""The most characters of a Runtime's text; an alias in a request has fewer in any Unicode form."""

_is_decimal = re.compile(r"[0-9]{1,30}(\.[0-9]{1,30})?").fullmatch
_is_identifier = re.compile(r"[A-Za-z0-9._:-]{1,200}").fullmatch
_KEY_STARTS = slice(len("Bearer "), len("Bearer ") + 4)
"""The key's first characters in an `Authorization` header; an id without them has no key."""
_is_uuid = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE).fullmatch
# A redirect to a login has tokens in its query or fragment.
_secrets_of_url = re.compile(r"(?<=//)[^/?#]*@|[?#].*", re.DOTALL)
_is_page_type = re.compile(r"\s*(text/html|application/xhtml\+xml)\b", re.IGNORECASE).match
# JSON never starts with "<". A byte order mark and blank lines may come first.
_begins_like_page = re.compile(rb"[\xef\xbb\xbf\xff\xfe\x00\s]*+<").match

# A server that truncates UTF-16 leaves a lone surrogate, half of a character, as an escape or as
# bytes. RFC 8259 section 8.2 allows it, but text with a lone surrogate cannot be encoded.
_lone_surrogates = re.compile(
    rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F]..)"
    rb"|\xed[\xa0-\xbf].",
    re.DOTALL,
)
_HIDDEN = b"\xff"
_MAX_HALVES = 1_000_000
"""The most lone surrogates that are replaced in a body, in a quarter of a second."""
_NO_NAME = b"\x7f"
"""The replacement for a lone surrogate in a name; no name in a request contains it."""

# The errors of msgspec 0.19 are not ValueErrors.
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)

Header = Callable[[str], str | None]
"""Returns the value of the first header with a name; None if there is none."""


def decode(decode_json: Callable[[bytes], _T], body: bytes, half: bytes = b"?") -> _T:
    """Decode a body, or raise one of `DECODE_ERRORS`; `half` replaces each lone surrogate."""
    try:
        return decode_json(body)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError):
        return decode_json(_mended(body, half))


_decode_runtime = msgspec.json.Decoder(Runtime).decode


def decode_runtime(body: bytes) -> Runtime:
    """Decode a Runtime and shorten its texts, because journals and reports keep them."""
    runtime = decode(_decode_runtime, body)
    # Replacing a lone surrogate could turn the alias into another runtime's.
    if "?" in runtime.alias and runtime.alias != decode(_decode_names, body, _NO_NAME).alias:
        raise msgspec.ValidationError("its alias has half of a character")
    # A text has at most as many characters as the body has bytes.
    if len(body) <= MAX_TEXT:
        return runtime
    return replace(_shortened(runtime), summary=runtime.summary and _shortened(runtime.summary))


def _shortened(model: _Model) -> _Model:
    texts = {name: each for name, each in asdict(model).items() if isinstance(each, str)}
    return replace(model, **{name: type(each)(each[:MAX_TEXT]) for name, each in texts.items()})


def _mended(body: bytes, half: bytes) -> bytes:
    """Return JSON that msgspec may accept: in UTF-8, with `half` for each lone surrogate.

    Raise ValueError if that would hold up the event loop for long.
    """
    body = _in_utf8(body)
    if _HIDDEN in body:
        raise ValueError("it is not UTF-8")
    # An escaped backslash starts no escape, so it is hidden as a byte that UTF-8 never has.
    body = body.replace(rb"\\", _HIDDEN)
    return _lone_surrogates.sub(half, body, _MAX_HALVES).replace(_HIDDEN, rb"\\")


def _in_utf8(body: bytes) -> bytes:
    encoding = json.detect_encoding(body)
    if encoding == "utf-8":
        return body
    if encoding == "utf-8-sig":
        return body.removeprefix(BOM_UTF8)
    if len(body) > MIB:
        raise ValueError(f"it is longer than 1 MiB and in {encoding}")
    return body.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")


def unreadable(status: int, part: str, expected: str, cause: Exception) -> Failure:
    """Return the failure of a 2xx response, a part of which cannot be decoded."""
    is_json = isinstance(cause, msgspec.ValidationError)
    problem = f"not a valid {expected}: {cause}" if is_json else "not JSON"
    summary = f"the server answered {status}, but {part} is {problem}"
    return Failure(kind=Kind.UNREADABLE, summary=summary, status=status, cause=detached(cause))


def with_body(failure: Failure, content_type: str, body: bytes, authorization: str) -> Failure:
    """Return the failure of a 2xx response with its body, which may be a login or proxy page."""
    failure = replace(failure, body=excerpt_of(body, bearer_key(authorization)))
    if not _is_page_type(content_type) and not _begins_like_page(body, 0, MIB):
        return failure
    return replace(
        failure,
        kind=Kind.PAGE,
        summary=f"the server answered {failure.status} with a page, such as a login page, instead "
        "of JSON",
    )


class _Names(msgspec.Struct, rename="camel"):
    alias: str
    id: object = ""
    workspace_id: object = ""


_decode_names = msgspec.json.Decoder(_Names).decode


def names_in(body: bytes) -> _Names | None:
    """Return the alias and the ids in a body that is not a valid Runtime, if it has them."""
    with suppress(*DECODE_ERRORS):
        return decode(_decode_names, body, _NO_NAME)
    return None


def check_answer(
    parsed: object, body: bytes, workspace_id: str, alias: str | None, authorization: str
) -> Failure | None:
    """Return a failure if an answer belongs to another request.

    A list is compared by its first runtime, an invalid Runtime by its names, and a workspace only
    if it is a UUID. The alias may be the runtime's id, or differ in case or normalization form.
    """
    if type(parsed) is Runtime and parsed.alias == alias and _is_in(parsed, workspace_id):
        return None
    if isinstance(parsed, Failure):
        parsed = names_in(body)
    elif isinstance(parsed, list):
        parsed = next((item for item in parsed if isinstance(item, Runtime)), None)
    if not isinstance(parsed, Runtime | _Names):
        return None
    if (alias is None or _is_named(parsed, alias)) and _is_in(parsed, workspace_id):
        return None
    key = bearer_key(authorization)
    other, place = (sanitize(str(name), key) or "" for name in (parsed.alias, parsed.workspace_id))
    # The answer says nothing about this request, so the failure has no status.
    return Failure(
        kind=Kind.FOREIGN,
        summary=f"the answer describes another runtime, {other!r} in workspace {place!r}",
        advice="Retrying is safe. If a mock server answers with made-up data, pass "
        "check_answers=False to the session",
    )


def _is_named(runtime: Runtime | _Names, alias: str) -> bool:
    folded, known_id = _fold(alias), str(runtime.id).replace("-", "").lower()
    is_id = known_id != "" and folded.replace("-", "") == known_id
    # Normalizing is quadratic, so a far longer alias skips it: a character becomes at most four.
    may_be_equal = len(runtime.alias) <= 4 * len(alias)
    return is_id or (may_be_equal and folded == _fold(runtime.alias))


def _fold(text: str) -> str:
    # Case folding may undo the normalization.
    return normalize("NFC", normalize("NFC", text).casefold())


def _is_in(runtime: Runtime | _Names, workspace_id: str) -> bool:
    # The name of a workspace is not compared: the answer has only its id.
    known_id = _as_uuid(workspace_id)
    answered = runtime.workspace_id
    if known_id is None or answered == known_id:
        return True
    return isinstance(answered, str) and answered.lower() in {"", workspace_id.lower()}


@lru_cache(maxsize=64)
def _as_uuid(text: str) -> UUID | None:
    """Parse a UUID in its usual form, with hyphens; return None for any other text."""
    return UUID(text) if _is_uuid(text) else None


ADVICE = {407: "Check the user and the password of the proxy"}
_NOT_FORWARDED = frozenset({400, 405, 407, 411, 413, 414, 421, 425, 431, 451})
"""Statuses with which a gateway rejects a request; after others, the API may have received it."""


def parse_error(
    status: int, header: Header, body: bytes, authorization: str, *, now: datetime
) -> Failure:
    """Return the failure of a response other than 2xx, whatever its body (contract errors.md)."""
    key, phrase = bearer_key(authorization), responses.get(status, "(no reason given)")
    if status < HTTPStatus.BAD_REQUEST:
        place = _secrets_of_url.sub("", header("Location") or "")
        return _redirect(status, phrase, sanitize(place, key))
    first = _texts_in(body, key)
    code, message = first("code"), first("error", "message", "detail", "title")
    kind = kind_of_status(status, code)
    in_doubt = _doubt(kind, status, code)
    advice = BctrlConflictError.advice if in_doubt else ADVICE.get(status)
    reason = ": ".join(part for part in (code, message) if part)
    return Failure(
        kind=kind,
        summary=f"the server answered {status} {reason or phrase}",
        advice=advice,
        in_doubt=in_doubt,
        status=status,
        code=code,
        message=message,
        reason_class=first("reasonClass"),
        request_id=first("requestId") or request_id_in(header, authorization),
        hint=first("hint"),
        retry_after=parse_retry_after(header, now),
        body=excerpt_of(body, key),
    )


def _doubt(kind: Kind, status: int, code: str | None) -> bool | None:
    """Return True if a gateway may have forwarded the request; None for what the kind says."""
    if kind.doubt is not Doubt.MAYBE or is_code(code or ""):
        return None
    return status not in _NOT_FORWARDED


def _texts_in(body: bytes, key: str) -> Callable[..., str | None]:
    """Return a function that returns the first text with one of some names, if any."""
    fields = _fields_of(body)

    def first(*names: str) -> str | None:
        texts = (sanitize(fields.get(name), key) for name in names)
        return next((text for text in texts if text), None)

    return first


def _redirect(status: int, phrase: str, location: str | None) -> Failure:
    problem, advice = f"{status} {phrase}, an unexpected status", None
    if location:
        problem = f"{status}, a redirect to {location}: not followed, to protect the API key"
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
        fields = None if _begins_like_page(body) else body.decode(errors="replace")
    if not isinstance(fields, dict):
        return {"error": fields}
    inner = fields.get("error")
    if isinstance(inner, dict):
        # The API puts its code at the top level; a gateway may nest its own code.
        return {**fields, "error": None, **inner, "code": fields.get("code")}
    return fields


def request_id_in(header: Header, authorization: str) -> str | None:
    """Return the server's id of a request."""
    for name in ("x-request-id", "x-bctrl-request-id"):
        found = header(name) or ""
        if _is_identifier(found) and str.__getitem__(authorization, _KEY_STARTS) not in found:
            return found
        if (text := sanitize(found, bearer_key(authorization))) is not None:
            return text
    return None


def parse_retry_after(header: Header, now: datetime) -> float | None:
    """Return the seconds that the server asks to wait; None if absent, negative or invalid."""
    # Milliseconds are more precise; Retry-After is seconds or a date (RFC 9110 section 10.2.3).
    for name, unit in (("retry-after-ms", 1000), ("Retry-After", 1)):
        value = (header(name) or "").strip()
        if _is_decimal(value):
            return min(float(value) / unit, _MAX_RETRY_AFTER)
    date = _http_date(value)
    if date is None:
        return None
    # The clocks may differ, so the date is compared with the response's own date.
    wait = (date - (_http_date(header("Date")) or now)).total_seconds()
    return min(max(wait, 0.0), _MAX_RETRY_AFTER)


def _http_date(value: str | None) -> datetime | None:
    try:
        date = parsedate_to_datetime(value or "")
    except (ValueError, TypeError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
