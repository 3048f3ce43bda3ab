"""A server that answers nothing, or not for a while: real sockets, and hours in virtual time."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import aiohttp
import pytest
import virtual_time
from runtimes import runtime
from servers import raw_server

from bctrl_async import (
    BctrlError,
    BctrlNetworkError,
    BctrlServerError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async._calls.call import Call
from bctrl_async._calls.sender import Sender
from bctrl_async.emulator import Emulator

_T = TypeVar("_T")

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN
ANSWER = runtime()

Server = Callable[[float, str], Runtime | BctrlError]
"""Decides what becomes of a request for this alias that arrives at this time."""


def refused() -> BctrlError:
    return BctrlNetworkError("no connection: refused")


def broken() -> BctrlError:
    return BctrlNetworkError("the connection broke", may_have_stopped=True)


def bad_gateway() -> BctrlError:
    return BctrlServerError("502", status=502, may_have_stopped=True)


class Simulation:
    """A session whose attempts go to a server that exists only in virtual time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, server: Server, latency: float) -> None:
        self.requests: Counter[str] = Counter()
        self.seconds = 0.0
        self.answers: list[float] = []
        self.before_answer: Callable[[float], Awaitable[None] | None] = lambda _: None

        async def attempt(_: Sender, call: Call[Runtime], *__: object) -> Runtime | BctrlError:
            now = asyncio.get_running_loop().time()
            alias = call.alias or ""
            self.requests[alias] += 1
            answer = server(now, alias)
            if (more := self.before_answer(now)) is not None:
                await more
            await asyncio.sleep(latency)
            if isinstance(answer, Runtime):
                self.answers.append(now)
            return answer

        monkeypatch.setattr(Sender, "_attempt", attempt)

    def answered_between(self, begin: float, end: float) -> int:
        return sum(begin <= now < end for now in self.answers)

    def run(self, main: Callable[[BctrlSession], Awaitable[_T]], **options: int) -> _T:
        async def scenario() -> _T:
            async with BctrlSession("key", base_url="http://127.0.0.1:9", **options) as session:  # type: ignore[arg-type]
                ended = await main(session)
            self.seconds = asyncio.get_running_loop().time()
            return ended

        return virtual_time.run(scenario())


Simulate = Callable[[Server, float], Simulation]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Simulate:
    return lambda server, latency: Simulation(monkeypatch, server, latency)


def targets(count: int) -> Iterator[tuple[str, str]]:
    return (("ws-1", f"r{number}") for number in range(count))


class TestNeverAnswered:
    @pytest.mark.parametrize("how", [refused, broken, bad_gateway])
    def test_it_ends_early_after_hardly_more_requests_than_were_in_flight(
        self, simulate: Simulate, how: Callable[[], BctrlError]
    ) -> None:
        simulation = simulate(lambda *_: how(), 0.1)
        report = simulation.run(lambda session: session.stop_runtimes(list(targets(10_000))))

        # One asks four times in all, and another one makes sure; a new target has come meanwhile.
        assert simulation.requests.total() <= 100 + 5
        assert isinstance(report.ended_early, BctrlNetworkError)
        assert "does not answer" in str(report.ended_early)
        assert report.counts == (
            {NOT_SENT: 10_000} if how is refused else {UNKNOWN: 101, NOT_SENT: 9_899}
        )
        assert simulation.seconds < 10

    async def test_with_real_sockets_a_refused_connection_is_not_sent(self) -> None:
        with socket.socket() as unheard:
            unheard.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
            async with BctrlSession("key", base_url=url, retry=RetryPolicy(base=0.01)) as session:
                report = await session.stop_runtimes(list(targets(1000)))

        assert report.counts == {NOT_SENT: 1000}
        assert report.retries <= 0.1 * 1000
        assert report.ended_early is not None

    async def test_with_real_sockets_a_server_that_hangs_is_unknown(self) -> None:
        received = 0

        async def hang(_: bytes, __: asyncio.StreamWriter) -> None:
            nonlocal received
            received += 1
            await asyncio.Event().wait()

        async with (
            raw_server(hang) as url,
            BctrlSession("key", base_url=url, timeout=0.3, retry=RetryPolicy(base=0.01)) as session,
        ):
            report = await session.stop_runtimes(list(targets(1000)))

        assert report.counts == {UNKNOWN: 101, NOT_SENT: 899}
        assert received <= 1.1 * 1000
        assert report.ended_early is not None

    def test_what_the_session_was_told_before_the_run_does_not_count(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda _, alias: ANSWER if alias == "crm" else broken(), 0.1)

        async def scenario(session: BctrlSession) -> StopReport:
            await session.stop_runtime("ws-1", "crm")
            return await session.stop_runtimes(list(targets(1000)))

        report = simulation.run(scenario)
        assert report.ended_early is not None
        assert simulation.requests.total() <= 1 + 100 + 5
        assert simulation.seconds < 10


class TestBadFirstTarget:
    """The first target breaks the server, and all others are well."""

    def test_a_server_that_is_slow_to_answer_the_others_is_not_given_up(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda _, alias: bad_gateway() if alias == "r0" else ANSWER, 8)
        report = simulation.run(lambda session: session.stop_runtimes(list(targets(1000))))

        assert report.counts == {STOPPED: 999, UNKNOWN: 1}

    @pytest.mark.parametrize("concurrency", [1, 2, 100])
    @pytest.mark.parametrize("attempts", [1, 4])
    def test_only_that_target_is_given_up(
        self, simulate: Simulate, attempts: int, concurrency: int
    ) -> None:
        simulation = simulate(lambda _, alias: broken() if alias == "r0" else ANSWER, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(
                targets(300), concurrency=concurrency, retry=RetryPolicy(attempts=attempts)
            )
        )

        assert report.counts == {STOPPED: 299, UNKNOWN: 1}
        assert report.ended_early is None


class TestOutage:
    @pytest.mark.parametrize("how", [refused, broken, bad_gateway])
    @pytest.mark.parametrize("concurrency", [1, 100])
    def test_after_thirty_seconds_in_the_middle_everything_is_stopped(
        self, simulate: Simulate, how: Callable[[], BctrlError], concurrency: int
    ) -> None:
        simulation = simulate(lambda now, _: how() if 2 <= now < 32 else ANSWER, 0.1)
        count = 100 * concurrency
        report = simulation.run(
            lambda session: session.stop_runtimes(targets(count), concurrency=concurrency)
        )

        assert report.ok
        assert report.counts == {STOPPED: count}
        assert simulation.requests.total() <= 1.1 * count + 15
        # It is over a few seconds after the server is back.
        assert simulation.seconds <= 32 + 5 + (count / concurrency) * 0.1

    async def test_with_real_sockets_a_server_that_comes_back_is_found(self) -> None:
        emulator = Emulator(port=0)
        await emulator.start()
        port = int(emulator.url.rpartition(":")[2])
        later = Emulator(port=port)
        for target in targets(2000):
            emulator.add_runtime(*target)
            later.add_runtime(*target)
        session = BctrlSession(
            "emulator-key", base_url=emulator.url, retry=RetryPolicy(base=0.05, cap=0.1)
        )

        async def restart(outcome: StopOutcome) -> None:
            if outcome.index == 200:
                await emulator.close()
                await asyncio.sleep(0.5)
                await later.start()

        async with session:
            report = await session.stop_runtimes(targets(2000), on_outcome=restart)
        await later.close()

        assert report.ok
        assert report.total == 2000

    def test_one_that_lasts_beyond_the_patience_ends_the_run(self, simulate: Simulate) -> None:
        simulation = simulate(lambda now, _: ANSWER if now < 2 else broken(), 0.1)
        report = simulation.run(lambda session: session.stop_runtimes(list(targets(10_000))))

        assert report.ended_early is not None
        assert 302 <= simulation.seconds <= 320
        assert report.counts[STOPPED] == 2000
        # Those in flight, and four that were given up while they asked.
        assert report.counts[UNKNOWN] == 104
        assert simulation.requests.total() <= 2000 + 300

    def test_a_deadline_ends_it_sooner(self, simulate: Simulate) -> None:
        simulation = simulate(lambda now, _: ANSWER if now < 2 else refused(), 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(10_000)), deadline=20)
        )

        assert simulation.seconds == pytest.approx(20)
        # The one that was asking may have been in flight.
        assert report.counts[STOPPED] == 2000
        assert report.counts[NOT_SENT] >= 7999

    def test_a_refusal_is_an_answer_that_ends_it_for_all(self, simulate: Simulate) -> None:
        asking = set()

        def server(now: float, alias: str) -> Runtime | BctrlError:
            if 2 <= now < 10:
                if now > 4:
                    asking.add(alias)
                return refused()
            if alias in asking and now < 200:
                return BctrlServerError("503", status=503)
            return ANSWER

        simulation = simulate(server, 0.1)
        report = simulation.run(lambda session: session.stop_runtimes(targets(5000)))

        assert report.counts[STOPPED] >= 4900
        assert simulation.answered_between(10, 60) >= 2000

    def test_what_was_sent_before_it_and_ends_in_it_does_not_end_it(
        self, simulate: Simulate
    ) -> None:
        async def hang(now: float) -> None:
            # Those that arrive when the server goes away are given up one by one, seconds later.
            await asyncio.sleep(1 + now % 0.1 * 40)

        simulation = simulate(lambda now, _: broken() if 2 <= now < 40 else ANSWER, 0.1)
        simulation.before_answer = lambda now: hang(now) if 2 <= now < 2.2 else None
        report = simulation.run(lambda session: session.stop_runtimes(targets(5000)))

        assert report.ok
        assert simulation.requests.total() <= 5000 + 200 + 30

    def test_it_shows_while_it_lasts(self, simulate: Simulate) -> None:
        simulation = simulate(lambda now, _: refused() if 2 <= now < 32 else ANSWER, 0.1)

        async def scenario(session: BctrlSession) -> list[bool]:
            batch = session.stop_runtimes(targets(5000))
            stopping = asyncio.create_task(batch)
            shown: list[bool] = []
            for _ in range(3):
                await asyncio.sleep(1.5 if not shown else 10)
                shown.append(batch.is_unanswered)
            await stopping
            return [*shown, batch.is_unanswered]

        assert simulation.run(scenario) == [False, True, True, False]

    def test_feeding_may_end_in_the_middle_of_it(self, simulate: Simulate) -> None:
        simulation = simulate(lambda now, _: refused() if 2 <= now < 32 else ANSWER, 0.1)

        async def scenario(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(targets(10_000))
            asyncio.get_running_loop().call_later(10, batch.stop_reading)
            return await batch

        report = simulation.run(scenario)
        assert report.counts == {STOPPED: report.total}
        assert report.total == pytest.approx(2000, abs=100)

    def test_a_target_that_breaks_the_server_costs_a_minute_and_not_the_run(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda _, alias: broken() if alias == "r3" else ANSWER, 0.1)
        report = simulation.run(lambda session: session.stop_runtimes(targets(10), concurrency=1))

        assert report.counts == {STOPPED: 9, UNKNOWN: 1}
        assert report.ended_early is None
        assert simulation.seconds <= 70

    def test_among_others_it_is_given_up_after_its_attempts(self, simulate: Simulate) -> None:
        simulation = simulate(lambda _, alias: broken() if alias == "r3" else ANSWER, 0.1)
        report = simulation.run(lambda session: session.stop_runtimes(targets(20_000)))

        assert report.counts == {STOPPED: 19_999, UNKNOWN: 1}
        assert simulation.requests["r3"] == RetryPolicy().attempts

    def test_a_single_stop_that_is_answered_shows_that_the_server_is_there(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda _, alias: ANSWER if alias == "crm" else broken(), 0.1)

        async def scenario(session: BctrlSession) -> StopReport:
            async def keep_asking() -> None:
                while True:
                    await session.stop_runtime("ws-1", "crm")

            asking = asyncio.create_task(keep_asking())
            report = await session.stop_runtimes(targets(3), concurrency=2)
            asking.cancel()
            return report

        report = simulation.run(scenario)
        assert report.counts == {UNKNOWN: 3}
        assert report.ended_early is None


class TestLatency:
    def test_a_hundred_in_flight_keep_a_slow_server_busy(self, simulate: Simulate) -> None:
        simulation = simulate(lambda *_: ANSWER, 0.2)
        report = simulation.run(lambda session: session.stop_runtimes(targets(5000)))

        assert report.ok
        assert simulation.seconds <= 1.05 * 10


def test_a_refusal_is_waited_for_until_the_deadline_and_no_longer(simulate: Simulate) -> None:
    later = BctrlServerError("503", status=503, retry_after=20.0)
    simulation = simulate(lambda *_: later, 0.1)
    report = simulation.run(lambda session: session.stop_runtimes(list(targets(1)), deadline=10))

    assert report.counts == {StopResult.REJECTED: 1}
    assert simulation.seconds < 1


def test_the_simulation_opens_no_connection(simulate: Simulate) -> None:
    simulation = simulate(lambda *_: ANSWER, 0.2)

    async def scenario(session: BctrlSession) -> int:
        await session.stop_runtime("ws-1", "crm")
        http = session._sender.open_pool()
        assert isinstance(http, aiohttp.ClientSession)
        assert http.connector is not None
        return len(http.connector._acquired)

    assert simulation.run(scenario) == 0
