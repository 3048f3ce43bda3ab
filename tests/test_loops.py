"""Other event loops than asyncio's own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar
from unittest.mock import Mock

import pytest
from support.helpers import add_runtimes, pass_time, until
from support.loops import eager_task_factory, package_of
from support.pacing import Member, MemoryPace
from support.throttling import past_start

from bctrl_async import BctrlSession, StopBatch, StopOutcome, StopReport, StopResult
from bctrl_async._http.fast.exchange import Exchange, _Deadlines
from bctrl_async._limiter.bounds import FixedRate
from bctrl_async._limiter.gate import Gate
from bctrl_async._limiter.limiter import Limiter
from bctrl_async.bulk._poller import Poller
from bctrl_async.bulk._polls import Poll, Workspace
from bctrl_async.bulk._state import Worker
from bctrl_async.emulator import Emulator
from bctrl_async.observer import (
    Attempt,
    AttemptObserver,
    BulkObserver,
    Observer,
    StopObserver,
)

uvloop = pytest.importorskip("uvloop")

_T = TypeVar("_T")


def on_uvloop(main: Coroutine[object, object, _T]) -> _T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def test_the_tests_run_on_the_loop_of_the_option(
    pytestconfig: pytest.Config,
) -> None:
    has_run = False

    async def run() -> None:
        nonlocal has_run
        has_run = True

    loop = asyncio.get_running_loop()
    task = asyncio.create_task(run())

    assert package_of(loop) == pytestconfig.getoption("loop")
    assert isinstance(loop, uvloop.Loop) is (package_of(loop) == "uvloop")
    assert has_run is pytestconfig.getoption("eager")
    assert loop.get_debug() is bool(pytestconfig.getoption("asyncio_debug"))
    await task


async def test_a_clock_that_cannot_be_moved_is_not_waited_for() -> None:
    """Fault: a jump of uvloop's clock did nothing: the test really waited."""

    async def main() -> None:
        pass_time(60)

    with pytest.raises(TypeError, match="moves_clock"):
        await asyncio.to_thread(on_uvloop, main())


@pytest.mark.parametrize("rate_limit", [None, 1000], ids=["no limit", "a limit"])
def test_calls_at_once_and_in_bulk_are_all_answered_on_uvloop(
    rate_limit: int | None,
) -> None:
    """Fault: an AttributeError for each start due in less than 0.5 ms."""

    async def main() -> None:
        async with (
            Emulator(port=0, api_key="key", rate_limit=rate_limit) as emulator,
            BctrlSession("key", base_url=emulator.url) as session,
        ):
            targets = add_runtimes(emulator, 1300)
            calls = (session.stop_runtime(*target) for target in targets[:300])
            runtimes = await asyncio.gather(*calls)
            report = await session.stop_runtimes(targets[300:])

            assert [runtime.alias for runtime in runtimes] == [
                alias for _, alias in targets[:300]
            ]
            assert report.counts == {StopResult.STOPPED: 1000}
            assert {emulator.status(*target) for target in targets} == {"stopped"}

    on_uvloop(main())


class TestEarlyTimers:
    """Timers of uvloop have whole milliseconds, so they may fire early."""

    def test_each_wakeup_of_the_limiter_starts_an_attempt(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: a timer was set again for the rest, seventy times for each start."""
        wakeups = 0
        on_timer = Gate._on_timer

        def count(gate: Gate) -> None:
            nonlocal wakeups
            wakeups += 1
            on_timer(gate)

        async def main() -> None:
            limiter = Limiter(100, past_start(), FixedRate(700))
            await asyncio.gather(*(limiter.acquire(60.0) for _ in range(30)))

        monkeypatch.setattr(Gate, "_on_timer", count)
        on_uvloop(main())
        assert wakeups < 30

    def test_a_time_limit_is_over_when_its_timer_fires(self) -> None:
        """Fault: the timer was set again and again until the limit had passed."""
        exchange = Mock(Exchange)

        async def main() -> None:
            loop = asyncio.get_running_loop()
            deadlines = _Deadlines(loop)
            deadlines.add(exchange, loop.time() + 0.0004)
            await asyncio.sleep(0)
            deadlines.close()

        on_uvloop(main())
        exchange.time_out.assert_called_once_with()


def eagerly(main: Coroutine[object, object, _T]) -> _T:
    with asyncio.Runner() as runner:
        runner.get_loop().set_task_factory(eager_task_factory())
        return runner.run(main)


class Aborting(Observer, BulkObserver, StopObserver):
    """An observer that aborts a bulk stop at its first attempt."""

    batch: StopBatch

    def begin_bulk(self) -> Aborting:
        return self

    def begin_stop(self, *_: str) -> Aborting:
        return self

    def begin_attempt(self, _: Attempt) -> AttemptObserver:
        self.batch.abort()
        return AttemptObserver()

    def end(self, _: object) -> None:
        pass


@pytest.mark.skipif(
    sys.version_info < (3, 12), reason="eager tasks are new in Python 3.12"
)
class TestEagerTasks:
    """A task may take its first step, or end, before its creator knows it."""

    def test_a_block_is_entered_before_its_first_outcome(self) -> None:
        """Fault: `on_outcome` was called before the name behind `as` had its value."""
        counts: list[int] = []

        async def main() -> StopReport:
            async with BctrlSession("key", base_url="http://127.0.0.1:9") as session:

                def on_outcome(_: StopOutcome) -> None:
                    counts.append(batch.counts.total())

                invalid = [("ws-1", "..")] * 2
                async with session.stop_runtimes(
                    invalid, on_outcome=on_outcome
                ) as batch:
                    [outcome async for outcome in batch]
                return batch.report

        assert eagerly(main()).counts == {StopResult.INVALID: 2}
        assert counts == [1, 2]

    def test_a_stop_in_its_first_step_is_one_that_an_abort_ends(self) -> None:
        """Fault: the run had not ended early, although it was aborted during a stop."""
        observer = Aborting()

        async def main() -> StopReport:
            async with (
                Emulator(port=0, api_key="key") as emulator,
                BctrlSession(
                    "key", base_url=emulator.url, observer=observer
                ) as session,
            ):
                observer.batch = session.stop_runtimes(add_runtimes(emulator, 1))
                return await observer.batch

        assert str(eagerly(main()).ended_early) == "the run was aborted"

    def test_workers_are_not_resumed_within_each_other(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: RecursionError, if a run ended while its bound held up its input."""
        monkeypatch.setattr("bctrl_async.bulk._polls._MAX_POLLS", 300)

        async def main() -> StopReport:
            async with (
                Emulator(port=0, api_key="key", stop_takes=3600) as emulator,
                BctrlSession(
                    "key", base_url=emulator.url, max_connections=300
                ) as session,
            ):
                targets = add_runtimes(emulator, 900)
                batch = session.stop_runtimes(targets, concurrency=300)
                run = asyncio.ensure_future(batch)
                while not batch.progress.is_full:
                    await asyncio.sleep(0)
                batch.abort()
                return await run

        report = eagerly(main())
        assert report.total == 900
        assert str(report.ended_early) == "the run was aborted"

    def test_pollers_are_not_started_within_each_other(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: RecursionError, if polls of many throttled workspaces were due."""
        work = Poller.work

        async def work_throttled(
            poller: Poller,
            worker: Worker,
            job: Poll | Workspace,
            hold: AbstractContextManager[None],
        ) -> StopOutcome | None:
            if isinstance(job, Poll) and job.is_over:
                return await work(poller, worker, job, hold)
            with hold:
                await asyncio.sleep(0)
            if job.is_over:
                return None
            return await work(poller, worker, job, nullcontext())

        monkeypatch.setattr(Poller, "work", work_throttled)

        async def main() -> StopReport:
            async with Emulator(port=0, api_key="key", stop_takes=3600) as emulator:
                session = BctrlSession("key", base_url=emulator.url)
                targets = [(f"ws-{number}", "crm") for number in range(300)]
                for target in targets:
                    emulator.add_runtime(*target)
                batch = session.stop_runtimes(targets)
                run = asyncio.ensure_future(batch)
                await until(lambda: batch.progress.polling == len(targets))
                # All polls are due then.
                await session.close()
                return await run

        report = eagerly(main())
        assert report.counts == {StopResult.ACCEPTED: 300}

    def test_the_first_lease_is_for_all_calls_of_a_turn_of_the_loop(self) -> None:
        """Fault: it was asked for before any of them waited, and had no slot."""
        pace = MemoryPace(rate=1000)

        async def main() -> None:
            member = Member(pace)
            await asyncio.gather(*(member.attempt() for _ in range(20)))
            await member.limiter.close_pace()

        eagerly(main())
        assert pace.asked_for[0] == 20
