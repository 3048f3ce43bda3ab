"""Parse responses: a Runtime or an error, and whose it is. Sans-IO.

The contract is `docs/contract/openapi.yaml`, with its companion `docs/contract/errors.md`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http import HTTPStatus
from unicodedata import normalize
from uuid import UUID

import msgspec

from bctrl_async._http.redaction import bearer_key, detached, excerpt_of, sanitize
from bctrl_async.errors import (
    BctrlApiError,
    BctrlAuthenticationError,
    BctrlConflictError,
    BctrlError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlRateLimitError,
    BctrlResponseError,
    BctrlServerError,
    BctrlValidationError,
)
from bctrl_async.models import Runtime

# A year: longer than any call waits, and within the range of every clock.
_MAX_RETRY_AFTER = 365 * 86400.0

MIB = 1024 * 1024

_is_decimal = re.compile(r"[0-9]{1,30}(\.[0-9]{1,30})?").fullmatch
_is_uuid = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE).fullmatch
_is_page_type = re.compile(r"\s*(text/html|application/xhtml\+xml)\b", re.IGNORECASE).match
# After a byte order mark and blank lines, in UTF-8 or UTF-16. JSON never begins with "<".
_begins_like_page = re.compile(rb"[\xef\xbb\xbf\xff\xfe\x00\s]*+<").match

# The group is a lone surrogate.
_replace_escapes = re.compile(
    rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL
).sub

# The errors of msgspec 0.19 are not ValueErrors.
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)

_decode_runtime = msgspec.json.Decoder(Runtime).decode


def parse_runtime(status: int, body: bytes, authorization: str) -> Runtime | BctrlResponseError:
    """Parse the body of a 2xx response to a stop or a get.

    The key in `authorization`, the header that was sent, is kept out of the error.
    """
    try:
        return decode_runtime(body)
    except DECODE_ERRORS as error:
        return invalid_body(status, body, authorization, "the body", "Runtime", error)


def decode_runtime(body: bytes) -> Runtime:
    """Decode a Runtime, or raise one of `DECODE_ERRORS`."""
    try:
        return _decode_runtime(body)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        return _decode_runtime(mended(body))


def mended(body: bytes) -> bytes:
    """Return JSON that msgspec may accept: in UTF-8, with `?` in place of lone surrogates.

    A JavaScript server that truncates a string may leave half of a character as an escaped lone
    surrogate. RFC 8259 section 8.2 allows it, but text that has it cannot be printed or stored.
    """
    body = body.decode(json.detect_encoding(body), "surrogatepass").encode(errors="replace")
    return _replace_escapes(lambda found: b"?" if found[1] else found[0], body)


def invalid_body(  # noqa: PLR0917 - the first three are the answer.
    status: int, body: bytes, authorization: str, part: str, expected: str, cause: Exception
) -> BctrlResponseError:
    """Return the error of a part of a body that is not what was expected."""
    problem = "not JSON"
    if isinstance(cause, msgspec.ValidationError):
        problem = f"not a valid {expected}: {cause}"
    error = BctrlResponseError(
        f"the server answered {status}, but {part} is {problem}",
        may_have_stopped=True,
        status=status,
        body=excerpt_of(body, bearer_key(authorization)),
    )
    error.__cause__ = detached(cause)
    return error


def unusable(error: BctrlError, content_type: str, body: bytes, authorization: str) -> BctrlError:
    """Mark the error of a 2xx response whose body cannot be used as `accepted`.

    If the body is a page, return another error: a login page or that of a proxy does not come from
    the API.
    """
    excerpt = excerpt_of(body, bearer_key(authorization))
    if not _is_page_type(content_type) and not _begins_like_page(body, 0, MIB):
        error.accepted, error.body = True, excerpt
        return error
    page = BctrlResponseError(
        f"the server answered {error.status} with a page, such as that of a login, and not with "
        "JSON",
        may_have_stopped=True,
        status=error.status,
        request_id=error.request_id,
        body=excerpt,
    )
    page.__cause__ = error.__cause__
    return page


class Names(msgspec.Struct, rename="camel"):
    """The names in an answer that is not a valid Runtime."""

    alias: str
    id: str = ""
    workspace_id: str = ""


_decode_names = msgspec.json.Decoder(Names).decode


def names_in(body: bytes) -> Names | None:
    """Return the names in a body that is not a valid Runtime, or None."""
    try:
        return _decode_names(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def check_answer(
    parsed: object,
    workspace_id: str,
    alias: str | None,
    authorization: str,
    request_id: str | None = None,
) -> BctrlResponseError | None:
    """Return an error if an answer, or the names in it, belong to another request.

    Of a list the first runtime is compared, and its alias is None. A workspace is compared if it is
    a UUID. The server may know the alias as the runtime's id, and may write it in another case or
    Unicode normalization form.
    """
    if type(parsed) is Runtime and parsed.alias == alias and _is_in(parsed, workspace_id):
        return None
    if isinstance(parsed, list):
        parsed = next((item for item in parsed if isinstance(item, Runtime)), None)
    if not isinstance(parsed, Runtime | Names):
        return None
    if (alias is None or _is_named(parsed, alias)) and _is_in(parsed, workspace_id):
        return None
    other = sanitize(parsed.alias, bearer_key(authorization)) or ""
    return BctrlResponseError(
        f"the server answered about runtime {other!r} in workspace {str(parsed.workspace_id)!r}, "
        "which was not asked for",
        advice="Retrying is safe. If a mock server answers with made-up data, pass "
        "check_answers=False to the session",
        # It says nothing about this request, so it has no status.
        may_have_stopped=True,
        request_id=request_id,
    )


def _is_named(runtime: Runtime | Names, alias: str) -> bool:
    if runtime.alias == alias:
        return True
    folded = _fold(alias)
    known_id = str(runtime.id).replace("-", "").lower()
    return folded == _fold(runtime.alias) or (
        known_id != "" and folded.replace("-", "") == known_id
    )


def _fold(text: str) -> str:
    # Case folding may undo the normalization.
    return normalize("NFC", normalize("NFC", text).casefold())


def _is_in(runtime: Runtime | Names, workspace_id: str) -> bool:
    # A name is not compared: the answer does not repeat it.
    known_id = _as_uuid(workspace_id)
    answered = runtime.workspace_id
    if known_id is None or answered == known_id:
        return True
    return isinstance(answered, str) and answered.lower() in {"", workspace_id.lower()}


@lru_cache(maxsize=64)
def _as_uuid(text: str) -> UUID | None:
    """Return the UUID that a text is, in its usual form; None if it is anything else."""
    return UUID(text) if _is_uuid(text) else None


_REDIRECTS = frozenset({301, 302, 303, 307, 308})

_ERRORS_BY_STATUS: dict[int, type[BctrlApiError]] = {
    400: BctrlValidationError,
    401: BctrlAuthenticationError,
    403: BctrlPermissionError,
    404: BctrlNotFoundError,
    409: BctrlConflictError,
    422: BctrlValidationError,
    429: BctrlRateLimitError,
}


def parse_error(
    status: int, headers: Mapping[str, str], body: bytes, authorization: str, *, now: datetime
) -> BctrlError:
    """Build the error for a response other than 2xx; any body is accepted (contract errors.md)."""
    key = bearer_key(authorization)
    if status in _REDIRECTS:
        return _redirect_error(status, sanitize(headers.get("Location"), key))
    if status < HTTPStatus.BAD_REQUEST:
        return BctrlResponseError(
            f"the server answered {status} {_reason_phrase(status)}, an unexpected status",
            may_have_stopped=True,
            status=status,
        )
    fields = _ErrorFields.parse(body, key)
    error_class = _ERRORS_BY_STATUS.get(
        status,
        BctrlServerError if status >= HTTPStatus.INTERNAL_SERVER_ERROR else BctrlApiError,
    )
    reason = ": ".join(part for part in (fields.code, fields.message) if part)
    return error_class(
        f"the server answered {status} {reason or _reason_phrase(status)}",
        advice="Nothing to do: it is not running" if fields.code == "runtime.not_active" else None,
        # A 503 was not carried out, another 5xx may have been (contract errors.md).
        may_have_stopped=status >= HTTPStatus.INTERNAL_SERVER_ERROR
        and status != HTTPStatus.SERVICE_UNAVAILABLE,
        status=status,
        code=fields.code,
        message=fields.message,
        reason_class=fields.reason_class,
        request_id=fields.request_id or request_id_in(headers.get, authorization),
        hint=fields.hint,
        retry_after=parse_retry_after(headers, now),
        body=excerpt_of(body, key),
    )


def request_id_in(header: Callable[[str], str | None], authorization: str) -> str | None:
    """Return the server's id of a request, given a function that returns a header by its name."""
    for name in ("x-request-id", "x-bctrl-request-id"):
        found = header(name)
        if found and (text := sanitize(found, bearer_key(authorization))) is not None:
            return text
    return None


def _reason_phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "(no reason given)"


def _redirect_error(status: int, location: str | None) -> BctrlResponseError:
    to = f" to {location}" if location else ""
    return BctrlResponseError(
        f"the server answered {status}, a redirect{to}: not followed, to protect the API key",
        advice="Set the base URL to that of the API itself",
        # 307 and 308 ask to repeat the request elsewhere (RFC 9110 sections 15.4.8 and 15.4.9); the
        # others may follow a request that was carried out.
        may_have_stopped=status
        not in {HTTPStatus.TEMPORARY_REDIRECT, HTTPStatus.PERMANENT_REDIRECT},
        status=status,
    )


class _ErrorFields(msgspec.Struct, frozen=True):
    code: str | None = None
    message: str | None = None
    reason_class: str | None = None
    request_id: str | None = None
    hint: str | None = None

    @classmethod
    def parse(cls, body: bytes, key: str) -> _ErrorFields:
        """Parse an error body of any shape in contract errors.md."""
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            return cls(message=_plain_text(body, key))
        if isinstance(fields, str):
            return cls(message=sanitize(fields, key))
        if not isinstance(fields, dict):
            return cls()
        if isinstance(inner := fields.get("error"), dict):
            fields = {**fields, "error": None, **inner}

        def first(*names: str) -> str | None:
            texts = (sanitize(fields.get(name), key) for name in names)
            return next((text for text in texts if text), None)

        return cls(
            code=first("code"),
            message=first("error", "message", "detail", "title"),
            reason_class=first("reasonClass"),
            request_id=first("requestId"),
            hint=first("hint"),
        )


def _plain_text(body: bytes, key: str) -> str | None:
    # A proxy's HTML page tells a reader nothing beyond the status.
    return None if body.lstrip().startswith(b"<") else sanitize(body.decode(errors="replace"), key)


def parse_retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Return the seconds that the server asks to wait; None if absent, negative or invalid."""
    # It is more precise than Retry-After, which is seconds or a date (RFC 9110 section 10.2.3).
    milliseconds = (headers.get("retry-after-ms") or "").strip()
    if _is_decimal(milliseconds):
        return min(float(milliseconds) / 1000, _MAX_RETRY_AFTER)
    value = (headers.get("Retry-After") or "").strip()
    if _is_decimal(value):
        return min(float(value), _MAX_RETRY_AFTER)
    date = _http_date(value)
    if date is None:
        return None
    # The clocks may differ, so it is compared with the response's own date.
    wait = (date - (_http_date(headers.get("Date")) or now)).total_seconds()
    return min(max(wait, 0.0), _MAX_RETRY_AFTER)


def _http_date(value: str | None) -> datetime | None:
    try:
        date = parsedate_to_datetime(value or "")
    except (ValueError, TypeError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
