"""The fast path is taken by every stop of an owned pool, and sends the bytes that aiohttp sends."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

import pytest
from helpers import Connect, add_runtimes
from servers import http_answer, raw_server, recording
from test_observer import Recorder
from ways import Ways, long_way

from bctrl_async import BctrlPermissionError, BctrlSession
from bctrl_async.emulator import Emulator


async def test_every_stop_of_an_owned_pool_takes_the_fast_path(
    emulator: Emulator, connect: Connect, ways: Ways, request: pytest.FixtureRequest
) -> None:
    """Fault: the fast path is lost, and the only sign of it is the time that stops take."""
    targets = add_runtimes(emulator, 100)
    async with connect() as session:
        await asyncio.gather(*(session.stop_runtime(*target) for target in targets[:50]))
        assert (await session.stop_runtimes(targets[50:])).ok
    assert len(emulator.requests) == 100
    assert ways.taken == ((0, 100) if request.config.getoption("long_way") else (100, 0))


async def ask_for_key() -> str:
    return "key-of-a-function"


TRACED = Recorder({"traceparent": "00-1-2-01", "accept": "is the session's"})
Options = dict[str, Any]

CASES: dict[str, tuple[Options, Options]] = {
    "plain": ({}, {}),
    "headers": (
        {},
        {"headers": {"X-B": "1", "X-A": "", "x-b2": "a\tb", "User-Agent": "own/1"}},
    ),
    "idempotency key, headers": ({}, {"idempotency_key": "k", "headers": {"accept": "text/html"}}),
    "awaited key, idempotency key": ({"api_key": ask_for_key}, {"idempotency_key": "k"}),
    "session's headers": (
        {"headers": {"X-B": "1", "x-b": "2", "X-A": "", "user-agent": "own/1"}},
        {},
    ),
    "session's headers, headers": (
        {"headers": {"X-B": "1", "Cookie": "a=b"}},
        {"headers": {"x-b": "2", "X-A": "3"}},
    ),
    "observer, awaited key, headers": (
        {"observer": TRACED, "api_key": ask_for_key},
        {"headers": {"X-A": "1"}},
    ),
}
"""Options of a session, and of a stop."""


@pytest.mark.parametrize(("settings", "arguments"), CASES.values(), ids=CASES)
async def test_both_ways_send_the_same_bytes(
    settings: Options, arguments: Options, ways: Ways
) -> None:
    """Fault: a header is missing on the fast path, or is another one, and a server rejects it."""
    heads: list[bytes] = []
    targets = [("ws-1", "crm"), ("ws 1/ä", "c%2Fr m"), ("ws-1", "crm")]
    async with raw_server(recording(heads, http_answer("403 Forbidden"))) as url:
        options = {"api_key": "k", "base_url": f"{url}/a%2Fb/v1", "check_answers": False}
        for way in (nullcontext, long_way):
            async with BctrlSession(**{**options, **settings}) as session:
                with way():
                    for target in targets:
                        with pytest.raises(BctrlPermissionError):
                            await session.stop_runtime(*target, **arguments)

    assert len(heads) == 6
    assert heads[:3] == heads[3:]
    assert ways.short in {0, 3}
