"""An answer that a test writes."""

import json
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from bctrl_async.emulator._arguments import check_texts, check_type

JSON_TYPE = "application/json"

_STATUSES = range(200, 600)
_LOWEST_ERROR = 400
_ERROR_FIELDS = ("code", "message", "reason_class", "hint")
_is_header_name = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
_FRAMING = frozenset({"content-length", "transfer-encoding"})


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of any status, for `Emulator.inject` and `Emulator.poison`.

        emulator.inject(Reply(403, code="plan.expired", message="Renew the plan."), alias="crm")
        emulator.inject(Reply(429, headers={"Retry-After": "7"}))
        emulator.inject(Reply(502, body="<h1>Bad gateway</h1>", content_type="text/html"))

    Without `json` and `body`, a 4xx or 5xx has the error body of contract errors.md, a 2xx the body
    of a normal response, and a 204, a 205 or a 3xx none.

    Attributes:
        status: The HTTP status, 200 to 599.
        code: The `code` of the error body; None for that of the status in contract errors.md.
        message: The `error` of the error body; None for the name of the status.
        reason_class: The `reasonClass` of the error body; None for that of the status.
        hint: The `hint` of the error body; None omits it.
        headers: Further headers, such as `Retry-After`. They replace those of the same name.
        json: A value, in place of the usual body; None for none.
        body: A body that is not JSON, or not valid; a str is sent as UTF-8.
        content_type: The type of `json` or `body`; None for `application/json` and
            `text/plain; charset=utf-8`.
        takes_effect: True if a stop with this answer ends the runtime nevertheless. None becomes
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
    json: Any = field(default=None, hash=False)
    body: str | bytes | None = None
    content_type: str | None = None
    takes_effect: bool | None = None

    def __post_init__(self) -> None:
        check_type("status", self.status, int)
        if self.status not in _STATUSES:
            raise ValueError(f"status is {self.status!r}: give a number from 200 to 599")
        check_texts(**{name: getattr(self, name) for name in (*_ERROR_FIELDS, "content_type")})
        if self.body is not None:
            check_type("body", self.body, str, bytes)
        if self.takes_effect is not None:
            check_type("takes_effect", self.takes_effect, bool)
        _check_headers(self.headers)
        if self.content_type is not None:
            check_header_value("content_type", self.content_type)
        self._check_combination([name for name in _ERROR_FIELDS if getattr(self, name) is not None])
        try:
            content_of(self)
        except (TypeError, ValueError) as error:
            name = "body" if self.json is None else "json"
            raise ValueError(f"{name} cannot be sent: {error}") from None
        if self.takes_effect is None:
            object.__setattr__(self, "takes_effect", self.status // 100 == 2)  # noqa: PLR2004 - 2xx.

    def _check_combination(self, error_fields: list[str]) -> None:
        if self.json is not None and self.body is not None:
            raise ValueError("json and body are both given: give one of them")
        has_content = self.json is not None or self.body is not None
        if error_fields and has_content:
            raise ValueError(
                f"{error_fields[0]} is for the API's error body: put it into json or body, which "
                "replace that"
            )
        if error_fields and not has_error_body(self):
            raise ValueError(
                f"{error_fields[0]} is for the API's error body, which {self.status} does not have:"
                " give a status of 400 to 599"
            )
        if self.content_type is not None and not has_content:
            raise ValueError("content_type is for json or body: give one of them")


def has_error_body(reply: Reply) -> bool:
    """Return True if a reply without a body of its own has an error body."""
    return reply.status >= _LOWEST_ERROR


def content_of(reply: Reply) -> tuple[bytes, str] | None:
    """Return a reply's own body with its type, None if it has the usual one."""
    if reply.json is not None:
        return dump(reply.json), reply.content_type or JSON_TYPE
    if reply.body is not None:
        content = reply.body.encode() if isinstance(reply.body, str) else reply.body
        return content, reply.content_type or "text/plain; charset=utf-8"
    return None


def dump(value: object) -> bytes:
    """Return a value as JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def check_header_value(name: str, value: str) -> None:
    """Raise a ValueError unless a value can be sent as that of a header."""
    check_type(name, value, str)
    if not value.isprintable():
        raise ValueError(f"{name} is {value!r}: leave out control characters")


def _check_headers(headers: Mapping[str, str]) -> None:
    check_type("headers", headers, Mapping)
    for name, value in headers.items():
        if not (isinstance(name, str) and _is_header_name(name)):
            raise ValueError(f"headers has {name!r}: give names of letters, digits and '-'")
        if name.lower() in _FRAMING:
            raise ValueError(f"headers has {name!r}: leave it out, for the emulator sets it")
        check_header_value(f"headers[{name!r}]", value)
