"""The answers of the emulator, each a `Reply`: its own, and the answers of tests."""

import json
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from http import HTTPStatus
from http.client import responses as reason_phrases
from types import NoneType
from typing import Any

from aiohttp import web

from bctrl_async.emulator._contract import check, check_range

_LOWEST_ERROR = 400
_ERROR_FIELDS = ("code", "message", "reason_class", "hint")
_is_header_name = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
_JSON_TYPE = "application/json"
_TEXT_TYPE = "text/plain; charset=utf-8"
# HTTP forbids a body in a 204 and in a 205.
PAYLOAD_STATUSES = frozenset(range(200, 300)) - {204, 205}
# These are from contract errors.md: "code seen" and `reasonClass`.
_DOCUMENTED = {
    400: ("request.invalid", "invalid_input"),
    401: ("auth.required", "unauthorized"),
    403: ("auth.forbidden", "capability_denied"),
    404: ("runtime.not_found", "not_found"),
    409: ("runtime.not_active", "conflict"),
    429: ("rate.limited", "rate_limited"),
    500: ("server.error", "server"),
    503: ("server.unavailable", "upstream"),
}

Payload = Mapping[str, Any]
"""The JSON of a 200: a Runtime, or a list of them."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of any status, for `Emulator.inject` and `Emulator.poison`.

        emulator.inject(Reply(403, code="plan.expired"), alias="crm")
        emulator.inject(Reply(429, headers={"Retry-After": "7"}))
        emulator.inject(Reply(502, body="<h1>", headers={"Content-Type": "text/html"}))

    Without a `body`, a 4xx or 5xx has the error body of contract errors.md, a 2xx the
    body of a normal response, and a 204, a 205 or a 3xx none. In an error body, empty
    text counts as None.

    Attributes:
        status: The HTTP status, 200 to 599.
        code: The `code` of the error body; None for its usual value (errors.md).
        message: The `error` of the error body; None for the name of the status.
        reason_class: The `reasonClass` of the error body; None for its usual value.
        hint: The `hint` of the error body; None omits it.
        headers: Headers to add, or to send in place of the usual: `Retry-After`, say.
        body: What is sent in place of the usual body; None for the usual body. Bytes
            and text, as UTF-8, are `text/plain; charset=utf-8`, unless `headers` has a
            `Content-Type`. Any other value is sent as JSON.
        takes_effect: True if a stop with this answer ends the runtime. None becomes
            True for a 2xx, and False for any other status.

    Raises:
        ValueError: An argument is invalid, or excludes another.
    """

    status: int
    _: KW_ONLY
    code: str | None = None
    message: str | None = None
    reason_class: str | None = None
    hint: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    body: object = field(default=None, hash=False)
    takes_effect: bool | None = None

    def __post_init__(self) -> None:
        check(int, status=self.status)
        check_range(200, 599, status=self.status)
        check(bool, NoneType, takes_effect=self.takes_effect)
        _check_headers(self.headers)
        _check_body(self)
        if self.takes_effect is None:
            is_success = self.status < HTTPStatus.MULTIPLE_CHOICES
            object.__setattr__(self, "takes_effect", is_success)


def _check_headers(headers: Mapping[str, str]) -> None:
    check(Mapping, headers=headers)
    for name, value in headers.items():
        # The keywords are the names of the values in the text of the error.
        check(str, **{"a header's name": name, f"headers[{name!r}]": value})
        if not (_is_header_name(name) and value.isprintable()):
            raise ValueError(
                f"headers has {name!r}: {value!r}, which HTTP cannot express"
            )


def _check_body(reply: Reply) -> None:
    """Check the fields of the error body, and the body that may take its place."""
    for name in _ERROR_FIELDS:
        text = getattr(reply, name)
        check(str, NoneType, **{name: text})
        if text is None:
            continue
        if reply.body is not None:
            raise ValueError(f"{name} and body are both given: give one of them")
        if reply.status < _LOWEST_ERROR:
            raise ValueError(
                f"{name} is for the API's error body: give a status of 400 to 599, not "
                f"{reply.status}"
            )
    try:
        content_of(reply)
    except (TypeError, ValueError) as error:
        raise ValueError(f"body cannot be sent: {error}") from None


def content_of(reply: Reply) -> bytes | None:
    """Return a reply's own body, None if it has the usual body."""
    if isinstance(reply.body, bytes | None):
        return reply.body
    if isinstance(reply.body, str):
        return reply.body.encode()
    return dump(reply.body)


def dump(value: object) -> bytes:
    """Return a value as JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


NO_KEY = Reply(401, message="Invalid API key.", hint="Send Bearer <api-key>.")
NO_ROUTE = Reply(
    404,
    code="route.not_found",
    message="No operation has this path.",
    hint="See the reference.",
)
NO_RUNTIME = Reply(
    404, message="No such workspace or alias.", hint="List what is there."
)
NOT_ACTIVE = Reply(409, message="Nothing runs under that alias.", hint="It is stopped.")
TOO_MANY = Reply(429, message="Too many requests.", hint="Slow down.")
SERVER_ERROR = Reply(500, message="Something broke.", hint="Report the request id.")
BAD_GATEWAY = Reply(
    502,
    body="<html><head><title>502 Bad Gateway</title></head></html>",
    headers={"Content-Type": "text/html"},
)
WRONG_METHOD = Reply(
    405, code="method.not_allowed", message="Method not allowed.", hint="See Allow."
)


def response_to(reply: Reply, request_id: str) -> web.Response:
    """Return the response of a reply."""
    body = content_of(reply)
    if body is None and reply.status >= _LOWEST_ERROR:
        body = dump(_error_body(reply, request_id))
    content_type = _TEXT_TYPE if isinstance(reply.body, str | bytes) else _JSON_TYPE
    usual = {"Content-Type": content_type, "x-request-id": request_id}
    response = web.Response(status=reply.status, body=body, headers=usual)
    response.headers.update(reply.headers)
    return response


def _error_body(reply: Reply, request_id: str) -> dict[str, str]:
    """Return the body of an error, which has usual values for what a reply omits."""
    status = reply.status
    # A status that errors.md does not list has the values of a 400 or a 500.
    code, reason_class = _DOCUMENTED.get(status, _DOCUMENTED[status // 100 * 100])
    usual = {
        "code": code,
        "error": reason_phrases.get(status, f"Error {status}"),
        "reasonClass": reason_class,
        "requestId": request_id,
    }
    texts = {
        "code": reply.code,
        "error": reply.message,
        "reasonClass": reply.reason_class,
        "hint": reply.hint,
    }
    return usual | {name: text for name, text in texts.items() if text}
