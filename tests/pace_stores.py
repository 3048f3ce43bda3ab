"""The stores of shared paces, with what tests need to see and change in them.

`read` and `write` are for the schedule of the pace `one`, `contents` returns all that is stored,
and `clear` empties the store, as a restart does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from redis.asyncio import Redis

from bctrl_async.pace import FilePace, Pace
from bctrl_async.pace._leases import Schedule
from bctrl_async.redis import RedisPace


class FileStore:
    """Files of several paces in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def pace(self, rate: float, name: str = "one") -> Pace:
        """Return a pace, for another process as it were."""
        return FilePace(self._folder / name, rate=rate)

    async def read(self) -> Schedule:
        _, text, *_ = (self._folder / "one").read_text().split("\n")
        return msgspec.json.decode(text, type=Schedule)

    async def write(self, schedule: Schedule) -> None:
        text = msgspec.json.encode(schedule).decode()
        (self._folder / "one").write_text(f"bctrl-async pace\n{text}\n")

    async def clear(self) -> None:
        for file in self._folder.iterdir():
            file.unlink()

    async def contents(self) -> bytes:
        return b"".join(file.read_bytes() for file in self._folder.iterdir())


class RedisStore:
    """Keys of several paces in Redis.

    Args:
        client: For the tests.
        url: The URL for paces.
    """

    def __init__(self, client: Redis, url: str) -> None:
        # In redis-py the types of answers are unions.
        self._client: Any = client
        self._url = url
        # Tests share a server.
        self._prefix = uuid4().hex
        tag = f"bctrl-async:{{{self._prefix}:one}}"
        self._schedule, self._members = f"{tag}:schedule", f"{tag}:members"

    def pace(self, rate: float, name: str = "one") -> Pace:
        return RedisPace(self._url, rate=rate, name=f"{self._prefix}:{name}")

    async def read(self) -> Schedule:
        times = await self._client.hmget(self._schedule, "clock", "now", "ends_at")
        scores = await self._client.zrange(self._members, 0, -1, withscores=True)
        clock, now, ends_at = map(float, times)
        ends = {member.decode(): score for member, score in scores}
        return Schedule(clock=clock, now=now, ends_at=ends_at, members=ends)

    async def write(self, schedule: Schedule) -> None:
        await self._client.delete(self._schedule, self._members)
        values = {"clock": schedule.clock, "now": schedule.now, "ends_at": schedule.ends_at}
        await self._client.hset(self._schedule, mapping=values)
        await self._client.zadd(self._members, schedule.members)

    async def clear(self) -> None:
        await self._client.flushall()
        await self._client.script_flush()

    async def contents(self) -> bytes:
        keys = await self._client.keys()
        # A key of an earlier test may expire at any time.
        values = [await self._client.dump(key) or b"" for key in keys]
        return b"".join(keys + values)

    async def lifetimes(self) -> list[float]:
        """Return the days until each key expires; negative if it never does."""
        keys = (self._schedule, self._members)
        return [await self._client.ttl(key) / 86_400 for key in keys]


SharedStore = FileStore | RedisStore
