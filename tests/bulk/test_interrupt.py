"""A run that is asked to read no more sends nothing new."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from helpers import (
    Bulk,
    Connect,
    add_runtimes,
    assert_conserved,
    await_batch,
    pass_time,
)
from simulated import Simulate

from bctrl_async import (
    BctrlServerError,
    BctrlSession,
    RetryPolicy,
    StopBatch,
    StopOutcome,
    StopResult,
)
from bctrl_async._http.fast.answer import Connector
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN
REJECTED = StopResult.REJECTED

End = Callable[[StopBatch], None]


def pass_deadline(_: StopBatch) -> None:
    pass_time(9.5)


class TestStopReading:
    @pytest.mark.parametrize("make", [list, iter])
    async def test_a_target_that_waits_for_the_limiter_is_not_sent(
        self,
        emulator: Emulator,
        connect: Connect,
        make: Callable[[list[tuple[str, str]]], Iterable[tuple[str, str]]],
    ) -> None:
        sent: list[int] = []

        def stop_reading(_: StopOutcome) -> None:
            batch.stop_reading()
            sent.append(len(emulator.requests) + batch.in_flight)

        async with connect(rate=20) as session:
            targets = make(add_runtimes(emulator, 100))
            batch = session.stop_runtimes(targets, on_outcome=stop_reading, concurrency=50)
            report = await batch

        requests = len(emulator.requests)
        assert requests <= sent[0]
        assert report.counts == {STOPPED: requests, NOT_SENT: report.total - requests}
        assert report.total == 100 if make is list else report.total < 100
        assert "asked to start no more stops" in str(report.ended_early)
        assert_conserved(batch, emulator)

    @pytest.mark.parametrize("fault", [Fault.DROP_AFTER, Fault.BAD_GATEWAY, Fault.SERVER_ERROR])
    async def test_a_stop_that_may_have_taken_effect_is_retried(
        self, bulk: Bulk, fault: Fault
    ) -> None:
        bulk.emulator.inject(fault)
        batch = bulk.stop(3, concurrency=1, retry=RetryPolicy(base=0.05))
        running = await bulk.started(batch, 1)
        batch.stop_reading()
        await running

        assert batch.report.counts[NOT_SENT] == 2
        assert batch.report.counts[UNKNOWN] == 0
        assert bulk.emulator.received["ws-1", "r0"] == 2

    @pytest.mark.parametrize("fault", [Fault.RATE_LIMITED, Reply(503), Reply(307)])
    async def test_a_target_that_is_rejected_after_the_call_is_not_sent_again(
        self, bulk: Bulk, fault: Fault | Reply
    ) -> None:
        bulk.emulator.inject(*[fault] * 100)
        batch = bulk.stop(1, retry=RetryPolicy(base=0.01))
        running = await bulk.started(batch, 1)
        batch.stop_reading()
        await running

        assert batch.report.counts == {REJECTED: 1}
        assert len(bulk.emulator.requests) == 1
        # The last target of the input has its final answer with a 307.
        assert (batch.report.ended_early is None) is (fault == Reply(307))

    async def test_a_call_of_the_key_function_is_abandoned(self, emulator: Emulator) -> None:
        asked = asyncio.Event()

        async def key() -> str:
            asked.set()
            await asyncio.sleep(60)
            return "emulator-key"

        async with BctrlSession(key, base_url=emulator.url) as session:
            batch = session.stop_runtimes([("ws-1", "crm")])
            running = asyncio.create_task(batch)
            await asked.wait()
            batch.stop_reading()
            report = await running

        assert report.counts == {NOT_SENT: 1}


class TestThrottled:
    """A target that waits to be sent again, because it was throttled, as the run is ended."""

    @pytest.mark.parametrize("fault", [Fault.RATE_LIMITED, Reply(503)])
    @pytest.mark.parametrize("end", [StopBatch.stop_reading, StopBatch.abort, pass_deadline])
    async def test_it_is_rejected(self, bulk: Bulk, fault: Fault | Reply, end: End) -> None:
        bulk.emulator.inject(*[fault] * 100)
        batch = bulk.stop(1, retry=RetryPolicy(base=5.0), deadline=9.5)
        running = await bulk.started(batch, 1)
        while batch.in_flight:
            await asyncio.sleep(0)
        end(batch)
        await running

        [failure] = batch.report.failures
        assert (failure.result, failure.attempts) == (REJECTED, 1)
        assert batch.report.ended_early is not None
        assert f"before it was sent again: {batch.report.ended_early}" in str(failure.error)
        assert "before that, the server answered" in str(failure.error)

    @pytest.mark.parametrize("end", [StopBatch.abort, pass_deadline])
    async def test_it_is_unknown_if_it_may_have_stopped_before(self, bulk: Bulk, end: End) -> None:
        bulk.emulator.inject(Fault.BAD_GATEWAY, *[Fault.RATE_LIMITED] * 100)
        batch = bulk.stop(1, deadline=9.5)
        running = asyncio.create_task(await_batch(batch))
        while not batch.is_throttled:
            await asyncio.sleep(0)
        end(batch)
        await running

        assert batch.report.counts == {UNKNOWN: 1}

    def test_at_the_deadline_the_rest_is_not_sent(self, simulate: Simulate) -> None:
        refused = BctrlServerError("503", status=503)
        report = simulate(lambda _: refused, latency=0.0).stop(100, deadline=5)
        assert {each.result for each in report.failures if each.attempts} == {REJECTED}
        assert {each.result for each in report.failures if not each.attempts} <= {NOT_SENT}


class TestConnecting:
    """An attempt that has no connection yet as the run is ended."""

    @pytest_asyncio.fixture
    async def found(self, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
        """Hold every DNS lookup of aiohttp until the event is set."""
        found = asyncio.Event()
        # The extra speedups replaces the resolver.
        resolver = aiohttp.DefaultResolver
        resolve = resolver.resolve

        async def slow_resolve(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as it has.
            await found.wait()
            return await resolve(*args, **kwargs)

        monkeypatch.setattr(resolver, "resolve", slow_resolve)
        return found

    @pytest.mark.parametrize(
        ("is_borrowed", "end", "result"),
        [
            (False, StopBatch.stop_reading, NOT_SENT),
            (False, StopBatch.abort, NOT_SENT),
            (False, pass_deadline, NOT_SENT),
            # It cannot be known what a borrowed pool has sent.
            (True, StopBatch.stop_reading, STOPPED),
            (True, StopBatch.abort, UNKNOWN),
            (True, pass_deadline, UNKNOWN),
        ],
    )
    async def test_it_is_not_sent_unless_the_pool_is_borrowed(
        self,
        emulator: Emulator,
        found: asyncio.Event,
        end: End,
        result: StopResult,
        *,
        is_borrowed: bool,
    ) -> None:
        url = emulator.url.replace("127.0.0.1", "localhost")
        async with aiohttp.ClientSession() as http:
            borrowed = http if is_borrowed else None
            async with BctrlSession("emulator-key", base_url=url, http=borrowed) as session:
                batch = session.stop_runtimes(add_runtimes(emulator, 5), deadline=9.5)
                running = asyncio.create_task(batch)
                while batch.in_flight < 5:
                    await asyncio.sleep(0)
                end(batch)
                if result is STOPPED:
                    found.set()
                report = await running
                found.set()

        assert report.counts == {result: 5}
        if result is NOT_SENT:
            assert "before it had a connection" in str(report.failures[0].error)
            assert emulator.requests == []


async def test_a_connector_serves_requests_that_belong_to_no_call(emulator: Emulator) -> None:
    async with aiohttp.ClientSession(connector=Connector()) as http, http.get(emulator.url) as got:
        assert got.status == 404
