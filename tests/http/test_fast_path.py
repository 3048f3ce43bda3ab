"""The fast path: its rehearsal, its requests and its timeouts."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import CoroutineType, FrameType, SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from multidict import CIMultiDict
from support.helpers import BOUND, Connect, pass_time, until
from support.runtimes import RUNTIME
from support.servers import Handler, http_answer, listening, served
from test_observer import Recorder
from test_wire import ONCE

from bctrl_async import BctrlNetworkError, BctrlSession, BctrlTimeoutError, Runtime
from bctrl_async._http.fast.answer import PlainAnswer
from bctrl_async._http.fast.exchange import Exchange, FastPath, _Deadlines
from bctrl_async.observer import Observer

pytestmark = pytest.mark.usefixtures("fast_path_only")

OK = http_answer("200 OK", RUNTIME)
TIMEOUT = 60.0
"""Seconds until an attempt times out, unless a session or a call has another limit."""


def is_open(session: BctrlSession) -> bool:
    fast_path = session._sender._pool.fast_path
    return fast_path is not None and fast_path.takes("POST")


def fast_path_of(session: BctrlSession) -> FastPath:
    fast_path = session._sender._pool.fast_path
    assert fast_path is not None
    return fast_path


def exchanges_of(session: BctrlSession) -> list[Exchange]:
    """Return the exchanges that have a time limit."""
    return list(fast_path_of(session)._deadlines._times)


Timers = Callable[[], list[asyncio.Handle]]


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> Timers:
    """Return a function that lists the timers of time limits that are set."""
    loop, handles = asyncio.get_running_loop(), list[asyncio.Handle]()
    call_at = loop.call_at

    def set_timer(
        when: float,
        callback: Callable[..., object],
        *args: object,
        **options: Any,  # noqa: ANN401 - as `call_at`.
    ) -> asyncio.Handle:
        if not isinstance(getattr(callback, "__self__", None), _Deadlines):
            return call_at(when, callback, *args, **options)

        def fire() -> None:
            handles.remove(handle)
            callback(*args)

        handle = call_at(when, fire, **options)
        handles.append(handle)
        return handle

    monkeypatch.setattr(loop, "call_at", set_timer)
    return lambda: [handle for handle in handles if not handle.cancelled()]


@asynccontextmanager
async def on_fast_path(
    server: bytes | Handler, observer: Observer | None = None
) -> AsyncIterator[BctrlSession]:
    async with served(server, "secret-key", retry=ONCE, observer=observer) as session:
        assert is_open(session)
        yield session


Stopping = tuple[BctrlSession, asyncio.Task[Runtime]]


@asynccontextmanager
async def in_flight(observer: Observer | None = None) -> AsyncIterator[Stopping]:
    """Yield a session, and a stop that the server received without an answer."""
    received = asyncio.Event()

    async def receive(_: bytes, __: asyncio.StreamWriter) -> None:
        received.set()

    async with on_fast_path(receive, observer) as session:
        stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await received.wait()
        yield session, stopping


_read, _update_headers = ResponseHandler.read, aiohttp.ClientRequest.update_headers


async def connect_with_hint(
    self: object, req: object, traces: object, limit: object, hint: object
) -> None:
    pass


def update_reversed(
    self: aiohttp.ClientRequest, headers: CIMultiDict[str] | None
) -> None:
    _update_headers(self, CIMultiDict(sorted((headers or {}).items(), reverse=True)))


class OldRequest(aiohttp.ClientRequest):
    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        self.version = aiohttp.HttpVersion10
        return await super().send(conn)


async def read_other_message(self: ResponseHandler) -> object:
    await _read(self)
    return SimpleNamespace(code=200, headers={}), aiohttp.EMPTY_PAYLOAD


async def read_whatever_is_raised(self: ResponseHandler) -> object:
    while not self._buffer:
        await asyncio.sleep(0)
    return self._buffer.popleft()[0]


async def read_a_turn_later(self: ResponseHandler) -> object:
    await asyncio.sleep(0)
    return await _read(self)


Change = tuple[Any, str, object]
CHANGES: dict[str, Change] = {
    "connecting takes another argument": (
        aiohttp.TCPConnector,
        "connect",
        connect_with_hint,
    ),
    "headers are in another order": (
        aiohttp.ClientRequest,
        "update_headers",
        update_reversed,
    ),
    "the request line is another": (aiohttp, "ClientRequest", OldRequest),
    "no connection is kept": (
        ResponseHandler,
        "should_close",
        property(lambda _: True),
    ),
    "messages are others": (ResponseHandler, "read", read_other_message),
    "reading ignores exceptions": (ResponseHandler, "read", read_whatever_is_raised),
    "reading takes a turn of the loop": (ResponseHandler, "read", read_a_turn_later),
}
"""Changes of aiohttp: an object, its attribute, and the replacement."""


class TestRehearsal:
    """An aiohttp that is built otherwise costs speed, and never a stop."""

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    async def test_another_aiohttp_is_found_out(
        self,
        change: Change,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.INFO, "bctrl_async")
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            async with BctrlSession(
                "secret-key", base_url="http://127.0.0.1:9"
            ) as session:
                assert not is_open(session)
        assert "the fast path does not work with this aiohttp" in caplog.text
        assert "secret-key" not in caplog.text


class TestTimers:
    """None is left once the session is closed or dropped."""

    async def test_a_failed_rehearsal_leaves_none(
        self, timers: Timers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: it left a timer of a minute for each session."""
        monkeypatch.setattr(*CHANGES["no connection is kept"])
        async with BctrlSession("k", base_url="http://127.0.0.1:9"):
            pass
        assert timers() == []

    async def test_a_dropped_session_leaves_none(
        self, timers: Timers, connect: Connect
    ) -> None:
        """Fault: only `close` cancelled it, so each dropped session left a timer."""
        session = connect()
        await session.stop_runtime("ws-1", "crm")
        del session
        gc.collect()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert timers() == []

    async def test_a_session_that_closes_while_calls_wait_leaves_none(
        self, timers: Timers
    ) -> None:
        async with in_flight() as (session, stopping):
            await session.close()
            with pytest.raises(BctrlNetworkError, match="the session was closed"):
                await stopping
            assert timers() == []


class Named(Exchange):
    """An exchange that notes its end, and has no connection."""

    def __init__(self, name: str, expired: list[str]) -> None:
        self._name = name
        self._expired = expired

    def time_out(self) -> None:
        self._expired.append(self._name)


@pytest.mark.moves_clock
async def test_each_exchange_has_its_own_time_limit() -> None:
    """Fault: with a timer for all, an attempt waited for a later limit."""
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


class TestTimeout:
    @pytest.mark.parametrize(
        ("head", "closes"),
        [
            # The status 0 stood for a head that was not read, so its body had no
            # timeout.
            (OK[:-9].replace(b"200 OK", b"000 Nothing"), False),
            # Closing the session cancelled the only timer.
            (OK[:-9], True),
        ],
    )
    @pytest.mark.moves_clock
    async def test_it_covers_the_body(
        self, timers: Timers, head: bytes, *, closes: bool
    ) -> None:
        """Fault: the stop never ended."""
        async with on_fast_path(head) as session:
            stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
            await until(
                lambda: [
                    exchange
                    for exchange in exchanges_of(session)
                    if hasattr(exchange, "status")
                ]
            )
            if closes:
                await session.close()
            pass_time(TIMEOUT)
            with pytest.raises(BctrlNetworkError):
                await asyncio.wait_for(stopping, BOUND)
        assert timers() == []

    async def test_it_covers_a_body_whose_head_arrives_as_it_expires(self) -> None:
        async with in_flight() as (session, stopping):
            [exchange] = exchanges_of(session)
            exchange.protocol.data_received(OK[:-9])
            exchange.time_out()
            with pytest.raises(BctrlTimeoutError, match="the body took more than 1m"):
                await asyncio.wait_for(stopping, BOUND)

    @pytest.mark.moves_clock
    async def test_it_counts_while_connecting(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: an attempt that connected for long had its whole time again."""

        async def connect(*args: Any) -> Connection:  # noqa: ANN401 - passed on.
            pass_time(50.0)
            return await real(*args)

        async with on_fast_path(OK[:-9]) as session:
            real = fast_path_of(session)._connect
            monkeypatch.setattr(fast_path_of(session), "_connect", connect)
            stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
            while not exchanges_of(session):
                await asyncio.sleep(0)
            pass_time(10.0)
            for _iteration in range(20):
                await asyncio.sleep(0)
            assert isinstance(stopping.exception(), BctrlTimeoutError)

    @pytest.mark.parametrize("order", [[0, 1], [1, 0]])
    async def test_a_cancellation_in_the_same_turn_prevails(
        self, order: list[int]
    ) -> None:
        """Fault: a timeout that cancels can swallow a cancellation by the caller."""
        async with in_flight() as (session, stopping):
            [exchange] = exchanges_of(session)
            ends: list[Callable[[], object]] = [exchange.time_out, stopping.cancel]
            for number in order:
                ends[number]()
            with pytest.raises(asyncio.CancelledError):
                await stopping


async def test_a_connection_may_close_before_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def accept(connection: Connection, _: aiohttp.ClientRequest) -> bool:
        assert connection.transport is not None
        connection.transport.abort()
        return True

    async with on_fast_path(OK) as session:
        monkeypatch.setattr(fast_path_of(session), "_accepts", accept)
        with pytest.raises(
            BctrlNetworkError, match="Cannot write to closing transport"
        ):
            await session.stop_runtime("ws-1", "crm")


def frames_of(awaited: object) -> list[FrameType]:
    """Return the frames of a coroutine and of what it waits for."""
    frames = []
    while isinstance(awaited, CoroutineType) and awaited.cr_frame is not None:
        frames.append(awaited.cr_frame)
        awaited = awaited.cr_await
    return frames


@pytest.mark.parametrize("observer", [None, Recorder()])
async def test_the_key_is_in_no_frame_that_waits(observer: Observer | None) -> None:
    """Tools that show variables show the frames of tasks too."""
    async with in_flight(observer) as (_, stopping):
        frames = frames_of(stopping.get_coro())
        stopping.cancel()
        with suppress(asyncio.CancelledError):
            await stopping
    assert "post" in [frame.f_code.co_name for frame in frames]
    shown = [repr(value) for frame in frames for value in frame.f_locals.values()]
    assert [text for text in shown if "secret-key" in text] == []


@pytest.mark.parametrize("own", [True, False])
async def test_the_answers_of_common_servers_need_no_parser_with_our_protocol(
    monkeypatch: pytest.MonkeyPatch, *, own: bool
) -> None:
    """Stops would be slower without our protocol; nothing else would tell."""
    taken: list[bool] = []

    def begin(exchange: Exchange, message: Any, content: Any) -> None:  # noqa: ANN401 - passed on.
        taken.append(isinstance(message, PlainAnswer))
        real(exchange, message, content)

    real = Exchange.take_head
    async with on_fast_path(OK) as session:
        monkeypatch.setattr(Exchange, "take_head", begin)
        if not own:
            connector = session._sender._pool.get().connector
            assert connector is not None
            loop = asyncio.get_running_loop()
            monkeypatch.setattr(
                connector, "_factory", partial(ResponseHandler, loop=loop)
            )
        assert (await session.stop_runtime("ws-1", "crm")).status == "stopped"
    assert taken == [own]


async def test_an_answer_before_the_request_is_not_its_answer() -> None:
    """Fault: on a new connection, bytes that came first passed for the answer."""

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(http_answer("404 Not Found", b'{"code": "runtime.not_found"}'))
        await reader.read()

    async with (
        listening(early) as port,
        BctrlSession("k", base_url=f"http://127.0.0.1:{port}", retry=ONCE) as session,
    ):
        connector = fast_path_of(session)._accepts.__self__  # type: ignore[attr-defined]  # a method.
        real = connector._create_connection

        async def slowly(*args: Any) -> Any:  # noqa: ANN401 - passed on.
            protocol = await real(*args)
            await until(lambda: protocol.should_close)
            return protocol

        connector._create_connection = slowly
        with pytest.raises(
            BctrlNetworkError, match="spoke or closed before the request"
        ):
            await session.stop_runtime("ws-1", "crm")
