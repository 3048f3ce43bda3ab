"""Read responses: a Runtime, a list or an error. Sans-IO.

Outside rules name their source: the contract is `docs/contract/openapi.yaml`, its companion on
errors is `docs/contract/errors.md`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import msgspec

from bctrl_async._http.request import CONTROL_CHARACTER
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
from bctrl_async.models import LaunchMode, Runtime, RuntimeKind, RuntimeStatus

_KEPT_BODY = 2048
_LONGEST_MESSAGE = 500
_SHORTEST_SECRET = 4
# A year: further off than anybody's patience, and safe for every clock's arithmetic.
_LONGEST_RETRY_AFTER = 365 * 86400.0

_is_decimal = re.compile(r"[0-9]{1,30}(\.[0-9]{1,30})?").fullmatch


class _Runtimes(msgspec.Struct, frozen=True):
    runtimes: list[Runtime]


class _Items(msgspec.Struct, frozen=True):
    runtimes: list[Any]


# The errors of msgspec 0.19 are no ValueErrors.
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)

_decode_runtime = msgspec.json.Decoder(Runtime).decode
_decode_runtimes = msgspec.json.Decoder(_Runtimes).decode


def read_runtime(status: int, body: bytes, authorization: str) -> Runtime | BctrlResponseError:
    """Read the body of a 2xx answer.

    Args:
        status: The HTTP status, for the error.
        body: The whole body.
        authorization: The header that was sent, to keep the key out of the error.

    Returns:
        The Runtime, or an error that says where the body differs from the contract's.
    """
    try:
        try:
            return _decode_runtime(body)
        except msgspec.ValidationError:
            raise
        except (msgspec.DecodeError, UnicodeDecodeError):
            # JavaScript servers escape half a surrogate pair when they cut a string, and RFC 8259
            # section 8.2 lets them; msgspec refuses it, the standard library does not.
            return _converted(json.loads(body))
    except _UNREADABLE as error:
        kept = _excerpt(body, _key(authorization))
        return _unreadable(status, "its body", "Runtime", error, kept)


def read_runtimes(
    status: int, body: bytes, authorization: str
) -> list[Runtime | BctrlResponseError] | BctrlResponseError:
    """Read the body of a 2xx answer to a list (contract errors.md: `{"runtimes": [Runtime, …]}`).

    Args:
        status: The HTTP status, for the errors.
        body: The whole body.
        authorization: The header that was sent, to keep the key out of the errors.

    Returns:
        The runtimes in their order, each one that cannot be read as an error that has its alias if
        that can be read; or one error if there is no list.
    """
    with suppress(*_UNREADABLE):
        return list(_decode_runtimes(body).runtimes)
    # Something in it cannot be read: what that is, and what can be, is found one by one.
    kept = _excerpt(body, _key(authorization))
    try:
        items = msgspec.convert(json.loads(body), _Items).runtimes
    except _UNREADABLE as error:
        return _unreadable(status, "its body", "list", error, kept)
    runtimes: list[Runtime | BctrlResponseError] = []
    for number, item in enumerate(items):
        try:
            runtimes.append(_converted(item))
        except _UNREADABLE as error:
            unreadable = _unreadable(status, f"its runtimes[{number}]", "Runtime", error, kept)
            alias = item.get("alias") if isinstance(item, dict) else None
            unreadable.alias = alias if isinstance(alias, str) else None
            runtimes.append(unreadable)
    return runtimes


def _unreadable(
    status: int, what: str, wanted: str, cause: Exception, kept: str
) -> BctrlResponseError:
    problem = "is not JSON"
    if isinstance(cause, msgspec.ValidationError):
        problem = f"is not the contract's {wanted}: {cause}"
    unreadable = BctrlResponseError(
        f"the server answered {status}, but {what} {problem}",
        may_have_stopped=True,
        status=status,
        body=kept,
    )
    # The traceback would show the body, and with it a key that the server sent back.
    unreadable.__cause__ = cause.with_traceback(None)
    return unreadable


def _converted(value: Any) -> Runtime:  # noqa: ANN401 - it is JSON.
    try:
        return msgspec.convert(value, Runtime)
    except UnicodeEncodeError:
        # msgspec looks a value of an enum up as UTF-8, which half a surrogate pair is not.
        enums = {name: value[name] for name in ("kind", "status") if name in value}
        value = {**value, **dict.fromkeys(enums, "")}
        summary = value.get("summary")
        mode = summary.get("launchMode") if isinstance(summary, dict) else None
        if mode is not None:
            value["summary"] = {**summary, "launchMode": ""}
        runtime = msgspec.convert(value, Runtime)
        found = runtime.summary
        if found is not None and mode is not None:
            found = msgspec.structs.replace(found, launch_mode=LaunchMode(mode))
        kind, status = RuntimeKind(enums["kind"]), RuntimeStatus(enums["status"])
        return msgspec.structs.replace(runtime, kind=kind, status=status, summary=found)


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


def read_error(
    status: int, headers: Mapping[str, str], body: bytes, authorization: str, *, now: datetime
) -> BctrlError:
    """Make an error of an answer other than 2xx; any body will do (contract errors.md).

    Args:
        status: The HTTP status.
        headers: The answer's headers, found whatever their case.
        body: As much of the body as came.
        authorization: The header that was sent, to keep the key out of the error if the server
            sends it back.
        now: The time, for a Retry-After that is a date.
    """
    key = _key(authorization)
    if status in _REDIRECTS:
        return _redirect_error(status, one_line(headers.get("Location"), key))
    if status < HTTPStatus.BAD_REQUEST:
        return BctrlResponseError(
            f"the server answered {status} {_phrase(status)}, which says nothing of the outcome",
            may_have_stopped=True,
            status=status,
        )
    fields = _ErrorFields.read(body, key)
    error_class = _ERRORS_BY_STATUS.get(
        status,
        BctrlServerError if status >= HTTPStatus.INTERNAL_SERVER_ERROR else BctrlApiError,
    )
    words = ": ".join(part for part in (fields.code, fields.message) if part)
    return error_class(
        f"the server answered {status} {words or _phrase(status)}",
        advice="Nothing to do: it is not running" if fields.code == "runtime.not_active" else None,
        # A 503 is not carried out, other 5xx may have been (contract errors.md).
        may_have_stopped=status >= HTTPStatus.INTERNAL_SERVER_ERROR
        and status != HTTPStatus.SERVICE_UNAVAILABLE,
        status=status,
        code=fields.code,
        message=fields.message,
        reason_class=fields.reason_class,
        request_id=fields.request_id
        or one_line(headers.get("x-request-id"), key)
        or one_line(headers.get("x-bctrl-request-id"), key),
        hint=fields.hint,
        retry_after=retry_after(headers, now),
        body=_excerpt(body, key),
    )


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "(no reason given)"


def _redirect_error(status: int, location: str | None) -> BctrlResponseError:
    to = f" to {location}" if location else ""
    return BctrlResponseError(
        f"the server answered {status}, a redirect{to}, which is not followed: it would take the "
        "key elsewhere",
        advice="Set base_url to where the API really is",
        # 307 and 308 say "not here" (RFC 9110 section 15.4.8 and 15.4.9); the others may follow
        # upon work that was done.
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
    def read(cls, body: bytes, key: str) -> _ErrorFields:
        """Find the fields of an error body in any of the shapes of contract errors.md."""
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            return cls(message=_plain_text(body, key))
        if isinstance(answer, str):
            return cls(message=one_line(answer, key))
        if not isinstance(answer, dict):
            return cls()
        if isinstance(inner := answer.get("error"), dict):
            answer = {**answer, "error": None, **inner}

        def first(*names: str) -> str | None:
            lines = (one_line(answer.get(name), key) for name in names)
            return next((line for line in lines if line), None)

        return cls(
            code=first("code"),
            message=first("error", "message", "detail", "title"),
            reason_class=first("reasonClass"),
            request_id=first("requestId"),
            hint=first("hint"),
        )


def _plain_text(body: bytes, key: str) -> str | None:
    # A proxy's HTML page says nothing to a reader that the status does not say better.
    return None if body.lstrip().startswith(b"<") else one_line(body.decode(errors="replace"), key)


def one_line(value: object, key: str) -> str | None:
    """Make a server's text fit to stand in an error: short, on one line, and without the key."""
    if not isinstance(value, str):
        return None
    line = _redact(key, value)[:_LONGEST_MESSAGE]
    return " ".join(CONTROL_CHARACTER.sub(" ", line).split()) or None


def _excerpt(body: bytes, key: str) -> str:
    # The key goes first: a cut through its middle would leave half of it.
    return _redact(key, body.decode(errors="replace"))[:_KEPT_BODY]


def _key(authorization: str) -> str:
    return authorization.removeprefix("Bearer ")


def _redact(key: str, text: str) -> str:
    # What is shorter is a placeholder of a test and would be found in ordinary words.
    if len(key) < _SHORTEST_SECRET:
        return text
    return text.replace(key, "***").replace(quote(key, safe=""), "***")


def retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Read how long the server asks to wait, in seconds; None if it does not say so readably.

    `retry-after-ms` is the finer one and wins. `Retry-After` is seconds or a date (RFC 9110
    section 10.2.3). A date is measured against the answer's own `Date`, because the two clocks
    may differ; a date in the past is 0. What is negative or unreadable is as good as absent.
    """
    milliseconds = (headers.get("retry-after-ms") or "").strip()
    if _is_decimal(milliseconds):
        return min(float(milliseconds) / 1000, _LONGEST_RETRY_AFTER)
    value = (headers.get("Retry-After") or "").strip()
    if _is_decimal(value):
        return min(float(value), _LONGEST_RETRY_AFTER)
    date = _http_date(value)
    if date is None:
        return None
    wait = (date - (_http_date(headers.get("Date")) or now)).total_seconds()
    return min(max(wait, 0.0), _LONGEST_RETRY_AFTER)


def _http_date(value: str | None) -> datetime | None:
    try:
        date = parsedate_to_datetime(value or "")
    except (ValueError, TypeError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
