"""The clients that are compared, each as a good engineer would write it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from enum import StrEnum
from functools import partial
from importlib import import_module
from uuid import UUID

import aiohttp
import msgspec

from bctrl_async import BctrlSession

KEY = "a-key-of-usual-length-0123456789"
WORKSPACE = "6f1f7a52-9f0e-4d53-8a64-0d1c6d6d2f11"
NO_WORKSPACES = (
    "AsyncBctrl stops a sandbox (POST /v1/sandboxes/{id}/stop): it has no workspaces."
)
_WARM_UP = 500

Stop = Callable[[str], Awaitable[object]]
"""Stop the runtime with this alias and return the parsed response."""

Contender = Callable[[str], AbstractAsyncContextManager[Stop]]
"""Open a client of the server at this URL."""


def aliases(count: int) -> Iterable[str]:
    return (f"crm-{number}" for number in range(count))


def pairs(count: int) -> Iterable[tuple[str, str]]:
    """Return the targets of a bulk stop."""
    return ((WORKSPACE, alias) for alias in aliases(count))


async def stop_all(stop: Stop, count: int, in_flight: int) -> int:
    """Stop runtimes with so many in flight, and return the number that were stopped."""
    remaining, stopped = aliases(count), 0

    async def work() -> None:
        nonlocal stopped
        for alias in remaining:
            await stop(alias)
            stopped += 1

    await asyncio.gather(*(work() for _ in range(in_flight)))
    return stopped


async def cpu_of_stop(
    contender: Contender, url: str, stops: int, in_flight: int
) -> float:
    """Return the CPU time of this process for a stop, in microseconds."""
    async with contender(url) as stop:
        await stop_all(stop, _WARM_UP, in_flight)
        start = time.process_time()
        await stop_all(stop, stops, in_flight)
        return (time.process_time() - start) / stops * 1e6


class _Kind(StrEnum):
    BROWSER = "browser"
    DESKTOP = "desktop"
    SPREADSHEET = "spreadsheet"


class _Status(StrEnum):
    ACTIVE = "active"
    STOPPED = "stopped"
    FAILED = "failed"


class _LaunchMode(StrEnum):
    PROFILE = "profile"
    EPHEMERAL = "ephemeral"


class _Summary(msgspec.Struct, frozen=True, rename="camel"):
    browser_running: bool | None = None
    current_driver: str | None = None
    default_context_id: str | None = None
    default_page_id: str | None = None
    launch_mode: _LaunchMode | None = None
    profile_id: UUID | None = None
    storage_workspace: str | None = None


class _Runtime(msgspec.Struct, frozen=True, rename="camel"):
    # A copy, so that a slow model of bctrl_async cannot slow down both.
    id: UUID
    alias: str
    workspace_id: UUID
    kind: _Kind
    status: _Status
    driver: str
    created_at: str
    updated_at: str
    summary: _Summary | None = None


_decode = msgspec.json.Decoder(_Runtime).decode
_HEADERS = {"Authorization": f"Bearer {KEY}"}
_TIMEOUT = timedelta(minutes=5)  # The default of aiohttp.


def _read(status: int, body: bytes) -> _Runtime:
    if status != 200:
        raise RuntimeError(f"the server answered {status}")
    return _decode(body)


def _path(alias: str) -> str:
    return f"/v1/workspaces/{WORKSPACE}/runtimes/{alias}/stop"


@asynccontextmanager
async def bare(
    base: str, trace_configs: Sequence[aiohttp.TraceConfig] = ()
) -> AsyncGenerator[Stop]:
    """Use only aiohttp and msgspec."""
    async with aiohttp.ClientSession(
        headers=_HEADERS, trace_configs=list(trace_configs)
    ) as session:

        async def stop(alias: str) -> _Runtime:
            async with session.post(base + _path(alias)) as response:
                return _read(response.status, await response.read())

        yield stop


@asynccontextmanager
async def bctrl_async(base: str) -> AsyncGenerator[Stop]:
    """Use this package."""
    async with BctrlSession(KEY, base_url=base) as session:
        yield partial(session.stop_runtime, WORKSPACE)


@asynccontextmanager
async def vendor(base: str) -> AsyncGenerator[Stop]:
    """Use the vendor's AsyncBctrl, whose connections end with the process."""
    client = import_module("bctrl").AsyncBctrl(token=KEY, base_url=base)
    yield client.sandboxes.stop


@asynccontextmanager
async def httpx(base: str) -> AsyncGenerator[Stop]:
    """Use httpx and msgspec."""
    async with import_module("httpx").AsyncClient(
        base_url=base, headers=_HEADERS
    ) as client:

        async def stop(alias: str) -> _Runtime:
            response = await client.post(_path(alias))
            return _read(response.status_code, response.content)

        yield stop


@asynccontextmanager
async def pyreqwest(base: str) -> AsyncGenerator[Stop]:
    """Use pyreqwest, a client in Rust, and msgspec."""
    builder = import_module("pyreqwest.client").ClientBuilder()
    builder = builder.default_headers(_HEADERS).timeout(_TIMEOUT)
    async with builder.build() as client:

        async def stop(alias: str) -> _Runtime:
            response = await client.post(base + _path(alias)).build().send()
            return _read(response.status, await response.bytes())

        yield stop
