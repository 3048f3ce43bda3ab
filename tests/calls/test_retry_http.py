"""Retries and cancellation of `stop_runtime` over real connections."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime
from unittest.mock import Mock

import aiohttp
import pytest
from support.helpers import (
    add_runtimes,
    no_threads,
    pass_time,
    until,
    wait_for_requests,
)
from support.loops import package_of
from support.runtimes import RUNTIME
from support.servers import answering, emulator_in_a_thread, http_answer, served
from support.wire_faults import WireEmulator, WireFault
from test_observer import Recorder

from bctrl_async import (
    BctrlApiError,
    BctrlNetworkError,
    BctrlSession,
    BctrlTimeoutError,
    RetryPolicy,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply

GOOD = http_answer("200 OK", RUNTIME)


async def test_a_stale_keep_alive_connection_is_replaced(
    pauses: list[float],
) -> None:
    """Fault: a POST on a connection just closed is not resent (aiohttp#6138)."""
    async with (
        WireEmulator(port=0, faults={WireFault.CLOSE_KEPT_ALIVE: 1.0}) as emulator,
        BctrlSession(emulator.api_key, base_url=emulator.url) as session,
    ):
        for target in add_runtimes(emulator, 20):
            await session.stop_runtime(*target)
    # A request on a closed connection was retried after a short back-off.
    assert all(delay <= 0.001 for delay in pauses)


async def test_a_failure_costs_an_attempt(pauses: list[float]) -> None:
    async with served(http_answer("500 X")) as session:
        with pytest.raises(BctrlApiError) as caught:
            await session.stop_runtime("ws-1", "crm")
        assert (caught.value.attempts, len(pauses)) == (4, 3)
        with pytest.raises(BctrlApiError) as caught:
            await session.stop_runtime("ws-1", "crm", retry=RetryPolicy(attempts=2))
    assert (caught.value.attempts, caught.value.may_have_stopped) == (2, True)


@pytest.mark.parametrize(
    ("status", "header", "least"),
    [
        ("429", "Retry-After: 30", 30.0),
        ("503", "retry-after-ms: 2500", 2.5),
        ("429", "Retry-After: Thu, 01 Jan 2026 00:00:45 GMT", 45.0),
    ],
)
async def test_retry_after_is_a_minimum_delay(
    status: str,
    header: str,
    least: float,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault: Retry-After-ms is compared as str to int (vendor's SDK 0.3.0)."""
    clock = Mock(now=lambda _: datetime(2026, 1, 1, tzinfo=UTC))
    monkeypatch.setattr("bctrl_async._http.transport.datetime", clock)
    async with served(
        answering(http_answer(f"{status} X", b"", header), GOOD)
    ) as session:
        await session.stop_runtime("ws-1", "crm")
    [delay] = pauses
    assert least <= delay <= least + 5.0


@pytest.mark.moves_clock
@pytest.mark.parametrize(("seconds", "limit"), [(60.0, "54s"), (2e6, "20d20h")])
async def test_nothing_is_sent_if_connecting_times_out(
    seconds: float, limit: str
) -> None:
    """Fault: the limits of a short and of a long timeout were 9e-05 s and 1.8e+06 s."""
    # A listener with a full backlog: the kernel drops other SYNs, so connecting hangs.
    with socket.socket() as listener, ExitStack() as fillers:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        host, port = listener.getsockname()
        for _ in range(4):
            filler = fillers.enter_context(socket.socket())
            filler.settimeout(0)
            filler.connect_ex((host, port))
        once = RetryPolicy(attempts=1)
        url = f"http://{host}:{port}"
        async with BctrlSession(
            "k", base_url=url, retry=once, timeout=seconds
        ) as session:
            stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
            for _iteration in range(100):
                await asyncio.sleep(0)
            # It is more than the limit to connect, and less than the attempt's.
            pass_time(0.95 * seconds)
            with pytest.raises(
                BctrlTimeoutError, match=f"no connection within {limit}[.]"
            ) as caught:
                await stopping
    assert caught.value.may_have_stopped is False


@pytest.mark.parametrize("is_borrowed", [False, True])
async def test_a_lookup_that_gets_no_thread_is_a_failed_attempt(
    emulator: Emulator, *, is_borrowed: bool
) -> None:
    """Fault: a RuntimeError of Python left the call, and ended a bulk stop."""
    if package_of(asyncio.get_running_loop()) == "uvloop":
        pytest.skip("its threads look up hosts, and it aborts if they cannot start")
    url = emulator.url.replace("127.0.0.1", "localhost")
    retry = RetryPolicy(attempts=2, base=0.001, cap=0.001)
    async with aiohttp.ClientSession() as http:
        borrowed = http if is_borrowed else None
        async with BctrlSession(
            "emulator-key", base_url=url, retry=retry, http=borrowed
        ) as session:
            with no_threads():
                with pytest.raises(BctrlNetworkError, match="no thread") as caught:
                    await session.stop_runtime("ws-1", "crm")
                report = await session.stop_runtimes([("ws-1", "crm")])
            await session.stop_runtime("ws-1", "crm")

    # It cannot be known what a borrowed pool has sent.
    result = StopResult.UNKNOWN if is_borrowed else StopResult.NOT_SENT
    assert (caught.value.attempts, caught.value.may_have_stopped) == (2, is_borrowed)
    assert report.counts == {result: 1}


@pytest.mark.moves_clock
async def test_a_timeout_error_says_that_the_runtime_may_have_stopped(
    emulator: Emulator, session: BctrlSession
) -> None:
    """Fault: timeouts leak as the HTTP library's own exception (the vendor's SDK)."""
    emulator.inject(Fault.HANG, Fault.HANG)
    retry = RetryPolicy(attempts=2, base=0.001)
    stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm", retry=retry))
    for attempt in (1, 2):
        await wait_for_requests(emulator, attempt)
        pass_time(60)
    with pytest.raises(TimeoutError, match="no response within 1m") as caught:
        await stopping
    assert isinstance(caught.value, BctrlTimeoutError)
    assert (caught.value.attempts, caught.value.may_have_stopped) == (2, True)


@pytest.mark.moves_clock
async def test_a_body_that_drips_too_slowly_is_a_timeout_with_status_200() -> None:
    recorder = Recorder()
    async with (
        WireEmulator(port=0, faults={WireFault.SLOW_DRIP: 1.0}) as emulator,
        BctrlSession(
            emulator.api_key, base_url=emulator.url, observer=recorder
        ) as session,
    ):
        [target] = add_runtimes(emulator, 1)
        stopping = asyncio.create_task(session.stop_runtime(*target))
        await until(lambda: "answered 200" in recorder.events)
        pass_time(60)
        with pytest.raises(
            BctrlTimeoutError, match="the body took more than 1m"
        ) as caught:
            await stopping
    assert (caught.value.status, caught.value.attempts) == (200, 1)
    assert caught.value.may_have_stopped


async def test_backing_off_holds_no_connection_slot() -> None:
    # The Retry-After of a 500 holds back its own call alone.
    answers = answering(http_answer("500 X", b"", "Retry-After: 30"), GOOD)
    async with served(answers, max_connections=1) as session:
        waiting = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await until(lambda: session.stats.waiting)
        await session.stop_runtime("ws-1", "crm")
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert session.stats.attempts == 2


async def tasks() -> set[asyncio.Task[object]]:
    await asyncio.sleep(0)
    return asyncio.all_tasks()


@asynccontextmanager
async def session_that_leaves_no_task(
    emulator: Emulator, max_connections: int
) -> AsyncIterator[BctrlSession]:
    """Yield a session; then check that it has no task, and a slot for a stop."""
    before = await tasks()
    async with BctrlSession(
        "emulator-key",
        base_url=emulator.url,
        max_connections=max_connections,
        retry=RetryPolicy(base=1000.0, cap=1000.0),
    ) as session:
        yield session
        assert await tasks() == before
        # An aborted connection must not be used again.
        assert (await session.stop_runtime("ws-1", "r1")).alias == "r1"
    assert await tasks() == before


@pytest.mark.parametrize("fault", [Fault.HANG, WireFault.SLOW_DRIP, Reply(503)])
async def test_cancelling_a_request_or_a_back_off_frees_the_slot(
    fault: Fault | WireFault | Reply,
) -> None:
    with emulator_in_a_thread() as emulator:
        if isinstance(fault, WireFault):
            emulator.wire_faults["r0"] = fault
        else:
            emulator.inject(fault)
        async with session_that_leaves_no_task(emulator, 1) as session:
            stopping = asyncio.create_task(session.stop_runtime("ws-1", "r0"))
            await until(lambda: emulator.received["ws-1", "r0"])
            if isinstance(fault, Reply):
                await until(lambda: session.stats.waiting)
            stopping.cancel()
            await asyncio.wait([stopping])
            assert stopping.cancelled()
        assert emulator.received["ws-1", "r0"] == 1


@pytest.mark.parametrize("steps", range(0, 12, 2))
async def test_cancelling_after_any_number_of_steps_leaves_the_session_usable(
    steps: int,
) -> None:
    """A stop can be cancelled at each of its awaits, connecting included."""
    with emulator_in_a_thread() as emulator:
        async with session_that_leaves_no_task(emulator, 2) as session:
            stops = [
                asyncio.create_task(session.stop_runtime("ws-1", "r0"))
                for _ in range(4)
            ]
            for _ in range(steps):
                await asyncio.sleep(0)
            for stop in stops:
                stop.cancel()
            await asyncio.gather(*stops, return_exceptions=True)
