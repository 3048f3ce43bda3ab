"""The rate that `--rate` and `--pace` describe."""

import re
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bctrl_async import BctrlConfigError, _config
from bctrl_async._lifetime import close_with_loop
from bctrl_async.pace import FilePace, Pace
from bctrl_async.redis import RedisPace

if TYPE_CHECKING:
    from redis.asyncio import Redis

_is_address = re.compile(r"[\w.-]{2,}:").match
"""Matches an address such as `redis:6379`, which must not be taken for a file."""
_is_database = re.compile(r"/?\d*", re.ASCII).fullmatch


def open_rate(
    rate: float | None, store: str | None, origin: str
) -> float | Pace | None:
    """Return a rate for a session in one event loop; with a store, it is shared."""
    if store is None:
        return rate
    if rate is None:
        raise BctrlConfigError(
            f"{origin} needs --rate, the rate of all processes together"
        )
    if not _is_address(store):
        return FilePace(store, rate=rate)
    try:
        client = _client(store)
    except ModuleNotFoundError as error:
        missing = _config.missing_extra(error, "redis")
        raise BctrlConfigError(f"cannot use {origin}: {missing}") from error
    if client is None:
        # The reason is not shown: it may contain a part of the password.
        url = "redis://user:password@localhost:6379/0"
        raise BctrlConfigError(
            f"invalid {origin}: expected the URL of a Redis server, with special "
            "characters percent-encoded",
            advice=f"Pass such as {url}, or rediss:// or unix://",
        )
    return _OwnClientPace(client, rate=rate)


class _OwnClientPace(RedisPace):
    """A pace in Redis whose client closes with the event loop."""

    def __init__(self, client: "Redis", *, rate: float) -> None:
        super().__init__(client, rate=rate)
        self._close = client.aclose
        self._lifetime: AsyncGenerator[None] | None = None

    async def acquire(self, slots: int) -> None:
        if self._lifetime is None:
            self._lifetime = close_with_loop(self._close)
        await super().acquire(slots)


def _client(url: str) -> "Redis | None":
    """Return a client of a server, or None if the URL is invalid."""
    from redis.asyncio import Redis  # noqa: PLC0415 - it may be missing.
    from redis.exceptions import RedisError  # noqa: PLC0415 - it may be missing.

    try:
        client = Redis.from_url(url)
        # The connection checks the options of the URL, and does no I/O yet.
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)
        parts = urlsplit(url)
    except (ValueError, TypeError, AttributeError, RedisError):
        return None
    # A password that is not encoded may end the host early.
    is_whole = "://" in url and "@" not in f"{parts.path}{parts.query}{parts.fragment}"
    # redis-py takes database 0 for any path that is not a number.
    has_database = parts.scheme == "unix" or _is_database(parts.path) is not None
    if is_whole and has_database:
        return client
    return None
