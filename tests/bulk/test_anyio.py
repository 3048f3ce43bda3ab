"""anyio's cancellation ends a bulk stop, as asyncio's does.

anyio cancels a task again in every iteration of the loop until the task has left the scope, so
code that waits while it is cancelled must stop once there is nothing left to wait for.
"""

from __future__ import annotations

import asyncio
import faulthandler
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import aiohttp
import anyio
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from helpers import await_batch, wait_for_requests
from leaks import bulk_tasks
from servers import emulator_in_a_thread

from bctrl_async import BctrlSession, StopBatch, StopResult
from bctrl_async.emulator import Emulator, Fault

IN_FLIGHT = 4
TARGETS = [("ws-1", f"r{number}") for number in range(10)]

RunBatch = Callable[[StopBatch], Awaitable[object]]


@pytest.fixture(autouse=True)
def _no_endless_loop() -> Iterator[None]:
    """End the process if a loop spins for ever: no timeout within the loop could interrupt it."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def server() -> Iterator[Emulator]:
    """An emulator that answers none of the first requests."""
    with emulator_in_a_thread(*[Fault.HANG] * IN_FLIGHT) as emulator:
        yield emulator


@pytest.fixture
async def session(server: Emulator) -> AsyncIterator[BctrlSession]:
    async with BctrlSession(
        "emulator-key", base_url=server.url, max_connections=IN_FLIGHT
    ) as opened:
        yield opened


async def iterate_batch(batch: StopBatch) -> None:
    async with batch:
        async for _ in batch:
            pass


async def expire(scope: anyio.CancelScope, emulator: Emulator) -> None:
    await wait_for_requests(emulator, IN_FLIGHT)
    scope.deadline = anyio.current_time()


async def move_on_after(run: Awaitable[object], emulator: Emulator) -> None:
    with anyio.move_on_after(3600) as scope:
        expiring = asyncio.create_task(expire(scope, emulator))
        await run
    assert scope.cancelled_caught
    await expiring


async def failing_task_group(run: Awaitable[object], emulator: Emulator) -> None:
    async def fail() -> None:
        await wait_for_requests(emulator, IN_FLIGHT)
        raise LookupError

    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the block is the group.
        async with anyio.create_task_group() as group:
            group.start_soon(fail)
            await run
    assert [type(error) for error in caught.value.exceptions] == [LookupError]


@pytest.mark.parametrize("run_batch", [await_batch, iterate_batch])
@pytest.mark.parametrize("cancel", [move_on_after, failing_task_group])
async def test_cancelling_the_scope_ends_a_bulk_stop_with_every_target_recorded(
    session: BctrlSession,
    server: Emulator,
    cancel: Callable[[Awaitable[object], Emulator], Awaitable[None]],
    run_batch: RunBatch,
) -> None:
    batch = session.stop_runtimes(TARGETS)
    await cancel(run_batch(batch), server)

    assert bulk_tasks() == set()
    assert batch.report.counts == {StopResult.UNKNOWN: 4, StopResult.NOT_SENT: 6}
    assert len(server.requests) == IN_FLIGHT


async def test_an_on_outcome_that_waits_is_cancelled_with_the_scope(session: BctrlSession) -> None:
    async def wait(_: object) -> None:
        await anyio.sleep_forever()

    batch = session.stop_runtimes([("ws-1", "")], on_outcome=wait)
    with anyio.move_on_after(0.1):
        await batch

    assert bulk_tasks() == set()
    assert batch.report.counts == {StopResult.REJECTED: 1}


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """Serve an app with uvicorn on this loop."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    host, port = server.servers[0].sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        await running


async def test_a_bulk_stop_ends_when_the_client_of_its_streamed_response_disconnects(
    session: BctrlSession, server: Emulator
) -> None:
    app = FastAPI()
    batches: list[StopBatch] = []

    @app.post("/stop")
    async def stop() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            yield "begin\n"
            async with session.stop_runtimes(TARGETS) as batch:
                batches.append(batch)
                async for outcome in batch:
                    yield f"{outcome.index} {outcome.result}\n"

        return StreamingResponse(lines())

    async with serving(app) as url:
        async with aiohttp.ClientSession() as client, client.post(f"{url}/stop") as response:
            assert await response.content.readline() == b"begin\n"
            await wait_for_requests(server, IN_FLIGHT)
            response.close()
        while not batches or bulk_tasks():
            await asyncio.sleep(0.001)

    assert batches[0].report.counts == {StopResult.UNKNOWN: 4, StopResult.NOT_SENT: 6}
    assert len(server.requests) == IN_FLIGHT
