"""A Retry-After of more than a minute: one attempt a minute is sent, as a probe."""

from __future__ import annotations

import asyncio

import pytest
from support.helpers import pass_time
from support.runtimes import RUNTIME
from support.servers import answering, http_answer, raw_server
from support.simulated import ANSWER, Simulate, targets
from support.throttling import release, show_limit, throttled
from support.virtual_time import in_virtual_time, now

from bctrl_async import (
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
from bctrl_async._limiter.evidence import History
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.pause import PROBE_INTERVAL
from bctrl_async._limiter.rate import AdaptiveRate

STOPPED, NOT_SENT, REJECTED = (
    StopResult.STOPPED,
    StopResult.NOT_SENT,
    StopResult.REJECTED,
)
YEAR = 365 * 86400.0
PATIENCE = 60.0


class Calls:
    """Calls in one workspace, which is limited alone or with another."""

    def __init__(
        self, *limited: str, slots: int = 10, cap: float | None = None
    ) -> None:
        self.limiter = Limiter(slots, AdaptiveRate(cap))
        self.limited = limited
        self._in_flight: list[History] = []

    async def acquire(self, patience: float = PATIENCE) -> None:
        history = History(workspace="ws-1")
        await self.limiter.acquire(patience, history=history)
        self._in_flight.append(history)

    def release(self, answer: object) -> None:
        """End the attempt that was the last to start."""
        release(self.limiter, answer, self._in_flight.pop())

    async def answer(self, answer: object) -> None:
        """Make an attempt that takes no time and has this answer."""
        await self.acquire()
        self.release(answer)

    async def wait_for_probe(self) -> None:
        """Show a limit with a Retry-After of a year, and wait until a probe is due."""
        show_limit(self.limiter, YEAR, *self.limited)
        await asyncio.sleep(PROBE_INTERVAL)

    async def start_behind_a_probe(self, *patiences: float) -> list[asyncio.Task[None]]:
        """Send a probe, and start calls while it is in flight."""
        await self.wait_for_probe()
        await self.acquire()
        calls = [asyncio.create_task(self.acquire(patience)) for patience in patiences]
        await asyncio.sleep(0.0)
        return calls


OF_WORKSPACE, OF_ALL = ("ws-1",), tuple(f"ws-{number}" for number in range(8))


@pytest.fixture(params=[OF_WORKSPACE, OF_ALL], ids=["of a workspace", "of all"])
def calls(request: pytest.FixtureRequest) -> Calls:
    return Calls(*request.param)


@in_virtual_time
class TestPause:
    async def test_calls_between_probes_fail_at_once(self, calls: Calls) -> None:
        show_limit(calls.limiter, YEAR, *calls.limited)
        await asyncio.sleep(PROBE_INTERVAL - 1)
        with pytest.raises(BctrlRateLimitError) as caught:
            await calls.acquire()

        assert str(caught.value) == (
            "not sent: rate limited for another 31535941 s (Retry-After). "
            "Probes are sent once a minute; retry in 1 s"
        )
        assert caught.value.retry_after == YEAR - 59
        assert now() == PROBE_INTERVAL - 1

    async def test_while_probes_are_throttled_one_a_minute_is_sent(
        self, calls: Calls
    ) -> None:
        """Fault: after a Retry-After with an epoch, calls failed for years."""
        show_limit(calls.limiter, YEAR, *calls.limited)
        admitted = []
        while now() < 200.0:
            try:
                await calls.acquire(0.0)
            except BctrlRateLimitError:
                await asyncio.sleep(1.0)
            else:
                admitted.append(now())
                calls.release(throttled(YEAR))

        assert admitted == [60.0, 120.0, 180.0]

    @pytest.mark.parametrize("retry_after", [30.0, 60.0])
    async def test_up_to_a_minute_is_kept_exactly(
        self, calls: Calls, retry_after: float
    ) -> None:
        show_limit(calls.limiter, retry_after, *calls.limited)
        with pytest.raises(
            BctrlRateLimitError, match=f"another {retry_after:.0f} s"
        ) as caught:
            await calls.acquire(1.0)
        assert "once a minute" not in str(caught.value)
        await calls.acquire()

        assert now() == pytest.approx(retry_after)


@in_virtual_time
class TestAnswerOfAProbe:
    @pytest.mark.parametrize(
        "parsed", ["a runtime", BctrlServerError("500", status=500)]
    )
    async def test_an_answer_that_is_not_throttled_ends_the_pause_for_those_behind_it(
        self, calls: Calls, parsed: object
    ) -> None:
        """Fault: a bulk stop killed itself with the call after its probe."""
        waiting = await calls.start_behind_a_probe(PATIENCE, 0.0, 0.0)
        await asyncio.sleep(5.0)
        assert not any(call.done() for call in waiting)
        calls.release(parsed)
        starts = []
        for call in waiting:
            await call
            starts.append(now() - PROBE_INTERVAL)

        # A slow start follows any pause: 20 a second at first.
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
    async def test_any_other_end_fails_those_behind_it_and_the_next_is_a_minute_later(
        self, calls: Calls, parsed: BctrlError | None, next_probe: float
    ) -> None:
        patient, *others = await calls.start_behind_a_probe(10 * YEAR, PATIENCE, 0.0)
        await asyncio.sleep(5.0)
        calls.release(parsed)
        failed = await asyncio.gather(*others, return_exceptions=True)
        assert {type(error) for error in failed} == {BctrlRateLimitError}
        assert now() == PROBE_INTERVAL + 5.0

        await patient
        assert now() == next_probe

    async def test_another_retry_after_replaces_the_first(self, calls: Calls) -> None:
        await calls.wait_for_probe()
        await calls.answer(throttled(5.0))
        await calls.acquire()

        assert now() == pytest.approx(65.0)

    async def test_a_late_answer_to_an_earlier_attempt_ends_no_pause_just_confirmed(
        self, calls: Calls
    ) -> None:
        await calls.acquire()
        await calls.wait_for_probe()
        await calls.answer(throttled())
        calls.release("a runtime")
        with pytest.raises(BctrlRateLimitError):
            await calls.acquire()

    async def test_after_the_pause_has_passed_it_changes_nothing(
        self, calls: Calls
    ) -> None:
        show_limit(calls.limiter, 90.0, *calls.limited)
        await asyncio.sleep(PROBE_INTERVAL)
        await calls.acquire()
        await asyncio.sleep(31.0)
        calls.release("a runtime")
        await calls.answer("a runtime")

        assert now() == pytest.approx(91.0)

    async def test_a_rate_that_was_asked_for_is_kept_after_the_pause(self) -> None:
        calls = Calls(*OF_ALL, cap=0.1)
        await calls.wait_for_probe()
        await calls.answer("a runtime")
        await calls.answer("a runtime")

        assert now() - PROBE_INTERVAL == pytest.approx(10.0)


@in_virtual_time
class TestProbeWithoutAnswer:
    async def test_after_a_minute_a_call_behind_it_is_the_next(
        self, calls: Calls
    ) -> None:
        first, second = await calls.start_behind_a_probe(0.0, 0.0)
        await first
        assert not second.done()
        calls.release(None)
        calls.release("a runtime")
        await second

        assert 2 * PROBE_INTERVAL <= now() < 2 * PROBE_INTERVAL + 5.0

    async def test_calls_behind_it_fail_once_it_is_cancelled_before_it_has_run(
        self,
    ) -> None:
        calls = Calls(*OF_ALL, slots=1)
        await calls.wait_for_probe()
        await calls.acquire()
        probe = asyncio.create_task(calls.acquire(10 * YEAR))
        await asyncio.sleep(PROBE_INTERVAL)
        call = asyncio.create_task(calls.acquire(0.0))
        calls.release(None)
        probe.cancel()
        with pytest.raises(BctrlRateLimitError):
            await call

        assert now() == 2 * PROBE_INTERVAL


class TestBulk:
    @pytest.mark.parametrize(
        ("retry_after", "throttles", "patience"),
        [(250.0, 50, None), (3600.0, 100, 7200.0)],
    )
    def test_a_probe_is_sent_although_the_workers_got_the_long_retry_after_themselves(
        self,
        simulate: Simulate,
        retry_after: float,
        throttles: int,
        patience: float | None,
    ) -> None:
        """Fault: each worker slept for the whole Retry-After, so none sent a probe."""
        answers = iter([throttled(retry_after)] * throttles)
        simulation = simulate(
            lambda request: next(answers, ANSWER) if request.at < 1.0 else ANSWER
        )
        report = simulation.stop(1000, retry=RetryPolicy(patience=patience))

        assert report.counts == {STOPPED: 1000}
        held = {
            outcome.target.alias
            for outcome in simulation.outcomes
            if outcome.attempts > 1
        }
        others = [at for alias, at in simulation.ended_at.items() if alias not in held]
        assert PROBE_INTERVAL < max(others) < 2 * PROBE_INTERVAL
        # Those that got the Retry-After wait for it.
        assert simulation.seconds == pytest.approx(retry_after, abs=1.0)

    @pytest.mark.parametrize(
        ("probed", "counts"),
        [(ANSWER, {STOPPED: 1000}), (throttled(1.7e9), {REJECTED: 1, NOT_SENT: 999})],
        ids=["answered", "throttled again"],
    )
    def test_a_bulk_stop_that_starts_with_a_probe_goes_as_the_probe_does(
        self,
        simulate: Simulate,
        probed: Runtime | BctrlError,
        counts: dict[StopResult, int],
    ) -> None:
        """Fault: one target was stopped, and the second call ended the run."""
        simulation = simulate(
            lambda request: probed if request.at > 1.0 else throttled(1.7e9)
        )

        async def scenario(session: BctrlSession) -> StopReport:
            for _ in range(8):
                with pytest.raises(BctrlRateLimitError):
                    await session.stop_runtime("ws-1", "first")
            await asyncio.sleep(PROBE_INTERVAL + 1)
            return await session.stop_runtimes(targets(1000))

        assert simulation.run(scenario).counts == counts
        assert len(simulation.stops) == (1008 if probed is ANSWER else 9)


async def test_over_a_socket_a_session_recovers_from_an_absurd_retry_after() -> None:
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

        pass_time(PROBE_INTERVAL)
        for _ in range(2):
            runtime = await session.stop_runtime("ws-1", "crm")
            assert runtime.status is RuntimeStatus.STOPPED
