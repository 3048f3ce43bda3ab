"""Fixtures for pytest: a running emulator of the API, and a session on it.

They are there as soon as the package is installed, in any kind of test: with pytest-asyncio in
either mode, with anyio's plugin, and without an event loop.

    from bctrl_async.emulator import Fault

    async def test_a_stop_outlives_a_refusal(bctrl_emulator, bctrl_session):
        bctrl_emulator.add_runtime("ws-1", "crm")
        bctrl_emulator.inject(Fault.RATE_LIMITED, alias="crm")
        assert (await bctrl_session.stop_runtime("ws-1", "crm")).status == "stopped"
"""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest

from bctrl_async import BctrlSession
from bctrl_async.emulator import Emulator

__all__ = ["bctrl_emulator", "bctrl_session"]

_KEY = "emulator-key"


@pytest.fixture
def bctrl_emulator() -> Iterator[Emulator]:
    """A running emulator; add runtimes to it and inject faults, then look at what it received.

    It has a thread and a loop of its own, so that it answers whatever the test is doing.
    """
    emulator = Emulator(port=0, api_key=_KEY)
    with _in_a_thread(emulator):
        yield emulator


@contextmanager
def _in_a_thread(emulator: Emulator) -> Iterator[None]:
    """Run an emulator in a thread of its own."""
    started: Future[None] = Future()
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()

    async def serve() -> None:
        try:
            await emulator.start()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for.
            started.set_exception(error)
            return
        started.set_result(None)
        await ended.wait()
        await emulator.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    try:
        started.result()
        yield
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


@pytest.fixture
def bctrl_session(bctrl_emulator: Emulator) -> BctrlSession:
    """A session on the emulator; it opens in the loop that first uses it, and closes with it."""
    return BctrlSession(_KEY, base_url=bctrl_emulator.url)
