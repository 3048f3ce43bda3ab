"""A bulk stop that ends by what its callback, its input or the server does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from itertools import chain, repeat

import aiohttp
import pytest
from support.helpers import (
    Bulk,
    Connect,
    add_runtimes,
    assert_conserved,
    await_batch,
    pass_time,
    read_all,
    started,
    wait_for_requests,
)
from support.servers import emulator_in_a_thread
from support.simulated import targets

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlRateLimitError,
    BctrlSession,
    StopBatch,
    StopOutcome,
    StopResult,
)
from bctrl_async._calls.sender import Sender
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN
Run = Callable[[StopBatch], Coroutine[object, object, None]]
RAISED = {
    # What a callback raises, and what the run raises then.
    asyncio.CancelledError: (BctrlError, "on_outcome raised CancelledError"),
    KeyboardInterrupt: (KeyboardInterrupt, "^$"),
}


class TestCallback:
    @pytest.mark.parametrize("error", RAISED)
    @pytest.mark.parametrize("run", [await_batch, read_all])
    def test_what_it_raises_comes_after_all_outcomes(
        self, error: type[BaseException], run: Run
    ) -> None:
        batches: list[StopBatch] = []
        delivered: list[StopOutcome] = []

        def fail(outcome: StopOutcome) -> None:
            delivered.append(outcome)
            raise error

        async def scenario(url: str) -> None:
            async with BctrlSession("emulator-key", base_url=url) as session:
                batches.append(
                    session.stop_runtimes(targets(10), on_outcome=fail, concurrency=2)
                )
                await run(batches[0])

        raised, text = RAISED[error]
        with emulator_in_a_thread() as emulator, pytest.raises(raised, match=text):
            asyncio.run(scenario(emulator.url))
        assert len(delivered) == 1
        assert batches[0].report.counts.total() == batches[0].read == 10
        assert not batches[0].report.ok

    async def test_what_it_raises_ends_an_unread_block(self, bulk: Bulk) -> None:
        failed = asyncio.Event()

        def fail(_: StopOutcome) -> None:
            failed.set()
            raise LookupError("mine")

        batch = bulk.stop(1, on_outcome=fail)
        with pytest.raises(LookupError, match="mine"):  # noqa: PT012 - the end of the block raises.
            async with batch:
                await failed.wait()
                # The run ends within a few turns of the loop.
                for _ in range(100):
                    await asyncio.sleep(0)

    async def test_it_is_cancelled_with_the_run_if_it_hangs(self, bulk: Bulk) -> None:
        both_hang = asyncio.Barrier(3)

        async def hang(_: StopOutcome) -> None:
            await both_hang.wait()
            await asyncio.Event().wait()

        batch = bulk.stop(10, on_outcome=hang, concurrency=2)
        running = asyncio.create_task(await_batch(batch))
        await both_hang.wait()
        running.cancel()
        await asyncio.wait([running])
        assert batch.report.counts == {STOPPED: 2, NOT_SENT: 8}
        assert_conserved(batch, bulk.emulator)

    async def test_abort_waits_until_it_ends(self, bulk: Bulk) -> None:
        called, ended = asyncio.Event(), []

        async def call(outcome: StopOutcome) -> None:
            called.set()
            await asyncio.sleep(0.01)
            ended.append(outcome.result)

        batch = bulk.stop(1, on_outcome=call)
        running = asyncio.create_task(batch)
        await called.wait()
        batch.abort()
        await running
        assert ended == [STOPPED]

    async def test_it_ends_before_its_outcome_is_read(self, bulk: Bulk) -> None:
        called: set[int] = set()

        async def call(outcome: StopOutcome) -> None:
            await asyncio.sleep(0)
            called.add(outcome.index)

        async with bulk.stop(300, on_outcome=call) as batch:
            async for outcome in batch:
                assert outcome.index in called
        assert called == set(range(300))


class TestInput:
    @pytest.mark.parametrize("end", [StopBatch.stop_reading, StopBatch.abort])
    async def test_a_list_that_grows_with_each_outcome_has_an_end_and_is_not_whole(
        self, bulk: Bulk, end: Callable[[StopBatch], None]
    ) -> None:
        targets = add_runtimes(bulk.emulator, 1)

        def append(outcome: StopOutcome) -> None:
            if len(targets) < 1000:
                targets.append(outcome.target)
            end(batch)

        batch = bulk.session.stop_runtimes(targets, concurrency=1, on_outcome=append)
        report = await batch

        assert (report.total, report.ok) == (1, False)

    async def test_a_list_that_shrinks_is_not_the_whole_input(self, bulk: Bulk) -> None:
        targets = add_runtimes(bulk.emulator, 10)
        report = await bulk.session.stop_runtimes(
            targets,
            concurrency=1,
            on_outcome=lambda outcome: targets.remove((*outcome.target,)),
        )

        assert report.counts == {STOPPED: 5}
        assert not report.ok
        assert str(report.ended_early) == "the input ended after 5 of 10 targets"

    async def test_it_aborts_nothing_if_it_calls_stop_reading(self, bulk: Bulk) -> None:
        targets = add_runtimes(bulk.emulator, 10)
        bulk.emulator.inject(*[Fault.LATENCY] * 3)

        async def source() -> AsyncIterator[tuple[str, str]]:
            for number, target in enumerate(targets):
                if number == 3:
                    await wait_for_requests(bulk.emulator, 3)
                    batch.stop_reading()
                yield target

        batch = bulk.session.stop_runtimes(source())
        report = await batch

        assert report.counts == {STOPPED: 3, NOT_SENT: 1}


class TestError:
    @pytest.mark.moves_clock
    async def test_after_a_401_requests_in_flight_may_be_answered_but_are_not_retried(
        self,
    ) -> None:
        keys = chain(["emulator-key", "emulator-key", "wrong"], repeat("emulator-key"))
        async with (
            Emulator(port=0) as emulator,
            BctrlSession(lambda: next(keys), base_url=emulator.url) as session,
        ):
            targets = add_runtimes(emulator, 3)
            emulator.hold("ws-1", "r0", "r2")
            emulator.inject(Fault.HANG, alias="r1")
            async with session.stop_runtimes(targets) as batch:
                await wait_for_requests(emulator, 3)
                emulator.release("ws-1", "r2")
                rejected = await anext(batch)
                emulator.release("ws-1", "r0")
                answered = await anext(batch)
                pass_time(60.0)
                unanswered = await anext(batch)

        outcomes = [answered, unanswered, rejected]
        assert [outcome.index for outcome in outcomes] == [0, 1, 2]
        assert [outcome.result for outcome in outcomes] == [
            STOPPED,
            UNKNOWN,
            "rejected",
        ]
        assert unanswered.attempts == emulator.received["ws-1", "r1"] == 1

    async def test_a_retry_after_of_all_beyond_the_patience_ends_the_run(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(*[Reply(429, headers={"Retry-After": "301"})] * 20)
        for number in range(20):
            bulk.emulator.add_runtime(f"ws-{number}", "crm")
        targets = ((f"ws-{number % 20}", "crm") for number in range(1000))
        report = await bulk.session.stop_runtimes(targets, concurrency=10)

        assert isinstance(report.ended_early, BctrlRateLimitError)
        assert report.total <= 30

    async def test_a_session_closed_meanwhile_rejects_what_is_throttled(
        self, emulator: Emulator
    ) -> None:
        emulator.inject(Fault.RATE_LIMITED)
        async with aiohttp.ClientSession() as http:
            session = BctrlSession("emulator-key", base_url=emulator.url, http=http)
            batch = session.stop_runtimes([("ws-1", "crm")])
            running = await started(batch, emulator, 1)
            await session.close()
            await running

        assert emulator.received.total() == 1
        assert batch.report.counts == {StopResult.REJECTED: 1}

    @pytest.mark.parametrize("run", [await_batch, read_all])
    async def test_a_closed_session_is_raised_at_once(
        self, connect: Connect, run: Run
    ) -> None:
        session = connect()
        await session.close()
        batch = session.stop_runtimes([("ws-1", "crm")])
        with pytest.raises(BctrlConfigError, match="closed"):
            await run(batch)
        assert batch.read == 0

    async def test_a_bug_is_raised_after_all_outcomes(
        self, bulk: Bulk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(Sender, "_attempt", fail)
        batch = bulk.stop(50, concurrency=5)
        with pytest.raises(ZeroDivisionError):
            await batch

        # It came before there was a connection.
        assert batch.report.counts == {NOT_SENT: 50}
        assert_conserved(batch, bulk.emulator)
