"""A session whose attempts go to a simulated server, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import pytest
from msgspec.structs import replace

from bctrl_async import (
    BctrlError,
    BctrlNetworkError,
    BctrlServerError,
    BctrlSession,
    BctrlTimeoutError,
    Runtime,
    StopOutcome,
    StopReport,
)
from bctrl_async._calls.call import Call
from bctrl_async._calls.sender import Sender
from bctrl_async._http.lists import RuntimeList
from bctrl_async._kinds import Failure, Kind
from bctrl_async.bulk._input import Targets
from support import virtual_time
from support.runtimes import runtime
from support.throttling import Server as RateLimit, token_bucket

_T = TypeVar("_T")

ANSWER = runtime()


class Request(NamedTuple):
    """A request at the server; `number` counts those to its alias, from 1."""

    at: float
    workspace: str
    alias: str
    """It is empty in a request for a list."""
    number: int
    stops: bool


Answer = Runtime | Failure | BctrlError
"""The response to a request; an error stands for its failure."""
Server = Callable[[Request], Answer]
CANARY = "bctrl-async-canary"

# What a server, or a gateway before it, does to a request in place of an answer.
refused = partial(BctrlNetworkError, "no connection: refused")
disconnected = partial(BctrlNetworkError, "the connection broke", may_have_stopped=True)
server_error = partial(BctrlServerError, "500", status=500, may_have_stopped=True)
bad_gateway = partial(BctrlServerError, "502", status=502, may_have_stopped=True)
unanswered = partial(BctrlTimeoutError, "no answer", may_have_stopped=True)
unavailable = partial(BctrlServerError, "503", status=503, may_have_stopped=True)
Fail = Callable[[], BctrlError | Failure]


def down(since: float, until: float, fail: Fail = disconnected) -> Server:
    """Make a server that fails between two times."""
    return lambda request: fail() if since <= request.at < until else ANSWER


def dead(*numbers: int, fail: Fail = disconnected) -> Server:
    """Make a server that never answers some targets, and all others at once."""
    names = {f"r{number}" for number in numbers}
    return lambda request: fail() if request.alias in names else ANSWER


def failing_first(*numbers: int, fail: Fail = disconnected, times: int = 1) -> Server:
    """Make a server that fails the first requests of some targets."""
    server = dead(*numbers, fail=fail)
    return lambda request: server(request) if request.number <= times else ANSWER


def with_quotas(rate: float, burst: float) -> Server:
    """Make a server with a quota for each workspace."""
    quotas: defaultdict[str, RateLimit] = defaultdict(
        lambda: token_bucket(lambda _: rate, burst)
    )
    return lambda request: quotas[request.workspace](request.at) or ANSWER


def targets(count: int) -> list[tuple[str, str]]:
    return [("ws-1", f"r{number}") for number in range(count)]


def targets_in(workspace: str, count: int) -> list[tuple[str, str]]:
    """Return targets whose aliases are in no other workspace."""
    return [(workspace, f"{workspace}/{number}") for number in range(count)]


_IN_DOUBT: dict[type[BctrlError], Kind] = {
    BctrlNetworkError: Kind.LOST,
    BctrlTimeoutError: Kind.SLOW_ANSWER,
}


def _as_result(answer: Answer) -> Runtime | Failure:
    if not isinstance(answer, BctrlError):
        return answer
    failure = Failure.of(answer)
    kind = _IN_DOUBT.get(type(answer)) if answer.may_have_stopped else None
    return failure if kind is None else replace(failure, kind=kind)


class Simulation:
    """A simulated server, and what it and the bulk stops of a session saw."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, server: Server, latency: float = 0.1
    ) -> None:
        self.requests: list[Request] = []
        self.received: Counter[str] = Counter()
        self.outcomes: list[StopOutcome] = []
        self.ended_at: dict[str, float] = {}
        self.seconds = 0.0
        self.read_answer: BctrlError | Failure | None = None
        """The response to every GET, if the server answers none."""
        self.read_latency = latency
        self.list_answer: Callable[[Request], Answer | RuntimeList | None] = lambda _: (
            None
        )
        """The response to a list; None lists the runtimes that were asked to stop."""
        self.asked: defaultdict[str, dict[str, None]] = defaultdict(dict)
        """The aliases in each workspace that were asked to stop."""
        self.before_response: Callable[[Request], Awaitable[None] | None] = lambda _: (
            None
        )

        async def attempt(
            sender: Sender, call: Call[Runtime], *_: object
        ) -> Runtime | RuntimeList | Failure:
            sender._start_attempt(call)
            call.on_connection()
            alias, stops = call.alias or "", call.operation.stops
            self.received[alias] += 1
            now = asyncio.get_running_loop().time()
            request = Request(
                now, call.workspace_id, alias, self.received[alias], stops
            )
            self.requests.append(request)
            if stops:
                self.asked[call.workspace_id][alias] = None
            if not stops and self.read_answer is not None:
                await asyncio.sleep(self.read_latency)
                return _as_result(self.read_answer)
            answer = server(request) if alias else self._list(server, request)
            try:
                async with asyncio.timeout(call.limit.total):
                    if (pause := self.before_response(request)) is not None:
                        await pause
                    await asyncio.sleep(latency)
            except TimeoutError:
                answer = unanswered()
            return answer if isinstance(answer, list) else _as_result(answer)

        monkeypatch.setattr(Sender, "_attempt", attempt)
        random.seed(0)  # It decides the jitter of the retries.

    def _list(self, server: Server, request: Request) -> Answer | RuntimeList:
        """Answer a list: each runtime as a GET of it would be answered."""
        answer = self.list_answer(request)
        if answer is not None:
            return answer
        runtimes: RuntimeList = []
        for alias in self.asked[request.workspace]:
            got = server(request._replace(alias=alias))
            if not isinstance(got, Runtime):
                return got
            runtimes.append(replace(got, alias=alias))
        return runtimes

    @property
    def lists(self) -> list[Request]:
        return [request for request in self.reads if not request.alias]

    @property
    def stops(self) -> list[Request]:
        return [request for request in self.requests if request.stops]

    @property
    def reads(self) -> list[Request]:
        return [request for request in self.requests if not request.stops]

    def run(
        self,
        main: Callable[[BctrlSession], Awaitable[_T]],
        *,
        rate: float | None = None,
        max_connections: int = 100,
    ) -> _T:
        async def scenario() -> _T:
            async with BctrlSession(
                "key",
                base_url="http://127.0.0.1:9",
                rate=rate,
                max_connections=max_connections,
            ) as session:
                returned = await main(session)
            self.seconds = virtual_time.now()
            return returned

        return virtual_time.run(scenario())

    def on_outcome(self, outcome: StopOutcome) -> None:
        self.outcomes.append(outcome)
        self.ended_at[outcome.target.alias] = virtual_time.now()

    def stop(
        self,
        stops: int | Targets = 1,
        *,
        verify: bool | float = False,
        rate: float | None = None,
        max_connections: int = 100,
        **options: Any,  # noqa: ANN401 - `stop_runtimes` has them.
    ) -> StopReport:
        """Stop these targets, or so many, in a bulk stop."""

        async def main(session: BctrlSession) -> StopReport:
            return await session.stop_runtimes(
                targets(stops) if isinstance(stops, int) else stops,
                on_outcome=self.on_outcome,
                verify=verify,
                **options,
            )

        report = self.run(main, rate=rate, max_connections=max_connections)
        assert report.counts.total() == report.total == len(self.outcomes)
        assert report.total == stops or not isinstance(stops, int)
        return report


class Simulate(Protocol):
    """The type of the fixture `simulate`."""

    def __call__(self, server: Server, latency: float = 0.1) -> Simulation: ...
