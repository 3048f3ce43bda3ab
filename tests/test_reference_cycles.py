"""Calls that fail leave no reference cycle, so memory does not grow."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from support.helpers import BOUND, unused_url
from support.servers import Handler, answering, http_answer, raw_server

import bctrl_async
from bctrl_async import (
    BctrlError,
    BctrlNetworkError,
    BctrlSession,
    Observer,
    RetryPolicy,
)

PACKAGE = Path(bctrl_async.__file__).parent
ONCE = RetryPolicy(attempts=1, patience=0)
TWICE = RetryPolicy(attempts=2, base=1e-6, cap=1e-6)
MANY = [("ws-1", f"r{number}") for number in range(3)]

MakeSession = Callable[..., BctrlSession]
CALLS: dict[str, Callable[[BctrlSession], Awaitable[object]]] = {
    "stop": lambda session: session.stop_runtime("ws-1", "crm"),
    "stop many": lambda session: session.stop_runtimes(
        MANY, verify=False, deadline=0.1
    ),
    "get": lambda session: session.get_runtime("ws-1", "crm"),
    "stop, stopped_ok": lambda session: session.stop_runtime(
        "ws-1", "crm", stopped_ok=True
    ),
    "list": lambda session: session.list_runtimes("ws-1"),
}
every_call = pytest.mark.parametrize("call", CALLS)
most_calls = pytest.mark.parametrize("call", ["stop", "stop many", "get"])


async def _close(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _hang(_: bytes, writer: asyncio.StreamWriter) -> None:
    await writer.wait_closed()


def _is_ours(item: object) -> bool:
    # asyncio and aiohttp make cycles of connections that are closed, here and in the
    # server.
    if isinstance(item, FrameType):
        return Path(item.f_code.co_filename).is_relative_to(PACKAGE)
    is_connection = isinstance(item, ResponseHandler)
    return type(item).__module__.startswith("bctrl_async") and not is_connection


async def cycles_of(call: Callable[[], Awaitable[object]]) -> set[str]:
    """Return the types of what many calls leave in reference cycles."""

    async def make_calls(count: int) -> None:
        for _ in range(count):
            with suppress(BctrlError):
                await call()

    # The first calls open the pool, and fill caches.
    await make_calls(2)
    # What was there before is not looked at: in the whole suite, that takes a third of
    # a second.
    gc.freeze()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        await make_calls(5)
        await asyncio.sleep(0)
        gc.collect()
        return {type(item).__name__ for item in gc.garbage if _is_ours(item)}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.unfreeze()


@pytest.fixture(params=[False, True], ids=["plain", "observed"])
def make_session(request: pytest.FixtureRequest) -> MakeSession:
    observer = Observer() if request.param else None
    return partial(BctrlSession, "key-of-a-test", observer=observer)


CONFLICT = http_answer("409 No", b'{"code":"runtime.not_active"}')
SERVER_ERROR = answering(http_answer("500 No"))
FAILURES: dict[str, tuple[Handler, dict[str, Any]]] = {
    # The server, and the options of the session.
    "API error": (
        answering(http_answer("403 No", b'{"code":"key.forbidden","error":"no"}')),
        {},
    ),
    "server error": (SERVER_ERROR, {}),
    "server error after a retry": (SERVER_ERROR, {"retry": TWICE}),
    "unreadable": (answering(http_answer("200 OK", b"[]")), {}),
    "foreign": (answering(http_answer("200 OK", b'{"alias":"mail"}')), {}),
    "not found": (
        answering(CONFLICT, http_answer("404 No", b'{"code":"runtime.not_found"}')),
        {},
    ),
    "already stopped": (answering(CONFLICT), {}),
    "disconnect": (_close, {}),
    "disconnect after a retry": (_close, {"retry": TWICE}),
    "no answer in time": (_hang, {"timeout": 0.01}),
}


@every_call
@pytest.mark.parametrize("name", FAILURES)
async def test_a_call_without_a_usable_answer_leaves_none(
    make_session: MakeSession, name: str, call: str
) -> None:
    """Fault: 14 objects for each failing stop: error, traceback, frames, call."""
    server, options = FAILURES[name]
    async with (
        raw_server(server) as url,
        make_session(base_url=url, **{"retry": ONCE, **options}) as session,
    ):
        assert await cycles_of(partial(CALLS[call], session)) == set()


@most_calls
async def test_a_call_without_a_connection_leaves_none_and_its_reason_has_no_traceback(
    make_session: MakeSession, call: str
) -> None:
    """Fault: its frames refer to it, and to all of the attempt."""
    with unused_url() as url:
        async with make_session(base_url=url, retry=ONCE) as session:
            assert await cycles_of(partial(CALLS[call], session)) == set()
            with pytest.raises(BctrlNetworkError) as caught:
                await session.stop_runtime("ws-1", "crm")

    assert isinstance(caught.value.__cause__, aiohttp.ClientConnectorError)
    reason = caught.value.__cause__.os_error
    assert (reason.__traceback__, reason.__context__) == (None, None)


@most_calls
@pytest.mark.parametrize(
    "is_answered", [False, True], ids=["in flight", "before a retry"]
)
async def test_a_call_that_is_cancelled_leaves_none(
    make_session: MakeSession, call: str, *, is_answered: bool
) -> None:
    received = asyncio.Event()

    async def handle(request: bytes, writer: asyncio.StreamWriter) -> None:
        received.set()
        await (SERVER_ERROR if is_answered else _hang)(request, writer)

    async def make_call() -> None:
        with suppress(BctrlError):
            await CALLS[call](session)

    async def cancel() -> None:
        received.clear()
        failed = session.stats.failed
        task = asyncio.create_task(make_call())
        await received.wait()
        while is_answered and session.stats.failed == failed:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    retry = RetryPolicy(base=BOUND, cap=BOUND)
    async with (
        raw_server(handle) as url,
        make_session(base_url=url, retry=retry) as session,
    ):
        assert await cycles_of(cancel) == set()


async def _raise() -> str:
    raise KeyError("vault")


async def _wait() -> str:
    return await asyncio.Future[str]()


@pytest.mark.parametrize("get_key", [_raise, _wait])
async def test_a_call_whose_key_function_fails_leaves_none(
    get_key: Callable[[], Awaitable[str]],
) -> None:
    """Fault: 30 objects for each call with an attempt that got no key in time."""
    url = "http://127.0.0.1:9"
    async with BctrlSession(
        get_key, base_url=url, timeout=0.01, retry=TWICE
    ) as session:
        assert await cycles_of(partial(CALLS["stop"], session)) == set()
