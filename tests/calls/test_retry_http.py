"""Retries of `stop_runtime` over real connections: statuses, delays, and `may_have_stopped`."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from datetime import UTC, datetime
from unittest.mock import Mock

import pytest
from helpers import Connect, pass_time, port_kept, unused_url, wait_for_requests
from runtimes import RUNTIME
from servers import answering, http_answer, served

from bctrl_async import (
    BctrlApiError,
    BctrlError,
    BctrlNetworkError,
    BctrlRateLimitError,
    BctrlSession,
    BctrlTimeoutError,
    RetryPolicy,
    Runtime,
    RuntimeStatus,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.observer import Attempt, AttemptObserver, Observer, StopObserver
from bctrl_async.outcomes import result_of

GOOD = http_answer("200 OK", RUNTIME)


@pytest.mark.parametrize(
    "fault", [Fault.RATE_LIMITED, Fault.SERVER_ERROR, Reply(503), Fault.DROP_BEFORE]
)
async def test_a_fault_without_effect_is_retried(
    emulator: Emulator, session: BctrlSession, pauses: list[float], fault: Fault | Reply
) -> None:
    emulator.inject(fault)

    runtime = await session.stop_runtime("ws-1", "crm")

    assert runtime.status is RuntimeStatus.STOPPED
    assert emulator.received["ws-1", "crm"] == 2
    assert len(pauses) == 1


async def test_a_stale_keep_alive_connection_is_replaced(
    emulator: Emulator, session: BctrlSession, pauses: list[float]
) -> None:
    """Fault: a POST on a connection the server just closed is not resent (aiohttp#6138)."""
    for number in range(20):
        emulator.add_runtime("ws-1", f"r{number}")
        emulator.inject(Fault.CLOSE_KEPT_ALIVE)
        await session.stop_runtime("ws-1", f"r{number}")
    # A request on a closed connection was retried after a short back-off.
    assert all(delay <= 0.001 for delay in pauses)


@pytest.mark.parametrize("status", ["400", "401", "409", "422"])
async def test_any_other_4xx_is_never_retried_whatever_its_headers(
    status: str, pauses: list[float]
) -> None:
    """Fault: a 400 that carries Retry-After is retried, four times (azure-core)."""
    received: list[bytes] = []

    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        received.append(head)
        body = b'{"code": "request.invalid"}'
        writer.write(http_answer(f"{status} No", body, "Retry-After: 0", "retry-after-ms: 1"))

    async with served(handle) as session:
        with pytest.raises(BctrlApiError) as caught:
            await session.stop_runtime("ws-1", "crm")
    assert (len(received), pauses, caught.value.may_have_stopped) == (1, [], False)


@pytest.mark.parametrize("status", ["408", "500"])
async def test_other_server_errors_cost_attempts(status: str, pauses: list[float]) -> None:
    async with served(http_answer(f"{status} X")) as session:
        with pytest.raises(BctrlApiError) as caught:
            await session.stop_runtime("ws-1", "crm")
        assert (caught.value.attempts, len(pauses)) == (4, 3)
        with pytest.raises(BctrlApiError) as caught:
            await session.stop_runtime("ws-1", "crm", retry=RetryPolicy(attempts=2))
    assert caught.value.attempts == 2
    assert caught.value.may_have_stopped


@pytest.mark.parametrize(
    ("headers", "minimum"),
    [
        (["Retry-After: 30"], 30.0),
        (["retry-after-ms: 2500"], 2.5),
        (["Retry-After: Thu, 01 Jan 2026 00:00:45 GMT"], 45.0),
        (["Retry-After: Wed, 21 Oct 2099 07:28:30 GMT", "Date: Wed, 21 Oct 2099 07:28:00 GMT"], 30),
    ],
)
@pytest.mark.parametrize("status", ["429", "503"])
async def test_retry_after_is_a_minimum_delay_in_each_of_its_forms(
    status: str,
    headers: list[str],
    minimum: float,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault: Retry-After-ms is compared as str to int and ignored (the vendor's SDK 0.3.0)."""
    clock = Mock(now=lambda _: datetime(2026, 1, 1, tzinfo=UTC))
    monkeypatch.setattr("bctrl_async._http.transport.datetime", clock)
    async with served(answering(http_answer(f"{status} X", b"", *headers), GOOD)) as session:
        await session.stop_runtime("ws-1", "crm")
    [delay] = pauses
    assert minimum <= delay <= minimum + 5.0


@pytest.mark.parametrize("header", ["Retry-After: 61", "retry-after-ms: 60001"])
async def test_a_retry_after_beyond_the_patience_ends_the_call_at_once(
    header: str, pauses: list[float]
) -> None:
    """Fault: a long Retry-After is waited out, or shortened, so that the retry is too early."""
    async with served(http_answer("429 X", b"", header)) as session:
        with pytest.raises(BctrlRateLimitError) as caught:
            await session.stop_runtime("ws-1", "crm")
    assert (caught.value.attempts, pauses) == (1, [])
    assert (caught.value.retry_after or 0) > 60


async def test_nothing_is_sent_on_a_refused_connection() -> None:
    """Fault: connection errors leak as the HTTP library's own exceptions (the vendor's SDK)."""
    retry = RetryPolicy(attempts=3, base=0.001)
    with unused_url() as url:
        async with BctrlSession("k", base_url=url, retry=retry) as session:
            with pytest.raises(BctrlNetworkError, match="no connection") as caught:
                await session.stop_runtime("ws-1", "crm")
    assert (caught.value.attempts, caught.value.may_have_stopped) == (3, False)


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
    with pytest.raises(TimeoutError, match="no response within 60 s") as caught:
        await stopping
    assert isinstance(caught.value, BctrlTimeoutError)
    assert (caught.value.attempts, caught.value.may_have_stopped) == (2, True)


async def test_nothing_is_sent_if_connecting_times_out() -> None:
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
        async with BctrlSession("k", base_url=f"http://{host}:{port}", retry=once) as session:
            stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
            for _iteration in range(100):
                await asyncio.sleep(0)
            # More than the limit to connect, and less than that of the attempt.
            pass_time(57)
            with pytest.raises(BctrlTimeoutError, match="no connection within 54 s") as caught:
                await stopping
    assert caught.value.may_have_stopped is False


class Watch(Observer, StopObserver, AttemptObserver):  # type: ignore[misc]  # `end` differs.
    """An observer of one stop that waits for the start of the response."""

    def __init__(self) -> None:
        self.has_status = asyncio.Event()

    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        del workspace_id, alias
        return self

    def begin_attempt(self, attempt: Attempt) -> AttemptObserver:
        del attempt
        return self

    def answered(self, status: int) -> None:
        del status
        self.has_status.set()


async def test_a_body_that_drips_too_slowly_is_a_timeout_with_status_200(
    emulator: Emulator, connect: Connect
) -> None:
    emulator.inject(Fault.SLOW_DRIP)
    watch = Watch()
    async with connect(observer=watch) as session:
        stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await watch.has_status.wait()
        pass_time(60)
        with pytest.raises(BctrlTimeoutError, match="the body took more than 60 s") as caught:
            await stopping
    assert (caught.value.status, caught.value.attempts) == (200, 1)
    assert caught.value.may_have_stopped


async def test_backing_off_holds_no_connection_slot() -> None:
    # The Retry-After of a 500 holds back its own call alone.
    answers = answering(http_answer("500 X", b"", "Retry-After: 30"), GOOD)
    async with served(answers, max_connections=1) as session:
        waiting = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        while not session.stats.waiting:
            await asyncio.sleep(0)
        await session.stop_runtime("ws-1", "crm")
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert session.stats.attempts == 2


@pytest.mark.parametrize("fault", Fault)
async def test_every_fault_ends_in_a_runtime_or_a_bctrl_error(
    emulator: Emulator, session: BctrlSession, fault: Fault
) -> None:
    emulator.inject(*[fault] * 2)
    retry = RetryPolicy(attempts=2, base=0.001, patience=0.001)
    [returned] = await asyncio.gather(
        session.stop_runtime("ws-1", "crm", timeout=0.2, retry=retry), return_exceptions=True
    )
    assert isinstance(returned, Runtime | BctrlError)


async def test_a_throttled_stop_is_rejected_if_its_next_connection_fails() -> None:
    emulator = Emulator(port=0)
    emulator.add_runtime("ws-1", "crm")
    emulator.inject(Fault.RATE_LIMITED)
    async with emulator:
        session = BctrlSession("emulator-key", base_url=emulator.url)
        stopping = asyncio.create_task(
            session.stop_runtime("ws-1", "crm", retry=RetryPolicy(attempts=1))
        )
        await wait_for_requests(emulator, 1)
        while not session.stats.waiting:
            await asyncio.sleep(0)
    with port_kept(emulator.url):
        pass_time(30)
        with pytest.raises(BctrlError) as caught:
            await stopping
    await session.close()

    assert caught.value.status == 429
    assert result_of(caught.value) is StopResult.REJECTED
