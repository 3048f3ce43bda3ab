"""One contract for every store of a shared pace: the file, and Redis or Valkey.

The clocks stand still: time passes by moving the clock that is stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pytest
from fakeredis import FakeAsyncRedis, FakeServer
from helpers import BOUND
from pace_stores import FileStore, RedisStore, SharedStore
from redis.asyncio import Redis
from redis_server import SERVERS, RedisServer, redis_server

from bctrl_async import BctrlSession, RetryPolicy
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.pace._leases import Lease, Store
from bctrl_async.pace._redis import _LEASE

RATE = 200.0
NOW = 1_000_000.0
LONG = 1e9
"""Seconds since the last lease of a member that has had none."""
NAMES = ["file", "fakeredis", "redis-server", "valkey-server"]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forty members connect at once, on a machine that may be busy.
    monkeypatch.setattr("bctrl_async.pace._redis._TIMEOUT", BOUND)
    monkeypatch.setattr("bctrl_async.pace._file._BUSY", BOUND)
    script = _LEASE.replace("redis.call('TIME')", f"{{{NOW:.0f}, 0}}")
    monkeypatch.setattr("bctrl_async.pace._redis._LEASE", script)
    clock = SimpleNamespace(monotonic=lambda: NOW, sleep=time.sleep)
    monkeypatch.setattr("bctrl_async.pace._file.time", clock)


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, RedisServer]]:
    """The servers that are installed, by name; each is started once."""
    contexts = {os.path.basename(program): redis_server(program) for program in SERVERS}  # noqa: PTH119
    try:
        yield {name: context.__enter__() for name, context in contexts.items()}
    finally:
        for context in contexts.values():
            context.__exit__(None, None, None)


@pytest.fixture(params=NAMES)
async def shared(
    request: pytest.FixtureRequest, servers: dict[str, RedisServer], tmp_path: Path
) -> AsyncIterator[SharedStore]:
    if request.param == "file":
        yield FileStore(tmp_path)
    elif request.param == "fakeredis":
        async with FakeAsyncRedis(server=FakeServer()) as client:
            yield RedisStore(client)
    elif request.param not in servers:
        pytest.skip(f"{request.param} is not installed")
    else:
        url = servers[request.param].url
        async with Redis.from_url(url) as client:
            yield RedisStore(client, url)


class Members:
    """Members of one pace, each with a connection of its own to the store."""

    def __init__(self, shared: SharedStore, rate: float = RATE, name: str = "one") -> None:
        self._shared, self._rate, self._name = shared, rate, name
        self._stores: dict[str, Store] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for store in self._stores.values():
            await store.close()

    async def lease(self, member: str, slots: int = 100, since: float = LONG) -> Lease:
        if member not in self._stores:
            self._stores[member] = self._shared.pace(self._rate, self._name).open()
        return await self._stores[member].lease(member, slots, since)


@pytest.fixture
async def members(shared: SharedStore) -> AsyncIterator[Members]:
    async with Members(shared) as members:
        yield members


def near(value: float | dict[str, float]) -> object:
    return pytest.approx(value, abs=1e-5)


def assert_in_turn(leases: list[Lease]) -> None:
    """Assert that slots begin now, and that each lease follows the one before."""
    taken = sorted((lease.delay, lease.delay + lease.slots / RATE) for lease in leases)
    assert taken[0][0] == near(0.0)
    for (_, end), (begin, _) in pairwise(taken):
        assert begin == near(end)


class TestSchedule:
    @pytest.mark.parametrize("rate", [0.5, 30.0, 200.0, 5000.0])
    async def test_a_store_leases_as_the_schedule_does(
        self, shared: SharedStore, rate: float
    ) -> None:
        """What `test_leases.py` and `test_pace_clock.py` show of the schedule is true of each."""
        chance = random.Random(rate)
        has_two_clocks = isinstance(shared, RedisStore)
        async with Members(shared, rate) as members:
            await members.lease("m0")
            for _ in range(60):
                await shared.advance(chance.choice([0.0, 0.01, 0.1, 1.0, 3.0, 100.0, -1.0, -1e6]))
                member = f"m{chance.randrange(5)}"
                slots = chance.choice([0, 1, 3, 1000])
                # A file's clock is not set ahead, so it needs no other one.
                since = chance.choice([LONG, -0.1, 0.0, 0.5, 50.0]) if has_two_clocks else LONG
                model = await shared.read()

                lease = await members.lease(member, slots, since)
                stored = await shared.read()

                expected = model.lease(NOW, rate, member, slots, since)
                assert (lease.slots, lease.members) == (expected.slots, expected.members)
                assert lease.delay == near(expected.delay)
                assert (stored.clock, stored.now) == (near(model.clock), near(model.now))
                assert stored.ends_at == near(model.ends_at)
                assert stored.members == near(model.members)

    async def test_slots_are_never_handed_out_twice(self, members: Members) -> None:
        leases = await asyncio.gather(*(members.lease(f"m{n}") for n in range(40)))

        assert_in_turn(leases)

    async def test_a_dead_member_costs_one_lease_and_counts_for_two_seconds(
        self, members: Members, shared: SharedStore
    ) -> None:
        for member in ["a", "b", "dead"]:
            await members.lease(member)
        await shared.advance(1.5)
        assert [(await members.lease(member)).members for member in "ab"] == [3, 3]
        await shared.advance(1.5)
        assert [(await members.lease(member)).members for member in "ab"] == [2, 2]


class TestState:
    async def test_a_store_that_was_emptied_begins_anew(
        self, members: Members, shared: SharedStore
    ) -> None:
        """Fault: a pace whose file was deleted could not be asked until another process made it."""
        for member in "abc":
            await members.lease(member)
        await shared.clear()
        lease = await members.lease("a")

        assert (lease.delay, lease.members) == (0.0, 1)
        assert (await members.lease("b")).members == 2

    @pytest.mark.parametrize("value", [1e13, -math.inf, math.nan, "", "junk"])
    async def test_nonsense_begins_anew(
        self, members: Members, shared: SharedStore, value: float
    ) -> None:
        """Fault: the script failed for ever, or no sum changed the time, so that all was free."""
        await members.lease("a")
        for field in ["clock", "now", "ends_at"]:
            schedule = await shared.read()
            setattr(schedule, field, value)
            await shared.write(schedule)
            leases = [await members.lease(member) for member in "bcd"]

            assert leases[0] == Lease(10, 0.0, 1)
            assert_in_turn(leases)

    async def test_two_names_do_not_meet(self, members: Members, shared: SharedStore) -> None:
        await members.lease("a")
        async with Members(shared, name="other") as other:
            lease = await other.lease("a")
            assert (lease.delay, lease.members) == (0.0, 1)
            assert (await other.lease("b")).members == 2
        assert (await members.lease("c")).members == 2

    @pytest.mark.parametrize("shared", [name for name in NAMES if name != "file"], indirect=True)
    async def test_it_does_not_remain_for_ever(self, shared: RedisStore) -> None:
        async with Members(shared) as members:
            await members.lease("a")
            assert all(0.0 < ttl <= 366 * 86_400.0 for ttl in await shared.ttl())

    async def test_a_request_that_is_cancelled_leaves_the_store_usable(
        self, members: Members
    ) -> None:
        await members.lease("a")
        for _ in range(5):
            request = asyncio.create_task(members.lease("a"))
            await asyncio.sleep(0)
            request.cancel()
            await asyncio.wait([request])

        assert (await members.lease("a")).slots > 0

    @pytest.mark.usefixtures("patient")
    async def test_nothing_secret_is_stored(self, shared: SharedStore) -> None:
        key = "a-key-that-nobody-else-has"
        async with Emulator(port=0, api_key=key) as emulator:
            emulator.add_runtime("secret-workspace", "secret-alias")
            emulator.inject(Fault.RATE_LIMITED)
            pace = shared.pace(RATE)
            retry = RetryPolicy(base=0.001, cap=0.001)
            async with BctrlSession(key, base_url=emulator.url, pace=pace, retry=retry) as session:
                await session.stop_runtime("secret-workspace", "secret-alias")
                contents = await shared.contents()
                assert (await shared.read()).members

        hashes = {name for name in hashlib.algorithms_guaranteed if "shake" not in name}
        digests = [hashlib.new(name, key.encode()) for name in hashes]
        secrets = [b"secret", key.encode(), key.encode().hex().encode()]
        secrets += [digest.digest() for digest in digests]
        secrets += [digest.hexdigest().encode() for digest in digests]
        assert [secret for secret in secrets if secret in contents] == []
