"""Fixtures for pytest: a running emulator of the API, a session connected to it, and mocks.

Installing the package makes them available. They work with pytest-asyncio in either mode, with
anyio's plugin, and in tests without an event loop.

    from bctrl_async.emulator import Fault

    async def test_a_throttled_stop_is_retried(bctrl_emulator, bctrl_session):
        bctrl_emulator.add_runtime("ws-1", "crm")
        bctrl_emulator.inject(Fault.RATE_LIMITED, alias="crm")
        assert (await bctrl_session.stop_runtime("ws-1", "crm")).status == "stopped"
"""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest

from bctrl_async import BctrlSession
from bctrl_async.emulator import Emulator

if TYPE_CHECKING:
    from aioresponses import aioresponses

__all__ = ["bctrl_aioresponses", "bctrl_emulator", "bctrl_session"]

_KEY = "emulator-key"


@pytest.fixture
def bctrl_emulator() -> Iterator[Emulator]:
    """A running emulator: add runtimes, inject faults, then inspect the requests it received.

    It runs in a thread with its own event loop, so it also serves blocking tests.
    """
    emulator = Emulator(port=0, api_key=_KEY)
    with _in_a_thread(emulator):
        yield emulator


@contextmanager
def _in_a_thread(emulator: Emulator) -> Iterator[None]:
    """Run an emulator in a separate thread."""
    started: Future[None] = Future()
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()

    async def serve() -> None:
        try:
            await emulator.start()
        except BaseException as error:  # noqa: BLE001 - raised by `started.result()`.
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
    """A session connected to the emulator; it opens in the event loop that first uses it."""
    return BctrlSession(_KEY, base_url=bctrl_emulator.url)


@pytest.fixture
def bctrl_aioresponses(monkeypatch: pytest.MonkeyPatch) -> Iterator[aioresponses]:
    """Mocked answers in place of a server; needs the package aioresponses.

    No request of aiohttp is sent while a test has this fixture: one that the test has not mocked
    fails as if the connection was refused.
    """
    try:
        core = importlib.import_module("aioresponses.core")
    except ModuleNotFoundError:
        pytest.fail(
            "bctrl_aioresponses needs the package aioresponses: pip install aioresponses",
            pytrace=False,
        )
    # aiohttp 3.14 requires an argument that aioresponses 0.7.9 does not pass
    # (pnuckowski/aioresponses#289). A mocked response has no writer, so any object will do.
    response_class = partial(core.ClientResponse, stream_writer=Mock(output_size=0))
    monkeypatch.setattr(core, "ClientResponse", response_class)
    with core.aioresponses() as mocked:
        yield mocked
