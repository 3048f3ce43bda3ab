"""Real stores of a shared pace that fail, refuse a session, or hang while it ends.

`test_leases_end.py` has the exact bounds on time, with a store in memory and virtual time.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest
from helpers import BOUND, Connect, add_runtimes, until
from pacing import Member, MemoryPace
from redis_server import SERVER, SERVERS, RedisServer, redis_server

from bctrl_async import BctrlConfigError, BctrlSession
from bctrl_async.emulator import Emulator
from bctrl_async.pace import FilePace, Pace
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
    """Lock a file, as a process that is suspended during a lease."""
    with path.open("ab") as file:
        flock(file, LOCK_EX)
        yield


@contextmanager
def without_folder(path: Path) -> Iterator[None]:
    # At once, for the session makes files in it.
    shutil.rmtree(path.parent.rename(path.parent.with_name("removed")))
    yield
    path.parent.mkdir()


Outage = Callable[..., AbstractContextManager[None]]
"""Lets a server or a file fail for as long as a block."""


class TestOutage:
    @staticmethod
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
            await until(lambda: "the shared pace cannot be asked" in caplog.text)
            await more()
        await until(lambda: "the shared pace is used again" in caplog.text)
        await more()
        running.cancel()
        await asyncio.wait([running])
        await member.close()
        # On a slow machine there may be more.
        records = [vars(each) for each in caplog.records if each.name == "bctrl_async.pace"]
        events = [record["bctrl.event"] for record in records]
        assert events == (["pace_away", "pace_back"] * len(events))[: len(events)]

    @pytest.mark.parametrize("program", SERVERS)
    @pytest.mark.parametrize("outage", [killed, suspended])
    async def test_a_server_that_fails_for_a_while_is_used_again(
        self, program: str, outage: Outage, caplog: pytest.LogCaptureFixture
    ) -> None:
        with redis_server(program) as server:
            pace = RedisPace(server.url, rate=RATE)
            await self.assert_used_again(pace, outage(server), caplog)

    @pytest.mark.parametrize("outage", [locked, without_folder])
    async def test_a_file_that_cannot_be_used_for_a_while_is_used_again(
        self, tmp_path: Path, outage: Outage, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "folder" / "pace"
        path.parent.mkdir()
        await self.assert_used_again(FilePace(path, rate=RATE), outage(path), caplog)


@pytest.mark.usefixtures("patient")
async def test_a_store_that_refuses_a_session_is_asked_once_and_nothing_is_sent(
    emulator: Emulator, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: each process went on with the whole rate, and a warning that nobody read."""
    pace = MemoryPace(rate=RATE)
    pace.error = BctrlConfigError("wrong password", argument="pace")
    async with connect(pace=pace) as session:
        calls = [session.stop_runtime("ws-1", alias) for alias in ("crm", "mail")]
        first, second = await asyncio.gather(*calls, return_exceptions=True)
        report = await session.stop_runtimes([("ws-1", "crm")])
    # Each has its own error, which says what it was about.
    for error, alias in ((first, "crm"), (second, "mail")):
        assert isinstance(error, BctrlConfigError)
        assert (error.summary, error.argument) == ("wrong password", "pace")
        assert (error.attempts, error.alias) == (0, alias)
    assert report.counts == {"not_sent": 1}
    assert emulator.requests == []
    assert len(pace.calls) == 1
    assert "cannot be asked" not in caplog.text


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - Path.iterdir opens one itself.


async def stop_some(emulator: Emulator, session: BctrlSession) -> None:
    targets = add_runtimes(emulator, 5)
    assert (await session.stop_runtimes(targets)).counts == {"stopped": 5}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
class TestEnd:
    """Sessions that end while a request to their store hangs; a warning fails the test."""

    @pytest.fixture(autouse=True)
    def _close_to_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give up no store that is slow to close."""
        monkeypatch.setattr("bctrl_async.pace._leases._INTERVAL", BOUND)

    @pytest.fixture(params=["file", SERVER])
    def hung(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pace]:
        if request.param == "file":
            with locked(tmp_path / "pace"):
                yield FilePace(tmp_path / "pace", rate=RATE)
        else:
            with redis_server(request.param) as server:
                server.suspend()
                yield RedisPace(server.url, rate=RATE)

    async def test_closing_leaves_no_task_and_no_file(
        self, emulator: Emulator, connect: Connect, hung: Pace
    ) -> None:
        before, tasks = open_files(), asyncio.all_tasks()
        async with connect(pace=hung) as session:
            await stop_some(emulator, session)
        # The emulator's side of its connections.
        with suppress(TimeoutError):
            await until(lambda: asyncio.all_tasks() == tasks and open_files() == before)

        assert asyncio.all_tasks() == tasks
        assert open_files() == before

    def test_the_end_of_the_loop_leaves_no_file(self, hung: Pace) -> None:
        async def main() -> BctrlSession:
            async with Emulator(port=0, api_key="emulator-key") as emulator:
                session = BctrlSession("emulator-key", base_url=emulator.url, pace=hung)
                await stop_some(emulator, session)
            return session

        before = open_files()
        session = asyncio.run(main())

        assert open_files() == before
        assert not session.closed
