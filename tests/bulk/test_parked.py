"""Throttled stops are parked: they hold no worker, and each has one outcome."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable

import pytest
from support.helpers import await_batch
from support.simulated import (
    ANSWER,
    Request,
    Simulate,
    Simulation,
    bad_gateway,
    refused,
    targets,
    unavailable,
)
from support.throttling import throttled, token_bucket

from bctrl_async import (
    BctrlError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    StopReport,
    StopResult,
)
from bctrl_async.bulk import _parked
from bctrl_async.bulk._run import Run

STOPPED, REJECTED, NOT_SENT, UNKNOWN = (
    StopResult.STOPPED,
    StopResult.REJECTED,
    StopResult.NOT_SENT,
    StopResult.UNKNOWN,
)


def is_bad(alias: str) -> bool:
    return alias.startswith("bad")


def throttling_bad(request: Request) -> Runtime | BctrlError:
    return throttled() if is_bad(request.alias) else ANSWER


def mixed(bad: int, good: int) -> list[tuple[str, str]]:
    """Return the targets of a workspace over its quota, before another's."""
    return [("ws-bad", f"bad{n}") for n in range(bad)] + [
        ("ws-1", f"r{n}") for n in range(good)
    ]


def last_good(simulation: Simulation) -> float:
    """Return the time at which the last good target had its outcome."""
    return max(at for alias, at in simulation.ended_at.items() if not is_bad(alias))


async def as_async(items: list[tuple[str, str]]) -> AsyncIterator[tuple[str, str]]:
    for item in items:
        await asyncio.sleep(0.001)
        yield item


class TestThrottledTargets:
    """Fault: thirty targets over their quota held up the other 2,970."""

    @pytest.mark.parametrize("concurrency", [1, 7, 100])
    @pytest.mark.parametrize("make", [list, iter, as_async])
    @pytest.mark.parametrize("bad", [30, 150])
    def test_the_others_are_stopped_first(
        self,
        simulate: Simulate,
        make: Callable[
            [list[tuple[str, str]]],
            Iterable[tuple[str, str]] | AsyncIterator[tuple[str, str]],
        ],
        bad: int,
        concurrency: int,
    ) -> None:
        simulation = simulate(throttling_bad, 0.01)
        policy = RetryPolicy(patience=60.0)
        items = make(mixed(bad, 300))
        report = simulation.stop(items, concurrency=concurrency, retry=policy)

        assert report.counts[STOPPED] == 300
        assert report.counts[REJECTED] + report.counts[NOT_SENT] == bad
        assert report.ended_early is None
        assert last_good(simulation) < 15

    def test_none_has_more_in_flight_than_its_concurrency(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(throttling_bad, 0.01)
        in_flight = most = 0

        async def count(_: Request) -> None:
            nonlocal in_flight, most
            in_flight += 1
            most = max(most, in_flight)
            await asyncio.sleep(0.01)
            in_flight -= 1

        simulation.before_response = count
        simulation.stop(mixed(50, 100), concurrency=5, retry=RetryPolicy(patience=5.0))
        assert most == 5

    def test_a_call_whose_second_attempt_is_its_first_throttled(
        self, simulate: Simulate
    ) -> None:
        """Fault: it raised a KeyError."""

        def serve(request: Request) -> Runtime | BctrlError:
            if not is_bad(request.alias) or request.number > 3:
                return ANSWER
            return refused() if request.number == 1 else throttled()

        simulation = simulate(serve, 0.01)
        assert simulation.stop(mixed(5, 300)).counts == {STOPPED: 305}

    def test_workers_that_wait_in_the_lane_themselves_do_not_wait_for_them(
        self, simulate: Simulate
    ) -> None:
        """Fault: stops without a worker kept slots for which all workers waited."""
        chance, quota = random.Random(0), token_bucket(lambda _: 5.0, 10)

        def serve(request: Request) -> Runtime | BctrlError:
            if request.stops and (error := quota(request.at)) is not None:
                return error
            return bad_gateway() if request.stops and chance.random() < 0.2 else ANSWER

        simulation = simulate(serve, 0.05)
        assert simulation.stop(targets(200), concurrency=1).counts == {STOPPED: 200}
        assert simulation.seconds < 120

    def test_a_bound_on_them_holds_the_input(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_parked, "_MAX_STOPS", 20)
        simulation = simulate(throttling_bad, 0.01)
        report = simulation.stop(mixed(60, 100), retry=RetryPolicy(patience=3.0))
        assert report.counts[STOPPED] == 100
        assert report.counts.total() == 160

    def test_a_retry_after_holds_its_own_call(self, simulate: Simulate) -> None:
        simulation = simulate(
            lambda request: (
                throttled(retry_after=30.0)
                if is_bad(request.alias) and request.number == 1
                else ANSWER
            ),
            0.01,
        )
        assert simulation.stop(mixed(3, 100)).counts == {STOPPED: 103}
        assert last_good(simulation) < 1
        assert (
            min(at for alias, at in simulation.ended_at.items() if is_bad(alias)) > 30
        )

    def test_each_is_counted_once_with_its_attempts(self, simulate: Simulate) -> None:
        simulation = simulate(
            lambda request: throttled() if request.number <= 2 else ANSWER, 0.01
        )
        report = simulation.stop(targets(5))
        assert report.throttled == 10
        assert [outcome.attempts for outcome in simulation.outcomes] == [3] * 5

    def test_they_count_as_waiting(self, simulate: Simulate) -> None:
        simulation = simulate(throttling_bad, 0.01)

        async def main(session: BctrlSession) -> tuple[int, int]:
            policy = RetryPolicy(patience=20.0)
            batch = session.stop_runtimes(mixed(30, 100), verify=False, retry=policy)
            run = asyncio.create_task(await_batch(batch))
            await asyncio.sleep(3.0)
            during = session.stats.waiting + session.stats.in_flight
            assert batch.progress.retrying["429"] <= 30
            await run
            return during, session.stats.waiting

        assert simulation.run(main) == (30, 0)

    @pytest.mark.parametrize("concurrency", [1, 7, 100])
    def test_they_are_retried_while_the_input_has_no_next_item(
        self, simulate: Simulate, concurrency: int
    ) -> None:
        """Fault: 9 of 30 from a queue waited for its next item until the deadline."""
        quota = token_bucket(lambda _: 5.0, 20)
        simulation = simulate(lambda request: quota(request.at) or ANSWER, 0.01)

        async def queue() -> AsyncIterator[tuple[str, str]]:
            for target in targets(30):
                yield target
            await asyncio.sleep(3600.0)

        report = simulation.stop(queue(), concurrency=concurrency, deadline=600.0)
        assert report.counts == {STOPPED: 30}
        assert max(simulation.ended_at.values()) < 15


class TestEnd:
    """However a run ends, each stop that is parked has one outcome."""

    @pytest.mark.parametrize(
        "end", ["deadline", "stop_reading", "abort", "close", "cancel"]
    )
    @pytest.mark.parametrize(
        ("fail", "bad", "after"), [(throttled, 60, 7.0), (unavailable, 6, 0.5)]
    )
    def test_each_has_one_outcome_and_the_report_says_that_it_ended_early(
        self,
        simulate: Simulate,
        end: str,
        fail: Callable[[], BctrlError],
        bad: int,
        after: float,
    ) -> None:
        def serve(request: Request) -> Runtime | BctrlError:
            if not is_bad(request.alias):
                return ANSWER
            return (
                bad_gateway()
                if request.alias == "bad0" and request.number == 1
                else fail()
            )

        simulation = simulate(serve, 0.01)

        async def main(session: BctrlSession) -> StopReport:
            deadline = after if end == "deadline" else None
            batch = session.stop_runtimes(
                mixed(bad, 100),
                verify=False,
                on_outcome=simulation.on_outcome,
                deadline=deadline,
            )
            run = asyncio.create_task(await_batch(batch))
            await asyncio.sleep(after)
            if end == "stop_reading":
                batch.stop_reading()
            elif end == "abort":
                batch.abort()
            elif end == "close":
                await session.close()
            elif end == "cancel":
                run.cancel()
            await asyncio.wait([run])
            return batch.report

        report = simulation.run(main)
        assert report.total == report.counts.total() == 100 + bad
        assert report.counts[STOPPED] == 100
        assert not report.ok
        # A stop in doubt goes on, until it is known what it did.
        goes_on = end == "stop_reading" and fail is unavailable
        assert (report.ended_early is None) is goes_on
        delivered = {outcome.index for outcome in simulation.outcomes}
        assert len(delivered) == len(simulation.outcomes)
        assert len(delivered) == 100 + bad or end in {"abort", "cancel"}
        assert simulation.seconds < 330

    def test_a_worker_that_is_cancelled_from_outside_leaves_none_behind(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(throttling_bad, 0.01)

        async def main(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(mixed(30, 0), verify=False)
            run = asyncio.create_task(await_batch(batch))
            await asyncio.sleep(3.0)
            cancelled = 0
            while not cancelled:
                await asyncio.sleep(0)
                await asyncio.sleep(0.001)
                for task in asyncio.all_tasks() - {asyncio.current_task(), run}:
                    if "Run._guard" in repr(task):
                        cancelled += task.cancel()
            await asyncio.wait([run])
            return batch.report

        report = simulation.run(main)
        assert report.total == report.counts.total() == 30
        assert report.ended_early is not None

    def test_a_worker_that_is_cancelled_before_it_starts_leaves_none_behind(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: a stop that was to be sent again had no outcome."""
        monkeypatch.setattr(
            Run, "_start_worker", lambda run: run._start(run._work).cancel()
        )

        async def main(session: BctrlSession) -> StopReport:
            return await session.stop_runtimes(mixed(5, 20), verify=False)

        report = simulate(throttling_bad, 0.01).run(main)
        assert report.total == report.counts.total() == 25
        assert report.ended_early is not None

    def test_a_stop_in_doubt_may_be_throttled_a_thousand_times_after_the_end(
        self, simulate: Simulate
    ) -> None:
        """Fault: the run raised a RecursionError."""

        def serve(request: Request) -> Runtime | BctrlError:
            return unavailable() if request.number == 1 else throttled()

        simulation = simulate(serve, 0.01)

        async def main(session: BctrlSession) -> StopReport:
            policy = RetryPolicy(base=0.05, cap=0.05, patience=40)
            batch = session.stop_runtimes(mixed(1, 0), retry=policy, verify=False)
            run = asyncio.create_task(await_batch(batch))
            await asyncio.sleep(0.1)
            batch.stop_reading()
            await asyncio.wait([run])
            return batch.report

        report = simulation.run(main)
        assert len(simulation.stops) > 1000
        assert report.counts == {UNKNOWN: 1}

    def test_an_item_whose_worker_is_gone_is_taken_if_nothing_else_is_parked(
        self, simulate: Simulate
    ) -> None:
        """Fault: workers that did not take it were started for ever."""
        simulation = simulate(throttling_bad, 0.01)

        async def main(session: BctrlSession) -> StopReport:
            batch = session.stop_runtimes(mixed(0, 3), verify=False)
            item = batch._run.source.next_nowait()
            assert item is not None
            batch._run.parked.ready.append(item)
            return await batch

        report = simulation.run(main)
        assert report.counts == {STOPPED: 3}

    def test_dead_targets_wait_for_the_retry_quota(self, simulate: Simulate) -> None:
        """Fault: those that found it exhausted were given up after two attempts."""

        def serve(request: Request) -> Runtime | BctrlError:
            return unavailable() if is_bad(request.alias) else ANSWER

        simulation = simulate(serve, 0.01)
        report = simulation.stop(mixed(60, 5))

        assert report.counts[STOPPED] == 5
        assert report.counts.total() == 65
        assert not any(
            "retry quota" in str(outcome.error) for outcome in simulation.outcomes
        )

    def test_a_first_attempt_takes_no_token_of_the_retry_quota(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(lambda _: ANSWER, 0.01)

        async def main(session: BctrlSession) -> StopReport:
            while session._sender.quota.acquire():
                pass
            return await session.stop_runtimes(mixed(0, 20), verify=False)

        assert simulation.run(main).counts == {STOPPED: 20}
        assert simulation.seconds < 0.1


class TestTurns:
    @pytest.mark.parametrize("most", [10_000, 150])
    def test_a_target_that_waits_for_the_limiter_waits_for_its_turn_if_there_is_room(
        self, simulate: Simulate, monkeypatch: pytest.MonkeyPatch, most: int
    ) -> None:
        """Fault: a hundred of a throttled workspace were sent first, at 20 a second."""
        monkeypatch.setattr(_parked, "_MAX_STOPS", most)
        simulation = simulate(throttling_bad, 0.02)
        policy = RetryPolicy(patience=30.0)
        report = simulation.stop(mixed(300, 1000), retry=policy)

        assert report.counts[STOPPED] == 1000
        assert report.counts[REJECTED] + report.counts[NOT_SENT] == 300
        assert last_good(simulation) < 2 or most < 300

    def test_a_list_of_one_workspace_keeps_its_order(self, simulate: Simulate) -> None:
        serve = token_bucket(lambda _: 50.0, 20)
        simulation = simulate(lambda request: serve(request.at) or ANSWER, 0.02)
        simulation.stop(500, concurrency=5)
        firsts = [
            int(request.alias[1:])
            for request in simulation.requests
            if request.number == 1
        ]
        assert all(
            number <= firsts[at] + 10 for at, number in enumerate(sorted(firsts))
        )

    def test_a_workspace_that_allows_all_again_is_like_any_other(
        self, simulate: Simulate
    ) -> None:
        simulation = simulate(
            lambda request: (
                throttled() if is_bad(request.alias) and request.at < 3.0 else ANSWER
            ),
            0.02,
        )
        assert simulation.stop(mixed(200, 100)).counts == {STOPPED: 300}
        assert simulation.seconds < 30
