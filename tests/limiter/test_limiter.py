"""The limiter: fair, bounded, patient, and closable while tasks wait."""

import asyncio
import gc
import weakref
from collections import Counter

import pytest
from support.helpers import Bulk, pass_time
from support.pacing import Member, MemoryPace
from support.runtimes import RUNTIME
from support.servers import answering, http_answer, raw_server
from support.simulated import ANSWER, Request, Simulate, targets
from support.throttling import past_start, release, show_limit, throttled
from support.virtual_time import in_virtual_time, now

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlRateLimitError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    RuntimeStatus,
    StopResult,
)
from bctrl_async._kinds import Failure, Kind
from bctrl_async._limiter.bounds import FixedRate
from bctrl_async._limiter.evidence import History
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.queues import Priority
from bctrl_async._limiter.rate import AdaptiveRate

STOPPED, NOT_SENT, REJECTED = (
    StopResult.STOPPED,
    StopResult.NOT_SENT,
    StopResult.REJECTED,
)
LACK = Failure(kind=Kind.NO_RESOURCES, summary="no connection: Too many open files")
CLOSED = r"^the session is closed\. Make the call inside `async with`"


async def run_loop(iterations: int = 3) -> None:
    """Run the event loop, by default until every task is blocked."""
    for _ in range(iterations):
        await asyncio.sleep(0)


@in_virtual_time
class TestAdmission:
    async def test_retries_come_first_polls_last_and_a_bulk_target_after_four_singles(
        self,
    ) -> None:
        limiter = Limiter(1, past_start())
        assert limiter.acquire_nowait()
        admitted = []

        async def use(priority: Priority) -> None:
            await limiter.acquire(60.0, priority)
            admitted.append(priority.name)
            limiter.release(None)

        waiting = [*[Priority.SINGLE] * 6, Priority.RETRY, Priority.POLL, Priority.BULK]
        async with asyncio.TaskGroup() as group:
            for priority in waiting:
                group.create_task(use(priority))
            await run_loop()
            limiter.release(None)

        assert admitted == ["RETRY", *["SINGLE"] * 4, "BULK", *["SINGLE"] * 2, "POLL"]

    async def test_a_waiter_cancelled_after_admission_passes_its_slot_on(self) -> None:
        limiter = Limiter(1, past_start())
        await limiter.acquire(60.0)
        admitted, waiting = (
            asyncio.create_task(limiter.acquire(60.0)) for _ in range(2)
        )
        await run_loop()
        limiter.release(None)
        admitted.cancel()
        await waiting
        assert admitted.cancelled()

    async def test_nobody_sleeps_after_the_close(self) -> None:
        limiter = Limiter(1, past_start())
        limiter.close()
        started = asyncio.get_running_loop().time()
        await limiter.start_sleep(60.0)
        assert asyncio.get_running_loop().time() == started

    async def test_a_retry_goes_before_the_turn_of_the_bulk(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        order: list[str] = []

        async def use(priority: Priority) -> None:
            await limiter.acquire(60, priority)
            order.append(priority.name)
            await asyncio.sleep(1)
            limiter.release("a runtime")

        async with asyncio.TaskGroup() as group:
            for priority in [Priority.SINGLE] * 6 + [Priority.BULK]:
                group.create_task(use(priority))
            # The bulk waits while four go before it, so the next turn is its own.
            while len(order) < 5:
                await asyncio.sleep(0.5)
            group.create_task(use(Priority.RETRY))

        assert order == ["SINGLE"] * 5 + ["RETRY", "BULK", "SINGLE"]

    async def test_waiting_single_stops_go_on_when_the_bulk_is_cancelled_at_its_turn(
        self,
    ) -> None:
        member = Member(MemoryPace(rate=10), latency=0.0)
        bulk = asyncio.create_task(member.bulk(100))
        await asyncio.sleep(0)
        singles = [asyncio.create_task(member.attempt()) for _ in range(20)]
        while sum(single.done() for single in singles) < 4:
            await asyncio.sleep(0.01)
        bulk.cancel()
        async with asyncio.timeout(60):
            await asyncio.gather(*singles)


@in_virtual_time
class TestCapacity:
    """A machine that can hold few connections."""

    async def test_it_is_found_costs_a_failure_a_second_and_grows_again(self) -> None:
        limiter = Limiter(100, past_start())
        in_flight: Counter[int] = Counter()
        lacks = 0

        async def use() -> None:
            nonlocal lacks
            while (second := int(now())) < 20:
                await limiter.acquire(60.0)
                if second < 10 and limiter.in_use > 4:
                    assert limiter.give_way(LACK, History())
                    lacks += 1
                    continue
                in_flight[second] = max(in_flight[second], limiter.in_use)
                await asyncio.sleep(0.1)
                limiter.release("a runtime")

        await asyncio.gather(*(use() for _ in range(30)))

        assert {in_flight[second] for second in range(10)} == {4}
        assert lacks <= 26 + 10
        assert in_flight[19] == 30

    async def test_a_call_that_is_alone_keeps_its_slot_and_the_limit(self) -> None:
        limiter = Limiter(2, past_start())
        assert limiter.acquire_nowait()

        assert not limiter.give_way(LACK, History())
        assert limiter.in_use == 1
        assert limiter.acquire_nowait()


@in_virtual_time
class TestClose:
    async def test_it_fails_all_waiters_and_all_later_calls(self) -> None:
        limiter = Limiter(1, past_start())
        await limiter.acquire(60.0)
        calls = [asyncio.create_task(limiter.acquire(60.0)) for _ in range(3)]
        await run_loop()
        # The first is admitted, and has not run.
        limiter.release(None)
        limiter.close()
        calls[2].cancel()

        for call in calls[:2]:
            with pytest.raises(BctrlConfigError, match=CLOSED):
                await call
        with pytest.raises(asyncio.CancelledError):
            await calls[2]
        assert not limiter.acquire_nowait()
        with pytest.raises(BctrlConfigError, match=CLOSED):
            await limiter.acquire(60.0)

    async def test_it_ends_a_sleep_which_takes_no_slot(self) -> None:
        limiter = Limiter(1, past_start())
        sleeping = asyncio.create_task(limiter.sleep(3600))
        await run_loop()
        assert limiter.acquire_nowait()
        assert not sleeping.done()

        limiter.close()
        await sleeping
        await limiter.sleep(3600)
        assert now() == 0

    async def test_no_timer_keeps_it(self) -> None:
        limiter = Limiter(10, past_start())
        show_limit(limiter, 30.0, *(f"ws-{number}" for number in range(8)))
        waits = asyncio.create_task(limiter.acquire(60.0))
        await run_loop()
        waits.cancel()
        await asyncio.wait([waits])
        limiter.close()
        reference = weakref.ref(limiter._all)
        del limiter, waits
        gc.collect()
        assert reference() is None


@in_virtual_time
class TestWait:
    async def test_a_retry_after_beyond_the_patience_fails_current_and_future_waiters(
        self,
    ) -> None:
        """Fault: a days-long Retry-After is waited out (openai family)."""
        limiter = Limiter(1, AdaptiveRate())
        await limiter.acquire(60.0)
        impatient = asyncio.create_task(limiter.acquire(10.0))
        patient = asyncio.create_task(limiter.acquire(7200.0))
        await asyncio.sleep(1)
        show_limit(limiter, 3600.0)
        release(limiter, throttled(3600.0))
        for too_short in (limiter.acquire(60.0), impatient):
            with pytest.raises(
                BctrlRateLimitError, match=r"another 3600 s \(Retry-A"
            ) as caught:
                await too_short
            assert caught.value.retry_after == pytest.approx(3600)
            assert (caught.value.status, caught.value.may_have_stopped) == (None, False)

        # Its patience lasts for the whole hour.
        await patient
        assert now() == pytest.approx(3601)

    async def test_a_wait_between_attempts_is_no_round_trip(self) -> None:
        """Fault: the wait for a Retry-After slowed down the session from then on."""
        limiter = Limiter(1, AdaptiveRate())
        history = History(workspace="ws-1")
        await asyncio.sleep(1.0)
        await limiter.acquire(300.0, history=history)
        await asyncio.sleep(0.1)
        release(limiter, throttled(60.0), history)
        await asyncio.sleep(60.0)
        # No rate bounds its next attempt.
        limiter._all.rate.is_starting = False
        assert limiter.acquire_nowait()
        await asyncio.sleep(0.1)
        release(limiter, "a runtime", history)
        assert limiter._all.rate.answers.round_trip < 1.0

    async def test_a_wait_that_becomes_shorter_ends_in_time(self) -> None:
        limiter = Limiter(2, AdaptiveRate(), FixedRate(0.1))
        await limiter.acquire(60.0)
        cancelled = asyncio.create_task(limiter.acquire(60.0))
        waiting = asyncio.create_task(limiter.acquire(60.0))
        await asyncio.sleep(1)
        cancelled.cancel()
        limiter.release("a runtime")
        await waiting

        assert now() == pytest.approx(10, rel=0.01)


@in_virtual_time
class TestPatience:
    async def test_it_counts_from_when_the_server_throttles_all(self) -> None:
        limiter = Limiter(10, AdaptiveRate())
        show_limit(limiter, 50.1)
        await asyncio.sleep(0.3)
        await limiter.acquire(50.2, Priority.BULK, History(waits_since=-9.9))

        assert now() == pytest.approx(50.1)

    async def test_it_may_be_shorter_than_a_timer_is_exact(self) -> None:
        """Fault: a patience of 5 ms ended at once, though nothing was throttled."""
        limiter = Limiter(10, AdaptiveRate())
        for _ in range(20):
            await limiter.acquire(0.005)
            limiter.release(None)

    async def test_the_sessions_own_pause_is_waited_for_without_any(self) -> None:
        """Fault: its own pause was reported as a Retry-After beyond the patience."""
        limiter = Limiter(10, AdaptiveRate())
        show_limit(limiter)
        await limiter.acquire(0.0)

        assert now() == pytest.approx(0.5)

    @pytest.mark.parametrize(
        ("throttled_at", "patience", "ends"),
        [
            ((2.0,), 2.0, [7, 11, 5]),
            ((2.0, 6.0), 2.0, [11, 15, 8]),
            ((2.0, 6.0), 9.0, [11, 15, 15]),
        ],
    )
    async def test_it_ends_in_time_for_those_that_came_before_and_after_the_throttling(
        self, throttled_at: tuple[float, ...], patience: float, ends: list[float]
    ) -> None:
        """The only slot stays in use; others are answered 2 s before each time."""
        limiter = Limiter(1, AdaptiveRate())
        await limiter.acquire(60.0)

        async def wait(start: float, patience: float) -> float:
            await asyncio.sleep(start)
            with pytest.raises(
                BctrlRateLimitError, match="the server throttled the calls"
            ):
                await limiter.acquire(patience)
            return now()

        loop = asyncio.get_running_loop()
        workspaces = [f"ws-{number}" for number in range(8)]
        for time in throttled_at:
            loop.call_at(time - 2.0, limiter._on_success, History())
            loop.call_at(time, show_limit, limiter, None, *workspaces)
        without_patience = asyncio.create_task(limiter.acquire(0.0))

        waits = (wait(0.0, 5.0), wait(1.0, 9.0), wait(3.0, patience))
        assert await asyncio.gather(*waits) == pytest.approx(ends, abs=0.011)
        assert not without_patience.done()

    async def test_a_short_patience_ends_in_time_beside_a_long_one(self) -> None:
        """Fault: a call with a patience of 0.3 s failed after 2.9 s."""
        limiter = Limiter(1, AdaptiveRate())
        await limiter.acquire(60.0)
        workspaces = [f"ws-{number}" for number in range(8)]
        patient = asyncio.create_task(limiter.acquire(3.0))
        await asyncio.sleep(0.0)
        show_limit(limiter, None, *workspaces)
        limiter._on_success(History())
        impatient = asyncio.create_task(limiter.acquire(0.3))
        await asyncio.sleep(0.1)
        show_limit(limiter, None, *workspaces)
        with pytest.raises(BctrlRateLimitError, match="the server throttled the calls"):
            await impatient
        assert now() == pytest.approx(0.4)
        with pytest.raises(BctrlRateLimitError, match="the server throttled the calls"):
            await patient
        assert now() == pytest.approx(3.1)


def test_one_retry_after_holds_its_own_call_and_no_other(simulate: Simulate) -> None:
    """Fault: one target over its quota, or behind a dead gateway, held up all."""
    simulation = simulate(
        lambda request: throttled(50.0) if request.at == 0.0 else ANSWER
    )

    async def scenario(session: BctrlSession) -> None:
        held = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await asyncio.sleep(0.2)
        await session.stop_runtime("ws-1", "mail")
        assert now() == pytest.approx(0.3)
        await held

    simulation.run(scenario)
    assert simulation.seconds == pytest.approx(50.2)


class TestEverythingIsThrottled:
    """Fault: a patience of 2 s ended after 272 s, with the last call's turn."""

    POLICY = RetryPolicy(patience=2.0)

    def test_a_single_call_ends_with_its_patience(self, simulate: Simulate) -> None:
        async def stop_all(session: BctrlSession) -> list[BaseException | Runtime]:
            stops = (
                session.stop_runtime(*target, retry=self.POLICY)
                for target in targets(50)
            )
            return await asyncio.gather(*stops, return_exceptions=True)

        simulation = simulate(lambda _: throttled())
        ends = simulation.run(stop_all)

        assert {type(end) for end in ends} == {BctrlRateLimitError}
        assert simulation.seconds < 8

    @pytest.mark.parametrize("accepted", [0, 20])
    def test_a_bulk_stop_ends_with_its_patience_although_others_were_answered_before(
        self, simulate: Simulate, accepted: int
    ) -> None:
        answers = iter([ANSWER] * accepted)
        simulation = simulate(lambda _: next(answers, throttled()))
        report = simulation.stop(60, retry=self.POLICY)

        assert report.counts[STOPPED] == accepted
        assert report.counts[REJECTED] > 0
        # Some still wait for their first attempt if no others are answered.
        assert (report.counts[NOT_SENT] > 0) is (accepted < 20)
        # The next answer after the two seconds shows that nothing has changed.
        assert simulation.seconds < 10

    def test_a_throttled_answer_after_a_silence_ends_no_call(
        self, simulate: Simulate
    ) -> None:
        """Fault: all others failed as if throttled during the silence."""
        answers = iter([BctrlNetworkError("lost")] * 2 + [throttled()])
        simulation = simulate(lambda _: next(answers, ANSWER), 3.0)
        # The answers come one after the other.
        simulation.before_response = lambda _: asyncio.sleep(
            0.01 * len(simulation.requests)
        )

        async def stop_all(session: BctrlSession) -> list[Runtime]:
            stops = (
                session.stop_runtime(*target, retry=self.POLICY)
                for target in targets(300)
            )
            return await asyncio.gather(*stops)

        assert len(simulation.run(stop_all)) == 300

    def test_while_others_are_answered_a_call_waits_for_its_turn(
        self, simulate: Simulate
    ) -> None:
        accepted = [-1.0]

        def one_in_a_second(request: Request) -> Runtime | BctrlError:
            if request.at < accepted[-1] + 1.0:
                return throttled()
            accepted.append(request.at)
            return ANSWER

        simulation = simulate(one_in_a_second)
        report = simulation.stop(20, retry=RetryPolicy(patience=10.0))

        assert report.counts[STOPPED] > 10
        assert report.counts[NOT_SENT] == 0
        assert simulation.seconds > 15


async def test_a_stop_that_no_rate_bounds_takes_its_slot_at_once(bulk: Bulk) -> None:
    bulk.session._limiter._all.rate.is_starting = False
    assert (await bulk.session.stop_runtime("ws-1", "crm")).status == "stopped"
    assert bulk.session._limiter.in_use == 0
    # Nothing measures a round trip where no rate could learn from it.
    assert bulk.session._limiter._all.rate.answers.round_trip == 0.0


async def test_a_session_recovers_from_an_absurd_retry_after_within_an_hour() -> None:
    """Fault: one Retry-After with an epoch in it locks a client for years."""
    throttling = http_answer("429 X", b"", "Retry-After: 1795651200")
    answers = *[throttling] * 8, http_answer("200 OK", RUNTIME)
    async with (
        raw_server(answering(*answers)) as url,
        BctrlSession("k", base_url=url) as session,
    ):
        for _ in range(9):
            with pytest.raises(BctrlRateLimitError):
                await session.stop_runtime("ws-1", "crm")
        assert session.stats.attempts == 8

        pass_time(3600.0)
        runtime = await session.stop_runtime("ws-1", "crm")
        assert runtime.status is RuntimeStatus.STOPPED
