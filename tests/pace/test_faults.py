"""Real stores of a shared pace that fail, are far away, or hang while a session ends.

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
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, suppress
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest
from redis.asyncio import Redis
from support.helpers import BOUND, Connect, add_runtimes, until
from support.pacing import Member, MemoryPace
from support.redis_server import SERVER, SERVERS, RedisServer, delayed, redis_server

from bctrl_async import BctrlConfigError
from bctrl_async.emulator import Emulator
from bctrl_async.pace import FilePace, Pace, _file
from bctrl_async.redis import RedisPace

RATE = 200.0


@contextmanager
def killed(server: RedisServer) -> Iterator[None]:
    """Kill a server; it is empty when it comes back."""
    server.kill()
    yield
    server.restart()


@contextmanager
def suspended(server: RedisServer) -> Iterator[None]:
    server.suspend()
    yield
    server.resume()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file, as a process that is suspended during a request."""
    with path.open("ab") as file:
        flock(file, LOCK_EX)
        yield


@contextmanager
def without_folder(path: Path) -> Iterator[None]:
    # At once, for the session makes files in it.
    shutil.rmtree(path.parent.rename(path.parent.with_name("removed")))
    yield
    path.parent.mkdir()


@contextmanager
def hung_disk(path: Path) -> Iterator[list[str]]:
    """Let no request to a disk return; yield the paths of the requests."""
    paths = []
    is_back = threading.Event()
    open_file = _file._open

    def hang(name: str, flags: int) -> int:
        if name == str(path):
            paths.append(name)
            is_back.wait()
        return open_file(name, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_file, "_open", hang)
        try:
            yield paths
        finally:
            is_back.set()


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged about the pace."""
    records = [
        vars(record) for record in caplog.records if record.name == "bctrl_async.pace"
    ]
    return [record["bctrl.event"] for record in records]


async def assert_used_again(
    pace: Pace, outage: AbstractContextManager[None], caplog: pytest.LogCaptureFixture
) -> None:
    """Check that attempts go on, and that there is a warning at each start and end."""
    caplog.set_level(logging.WARNING, "bctrl_async.pace")
    member = Member(pace)
    running = asyncio.create_task(member.bulk(10**9))

    async def more() -> None:
        count = len(member.starts) + 20
        await until(lambda: len(member.starts) >= count)

    await more()
    with outage:
        await until(lambda: "pace_away" in events(caplog))
        await more()
    await until(lambda: "pace_back" in events(caplog))
    await more()
    running.cancel()
    await asyncio.wait([running])
    await member.close()
    # On a slow machine there may be more.
    seen = events(caplog)
    assert seen == (["pace_away", "pace_back"] * len(seen))[: len(seen)]


@pytest.mark.parametrize("program", SERVERS)
@pytest.mark.parametrize("outage", [killed, suspended])
async def test_a_server_that_fails_for_a_while_is_used_again(
    program: str,
    outage: Callable[[RedisServer], AbstractContextManager[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with redis_server(program) as server:
        async with Redis.from_url(server.url) as client:
            await assert_used_again(
                RedisPace(client, rate=RATE), outage(server), caplog
            )


@pytest.mark.parametrize("outage", [locked, without_folder, hung_disk])
async def test_a_file_that_cannot_be_used_for_a_while_is_used_again(
    tmp_path: Path,
    outage: Callable[[Path], AbstractContextManager[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "folder" / "pace"
    path.parent.mkdir()
    await assert_used_again(FilePace(path, rate=RATE), outage(path), caplog)


async def test_a_disk_that_hangs_gets_one_request_and_holds_up_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: each request took a thread, until none was left for DNS."""
    monkeypatch.setattr(_file, "PATIENCE", 0.01)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    pace = FilePace(tmp_path / "pace", rate=RATE)
    with hung_disk(tmp_path / "pace") as requests:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await pace.acquire(1)
        assert len(requests) == 1
        async with asyncio.timeout(BOUND):
            await asyncio.to_thread(os.getpid)


HANGS = """
import asyncio, os, threading
from bctrl_async.pace import FilePace, _file

open_file = _file._open
_file._open = lambda *_: threading.Event().wait()
_file.PATIENCE = 0.01
pace = FilePace("pace", rate=200)
try:
    asyncio.run(pace.acquire(1))
except TimeoutError:
    print("the disk hangs", flush=True)
if os.fork():
    os.wait()
else:
    _file._open = open_file
    _file.PATIENCE = 50.0
    asyncio.run(pace.acquire(1))
    print("its child has a slot", flush=True)
"""
"""A program that ends while its disk hangs, with a child whose disk is well."""


def test_a_process_can_fork_and_exit_while_its_disk_hangs(tmp_path: Path) -> None:
    """Fault: the threads of a loop are waited for, at its end and at the exit."""
    # A fork beside a thread is a warning since Python 3.12.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HANGS],
        cwd=tmp_path,
        capture_output=True,
        check=True,
        text=True,
        timeout=BOUND,
    )
    assert done.stdout.splitlines() == ["the disk hangs", "its child has a slot"]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("program", SERVERS)
async def test_a_server_that_is_far_away_is_not_taken_for_dead(
    program: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: an answer slower than a lease was dropped, or lost its slots."""
    with redis_server(program) as server:
        async with delayed(server, 0.025) as url, Redis.from_url(url) as client:
            member = Member(RedisPace(client, rate=RATE))
            await member.bulk(30)
            await member.close()
    assert events(caplog) == []


@pytest.mark.usefixtures("patient")
async def test_a_store_that_refuses_a_session_is_asked_once_and_nothing_is_sent(
    emulator: Emulator, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: each went on with the whole rate, and a warning that nobody read."""
    pace = MemoryPace(rate=RATE)
    pace.error = BctrlConfigError("wrong password", argument="rate")
    async with connect(rate=pace) as session:
        calls = [session.stop_runtime("ws-1", alias) for alias in ("crm", "mail")]
        first, second = await asyncio.gather(*calls, return_exceptions=True)
        report = await session.stop_runtimes([("ws-1", "crm")])
    # Each has its own error, which says what it was about.
    for error, alias in ((first, "crm"), (second, "mail")):
        assert isinstance(error, BctrlConfigError)
        assert (error.summary, error.argument) == ("wrong password", "rate")
        assert (error.attempts, error.alias) == (0, alias)
    assert report.counts == {"not_sent": 1}
    assert emulator.requests == []
    assert len(pace.calls) == 1
    assert "cannot be asked" not in caplog.text


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - Path.iterdir opens one itself.


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
@pytest.mark.parametrize("kind", ["file", SERVER])
async def test_closing_while_the_store_hangs_leaves_no_task_and_no_file(
    emulator: Emulator, connect: Connect, tmp_path: Path, kind: str
) -> None:
    with locked(tmp_path / "pace"), redis_server(SERVER) as server:
        server.suspend()
        before, tasks = open_files(), asyncio.all_tasks()
        async with AsyncExitStack() as stack:
            pace: Pace = FilePace(tmp_path / "pace", rate=RATE)
            if kind != "file":
                client = await stack.enter_async_context(Redis.from_url(server.url))
                pace = RedisPace(client, rate=RATE)
            session = await stack.enter_async_context(connect(rate=pace))
            targets = add_runtimes(emulator, 5)
            assert (await session.stop_runtimes(targets)).counts == {"stopped": 5}
        # The emulator's side of its connections.
        with suppress(TimeoutError):
            await until(lambda: asyncio.all_tasks() == tasks and open_files() == before)
        assert asyncio.all_tasks() == tasks
        assert open_files() == before
