"""The replies of the emulator: a payload, an error, or a body of the fault's own."""

import functools
import itertools
import zlib
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.client import responses as reason_phrases
from types import MappingProxyType
from typing import Any, NamedTuple

from bctrl_async.emulator._faults import Fault
from bctrl_async.emulator._reply import (
    JSON_TYPE,
    Reply,
    check_header_value,
    content_of,
    dump,
    has_error_body,
)
from bctrl_async.emulator._runtimes import make_runtime

_MIB = 2**20
NO_HEADERS: Mapping[str, str] = MappingProxyType({})

_UNANSWERED = frozenset({Fault.DROP_BEFORE, Fault.DROP_AFTER, Fault.HANG})

Payload = Mapping[str, Any]
"""The JSON of a 200: a Runtime, or a list of them."""


class WireReply(NamedTuple):
    """A response that is not sent yet."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def wire(self) -> bytes:
        """The bytes of the response."""
        lines = [
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}",
            *(f"{name}: {value}" for name, value in self.headers.items()),
            f"Content-Length: {len(self.body)}",
        ]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


class Error(NamedTuple):
    """An error response in the form of contract errors.md."""

    status: int
    code: str
    reason_class: str
    error: str
    hint: str | None


UNDECODABLE = Error(
    400, "request.invalid", "invalid_input", "The path is not UTF-8.", "Percent-encode its UTF-8."
)
NO_ROUTE = Error(
    404, "route.not_found", "not_found", "No operation has this path.", "See the reference."
)
WRONG_METHOD = Error(
    405, "method.not_allowed", "invalid_input", "Method not allowed.", "See Allow."
)
NO_KEY = Error(401, "auth.required", "unauthorized", "Invalid API key.", "Send Bearer <api-key>.")
NO_RUNTIME = Error(
    404, "runtime.not_found", "not_found", "No such workspace or alias.", "List what is there."
)
_NOT_ACTIVE = Error(
    409, "runtime.not_active", "conflict", "Nothing runs under that alias.", "It is stopped."
)
TOO_MANY = Error(429, "rate.limited", "rate_limited", "Too many requests.", "Slow down.")
# contract errors.md, "code seen" and `reasonClass`.
_DOCUMENTED = {
    401: ("auth.required", "unauthorized"),
    403: ("auth.forbidden", "capability_denied"),
    404: ("runtime.not_found", "not_found"),
    409: ("runtime.not_active", "conflict"),
    429: ("rate.limited", "rate_limited"),
    503: ("server.unavailable", "upstream"),
}
_OTHER_4XX = ("request.invalid", "invalid_input")
_OTHER_5XX = ("server.error", "server")
_FAULT_ERRORS: dict[Fault | None, Error] = {
    Fault.RATE_LIMITED: TOO_MANY,
    Fault.RATE_LIMITED_RETRY_AFTER: TOO_MANY,
    Fault.SERVER_ERROR: Error(
        500, "server.error", "server", "Something broke.", "If it lasts, report the request id."
    ),
    Fault.UNAVAILABLE: Error(
        503, "server.unavailable", "upstream", "Out for maintenance.", "Try again later."
    ),
}
_FORBIDDEN = Error(
    403, "auth.forbidden", "capability_denied", "This key may not stop it.", "Use another key."
)


def _error_of(reply: Reply) -> Error:
    """Return the error of a reply, with what its status suggests for what it does not give."""
    status = reply.status
    other = _OTHER_4XX if status < 500 else _OTHER_5XX  # noqa: PLR2004 - the first 5xx.
    code, reason_class = _DOCUMENTED.get(status, other)
    return Error(
        status,
        code if reply.code is None else reply.code,
        reason_class if reply.reason_class is None else reply.reason_class,
        reason_phrases.get(status, f"Error {status}") if reply.message is None else reply.message,
        reply.hint,
    )


def _page(status: int, title: str) -> WireReply:
    html = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
    return WireReply(status, html.encode(), {"Content-Type": "text/html"})


# The replies of others than the API: proxies, and the gateway of another service (Kong's).
_FOREIGN_REPLIES: dict[Fault | None, WireReply] = {
    Fault.BAD_GATEWAY: _page(502, "502 Bad Gateway"),
    Fault.GATEWAY_TIMEOUT: _page(504, "504 Gateway Timeout"),
    Fault.LOGIN_PAGE: _page(200, "Sign in"),
    Fault.FOREIGN_NOT_FOUND: WireReply(
        404, b'{"message":"no Route matched with those values"}', {"Content-Type": JSON_TYPE}
    ),
}
_STRAY_RUNTIME = make_runtime(
    "stray", "stray", kind="browser", status="stopped", created_at="2026-01-01T00:00:00.000Z"
)
# In HTTP, a 204 and a 205 have no body.
_WITH_NORMAL_BODY = frozenset(range(200, 300)) - {204, 205}
_GZIP = {"Content-Encoding": "gzip"}
_WITH_RETRY_AFTER = frozenset({Fault.RATE_LIMITED_RETRY_AFTER, Fault.UNAVAILABLE})


def _with_unknown_values(payload: Payload) -> Payload:
    if "runtimes" in payload:
        return {
            "runtimes": [_with_unknown_values(runtime) for runtime in payload["runtimes"]],
            "next": 2,
        }
    runtime = payload
    summary = {**runtime["summary"], "launchMode": "teleport", "gpu": {"count": 2}}
    return {**runtime, "kind": "hologram", "status": "paused", "summary": summary, "region": "moon"}


@functools.cache
def _bomb() -> bytes:
    packer = zlib.compressobj(level=9, wbits=zlib.MAX_WBITS | 16)
    megabyte = b"x" * _MIB
    parts = [packer.compress(b'{"padding":"')]
    parts += [packer.compress(megabyte) for _ in range(64)]
    return b"".join([*parts, packer.compress(b'"}'), packer.flush()])


@functools.cache
def _padding() -> bytes:
    """The end of an oversized body; encoding it as JSON each time would take long."""
    return b',"padding":"%b"}' % (b"x" * (2 * _MIB))


# These faults answer 200 with a body of their own, even for a runtime that is not active.
_FAULT_BODIES: dict[Fault | None, Callable[[Payload], bytes]] = {
    Fault.MALFORMED_JSON: lambda payload: dump(payload).replace(b":", b"="),
    Fault.WRONG_SHAPE: lambda _: b'{"ok":true}',
    Fault.OVERSIZED: lambda payload: dump(payload)[:-1] + _padding(),
    Fault.COMPRESSED_BOMB: lambda _: _bomb(),
    Fault.UNKNOWN_VALUES: lambda payload: dump(_with_unknown_values(payload)),
    Fault.FAILED: dump,
    Fault.ACCEPTED: lambda payload: dump({**payload, "status": "active"}),
}


class ReplyMaker:
    """Makes the replies of an emulator, each with a request id of its own.

    Args:
        retry_after: The Retry-After of the faults that have one; None omits the header.
    """

    def __init__(self, retry_after: str | None) -> None:
        if retry_after is not None:
            check_header_value("retry_after", retry_after)
        self._retry_after = {} if retry_after is None else {"Retry-After": retry_after}
        self._request_numbers = itertools.count(1)

    def reply(
        self,
        payload: Payload,
        fault: Fault | None = None,
        raw_path: str = "",
        *,
        conflict: bool = False,
    ) -> WireReply | None:
        """Return the reply to a valid request.

        Args:
            payload: The JSON of a 200.
            fault: The fault of the request.
            raw_path: The request target.
            conflict: Answer 409, unless the fault has a body of its own.

        Returns:
            None if the fault is not to answer.
        """
        if fault in _UNANSWERED:
            return None
        if fault is Fault.REDIRECT:
            return WireReply(307, b"", {"Location": f"/moved{raw_path}"})
        if foreign := _FOREIGN_REPLIES.get(fault):
            return foreign
        if error := _FAULT_ERRORS.get(fault):
            return self.error(
                error, self._retry_after if fault in _WITH_RETRY_AFTER else NO_HEADERS
            )
        if conflict and fault not in _FAULT_BODIES:
            return self.error(_NOT_ACTIVE)
        headers = _GZIP if fault is Fault.COMPRESSED_BOMB else NO_HEADERS
        return self._success(_FAULT_BODIES.get(fault, dump)(payload), headers)

    def written(self, reply: Reply, payload: Payload) -> WireReply:
        """Return the response for a reply that a test has written.

        Args:
            reply: The reply.
            payload: The JSON of a normal response.
        """
        if (content := content_of(reply)) is not None:
            body, content_type = content
            usual = WireReply(reply.status, body, {"Content-Type": content_type})
        elif has_error_body(reply):
            usual = self.error(_error_of(reply))
        elif reply.status in _WITH_NORMAL_BODY:
            usual = self._success(dump(payload))
        else:
            usual = WireReply(reply.status, b"", NO_HEADERS)
        given = {name.lower() for name in reply.headers}
        headers = {name: text for name, text in usual.headers.items() if name.lower() not in given}
        return WireReply(reply.status, usual.body, {**headers, **reply.headers})

    def _success(self, body: bytes, headers: Mapping[str, str] = NO_HEADERS) -> WireReply:
        """Return a 200, with further headers if given."""
        usual = {"Content-Type": JSON_TYPE, "x-request-id": self._request_id()}
        return WireReply(200, body, {**usual, **headers})

    def stray(self, fault: Fault | Reply | None) -> WireReply | None:
        """Return the answer that is one too many, None if the fault has none."""
        if fault is Fault.STRAY_ANSWER:
            return self.error(_FORBIDDEN)
        if fault is Fault.LATE_STRAY_ANSWER:
            return self.reply(_STRAY_RUNTIME)
        return None

    def error(self, error: Error, headers: Mapping[str, str] = NO_HEADERS) -> WireReply:
        """Return an error response, with further headers if given."""
        request_id = self._request_id()
        body = {
            "code": error.code,
            "error": error.error,
            "reasonClass": error.reason_class,
            "requestId": request_id,
        }
        if error.hint is not None:
            body["hint"] = error.hint
        all_headers = {"Content-Type": JSON_TYPE, "x-request-id": request_id, **headers}
        return WireReply(error.status, dump(body), all_headers)

    def _request_id(self) -> str:
        return f"req_{next(self._request_numbers)}"
