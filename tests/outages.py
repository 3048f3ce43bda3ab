"""A server in virtual time, which answers the attempts of a session as a test says."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest
from helpers import run_in_virtual_time
from runtimes import runtime

from bctrl_async import BctrlError, BctrlServerError, BctrlSession, Runtime
from bctrl_async._calls.call import Call
from bctrl_async._calls.sender import Sender

_T = TypeVar("_T")

ANSWER = runtime()

Server = Callable[[float, str], Runtime | BctrlError]
"""Takes the time and the alias of a request; returns its response."""


def bad_gateway() -> BctrlError:
    return BctrlServerError("502", status=502, may_have_stopped=True)


def targets(count: int) -> Iterator[tuple[str, str]]:
    return (("ws-1", f"r{number}") for number in range(count))


class Simulation:
    """A session whose attempts go to a simulated server, in virtual time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, server: Server, latency: float) -> None:
        self.requests: Counter[str] = Counter()
        self.reads = 0
        self.answers_reads = True
        self.read_latency = latency
        self.seconds = 0.0
        self.answered_at: list[float] = []
        self.before_response: Callable[[float], Awaitable[None] | None] = lambda _: None

        async def attempt(_: Sender, call: Call[Runtime], *__: object) -> Runtime | BctrlError:
            now = asyncio.get_running_loop().time()
            call.on_connection()
            alias = call.alias or ""
            self.requests[alias] += 1
            self.reads += not call.operation.stops
            if not call.operation.stops and not self.answers_reads:
                await asyncio.sleep(self.read_latency)
                return bad_gateway()
            answer = server(now, alias)
            if (pause := self.before_response(now)) is not None:
                await pause
            await asyncio.sleep(latency)
            if isinstance(answer, Runtime):
                self.answered_at.append(now)
            return answer

        monkeypatch.setattr(Sender, "_attempt", attempt)

    def stops(self) -> int:
        return self.requests.total() - self.reads

    def answered_between(self, begin: float, end: float) -> int:
        return sum(begin <= now < end for now in self.answered_at)

    def run(self, main: Callable[[BctrlSession], Awaitable[_T]]) -> _T:
        returned, self.seconds = run_in_virtual_time(main)
        return returned
