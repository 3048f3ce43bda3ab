"""Other event loops than asyncio's own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar
from unittest.mock import Mock

import pytest
from helpers import add_runtimes, pass_time
from loops import package_of
from throttling import past_start

from bctrl_async import BctrlSession, StopResult
from bctrl_async._http.fast.exchange import Exchange, _Deadlines
from bctrl_async._limiter.limiter import Limiter
from bctrl_async.emulator import Emulator

uvloop = pytest.importorskip("uvloop")

_T = TypeVar("_T")


def on_uvloop(main: Coroutine[object, object, _T]) -> _T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def test_the_tests_run_on_the_loop_of_the_option(pytestconfig: pytest.Config) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(asyncio.sleep(0))

    assert package_of(loop) == pytestconfig.getoption("loop")
    assert isinstance(loop, uvloop.Loop) is (pytestconfig.getoption("loop") == "uvloop")
    assert (loop.get_task_factory() is None) is not pytestconfig.getoption("eager")
    await task


async def test_a_clock_that_cannot_be_moved_is_not_waited_for() -> None:
    """Fault: on uvloop a jump of the clock did nothing, so that the test waited in real time."""

    async def main() -> None:
        pass_time(60)

    with pytest.raises(TypeError, match="moves_clock"):
        await asyncio.to_thread(on_uvloop, main())


@pytest.mark.parametrize("rate_limit", [None, 1000], ids=["no limit", "a limit"])
def test_calls_at_once_and_in_bulk_are_all_answered_on_uvloop(rate_limit: int | None) -> None:
    """Fault: an AttributeError for each start that was due in less than half a millisecond."""

    async def main() -> None:
        async with (
            Emulator(port=0, api_key="key", rate_limit=rate_limit) as emulator,
            BctrlSession("key", base_url=emulator.url) as session,
        ):
            targets = add_runtimes(emulator, 1300)
            calls = (session.stop_runtime(*target) for target in targets[:300])
            runtimes = await asyncio.gather(*calls)
            report = await session.stop_runtimes(targets[300:])

            assert [runtime.alias for runtime in runtimes] == [alias for _, alias in targets[:300]]
            assert report.counts == {StopResult.STOPPED: 1000}
            assert {emulator.status(*target) for target in targets} == {"stopped"}

    on_uvloop(main())


class TestEarlyTimers:
    """The timers of uvloop have whole milliseconds, so they may fire half of one early."""

    def test_each_wakeup_of_the_limiter_starts_an_attempt(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: a timer was set again for the rest, seventy times for each start."""
        wakeups = 0
        on_timer = Limiter._on_timer

        def count(limiter: Limiter) -> None:
            nonlocal wakeups
            wakeups += 1
            on_timer(limiter)

        async def main() -> None:
            limiter = Limiter(100, past_start(1900))
            await asyncio.gather(*(limiter.acquire(60.0) for _ in range(100)))

        monkeypatch.setattr(Limiter, "_on_timer", count)
        on_uvloop(main())
        assert 0 < wakeups < 100

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
