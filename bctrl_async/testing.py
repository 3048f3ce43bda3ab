"""Fixtures for pytest: a running emulator of the API, a session for it, and mocks.

Installing the package makes them available. They work with pytest-asyncio in either
mode, with anyio's plugin, and in tests without an event loop.

    from bctrl_async.emulator import Fault

    async def test_a_throttled_stop_is_retried(bctrl_emulator, bctrl_session):
        bctrl_emulator.add_runtime("ws-1", "crm")
        bctrl_emulator.inject(Fault.RATE_LIMITED, alias="crm")
        assert (await bctrl_session.stop_runtime("ws-1", "crm")).status == "stopped"

The marker `bctrl_emulator` gives the emulator of a test or its module other arguments:

    @pytest.mark.bctrl_emulator(faults={Fault.SERVER_ERROR: 0.2}, seed=7)
    async def test_a_bad_day(bctrl_emulator, bctrl_session): ...
"""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections import ChainMap
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest

from bctrl_async import BctrlSession, _quick_failures
from bctrl_async._config import check_type
from bctrl_async.emulator import Emulator

if TYPE_CHECKING:
    from aioresponses import aioresponses

__all__ = [
    "bctrl_aioresponses",
    "bctrl_emulator",
    "bctrl_env",
    "bctrl_session",
    "set_testing",
]

_MARKER = (
    "bctrl_emulator(**arguments): arguments of the Emulator, such as rate_limit=50"
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", _MARKER)


def set_testing(
    testing: bool,  # noqa: FBT001 - as in stamina.
) -> AbstractContextManager[object]:
    """Make failures quick in this process, or stop that.

    All sessions and threads then make their retries without the waits, whatever their
    retry policy, `timeout` and `verify` are: there is no backoff, no Retry-After and no
    retry quota. The time limit of an attempt is at most 0.4 seconds. A call gives up
    after 10 throttled attempts, or 2 that were not answered in time. A bulk stop polls
    a runtime at most 10 times, 0.1 seconds apart while it runs, and gives up a server
    after 10 unanswered canaries. A `rate` holds.

    `bctrl_session` and `bctrl_env` turn it on. A test of the waits turns it off:

        with set_testing(False):
            report = await session.stop_runtimes(targets)

    Args:
        testing: True for quick failures.

    Returns:
        A context manager; its end restores what was set before.

    Raises:
        BctrlConfigError: `testing` is not a bool.
    """
    check_type(testing, bool, "testing", "a bool")
    restore = ExitStack()
    restore.callback(setattr, _quick_failures, "is_on", _quick_failures.is_on)
    _quick_failures.is_on = testing
    return restore


@pytest.fixture
def bctrl_emulator(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    """A running emulator: add runtimes, inject faults, then inspect its requests.

    It runs in a thread with its own event loop, so it also serves blocking tests. The
    marker of the same name gives arguments of `Emulator`; of two markers, the nearer to
    the test wins.
    """
    markers = [*request.node.iter_markers("bctrl_emulator")]
    # The Emulator takes keywords alone, so an argument without a name is a TypeError.
    positional = [argument for marker in markers for argument in marker.args]
    # The nearest marker comes first, and the first of a ChainMap wins.
    arguments = ChainMap(*(marker.kwargs for marker in markers), {"port": 0})
    emulator = Emulator(*positional, **arguments)
    with _running_in_thread(emulator):
        yield emulator


@contextmanager
def _running_in_thread(emulator: Emulator) -> Iterator[None]:
    """Run an emulator in a thread with an event loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(emulator.start(), loop).result()
        yield
    finally:
        asyncio.run_coroutine_threadsafe(emulator.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def bctrl_env(
    bctrl_emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The environment of the emulator, for code under test that makes its own session.

    `BCTRL_API_KEY` and `BCTRL_BASE_URL` point to it, and `BCTRL_PROFILE` is not set.
    Failures are quick, as `set_testing` says.
    """
    monkeypatch.setenv("BCTRL_API_KEY", bctrl_emulator.api_key)
    monkeypatch.setenv("BCTRL_BASE_URL", bctrl_emulator.url)
    monkeypatch.delenv("BCTRL_PROFILE", raising=False)
    with set_testing(True):
        yield


@pytest.fixture
def bctrl_session(bctrl_emulator: Emulator) -> Iterator[BctrlSession]:
    """A session for the emulator; it opens in the event loop that first uses it.

    Failures are quick, as `set_testing` says.
    """
    with set_testing(True):
        yield BctrlSession(bctrl_emulator.api_key, base_url=bctrl_emulator.url)


@pytest.fixture
def bctrl_aioresponses(monkeypatch: pytest.MonkeyPatch) -> Iterator[aioresponses]:
    """Mocked answers in place of a server; needs the package aioresponses.

    While a test has this fixture, aiohttp sends no request: a request that is not
    mocked fails as if the connection was refused.
    """
    core = importlib.import_module("aioresponses.core")
    # aiohttp 3.14 requires an argument that aioresponses 0.7.9 does not pass
    # (pnuckowski/aioresponses#289). A mocked response has no writer: any object does.
    response_class = partial(core.ClientResponse, stream_writer=Mock(output_size=0))
    monkeypatch.setattr(core, "ClientResponse", response_class)
    with core.aioresponses() as mocked:
        yield mocked
