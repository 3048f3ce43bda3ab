"""A Retry-After of more than a minute: one attempt a minute is sent, as a probe."""

from __future__ import annotations

import asyncio

import pytest
from helpers import pass_time
from runtimes import RUNTIME
from servers import answering, http_answer, raw_server
from simulated import ANSWER, Simulate, targets
from throttling import answer, throttled
from virtual_time import in_virtual_time, now

from bctrl_async import (
    BctrlError,
    BctrlNetworkError,
    BctrlRateLimitError,
    BctrlServerError,
    BctrlSession,
    Runtime,
    RuntimeStatus,
    StopReport,
    StopResult,
)
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.rate import PROBE_INTERVAL, AdaptiveRate

STOPPED, NOT_SENT, REJECTED = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.REJECTED
YEAR = 365 * 86400.0
PATIENCE = 60.0


@pytest.fixture
def limiter() -> Limiter:
    return Limiter(10, AdaptiveRate())


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


@in_virtual_time
class TestPause:
    async def test_calls_between_probes_fail_at_once(self, limiter: Limiter) -> None:
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

    async def test_while_probes_are_throttled_one_a_minute_is_sent(self, limiter: Limiter) -> None:
        """Fault: after one Retry-After with an epoch in it, every later call failed for years."""
        await answer(limiter, throttled(YEAR))
        admitted = []
        while now() < 200.0:
            try:
                await limiter.acquire(0.0)
            except BctrlRateLimitError:
                await asyncio.sleep(1.0)
            else:
                admitted.append(now())
                limiter.release(throttled(YEAR))

        assert admitted == [60.0, 120.0, 180.0]

    @pytest.mark.parametrize("retry_after", [30.0, 60.0])
    async def test_up_to_a_minute_is_kept_exactly(
        self, limiter: Limiter, retry_after: float
    ) -> None:
        await answer(limiter, throttled(retry_after))
        with pytest.raises(BctrlRateLimitError, match=f"another {retry_after:.0f} s") as caught:
            await limiter.acquire(1.0)
        assert "once a minute" not in str(caught.value)
        await limiter.acquire(PATIENCE)

        assert now() == pytest.approx(retry_after)


@in_virtual_time
class TestAnswerOfAProbe:
    @pytest.mark.parametrize("parsed", ["a runtime", BctrlServerError("500", status=500)])
    async def test_an_answer_that_is_not_throttled_ends_the_pause_for_the_calls_behind_it(
        self, limiter: Limiter, parsed: object
    ) -> None:
        """Fault: a bulk stop that began with a probe killed itself with its second call."""
        calls = await start_behind_a_probe(limiter, PATIENCE, 0.0, 0.0)
        await asyncio.sleep(5.0)
        assert not any(call.done() for call in calls)
        limiter.release(parsed)
        starts = []
        for call in calls:
            await call
            starts.append(now() - PROBE_INTERVAL)

        # After any pause, there is a slow start: 20 a second at first.
        assert starts == pytest.approx([5.0, 5.05, 5.1], abs=0.03)

    @pytest.mark.parametrize(
        ("parsed", "next_probe"),
        [
            (throttled(YEAR), 125.0),
            (throttled(), 125.0),
            (BctrlServerError("503", status=503), 125.0),
            (BctrlNetworkError("no answer"), 120.0),
            (None, 120.0),
        ],
    )
    async def test_any_other_end_fails_the_calls_behind_it_and_the_next_is_a_minute_later(
        self, limiter: Limiter, parsed: BctrlError | None, next_probe: float
    ) -> None:
        patient, *others = await start_behind_a_probe(limiter, 10 * YEAR, PATIENCE, 0.0)
        await asyncio.sleep(5.0)
        limiter.release(parsed)
        failed = await asyncio.gather(*others, return_exceptions=True)
        assert {type(error) for error in failed} == {BctrlRateLimitError}
        assert now() == PROBE_INTERVAL + 5.0

        await patient
        assert now() == next_probe

    async def test_another_retry_after_replaces_the_first(self, limiter: Limiter) -> None:
        await wait_for_probe(limiter)
        await answer(limiter, throttled(5.0))
        await limiter.acquire(PATIENCE)

        assert now() == pytest.approx(65.0)

    async def test_a_late_answer_to_an_earlier_attempt_does_not_end_a_pause_just_confirmed(
        self, limiter: Limiter
    ) -> None:
        await limiter.acquire(PATIENCE)
        await wait_for_probe(limiter)
        await answer(limiter, throttled())
        limiter.release("a runtime")
        with pytest.raises(BctrlRateLimitError):
            await limiter.acquire(PATIENCE)

    async def test_after_the_pause_has_passed_it_changes_nothing(self, limiter: Limiter) -> None:
        await answer(limiter, throttled(90.0))
        await asyncio.sleep(PROBE_INTERVAL)
        await limiter.acquire(PATIENCE)
        await asyncio.sleep(31.0)
        limiter.release("a runtime")
        await answer(limiter, "a runtime")

        assert now() == pytest.approx(91.0)

    async def test_a_rate_that_was_asked_for_is_kept_after_the_pause(self) -> None:
        limiter = Limiter(10, AdaptiveRate(0.1))
        await wait_for_probe(limiter)
        await answer(limiter, "a runtime")
        await answer(limiter, "a runtime")

        assert now() - PROBE_INTERVAL == pytest.approx(10.0)


@in_virtual_time
class TestProbeWithoutAnswer:
    async def test_after_a_minute_a_call_behind_it_is_the_next(self, limiter: Limiter) -> None:
        first, second = await start_behind_a_probe(limiter, 0.0, 0.0)
        await first
        assert not second.done()
        limiter.release(None)
        limiter.release("a runtime")
        await second

        assert 2 * PROBE_INTERVAL <= now() < 2 * PROBE_INTERVAL + 5.0

    async def test_calls_behind_it_fail_once_it_is_cancelled_before_it_has_run(self) -> None:
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

        assert now() == 2 * PROBE_INTERVAL


class TestBulk:
    @pytest.mark.parametrize(
        ("retry_after", "throttles", "deadline"), [(250.0, 50, None), (3600.0, 100, 7200.0)]
    )
    def test_a_probe_is_sent_although_the_workers_got_the_long_retry_after_themselves(
        self, simulate: Simulate, retry_after: float, throttles: int, deadline: float | None
    ) -> None:
        """Fault: each throttled worker slept for the whole Retry-After, so none sent a probe."""
        answers = iter([throttled(retry_after)] * throttles)
        simulation = simulate(lambda each: next(answers, ANSWER) if each.at < 1.0 else ANSWER)
        report = simulation.stop(1000, deadline=deadline)

        assert report.counts == {STOPPED: 1000}
        assert PROBE_INTERVAL < simulation.seconds < 2 * PROBE_INTERVAL

    @pytest.mark.parametrize(
        ("probed", "counts"),
        [(ANSWER, {STOPPED: 1000}), (throttled(1.7e9), {REJECTED: 1, NOT_SENT: 999})],
        ids=["answered", "throttled again"],
    )
    def test_a_bulk_stop_that_starts_with_a_probe_goes_as_the_probe_does(
        self, simulate: Simulate, probed: Runtime | BctrlError, counts: dict[StopResult, int]
    ) -> None:
        """Fault: one target was stopped, and the second call ended the run."""
        simulation = simulate(lambda each: probed if each.at else throttled(1.7e9))

        async def scenario(session: BctrlSession) -> StopReport:
            with pytest.raises(BctrlRateLimitError):
                await session.stop_runtime("ws-1", "first")
            await asyncio.sleep(PROBE_INTERVAL + 1)
            return await session.stop_runtimes(targets(1000))

        assert simulation.run(scenario).counts == counts
        assert len(simulation.stops) == (1001 if probed is ANSWER else 2)


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
