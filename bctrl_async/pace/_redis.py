"""A pace in Redis or Valkey, on the clock of the server."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from ssl import SSLError
from typing import Any, Protocol
from urllib.parse import urlsplit

from bctrl_async import _config
from bctrl_async.pace._leases import Lease, Pace

try:
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
except ModuleNotFoundError as _error:
    raise _config.missing_extra(_error, "redis") from _error

_TIMEOUT = 1.0
"""Seconds for a connection or an answer; a session gives up a lease after the same time."""

_is_database = re.compile(r"/?\d*", re.ASCII).fullmatch
_is_name = re.compile(r"[\w.:/-]{1,100}", re.ASCII).fullmatch

# This is `Schedule.lease`, on the server's clock. A hash has its times, and a sorted set the ends
# of the members' leases. They live for a year, because a clock that is set ahead expires keys.
_LEASE = """
local member, rate, slots = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local clock = time[1] + time[2] / 1e6
local kept = redis.call('HMGET', KEYS[1], 'clock', 'now', 'ends_at')
for n = 1, 3 do
  if not (math.abs(tonumber(kept[n]) or 1e13) <= 1e12) then
    kept = {0, 0, 0}
    redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', '+inf')
  end
end
local now, ends_at = tonumber(kept[2]), tonumber(kept[3])
local passed = math.max(clock - kept[1], -0.05)
local own = (redis.call('ZSCORE', KEYS[2], member) or math.huge) + ARGV[4] - now
if passed > own + 0.05 then passed = math.max(own, 0) end
now = now + passed
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 2)
redis.call('ZADD', KEYS[2], now, member)
local members = redis.call('ZCARD', KEYS[2])
slots = math.min(slots, math.max(math.floor(rate * 0.05 / members), 1))
local begins_at = math.max(ends_at, now)
ends_at = begins_at + slots / rate
redis.call('HSET', KEYS[1], 'clock', clock, 'now', now, 'ends_at', ends_at)
redis.call('ZADD', KEYS[2], ends_at, member)
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, 31536000) end
return {slots, tostring(begins_at - now), members}
"""

_misconfigured = re.compile(
    "AuthenticationError|NoPermissionError|InvalidResponse|ReadOnlyError"
    "|READONLY|WRONGTYPE|DB index|ACL failure|can't run this command"
).search
"""Finds a permanent error by the server's words, or by its class in redis-py and valkey-py."""


class _Client(Protocol):
    """An asyncio client of redis-py or valkey-py, also for a cluster."""

    def register_script(self, script: str, /) -> Callable[..., Awaitable[Any]]: ...


class RedisPace(Pace):
    """A pace shared by the processes of many machines, through Redis 6.2 or newer, or Valkey.

        session = BctrlSession(pace=RedisPace("redis://redis.internal/0", rate=190, name="prod"))

    Args:
        url_or_client: The URL of the server (`redis://`, `rediss://` or `unix://`, with the options
            of redis-py), or an asyncio client: `redis.asyncio.Redis`, also of a `Sentinel`,
            `redis.asyncio.RedisCluster`, or the same of valkey-py. A client is used on its own
            event loop, and not closed. Its timeouts and retries apply within the session's own.
        rate: The most attempts a second of all processes together, above 0; the same in each.
        name: The name of the shared limit, to keep several apart in one server: 1 to 100 letters,
            digits, or `_`, `.`, `:`, `/`, `-`.

    A pace made from a URL can be pickled; the pickle contains the URL's password.

    Raises:
        BctrlConfigError: An argument is invalid. The error does not contain the URL.
    """

    def __init__(self, url_or_client: str | _Client, *, rate: float, name: str = "default") -> None:
        if isinstance(url_or_client, str):
            # A traceback that shows variables must not reveal the password in the URL.
            url_or_client = _config.Secret(url_or_client)
        self._url_or_client: str | _Client = ""
        self._name = name
        super().__init__(rate=rate)
        if not (isinstance(name, str) and _is_name(name)):
            expected = "expected 1 to 100 letters, digits, or '_', '.', ':', '/', '-'"
            raise _config.invalid("name", f"{expected}, not {name!r:.50}")
        if isinstance(url_or_client, str):
            if not _is_url(url_or_client):
                # The reason is not shown: it may contain a part of the password.
                raise _config.invalid(
                    "url_or_client",
                    "expected the URL of a Redis server, with special characters percent-encoded",
                    "Pass such as redis://user:password@localhost:6379/0, or rediss:// or unix://",
                )
        elif not (hasattr(url_or_client, "register_script") and hasattr(url_or_client, "aclose")):
            expected = "a URL or a client of redis.asyncio"
            raise _config.invalid_type("url_or_client", type(url_or_client), expected)
        self._url_or_client = url_or_client

    def __repr__(self) -> str:
        if isinstance(self._url_or_client, str):
            parts = urlsplit(self._url_or_client)
            host = parts.netloc.rpartition("@")[2]
            where = repr(f"{parts.scheme}://{host}{parts.path}")
        else:
            where = f"<{type(self._url_or_client).__name__}>"
        return f"RedisPace({where}, rate={self.rate:g}, name={self._name!r})"

    def __getstate__(self) -> dict[str, object]:
        if not isinstance(self._url_or_client, str):
            problem = "a pace with a client cannot be pickled"
            raise _config.invalid("url_or_client", problem, "Pass the URL")
        return self.__dict__

    def open(self) -> _RedisStore:
        """Return a connection to the server; it connects with the first lease."""
        return _RedisStore(self._url_or_client, self.rate, self._name)


class _RedisStore:
    def __init__(self, client: str | _Client, rate: float, name: str) -> None:
        self._own: Redis | None = None
        if isinstance(client, str):
            client = self._own = _client(client)
        self._script = client.register_script(_LEASE)
        self._rate = rate
        # Braces keep the keys in one hash slot of a Redis cluster.
        self._keys = [f"bctrl-async:{{{name}}}:{kind}" for kind in ("schedule", "members")]

    async def lease(self, member: str, slots: int, since: float) -> Lease:
        arguments: list[str | float] = [member, self._rate, slots, since]
        try:
            leased, delay, members = await self._script(self._keys, arguments)
        except Exception as error:
            name = type(error).__name__
            found = _misconfigured(f"{name}: {error}")
            if found or isinstance(error.__context__, SSLError):
                problem = f"Redis cannot be used as configured ({found[0] if found else name})"
                advice = "Check the scheme, user, password and database of its URL"
                raise _config.invalid("pace", problem, advice) from None
            raise
        # Redis returns a fraction as text, which is a str if the client decodes it, else bytes.
        return Lease(int(leased), float(delay), int(members))

    async def close(self) -> None:
        if self._own is not None:
            await self._own.aclose()


def _client(url: str) -> Redis:
    return Redis.from_url(
        url,
        # RESP2 needs no handshake.
        protocol=2,
        socket_timeout=_TIMEOUT,
        socket_connect_timeout=_TIMEOUT,
        # A repeated request takes another lease; the session asks again by itself.
        retry=Retry(NoBackoff(), 0),
    )


def _is_url(url: str) -> bool:
    try:
        # The options of the URL are checked by the connection, which does no I/O yet.
        pool = _client(url).connection_pool
        pool.connection_class(**pool.connection_kwargs)
        parts = urlsplit(url)
    except (ValueError, TypeError, AttributeError, RedisError):
        return False
    # A password that is not encoded may end the host early; the repr would show its rest.
    is_valid = "://" in url and "@" not in f"{parts.path}{parts.query}{parts.fragment}"
    # redis-py takes database 0 for any path that is not a number.
    return is_valid and (parts.scheme == "unix" or _is_database(parts.path) is not None)
