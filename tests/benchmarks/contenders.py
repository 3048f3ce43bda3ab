"""The clients that are compared, each as a good engineer would write it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from enum import StrEnum
from functools import partial
from importlib import import_module
from uuid import UUID

import aiohttp
import msgspec

from bctrl_async import BctrlSession

KEY = "a-key-of-usual-length-0123456789"
WORKSPACE = "6f1f7a52-9f0e-4d53-8a64-0d1c6d6d2f11"

Stop = Callable[[str], Awaitable[object]]
"""Stop the runtime with this alias and return the parsed response."""

Contender = Callable[[str], AbstractAsyncContextManager[Stop]]
"""Open a client of the server at this URL."""


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


def _read(status: int, body: bytes) -> _Runtime:
    if status != 200:
        raise RuntimeError(f"the server answered {status}")
    return _decode(body)


@asynccontextmanager
async def bare(
    base: str, trace_configs: Sequence[aiohttp.TraceConfig] = ()
) -> AsyncGenerator[Stop]:
    """Use only aiohttp and msgspec."""
    async with aiohttp.ClientSession(
        headers=_HEADERS, trace_configs=list(trace_configs)
    ) as session:

        async def stop(alias: str) -> _Runtime:
            url = f"{base}/v1/workspaces/{WORKSPACE}/runtimes/{alias}/stop"
            async with session.post(url) as response:
                return _read(response.status, await response.read())

        yield stop


@asynccontextmanager
async def bare_bounded(base: str) -> AsyncGenerator[Stop]:
    """Use aiohttp and msgspec behind a semaphore."""
    semaphore = asyncio.Semaphore(100)
    async with bare(base) as unbounded:

        async def stop(alias: str) -> object:
            async with semaphore:
                return await unbounded(alias)

        yield stop


@asynccontextmanager
async def bctrl_async(base: str) -> AsyncGenerator[Stop]:
    """Use this package."""
    async with BctrlSession(KEY, base_url=base) as session:
        yield partial(session.stop_runtime, WORKSPACE)


@asynccontextmanager
async def vendor(base: str) -> AsyncGenerator[Stop]:
    """Use the vendor's AsyncBctrl. It cannot be closed: its connections end with the process."""
    client = import_module("bctrl").AsyncBctrl(token=KEY, base_url=base)
    yield client.sandboxes.stop


@asynccontextmanager
async def httpx(base: str) -> AsyncGenerator[Stop]:
    """Use httpx and msgspec."""
    async with import_module("httpx").AsyncClient(base_url=base, headers=_HEADERS) as client:

        async def stop(alias: str) -> _Runtime:
            response = await client.post(f"/v1/workspaces/{WORKSPACE}/runtimes/{alias}/stop")
            return _read(response.status_code, response.content)

        yield stop
