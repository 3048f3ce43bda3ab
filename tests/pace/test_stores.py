"""One contract of `acquire` for every store: the file, and Redis or Valkey.

Their clocks stand still, and no wait takes time: it is recorded.
"""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import re
import resource
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from fcntl import LOCK_EX, LOCK_UN, flock
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
import redis
from redis.asyncio import Redis, RedisCluster
from support.helpers import BOUND
from support.redis_server import SERVER, SERVERS, redis_server

from bctrl_async import BctrlConfigError
from bctrl_async.pace import FilePace, Pace
from bctrl_async.redis import _RESERVE, RedisPace

RATE = 200.0
START = 1_800_000_000.123457
"""A time with as many digits as a real server's."""
GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "many-processes.md"


class Clock:
    """The clock of all processes, and the waits of what they acquired."""

    def __init__(self) -> None:
        self.now = START
        self.waits: list[float] = []

    async def acquire(self, pace: Pace, slots: int) -> float:
        """Acquire slots; return the seconds until the first of them."""
        await pace.acquire(slots)
        return self.waits[-1]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, sleep = Clock(), asyncio.sleep

    async def record(delay: float) -> None:
        clock.waits.append(delay)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", record)
    still = SimpleNamespace(monotonic=lambda: clock.now)
    for module in ("pace._file", "redis"):
        monkeypatch.setattr(f"bctrl_async.{module}.time", still)
    script = _RESERVE.replace("redis.call('TIME')", "{1800000000, 123457}")
    monkeypatch.setattr("bctrl_async.redis._RESERVE", script)
    # A machine that is busy must not make a store late.
    monkeypatch.setattr("bctrl_async.redis.PATIENCE", BOUND)
    monkeypatch.setattr("bctrl_async.pace._file.PATIENCE", BOUND)
    return clock


class FileStore:
    """Files of several paces in a folder."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock

    def pace(self, name: str = "one") -> Pace:
        """Return a pace, for another process as it were."""
        return FilePace(self._folder / name, rate=RATE)

    async def pass_time(self, seconds: float) -> None:
        self._clock.now += seconds

    async def clear(self) -> None:
        (self._folder / "one").unlink()


class RedisStore:
    """Keys of several paces in Redis."""

    def __init__(self, client: Redis, clock: Clock) -> None:
        # In redis-py the types of answers are unions.
        self.client: Any = client
        self._clock = clock
        # Tests share a server.
        self._prefix = uuid4().hex

    def pace(self, name: str = "one") -> Pace:
        return RedisPace(self.client, rate=RATE, name=f"{self._prefix}:{name}")

    @property
    def key(self) -> str:
        return f"bctrl-async:{self._prefix}:one"

    async def pass_time(self, seconds: float) -> None:
        self._clock.now += seconds
        await self.set_clock(seconds)

    async def set_clock(self, seconds: float) -> None:
        """Set the clock of the server ahead."""
        await self.client.hincrbyfloat(self.key, "last", -seconds)

    async def clear(self) -> None:
        await self.client.flushall()
        await self.client.script_flush()


Store = FileStore | RedisStore


@pytest.fixture(scope="module", params=["file", *SERVERS])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kind of store, or the URL of a server that is started once."""
    if request.param in SERVERS:
        with redis_server(request.param) as server:
            yield server.url
    else:
        yield request.param


@pytest.fixture
async def store(place: str, tmp_path: Path, clock: Clock) -> AsyncIterator[Store]:
    if place == "file":
        yield FileStore(tmp_path, clock)
    else:
        async with Redis.from_url(place) as client:
            yield RedisStore(client, clock)


def near(seconds: float) -> object:
    return pytest.approx(seconds, abs=1e-5)


class TestContract:
    async def test_slots_follow_each_other_and_are_lost_when_their_time_has_passed(
        self, store: Store, clock: Clock
    ) -> None:
        first, second = store.pace(), store.pace()
        assert await clock.acquire(first, 10) == 0.0
        assert await clock.acquire(second, 4) == near(10 / RATE)
        await store.pass_time(0.03)
        assert await clock.acquire(first, 1) == near(14 / RATE - 0.03)
        await store.pass_time(100.0)
        assert await clock.acquire(second, 10) == 0.0
        assert await clock.acquire(second, 1) == near(10 / RATE)

    async def test_no_slot_is_handed_out_twice(
        self, store: Store, clock: Clock
    ) -> None:
        await asyncio.gather(*(store.pace().acquire(2) for _ in range(20)))
        # A process that finds the file locked tries again after a millisecond.
        waits = sorted(wait for wait in clock.waits if wait != 0.001)
        assert waits == [near(2 * number / RATE) for number in range(20)]

    async def test_a_store_that_was_emptied_starts_anew(
        self, store: Store, clock: Clock
    ) -> None:
        """Fault: a pace whose file was deleted waited for another process."""
        pace = store.pace()
        await clock.acquire(pace, 10)
        await store.clear()
        assert await clock.acquire(pace, 10) == 0.0
        assert await clock.acquire(store.pace(), 10) == near(10 / RATE)

    async def test_two_names_do_not_meet(self, store: Store, clock: Clock) -> None:
        await clock.acquire(store.pace(), 10)
        assert await clock.acquire(store.pace("other"), 1) == 0.0

    async def test_a_request_that_is_cancelled_leaves_the_store_usable(
        self, store: Store
    ) -> None:
        pace = store.pace()
        for _ in range(5):
            request = asyncio.create_task(pace.acquire(1))
            await asyncio.sleep(0)
            request.cancel()
            await asyncio.wait([request])
        await pace.acquire(1)


@pytest.mark.parametrize("place", SERVERS, indirect=True)
class TestRedis:
    @pytest.mark.parametrize("seconds", [-3600.0, -0.1, 10.0, 3600.0])
    async def test_a_clock_that_is_set_frees_no_slot_that_was_handed_out(
        self, store: RedisStore, clock: Clock, seconds: float
    ) -> None:
        """Fault: a clock set ahead by 10 s gave twice the rate for a second."""
        paces = [store.pace() for _ in range(8)]
        for pace in paces:
            await clock.acquire(pace, 10)
        await store.set_clock(seconds)
        assert [await clock.acquire(pace, 10) for pace in paces] == [
            near(number * 10 / RATE) for number in range(8, 16)
        ]
        await store.pass_time(0.1)
        assert await clock.acquire(paces[0], 10) == near(160 / RATE - 0.1)

    async def test_a_key_does_not_remain_for_ever(self, store: RedisStore) -> None:
        await store.pace().acquire(1)
        assert 86_000 < await store.client.ttl(store.key) <= 86_400

    @pytest.mark.parametrize("decodes", [False, True])
    async def test_the_client_may_decode_answers_and_is_not_closed(
        self, place: str, clock: Clock, *, decodes: bool
    ) -> None:
        async with Redis.from_url(place, decode_responses=decodes) as client:
            name = f"decodes {decodes}"
            await RedisPace(client, rate=RATE, name=name).acquire(10)
            assert await clock.acquire(
                RedisPace(client, rate=RATE, name=name), 1
            ) == near(0.05)
            pool = client.connection_pool
            assert [
                connection.is_connected for connection in pool._available_connections
            ] == [True]

    async def test_a_user_needs_the_permissions_of_the_guide(
        self, store: RedisStore, place: str
    ) -> None:
        (rules,) = re.findall(
            "^ACL SETUSER pace (.*)$", GUIDE.read_text("utf-8"), re.MULTILINE
        )
        rules = rules.replace("PASSWORD", "s3cret").split()
        await store.client.execute_command("ACL SETUSER", "pace", *rules)
        async with Redis.from_url(place.replace("//", "//pace:s3cret@")) as client:
            await RedisPace(client, rate=RATE, name="prod").acquire(1)
            with pytest.raises(redis.exceptions.NoPermissionError):
                await client.keys()


@pytest.mark.parametrize("slots", [0, -1, 1.5, "2"])
async def test_slots_that_are_no_whole_number_from_1_are_an_error(
    store: Store, slots: object
) -> None:
    """Fault: a text ended the thread of a file's pace; its call gave TimeoutError."""
    with pytest.raises(BctrlConfigError, match="invalid slots"):
        await store.pace().acquire(cast("int", slots))


@pytest.mark.parametrize(
    ("client", "name"),
    [
        (Redis(host="redis.example"), "the shared pace at redis.example:6379"),
        (Redis(unix_socket_path="/run/redis"), "the shared pace"),
    ],
)
def test_a_pace_is_named_with_its_server(client: Redis, name: str) -> None:
    assert str(RedisPace(client, rate=RATE)) == name


async def test_a_cluster_keeps_a_pace(clock: Clock) -> None:
    with redis_server(SERVER, "--cluster-enabled", "yes") as server:
        async with Redis.from_url(server.url) as admin:
            client: Any = admin
            await client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            # A server waits for two seconds before it joins a cluster.
            while (await client.cluster("INFO"))["cluster_state"] != "ok":
                await asyncio.sleep(0.01)
        async with RedisCluster.from_url(server.url) as cluster:
            pace = RedisPace(cluster, rate=RATE, name="prod")
            await pace.acquire(10)
            assert await clock.acquire(pace, 1) == near(10 / RATE)


class TestRefusals:
    """Fault: each process went on with the whole rate, as if the server were away."""

    @pytest.mark.parametrize(
        ("database", "command", "problem"),
        [
            (0, "ACL SETUSER default -hset", "ACL failure"),
            (0, "REPLICAOF 127.0.0.1 1", "ReadOnlyError"),
            (0, "SET bctrl-async:default text", "WRONGTYPE"),
            (99, "PING", "DB index"),
            (0, "ACL SETUSER default resetpass", "AuthenticationError"),
        ],
    )
    @pytest.mark.parametrize("program", SERVERS)
    async def test_a_server_that_cannot_keep_the_pace_is_an_error(
        self, program: str, database: int, command: str, problem: str
    ) -> None:
        with redis_server(program) as server:
            async with Redis.from_url(server.url) as admin:
                await admin.execute_command(*command.split())  # type: ignore[no-untyped-call]  # redis.
            url = f"redis://default:s3cret@127.0.0.1:{server.port}/{database}"
            async with Redis.from_url(url) as client:
                with pytest.raises(BctrlConfigError, match=f"as configured .{problem}"):
                    await RedisPace(client, rate=RATE).acquire(1)

    @pytest.mark.parametrize(
        ("scheme", "answer", "is_error"),
        [
            ("redis", b"HTTP/1.1 400 Bad Request\r\n\r\n", True),
            ("rediss", b"HTTP/1.1 400 Bad Request\r\n\r\n", True),
            (
                "redis",
                b"-READONLY You can't write against a read only replica.\r\n",
                True,
            ),
            # Redis 6.2 puts the error within a script into another error.
            (
                "redis",
                b"-ERR Error running script: 15: -READONLY You can't write\r\n",
                True,
            ),
            (
                "redis",
                b"-ERR Error running script: 15: The user can't run this command\r\n",
                True,
            ),
            # These are away for a while.
            ("redis", b"-LOADING Redis is loading the dataset in memory\r\n", False),
            ("redis", b"-ERR unknown command 'AUTH', with args: 's3cret'\r\n", False),
        ],
    )
    async def test_another_kind_of_server_is_an_error_without_the_password(
        self, scheme: str, answer: bytes, *, is_error: bool
    ) -> None:
        async def serve(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            with closing(writer), suppress(ConnectionError):
                while await reader.read(65536):
                    writer.write(answer)

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with Redis.from_url(f"{scheme}://:s3cret@{address}") as client:
                with pytest.raises((BctrlConfigError, redis.RedisError)) as raised:
                    await RedisPace(client, rate=RATE).acquire(1)
        assert isinstance(raised.value, BctrlConfigError) is is_error
        if is_error:
            assert "Check the scheme, user, password and database" in str(raised.value)
            assert "s3cret" not in f"{raised.value}{raised.value!r}"

    @pytest.mark.parametrize("other", [None, "redis://localhost", redis.Redis()])
    def test_anything_but_a_client_for_asyncio_is_an_error(self, other: Any) -> None:  # noqa: ANN401 - invalid.
        with pytest.raises(
            BctrlConfigError, match="invalid client: expected a client of"
        ):
            RedisPace(other, rate=RATE)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond this size: the kernel writes a part, then fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def without_root() -> Iterator[None]:
    """Act as a user that permissions apply to."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


class TestFile:
    async def test_it_is_made_with_the_first_request_in_the_working_directory_and_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
    ) -> None:
        monkeypatch.chdir(tmp_path)
        relative = FilePace("pace", rate=RATE)
        assert os.listdir() == []  # noqa: PTH208 - only names.
        await relative.acquire(10)
        copied = pickle.loads(pickle.dumps(relative))  # noqa: S301 - our own.
        assert await clock.acquire(copied, 1) == near(10 / RATE)
        assert os.listdir() == ["pace"]  # noqa: PTH208 - only names.

    async def test_a_process_waits_for_another_one_that_has_it_locked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
    ) -> None:
        path = tmp_path / "pace"
        with path.open("wb") as file:
            flock(file, LOCK_EX)
            monkeypatch.setattr("bctrl_async.pace._file.PATIENCE", 0.01)
            with pytest.raises(TimeoutError):
                await FilePace(path, rate=RATE).acquire(1)
            monkeypatch.setattr("bctrl_async.pace._file.PATIENCE", BOUND)

            waiting = asyncio.create_task(FilePace(path, rate=RATE).acquire(1))
            count = len(clock.waits)
            while clock.waits[count:].count(0.001) < 2:
                await asyncio.sleep(0)
            flock(file, LOCK_UN)
            await waiting

    @pytest.mark.parametrize("is_new", [True, False])
    async def test_a_disk_that_is_full_is_an_error_and_keeps_the_schedule(
        self, tmp_path: Path, clock: Clock, *, is_new: bool
    ) -> None:
        """Fault: the file was emptied before its write: 2.4 times the rate."""
        pace = FilePace(tmp_path / "pace", rate=RATE)
        if not is_new:
            await pace.acquire(10)
        with full_disk(30), pytest.raises(OSError, match="File too large") as raised:
            await pace.acquire(10)
        assert raised.value.errno == errno.EFBIG
        assert await clock.acquire(pace, 10) == near(0.0 if is_new else 10 / RATE)

    @pytest.mark.parametrize("length", [0, 1, 17, 30, 1000])
    async def test_a_file_that_a_crash_has_cut_off_or_that_is_longer_starts_anew(
        self, tmp_path: Path, clock: Clock, length: int
    ) -> None:
        path = tmp_path / "pace"
        path.write_bytes((b"bctrl-async pace\n" + b"{} " * 1000)[:length])
        pace = FilePace(path, rate=RATE)
        assert await clock.acquire(pace, 10) == 0.0
        assert await clock.acquire(pace, 10) == near(10 / RATE)

    @pytest.mark.parametrize(
        ("occupy", "problem"),
        [
            (Path.mkdir, "Is a directory"),
            # Fault: a named pipe that nobody writes to hangs the session.
            (os.mkfifo, "not seekable"),
            # Fault: it makes the file of another user's choice.
            (lambda path: path.symlink_to("elsewhere"), "symbolic links"),
            # Fault: a mistyped path that overwrites a journal or a list.
            (lambda path: path.write_text("ws-1,crm\n"), "it is another file"),
            (lambda path: path.parent.rmdir(), "No such file or directory"),
        ],
        ids=["folder", "pipe", "link", "text", "nowhere"],
    )
    async def test_a_path_of_anything_else_is_an_error(
        self, tmp_path: Path, occupy: Callable[[Path], object], problem: str
    ) -> None:
        path = tmp_path / "folder" / "pace"
        path.parent.mkdir()
        occupy(path)
        with pytest.raises(
            BctrlConfigError, match=f"^the pace .* cannot be used: .*{problem}"
        ):
            await FilePace(path, rate=RATE).acquire(1)
        assert not path.is_file() or path.read_text() == "ws-1,crm\n"
        assert not path.with_name("elsewhere").exists()

    @pytest.mark.parametrize("mode", [None, 0o660])
    async def test_a_new_file_is_for_its_owner_alone(
        self, tmp_path: Path, mode: int | None
    ) -> None:
        """Fault: whoever could read it could lock it."""
        path = tmp_path / "pace"
        if mode is not None:
            path.touch()
            path.chmod(mode)

        await FilePace(path, rate=RATE).acquire(1)

        assert stat.S_IMODE(path.stat().st_mode) == (mode or 0o600)

    @pytest.mark.parametrize("path", ["x\0", "x\ud800", "n" * 300])
    async def test_a_name_that_no_file_can_have_is_an_error(self, path: str) -> None:
        with pytest.raises(BctrlConfigError, match=r"the pace .* cannot be used"):
            await FilePace(path, rate=RATE).acquire(1)

    @pytest.mark.parametrize(
        ("name", "mode"), [("pace", 0o755), ("new", 0o555), ("folder/pace", 0)]
    )
    def test_a_file_that_may_not_be_written_is_an_error(
        self, name: str, mode: int
    ) -> None:
        """Fault: each process went on with the whole rate, as if the file were away."""
        # Other users may not enter pytest's folders.
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "pace").touch(0o444)
            Path(folder).chmod(mode)
            with (
                without_root(),
                pytest.raises(BctrlConfigError, match="Permission denied"),
            ):
                asyncio.run(FilePace(f"{folder}/{name}", rate=RATE).acquire(1))
            Path(folder).chmod(0o755)
