"""Checks of a session's configuration."""

from __future__ import annotations

import math
import os
import re
from ipaddress import ip_address
from types import UnionType
from typing import SupportsIndex

from yarl import URL

from bctrl_async.errors import BctrlConfigError

DEFAULT_BASE_URL = "https://api.bctrl.ai"

_is_key = re.compile(r"[!-~]+").fullmatch


class Secret(str):
    """A str whose repr is `***`, so that a traceback that shows variables does not reveal it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def __getitem__(self, key: SupportsIndex | slice) -> Secret:
        # rich and structlog show the repr of the first characters of a long value.
        return Secret(super().__getitem__(key))


def hidden(key: object) -> Secret | type:
    """Return what a frame may hold of a key: a `Secret`, or the type of any other value."""
    if isinstance(key, type):
        return key
    return Secret(key) if isinstance(key, str) else type(key)


def api_key_from_environment() -> Secret:
    """Return `BCTRL_API_KEY`.

    Raises:
        BctrlConfigError: The variable is not set.
    """
    key = os.environ.get("BCTRL_API_KEY")
    if not key:
        raise BctrlConfigError(
            "no API key", advice="Pass api_key= or set BCTRL_API_KEY", argument="api_key"
        )
    return Secret(key)


def authorization(key: object) -> Secret:
    """Return the `Authorization` header for a key (contract: `Bearer <api-key>`).

    Raises:
        BctrlConfigError: The key is not visible ASCII. The error does not contain it.
    """
    # A traceback that shows variables must not reveal it.
    key = hidden(key)
    if isinstance(key, type):
        kind = key.__name__
        raise BctrlConfigError(f"invalid API key: expected a str, not {kind}", argument="api_key")
    if not _is_key(key):
        raise BctrlConfigError(
            "invalid API key: empty, or with a space, a control character or non-ASCII text",
            advice="Strip it, and leave out 'Bearer '",
            argument="api_key",
        )
    return Secret(f"Bearer {key}")


def base_url(given: str | None, *, allow_plaintext: bool) -> URL:
    """Return the URL to which `/workspaces/…` is appended.

    Args:
        given: The argument; `BCTRL_BASE_URL` or the public API if None.
        allow_plaintext: Accept http for other hosts than this machine.

    Raises:
        BctrlConfigError: The URL is not absolute, is not http(s), contains credentials, a query or
            a fragment, or would send the key unencrypted.
    """
    name = "BCTRL_BASE_URL" if given is None else "base_url"
    text = given if given is not None else os.environ.get("BCTRL_BASE_URL", DEFAULT_BASE_URL)
    try:
        url = URL(text)
        well_formed = url.scheme in {"http", "https"} and bool(url.host) and url.port is not None
    except (ValueError, TypeError):
        well_formed = False
    if not well_formed:
        raise _invalid_url(name, "expected scheme and host", f"Pass such as {DEFAULT_BASE_URL}")
    if url.user is not None or url.password is not None:
        # The URL is not shown, for it contains a secret.
        raise _invalid_url(name, "it contains credentials", "Pass the key as api_key=")
    if url.raw_query_string or url.raw_fragment:
        raise _invalid_url(name, "it has a query or a fragment", "Pass scheme, host and path only")
    if url.scheme == "http" and not allow_plaintext and not _is_loopback(url.host or ""):
        raise _invalid_url(
            name,
            f"{str(url.origin())!r} would send the API key unencrypted",
            "Use https, or pass allow_plaintext=True if the network is yours",
        )
    path = url.raw_path.rstrip("/").removesuffix("/v1")
    return url.with_path(f"{path}/v1", encoded=True)


def _invalid_url(name: str, problem: str, advice: str) -> BctrlConfigError:
    return BctrlConfigError(f"invalid {name}: {problem}", advice=advice, argument="base_url")


def proxy(given: object, *, base_url: URL, allow_plaintext: bool) -> Secret:
    """Return the URL of a proxy, which may contain a password.

    Args:
        given: The argument, as `hidden` returns it.
        base_url: The URL of the API.
        allow_plaintext: Accept an http API, whose requests the proxy can read.

    Raises:
        BctrlConfigError: It is not an http(s) URL with a host and without a path, or could read the
            key. The error does not contain it.
    """
    expected = "an http or https URL with a host, such as http://proxy.example.com:3128"
    if not isinstance(given, Secret):
        kind = given.__name__ if isinstance(given, type) else type(given).__name__
        raise BctrlConfigError(f"invalid proxy: expected a str, not {kind}", argument="proxy")
    if not _is_proxy(given):
        # It is not shown, for it may contain a password.
        raise BctrlConfigError("invalid proxy", advice=f"Pass {expected}", argument="proxy")
    if base_url.scheme == "http" and not allow_plaintext:
        raise BctrlConfigError(
            "invalid proxy: it could read the API key in requests to an http API",
            advice="Use https, or pass allow_plaintext=True if the network is yours",
            argument="proxy",
        )
    return given


def _is_proxy(text: str) -> bool:
    try:
        url = URL(text)
        is_http = url.scheme in {"http", "https"} and bool(url.host) and url.port is not None
    except ValueError:
        return False
    # A # in a password would end the host, and leave the wrong one.
    has_more = url.raw_query_string or url.raw_fragment
    return is_http and url.raw_path in {"", "/"} and not has_more


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def seconds(value: object, name: str) -> float:
    """Return a finite number of seconds above 0.

    Raises:
        BctrlConfigError: The value is anything else.
    """
    return _positive(value, name, "a positive number of seconds")


def per_second(value: object, name: str) -> float:
    """Return a finite rate above 0.

    Raises:
        BctrlConfigError: The value is anything else.
    """
    return _positive(value, name, "a positive number per second")


def _positive(value: object, name: str, wanted: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        number = math.inf
    if isinstance(value, bool) or not math.isfinite(number) or number <= 0:
        raise BctrlConfigError(f"invalid {name} {value!r:.50}: expected {wanted}", argument=name)
    return number


def count(value: object, name: str) -> int:
    """Return a whole number of at least 1.

    Raises:
        BctrlConfigError: The value is anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BctrlConfigError(
            f"invalid {name} {value!r}: expected a whole number of at least 1", argument=name
        )
    return value


def check_type(value: object, kinds: type | UnionType, name: str, expected: str) -> None:
    """Raise the error of `invalid_type` unless an argument is of one of some types."""
    if not isinstance(value, kinds):
        raise invalid_type(name, value, expected)


def check_flags(**flags: object) -> None:
    """Raise an error unless arguments are bools: the text "false" would be true.

    Raises:
        BctrlConfigError: An argument is anything else.
    """
    for name, value in flags.items():
        check_type(value, bool, name, "a bool")


def invalid_type(name: str, value: object, expected: str) -> BctrlConfigError:
    """Return the error of an argument that is not of the expected type."""
    kind = type(value).__name__
    return BctrlConfigError(f"invalid {name}: expected {expected}, not {kind}", argument=name)
