"""The option `--pace`: a rate that several processes share."""

from __future__ import annotations

import re

import typer

from bctrl_async import BctrlConfigError
from bctrl_async.pace import FilePace, Pace

_SCHEMES = ("redis://", "rediss://", "unix://")

is_address = re.compile(r"(redis|rediss|unix):(?!//).*|[\w.-]+:\d+(/.*)?").fullmatch
"""Matches an address without its scheme: as a file, each machine would have a pace of its own."""


def pace_of(context: typer.Context, place: str, rate: float, origin: str) -> Pace:
    """Return a shared pace; fail if it cannot be used."""
    if is_address(place):
        context.fail(
            f"invalid {origin}: expected the path of a file or a URL. "
            "Begin the address of a server with redis://, and such a path with ./"
        )
    if "://" in place and not place.startswith(_SCHEMES):
        # Also where the extra is missing: to install it would not help.
        expected = "the URL of a Redis server, with redis://, rediss:// or unix://"
        context.fail(f"invalid {origin}: expected {expected}, or the path of a file")
    try:
        if "://" in place:
            from bctrl_async.redis import RedisPace  # noqa: PLC0415 - an extra.

            return RedisPace(place, rate=rate)
        return FilePace(place, rate=rate)
    except BctrlConfigError as error:
        # The session names its arguments; here they are an option, a variable or a key.
        context.fail(str(error).replace(f"invalid {error.argument}", f"invalid {origin}", 1))
    except ModuleNotFoundError as error:
        context.fail(f"cannot use {origin}: {error}")
