"""The limiter in virtual time: behind limits, throttled at random, beside throttled targets.

`python tests/benchmarks/limiter.py [--seeds 24] [--only PATTERN,PATTERN]`

Each row runs with many seeds, from 0; a row of the limiter alone runs on two servers, of which one
decides when a request starts and the other half a latency later. `--only` chooses rows by patterns,
such as "service*,* of 3000*". All rows with 24 seeds take hours.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import sys
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TypeVar
from unittest.mock import patch

import pytest
from harness import Report, Row, command, measured

sys.path.append(str(Path(__file__).parents[1]))
from support import virtual_time
from support.simulated import ANSWER, CANARY, Request, Simulation, unavailable
from support.throttling import Fleet, Run, Server, fixed_window, throttled, token_bucket

from bctrl_async import (
    BctrlError,
    BctrlRateLimitError,
    BctrlServerError,
    BctrlSession,
    Runtime,
    StopOutcome,
)
from bctrl_async._calls.call import Call
from bctrl_async._calls.sender import Sender
from bctrl_async._kinds import Failure

_T = TypeVar("_T")
_Target = tuple[str, str]
_Figures = dict[str, float]
_Case = Callable[[int], list[_Figures]]
"""Run a row with a seed."""
_Answers = Callable[[float, str, str], BctrlError | None]
"""Takes a time, a workspace and an alias; returns the error of the response, or None."""
_MakeAnswers = Callable[[int], _Answers]
"""Makes the answers of a server from a seed."""

_WORST_IS_LEAST = {"fairness", "share", "used"}
_LATENCY = 0.02

_api429 = partial(BctrlRateLimitError, "429", status=429, code="rate.limited")
_api503 = partial(BctrlServerError, "503", status=503, code="server.unavailable")


# Servers


def _free(_: float) -> None:
    """Throttle nothing."""


def _bucket(rate: float = 200.0, burst: float = 50, retry_after: float | None = None) -> Server:
    return token_bucket(lambda _: rate, burst, retry_after)


def _changing(now: float) -> float:
    if now < 20.0:
        return 200.0
    return 50.0 if now < 40.0 else 400.0


def _sliding_window(limit: int) -> Server:
    accepted: deque[float] = deque()

    def serve(now: float) -> BctrlError | None:
        while accepted and accepted[0] <= now - 1.0:
            accepted.popleft()
        if len(accepted) >= limit:
            return throttled()
        accepted.append(now)
        return None

    return serve


def _outage(since: float, until: float) -> Server:
    def serve(now: float) -> BctrlError | None:
        return throttled() if since <= now < until else None

    return serve


def _noisy(
    share: float, seed: int, serve: Server = _free, retry_after: float | None = None
) -> Server:
    """Make a server that throttles a share of the requests at random."""
    chance = random.Random(f"{share} {seed}")

    def noisy(now: float) -> BctrlError | None:
        return throttled(retry_after) if chance.random() < share else serve(now)

    return noisy


def _with_code(error: BctrlError | None) -> BctrlError | None:
    return None if error is None else _api429(retry_after=error.retry_after)


def _bad(
    fail: Callable[[], BctrlError] = _api429, serve: Callable[[], Server] = lambda: _free
) -> _MakeAnswers:
    """Throttle the targets that are named so, for ever, beside a limit for all others."""

    def make(_: int) -> _Answers:
        others = serve()

        def answer(now: float, _: str, alias: str) -> BctrlError | None:
            return fail() if alias.startswith("bad") else _with_code(others(now))

        return answer

    return make


def _limit(rate: float, burst: float, retry_after: float | None = None) -> _MakeAnswers:
    return _bad(serve=lambda: _bucket(rate, burst, retry_after))


def _quota(rate: float, burst: float) -> _MakeAnswers:
    """Limit each workspace."""

    def make(_: int) -> _Answers:
        buckets: defaultdict[str, Server] = defaultdict(lambda: _bucket(rate, burst))
        return lambda now, workspace, _: _with_code(buckets[workspace](now))

    return make


def _random(share: float) -> _MakeAnswers:
    def make(seed: int) -> _Answers:
        serve = _noisy(share, seed)
        return lambda now, *_: _with_code(serve(now))

    return make


# The limiter alone, on both servers


class _OnBoth(ABC):
    """A row of the limiter alone."""

    def __call__(self, seed: int) -> list[_Figures]:
        return [self.run(seed, halfway=halfway) for halfway in (False, True)]

    @abstractmethod
    def run(self, seed: int, *, halfway: bool) -> _Figures:
        """Run with one of the servers."""


@dataclass
class _One(_OnBoth):
    """A bulk stop of one process; `ideal` is in seconds."""

    serve: Callable[[int], Server]
    count: int = 2000
    ideal: float = 9.75
    latency: float = 0.01
    server_limit: float = math.inf

    def run(self, seed: int, *, halfway: bool) -> _Figures:
        random.seed(seed)
        rng = random.Random(seed)
        run = Run(
            self.serve(seed),
            lambda _: self.latency * rng.uniform(0.5, 1.5),
            server_limit=self.server_limit,
            halfway=halfway,
        )
        virtual_time.run(run.bulk(self.count))
        return {
            "to ideal": run.seconds / self.ideal,
            "% throttled": 100 * run.throttled / run.requests,
            "lost": run.gave_up,
        }


@dataclass
class _Together(_OnBoth):
    """Processes that share a bulk stop, at 200 a second."""

    count: int
    spread: float = 1.0
    retry_after: float | None = None
    stops: int = 2000

    def run(self, seed: int, *, halfway: bool) -> _Figures:
        server = _bucket(retry_after=self.retry_after)
        fleet = Fleet(server, _starts(self.count, seed, self.spread), seed, halfway=halfway)
        fleet.run(600.0, self.stops // self.count)
        took = [end - start for end, start in zip(fleet.ended, fleet.starts, strict=True)]
        squares = sum(seconds**-2 for seconds in took)
        return {
            "to ideal": max(took) / ((self.stops - 50) / 200),
            "% throttled": 100 * fleet.throttled_share(0.0, math.inf),
            "fairness": sum(1 / seconds for seconds in took) ** 2 / (self.count * squares),
        }


@dataclass
class _Long(_OnBoth):
    """Processes that are busy for a minute; the figures are of its last forty seconds.

    With `has_late`, another starts after twenty seconds; `share` is its part of an equal share.
    """

    count: int
    serve: Callable[[int], Server] = lambda _: _bucket()
    rate: float = 200.0
    has_late: bool = False

    def run(self, seed: int, *, halfway: bool) -> _Figures:
        starts = _starts(self.count, seed, 1.0) + [20.0] * self.has_late
        fleet = Fleet(self.serve(seed), starts, seed, halfway=halfway)
        fleet.run(60.0)
        figures = {
            "% throttled": 100 * fleet.throttled_share(20.0, 60.0),
            "used": sum(fleet.rates(20.0, 60.0)) / self.rate,
        }
        if self.has_late:
            equal = self.rate / (self.count + 1)
            return figures | {"share": fleet.rates(30.0, 60.0)[-1] / equal}
        return figures | {"fairness": fleet.fairness(20.0, 60.0)}


def _starts(count: int, seed: int, spread: float) -> list[float]:
    rng = random.Random(seed + 1000)
    return [rng.uniform(0.0, spread) for _ in range(count)]


@dataclass
class _Speed:
    """One process, whose connections would allow a multiple of the limit of 200 a second."""

    multiple: float

    def __call__(self, seed: int) -> list[_Figures]:
        random.seed(seed)
        rng, slots = random.Random(seed), round(10 * self.multiple)
        is_halfway = bool(seed % 2)
        run = Run(_bucket(), lambda _: 0.05 * rng.uniform(0.5, 1.5), slots, halfway=is_halfway)
        virtual_time.run(run.bulk(6000))
        throttled_share = 100 * run.throttled / run.requests
        return [{"to ideal": run.seconds / self.ideal, "% throttled": throttled_share}]

    @property
    def ideal(self) -> float:
        """The seconds that the limit or the connections take."""
        return max((6000 - 50) / 200.0, 6000 / (200.0 * self.multiple))


# Whole sessions


class _Service:
    """A simulated server, to which the attempts of a session go."""

    def __init__(self, answers: _Answers, seed: int, latency: float = _LATENCY) -> None:
        self.requests = 0
        self._answers = answers
        self._latency = latency
        self._seed = seed
        self._rng = random.Random(seed)

    async def _attempt(self, call: Call[Runtime]) -> Runtime | Failure:
        call.on_connection()
        self.requests += 1
        answer = None
        if call.alias and not call.alias.startswith(CANARY):
            now = asyncio.get_running_loop().time()
            answer = self._answers(now, call.workspace_id, call.alias)
        await asyncio.sleep(self._latency * self._rng.uniform(0.5, 1.5))
        return ANSWER if answer is None else Failure.of(answer)

    def run(self, main: Callable[[BctrlSession], Awaitable[_T]], slots: int = 100) -> _T:
        """Use a session in virtual time."""
        random.seed(self._seed)

        async def attempt(sender: Sender, call: Call[Runtime], *_: object) -> Runtime | Failure:
            sender._begin(call)
            return await self._attempt(call)

        async def scenario() -> _T:
            url = "http://127.0.0.1:9"
            async with BctrlSession("key", base_url=url, max_connections=slots) as session:
                return await main(session)

        with patch.object(Sender, "_attempt", attempt):
            return virtual_time.run(scenario())


def _stop(
    targets: list[_Target],
    answers: _Answers,
    seed: int,
    *,
    slots: int = 100,
    deadline: float | None = None,
    latency: float = _LATENCY,
) -> _Figures:
    """Stop targets in bulk: when the last good one and all had their outcomes, and how many not."""
    service = _Service(answers, seed, latency)
    last, lost = 0.0, 0

    def on_outcome(outcome: StopOutcome) -> None:
        nonlocal last, lost
        if not outcome.target.alias.startswith("bad"):
            last = virtual_time.now()
            lost += not outcome.ok

    async def main(session: BctrlSession) -> float:
        await session.stop_runtimes(targets, verify=False, on_outcome=on_outcome, deadline=deadline)
        return virtual_time.now()

    seconds = service.run(main, slots)
    requests = service.requests / len(targets)
    return {"lost": lost, "last s": last, "run s": seconds, "requests": requests}


def _beside(targets: list[_Target], make: _MakeAnswers, seed: int, **options: float) -> _Figures:
    """Stop targets; `to none` is the time of the last good one to that without the others."""
    slots = int(options.get("slots", 100))
    stop = partial(_stop, seed=seed, slots=slots, deadline=options.get("deadline"))
    figures = stop(targets, make(seed))
    alone = stop([each for each in targets if not each[1].startswith("bad")], make(seed))
    return figures | {"to none": figures["last s"] / alone["last s"]}


class _Beside:
    """A bulk stop of which some targets are throttled for ever, first or spread."""

    def __init__(
        self,
        bad: int,
        total: int,
        place: str = "first",
        answers: _MakeAnswers | None = None,
        **options: float,
    ) -> None:
        self._good = [("ok", f"r{number}") for number in range(total - bad)]
        self._bad = [("ws", f"bad{number}") for number in range(bad)]
        self._place = place
        self._answers = answers or _bad()
        self._options = options

    def __call__(self, seed: int) -> list[_Figures]:
        return [_beside(self._targets(seed), self._answers, seed, **self._options)]

    def _targets(self, seed: int) -> list[_Target]:
        if self._place == "first":
            return self._bad + self._good
        total = len(self._bad) + len(self._good)
        places = set(random.Random(seed).sample(range(total), len(self._bad)))
        good, bad = iter(self._good), iter(self._bad)
        return [next(bad) if number in places else next(good) for number in range(total)]


@dataclass
class _Workspaces:
    """A list over workspaces: sorted, shuffled, or with the last, which may be bad, first."""

    count: int
    size: int
    order: str
    answers: _MakeAnswers
    ideal: float | None = None
    """The seconds of the whole run; None if the last workspace is throttled for ever."""

    def __call__(self, seed: int) -> list[_Figures]:
        last = "r" if self.ideal else "bad"
        prefixes = ["r"] * (self.count - 1) + [last]
        targets = [
            (f"ws{n}", f"{prefix}{n}-{m}")
            for n, prefix in enumerate(prefixes)
            for m in range(self.size)
        ]
        if self.order == "first":
            targets.reverse()
        elif self.order == "shuffled":
            random.Random(seed).shuffle(targets)
        if self.ideal is None:
            return [_beside(targets, self.answers, seed)]
        figures = _stop(targets, self.answers(seed), seed)
        return [figures | {"to ideal": figures["run s"] / self.ideal}]


@dataclass
class _SpeedOfBulk(_Speed):
    """The same through a session, where others are sent while throttled ones wait."""

    def __call__(self, seed: int) -> list[_Figures]:
        targets = [("ok", f"r{number}") for number in range(6000)]
        slots = round(10 * self.multiple)
        figures = _stop(targets, _limit(200.0, 50)(seed), seed, slots=slots, latency=0.05)
        throttled_share = 100 * (1.0 - 1.0 / figures["requests"])
        return [{"to ideal": figures["run s"] / self.ideal, "% throttled": throttled_share}]


@dataclass
class _Calls:
    """Single stops that arrive at random: so many good and throttled ones a second."""

    good: float
    bad: float
    answers: _MakeAnswers | None = None
    seconds: float = 600.0
    tenants: int = 0

    def __call__(self, seed: int) -> list[_Figures]:
        answers = (self.answers or _bad())(seed)
        service, waits, lost = _Service(answers, seed), [], 0
        arrivals = self._arrivals(seed)

        async def stop(session: BctrlSession, kind: str, number: int) -> None:
            nonlocal lost
            started = virtual_time.now()
            try:
                await session.stop_runtime(self._workspace(kind, number), f"{kind}{number}")
            except BctrlError:
                lost += kind == "r"
            if kind == "r":
                waits.append(virtual_time.now() - started)

        async def main(session: BctrlSession) -> None:
            async with asyncio.TaskGroup() as group:
                for at, kind, number in arrivals:
                    await asyncio.sleep(at - virtual_time.now())
                    group.create_task(stop(session, kind, number))

        service.run(main)
        requests = service.requests / len(arrivals)
        waited = {"wait s": median(waits), "longest s": max(waits)}
        return [waited | {"lost": lost, "requests": requests}]

    def _arrivals(self, seed: int) -> list[tuple[float, str, int]]:
        rng = random.Random(seed)
        arrivals = []
        for kind, rate in (("r", self.good), ("bad", self.bad)):
            at, number = rng.expovariate(rate), 0
            while at < self.seconds:
                arrivals.append((at, kind, number))
                at, number = at + rng.expovariate(rate), number + 1
        return sorted(arrivals)

    def _workspace(self, kind: str, number: int) -> str:
        if kind == "bad":
            return "ws"
        return f"ok{number % self.tenants}" if self.tenants else "ok"


@dataclass
class _Gather:
    """Single stops, all at once, at a limit that needs longer for them than their patience."""

    count: int
    rate: float
    burst: int

    def __call__(self, seed: int) -> list[_Figures]:
        service = _Service(_limit(self.rate, self.burst)(seed), seed)

        async def main(session: BctrlSession) -> tuple[int, float]:
            stops = [session.stop_runtime("ok", f"r{number}") for number in range(self.count)]
            results = await asyncio.gather(*stops, return_exceptions=True)
            return sum(isinstance(each, BctrlError) for each in results), virtual_time.now()

        lost, seconds = service.run(main)
        ideal = (self.count - self.burst) / self.rate
        requests = service.requests / self.count
        return [{"to ideal": seconds / ideal, "lost": lost, "requests": requests}]


@dataclass
class _Dead:
    """Dead targets behind a gateway's 503, of 500: when all others had their outcomes."""

    count: int

    def __call__(self, seed: int) -> list[_Figures]:
        dead = {f"r{number}" for number in random.Random(seed).sample(range(500), self.count)}

        def serve(request: Request) -> Runtime | BctrlError:
            return unavailable() if request.alias in dead and request.stops else ANSWER

        with pytest.MonkeyPatch.context() as monkeypatch:
            simulation = Simulation(monkeypatch, serve, 0.1)
            random.seed(seed)
            simulation.stop(500)
        last = max(at for alias, at in simulation.ended_at.items() if alias not in dead)
        requests = len(simulation.requests) / 500
        return [{"last s": last, "run s": simulation.seconds, "requests": requests}]


# The rows


def _gateway(seconds: float) -> _MakeAnswers:
    return _bad(
        partial(BctrlServerError, "503", status=503, may_have_stopped=True, retry_after=seconds)
    )


def _of_limits() -> dict[str, _Case]:
    """Return the rows of the limiter alone."""
    rows: dict[str, _Case] = {
        "one": _One(lambda _: _bucket()),
        "one, RA 1": _One(lambda _: _bucket(retry_after=1.0)),
        "one, RA 5": _One(lambda _: _bucket(retry_after=5.0)),
        "one, RA 1, a minute": _One(lambda _: _bucket(retry_after=1.0), 12_000, 59.75),
        "20/s": _One(lambda _: _bucket(20.0, 0), 400, 20.0),
        "20/s, burst 50": _One(lambda _: _bucket(20.0, 50), 400, 17.5),
        "2/s": _One(lambda _: _bucket(2.0, 1), 60, 30.0),
        "200/s, no burst": _One(lambda _: _bucket(200.0, 0), 2000, 10.0),
        "200/s, burst 500": _One(lambda _: _bucket(200.0, 500), 4000, 17.5),
        "2000/s": _One(lambda _: _bucket(2000.0, 0), 20_000, 10.0),
        "fixed window of 100": _One(lambda _: fixed_window(100), 2000, 19.0),
        "sliding window of 100": _One(lambda _: _sliding_window(100), 2000, 19.0),
        "10 in flight": _One(lambda _: _free, 2000, 10.0, 0.05, 10),
        "20 in flight": _One(lambda _: _free, 5000, 25.0, 0.1, 20),
        "10 in flight, slow": _One(lambda _: _free, 300, 30.0, 1.0, 10),
        "changing limit": _One(lambda _: token_bucket(_changing, 50), 13_000, 59.8),
        "outage of 6 s": _One(lambda _: _outage(5.0, 11.0), 20_000, 26.0, 0.1),
        "outage of 20 s": _One(lambda _: _outage(5.0, 25.0), 20_000, 40.0, 0.1),
        "one, latency 0.2": _One(lambda _: _bucket(), 2000, 9.95, 0.2),
        "free": _One(lambda _: _free, 3000, 1.0, _LATENCY),
        "8 at once": _Together(8, 0.05),
        "8, RA 1": _Together(8, retry_after=1.0),
        "8 long, RA 1": _Long(8, lambda _: _bucket(retry_after=1.0)),
        "8 long, 24/s": _Long(8, lambda _: _bucket(24.0, 6), 24.0),
        "8 long, fixed window": _Long(8, lambda _: fixed_window(200)),
        "8 long, random 2 %": _Long(8, lambda seed: _noisy(0.02, seed, _bucket()), 196.0),
        "3 long and a late one": _Long(3, has_late=True),
        "random 5 %, RA 1": _One(lambda s: _noisy(0.05, s, retry_after=1.0), 3000, 1.0, _LATENCY),
    }
    for count in (2, 4, 8, 16):
        rows[f"{count}"] = _Together(count)
        rows[f"{count} long"] = _Long(count)
    for percent in (1, 2, 3, 5, 8, 10, 15, 20, 30):
        serve = partial(_noisy, percent / 100)
        rows[f"random {percent} %"] = _One(serve, 3000, 1.0, _LATENCY)
        rows[f"random {percent} % of 20000"] = _One(serve, 20_000, 1.0, _LATENCY)
    for percent in (2, 5, 10):
        rows[f"random {percent} %, 200/s"] = _One(_beside_limit(percent / 100), 4000, 19.75)
    for multiple in (1.0, 1.2, 1.5, 2.0, 3.0):
        rows[f"speed {multiple}"] = _Speed(multiple)
    return rows


def _beside_limit(share: float) -> Callable[[int], Server]:
    return lambda seed: _noisy(share, seed, _bucket())


def _of_sessions() -> dict[str, _Case]:
    """Return the rows of whole sessions."""
    rows: dict[str, _Case] = {
        "8 of 200 first": _Beside(8, 200, slots=20),
        "8 of 200 first, 503": _Beside(8, 200, answers=_bad(_api503), slots=20),
        "30 of 1000 first": _Beside(30, 1000),
        "30 of 3000 first": _Beside(30, 3000, deadline=600.0),
        "30 of 3000 first, 503": _Beside(30, 3000, answers=_bad(_api503), deadline=600.0),
        "300 of 3000 first": _Beside(300, 3000),
        "49 of 1000 spread": _Beside(49, 1000, "spread", slots=50),
        "94 of 1000 spread": _Beside(94, 1000, "spread", slots=50, deadline=1200.0),
        "100 of 10000 spread": _Beside(100, 10_000, "spread", deadline=3600.0),
        "600 of 3000 spread": _Beside(600, 3000, "spread"),
        "3000 of 30000 spread": _Beside(3000, 30_000, "spread"),
        "30 of 3000 first, 50/s": _Beside(30, 3000, answers=_limit(50.0, 20), deadline=600.0),
        "200 of 4000 spread, 100/s": _Beside(200, 4000, "spread", _limit(100.0, 20)),
        "gateway's RA 30, spread": _Beside(60, 1000, "spread", _gateway(30.0)),
        "service 20 + 1": _Calls(20, 1),
        "service 20 + 1, 503": _Calls(20, 1, _bad(_api503)),
        "service 5 + 1": _Calls(5, 1),
        "service 20 + 1, gateway's 503": _Calls(20, 1, _bad(unavailable)),
        "service 20 + 4": _Calls(20, 4),
        "service 20 + 4, an hour": _Calls(20, 4, seconds=3600.0),
        "service of ten tenants": _Calls(16.2, 2.6, _quota(2.0, 5), tenants=9),
        "service 50 + 2, 60/s": _Calls(50, 2, _limit(60.0, 20)),
        "6000 calls at 50/s": _Gather(6000, 50.0, 20),
        "20000 calls at 200/s": _Gather(20_000, 200.0, 50),
        "workspace with RA 30, 100/s": _Workspaces(
            10,
            400,
            "shuffled",
            _bad(partial(_api429, retry_after=30.0), partial(_bucket, 100.0, 20)),
        ),
    }
    for count in (6, 60):
        for seconds in (30.0, 600.0):
            row = _Beside(count, 1000, answers=_gateway(seconds))
            rows[f"gateway's RA {seconds:.0f}, {count} first"] = row
    for multiple in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0, 3.0):
        rows[f"speed {multiple} of a session"] = _SpeedOfBulk(multiple)
    for number in (1, 10, 50, 100):
        rows[f"{number} of 500 dead"] = _Dead(number)
    return rows


def _of_workspaces() -> dict[str, _Case]:
    """Return the rows of lists over several workspaces."""
    rows: dict[str, _Case] = {}
    for order in ("shuffled", "first", "sorted"):
        answers = _bad(partial(_api429, retry_after=30.0))
        rows[f"workspace with RA 30, {order}"] = _Workspaces(50, 400, order, answers)
    for order in ("sorted", "shuffled"):
        rows[f"20 quotas, {order}"] = _Workspaces(20, 500, order, _quota(5.0, 10), 98.0)
        for count in (1, 2, 3, 5, 10, 50):
            size = 4000 // count
            for name, retry_after in {"limit": None, "limit with RA 1": 1.0}.items():
                answers = _limit(100.0, 20, retry_after)
                row = _Workspaces(count, size, order, answers, 39.8)
                rows[f"{name} of {count} workspaces, {order}"] = row
    for percent in (5, 15):
        for count in (1, 20):
            answers = _random(percent / 100)
            row = _Workspaces(count, 4000 // count, "shuffled", answers, 1.0)
            rows[f"random {percent} %, {count} workspaces"] = row
    return rows


_ROWS: dict[str, _Case] = _of_limits() | _of_sessions() | _of_workspaces()


def _child(name: str, seeds: str) -> list[_Figures]:
    logging.getLogger("bctrl_async").addHandler(logging.NullHandler())
    return list(chain.from_iterable(_ROWS[name](seed) for seed in range(int(seeds))))


def _compare(seeds: int, only: str) -> Report:
    patterns = only.split(",") if only else ["*"]
    names = [name for name in _ROWS if any(fnmatch(name, pattern) for pattern in patterns)]

    def measure(name: str) -> list[_Figures]:
        return measured(name, seeds, kind=list[_Figures])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(measure, names))
    rows = [_row(name, figures) for name, figures in zip(names, results, strict=True)]
    width = max(map(len, rows), default=1)
    return Report(
        f"The limiter in virtual time: median and worst of {seeds} seeds",
        ["row"] + [""] * (width - 1),
        [row + [""] * (width - len(row)) for row in rows],
    )


def _row(name: str, figures: list[_Figures]) -> Row:
    row: Row = [name]
    for figure in figures[0]:
        values = [each[figure] for each in figures]
        worst = min(values) if figure in _WORST_IS_LEAST else max(values)
        row.append(f"{figure} {median(values):.2f} ({worst:.2f})")
    return row


if __name__ == "__main__":
    command(__doc__, _compare, _child, seeds=24, only="")
