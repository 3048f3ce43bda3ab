"""Helpers shared by the tests: targets to stop, waits, scenarios and checks."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from bctrl_async import BctrlSession, StopBatch, StopResult
from bctrl_async.bulk._run import Run
from bctrl_async.emulator import Emulator
from support.leaks import bulk_tasks

Connect = Callable[..., BctrlSession]
"""The type of the fixture `connect`."""

BOUND = 50.0
"""Seconds after which a test is taken to hang: a busy machine needs many, and a request
that is never answered 60."""


def add_runtimes(emulator: Emulator, count: int) -> list[tuple[str, str]]:
    """Add active runtimes `r0`, `r1`, … to workspace `ws-1`; return them as targets."""
    targets = [("ws-1", f"r{number}") for number in range(count)]
    for target in targets:
        emulator.add_runtime(*target)
    return targets


@dataclass
class Bulk:
    """Bulk stops of the runtimes `r0`, `r1`, … of an emulator, by one session."""

    emulator: Emulator
    session: BctrlSession

    def stop(self, count: int, **options: Any) -> StopBatch:  # noqa: ANN401 - `stop_runtimes` has them.
        """Make a bulk stop of so many new runtimes."""
        return self.session.stop_runtimes(add_runtimes(self.emulator, count), **options)

    async def started(self, batch: StopBatch, requests: int) -> asyncio.Task[None]:
        """Await a bulk stop in a task; return it once there were so many requests."""
        return await started(batch, self.emulator, requests)


async def until(happened: Callable[[], object]) -> None:
    """Wait until something has happened."""
    async with asyncio.timeout(BOUND):
        while not happened():
            await asyncio.sleep(0.001)


async def wait_for_requests(emulator: Emulator, count: int) -> None:
    """Wait until an emulator has received this many requests."""
    async with asyncio.timeout(BOUND):
        while len(emulator.requests) < count:
            await asyncio.sleep(0)


async def wait_for_line(stream: asyncio.StreamReader | None, text: str) -> str:
    """Read what a process prints up to a line that has this text; return the line."""
    assert stream is not None
    async with asyncio.timeout(BOUND):
        while text not in (line := (await stream.readline()).decode()):
            # It returns at once, for ever, at the end of the stream.
            assert line, f"no line has {text!r}"
    return line


def pass_time(seconds: float) -> None:
    """Let the clock of the running loop jump ahead, and due timers fire next."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, asyncio.BaseEventLoop):
        raise TypeError("this loop's clock cannot be moved: mark the test moves_clock")
    clock = loop.time
    loop.time = lambda: clock() + seconds  # type: ignore[method-assign]


@contextmanager
def counted_turns() -> Iterator[Callable[[], int]]:
    """Count the turns of the loop in a block; yield a function that returns them."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    yield lambda: turns
    counting.cancel()


async def await_batch(batch: StopBatch) -> None:
    """Await a bulk stop, as the coroutine of a task."""
    await batch


async def read_all(batch: StopBatch) -> None:
    """Enter a bulk stop and read its outcomes, as the coroutine of a task."""
    async with batch:
        [outcome async for outcome in batch]


async def started(
    batch: StopBatch,
    emulator: Emulator,
    requests: int,
    run: Callable[[StopBatch], Coroutine[object, object, None]] = await_batch,
) -> asyncio.Task[None]:
    """Await a bulk stop in a task; return it once there are so many requests."""
    running = asyncio.create_task(run(batch))
    await wait_for_requests(emulator, requests)
    return running


def run_of(batch: StopBatch) -> Run:
    """Return the run of a bulk stop."""
    return batch._run


# They are below the ports that Linux gives to clients. A client that calls a dead
# server of its own range again and again is connected to itself in the end, and other
# clients could take the port.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """Return a free port on loopback, for a server that starts there again."""
    # The tests of all processes start with the same seed.
    for port in random.SystemRandom().sample(_PORTS, 20):
        with socket.socket() as free, suppress(OSError):
            # Connections of a server that ended do not matter to the next server.
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("none of 20 ports is free")


@contextmanager
def unused_url() -> Iterator[str]:
    """Yield a URL at which connections are refused."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@contextmanager
def no_threads() -> Iterator[None]:
    """Let no thread start, as at a limit of pids: no machine has so large a stack."""
    before = threading.stack_size(1 << 62)
    try:
        yield
    finally:
        threading.stack_size(before)


def assert_conserved(batch: StopBatch, emulator: Emulator) -> None:
    """Check that each target has one outcome, and that the run left nothing behind."""
    report = batch.report
    assert report.counts.total() == report.total == batch.read
    assert len({outcome.index for outcome in report.failures}) == len(report.failures)
    for outcome in report.failures:
        if outcome.result is StopResult.NOT_SENT:
            assert emulator.received[outcome.target] == 0
    assert bulk_tasks() == set()
    assert batch.progress.in_flight == 0


async def new_poller(batch: StopBatch) -> asyncio.Task[None]:
    """Return the first poller of a run, which has not taken its first step."""
    run = run_of(batch)
    # An eager poller is never seen before its first step.
    async with asyncio.timeout(BOUND):
        while not run._is_poller_starting:
            await asyncio.sleep(0)
    return list(run._tasks)[-1]
