"""The lifecycle of a session: opened at first use, in one loop, closed once."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable

import aiohttp
import pytest
from support.helpers import BOUND, Connect, until, wait_for_requests
from support.servers import answering, emulator_in_a_thread, served

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlResponseError,
    BctrlSession,
)
from bctrl_async.emulator import Emulator, Fault, Reply

KEY = "emulator-key"
CLOSED_LOOP = (
    r"event loop, which is closed\. Make one session per event loop: one in each "
    r"asyncio\.run; in a test, use `with TestClient\(app\)`$"
)


async def enter(session: BctrlSession) -> None:
    async with session:
        pass


class TestCopy:
    """Faults: copies of new sessions were silent, of open sessions ignored errors."""

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
    async def test_a_session_cannot_be_copied(
        self,
        copied: Callable[[BctrlSession], object],
        session: BctrlSession,
        connect: Connect,
    ) -> None:
        await session.stop_runtime("ws-1", "crm")
        for original in (session, connect()):
            with pytest.raises(
                TypeError, match=r"share it, or make one in each process and loop$"
            ):
                copied(original)


class TestLoop:
    def test_a_session_belongs_to_the_loop_that_uses_it_first(self) -> None:
        with emulator_in_a_thread() as emulator:
            session = BctrlSession(KEY, base_url=emulator.url)
            assert "not opened yet" in repr(session)
            asyncio.run(session.stop_runtime("ws-1", "r0"))
            assert " open" in repr(session)
            # A later loop may have the `id` of the first loop.
            for _ in range(20):
                for use in (session.stop_runtime("ws-1", "r1"), enter(session)):
                    with pytest.raises(BctrlConfigError, match=CLOSED_LOOP):
                        asyncio.run(use)
            asyncio.run(session.close())
            assert " closed" in repr(session)
            assert emulator.received["ws-1", "r1"] == 0

    async def test_closing_from_another_one_while_the_first_runs_is_an_error(
        self, session: BctrlSession
    ) -> None:
        await session.stop_runtime("ws-1", "crm")
        with pytest.raises(BctrlConfigError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, session.close())
        assert not session.closed

    async def test_shutdown_asyncgens_closes_the_session(
        self, session: BctrlSession
    ) -> None:
        await session.stop_runtime("ws-1", "crm")
        await asyncio.get_running_loop().shutdown_asyncgens()
        with pytest.raises(BctrlConfigError, match="the session is closed"):
            await session.stop_runtime("ws-1", "crm")

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    async def test_use_after_a_fork_is_an_error_and_does_not_disturb_the_parent(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        await session.stop_runtime("ws-1", "crm")
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # The test's threads do not matter.
            child = os.fork()
        if child == 0:
            try:
                asyncio.events._set_running_loop(None)
                try:
                    asyncio.new_event_loop().run_until_complete(
                        session.stop_runtime("ws-1", "crm")
                    )
                except BctrlConfigError as error:
                    os.write(writing, str(error).encode())
                asyncio.new_event_loop().run_until_complete(session.close())
                os.write(writing, b", closed")
            finally:
                os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)  # noqa: ASYNC222 - nothing else is to run meanwhile.
        message = os.read(reading, 1000).decode()
        os.close(reading)

        assert "opened before a fork" in message
        assert message.endswith(", closed")
        emulator.add_runtime("ws-1", "mail")
        await session.stop_runtime("ws-1", "mail")


@pytest.fixture
def lookup_began(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Make host lookups hang; return an event that is set when a lookup starts."""
    began = asyncio.Event()

    class SlowResolver:
        def __init__(self, **_: object) -> None:
            """Take the arguments of aiohttp."""

        async def resolve(self, *_: object, **__: object) -> None:
            began.set()
            await asyncio.Event().wait()

        async def close(self) -> None:
            """Close nothing."""

    monkeypatch.setattr(aiohttp.connector, "DefaultResolver", SlowResolver)
    return began


class TestClose:
    @pytest.mark.parametrize("used", [False, True])
    async def test_use_after_it_is_an_error(
        self, connect: Connect, *, used: bool
    ) -> None:
        session = connect()
        if used:
            await session.stop_runtime("ws-1", "crm")
        await session.close()
        await session.close()

        assert session.closed
        with pytest.raises(BctrlConfigError, match="closed") as caught:
            await session.stop_runtime("ws-1", "crm")
        assert (caught.value.attempts, caught.value.may_have_stopped) == (0, False)
        with pytest.raises(BctrlConfigError, match="closed"):
            await enter(session)

    async def test_it_ends_waiting_calls_and_requests_in_flight_and_leaves_nothing(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.add_runtime("ws-1", "mail")
        emulator.inject(Reply(503, headers={"Retry-After": "30"}), alias="crm")
        emulator.inject(Fault.HANG, alias="mail")
        session = connect(max_connections=1)
        retrying = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await until(lambda: session.stats.waiting)
        in_flight = asyncio.create_task(session.stop_runtime("ws-1", "mail"))
        await wait_for_requests(emulator, 2)
        queued = asyncio.create_task(session.stop_runtime("ws-1", "chat"))
        await asyncio.sleep(0)

        await session.close()
        for call, error_class, attempts, may_have_stopped in (
            (retrying, BctrlConfigError, 1, False),
            (in_flight, BctrlNetworkError, 1, True),
            (queued, BctrlConfigError, 0, False),
        ):
            with pytest.raises(error_class) as caught:
                await asyncio.wait_for(call, BOUND)
            error = caught.value
            assert (error.attempts, error.may_have_stopped) == (
                attempts,
                may_have_stopped,
            )
        # The server's own tasks need a moment to end.
        await until(lambda: len(asyncio.all_tasks()) == 1)
        await until(lambda: not emulator._server.connections)

    async def test_garbage_collection_closes_the_connections_too(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        session = connect()
        await session.stop_runtime("ws-1", "crm")
        del session
        gc.collect()
        await until(lambda: not emulator._server.connections)

    @pytest.mark.parametrize("borrowed", [False, True])
    async def test_of_the_pool_during_a_host_lookup_is_an_error(
        self, lookup_began: asyncio.Event, *, borrowed: bool
    ) -> None:
        http = aiohttp.ClientSession() if borrowed else None
        session = BctrlSession(KEY, base_url="https://slow.test", http=http)
        call = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await asyncio.wait_for(lookup_began.wait(), BOUND)
        await (http or session).close()
        message = "http= is closed" if borrowed else "session was closed"
        with pytest.raises(BctrlError, match=message) as caught:
            await call
        assert type(caught.value) is (
            BctrlConfigError if borrowed else BctrlNetworkError
        )
        # A borrowed pool does not tell whether it had a connection.
        assert caught.value.may_have_stopped is borrowed

    async def test_between_the_headers_and_the_body_of_a_response_is_an_error(
        self,
    ) -> None:
        async def close(*_: object) -> None:
            await http.close()

        closing = aiohttp.TraceConfig()
        closing.on_request_end.append(close)
        half = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"
        async with (
            aiohttp.ClientSession(trace_configs=[closing]) as http,
            served(answering(half), http=http) as session,
        ):
            with pytest.raises(
                BctrlResponseError, match="the body was truncated"
            ) as caught:
                await session.stop_runtime("ws-1", "crm")
        assert caught.value.may_have_stopped

    async def test_while_the_key_is_fetched_is_an_error(
        self, emulator: Emulator
    ) -> None:
        called = asyncio.Event()
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def key() -> str:
            called.set()
            return await answer

        session = BctrlSession(key, base_url=emulator.url)
        call = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await called.wait()
        await session.close()
        answer.set_result(KEY)
        with pytest.raises(BctrlConfigError, match="closed") as caught:
            await call
        assert caught.value.may_have_stopped is False

    async def test_a_call_cancelled_meanwhile_is_cancelled(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(Fault.HANG)
        call = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await wait_for_requests(emulator, 1)
        call.cancel()
        await session.close()
        with pytest.raises(asyncio.CancelledError):
            await call

    async def test_a_runtime_error_of_a_trace_config_is_not_taken_for_it(
        self, connect: Connect
    ) -> None:
        async def broken(*_: object) -> None:
            raise RuntimeError("mine")

        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(broken)
        async with (
            aiohttp.ClientSession(trace_configs=[trace]) as http,
            connect(http=http) as session,
        ):
            with pytest.raises(RuntimeError, match="mine"):
                await session.stop_runtime("ws-1", "crm")


PROLOGUE = """
    import asyncio, os, signal, sys
    from bctrl_async import BctrlSession
    KEY, URL = sys.argv[1:]
    session = BctrlSession(KEY, base_url=URL)
    async def stop():
        await session.stop_runtime("ws-1", "r0")
    """
ENDINGS = {
    "never closed, in a function": """
        async def main():
            local = BctrlSession(KEY, base_url=URL)
            await local.stop_runtime("ws-1", "r0")
        asyncio.run(main())
        """,
    "an exception in the middle of stops": """
        async def main():
            calls = [asyncio.create_task(stop()) for _ in range(5)]
            await asyncio.sleep(0)
            sys.exit(3)
        asyncio.run(main())
        """,
    "tasks abandoned at the end": """
        async def main():
            for number in range(10):
                call = session.stop_runtime("ws-1", f"r{number}")
                tasks.append(asyncio.create_task(call))
            await asyncio.sleep(0.01)
        tasks = []
        asyncio.run(main())
        """,
    "a loop that is only closed": """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(stop())
        loop.close()
        """,
    "let go after its loop was only closed": """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(stop())
        loop.close()
        del session
        """,
    "closed under a second asyncio.run": """
        asyncio.run(stop())
        asyncio.run(session.close())
        """,
    "Ctrl-C": """
        async def main():
            await stop()
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(5)
        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            pass
        """,
}


@pytest.mark.parametrize("name", ENDINGS)
def test_no_way_to_end_a_program_prints_a_warning(name: str) -> None:
    """Fault: "Event loop is closed" at shutdown.

    openai-python#1254 and elasticsearch-py#2349 have it.
    """
    program = textwrap.dedent(PROLOGUE) + textwrap.dedent(ENDINGS[name])
    with emulator_in_a_thread() as emulator:
        done = subprocess.run(
            [sys.executable, "-c", program, KEY, emulator.url],
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=False,
        )
    assert (done.stderr, done.returncode) == ("", 3 if "sys.exit" in program else 0)
