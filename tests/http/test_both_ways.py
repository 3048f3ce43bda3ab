"""The fast path is taken by every stop of an owned pool, and sends the bytes that aiohttp sends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
from helpers import Connect, add_runtimes
from servers import http_answer, raw_server
from ways import Ways, long_way

from bctrl_async import BctrlSession
from bctrl_async.emulator import Emulator
from bctrl_async.observer import Attempt, AttemptObserver, Observer, StopObserver


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


async def test_a_process_that_a_test_starts_takes_the_same_way_as_the_suite(
    request: pytest.FixtureRequest,
) -> None:
    """Fault: a part of the suite is never run the long way, and nothing shows it."""
    program = "import aiohttp; print(aiohttp.ClientSession._request.__module__)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    stdout, _ = await process.communicate()
    long_way = request.config.getoption("long_way")
    assert stdout.split() == [b"sitecustomize" if long_way else b"aiohttp.client"]


async def test_reads_take_the_long_way(session: BctrlSession, ways: Ways) -> None:
    await session.get_runtime("ws-1", "crm")
    await session.list_runtimes("ws-1")
    assert ways.taken == (0, 2)


class Traced(Observer):
    """An observer that adds headers to each attempt of a stop."""

    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        del workspace_id, alias
        return TracedStop()


class TracedStop(StopObserver):
    def begin_attempt(self, attempt: Attempt) -> AttemptObserver:
        del attempt
        return TracedAttempt()


class TracedAttempt(AttemptObserver):
    def headers(self) -> Mapping[str, str]:
        return {"traceparent": "00-1-2-01", "accept": "is the session's"}


async def ask_for_key() -> str:
    return "key-of-a-function"


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, {}),
        ({}, {"idempotency_key": "k-1"}),
        ({}, {"headers": {"X-B": "1", "X-A": "", "x-b2": "a\tb", "User-Agent": "own/1"}}),
        ({}, {"idempotency_key": "k-1", "headers": {"accept": "text/html"}}),
        ({"api_key": ask_for_key}, {}),
        ({"api_key": lambda: "key-of-a-function"}, {"idempotency_key": "k-1"}),
        ({"headers": {"X-B": "1", "x-b": "2", "X-A": "", "user-agent": "own/1"}}, {}),
        ({"headers": {"X-B": "1", "Cookie": "a=b"}}, {"headers": {"x-b": "2", "X-A": "3"}}),
        ({"headers": {"Accept-Language": "de"}, "api_key": ask_for_key}, {}),
        ({"observer": Traced()}, {}),
        ({"observer": Traced(), "api_key": ask_for_key}, {"headers": {"X-A": "1"}}),
    ],
    ids=[
        "plain",
        "idempotency key",
        "headers",
        "idempotency key, headers",
        "awaited key",
        "key function, idempotency key",
        "session's headers",
        "session's headers, headers",
        "session's headers, awaited key",
        "observer",
        "observer, awaited key, headers",
    ],
)
@pytest.mark.parametrize("root", ["", "/a%2Fb/v1"])
async def test_both_ways_send_the_same_bytes(
    settings: dict[str, Any], arguments: dict[str, Any], root: str, ways: Ways
) -> None:
    """Fault: a header is missing on the fast path, or is another one, and a server rejects it."""
    heads: list[bytes] = []

    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        writer.write(http_answer("403 Forbidden"))

    targets = [("ws-1", "crm"), ("ws 1/ä", "c%2Fr m"), ("ws-1", "crm")]
    async with raw_server(handle) as url:
        for way in (nullcontext, long_way):
            async with BctrlSession(
                **{"api_key": "k", "base_url": url + root, "check_answers": False, **settings}
            ) as session:
                with way():
                    for target in targets:
                        with pytest.raises(Exception, match="403"):
                            await session.stop_runtime(*target, **arguments)

    assert len(heads) == 6
    assert heads[:3] == heads[3:]
    assert ways.short in {0, 3}
