"""The fast path: its rehearsal, its requests and its timeouts."""

from __future__ import annotations

import ast
import asyncio
import gc
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from conftest import KEY
from helpers import BOUND, Connect, pass_time
from multidict import CIMultiDict
from runtimes import RUNTIME
from servers import Handler, http_answer, served
from test_both_ways import Traced
from test_wire import ONCE

import bctrl_async
from bctrl_async import (
    BctrlConfigError,
    BctrlNetworkError,
    BctrlSession,
    BctrlTimeoutError,
    Runtime,
)
from bctrl_async._http.fast.answer import PlainAnswer
from bctrl_async._http.fast.exchange import Exchange, FastPath, _Deadlines
from bctrl_async.emulator import Emulator
from bctrl_async.observer import Observer

pytestmark = pytest.mark.usefixtures("fast_path_only")

OK = http_answer("200 OK", RUNTIME)
TIMEOUT = 60.0
"""Seconds until an attempt times out, unless a session or a call has another limit."""


def is_open(session: BctrlSession) -> bool:
    fast_path = session._sender._pool.fast_path
    return fast_path is not None and fast_path.takes("POST")


@asynccontextmanager
async def on_fast_path(
    server: bytes | Handler,
    **options: Any,  # noqa: ANN401 - those of a session.
) -> AsyncIterator[BctrlSession]:
    async with served(server, "secret-key", retry=ONCE, **options) as session:
        assert is_open(session)
        yield session


@asynccontextmanager
async def in_flight(
    **options: Any,  # noqa: ANN401 - those of a session.
) -> AsyncIterator[tuple[BctrlSession, asyncio.Task[Runtime]]]:
    """Yield a session, and its stop that the server has received and does not answer."""
    received = asyncio.Event()

    async def receive(_: bytes, __: asyncio.StreamWriter) -> None:
        received.set()

    async with on_fast_path(receive, **options) as session:
        stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await received.wait()
        yield session, stopping


def test_only_its_folder_names_private_parts_of_aiohttp() -> None:
    package = Path(bctrl_async.__file__).parent
    fast = package / "_http" / "fast"
    found = [
        f"{path.relative_to(package)}:{node.lineno}: {node.attr}"
        for path in package.rglob("*.py")
        if fast not in path.parents and "import aiohttp" in (text := path.read_text("utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and re.match("_[a-z]", node.attr)
        and node.attr != "_replace"
        and not (isinstance(node.value, ast.Name) and node.value.id in {"self", "_config"})
    ]
    assert found == []


class TestRehearsal:
    """An aiohttp that is built otherwise costs speed, and never a stop."""

    @staticmethod
    def connect_wants_more(monkeypatch: pytest.MonkeyPatch) -> None:
        async def connect(
            self: object, req: object, traces: object, limit: object, hint: object
        ) -> None:
            pass

        monkeypatch.setattr(aiohttp.TCPConnector, "connect", connect)

    @staticmethod
    def headers_are_sent_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
        def update(self: aiohttp.ClientRequest, headers: CIMultiDict[str] | None) -> None:
            real(self, CIMultiDict(sorted((headers or {}).items(), reverse=True)))

        real = aiohttp.ClientRequest.update_headers
        monkeypatch.setattr(aiohttp.ClientRequest, "update_headers", update)

    @staticmethod
    def the_request_line_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
        class Request(aiohttp.ClientRequest):
            async def send(self, conn: Connection) -> aiohttp.ClientResponse:
                self.version = aiohttp.HttpVersion10
                return await super().send(conn)

        monkeypatch.setattr(aiohttp, "ClientRequest", Request)

    @staticmethod
    def connections_are_not_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ResponseHandler, "should_close", property(lambda _: True))

    @staticmethod
    def messages_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
        async def read(self: ResponseHandler) -> object:
            await real(self)
            return SimpleNamespace(code=200, headers={}), aiohttp.EMPTY_PAYLOAD

        real = ResponseHandler.read
        monkeypatch.setattr(ResponseHandler, "read", read)

    @staticmethod
    def reading_ignores_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
        async def read(self: ResponseHandler) -> object:
            while not self._buffer:
                await asyncio.sleep(0)
            return self._buffer.popleft()[0]

        monkeypatch.setattr(ResponseHandler, "read", read)

    @staticmethod
    def reading_takes_a_turn_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
        async def read(self: ResponseHandler) -> object:
            await asyncio.sleep(0)
            return await real(self)

        real = ResponseHandler.read
        monkeypatch.setattr(ResponseHandler, "read", read)

    @pytest.mark.parametrize(
        "change",
        [
            connect_wants_more,
            headers_are_sent_in_another_order,
            the_request_line_is_another,
            connections_are_not_kept_alive,
            messages_are_others,
            reading_ignores_exceptions,
            reading_takes_a_turn_of_the_loop,
        ],
    )
    async def test_an_aiohttp_that_is_built_otherwise_is_found_out(
        self,
        change: Callable[[pytest.MonkeyPatch], None],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "bctrl_async"):
            change(patch)
            async with BctrlSession("secret-key", base_url="http://127.0.0.1:9") as session:
                assert not is_open(session)
        assert "the fast path does not work with this aiohttp" in caplog.text
        assert "secret-key" not in caplog.text

    async def test_a_stop_then_goes_through_client_session(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.reading_takes_a_turn_of_the_loop(monkeypatch)
        async with connect() as session:
            assert not is_open(session)
            assert (await session.stop_runtime("ws-1", "crm")).status == "stopped"

    @pytest.mark.parametrize("change", [None, connections_are_not_kept_alive])
    async def test_it_leaves_nothing_behind(
        self,
        change: Callable[[pytest.MonkeyPatch], None] | None,
        monkeypatch: pytest.MonkeyPatch,
        recwarn: pytest.WarningsRecorder,
    ) -> None:
        """Fault: a rehearsal that failed left a timer of a minute for each session."""
        if change is not None:
            change(monkeypatch)
        for _ in range(3):
            async with BctrlSession("secret-key", base_url="http://127.0.0.1:9"):
                pass
        assert timers() == []
        assert recwarn.list == []


class TestTimers:
    """None is left once the session is closed or dropped, not even for the rest of its timeout."""

    async def test_a_closed_session_leaves_none(self, connect: Connect) -> None:
        async with connect() as session:
            await session.stop_runtime("ws-1", "crm")
            assert len(our_timers()) == 1
        assert our_timers() == []

    async def test_a_dropped_session_leaves_none(self, connect: Connect) -> None:
        """Fault: only `close` cancelled it, so each dropped session left one."""
        session = connect()
        await session.stop_runtime("ws-1", "crm")
        del session
        gc.collect()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert our_timers() == []

    async def test_a_session_that_closes_while_calls_wait_leaves_none(self) -> None:
        async with in_flight() as (session, stopping):
            await session.close()
            with pytest.raises(BctrlNetworkError, match="the session was closed"):
                await stopping
            assert our_timers() == []


def our_timers() -> list[asyncio.TimerHandle]:
    return [timer for timer in timers() if "Deadlines" in repr(timer)]


async def read_body(session: BctrlSession) -> asyncio.Task[Runtime]:
    """Begin a stop, and return it once the body of its answer is being read."""
    stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
    async with asyncio.timeout(BOUND):
        while not any(hasattr(exchange, "status") for exchange in deadlines_of(session)._ends):
            await asyncio.sleep(0)
    return stopping


def fast_path_of(session: BctrlSession) -> FastPath:
    fast_path = session._sender._pool.fast_path
    assert fast_path is not None
    return fast_path


def deadlines_of(session: BctrlSession) -> _Deadlines:
    return fast_path_of(session)._deadlines


def timers() -> list[asyncio.TimerHandle]:
    """Return the timers of the loop that are set."""
    scheduled: list[asyncio.TimerHandle] = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    return [timer for timer in scheduled if not timer.cancelled()]


class Named(Exchange):
    """An exchange that notes its end, and has no connection."""

    def __init__(self, name: str, expired: list[str]) -> None:
        self._name = name
        self._expired = expired

    def time_out(self) -> None:
        self._expired.append(self._name)


class TestTimeout:
    async def test_it_covers_the_body_after_a_status_that_aiohttp_reads_as_zero(self) -> None:
        """Fault: the status 0 stood for a head that was not read, so its body had no timeout."""
        head = OK[:-9].replace(b"200 OK", b"000 Nothing")
        async with on_fast_path(head) as session:
            stopping = await read_body(session)
            pass_time(TIMEOUT)
            async with asyncio.timeout(BOUND):
                with pytest.raises(BctrlNetworkError):
                    await stopping

    async def test_each_exchange_has_its_own(self) -> None:
        """Fault: with one timer for all, one that had to connect waited for a later one."""
        loop, expired = asyncio.get_running_loop(), list[str]()
        deadlines, ended = _Deadlines(loop), Named("ended", expired)
        for exchange, seconds in (
            (Named("first", expired), 1000.0),
            (Named("connected", expired), 10.0),
            (ended, 15.0),
            (Named("short", expired), 20.0),
        ):
            deadlines.add(exchange, loop.time() + seconds)
        deadlines.discard(ended)
        for expected in (["connected"], ["connected", "short"]):
            pass_time(10.0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert expired == expected
        deadlines.close()

    async def test_a_body_that_is_read_when_the_session_closes_still_times_out(self) -> None:
        """Fault: closing the session cancelled the only timer, and the stop never ended."""
        async with on_fast_path(OK[:-9]) as session:
            stopping = await read_body(session)
            await session.close()
            pass_time(TIMEOUT)
            async with asyncio.timeout(BOUND):
                with pytest.raises(BctrlNetworkError):
                    await stopping
            assert our_timers() == []

    async def test_it_covers_the_body_if_the_head_arrives_in_the_same_turn_of_the_loop(
        self,
    ) -> None:
        async with in_flight() as (session, stopping):
            [exchange] = deadlines_of(session)._ends
            assert isinstance(exchange, Exchange)
            exchange.protocol.data_received(OK[:-9])
            exchange.time_out()
            async with asyncio.timeout(BOUND):
                with pytest.raises(BctrlTimeoutError, match="the body took more than 60 s"):
                    await stopping

    async def test_it_counts_while_connecting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fault: an attempt that connected for long had its whole time again."""
        received = asyncio.Event()

        async def receive(_: bytes, __: asyncio.StreamWriter) -> None:
            received.set()

        async def connect(*args: Any) -> Connection:  # noqa: ANN401
            pass_time(50.0)
            return await real(*args)

        async with on_fast_path(receive) as session:
            real = fast_path_of(session)._connect
            monkeypatch.setattr(fast_path_of(session), "_connect", connect)
            stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
            await received.wait()
            pass_time(10.0)
            for _iteration in range(20):
                await asyncio.sleep(0)
            assert isinstance(stopping.exception(), BctrlTimeoutError)

    @pytest.mark.parametrize("order", [[0, 1], [1, 0]])
    async def test_a_cancellation_in_the_same_turn_of_the_loop_prevails(
        self, order: list[int]
    ) -> None:
        """Fault: a timeout that cancels the task can swallow a cancellation by the caller."""
        async with in_flight() as (session, stopping):
            [exchange] = deadlines_of(session)._ends
            ends: list[Callable[[], object]] = [exchange.time_out, stopping.cancel]
            for number in order:
                ends[number]()
            with pytest.raises(asyncio.CancelledError):
                await stopping


async def test_a_connection_that_closes_before_the_request_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def take(*_: object) -> Connection:
        connection = await real(*_)  # type: ignore[arg-type]
        assert connection.transport is not None
        connection.transport.abort()
        return connection

    async with on_fast_path(OK) as session:
        real = fast_path_of(session)._connect
        monkeypatch.setattr(fast_path_of(session), "_connect", take)
        with pytest.raises(BctrlNetworkError, match="Cannot write to closing transport"):
            await session.stop_runtime("ws-1", "crm")


@pytest.mark.parametrize("observer", [None, Traced()])
async def test_the_key_is_in_no_frame_that_waits(observer: Observer | None) -> None:
    """Tools that show variables show the frames of tasks too."""
    async with in_flight(observer=observer) as (_, stopping):
        frames = frames_of(stopping.get_coro())
        stopping.cancel()
        with suppress(asyncio.CancelledError):
            await stopping
    assert "post" in [frame.f_code.co_name for frame in frames]
    shown = [repr(value) for frame in frames for value in frame.f_locals.values()]
    assert [text for text in shown if "secret-key" in text] == []


def frames_of(awaited: object) -> list[FrameType]:
    """Return the frames of a coroutine and of what it waits for."""
    frames = []
    while isinstance(awaited, Coroutine) and awaited.cr_frame is not None:  # type: ignore[attr-defined]
        frames.append(awaited.cr_frame)  # type: ignore[attr-defined]
        awaited = awaited.cr_await  # type: ignore[attr-defined]
    return frames


async def test_the_answers_of_common_servers_need_no_parser(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the protocol of ours, stops would be slower, and nothing else would tell."""
    taken: list[object] = []

    def begin(exchange: Exchange, message: Any, content: Any) -> None:  # noqa: ANN401
        taken.append(type(message))
        real(exchange, message, content)

    real = Exchange.begin_body
    monkeypatch.setattr(Exchange, "begin_body", begin)
    async with connect() as session:
        taken.clear()
        await session.stop_runtime("ws-1", "crm")
    assert taken == [PlainAnswer]


async def test_a_connector_with_another_protocol_uses_the_parser() -> None:
    async with on_fast_path(OK) as session:
        http = session._sender._pool.get()
        assert http.connector is not None
        loop = asyncio.get_running_loop()
        http.connector._factory = partial(ResponseHandler, loop=loop)
        assert (await session.stop_runtime("ws-1", "crm")).status == "stopped"


async def test_an_answer_before_the_request_is_not_its_answer() -> None:
    """Fault: on a new connection, bytes that came first passed for the answer."""
    connections: set[asyncio.StreamWriter] = set()

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        writer.write(http_answer("404 Not Found", b'{"code": "runtime.not_found"}'))
        await reader.read()
        writer.close()
        connections.remove(writer)

    server = await asyncio.start_server(early, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, BctrlSession("k", base_url=url, retry=ONCE) as session:
        connector = fast_path_of(session)._connect.__self__  # type: ignore[attr-defined]
        real = connector._create_connection

        async def slowly(*args: Any) -> Any:  # noqa: ANN401
            protocol = await real(*args)
            while not protocol.should_close:
                await asyncio.sleep(0.001)
            return protocol

        connector._create_connection = slowly
        with pytest.raises(BctrlNetworkError, match="spoke or closed before the request"):
            await session.stop_runtime("ws-1", "crm")
        while connections:
            await asyncio.sleep(0.001)


async def test_a_session_that_is_closed_while_a_trace_waits_sends_nothing(
    emulator: Emulator,
) -> None:
    """Fault: the AssertionError of aiohttp left the call."""

    async def close(*_: object) -> None:
        await session.close()

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(close)
    session = BctrlSession(KEY, base_url=emulator.url, retry=ONCE, trace_configs=[trace])
    with pytest.raises(BctrlConfigError, match="the session is closed"):
        await session.stop_runtime("ws-1", "crm")
    assert emulator.requests == []
