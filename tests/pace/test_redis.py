"""`RedisPace`: its arguments, its clients, and the permissions that it needs."""

from __future__ import annotations

import asyncio
import pickle
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import redis
from helpers import BOUND
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import NoPermissionError
from redis_server import SERVER, SERVERS, RedisServer, redis_server

from bctrl_async import BctrlConfigError
from bctrl_async.pace._leases import Lease
from bctrl_async.pace._redis import _LEASE
from bctrl_async.redis import RedisPace

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "share-a-rate.md"


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bctrl_async.pace._redis._TIMEOUT", BOUND)
    # Members and keys stay until a busy machine has asked again.
    script = _LEASE.replace("now - 2", "now - 60")
    monkeypatch.setattr("bctrl_async.pace._redis._LEASE", script)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with redis_server(request.param) as running:
        yield running


async def execute(url: str, *command: object) -> None:
    async with Redis.from_url(url) as admin:
        await admin.execute_command(*command)  # type: ignore[no-untyped-call]  # redis.


async def lease(pace: RedisPace) -> Lease:
    """Return the second lease of a store, which the script's cache has already."""
    store = pace.open()
    try:
        await store.lease("a", 1, 0.0)
        return await store.lease("b", 100, 0.0)
    finally:
        await store.close()


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[tuple[str, list[asyncio.StreamWriter]]]:
    """Answer everything with these bytes, or hang up; yield the address, and the connections."""
    connections = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        with closing(writer):
            while answer and await reader.read(65536):
                writer.write(answer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", connections


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
            # The error does not show a password that is not encoded.
            "redis://me:s3cr/et@localhost",
            "redis://me:12#s3cret@localhost",
            "redis://me:12?s3cret@localhost",
            "http://me:s3cret@localhost",
        ],
    )
    def test_an_invalid_url_is_an_error_without_it(self, url: str) -> None:
        with pytest.raises(BctrlConfigError, match="invalid url_or_client") as raised:
            RedisPace(url, rate=200)
        assert raised.value.argument == "url_or_client"
        assert "s3cr" not in f"{raised.value} {raised.value!r}"
        assert raised.value.__cause__ is None

    @pytest.mark.parametrize("other", [None, b"redis://localhost", redis.Redis()])
    def test_anything_else_is_an_error(self, other: Any) -> None:  # noqa: ANN401 - invalid.
        expected = "expected a URL or a client of redis.asyncio, not "
        with pytest.raises(BctrlConfigError, match=expected):
            RedisPace(other, rate=200)

    @pytest.mark.parametrize("name", ["", "{a}", "a\n", "ä", "x" * 101, None])
    def test_an_invalid_name_is_an_error(self, name: str) -> None:
        with pytest.raises(BctrlConfigError, match="invalid name"):
            RedisPace("redis://localhost", rate=200, name=name)

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://me:s3cret@localhost:6380/1", "redis://localhost:6380/1"),
            ("rediss://:s3%2Fcr@et@redis.internal", "rediss://redis.internal"),
            ("redis://localhost/0?username=me&password=s3cret", "redis://localhost/0"),
            ("unix://me:s3cret@/run/redis.sock?db=1", "unix:///run/redis.sock"),
        ],
    )
    def test_a_repr_does_not_show_the_password(self, url: str, shown: str) -> None:
        pace = RedisPace(url, rate=200, name="prod")
        assert repr(pace) == f"RedisPace({shown!r}, rate=200, name='prod')"
        copied = pickle.loads(pickle.dumps(pace))  # noqa: S301 - our own.
        assert vars(copied) == vars(pace)

    async def test_a_pace_with_a_client_shows_its_class_and_cannot_be_pickled(self) -> None:
        pace = RedisPace(Redis(), rate=200)
        assert repr(pace) == "RedisPace(<Redis>, rate=200, name='default')"
        with pytest.raises(BctrlConfigError, match=r"cannot be pickled\. Pass the URL"):
            pickle.dumps(pace)


class TestClients:
    @pytest.mark.parametrize("decodes", [False, True])
    async def test_a_borrowed_client_may_decode_answers_and_is_not_closed(
        self, server: RedisServer, *, decodes: bool
    ) -> None:
        async with Redis.from_url(server.url, decode_responses=decodes) as client:
            leased = await lease(RedisPace(client, rate=200))
            pool = client.connection_pool
            assert [connection.is_connected for connection in pool._available_connections] == [True]
        assert (leased.slots, leased.members) == (5, 2)
        assert type(leased.delay) is float

    @pytest.mark.parametrize("options", ["", "?retry_on_timeout=true"])
    async def test_a_server_that_answers_nothing_is_asked_once(self, options: str) -> None:
        """Fault: redis-py repeats a command, in some versions ten times: each is a lease."""
        async with answering(b"") as (address, connections):
            with pytest.raises(redis.ConnectionError):
                await lease(RedisPace(f"redis://{address}{options}", rate=200))
        assert len(connections) == 1

    def test_a_pace_may_be_used_in_one_loop_after_another(self, server: RedisServer) -> None:
        pace = RedisPace(server.url, rate=200)
        assert [asyncio.run(lease(pace)).members for _ in range(2)] == [2, 2]

    async def test_a_connection_that_the_server_closed_while_it_was_idle_is_made_again(
        self, server: RedisServer
    ) -> None:
        store = RedisPace(server.url, rate=200).open()
        await store.lease("a", 1, 0.0)
        async with Redis.from_url(server.url) as admin:
            await admin.client_kill_filter(skipme=True)
            while len(await admin.client_list()) > 1:
                await asyncio.sleep(0)
        assert (await store.lease("b", 1, 0.0)).members == 2
        await store.close()

    @pytest.mark.parametrize("program", SERVERS)
    async def test_a_socket_a_database_and_a_protocol_of_a_url_are_used(
        self, program: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "redis.sock"
        with redis_server(program, "--unixsocket", str(path)) as server:
            pace = RedisPace(f"unix://{path}?db=1&protocol=3", rate=200)
            assert (await lease(pace)).members == 2
            # The members of the same name in another database.
            assert (await lease(RedisPace(server.url, rate=200))).members == 2
            async with Redis.from_url(server.url, db=1) as client:
                assert len(await client.keys()) == 2

    async def test_a_cluster_keeps_the_keys_in_one_slot(self) -> None:
        with redis_server(SERVER, "--cluster-enabled", "yes") as server:
            await execute(server.url, "CLUSTER ADDSLOTSRANGE", 0, 16383)
            async with Redis.from_url(server.url) as client:
                # A server waits for two seconds before it joins a cluster.
                while (await client.cluster("INFO"))["cluster_state"] != "ok":
                    await asyncio.sleep(0.01)
            async with RedisCluster.from_url(server.url) as cluster:
                assert (await lease(RedisPace(cluster, rate=200, name="prod"))).slots == 5

    async def test_a_user_needs_the_permissions_of_the_guide(self, server: RedisServer) -> None:
        (rules,) = re.findall("^ACL SETUSER pace (.*)$", GUIDE.read_text("utf-8"), re.MULTILINE)
        await execute(
            server.url, "ACL SETUSER", "pace", *rules.replace("PASSWORD", "s3cret").split()
        )
        url = server.url.replace("//", "//pace:s3cret@")
        assert (await lease(RedisPace(url, rate=200, name="prod"))).slots == 5
        with pytest.raises(NoPermissionError):
            await execute(url, "KEYS", "*")


class TestRefusals:
    """Fault: each process went on with the whole rate, as if the server were away."""

    @pytest.mark.parametrize(
        ("database", "command", "problem"),
        [
            (0, "ACL SETUSER default -hset", "ACL failure"),
            (0, "REPLICAOF 127.0.0.1 1", "ReadOnlyError"),
            (0, "SET bctrl-async:{default}:schedule text", "WRONGTYPE"),
            (99, "PING", "DB index"),
            (0, "ACL SETUSER default resetpass", "AuthenticationError"),
        ],
    )
    async def test_a_server_that_cannot_keep_the_pace_is_an_error(
        self, server: RedisServer, database: int, command: str, problem: str
    ) -> None:
        await execute(server.url, *command.split())
        url = f"redis://default:s3cret@127.0.0.1:{server.port}/{database}"
        with pytest.raises(BctrlConfigError, match=f"as configured .{problem}"):
            await lease(RedisPace(url, rate=200))

    @pytest.mark.parametrize(
        ("scheme", "answer", "is_error"),
        [
            ("redis", b"HTTP/1.1 400 Bad Request\r\n\r\n", True),
            ("rediss", b"HTTP/1.1 400 Bad Request\r\n\r\n", True),
            ("redis", b"-READONLY You can't write against a read only replica.\r\n", True),
            # Redis 6.2 puts the error within a script into another one.
            ("redis", b"-ERR Error running script: 15: -READONLY You can't write\r\n", True),
            ("redis", b"-ERR Error running script: 15: The user can't run this command\r\n", True),
            # These are away for a while.
            ("redis", b"-LOADING Redis is loading the dataset in memory\r\n", False),
            ("redis", b"-ERR unknown command 'AUTH', with args: 's3cret'\r\n", False),
        ],
    )
    async def test_another_kind_of_server_is_an_error_without_the_password(
        self, scheme: str, answer: bytes, *, is_error: bool
    ) -> None:
        async with answering(answer) as (address, _):
            pace = RedisPace(f"{scheme}://:s3cret@{address}", rate=200)
            with pytest.raises((BctrlConfigError, redis.RedisError)) as raised:
                await lease(pace)
        assert isinstance(raised.value, BctrlConfigError) is is_error
        if is_error:
            assert "Check the scheme, user, password and database" in str(raised.value)
            assert "s3cret" not in f"{raised.value}{raised.value!r}"
