"""A Retry-After of more than a minute: one attempt a minute is sent all the same, as a probe."""

from __future__ import annotations

import asyncio

import pytest
from helpers import pass_time
from runtimes import RUNTIME
from servers import answering, http_answer, raw_server
from simulated import ANSWER, Request, Server, Simulation, targets
from throttling import throttled
from virtual_time import in_virtual_time, now

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlRateLimitError,
    BctrlServerError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    RuntimeStatus,
    StopReport,
    StopResult,
)
from bctrl_async._limiter.limiter import Limiter, Priority
from bctrl_async._limiter.rate import PROBE_INTERVAL, AdaptiveRate

YEAR = 365 * 86400.0
PATIENCE = 60.0


@pytest.fixture
def limiter() -> Limiter:
    return Limiter(10, AdaptiveRate())


async def answer(limiter: Limiter, parsed: object) -> None:
    """Make an attempt that takes no time."""
    await limiter.acquire(PATIENCE)
    limiter.release(parsed)


async def wait_for_probe(limiter: Limiter) -> None:
    """Get a Retry-After of a year, and wait until a probe is due."""
    await answer(limiter, throttled(YEAR))
    await asyncio.sleep(PROBE_INTERVAL)


async def start_behind_a_probe(limiter: Limiter, *max_waits: float) -> list[asyncio.Task[None]]:
    """Send a probe, and start calls while it is in flight."""
    await wait_for_probe(limiter)
    await limiter.acquire(PATIENCE)
    calls = [asyncio.create_task(limiter.acquire(max_wait)) for max_wait in max_waits]
    await asyncio.sleep(0.0)
    return calls


async def attempts_until(limiter: Limiter, end: float) -> list[float]:
    """Call once a second, as an impatient caller would; return the times of those admitted."""
    admitted = []
    loop = asyncio.get_running_loop()
    while loop.time() < end:
        try:
            await limiter.acquire(0.0)
        except BctrlRateLimitError:
            pass
        else:
            admitted.append(loop.time())
            limiter.release(throttled(YEAR))
        await asyncio.sleep(1.0)
    return admitted


@in_virtual_time
class TestProbe:
    async def test_calls_in_between_fail_at_once(self, limiter: Limiter) -> None:
        await answer(limiter, throttled(YEAR))
        await asyncio.sleep(PROBE_INTERVAL - 1)
        with pytest.raises(BctrlRateLimitError) as caught:
            await limiter.acquire(PATIENCE)
        assert str(caught.value) == (
            "not sent: rate limited for another 31535941 s (Retry-After). "
            "Probes are sent once a minute; retry in 1 s"
        )
        assert caught.value.retry_after == YEAR - 59

        assert now() == PROBE_INTERVAL - 1

    async def test_the_error_of_a_pause_that_is_kept_exactly_says_nothing_of_probes(
        self, limiter: Limiter
    ) -> None:
        await answer(limiter, throttled(60.0))
        with pytest.raises(BctrlRateLimitError, match="another 60 s") as caught:
            await limiter.acquire(1.0)
        assert "a minute" not in str(caught.value)

    async def test_while_each_probe_is_throttled_one_call_a_minute_is_sent(
        self, limiter: Limiter
    ) -> None:
        """Fault: after one Retry-After with an epoch in it, every later call failed for years."""
        await answer(limiter, throttled(YEAR))

        assert await attempts_until(limiter, 200.0) == [60.0, 120.0, 180.0]

    @pytest.mark.parametrize("retry_after", [30.0, 60.0])
    async def test_a_retry_after_of_up_to_a_minute_is_kept_exactly(
        self, limiter: Limiter, retry_after: float
    ) -> None:
        await answer(limiter, throttled(retry_after))
        assert not limiter.acquire_nowait()
        await limiter.acquire(PATIENCE)

        assert now() == pytest.approx(retry_after)

    async def test_a_call_whose_patience_exceeds_the_pause_waits_for_a_probe(
        self, limiter: Limiter
    ) -> None:
        await answer(limiter, throttled(600.0))
        starts = []

        async def call() -> None:
            await limiter.acquire(700.0)
            starts.append(now())

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(call())

        assert starts == [60.0, 120.0, 180.0]

    async def test_the_minute_begins_at_the_last_throttled_answer(self, limiter: Limiter) -> None:
        await limiter.acquire(PATIENCE)
        await answer(limiter, throttled(YEAR))
        await asyncio.sleep(30.0)
        limiter.release(throttled(45.0))

        assert await attempts_until(limiter, 140.0) == [90.0]


@in_virtual_time
class TestBehindAProbe:
    """Calls that arrive while a probe is in flight."""

    @pytest.mark.parametrize(
        "parsed", [throttled(YEAR), throttled(), BctrlNetworkError("no answer"), None]
    )
    async def test_they_fail_once_the_probe_has_ended_without_ending_the_pause(
        self, limiter: Limiter, parsed: BctrlError | None
    ) -> None:
        """Fault: a bulk stop that began with a probe killed itself with its second call."""
        calls = await start_behind_a_probe(limiter, PATIENCE, 0.0, 0.0)
        await asyncio.sleep(5.0)
        assert not any(call.done() for call in calls)
        limiter.release(parsed)
        failed = await asyncio.gather(*calls, return_exceptions=True)
        assert now() == PROBE_INTERVAL + 5.0

        assert {type(error) for error in failed} == {BctrlRateLimitError}

    async def test_they_are_admitted_once_the_probe_has_ended_the_pause(
        self, limiter: Limiter
    ) -> None:
        calls = await start_behind_a_probe(limiter, PATIENCE, 0.0, 0.0)
        limiter.release("a runtime")
        await asyncio.gather(*calls)

        assert now() < PROBE_INTERVAL + 5.0

    async def test_the_patient_ones_wait_on_when_the_others_fail(self, limiter: Limiter) -> None:
        patient, impatient = await start_behind_a_probe(limiter, 10 * YEAR, 0.0)
        limiter.release(None)
        with pytest.raises(BctrlRateLimitError):
            await impatient
        await patient

        assert now() == 2 * PROBE_INTERVAL

    async def test_one_of_them_is_the_next_probe_if_the_first_takes_a_minute(
        self, limiter: Limiter
    ) -> None:
        first, second = await start_behind_a_probe(limiter, 0.0, 0.0)
        await first
        assert not second.done()
        limiter.release(None)
        limiter.release("a runtime")
        await second

        assert 2 * PROBE_INTERVAL <= now() < 2 * PROBE_INTERVAL + 5.0

    async def test_they_fail_once_a_probe_is_cancelled_before_it_has_run(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        await wait_for_probe(limiter)
        await limiter.acquire(PATIENCE)
        probe = asyncio.create_task(limiter.acquire(10 * YEAR))
        await asyncio.sleep(PROBE_INTERVAL)
        call = asyncio.create_task(limiter.acquire(0.0))
        limiter.release(None)
        probe.cancel()
        with pytest.raises(BctrlRateLimitError):
            await call
        assert probe.cancelled()

        assert now() == 2 * PROBE_INTERVAL

    async def test_an_attempt_older_than_the_probe_makes_no_call_wait_for_more_than_a_minute(
        self, limiter: Limiter
    ) -> None:
        await limiter.acquire(PATIENCE)  # It is never answered.
        (call,) = await start_behind_a_probe(limiter, 0.0)
        limiter.release(None)
        await call

        assert now() == 2 * PROBE_INTERVAL


@in_virtual_time
class TestAnswerOfAProbe:
    @pytest.mark.parametrize("parsed", ["a runtime", BctrlServerError("500", status=500)])
    async def test_an_answer_that_is_not_throttled_ends_the_pause(
        self, limiter: Limiter, parsed: object
    ) -> None:
        await wait_for_probe(limiter)
        await answer(limiter, parsed)
        for _ in range(100):
            await answer(limiter, "a runtime")

        # As after any pause, a slow start: 20 a second at first.
        assert 1 < now() - PROBE_INTERVAL < 3

    async def test_calls_that_wait_are_admitted_as_soon_as_the_pause_ends(
        self, limiter: Limiter
    ) -> None:
        await answer(limiter, throttled(600.0))
        waiting = [asyncio.create_task(limiter.acquire(700.0)) for _ in range(3)]
        await asyncio.sleep(PROBE_INTERVAL + 0.1)
        limiter.release("a runtime")
        starts = []
        for task in waiting[1:]:
            await task
            starts.append(now() - PROBE_INTERVAL)

        assert starts == pytest.approx([0.1, 0.15], abs=0.01)

    async def test_a_rate_that_was_asked_for_is_kept_after_the_pause(self) -> None:
        limiter = Limiter(10, AdaptiveRate(0.1))
        await wait_for_probe(limiter)
        await answer(limiter, "a runtime")
        await answer(limiter, "a runtime")

        assert now() - PROBE_INTERVAL == pytest.approx(10.0)

    async def test_another_retry_after_replaces_the_first(self, limiter: Limiter) -> None:
        await wait_for_probe(limiter)
        await answer(limiter, throttled(5.0))
        await limiter.acquire(PATIENCE)

        assert now() == pytest.approx(65.0)

    @pytest.mark.parametrize("parsed", [throttled(), BctrlServerError("503", status=503), None])
    async def test_no_answer_and_one_without_retry_after_leave_the_pause_as_it_is(
        self, limiter: Limiter, parsed: BctrlError | None
    ) -> None:
        await wait_for_probe(limiter)
        await answer(limiter, parsed)

        assert await attempts_until(limiter, 125.0) == [120.0]

    @pytest.mark.parametrize("retry_after", [YEAR, None])
    async def test_a_late_answer_to_an_earlier_attempt_does_not_end_a_pause_just_confirmed(
        self, limiter: Limiter, retry_after: float | None
    ) -> None:
        await limiter.acquire(PATIENCE)
        await wait_for_probe(limiter)
        await answer(limiter, throttled(retry_after))
        limiter.release("a runtime")
        with pytest.raises(BctrlRateLimitError):
            await limiter.acquire(PATIENCE)

    async def test_an_answer_after_the_pause_has_passed_changes_nothing(
        self, limiter: Limiter
    ) -> None:
        await answer(limiter, throttled(90.0))
        await asyncio.sleep(PROBE_INTERVAL)
        await limiter.acquire(PATIENCE)
        await asyncio.sleep(31.0)
        limiter.release("a runtime")
        await answer(limiter, "a runtime")

        assert now() == pytest.approx(91.0)


@in_virtual_time
class TestRetry:
    async def test_it_waits_for_a_pause_that_ends_with_its_patience(self, limiter: Limiter) -> None:
        await answer(limiter, throttled(50.1))
        await asyncio.sleep(0.3)
        await limiter.acquire(60.0, Priority.RETRY, patience_ends=50.1)

        assert now() == pytest.approx(50.1)

    async def test_after_the_pause_it_waits_for_its_turn_although_its_patience_has_ended(
        self,
    ) -> None:
        limiter = Limiter(10, AdaptiveRate(0.1))
        await answer(limiter, throttled(30.0))
        await asyncio.sleep(40.0)
        await limiter.acquire(60.0)
        await limiter.acquire(60.0, Priority.RETRY, patience_ends=20.0)

        assert now() == pytest.approx(50.0, rel=0.01)

    async def test_an_ended_patience_fails_no_other_waiter(self, limiter: Limiter) -> None:
        await limiter.acquire(PATIENCE)
        await answer(limiter, throttled(10.0))
        retry = asyncio.create_task(limiter.acquire(60.0, Priority.RETRY, patience_ends=11.0))
        call = asyncio.create_task(limiter.acquire(60.0))
        await asyncio.sleep(5.0)
        limiter.release(throttled(30.0))
        with pytest.raises(BctrlRateLimitError):
            await retry
        await call

        assert now() == pytest.approx(35.0)


class TestEverythingIsThrottled:
    """Fault: a patience of 2 s ended after 272 s, when the last call had had its turn."""

    POLICY = RetryPolicy(patience=2.0)

    def test_a_single_call_ends_with_its_patience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        simulation = Simulation(monkeypatch, lambda *_: throttled(), 0.1)

        async def stop_all(session: BctrlSession) -> list[BaseException | Runtime]:
            stops = (session.stop_runtime(*each, retry=self.POLICY) for each in targets(50))
            return await asyncio.gather(*stops, return_exceptions=True)

        ends = simulation.run(stop_all)

        assert {type(end) for end in ends} == {BctrlRateLimitError}
        assert simulation.seconds < 8

    @pytest.mark.parametrize("accepted", [0, 1, 20])
    def test_a_bulk_stop_ends_with_its_patience_although_others_were_answered_before(
        self, monkeypatch: pytest.MonkeyPatch, accepted: int
    ) -> None:
        answers = iter([ANSWER] * accepted)
        simulation = Simulation(monkeypatch, lambda *_: next(answers, throttled()), 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(targets(60), retry=self.POLICY)
        )

        assert report.counts[StopResult.STOPPED] == accepted
        assert report.counts[StopResult.REJECTED] > 0
        # Without others that are answered, most wait for their first attempt.
        assert (report.counts[StopResult.NOT_SENT] > 20) is (accepted < 20)
        # The next answer after the two seconds shows that nothing has changed.
        assert simulation.seconds < 10

    def test_a_throttled_answer_after_a_silence_ends_no_call(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: all others failed as if the server had throttled them as long as it was silent."""
        answers = iter([BctrlNetworkError("lost")] * 2 + [throttled()])
        simulation = Simulation(monkeypatch, lambda *_: next(answers, ANSWER), 3.0)
        # The answers come one after the other.
        simulation.before_response = lambda _: asyncio.sleep(0.01 * len(simulation.requests))

        async def stop_all(session: BctrlSession) -> list[Runtime]:
            stops = (session.stop_runtime(*each, retry=self.POLICY) for each in targets(300))
            return await asyncio.gather(*stops)

        assert len(simulation.run(stop_all)) == 300

    def test_while_others_are_answered_a_call_waits_for_its_turn(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        accepted: list[float] = []

        def one_in_a_second(each: Request) -> Runtime | BctrlError:
            if accepted and each.at < accepted[-1] + 1.0:
                return throttled()
            accepted.append(each.at)
            return ANSWER

        simulation = Simulation(monkeypatch, one_in_a_second, 0.1)
        report = simulation.run(
            lambda session: session.stop_runtimes(
                targets(20), retry=RetryPolicy(patience=5.0), verify=False
            )
        )

        assert report.counts[StopResult.STOPPED] > 10
        assert report.counts[StopResult.NOT_SENT] == 0
        assert simulation.seconds > 15


@in_virtual_time
class TestOwnPause:
    async def test_the_sessions_own_pause_is_waited_for_whatever_the_patience(
        self, limiter: Limiter
    ) -> None:
        """Fault: the session's own pause was reported as a Retry-After beyond the patience."""
        for _ in range(3):
            await answer(limiter, throttled())
        await limiter.acquire(0.0)

        assert now() == pytest.approx(0.5)


def seconds_to_stop(
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    *,
    count: int = 1000,
    deadline: float | None = None,
) -> tuple[float, float]:
    """Stop many; return the times of the first success and of the end of the run."""
    simulation = Simulation(monkeypatch, server, 0.1)
    report = simulation.stop(count, verify=True, deadline=deadline)
    assert report.counts == {StopResult.STOPPED: count}
    return min(simulation.ended_at.values()), simulation.seconds


def test_a_retry_gives_up_in_time_when_another_call_prolongs_the_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulation = Simulation(monkeypatch, lambda each: throttled(30.0 if each.at else 50.0), 0.1)
    simulation.before_response = lambda each: asyncio.sleep(40.0) if each.at else None

    async def scenario(session: BctrlSession) -> BctrlRateLimitError:
        retried = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await asyncio.sleep(0.01)
        with pytest.raises(BctrlRateLimitError):
            await session.stop_runtime("ws-1", "mail", retry=RetryPolicy(patience=0))
        with pytest.raises(BctrlRateLimitError, match="for another 30 s") as caught:
            await retried
        return caught.value

    error = simulation.run(scenario)
    assert (error.attempts, error.status) == (1, 429)
    assert simulation.seconds < 41


async def wait_until_a_probe_is_due(session: BctrlSession) -> None:
    with pytest.raises(BctrlRateLimitError):
        await session.stop_runtime("ws-1", "first")
    await asyncio.sleep(PROBE_INTERVAL + 1)


class TestBulk:
    @pytest.mark.parametrize(
        ("retry_after", "deadline", "share"),
        [(250.0, None, 0.5), (3600.0, 7200.0, 1.0)],
    )
    def test_a_probe_is_sent_although_the_workers_got_the_long_retry_after_themselves(
        self,
        monkeypatch: pytest.MonkeyPatch,
        retry_after: float,
        deadline: float | None,
        share: float,
    ) -> None:
        """Fault: each throttled worker slept for the whole Retry-After, so none sent a probe."""
        throttles = int(100 * share)

        def server(each: Request) -> Runtime | BctrlError:
            nonlocal throttles
            if each.at < 1.0 and throttles:
                throttles -= 1
                return throttled(retry_after)
            return ANSWER

        _, seconds = seconds_to_stop(monkeypatch, server, deadline=deadline, count=1000)
        assert PROBE_INTERVAL < seconds < 2 * PROBE_INTERVAL

    def test_after_a_retry_after_of_a_minute_no_worker_sends_a_probe(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        early, retry_after = 0, 60.0

        def server(each: Request) -> Runtime | BctrlError:
            nonlocal early
            # The first answer comes after 0.1 s.
            early += 0.15 <= each.at < retry_after
            return throttled(retry_after) if each.at < 0.15 else ANSWER

        began, _ = seconds_to_stop(monkeypatch, server)
        assert began >= retry_after
        assert not early

    @pytest.mark.parametrize(
        ("probed", "counts"),
        [
            # Fault: one target was stopped, and the second call ended the run.
            (ANSWER, {StopResult.STOPPED: 1000}),
            (throttled(1.7e9), {StopResult.REJECTED: 1, StopResult.NOT_SENT: 999}),
        ],
        ids=["answered", "throttled again"],
    )
    def test_a_bulk_stop_that_starts_with_a_probe_goes_as_the_probe_does(
        self,
        monkeypatch: pytest.MonkeyPatch,
        probed: Runtime | BctrlError,
        counts: dict[StopResult, int],
    ) -> None:
        simulation = Simulation(
            monkeypatch, lambda each: probed if each.at else throttled(1.7e9), 0.1
        )

        async def scenario(session: BctrlSession) -> StopReport:
            await wait_until_a_probe_is_due(session)
            return await session.stop_runtimes(targets(1000))

        assert simulation.run(scenario).counts == counts
        assert len(simulation.stops) == (1001 if probed is ANSWER else 2)

    def test_single_stops_begun_when_a_probe_is_due_are_all_sent(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        simulation = Simulation(
            monkeypatch, lambda each: ANSWER if each.at else throttled(1.7e9), 0.1
        )

        async def scenario(session: BctrlSession) -> None:
            await wait_until_a_probe_is_due(session)
            await asyncio.gather(*(session.stop_runtime(*target) for target in targets(300)))

        simulation.run(scenario)
        assert len(simulation.stops) == 301


async def test_over_a_socket_a_session_recovers_from_an_absurd_retry_after() -> None:
    """Fault: one Retry-After with an epoch in it locks a client for years."""
    throttling = http_answer("429 X", b"", "Retry-After: 1795651200")
    answers = throttling, http_answer("200 OK", RUNTIME)
    async with raw_server(answering(*answers)) as url, BctrlSession("k", base_url=url) as session:
        for _ in range(2):
            with pytest.raises(BctrlRateLimitError):
                await session.stop_runtime("ws-1", "crm")
        assert session.stats.attempts == 1

        pass_time(PROBE_INTERVAL)
        for _ in range(2):
            runtime = await session.stop_runtime("ws-1", "crm")
            assert runtime.status is RuntimeStatus.STOPPED


async def test_a_probe_without_a_key_makes_no_other_call_wait() -> None:
    keys = iter(["k"])
    fetching = asyncio.Event()

    async def key() -> str:
        if (found := next(keys, None)) is not None:
            return found
        await fetching.wait()
        raise LookupError("the vault is sealed")

    answers = answering(http_answer("429 X", b"", "Retry-After: 31536000"))
    async with raw_server(answers) as url, BctrlSession(key, base_url=url) as session:
        with pytest.raises(BctrlRateLimitError):
            await session.stop_runtime("ws-1", "crm")
        pass_time(PROBE_INTERVAL)
        probe = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        while not session.stats.in_flight:
            await asyncio.sleep(0)
        behind = asyncio.create_task(session.stop_runtime("ws-1", "mail"))
        await asyncio.sleep(0)
        assert not behind.done()
        fetching.set()
        with pytest.raises(BctrlConfigError, match="api_key function raised LookupError"):
            await probe
        with pytest.raises(BctrlRateLimitError, match="not sent"):
            await behind


async def test_a_retry_after_beyond_the_patience_still_ends_a_bulk_stop() -> None:
    answers = answering(http_answer("429 X", b"", "Retry-After: 31536000"))
    policy = RetryPolicy(patience=100)
    async with raw_server(answers) as url, BctrlSession("k", base_url=url) as session:
        targets = [("ws-1", "crm"), ("ws-1", "mail")]
        report = await session.stop_runtimes(targets, retry=policy, concurrency=1)
    assert report.counts == {StopResult.REJECTED: 1, StopResult.NOT_SENT: 1}
    assert isinstance(report.ended_early, BctrlRateLimitError)
