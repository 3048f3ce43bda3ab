"""Outages of the server, on real sockets and in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import random
import ssl
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
from helpers import (
    BOUND,
    add_runtimes,
    await_batch,
    free_port,
    pass_time,
    unused_url,
)
from outages import ANSWER, Server, Simulation, bad_gateway, targets
from servers import raw_server

from bctrl_async import (
    BctrlError,
    BctrlNetworkError,
    BctrlRateLimitError,
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
from bctrl_async._limiter.limiter import Limiter
from bctrl_async.bulk import _run
from bctrl_async.emulator import Emulator, Fault

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN


def connection_refused() -> BctrlError:
    return BctrlNetworkError("no connection: refused")


def disconnected() -> BctrlError:
    return BctrlNetworkError("the connection broke", may_have_stopped=True)


def unavailable(retry_after: float | None = None) -> BctrlError:
    return BctrlServerError("503", status=503, may_have_stopped=True, retry_after=retry_after)


def untrusted() -> BctrlError:
    place = Mock(host="bctrl.test", port=443)
    error = BctrlNetworkError(
        "no connection: the certificate has expired", advice="Renew the certificate"
    )
    error.__cause__ = aiohttp.ClientConnectorCertificateError(place, ssl.CertificateError())
    return error


async def _stop_again_and_again(session: BctrlSession) -> None:
    for number in itertools.count(1):
        await session.stop_runtime("ws-1", f"r{number}")


class Finished:
    """The outcomes of a run by alias, with the virtual times at which they came."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}
        self.outcomes: dict[str, StopOutcome] = {}

    def __call__(self, outcome: StopOutcome) -> None:
        self.at[outcome.target.alias] = asyncio.get_running_loop().time()
        self.outcomes[outcome.target.alias] = outcome


Simulate = Callable[[Server, float], Simulation]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Simulate:
    random.seed(0)  # For the jitter of the retries.
    return lambda server, latency: Simulation(monkeypatch, server, latency)


class TestNeverAnswered:
    @pytest.mark.parametrize("fail", [connection_refused, disconnected, bad_gateway])
    def test_the_run_ends_early_after_a_few_probes(
        self, simulate: Simulate, fail: Callable[[], BctrlError]
    ) -> None:
        simulation = simulate(lambda *_: fail(), 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(10_000)), verify=False)
        )

        # One probe of four attempts, a second to confirm, and a new target sent meanwhile.
        assert simulation.stops() <= 100 + 5
        assert simulation.requests.total() <= 100 + 5 + 5
        assert isinstance(report.ended_early, BctrlNetworkError)
        assert "does not answer" in str(report.ended_early)
        assert report.counts == (
            {NOT_SENT: 10_000} if fail is connection_refused else {UNKNOWN: 101, NOT_SENT: 9_899}
        )
        assert simulation.seconds < 10

    async def test_with_real_sockets_targets_are_not_sent_if_connections_are_refused(self) -> None:
        with unused_url() as url:
            async with BctrlSession("key", base_url=url, retry=RetryPolicy(base=0.01)) as session:
                report = await session.stop_runtimes(list(targets(1000)), verify=False)

        assert report.counts == {NOT_SENT: 1000}
        assert report.retries <= 0.1 * 1000
        assert report.ended_early is not None

    async def test_with_real_sockets_targets_are_unknown_if_the_server_hangs(self) -> None:
        received: set[str] = set()

        async def hang(head: bytes, __: asyncio.StreamWriter) -> None:
            _, runtimes, rest = head.decode().partition("/runtimes/")
            if runtimes:
                received.add(rest.partition("/")[0])
            if len(received) >= 100:
                pass_time(60.0)
            await asyncio.Event().wait()

        async with (
            raw_server(hang) as url,
            BctrlSession("key", base_url=url, retry=RetryPolicy(base=0.01)) as session,
        ):
            report = await session.stop_runtimes(list(targets(1000)), concurrency=100, verify=False)

        assert report.counts[UNKNOWN] + report.counts[NOT_SENT] == 1000
        unknown = {each.target.alias for each in report.failures if each.result is UNKNOWN}
        assert received & {alias for _, alias in targets(1000)} <= unknown
        assert 100 <= len(unknown) <= 101
        assert report.ended_early is not None

    def test_responses_before_the_run_do_not_count(self, simulate: Simulate) -> None:
        simulation = simulate(lambda _, alias: ANSWER if alias == "crm" else disconnected(), 0.1)

        async def scenario(session: BctrlSession) -> StopReport:
            await session.stop_runtime("ws-1", "crm")
            return await session.stop_runtimes(list(targets(1000)), verify=False)

        report = simulation.run(scenario)
        assert report.ended_early is not None
        assert simulation.stops() <= 1 + 100 + 5
        assert simulation.seconds < 10

    def test_a_server_with_requests_to_answer_is_not_given_up(self, simulate: Simulate) -> None:
        asked: list[str] = []
        bad = {"r0", "r1"}

        def server(_: float, alias: str) -> Runtime | BctrlError:
            asked.append(alias)
            return disconnected() if alias in bad else ANSWER

        simulation = simulate(server, 0.1)
        simulation.answers_reads = False
        simulation.before_response = lambda _: None if asked[-1] in bad else asyncio.sleep(30)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(20)), concurrency=20, verify=False)
        )

        assert report.counts == {STOPPED: 18, UNKNOWN: 2}
        assert report.ended_early is None
        assert simulation.seconds < 300

    @pytest.mark.parametrize(
        ("concurrency", "read_latency"), [(1, 0.1), (2, 0.1), (2, 30), (5, 0.1)]
    )
    def test_dead_targets_of_all_workers_hold_up_nobody_if_no_get_is_answered(
        self, simulate: Simulate, concurrency: int, read_latency: float
    ) -> None:
        """Fault: the run waited until its patience ended, and sent no other target."""
        bad = {f"r{number}" for number in range(1, concurrency + 1)}
        simulation = simulate(lambda _, alias: disconnected() if alias in bad else ANSWER, 0.1)
        simulation.answers_reads = False
        simulation.read_latency = read_latency
        report = simulation.run(
            lambda session: session.stop_runtimes(
                list(targets(20)), concurrency=concurrency, verify=False
            )
        )

        assert report.counts == {STOPPED: 20 - concurrency, UNKNOWN: concurrency}

    @pytest.mark.parametrize("concurrency", [1, 2, 10, 100])
    def test_an_outage_of_four_minutes_costs_two_targets_at_most(
        self, simulate: Simulate, concurrency: int
    ) -> None:
        simulation = simulate(lambda now, _: disconnected() if 2 <= now < 242 else ANSWER, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(
                targets(50 * concurrency), concurrency=concurrency, verify=False
            )
        )

        assert report.ended_early is None
        assert report.counts[UNKNOWN] <= (2 if concurrency < 100 else 0)

    def test_a_canary_that_is_not_sent_is_no_answer(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the server counted as up, so that each target used up its attempts."""
        request = Sender.request

        async def send_only_stops(sender: Sender, call: Call[Runtime]) -> Runtime:
            if not call.operation.stops:
                raise BctrlRateLimitError("not sent: rate limited")
            return await request(sender, call)

        monkeypatch.setattr(Sender, "request", send_only_stops)
        simulation = simulate(lambda now, _: disconnected() if 2 <= now < 37 else ANSWER, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(3_000)), deadline=60, verify=False)
        )

        assert report.counts == {STOPPED: 3_000}

    def test_a_throttled_canary_is_an_answer(self, simulate: Simulate) -> None:
        def server(now: float, alias: str) -> Runtime | BctrlError:
            if alias == "bctrl-async-canary":
                return BctrlRateLimitError("429", status=429)
            return disconnected() if now < 1 else ANSWER

        simulation = simulate(server, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(5)), verify=False)
        )

        assert report.counts == {STOPPED: 5}
        # Each failure asks once; a canary is never retried.
        assert simulation.requests["bctrl-async-canary"] <= 15
        assert simulation.seconds <= 15


class TestBadFirstTarget:
    """The first target breaks the server, and all others are fine."""

    def test_a_server_that_answers_the_others_slowly_is_not_given_up(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda _, alias: bad_gateway() if alias == "r0" else ANSWER, 8)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(1000)), verify=False)
        )

        assert report.counts == {STOPPED: 999, UNKNOWN: 1}

    @pytest.mark.parametrize("concurrency", [1, 2, 100])
    @pytest.mark.parametrize("attempts", [1, 4])
    def test_only_the_first_target_is_given_up(
        self, simulate: Simulate, attempts: int, concurrency: int
    ) -> None:
        simulation = simulate(lambda _, alias: disconnected() if alias == "r0" else ANSWER, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(
                targets(300),
                concurrency=concurrency,
                retry=RetryPolicy(attempts=attempts),
                verify=False,
            )
        )

        assert report.counts == {STOPPED: 299, UNKNOWN: 1}
        assert report.ended_early is None


class TestOutage:
    @pytest.mark.parametrize("fail", [connection_refused, disconnected, bad_gateway])
    @pytest.mark.parametrize("concurrency", [1, 100])
    def test_every_target_is_stopped_after_an_outage_of_thirty_seconds(
        self, simulate: Simulate, fail: Callable[[], BctrlError], concurrency: int
    ) -> None:
        simulation = simulate(lambda now, _: fail() if 2 <= now < 32 else ANSWER, 0.1)
        count = 100 * concurrency
        report = simulation.run(
            lambda session: session.stop_runtimes(
                targets(count), concurrency=concurrency, verify=False
            )
        )

        assert report.ok
        assert report.counts == {STOPPED: count}
        assert simulation.requests.total() <= 1.1 * count + 15
        # The run resumes within five seconds of the return of the server.
        assert simulation.seconds <= 32 + 5 + (count / concurrency) * 0.1

    @pytest.mark.parametrize("concurrency", [1, 100])
    @pytest.mark.parametrize("retry_after", [None, 5.0])
    @pytest.mark.parametrize("begins", [0, 2])
    def test_thirty_seconds_of_a_gateways_503_cost_no_target(
        self, simulate: Simulate, concurrency: int, retry_after: float | None, begins: int
    ) -> None:
        simulation = simulate(
            lambda now, _: unavailable(retry_after) if begins <= now < 32 else ANSWER, 0.1
        )
        count = 100 * concurrency
        report = simulation.run(
            lambda session: session.stop_runtimes(
                targets(count), concurrency=concurrency, verify=False
            )
        )

        assert report.counts == {STOPPED: count}
        assert simulation.requests.total() <= 1.1 * count + 100
        to_recover = 15 if retry_after is None else 120
        assert simulation.seconds <= 32 + to_recover + 0.1 * count / concurrency

    def test_a_gateway_that_answers_502_and_503_in_turn_costs_no_target(
        self, simulate: Simulate
    ) -> None:
        """Fault: a 503 counted as proof that the server is up, so each 502 cost an attempt."""
        rng = random.Random(0)

        def server(now: float, _: str) -> Runtime | BctrlError:
            return rng.choice([unavailable, bad_gateway])() if 2 <= now < 32 else ANSWER

        simulation = simulate(server, 0.1)
        report = simulation.run(lambda session: session.stop_runtimes(targets(5000), verify=False))

        assert report.counts == {STOPPED: 5000}

    @pytest.mark.parametrize(("refused", "reads"), [(1, 0), (2, 6)])
    def test_only_a_second_503_of_a_target_asks_canaries(
        self, simulate: Simulate, refused: int, reads: int
    ) -> None:
        """Fault: sixteen processes on one limit sent a canary for each fifth stop."""
        simulation = simulate(
            lambda _, alias: (
                unavailable() if alias == "r0" and simulation.requests["r0"] <= refused else ANSWER
            ),
            0.1,
        )
        report = simulation.run(lambda session: session.stop_runtimes(targets(1), verify=False))

        assert report.counts == {STOPPED: 1}
        assert simulation.reads == reads

    def test_canaries_that_tell_nothing_hold_up_no_retry(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Other calls of the session may be refused all the time, while no canary is."""
        monkeypatch.setattr(Limiter, "answers_others", lambda *_: False)
        simulation = simulate(
            lambda _, alias: (
                unavailable() if alias == "r0" and simulation.requests["r0"] <= 2 else ANSWER
            ),
            0.1,
        )
        report = simulation.run(lambda session: session.stop_runtimes(targets(1), verify=False))

        assert report.counts == {STOPPED: 1}
        assert simulation.reads == 12

    def test_a_canary_without_an_answer_speaks_for_all_that_were_refused(
        self, simulate: Simulate
    ) -> None:
        """Fault: each call asked for itself, one after the other, where GETs get no answer."""
        simulation = simulate(lambda now, _: unavailable() if 10 <= now < 15 else ANSWER, 0.02)
        simulation.answers_reads = False
        simulation.read_latency = 2

        async def stop_while_it_is_refused(session: BctrlSession) -> StopReport:
            # It is no longer in its slow start.
            await session.stop_runtimes(targets(400), verify=False)
            await asyncio.sleep(10 - asyncio.get_running_loop().time())
            return await session.stop_runtimes(targets(100), verify=False)

        report = simulation.run(stop_while_it_is_refused)

        assert report.counts == {STOPPED: 100}
        assert simulation.seconds < 10 + 20

    @pytest.mark.parametrize("calls", [1, 100])
    def test_single_calls_survive_thirty_seconds_of_a_gateways_503(
        self, simulate: Simulate, calls: int
    ) -> None:
        simulation = simulate(lambda now, _: unavailable() if now < 30 else ANSWER, 0.1)
        stopped = simulation.run(
            lambda session: asyncio.gather(
                *(session.stop_runtime(*target) for target in targets(calls))
            )
        )

        assert stopped == [ANSWER] * calls

    def test_a_single_call_that_others_overtake_spends_its_attempts(
        self, simulate: Simulate
    ) -> None:
        """Fault: it was sent again for a minute of patience."""
        simulation = simulate(lambda _, alias: unavailable() if alias == "r0" else ANSWER, 0.1)

        async def scenario(session: BctrlSession) -> None:
            async with asyncio.TaskGroup() as group:
                others = group.create_task(_stop_again_and_again(session))
                with pytest.raises(BctrlServerError):
                    await session.stop_runtime("ws-1", "r0")
                others.cancel()

        simulation.run(scenario)

        assert simulation.requests["r0"] == 1 + RetryPolicy().attempts
        assert simulation.seconds <= 8

    @pytest.mark.parametrize("share", [0.02, 0.05])
    def test_503_at_random_cost_no_target(self, simulate: Simulate, share: float) -> None:
        rng = random.Random(0)
        simulation = simulate(lambda *_: unavailable() if rng.random() < share else ANSWER, 0.03)
        report = simulation.run(lambda session: session.stop_runtimes(targets(5000), verify=False))

        assert report.counts == {STOPPED: 5000}
        assert simulation.seconds <= 20

    async def test_closing_the_session_ends_a_probe_that_may_not_be_sent_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: it asked for ever whether the server is back, and blocked the event loop."""
        asked, ask = 0, _run._ask_canary

        async def ask_at_most_a_hundred_times(*args: Any) -> bool:  # noqa: ANN401 - what it has.
            nonlocal asked
            asked += 1
            assert asked < 100
            return await ask(*args)

        monkeypatch.setattr(_run, "_ask_canary", ask_at_most_a_hundred_times)
        async with Emulator(port=0) as emulator:
            dropped, hanging = add_runtimes(emulator, 2)
            emulator.poison(*dropped, Fault.DROP_BEFORE)
            canary = (dropped[0], "bctrl-async-canary")
            emulator.add_runtime(*canary)
            emulator.poison(*canary, Fault.DROP_BEFORE)
            emulator.poison(*hanging, Fault.HANG)
            once = RetryPolicy(attempts=1, base=10.0)
            session = BctrlSession("emulator-key", base_url=emulator.url, retry=once)
            running = asyncio.create_task(await_batch(session.stop_runtimes([dropped, hanging])))
            async with asyncio.timeout(BOUND):
                while not (asked and session.stats.waiting):
                    await asyncio.sleep(0.001)
            await session.close()
            await asyncio.wait([running])

        assert asked == 1

    async def test_with_real_sockets_a_restarted_server_is_found(self) -> None:
        port = free_port()
        emulator, restarted = Emulator(port=port), Emulator(port=port)
        await emulator.start()
        add_runtimes(emulator, 2000)
        add_runtimes(restarted, 2000)
        session = BctrlSession(
            "emulator-key", base_url=emulator.url, retry=RetryPolicy(base=0.05, cap=0.1)
        )

        async def restart(outcome: StopOutcome) -> None:
            if outcome.index == 200:
                await emulator.close()
                await asyncio.sleep(0.5)
                await restarted.start()

        async with session:
            report = await session.stop_runtimes(targets(2000), on_outcome=restart, verify=False)
        await restarted.close()

        assert report.ok
        assert report.total == 2000

    def test_an_outage_beyond_the_patience_ends_the_run(self, simulate: Simulate) -> None:
        simulation = simulate(lambda now, _: ANSWER if now < 2 else disconnected(), 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(10_000)), verify=False)
        )

        assert report.ended_early is not None
        assert 302 <= simulation.seconds <= 320
        stopped = report.counts[STOPPED]
        assert 1800 <= stopped <= 2000
        # The requests in flight.
        assert report.counts[UNKNOWN] == 100
        assert simulation.requests.total() <= stopped + 300

    @pytest.mark.parametrize("fail", [connection_refused, disconnected])
    def test_an_outage_that_ends_before_the_patience_costs_no_target(
        self, simulate: Simulate, fail: Callable[[], BctrlError]
    ) -> None:
        """Fault: each target that had probed for a fifth of the patience was given up."""
        simulation = simulate(lambda now, _: fail() if 2 <= now < 37 else ANSWER, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(3000)), deadline=45, verify=False)
        )
        assert report.counts == {STOPPED: 3000}

    def test_a_deadline_ends_the_run_during_an_outage(self, simulate: Simulate) -> None:
        simulation = simulate(lambda now, _: ANSWER if now < 2 else connection_refused(), 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(10_000)), deadline=20, verify=False)
        )

        assert simulation.seconds == pytest.approx(20)
        # The probe may have been in flight.
        assert 1800 <= report.counts[STOPPED] <= 2000
        assert report.counts[NOT_SENT] >= 9999 - report.counts[STOPPED]

    def test_a_throttled_probe_ends_the_outage_for_all_targets(self, simulate: Simulate) -> None:
        probed = set()

        def server(now: float, alias: str) -> Runtime | BctrlError:
            if 2 <= now < 10:
                if now > 4:
                    probed.add(alias)
                return connection_refused()
            if alias in probed and now < 200:
                return BctrlServerError("503", status=503)
            return ANSWER

        simulation = simulate(server, 0.1)
        report = simulation.run(lambda session: session.stop_runtimes(targets(5000), verify=False))

        assert report.counts[STOPPED] >= 4900
        assert simulation.answered_between(10, 60) >= 2000

    def test_failures_of_earlier_attempts_do_not_end_the_outage(self, simulate: Simulate) -> None:
        async def hang(now: float) -> None:
            # Requests that arrive as the server goes down fail one by one, seconds later.
            await asyncio.sleep(1 + now % 0.1 * 40)

        simulation = simulate(lambda now, _: disconnected() if 2 <= now < 40 else ANSWER, 0.1)
        simulation.before_response = lambda now: hang(now) if 2 <= now < 2.2 else None
        report = simulation.run(lambda session: session.stop_runtimes(targets(5000), verify=False))

        assert report.ok
        assert simulation.requests.total() <= 5000 + 200 + 30

    @pytest.mark.parametrize("status", [429, 500])
    def test_a_response_before_the_outage_does_not_end_it(
        self, simulate: Simulate, status: int
    ) -> None:
        """Fault: the status of an earlier attempt closed the breaker, so patience began anew."""

        def answer(now: float, _: str) -> BctrlError:
            error = BctrlRateLimitError if status == 429 else BctrlServerError
            return error("first", status=status) if now < 0.1 else disconnected()

        simulation = simulate(answer, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(30)), deadline=None, verify=False)
        )
        assert report.ended_early is not None
        assert simulation.seconds < 400

    def test_closing_the_session_during_the_outage_ends_the_run(self, simulate: Simulate) -> None:
        """Fault: the probe ended with the session, and the other targets waited for it for ever."""
        simulation = simulate(lambda *_: disconnected(), 0.1)

        async def scenario(session: BctrlSession) -> StopReport:
            batch = asyncio.ensure_future(session.stop_runtimes(list(targets(5)), verify=False))
            while simulation.requests.total() < 6:
                await asyncio.sleep(0.01)
            await session.close()
            async with asyncio.timeout(60):
                return await batch

        assert simulation.run(scenario).counts == {UNKNOWN: 5}

    def test_is_unanswered_is_true_during_the_outage(self, simulate: Simulate) -> None:
        simulation = simulate(lambda now, _: connection_refused() if 2 <= now < 32 else ANSWER, 0.1)

        async def scenario(session: BctrlSession) -> list[bool]:
            batch = session.stop_runtimes(targets(5000), verify=False)
            stopping = asyncio.create_task(batch)
            states: list[bool] = []
            for _ in range(3):
                await asyncio.sleep(1.5 if not states else 10)
                states.append(batch.is_unanswered)
            await stopping
            return [*states, batch.is_unanswered]

        assert simulation.run(scenario) == [False, True, True, False]

    @pytest.mark.parametrize("fail", [connection_refused, disconnected])
    def test_stop_reading_during_the_outage_waits_only_for_stops_that_may_have_taken_effect(
        self, simulate: Simulate, fail: Callable[[], BctrlError]
    ) -> None:
        simulation = simulate(lambda now, _: fail() if 2 <= now < 32 else ANSWER, 0.1)

        async def scenario(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(targets(10_000), verify=False)
            asyncio.get_running_loop().call_later(10, batch.stop_reading)
            return await batch

        report = simulation.run(scenario)
        assert 1900 <= report.total <= 2100
        if fail is connection_refused:
            assert report.counts == {STOPPED: report.total - 100, NOT_SENT: 100}
            assert simulation.seconds == pytest.approx(10)
        else:
            assert report.counts == {STOPPED: report.total}
            assert simulation.seconds > 32

    def test_a_target_that_breaks_the_server_is_given_up_after_a_minute(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda _, alias: disconnected() if alias == "r3" else ANSWER, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(targets(10), concurrency=1, verify=False)
        )

        assert report.counts == {STOPPED: 9, UNKNOWN: 1}
        assert report.ended_early is None
        assert simulation.seconds <= 70

    def test_a_target_that_breaks_the_server_among_others_is_given_up_after_its_attempts(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda _, alias: disconnected() if alias == "r3" else ANSWER, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(targets(20_000), verify=False)
        )

        assert report.counts == {STOPPED: 19_999, UNKNOWN: 1}
        assert simulation.requests["r3"] == RetryPolicy().attempts

    def test_an_answered_single_stop_shows_that_the_server_is_up(self, simulate: Simulate) -> None:
        simulation = simulate(lambda _, alias: ANSWER if alias == "crm" else disconnected(), 0.1)

        async def scenario(session: BctrlSession) -> StopReport:
            async def keep_stopping() -> None:
                while True:
                    await session.stop_runtime("ws-1", "crm")

            background = asyncio.create_task(keep_stopping())
            report = await session.stop_runtimes(targets(3), concurrency=2, verify=False)
            background.cancel()
            return report

        report = simulation.run(scenario)
        assert report.counts == {UNKNOWN: 3}
        assert report.ended_early is None


class TestColdSession:
    """Many targets whose first attempt is not answered, in a session with few successes yet.

    Fault: the first to be retried took the whole retry quota, and the others were given up, with
    the server up.
    """

    @pytest.mark.parametrize("fail", [connection_refused, disconnected, bad_gateway])
    @pytest.mark.parametrize("verify", [False, True])
    def test_all_are_stopped(
        self, simulate: Simulate, fail: Callable[[], BctrlError], *, verify: bool
    ) -> None:
        unlucky = {f"r{number}" for number in range(100)}

        def answer(_: float, alias: str) -> Runtime | BctrlError:
            if alias not in unlucky:
                return ANSWER
            unlucky.remove(alias)
            return fail()

        simulation = simulate(answer, 0.05)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(1000)), verify=verify)
        )
        assert report.counts == {STOPPED: 1000}
        assert simulation.seconds <= 15


class TestPoison:
    """Targets that are never answered, by a server that answers all others.

    Fault: one of a thousand held up the others for a minute, twenty for five, and the server was
    said not to answer.
    """

    @pytest.mark.parametrize("fail", [disconnected, bad_gateway])
    @pytest.mark.parametrize("poisoned", [0, 500, 999])
    def test_one_target_ends_after_its_own_attempts(
        self, simulate: Simulate, fail: Callable[[], BctrlError], poisoned: int
    ) -> None:
        bad = f"r{poisoned}"
        simulation = simulate(lambda _, alias: fail() if alias == bad else ANSWER, 0.1)
        finished = Finished()
        report = simulation.run(
            lambda session: session.stop_runtimes(targets(1000), on_outcome=finished, verify=False)
        )

        assert report.counts == {STOPPED: 999, UNKNOWN: 1}
        assert report.ended_early is None
        assert simulation.requests[bad] == RetryPolicy().attempts
        assert simulation.seconds <= 8
        assert max(at for alias, at in finished.at.items() if alias != bad) <= 1.5

    # At the end of the list, no successes of others add to the quota of their second attempts.
    @pytest.mark.parametrize(("first", "longest"), [(0, 20), (800, 40)])
    def test_two_hundred_in_a_row_do_not_end_the_run(
        self, simulate: Simulate, first: int, longest: float
    ) -> None:
        bad = {f"r{number}" for number in range(first, first + 200)}
        simulation = simulate(lambda _, alias: disconnected() if alias in bad else ANSWER, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(1000)), verify=False)
        )

        assert report.counts == {STOPPED: 800, UNKNOWN: 200}
        assert report.ended_early is None
        assert simulation.seconds <= longest

    def test_a_target_that_fails_once_at_the_end_is_stopped_at_once(
        self, simulate: Simulate
    ) -> None:
        def server(_: float, alias: str) -> Runtime | BctrlError:
            fails = alias == "r0" or (alias == "r99" and simulation.requests[alias] == 1)
            return disconnected() if fails else ANSWER

        simulation = simulate(server, 0.1)
        finished = Finished()
        simulation.run(
            lambda session: session.stop_runtimes(targets(100), on_outcome=finished, verify=False)
        )

        last = finished.outcomes["r99"]
        assert (last.result, last.attempts) == (STOPPED, 2)
        assert finished.at["r99"] <= 1.5

    @pytest.mark.parametrize("fail", [connection_refused, disconnected])
    @pytest.mark.parametrize("attempts", [1, 4])
    @pytest.mark.parametrize("lasts", [6, 30])
    def test_an_outage_is_survived_by_all_others(
        self, simulate: Simulate, fail: Callable[[], BctrlError], attempts: int, lasts: float
    ) -> None:
        def server(now: float, alias: str) -> Runtime | BctrlError:
            if 2 <= now < 2 + lasts:
                return fail()
            return disconnected() if alias.endswith("7") and alias[1:-1].endswith("1") else ANSWER

        simulation = simulate(server, 0.1)
        policy = RetryPolicy(attempts=attempts)
        report = simulation.run(
            lambda session: session.stop_runtimes(targets(5000), retry=policy, verify=False)
        )

        assert report.counts == {STOPPED: 4950, UNKNOWN: 50}
        assert report.ended_early is None
        assert simulation.stops() <= 1.1 * 5000
        assert simulation.seconds <= 2 + lasts + 15

    def test_an_outage_is_survived_if_only_a_canary_was_answered_before_it(
        self, simulate: Simulate
    ) -> None:
        """Fault: the server counted as one that had never answered, and was given up."""

        def server(now: float, alias: str) -> Runtime | BctrlError:
            if 0.3 <= now < 20:
                return connection_refused()
            return disconnected() if alias == "r0" else ANSWER

        simulation = simulate(server, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(targets(10), concurrency=1, verify=False)
        )

        assert report.counts == {STOPPED: 9, UNKNOWN: 1}
        assert report.ended_early is None

    def test_an_outage_is_survived_if_only_another_call_was_answered_before_it(
        self, simulate: Simulate
    ) -> None:
        """Fault: `stop_workspace` gave up in an outage that began right after its list."""

        def server(now: float, _: str) -> Runtime | BctrlError:
            return connection_refused() if 0.05 <= now < 20 else ANSWER

        async def scenario(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(targets(10), verify=False)
            await session.get_runtime("ws-1", "r0")
            return await batch

        assert simulate(server, 0.1).run(scenario).counts == {STOPPED: 10}

    def test_dead_canaries_are_replaced(self, simulate: Simulate) -> None:
        def server(now: float, alias: str) -> Runtime | BctrlError:
            # The nodes of all but one runtime go down once it is stopped.
            gone = alias != "bctrl-async-canary" and int(alias[1:]) < 95 and now > 0.5
            return disconnected() if gone or alias == "r99" else ANSWER

        simulation = simulate(server, 0.1)
        report = simulation.run(lambda session: session.stop_runtimes(targets(100), verify=False))

        assert report.counts == {STOPPED: 99, UNKNOWN: 1}
        assert simulation.seconds <= 30

    def test_failures_that_cost_no_attempt_are_bounded(self, simulate: Simulate) -> None:
        def server(now: float, alias: str) -> Runtime | BctrlError:
            # Down in every other second.
            return disconnected() if alias == "r3" or now % 2 >= 1 else ANSWER

        simulation = simulate(server, 0.1)
        report = simulation.run(lambda session: session.stop_runtimes(targets(5000), verify=False))

        assert report.counts == {STOPPED: 4999, UNKNOWN: 1}
        assert RetryPolicy().attempts <= simulation.requests["r3"] <= RetryPolicy().attempts + 11


class TestServerErrors:
    """A server that answers 500 to everything for a while.

    Fault: once the retry quota was exhausted, most targets were given up after one attempt.
    """

    @pytest.mark.parametrize(("lasts", "lost"), [(2, 10), (15, 60)])
    def test_nearly_all_targets_are_stopped_before_the_deadline(
        self, simulate: Simulate, lasts: float, lost: int
    ) -> None:
        failing = BctrlServerError("500", status=500, may_have_stopped=True)
        simulation = simulate(lambda now, _: failing if 0.5 <= now < 0.5 + lasts else ANSWER, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(3000)), deadline=120, verify=False)
        )

        assert report.counts[UNKNOWN] <= lost
        assert report.counts[STOPPED] == 3000 - report.counts[UNKNOWN]
        assert simulation.requests.total() <= 1.2 * 3000
        assert simulation.seconds <= 60

    def test_a_server_that_never_recovers_is_left_with_few_requests(
        self, simulate: Simulate
    ) -> None:
        failing = BctrlServerError("500", status=500, may_have_stopped=True)
        simulation = simulate(lambda *_: failing, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(3000)), deadline=120, verify=False)
        )

        assert simulation.seconds == pytest.approx(120)
        assert report.counts[STOPPED] == 0
        assert simulation.requests.total() <= 600

    def test_closing_the_session_ends_the_wait_for_the_quota(self, simulate: Simulate) -> None:
        failing = BctrlServerError("500", status=500, may_have_stopped=True)
        simulation = simulate(lambda *_: failing, 0.1)

        async def scenario(session: BctrlSession) -> StopReport:
            batch = asyncio.ensure_future(session.stop_runtimes(list(targets(100)), verify=False))
            await asyncio.sleep(5)
            await session.close()
            return await batch

        assert simulation.run(scenario).counts == {UNKNOWN: 100}
        assert simulation.seconds <= 6


class TestUnansweredReads:
    """A server that answers stops, and no GET."""

    def test_a_failed_stop_is_still_retried(self, simulate: Simulate) -> None:
        simulation = simulate(lambda *_: disconnected() if simulation.stops() == 1 else ANSWER, 0.1)
        simulation.answers_reads = False
        report = simulation.run(lambda session: session.stop_runtimes(targets(1), verify=False))

        assert report.counts == {STOPPED: 1}
        assert simulation.seconds <= 5

    def test_a_target_that_fails_once_at_the_end_is_stopped(self, simulate: Simulate) -> None:
        def server(_: float, alias: str) -> Runtime | BctrlError:
            fails = alias == "r999" and simulation.requests[alias] == 1
            return disconnected() if fails else ANSWER

        simulation = simulate(server, 0.1)
        simulation.answers_reads = False
        report = simulation.run(lambda session: session.stop_runtimes(targets(1000), verify=False))

        assert report.counts == {STOPPED: 1000}
        assert simulation.seconds <= 15

    @pytest.mark.parametrize("deadline", [None, 100])
    def test_a_silent_canary_holds_up_no_target_that_fails_once(
        self, simulate: Simulate, deadline: float | None
    ) -> None:
        """Fault: such targets waited for it, and one was given up after a single attempt."""

        def server(_: float, alias: str) -> Runtime | BctrlError:
            fails = alias in {"r50", "r100", "r300"} and simulation.requests[alias] == 1
            return disconnected() if fails else ANSWER

        simulation = simulate(server, 0.1)
        simulation.answers_reads, simulation.read_latency = False, 60.01
        report = simulation.run(
            lambda session: session.stop_runtimes(targets(3000), deadline=deadline, verify=False)
        )

        assert report.counts == {STOPPED: 3000}
        assert simulation.seconds <= 5

    def test_a_silent_canary_is_abandoned_once_a_stop_is_answered(self, simulate: Simulate) -> None:
        """Fault: after that answer the target waited for its canary as long as it took."""

        def server(_: float, alias: str) -> Runtime | BctrlError:
            return disconnected() if alias == "r0" and simulation.requests[alias] == 1 else ANSWER

        async def main(session: BctrlSession) -> StopReport:
            # The first canary is refused, the second is silent.
            asyncio.get_running_loop().call_later(0.15, setattr, simulation, "read_latency", 60.0)
            return await session.stop_runtimes(targets(3), concurrency=2, verify=False)

        simulation = simulate(server, 0.1)
        simulation.answers_reads = False
        simulation.before_response = lambda now: asyncio.sleep(5) if now else None
        report = simulation.run(main)

        assert report.counts == {STOPPED: 3}
        assert simulation.seconds <= 12

    def test_a_target_that_is_never_answered_ends_after_a_bounded_number_of_attempts(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda _, alias: disconnected() if alias == "r3" else ANSWER, 0.1)
        simulation.answers_reads = False
        report = simulation.run(
            lambda session: session.stop_runtimes(targets(30_000), verify=False)
        )

        assert report.counts == {STOPPED: 29_999, UNKNOWN: 1}
        assert simulation.requests["r3"] <= RetryPolicy().attempts + 10


class TestLatency:
    def test_a_slow_server_is_kept_busy_by_a_hundred_requests_in_flight(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda *_: ANSWER, 0.2)
        report = simulation.run(lambda session: session.stop_runtimes(targets(5000), verify=False))

        assert report.ok
        assert simulation.seconds <= 1.05 * 10


def test_a_retry_after_beyond_the_deadline_is_rejected_at_once(simulate: Simulate) -> None:
    unavailable = BctrlServerError("503", status=503, retry_after=20.0)
    simulation = simulate(lambda *_: unavailable, 0.1)
    report = simulation.run(
        lambda session: session.stop_runtimes(list(targets(1)), deadline=10, verify=False)
    )

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


class TestUntrustedCertificate:
    def test_from_the_first_attempt_it_ends_the_run_after_a_second_probe(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda *_: untrusted(), 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(10_000)), verify=False)
        )

        assert report.counts == {NOT_SENT: 10_000}
        # Two probes, a canary for each, and a new target sent meanwhile.
        assert simulation.requests.total() <= 100 + 5
        assert simulation.seconds < 3
        assert str(report.ended_early) == (
            "the server does not answer: no connection: the certificate has expired. "
            "Renew the certificate"
        )

    def test_while_the_first_answers_are_slow_it_costs_no_target(self, simulate: Simulate) -> None:
        """Fault: the run ended although other requests were in flight, and then answered."""
        is_bad = False

        def server(now: float, alias: str) -> Runtime | BctrlError:
            nonlocal is_bad
            is_bad = now < 5 and alias in {"r0", "r1", "bctrl-async-canary"}
            return untrusted() if is_bad else ANSWER

        simulation = simulate(server, 0.1)
        simulation.before_response = lambda _: None if is_bad else asyncio.sleep(10)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(100)), verify=False)
        )

        assert report.counts == {STOPPED: 100}
        assert report.ended_early is None

    @pytest.mark.parametrize("every", [2, 3, 10])
    @pytest.mark.parametrize("seed", range(3))
    def test_from_some_machines_for_half_a_second_it_costs_no_target(
        self, simulate: Simulate, every: int, seed: int
    ) -> None:
        """Fault: it ended a run that was being answered, or lost the targets that met it."""
        chance = random.Random(seed)

        def server(now: float, _: str) -> Runtime | BctrlError:
            return untrusted() if now < 0.5 and not chance.randrange(every) else ANSWER

        simulation = simulate(server, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(5000)), verify=False)
        )

        assert report.ended_early is None
        assert report.counts == {STOPPED: 5000}

    def test_in_a_reload_of_ten_seconds_it_costs_no_target(self, simulate: Simulate) -> None:
        simulation = simulate(lambda now, _: untrusted() if 2 <= now < 12 else ANSWER, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(5000)), verify=False)
        )

        assert report.counts == {STOPPED: 5000}
        assert report.ended_early is None

    def test_one_that_has_expired_ends_the_run_after_the_patience(self, simulate: Simulate) -> None:
        simulation = simulate(lambda now, _: ANSWER if now < 0.95 else untrusted(), 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(10_000)), verify=False)
        )

        stopped = report.counts[STOPPED]
        assert 800 <= stopped <= 1000
        assert report.counts == {STOPPED: stopped, NOT_SENT: 10_000 - stopped}
        assert 300 <= simulation.seconds <= 320
        assert str(report.ended_early) == (
            "the server answers no more: no connection: the certificate has expired. "
            "Renew the certificate"
        )

    def test_that_of_a_single_target_costs_its_attempts(self, simulate: Simulate) -> None:
        simulation = simulate(lambda _, alias: untrusted() if alias == "r7" else ANSWER, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(list(targets(1000)), verify=False)
        )

        assert report.counts == {STOPPED: 999, NOT_SENT: 1}
        assert report.failures[0].attempts == 4
        assert report.ended_early is None

    def test_a_single_call_ends_with_it(self, simulate: Simulate) -> None:
        simulation = simulate(lambda *_: untrusted(), 0.1)
        with pytest.raises(BctrlNetworkError, match="the certificate has expired"):
            simulation.run(lambda session: session.stop_runtime("ws-1", "crm"))
        assert simulation.requests == {"crm": 1}
