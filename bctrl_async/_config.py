"""What a session is configured with, checked once, with errors that name the cure."""

from __future__ import annotations

import math
import os
import re
from ipaddress import ip_address

from yarl import URL

from bctrl_async.errors import BctrlConfigError

DEFAULT_BASE_URL = "https://api.bctrl.ai"

_is_key = re.compile(r"[!-~]+").fullmatch


class Secret(str):
    """Text that prints as `***`, so that a traceback with its variables does not give it away."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def api_key_from_environment() -> Secret:
    """Return `BCTRL_API_KEY`.

    Raises:
        BctrlConfigError: It is not set.
    """
    key = os.environ.get("BCTRL_API_KEY")
    if not key:
        raise BctrlConfigError("there is no API key", advice="Pass api_key= or set BCTRL_API_KEY")
    return Secret(key)


def authorization(key: object) -> Secret:
    """Return the `Authorization` header for a key (contract: `Bearer <api-key>`).

    Raises:
        BctrlConfigError: The key is not visible ASCII; the text does not show it.
    """
    if not isinstance(key, str):
        kind = type(key).__name__
        key = None  # A traceback that shows variables would show it.
        raise BctrlConfigError(f"the API key is a {kind}, not a str", advice="Pass the key as text")
    if not _is_key(key):
        raise BctrlConfigError(
            "the API key is empty or contains a space, a control character or non-ASCII text",
            advice="Strip it, and leave out 'Bearer '",
        )
    return Secret(f"Bearer {key}")


def base_url(given: str | None, *, allow_plaintext: bool) -> URL:
    """Return the URL under which `/workspaces/…` stands, from the argument or `BCTRL_BASE_URL`.

    Raises:
        BctrlConfigError: Not an absolute http(s) URL, or one that carries credentials, a query or
            a fragment, or plain http to a host that is not this machine.
    """
    name = "BCTRL_BASE_URL" if given is None else "base_url"
    text = given if given is not None else os.environ.get("BCTRL_BASE_URL") or DEFAULT_BASE_URL
    try:
        url = URL(text)
        well_formed = url.scheme in {"http", "https"} and bool(url.host) and url.port is not None
    except (ValueError, TypeError):
        well_formed = False
    if not well_formed:
        raise BctrlConfigError(
            f"{name} is not a URL such as {DEFAULT_BASE_URL}", advice="Give scheme and host"
        )
    if url.user is not None or url.password is not None:
        # Not shown: what stands there is a credential.
        raise BctrlConfigError(f"{name} contains credentials", advice="Pass the key as api_key=")
    if url.raw_query_string or url.raw_fragment:
        raise BctrlConfigError(
            f"{name} has a query or a fragment", advice="Give scheme, host and path alone"
        )
    if url.scheme == "http" and not allow_plaintext and not _is_loopback(url.host or ""):
        raise BctrlConfigError(
            f"{name} {str(url.origin())!r} would send the API key unencrypted",
            advice="Use https, or pass allow_plaintext=True if the network is yours",
        )
    path = url.raw_path.rstrip("/").removesuffix("/v1")
    return url.with_path(f"{path}/v1", encoded=True)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def seconds(value: object, name: str) -> float:
    """Return a positive, finite number of seconds.

    Raises:
        BctrlConfigError: It is anything else.
    """
    return _positive(value, name, "a positive number of seconds")


def per_second(value: object, name: str) -> float:
    """Return a positive, finite rate.

    Raises:
        BctrlConfigError: It is anything else.
    """
    return _positive(value, name, "a positive number, so many a second")


def _positive(value: object, name: str, wanted: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        number = math.inf
    if isinstance(value, bool) or not math.isfinite(number) or number <= 0:
        raise BctrlConfigError(f"{name} is {value!r:.50}", advice=f"Give {name} as {wanted}")
    return number


def count(value: object, name: str) -> int:
    """Return a whole number of at least one.

    Raises:
        BctrlConfigError: It is anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BctrlConfigError(
            f"{name} is {value!r}", advice=f"Give {name} as a whole number from 1"
        )
    return value
