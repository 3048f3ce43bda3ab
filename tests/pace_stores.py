"""The stores of shared paces, with what tests need to see and change in them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from redis.asyncio import Redis

from bctrl_async.pace import FilePace, Pace
from bctrl_async.pace._leases import Schedule
from bctrl_async.redis import RedisPace


class SharedStore(ABC):
    """A store in which paces of several names are kept."""

    @abstractmethod
    def pace(self, rate: float, name: str = "one") -> Pace:
        """Return a pace, for another process as it were."""

    @abstractmethod
    async def read(self, name: str = "one") -> Schedule:
        """Return the schedule that is stored."""

    @abstractmethod
    async def write(self, schedule: Schedule, name: str = "one") -> None:
        """Replace the schedule that is stored."""

    @abstractmethod
    async def clear(self) -> None:
        """Empty the store, as a restart does."""

    @abstractmethod
    async def contents(self) -> bytes:
        """Return everything that is stored."""

    async def advance(self, seconds: float, name: str = "one") -> None:
        """Move the clock of a schedule: time passes, or it is set."""
        schedule = await self.read(name)
        schedule.clock -= seconds
        await self.write(schedule, name)


class FileStore(SharedStore):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def pace(self, rate: float, name: str = "one") -> Pace:
        return FilePace(self._folder / name, rate=rate)

    async def read(self, name: str = "one") -> Schedule:
        _, text, *_ = (self._folder / name).read_text().split("\n")
        return msgspec.json.decode(text, type=Schedule)

    async def write(self, schedule: Schedule, name: str = "one") -> None:
        text = msgspec.json.encode(schedule).decode()
        (self._folder / name).write_text(f"bctrl-async pace\n{text}\n")

    async def clear(self) -> None:
        for file in self._folder.iterdir():
            file.unlink()

    async def contents(self) -> bytes:
        return b"".join(file.read_bytes() for file in self._folder.iterdir())


class RedisStore(SharedStore):
    """A store in Redis.

    Args:
        client: For the tests.
        url: The URL for paces; they share the client if None.
    """

    def __init__(self, client: Redis, url: str | None = None) -> None:
        # In redis-py the types of answers are unions.
        self._client: Any = client
        self._url = url
        # Tests share a server.
        self._prefix = uuid4().hex

    def pace(self, rate: float, name: str = "one") -> Pace:
        return RedisPace(self._url or self._client, rate=rate, name=f"{self._prefix}:{name}")

    async def read(self, name: str = "one") -> Schedule:
        schedule, members = self._keys(name)
        times = await self._client.hmget(schedule, "clock", "now", "ends_at")
        scores = await self._client.zrange(members, 0, -1, withscores=True)
        clock, now, ends_at = map(float, times)
        ends = {member.decode(): score for member, score in scores}
        return Schedule(clock=clock, now=now, ends_at=ends_at, members=ends)

    async def write(self, schedule: Schedule, name: str = "one") -> None:
        times, members = self._keys(name)
        await self._client.delete(times, members)
        values = {"clock": schedule.clock, "now": schedule.now, "ends_at": schedule.ends_at}
        await self._client.hset(times, mapping=values)
        await self._client.zadd(members, schedule.members)

    async def clear(self) -> None:
        await self._client.flushall()
        await self._client.script_flush()

    async def contents(self) -> bytes:
        keys = await self._client.keys()
        # A key of an earlier test may expire at any time.
        values = [await self._client.dump(key) or b"" for key in keys]
        return b"".join(keys + values)

    async def ttl(self, name: str = "one") -> list[float]:
        """Return the seconds until each key expires: 0 if it has, inf if it never does."""
        special = {-1: math.inf, -2: 0.0}
        times = [await self._client.pttl(key) for key in self._keys(name)]
        return [special.get(time, time / 1000) for time in times]

    def _keys(self, name: str) -> tuple[str, str]:
        tag = f"bctrl-async:{{{self._prefix}:{name}}}"
        return f"{tag}:schedule", f"{tag}:members"
