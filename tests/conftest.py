"""What the tests share: a running emulator, a session on it, and waits that take no time."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable
from functools import partial, partialmethod
from unittest.mock import Mock

import aiohttp
import aioresponses.core
import pytest

from bctrl_async import BctrlSession, RetryPolicy
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async.emulator import Emulator

KEY = "emulator-key"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it runs in the background like this, and every process started here would
    # inherit it, so that no test could interrupt one.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BCTRL_API_KEY", "BCTRL_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator(port=0, api_key=KEY) as running:
        running.add_runtime("ws-1", "crm")
        yield running


@pytest.fixture
def connect(emulator: Emulator) -> Callable[..., BctrlSession]:
    """Make a session on the emulator, with waits between attempts that hardly take any time."""
    return partial(
        BctrlSession, KEY, base_url=emulator.url, retry=RetryPolicy(base=0.001, cap=0.001)
    )


@pytest.fixture
async def session(connect: Callable[..., BctrlSession]) -> AsyncIterator[BctrlSession]:
    async with connect() as opened:
        yield opened


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace every wait between attempts by none, and list how long each would have been."""
    waited: list[float] = []

    async def pause(_: Limiter, delay: float) -> None:
        waited.append(delay)

    monkeypatch.setattr(Limiter, "sleep", pause)
    monkeypatch.setattr(
        AdaptiveRate, "on_throttled", lambda *_: None
    )  # Nor does the limiter close.
    return waited


class _MockableResponse(aiohttp.ClientResponse):
    # aiohttp 3.14 requires an argument that aioresponses 0.7.9 does not pass
    # (pnuckowski/aioresponses#289); a mocked answer has no writer, so any will do.
    __init__ = partialmethod(aiohttp.ClientResponse.__init__, stream_writer=Mock(output_size=0))


@pytest.fixture
def mocked(monkeypatch: pytest.MonkeyPatch) -> aioresponses.aioresponses:
    """Answers from aioresponses in place of a server."""
    monkeypatch.setattr(aioresponses.core, "ClientResponse", _MockableResponse)
    return aioresponses.aioresponses()
