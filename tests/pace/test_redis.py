"""`RedisPace`: its arguments, its clients, and the permissions that it needs."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis
from fakeredis import FakeAsyncRedis
from helpers import BOUND
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import NoPermissionError
from redis_server import SERVERS, RedisServer, redis_server

from bctrl_async import BctrlConfigError
from bctrl_async.pace._leases import Lease
from bctrl_async.pace._redis import _LEASE
from bctrl_async.redis import RedisPace

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "share-a-rate.md"

needs_server = pytest.mark.skipif(not SERVERS, reason="neither Redis nor Valkey is installed")
each_server = pytest.mark.parametrize("program", SERVERS, ids=os.path.basename)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bctrl_async.pace._redis._TIMEOUT", BOUND)
    # Members and keys stay until a busy machine has asked again.
    script = _LEASE.replace("now - 2", "now - 60")
    monkeypatch.setattr("bctrl_async.pace._redis._LEASE", script)


async def lease(pace: RedisPace) -> Lease:
    """Return the second lease of a store, which the script's cache has already."""
    store = pace.open()
    try:
        await store.lease("a", 1, 0.0)
        return await store.lease("b", 100, 0.0)
    finally:
        await store.close()


class TestArguments:
    @pytest.mark.parametrize(
        "url",
        [
            "",
            "redis:6379",
            "valkey://localhost",
            "redis://localhost:99999",
            "redis://[::1",
            "redis://localhost?nonsense=1",
            "rediss://localhost?ssl_cert_reqs=perhaps",
        ],
    )
    def test_an_invalid_url_is_an_error_of_its_argument(self, url: str) -> None:
        with pytest.raises(BctrlConfigError, match="invalid url_or_client") as raised:
            RedisPace(url, rate=200)
        assert raised.value.argument == "url_or_client"

    @pytest.mark.parametrize(
        "url",
        [
            "redis://me:s3cr/et@localhost",
            "redis://me:12/s3cret@localhost",
            "redis://me:12#s3cret@localhost",
            "redis://me:12?s3cret@localhost",
            "http://me:s3cret@localhost",
        ],
    )
    def test_an_error_does_not_show_a_password_that_is_not_encoded(self, url: str) -> None:
        with pytest.raises(BctrlConfigError) as raised:
            RedisPace(url, rate=200)
        assert "s3cr" not in f"{raised.value} {raised.value!r}"
        assert raised.value.__cause__ is None

    @pytest.mark.parametrize("other", [None, 6379, b"redis://localhost", redis.Redis()])
    def test_anything_else_is_an_error_of_its_argument(self, other: object) -> None:
        expected = "expected a URL or a client of redis.asyncio, not "
        with pytest.raises(BctrlConfigError, match=expected) as raised:
            RedisPace(other, rate=200)  # type: ignore[arg-type]
        assert raised.value.argument == "url_or_client"

    @pytest.mark.parametrize("name", ["", "{a}", "a\n", "ä", "x" * 101, None])
    def test_an_invalid_name_is_an_error_of_its_argument(self, name: str) -> None:
        with pytest.raises(BctrlConfigError, match="invalid name") as raised:
            RedisPace("redis://localhost", rate=200, name=name)
        assert raised.value.argument == "name"

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://me:s3cret@localhost:6380/1", "redis://localhost:6380/1"),
            ("rediss://:s3%2Fcr@et@redis.internal", "rediss://redis.internal"),
            ("redis://localhost/0?username=me&password=s3cret", "redis://localhost/0"),
            ("unix://me:s3cret@/run/redis.sock?db=1", "unix:///run/redis.sock"),
        ],
    )
    def test_its_repr_does_not_show_the_password(self, url: str, shown: str) -> None:
        pace = RedisPace(url, rate=200, name="prod")
        assert repr(pace) == f"RedisPace({shown!r}, rate=200, name='prod')"

    async def test_its_repr_shows_the_class_of_a_client(self) -> None:
        pace = RedisPace(FakeAsyncRedis(), rate=200)
        assert repr(pace) == "RedisPace(<FakeRedis>, rate=200, name='default')"

    def test_one_of_a_url_can_be_pickled(self) -> None:
        pace = RedisPace("redis://me:secret@localhost", rate=200, name="prod")
        copied = pickle.loads(pickle.dumps(pace))  # noqa: S301 - our own.
        assert (type(copied), vars(copied)) == (RedisPace, vars(pace))

    async def test_one_of_a_client_cannot_be_pickled(self) -> None:
        with pytest.raises(BctrlConfigError, match=r"cannot be pickled\. Pass the URL"):
            pickle.dumps(RedisPace(FakeAsyncRedis(), rate=200))


class TestClients:
    async def test_a_borrowed_client_is_not_closed(self) -> None:
        async with FakeAsyncRedis() as client:
            assert (await lease(RedisPace(client, rate=200))).members == 2
            pool = client.connection_pool
            assert [connection.is_connected for connection in pool._available_connections] == [True]

    async def test_a_client_that_decodes_its_answers_is_accepted(self) -> None:
        async with FakeAsyncRedis(decode_responses=True) as client:
            leased = await lease(RedisPace(client, rate=200))
        assert (leased.slots, leased.members) == (5, 2)
        assert type(leased.delay) is float

    @pytest.mark.parametrize("options", ["", "?retry_on_timeout=true"])
    async def test_a_store_of_a_url_that_answers_nothing_fails_once(self, options: str) -> None:
        """Fault: redis-py repeats a command, in some versions ten times: each is a lease."""
        connections = []

        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append(writer)
            writer.close()

        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(redis.ConnectionError):
                await lease(RedisPace(f"redis://127.0.0.1:{port}{options}", rate=200))

        assert len(connections) == 1

    @needs_server
    @each_server
    @pytest.mark.parametrize("protocol", [2, 3])
    async def test_both_protocols_are_understood(self, program: str, protocol: int) -> None:
        with redis_server(program) as server:
            pace = RedisPace(f"{server.url}?protocol={protocol}", rate=200)
            assert (await lease(pace)).slots == 5

    @needs_server
    @each_server
    async def test_a_connection_that_the_server_closed_while_it_was_idle_is_made_again(
        self, program: str
    ) -> None:
        with redis_server(program) as server:
            store = RedisPace(server.url, rate=200).open()
            await store.lease("a", 1, 0.0)
            async with Redis.from_url(server.url) as admin:
                await admin.client_kill_filter(skipme=True)
                while len(await admin.client_list()) > 1:
                    await asyncio.sleep(0)
            assert (await store.lease("b", 1, 0.0)).members == 2
            await store.close()

    @needs_server
    @each_server
    async def test_a_socket_and_a_database_of_a_url_are_used(
        self, program: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "redis.sock"
        with redis_server(program, "--unixsocket", str(path)) as server:
            assert (await lease(RedisPace(f"unix://{path}?db=1", rate=200))).members == 2
            # The members of the same name in another database.
            assert (await lease(RedisPace(server.url, rate=200))).members == 2
            async with Redis.from_url(server.url, db=1) as client:
                assert len(await client.keys()) == 2

    @needs_server
    @each_server
    @pytest.mark.parametrize(
        ("database", "command", "problem"),
        [
            (0, "REPLICAOF 127.0.0.1 1", "ReadOnlyError"),
            (99, "PING", "DB index"),
            (0, "SET bctrl-async:{default}:schedule text", "WRONGTYPE"),
            (0, "ACL SETUSER default -hset", "ACL failure"),
        ],
    )
    async def test_a_server_that_cannot_keep_the_pace_is_an_error(
        self, program: str, database: int, command: str, problem: str
    ) -> None:
        """Fault: each process went on with the whole rate, as if the server were away."""
        with redis_server(program) as server:
            async with Redis.from_url(server.url) as admin:
                await admin.execute_command(*command.split())  # type: ignore[no-untyped-call]
            pace = RedisPace(f"redis://127.0.0.1:{server.port}/{database}", rate=200)
            with pytest.raises(BctrlConfigError, match=f"as configured .{problem}"):
                await lease(pace)

    @needs_server
    async def test_a_cluster_keeps_the_keys_in_one_slot(self) -> None:
        with redis_server(SERVERS[0], "--cluster-enabled", "yes") as server:
            async with Redis.from_url(server.url) as client:
                slots = ("CLUSTER ADDSLOTSRANGE", 0, 16383)
                await client.execute_command(*slots)  # type: ignore[no-untyped-call]
                # A server waits for two seconds before it joins a cluster.
                while (await client.cluster("INFO"))["cluster_state"] != "ok":
                    await asyncio.sleep(0.01)
            async with RedisCluster.from_url(server.url) as cluster:
                assert (await lease(RedisPace(cluster, rate=200, name="prod"))).slots == 5


@needs_server
class TestPermissions:
    @pytest.fixture(params=SERVERS, ids=os.path.basename)
    async def server(self, request: pytest.FixtureRequest) -> AsyncIterator[RedisServer]:
        with redis_server(request.param) as server:
            async with Redis.from_url(server.url) as admin:
                # The line of the guide.
                (rules,) = re.findall(
                    "^ACL SETUSER pace (.*)$", GUIDE.read_text("utf-8"), re.MULTILINE
                )
                setting = ("ACL SETUSER", "pace", *rules.replace("PASSWORD", "s3cret").split())
                await admin.execute_command(*setting)  # type: ignore[no-untyped-call]
            yield server

    async def test_a_user_needs_few(self, server: RedisServer) -> None:
        url = f"redis://pace:s3cret@127.0.0.1:{server.port}/0"
        assert (await lease(RedisPace(url, rate=200, name="prod"))).slots == 5

        async with Redis.from_url(url) as user:
            with pytest.raises(NoPermissionError):
                await user.keys()
