"""A pace in Redis or Valkey, for the processes of many machines (extra `redis`)."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from bctrl_async import _config
from bctrl_async.errors import BctrlConfigError
from bctrl_async.pace._leases import PATIENCE, Pace

__all__ = ["RedisPace"]

# The hash has the time of the last request, and for how many seconds slots were
# reserved then. ARGV[1] is the seconds to reserve, ARGV[2] the time since the process's
# own last request, on its own clock. If more has passed on the server's clock, that
# clock was set ahead, and no slot has been used since.
_RESERVE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local kept = redis.call('HMGET', KEYS[1], 'last', 'ahead')
local passed = math.max(now - (kept[1] or now), 0)
if passed > ARGV[2] + 0.25 then passed = 0 end
local ahead = math.max((kept[2] or 0) - passed, 0)
redis.call('HSET', KEYS[1], 'last', now, 'ahead', ahead + ARGV[1])
redis.call('EXPIRE', KEYS[1], 86400)
return tostring(ahead)
"""

_find_permanent_error = re.compile(
    "AuthenticationError|NoPermissionError|InvalidResponse|ReadOnlyError"
    "|READONLY|WRONGTYPE|DB index|ACL failure|can't run this command|SSL: \\w+"
).search
"""Finds a permanent error by its words, or by its class in redis-py and valkey-py."""


class _Client(Protocol):
    """An asyncio client of redis-py or valkey-py, also for a cluster."""

    def register_script(self, script: str, /) -> Callable[..., Awaitable[Any]]: ...


class RedisPace(Pace):
    """A pace shared by the processes of many machines, in Redis (from 6.2) or Valkey.

        client = redis.asyncio.Redis.from_url("redis://redis.internal/0")
        session = BctrlSession(rate=RedisPace(client, rate=190, name="prod"))

    Args:
        client: An asyncio client: `redis.asyncio.Redis`, also of a `Sentinel`,
            `redis.asyncio.RedisCluster`, or the same of valkey-py. It is used on its
            own event loop, and you close it. Its timeouts and retries apply within 1 s.
        rate: The most attempts a second of all processes together, above 0; the same in
            each.
        name: The name of the shared limit, to keep several apart in one server.

    Raises:
        BctrlConfigError: An argument is invalid.
    """

    def __init__(self, client: _Client, *, rate: float, name: str = "default") -> None:
        super().__init__(rate=rate)
        _config.check_type(name, str, "name", "a str")
        # The clients that are not for asyncio have no `aclose`.
        if not (hasattr(client, "register_script") and hasattr(client, "aclose")):
            raise _config.invalid_type(
                "client", type(client), "a client of redis.asyncio"
            )
        self._address = _address_of(client)
        self._key = f"bctrl-async:{name}"
        self._reserve = client.register_script(_RESERVE)
        self._requested_at = -1e9  # Long ago.

    def __str__(self) -> str:
        """Return what a warning calls the pace, with the address of its server."""
        if self._address is None:
            return super().__str__()
        return f"{super().__str__()} at {self._address}"

    async def acquire(self, slots: int) -> None:
        """Wait until this many attempts may start.

        Raises:
            BctrlConfigError: `slots` is no whole number from 1; the server refuses the
                user, the password, the database, a command or writes; it is another
                server, or its certificate is not trusted.
            Exception: The client's own, or `TimeoutError` after 1 s: the server is
                away.
        """
        _config.count(slots, "slots")
        now = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE):
                ahead = await self._reserve(
                    [self._key], [slots / self.rate, now - self._requested_at]
                )
        except Exception as error:
            reason = _find_permanent_error(f"{type(error).__name__}: {error}")
            if reason is None:
                raise
            raise BctrlConfigError(
                f"the pace in Redis cannot be used as configured ({reason[0]})",
                advice="Check the scheme, user, password and database of its URL",
                argument="client",
            ) from None
        self._requested_at = now
        # Redis returns a fraction as text: bytes, or a str if the client decodes it.
        await asyncio.sleep(float(ahead))


def _address_of(client: _Client) -> str | None:
    """Return the host and port of a client; None for a cluster, Sentinel or socket."""
    pool = getattr(client, "connection_pool", None)
    options: dict[str, object] = getattr(pool, "connection_kwargs", {})
    if "host" not in options:
        return None
    return f"{options['host']}:{options.get('port', 6379)}"
