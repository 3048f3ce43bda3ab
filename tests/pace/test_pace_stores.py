"""One contract for every store of a shared pace: the file, and Redis or Valkey.

The clocks stand still: time passes by moving the clock that is stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import time
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import BOUND, Connect
from pace_stores import FileStore, RedisStore, SharedStore
from redis.asyncio import Redis
from redis_server import SERVER, SERVERS, redis_server

from bctrl_async.emulator import Emulator
from bctrl_async.pace._leases import Lease
from bctrl_async.pace._redis import _LEASE

RATE = 200.0
NOW = 1_800_000_000.123457
"""A time with as many digits as a real server's."""
LONG = 1e9
"""Seconds since the last lease of a member that has had none."""


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forty members connect at once, on a machine that may be busy.
    monkeypatch.setattr("bctrl_async.pace._redis._TIMEOUT", BOUND)
    monkeypatch.setattr("bctrl_async.pace._file._BUSY", BOUND)
    script = _LEASE.replace("redis.call('TIME')", "{1800000000, 123457}")
    monkeypatch.setattr("bctrl_async.pace._redis._LEASE", script)
    clock = SimpleNamespace(monotonic=lambda: NOW, sleep=time.sleep)
    monkeypatch.setattr("bctrl_async.pace._file.time", clock)


@pytest.fixture(scope="module", params=["file", *SERVERS])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kind of store, or the URL of a server that is started once."""
    if request.param in SERVERS:
        with redis_server(request.param) as server:
            yield server.url
    else:
        yield request.param


@pytest.fixture
async def shared(place: str, tmp_path: Path) -> AsyncIterator[SharedStore]:
    if place == "file":
        yield FileStore(tmp_path)
    else:
        async with Redis.from_url(place) as client:
            yield RedisStore(client, place)


async def lease(
    shared: SharedStore,
    member: str,
    slots: int = 100,
    since: float = LONG,
    *,
    rate: float = RATE,
    name: str = "one",
) -> Lease:
    """Lease by a connection of its own to the store."""
    store = shared.pace(rate, name).open()
    try:
        return await store.lease(member, slots, since)
    finally:
        await store.close()


async def advance(shared: SharedStore, seconds: float) -> None:
    """Move the clock of the schedule: time passes, or it is set."""
    schedule = await shared.read()
    schedule.clock -= seconds
    await shared.write(schedule)


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
        """What `test_leases.py` shows of the schedule is true of each store."""
        chance = random.Random(rate)
        has_two_clocks = isinstance(shared, RedisStore)
        await lease(shared, "m0", rate=rate)
        for _ in range(60):
            await advance(shared, chance.choice([0.0, 0.01, 0.1, 1.0, 3.0, 100.0, -1.0, -1e6]))
            member = f"m{chance.randrange(5)}"
            slots = chance.choice([0, 1, 3, 1000])
            # A file's clock is not set ahead, so it needs no other one.
            since = chance.choice([LONG, -0.1, 0.0, 0.5, 50.0]) if has_two_clocks else LONG
            model = await shared.read()

            leased = await lease(shared, member, slots, since, rate=rate)
            stored = await shared.read()

            expected = model.lease(NOW, rate, member, slots, since)
            assert (leased.slots, leased.members) == (expected.slots, expected.members)
            assert leased.delay == near(expected.delay)
            assert (stored.clock, stored.now) == (near(model.clock), near(model.now))
            assert stored.ends_at == near(model.ends_at)
            assert stored.members == near(model.members)

    async def test_slots_are_never_handed_out_twice(self, shared: SharedStore) -> None:
        assert_in_turn(await asyncio.gather(*(lease(shared, f"m{n}") for n in range(40))))

    async def test_a_dead_member_costs_one_lease_and_counts_for_two_seconds(
        self, shared: SharedStore
    ) -> None:
        for member in ["a", "b", "dead"]:
            await lease(shared, member)
        await advance(shared, 1.5)
        assert [(await lease(shared, member)).members for member in "ab"] == [3, 3]
        await advance(shared, 1.5)
        assert [(await lease(shared, member)).members for member in "ab"] == [2, 2]


class TestState:
    async def test_a_store_that_was_emptied_begins_anew(self, shared: SharedStore) -> None:
        """Fault: a pace whose file was deleted could not be asked until another process made it."""
        for member in "abc":
            await lease(shared, member)
        await shared.clear()

        assert await lease(shared, "a") == Lease(10, 0.0, 1)
        assert (await lease(shared, "b")).members == 2

    @pytest.mark.parametrize("value", [1e13, -math.inf, math.nan, "", "junk"])
    async def test_nonsense_begins_anew(self, shared: SharedStore, value: float) -> None:
        """Fault: the script failed for ever, or no sum changed the time, so that all was free."""
        await lease(shared, "a")
        for field in ["clock", "now", "ends_at"]:
            schedule = await shared.read()
            setattr(schedule, field, value)
            await shared.write(schedule)
            leases = [await lease(shared, member) for member in "bcd"]

            assert leases[0] == Lease(10, 0.0, 1)
            assert_in_turn(leases)

    async def test_two_names_do_not_meet(self, shared: SharedStore) -> None:
        await lease(shared, "a")
        assert await lease(shared, "a", name="other") == Lease(10, 0.0, 1)
        assert (await lease(shared, "c")).members == 2

    @pytest.mark.parametrize("place", [SERVER], indirect=True)
    async def test_it_does_not_remain_for_ever(self, shared: RedisStore) -> None:
        await lease(shared, "a")
        # A clock that is set ahead by days must not expire it.
        assert all(364 < days <= 366 for days in await shared.lifetimes())

    async def test_a_request_that_is_cancelled_leaves_the_store_usable(
        self, shared: SharedStore
    ) -> None:
        store = shared.pace(RATE).open()
        await store.lease("a", 1, LONG)
        for _ in range(5):
            request = asyncio.create_task(store.lease("a", 1, LONG))
            await asyncio.sleep(0)
            request.cancel()
            await asyncio.wait([request])

        assert (await store.lease("a", 1, LONG)).slots == 1
        await store.close()

    @pytest.mark.usefixtures("patient")
    async def test_nothing_secret_is_stored(
        self, shared: SharedStore, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.add_runtime("secret-workspace", "secret-alias")
        async with connect(pace=shared.pace(RATE)) as session:
            await session.stop_runtime("secret-workspace", "secret-alias")
        assert (await shared.read()).members
        contents = await shared.contents()
        assert b"secret" not in contents
        key = emulator.api_key.encode()
        hashes = [hashlib.new(name, key) for name in ("md5", "sha1", "sha256", "sha512")]
        for kept in (key, *(each.digest() for each in hashes)):
            assert kept not in contents
            assert kept.hex().encode() not in contents
