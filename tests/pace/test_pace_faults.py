"""Stops that go on while the store of their shared pace fails, with real stores and sockets.

`test_leases.py` has the exact bounds on time, with a store in memory and virtual time.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path

import pytest
from helpers import BOUND, Connect, add_runtimes, unused_url, wait_for_requests
from redis.asyncio import Redis
from redis_server import SERVERS, RedisServer, redis_server

from bctrl_async import BctrlConfigError, BctrlSession, StopReport
from bctrl_async.emulator import Emulator
from bctrl_async.pace import FilePace, Pace
from bctrl_async.redis import RedisPace

AWAY = "the shared pace cannot be asked"
BACK = "the shared pace is used again"
RATE = 200.0
"""Stops a second, which go on for as long as a test waits for a warning."""

needs_server = pytest.mark.skipif(not SERVERS, reason="neither Redis nor Valkey is installed")


@pytest.fixture(params=SERVERS, ids=os.path.basename)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with redis_server(request.param) as running:
        yield running


class Warnings:
    """The warnings of the package, without their reasons."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        caplog.set_level(logging.WARNING, "bctrl_async")

    @property
    def texts(self) -> list[str]:
        return [r.getMessage() for r in self._caplog.records if r.name.startswith("bctrl_async")]

    @property
    def kinds(self) -> list[str]:
        return [next((kind for kind in (AWAY, BACK) if kind in text), text) for text in self.texts]

    def assert_alternate(self) -> None:
        """Assert a warning at each begin and end; on a slow machine there may be further ones."""
        assert self.kinds == ([AWAY, BACK] * len(self.kinds))[: len(self.kinds)]

    async def wait_for(self, kind: str) -> None:
        async with asyncio.timeout(BOUND):
            while kind not in self.kinds:
                await asyncio.sleep(0.005)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Warnings:
    return Warnings(caplog)


class Stops:
    """A bulk stop that goes on until the test ends it."""

    def __init__(self, emulator: Emulator, session: BctrlSession) -> None:
        self._emulator = emulator
        self._is_over = asyncio.Event()
        self._count = 0
        self._batch = session.stop_runtimes(self._targets())
        self._task = asyncio.create_task(self._run())

    async def _targets(self) -> AsyncIterator[tuple[str, str]]:
        while not self._is_over.is_set():
            target = ("ws-1", f"r{self._count}")
            self._emulator.add_runtime(*target)
            self._count += 1
            yield target

    async def _run(self) -> StopReport:
        return await self._batch

    async def more(self, count: int) -> None:
        """Wait until the server has received this many more requests."""
        async with asyncio.timeout(BOUND):
            await wait_for_requests(self._emulator, len(self._emulator.requests) + count)

    async def end(self) -> None:
        """End it, and compare its outcomes with the emulator's state."""
        self._is_over.set()
        report = await self._task
        assert report.ok
        assert report.counts == {"stopped": self._count}
        assert_all_stopped(self._emulator, self._count)


def assert_all_stopped(emulator: Emulator, count: int) -> None:
    assert len(emulator.requests) == count
    assert {emulator.status("ws-1", f"r{number}") for number in range(count)} == {"stopped"}


@asynccontextmanager
async def stopping(emulator: Emulator, connect: Connect, pace: Pace) -> AsyncIterator[Stops]:
    """Begin a bulk stop, and end it with the block."""
    async with connect(pace=pace) as session:
        stops = Stops(emulator, session)
        await stops.more(20)
        yield stops
        await stops.end()


class TestServer:
    @pytest.mark.parametrize(
        "failure",
        [(RedisServer.kill, RedisServer.restart), (RedisServer.suspend, RedisServer.resume)],
        ids=["killed, and empty when it comes back", "hung"],
    )
    async def test_a_server_that_fails_for_a_while_is_used_again(
        self,
        emulator: Emulator,
        connect: Connect,
        server: RedisServer,
        warnings: Warnings,
        *,
        failure: tuple[Callable[[RedisServer], None], Callable[[RedisServer], None]],
    ) -> None:
        fail, mend = failure
        async with stopping(emulator, connect, RedisPace(server.url, rate=RATE)) as stops:
            fail(server)
            await warnings.wait_for(AWAY)
            await stops.more(20)
            await asyncio.to_thread(mend, server)
            await warnings.wait_for(BACK)
            await stops.more(20)

        warnings.assert_alternate()

    async def test_a_server_that_was_never_there_is_a_warning(
        self, emulator: Emulator, connect: Connect, warnings: Warnings
    ) -> None:
        with unused_url() as url:
            pace = RedisPace(url.replace("http", "redis"), rate=RATE)
            async with stopping(emulator, connect, pace):
                pass

        assert warnings.kinds == [AWAY]

    @pytest.mark.usefixtures("patient")
    async def test_a_server_that_does_not_know_auth_is_a_warning_without_the_password(
        self, emulator: Emulator, connect: Connect, warnings: Warnings
    ) -> None:
        """Fault: Redis quotes the arguments of an unknown command, and the warning quotes Redis."""
        answer = b"-ERR unknown command 'AUTH', with args beginning with: 's3cret' \r\n"
        async with answering(answer) as url:
            pace = RedisPace(url.replace("//", "//:s3cret@"), rate=RATE)
            async with stopping(emulator, connect, pace):
                pass

        assert warnings.kinds == [AWAY]
        assert "cannot be asked (ResponseError):" in warnings.texts[0]

    @needs_server
    @pytest.mark.usefixtures("patient")
    async def test_a_password_that_is_changed_meanwhile_is_a_warning_without_it(
        self, emulator: Emulator, connect: Connect, server: RedisServer, warnings: Warnings
    ) -> None:
        async with Redis.from_url(server.url) as admin:
            rule = ("ACL SETUSER", "pace", "on", ">s3cret", "~*", "+@all")
            await admin.execute_command(*rule)  # type: ignore[no-untyped-call]
            url = f"redis://pace:s3cret@127.0.0.1:{server.port}"
            async with stopping(emulator, connect, RedisPace(url, rate=RATE)) as stops:
                await admin.execute_command("ACL DELUSER", "pace")  # type: ignore[no-untyped-call]
                await warnings.wait_for(AWAY)
                await stops.more(20)

        assert warnings.kinds == [AWAY]
        assert "s3cret" not in warnings.texts[0]

    @pytest.mark.parametrize(
        "answer",
        [
            b"\x00\xff\x16\x03" * 100,
            b"*3\r\n:1\r\n$4\r\nzero\r\n:1\r\n",
            b"*3\r\n:1\r\n$1\r\n0\r\n:1000000000\r\n",
            b"-LOADING Redis is loading the dataset in memory\r\n",
            b"",
        ],
        ids=lambda answer: repr(answer[:12]),
    )
    async def test_a_server_that_is_not_a_usable_redis_is_a_warning(
        self, emulator: Emulator, connect: Connect, warnings: Warnings, answer: bytes
    ) -> None:
        async with (
            answering(answer) as url,
            stopping(emulator, connect, RedisPace(url, rate=RATE)),
        ):
            pass

        assert warnings.kinds == [AWAY]


@pytest.mark.usefixtures("patient")
class TestMisconfigured:
    """Stores that cannot be used as they are configured, for which nothing is sent."""

    @staticmethod
    async def assert_refused(
        emulator: Emulator, connect: Connect, pace: Pace, warnings: Warnings, problem: str
    ) -> None:
        target = ("ws-1", "crm")
        emulator.add_runtime(*target)
        async with connect(pace=pace) as session:
            for _ in range(2):
                with pytest.raises(BctrlConfigError, match=problem) as raised:
                    await session.stop_runtime(*target)
                assert (raised.value.attempts, raised.value.alias) == (0, "crm")
                assert "s3cret" not in f"{raised.value}{raised.value!r}"
            report = await session.stop_runtimes([target])
            assert report.counts == {"not_sent": 1}
        assert emulator.requests == []
        assert warnings.kinds == [text for text in warnings.texts if "ended early" in text]
        assert "s3cret" not in "".join(warnings.texts)

    @needs_server
    @pytest.mark.parametrize("user", ["pace:s3cret", "poor:s3cret"])
    async def test_a_user_that_the_server_refuses(
        self,
        emulator: Emulator,
        connect: Connect,
        server: RedisServer,
        warnings: Warnings,
        user: str,
    ) -> None:
        """Fault: each process went on with the whole rate, and a warning that nobody read."""
        async with Redis.from_url(server.url) as admin:
            rule = ("ACL SETUSER", "poor", "on", ">s3cret", "~*", "+evalsha")
            await admin.execute_command(*rule)  # type: ignore[no-untyped-call]
        pace = RedisPace(f"redis://{user}@127.0.0.1:{server.port}", rate=RATE)
        problem = r"cannot be used as configured \((Authentication|NoPermission)Error\)"
        await self.assert_refused(emulator, connect, pace, warnings, problem)

    @pytest.mark.parametrize(
        ("scheme", "answer"),
        [
            ("redis", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
            ("rediss", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
            ("redis", b"-READONLY You can't write against a read only replica.\r\n"),
            # Redis 6.2 puts the error within a script into another one.
            ("redis", b"-ERR Error running script: 15: -READONLY You can't write\r\n"),
            ("redis", b"-ERR Error running script: 15: The user can't run this command\r\n"),
        ],
    )
    async def test_another_kind_of_server(
        self, emulator: Emulator, connect: Connect, warnings: Warnings, scheme: str, answer: bytes
    ) -> None:
        async with answering(answer) as url:
            pace = RedisPace(url.replace("redis://", f"{scheme}://:s3cret@"), rate=RATE)
            problem = "Check the scheme, user, password and database of its URL"
            await self.assert_refused(emulator, connect, pace, warnings, problem)

    @pytest.mark.parametrize(
        ("make", "problem"),
        [
            (lambda path: path.write_text("ws-1,crm\n"), "is another file"),
            (lambda path: path.symlink_to("elsewhere"), "is not a regular file"),
            (Path.mkdir, "is not a regular file"),
            (lambda path: path.parent.rmdir(), "the folder of .* does not exist"),
        ],
        ids=["text", "link", "folder", "nowhere"],
    )
    async def test_a_path_that_became_another_one(
        self,
        emulator: Emulator,
        connect: Connect,
        warnings: Warnings,
        tmp_path: Path,
        *,
        make: Callable[[Path], object],
        problem: str,
    ) -> None:
        path = tmp_path / "folder" / "pace"
        path.parent.mkdir()
        pace = FilePace(path, rate=RATE)
        make(path)
        await self.assert_refused(emulator, connect, pace, warnings, problem)
        assert not (tmp_path / "elsewhere").exists()


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """Serve on loopback: answer everything with these bytes, or end the connection."""
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        with closing(writer):
            while answer and await reader.read(65536):
                writer.write(answer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file in another process, as one that is suspended during a lease."""
    program = f"""
import fcntl, sys
file = open({str(path)!r}, "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield
        process.kill()


def remove_folder(path: Path) -> None:
    # At once, for the session makes files in it.
    removed = path.parent.rename(path.parent.with_name("removed"))
    shutil.rmtree(removed)


async def wait_for_file(path: Path) -> None:
    async with asyncio.timeout(BOUND):
        while not await asyncio.to_thread(path.exists):
            await asyncio.sleep(0.005)


class TestFile:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        folder = tmp_path / "folder"
        folder.mkdir()
        return folder / "pace"

    async def test_a_file_that_is_locked_for_long_is_used_again(
        self, emulator: Emulator, connect: Connect, path: Path, warnings: Warnings
    ) -> None:
        async with stopping(emulator, connect, FilePace(path, rate=RATE)) as stops:
            with locked(path):
                await warnings.wait_for(AWAY)
                await stops.more(20)
            await warnings.wait_for(BACK)
            await stops.more(20)

        warnings.assert_alternate()

    @pytest.mark.usefixtures("patient")
    async def test_a_text_in_place_of_the_file_is_a_warning(
        self, emulator: Emulator, connect: Connect, path: Path, warnings: Warnings
    ) -> None:
        other = path.parent.with_name("other")
        other.mkdir()
        (other / path.name).write_text("This is a text.")
        async with stopping(emulator, connect, FilePace(path, rate=RATE)) as stops:
            remove_folder(path)
            other.rename(path.parent)
            await warnings.wait_for(AWAY)
            await stops.more(20)

        assert warnings.kinds == [AWAY]
        assert await asyncio.to_thread(path.read_text) == "This is a text."

    async def test_a_folder_that_is_made_again_is_used_again(
        self, emulator: Emulator, connect: Connect, path: Path, warnings: Warnings
    ) -> None:
        async with stopping(emulator, connect, FilePace(path, rate=RATE)) as stops:
            remove_folder(path)
            await warnings.wait_for(AWAY)
            path.parent.mkdir()
            await warnings.wait_for(BACK)
            await stops.more(20)

        warnings.assert_alternate()

    async def test_a_file_that_is_removed_is_made_again(
        self, emulator: Emulator, connect: Connect, path: Path, warnings: Warnings
    ) -> None:
        async with stopping(emulator, connect, FilePace(path, rate=RATE)) as stops:
            await wait_for_file(path)
            await asyncio.to_thread(path.unlink)
            await wait_for_file(path)
            await stops.more(20)

        warnings.assert_alternate()


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - Path.iterdir opens one itself.


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
class TestEnd:
    """Sessions that end while a request to their store hangs; a warning fails the test."""

    @pytest.fixture(autouse=True)
    def _close_to_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give up no store that is slow to close."""
        monkeypatch.setattr("bctrl_async.pace._leases._INTERVAL", BOUND)

    @pytest.fixture(params=["file", "redis"])
    def hung(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pace]:
        if request.param == "file":
            with locked(tmp_path / "pace"):
                yield FilePace(tmp_path / "pace", rate=RATE)
        elif not SERVERS:
            pytest.skip("neither Redis nor Valkey is installed")
        else:
            with redis_server(SERVERS[0]) as server:
                server.suspend()
                yield RedisPace(server.url, rate=RATE)

    @staticmethod
    async def stop_some(emulator: Emulator, session: BctrlSession) -> None:
        targets = add_runtimes(emulator, 5)
        assert (await session.stop_runtimes(targets)).counts == {"stopped": 5}

    async def test_closing_leaves_no_task_and_no_file(
        self, emulator: Emulator, connect: Connect, hung: Pace
    ) -> None:
        before, tasks = open_files(), asyncio.all_tasks()
        async with connect(pace=hung) as session:
            await self.stop_some(emulator, session)
        # The emulator's side of its connections.
        with suppress(TimeoutError):
            async with asyncio.timeout(BOUND):
                while asyncio.all_tasks() != tasks or open_files() != before:
                    await asyncio.sleep(0.005)

        assert asyncio.all_tasks() == tasks
        assert open_files() == before

    def test_the_end_of_the_loop_leaves_no_file(self, hung: Pace) -> None:
        async def main() -> BctrlSession:
            async with Emulator(port=0, api_key="emulator-key") as emulator:
                session = BctrlSession("emulator-key", base_url=emulator.url, pace=hung)
                await self.stop_some(emulator, session)
            return session

        before = open_files()
        session = asyncio.run(main())

        assert open_files() == before
        assert not session.closed

    @pytest.mark.parametrize("store", ["file", *map(os.path.basename, SERVERS[:1])])
    def test_a_pace_may_be_used_in_one_loop_after_another(self, store: str, tmp_path: Path) -> None:
        async def main(pace: Pace) -> None:
            async with (
                Emulator(port=0, api_key="emulator-key") as emulator,
                BctrlSession("emulator-key", base_url=emulator.url, pace=pace) as session,
            ):
                await self.stop_some(emulator, session)

        with ExitStack() as stack:
            if store == "file":
                pace: Pace = FilePace(tmp_path / "pace", rate=RATE)
            else:
                server = stack.enter_context(redis_server(SERVERS[0]))
                pace = RedisPace(server.url, rate=RATE)
            before = open_files()
            asyncio.run(main(pace))
            asyncio.run(main(pace))

            assert open_files() == before
