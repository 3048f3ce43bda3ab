"""The operations of the API, and what callers choose of a request. Sans-IO."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Mapping
from functools import lru_cache
from typing import Generic, TypeVar
from urllib import parse
from uuid import UUID

import msgspec
from aiohttp import ClientTimeout
from multidict import CIMultiDict

from bctrl_async._config import Secret, check_type
from bctrl_async._http.lists import RuntimeList, parse_runtimes
from bctrl_async._http.response import MIB, decode_runtime
from bctrl_async._kinds import Repeat
from bctrl_async.errors import BctrlConfigError, quote

_T = TypeVar("_T")

_MAX_NAME = 1_000
_MAX_DECODINGS = 5
_is_plain = re.compile(rf"(?!\.{{1,2}}\Z)[A-Za-z0-9._~-]{{1,{_MAX_NAME}}}").fullmatch
_find_control_character = re.compile(r"[\x00-\x1f\x7f-\x9f]").search
_is_token = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+").fullmatch  # RFC 9110 5.6.2
_is_field_value = re.compile(r"((?=[!-~])[ -~\t]*[!-~])?").fullmatch  # RFC 9110 5.5

# The API key, and the headers that frame, encode or route a request, belong to the
# session.
_is_reserved = re.compile(
    "accept-encoding|authorization|connection|content-length|expect|host|te|trailer"
    "|transfer-encoding|upgrade",
    re.IGNORECASE,
).fullmatch


def plain_text(name: str | UUID) -> str:
    """Return the text of a str or a UUID; `path_segment` rejects other types."""
    if isinstance(name, UUID):
        return str(name)
    # `str()` of an enum's member may be its Python name.
    return str.__str__(name) if isinstance(name, str) else name


def plain_texts(workspace_id: str | UUID, alias: str) -> tuple[str, str]:
    """Return the names of a runtime, each as `plain_text` returns it."""
    # This check costs a third of the two calls below, and nearly always succeeds.
    if type(workspace_id) is str and type(alias) is str:
        return workspace_id, alias
    return plain_text(workspace_id), plain_text(alias)


def path_segment(value: str | UUID | None, name: str) -> str:
    r"""Percent-encode a workspace id or an alias as one path segment, or raise.

    Gateways may resolve a dot segment (RFC 3986 section 5.2.4) even if it is encoded:
    some first decode `%2F`, `%2e` or `\`, or drop `;parameters`.
    """
    if type(value) is str and _is_plain(value):
        return value
    if value is None:
        raise _invalid_name(
            f"{name} is missing: it must be a str, not None", f"Pass the {name} as text"
        )
    value = plain_text(value)
    if not isinstance(value, str):
        raise _invalid_name(
            f"{name} must be a str, not {type(value).__name__}",
            f"Pass the {name} as text",
        )
    rejection = _rejection_of(value, name)
    if rejection is not None:
        raise _invalid_name(*rejection)
    try:
        return parse.quote(value, safe="", errors="strict")
    except UnicodeEncodeError:
        text = quote(value)
        raise _invalid_name(
            f"{name} {text} contains a lone surrogate, which UTF-8 cannot encode",
            "Decode it again from its original bytes",
        ) from None


def _rejection_of(value: str, name: str) -> tuple[str, str] | None:
    """Return why a text cannot be a path segment, and what to do."""
    if not value:
        return f"{name} is empty", f"Pass the {name} of the runtime"
    if len(value) > _MAX_NAME:
        problem = f"{name} has {len(value):,} characters, more than {_MAX_NAME:,}"
        return problem, f"Pass the {name} of the runtime"
    if _find_control_character(value):
        problem = f"{name} {quote(value)} contains a control character"
        return problem, "Remove it, such as a trailing newline"
    if _has_dot_segment(value):
        problem = f"{name} {quote(value)} could be taken for a path"
        return problem, "Remove its '.' or '..' segments"
    return None


def _invalid_name(summary: str, advice: str) -> BctrlConfigError:
    # This reason class lets an app tell invalid input from an invalid configuration.
    return BctrlConfigError(summary, advice=advice, reason_class="invalid_input")


def _has_dot_segment(value: str) -> bool:
    """Return True if decoding a value, perhaps repeatedly, may give a dot segment."""
    # Decoding removes neither dots nor separators, so earlier decodings need no check.
    for _ in range(_MAX_DECODINGS):
        value = parse.unquote(value)
    if parse.unquote(value) != value:
        # It is encoded even more often, so nobody knows what it becomes.
        return True
    segments = value.replace("\\", "/").split("/")
    return any(segment.partition(";")[0] in {".", ".."} for segment in segments)


def checked_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Return headers; reject any that reroutes or splits a request, or sets the key."""
    check_type(headers, Mapping, "headers", "a mapping of names to values")
    checked: CIMultiDict[str] = CIMultiDict()
    for name, value in headers.items():
        if not isinstance(name, str) or not _is_token(name):
            raise BctrlConfigError(
                f"invalid header name {quote(name)}",
                advice="Use letters, digits and hyphens",
            )
        if _is_reserved(name):
            raise BctrlConfigError(
                f"the header {quote(name)} is set by the session",
                advice="Leave it out of headers=",
            )
        if not isinstance(value, str) or not _is_field_value(value):
            # The value may be a secret, so the text does not show it.
            raise BctrlConfigError(
                f"invalid value of header {quote(name)}: expected printable ASCII",
                advice="Encode it, or strip the whitespace around it",
            )
        # The value may be a secret, which a log or a traceback must not show.
        checked[name] = Secret(value)
    return checked


_cached_segment = lru_cache(maxsize=64)(path_segment)


class Operation(msgspec.Struct, Generic[_T], frozen=True, kw_only=True):
    """An operation of the API: its method and path, and what its requests may do."""

    name: str
    """The name in errors, and for observers."""
    method: str
    suffix: str | None
    """The end of the path, after the alias; None without an alias."""
    repeat: Repeat
    """The effect of a request that arrives twice; it decides retries and errors."""
    parse: Callable[[bytes], _T | Coroutine[object, object, _T]]
    """Parses the body of a 2xx response, or raises `DECODE_ERRORS`; a list is async."""
    schema: str = "Runtime"
    """The name of what the body holds, in errors."""
    max_body: int = MIB
    """The most bytes to read of a 2xx body, after decompression; a Runtime has about
    500."""

    @property
    def stops(self) -> bool:
        """True if a request may stop a runtime."""
        return self.name == "stop"

    @property
    def template(self) -> str:
        """The path, with placeholders in place of the names."""
        path = "/v1/workspaces/{id}/runtimes"
        if self.suffix is None:
            return path
        return f"{path}/{{alias}}{self.suffix}"

    def path(self, root: str, workspace_id: str | UUID, alias: str | None) -> str:
        """Return the encoded path, below the path of the base URL."""
        # Most calls name the same few workspaces, so segments are cached.
        encode = path_segment
        if type(workspace_id) is str:
            encode = _cached_segment
        workspace = encode(workspace_id, "workspace id")
        if self.suffix is None:
            return f"{root}/workspaces/{workspace}/runtimes"
        runtime = path_segment(alias, "alias")
        return f"{root}/workspaces/{workspace}/runtimes/{runtime}{self.suffix}"


class Request(msgspec.Struct, Generic[_T]):
    """A request of a call, and the state of its last attempt."""

    operation: Operation[_T]
    workspace_id: str
    alias: str | None
    path: str
    limit: ClientTimeout
    is_connected: bool = False
    """True once the attempt has its connection, so its request may have been sent."""
    request_id: str | None = None
    """The last request id that the server has sent in an answer to this call."""

    def on_connection(self) -> None:
        """Record that the attempt has its connection."""
        self.is_connected = True

    def keep_request_id(self, request_id: str | None) -> None:
        """Keep the request id of an answer, if it has one."""
        if request_id is not None:
            self.request_id = request_id


STOP = Operation(
    name="stop",
    method="POST",
    suffix="/stop",
    repeat=Repeat.CONVERGES,
    parse=decode_runtime,
)
"""Contract: `runtimes-stop`."""
GET = Operation(
    name="get", method="GET", suffix="", repeat=Repeat.READ, parse=decode_runtime
)
"""Contract errors.md: `runtimes-get`."""
LIST: Operation[RuntimeList] = Operation(
    name="list",
    method="GET",
    suffix=None,
    repeat=Repeat.READ,
    parse=parse_runtimes,
    schema="list of runtimes",
    max_body=64 * MIB,  # This is enough for a hundred thousand runtimes.
)
"""Contract errors.md: `runtimes-list`."""
