"""Build the parts of a request that callers control: path segments and headers. Sans-IO."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote, unquote
from uuid import UUID

from bctrl_async.errors import BctrlConfigError

_is_plain = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._~-]+").fullmatch
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_is_token = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+").fullmatch  # RFC 9110 section 5.6.2
_is_field_value = re.compile(r"(?=[!-~])[ -~\t]*[!-~]").fullmatch  # RFC 9110 section 5.5

# The key, and what decides where a request ends and who it is for, are not the caller's to set.
_RESERVED_HEADERS = frozenset(
    {
        "authorization",
        "connection",
        "content-length",
        "expect",
        "host",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


def path_segment(value: str | UUID, name: str) -> str:
    r"""Percent-encode a workspace id or an alias as exactly one segment of a path.

    Args:
        value: Any text; a UUID stands for its canonical form.
        name: What the value is, for the error.

    Raises:
        BctrlConfigError: The value is no text, is empty, cannot be sent, or could be taken for a
            step in a path by something between here and the server (RFC 3986 section 5.2.4, and
            gateways that decode `%2F`, `%2e` or `\` or drop `;parameters` before they resolve it).
    """
    if isinstance(value, str):
        if type(value) is not str:
            # Formatted, an enum's member would be its name in the program.
            value = str.__str__(value)
        if _is_plain(value):
            return value
    elif isinstance(value, UUID):
        return str(value)
    else:
        raise _bad_name(
            f"{name} must be a str, not {type(value).__name__}", f"Pass the {name} as text"
        )
    if not value:
        raise _bad_name(f"{name} is empty", f"Pass the {name} of the runtime")
    if CONTROL_CHARACTER.search(value):
        raise _bad_name(
            f"{name} {value!r} contains a control character", "Remove it, often a line end"
        )
    if _has_dot_segment(value):
        raise _bad_name(
            f"{name} {value!r} could be taken for a path", "Pass the name alone, without dots"
        )
    try:
        return quote(value, safe="", errors="strict")
    except UnicodeEncodeError:
        raise _bad_name(
            f"{name} {value!r} contains half of a surrogate pair, which UTF-8 cannot carry",
            "Decode the text again from its source",
        ) from None


def _bad_name(summary: str, advice: str) -> BctrlConfigError:
    # The contract's own class, so that whoever passes names on can tell them from what is set up.
    return BctrlConfigError(summary, advice=advice, reason_class="invalid_input")


def _has_dot_segment(value: str) -> bool:
    decoded = value
    while True:
        segments = decoded.replace("\\", "/").split("/")
        if any(segment.partition(";")[0] in {".", ".."} for segment in segments):
            return True
        value, decoded = decoded, unquote(decoded)
        if value == decoded:
            return False


def check_extra_headers(headers: Mapping[str, str]) -> None:
    """Refuse headers that could carry the request elsewhere, split it, or replace the key.

    Raises:
        BctrlConfigError: A name or value that HTTP does not allow, or a reserved name.
    """
    for name, value in headers.items():
        if not isinstance(name, str) or not _is_token(name):
            raise BctrlConfigError(f"{name!r} is no header name", advice="See RFC 9110 section 5.1")
        if name.lower() in _RESERVED_HEADERS:
            raise BctrlConfigError(
                f"the header {name!r} is set by the session", advice="Leave it out of headers="
            )
        if not isinstance(value, str) or not (value == "" or _is_field_value(value)):
            # Extra headers carry secrets too, so the value stays out of the text.
            raise BctrlConfigError(
                f"the value of the header {name!r} is not printable ASCII text",
                advice="Encode it, or strip the white space around it",
            )
