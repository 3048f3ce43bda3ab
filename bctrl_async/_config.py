"""Checks of a session's configuration, and the error of a missing extra."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from ipaddress import ip_address
from types import NoneType, UnionType
from typing import SupportsIndex

from yarl import URL

from bctrl_async.errors import BctrlConfigError

DEFAULT_BASE_URL = "https://api.bctrl.ai"
_USE_HTTPS = "Use https, or pass allow_plaintext=True if the network is yours"

_is_key = re.compile(r"[!-~]+").fullmatch


class Secret(str):
    """A str whose repr is `***`, so that tracebacks with variables do not reveal it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def __getitem__(self, key: SupportsIndex | slice) -> Secret:
        # rich and structlog show the repr of the first characters of a long value.
        return Secret(super().__getitem__(key))


def hidden(key: object) -> Secret | type:
    """Return a str as a `Secret`, any other value as its type, and a type as it is."""
    if isinstance(key, type):
        return key
    if isinstance(key, str):
        return Secret(key)
    return type(key)


def hidden_key(api_key: object) -> Secret | type:
    """Return a key as `hidden` does; None reads `BCTRL_API_KEY`, which must be set."""
    if api_key is not None:
        return hidden(api_key)
    key = os.environ.get("BCTRL_API_KEY")
    if key:
        return Secret(key)
    advice = "Pass api_key= or set BCTRL_API_KEY"
    raise BctrlConfigError("no API key", advice=advice, argument="api_key")


def authorization(key: object) -> Secret:
    """Return the `Authorization` header for a key; no error contains the key."""
    # A traceback that shows variables must not reveal the key.
    key = hidden(key)
    if isinstance(key, type):
        raise invalid_type("API key", key, "a str", "api_key")
    # A key from a file or a secret store often ends with a newline that is not its own.
    key = Secret(key.rstrip("\r\n"))
    if not _is_key(key):
        raise invalid(
            "API key",
            "empty, or with a space, a control character or non-ASCII text",
            "Strip it, and leave out 'Bearer '",
            argument="api_key",
        )
    return Secret(f"Bearer {key}")


def base_url(text: str | None, *, allow_plaintext: bool) -> URL:
    """Return the URL above `/workspaces/…`; None reads the environment."""
    name = "base_url"
    if text is None:
        name = "BCTRL_BASE_URL"
        text = os.environ.get(name, DEFAULT_BASE_URL)
    url = _http_url(str(text))
    if url is None:
        problem = "expected scheme and host, no spaces"
        advice = f"Pass such as {DEFAULT_BASE_URL}"
        raise invalid(name, problem, advice, argument="base_url")
    rejection = _rejection_of(url, allow_plaintext=allow_plaintext)
    if rejection is not None:
        raise invalid(name, *rejection, argument="base_url")
    path = url.raw_path.rstrip("/").removesuffix("/v1")
    return url.with_path(f"{path}/v1", encoded=True)


def _rejection_of(url: URL, *, allow_plaintext: bool) -> tuple[str, str] | None:
    """Return why a URL cannot be the base URL, and what to do."""
    if url.user is not None or url.password is not None:
        # The URL is not shown, for it contains a secret.
        return "it contains credentials", "Pass the key as api_key="
    if url.raw_query_string or url.raw_fragment:
        return "it has a query or a fragment", "Pass scheme, host and path only"
    if (
        url.scheme == "http"
        and not allow_plaintext
        and not _is_loopback(url.host or "")
    ):
        return f"{str(url.origin())!r} would send the API key unencrypted", _USE_HTTPS
    return None


def proxy(text: Secret | type, *, is_allowed: bool) -> Secret | None:
    """Check a proxy's URL as `hidden` returns it; no error contains the URL."""
    if text is NoneType:
        # There is no proxy.
        return None
    if isinstance(text, type):
        raise invalid_type("proxy", text, "a str")
    if not _is_proxy(text):
        problem = "expected an http or https URL with a host"
        advice = "Pass such as http://h:3128"
        raise invalid("proxy", problem, advice)
    if not is_allowed:
        problem = "it could read the API key in requests to an http API"
        raise invalid("proxy", problem, _USE_HTTPS)
    return text


def _is_proxy(text: str) -> bool:
    # The URL is parsed in this function, so that the parsed URL with its password is in
    # no frame of the error's traceback. A # in a password ends the host early and
    # leaves a fragment.
    url = _http_url(text)
    return url is not None and url.raw_path_qs in {"", "/"} and not url.raw_fragment


def _http_url(text: str) -> URL | None:
    # `URL` drops tabs and newlines silently, so the text is checked.
    if not text.isprintable() or " " in text:
        return None
    with suppress(ValueError, TypeError):
        url = URL(text)
        if url.scheme in {"http", "https"} and url.host:
            return url
    return None


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def seconds(
    value: object, name: str, description: str = "a positive number of seconds"
) -> float:
    """Return a finite number above 0."""
    # A value that is not a number stays NaN, which is not finite.
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        # An int may be too large for a float.
        with suppress(OverflowError):
            number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise BctrlConfigError(
            f"invalid {name} {value!r:.50}: expected {description}", argument=name
        )
    return number


def per_second(value: object, name: str) -> float:
    """Return a finite rate above 0."""
    return seconds(value, name, "a positive number per second")


def count(value: object, name: str) -> int:
    """Return a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BctrlConfigError(
            f"invalid {name} {value!r}: expected a whole number of at least 1",
            argument=name,
        )
    return value


def check_type(
    value: object, types: type | UnionType, name: str, description: str
) -> None:
    """Raise the error of `invalid_type` unless an argument has one of these types."""
    if not isinstance(value, types):
        raise invalid_type(name, type(value), description)


def invalid_type(
    name: str, actual: type, description: str, argument: str | None = None
) -> BctrlConfigError:
    """Return the error of an argument that is not of the expected type."""
    return invalid(
        name, f"expected {description}, not {actual.__name__}", argument=argument
    )


def invalid(
    name: str, problem: str, advice: str | None = None, *, argument: str | None = None
) -> BctrlConfigError:
    """Return the error of an invalid value; `argument` is `name` by default."""
    if argument is None:
        argument = name
    return BctrlConfigError(
        f"invalid {name}: {problem}", advice=advice, argument=argument
    )


def missing_extra(error: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    """Return the error of a package that comes with an extra.

    The advice names no package of an index: bctrl-async is on none, so anyone could
    register it.
    """
    advice = f"install bctrl-async with the extra {extra}"
    clone = f"in a clone: python -m pip install '.[{extra}]'"
    return ModuleNotFoundError(
        f"{error.name} is missing: {advice} ({clone})", name=error.name
    )
