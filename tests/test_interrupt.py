"""A run that is asked to read no further sends nothing new."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from helpers import (
    add_runtimes,
    assert_conserved,
    pass_time,
    run_in_virtual_time,
    wait_for_requests,
)

from bctrl_async import (
    BctrlError,
    BctrlSession,
    RetryPolicy,
    StopBatch,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async._http.fast.answer import Connector
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN
Connect = Callable[..., BctrlSession]


class TestStopReading:
    async def test_a_target_that_waits_for_the_limiter_is_not_sent(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        """Fault: targets that workers held in front of the limiter were stopped all the same."""
        targets = add_runtimes(emulator, 100)
        sent: list[int] = []

        def stop_reading(_: StopOutcome) -> None:
            batch.stop_reading()
            sent.append(len(emulator.requests) + batch.in_flight)

        session = connect(rate=20)
        batch = session.stop_runtimes(targets, on_outcome=stop_reading)
        report = await batch

        assert len(emulator.requests) <= sent[0]
        assert report.counts[STOPPED] == len(emulator.requests)
        assert report.counts[NOT_SENT] == 100 - len(emulator.requests)
        assert "asked to start no more stops" in str(report.ended_early)
        assert_conserved(batch, emulator)

    async def test_an_unread_generator_is_read_no_further_and_what_was_read_is_not_sent(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        targets = add_runtimes(emulator, 100)
        session = connect(rate=0.01)
        batch = session.stop_runtimes(iter(targets), concurrency=10)
        running = asyncio.create_task(batch)
        await wait_for_requests(emulator, 1)
        batch.stop_reading()
        report = await running

        assert 10 <= report.total <= 11
        assert report.counts[NOT_SENT] >= report.total - 2
        assert_conserved(batch, emulator)

    async def test_a_request_on_the_wire_is_answered(self) -> None:
        async with (
            Emulator(port=0, latency=20.0) as emulator,
            BctrlSession("emulator-key", base_url=emulator.url) as session,
        ):
            batch = session.stop_runtimes(add_runtimes(emulator, 20), concurrency=5)
            running = asyncio.create_task(batch)
            await wait_for_requests(emulator, 5)
            batch.stop_reading()
            pass_time(20.0)
            report = await running

        assert report.counts == {STOPPED: 5, NOT_SENT: 15}

    @pytest.mark.parametrize("fault", [Fault.DROP_AFTER, Fault.BAD_GATEWAY, Fault.SERVER_ERROR])
    async def test_a_stop_that_may_have_taken_effect_is_retried(
        self, emulator: Emulator, connect: Connect, fault: Fault
    ) -> None:
        targets = add_runtimes(emulator, 3)
        emulator.inject(fault)
        session = connect(retry=RetryPolicy(base=0.05))
        batch = session.stop_runtimes(targets, concurrency=1)
        running = asyncio.create_task(batch)
        await wait_for_requests(emulator, 1)
        batch.stop_reading()
        report = await running

        assert report.counts[NOT_SENT] == 2
        assert report.counts[UNKNOWN] == 0
        assert emulator.received["ws-1", "r0"] == 2

    @pytest.mark.parametrize("cut_off", [StopBatch.stop_reading, StopBatch.abort])
    @pytest.mark.parametrize("fault", [Fault.RATE_LIMITED, Reply(503)])
    async def test_a_target_that_was_throttled_is_rejected(
        self,
        emulator: Emulator,
        connect: Connect,
        fault: Fault | Reply,
        cut_off: Callable[[StopBatch], None],
    ) -> None:
        targets = add_runtimes(emulator, 1)
        emulator.inject(*[fault] * 100)
        session = connect(retry=RetryPolicy(base=5.0))
        batch = session.stop_runtimes(targets)
        running = asyncio.create_task(batch)
        await wait_for_requests(emulator, 1)
        while batch.in_flight:
            await asyncio.sleep(0)
        cut_off(batch)
        report = await running

        assert report.counts == {StopResult.REJECTED: 1}
        assert "before that, the server answered" in str(report.failures[0].error)
        assert report.failures[0].attempts == 1
        assert report.ended_early is not None

    async def test_an_attempt_throttled_after_the_call_is_not_retried(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        targets = add_runtimes(emulator, 1)
        emulator.inject(*[Fault.RATE_LIMITED] * 100)
        session = connect(retry=RetryPolicy(base=0.01))
        batch = session.stop_runtimes(targets)
        running = asyncio.create_task(batch)
        await wait_for_requests(emulator, 1)
        batch.stop_reading()
        report = await running

        assert report.counts == {StopResult.REJECTED: 1}
        assert len(emulator.requests) == 1
        assert report.ended_early is not None

    async def test_a_rejection_that_arrives_after_the_call_stays_rejected(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        targets = add_runtimes(emulator, 1)
        emulator.inject(Reply(307))
        session = connect()
        batch = session.stop_runtimes(targets)
        running = asyncio.create_task(batch)
        await wait_for_requests(emulator, 1)
        batch.stop_reading()
        report = await running

        assert report.counts == {StopResult.REJECTED: 1}

    async def test_a_call_of_the_key_function_is_abandoned(self, emulator: Emulator) -> None:
        targets = add_runtimes(emulator, 1)
        asked = asyncio.Event()

        async def key() -> str:
            asked.set()
            await asyncio.sleep(60)
            return "emulator-key"

        async with BctrlSession(key, base_url=emulator.url) as session:
            batch = session.stop_runtimes(targets)
            running = asyncio.create_task(batch)
            await asked.wait()
            batch.stop_reading()
            report = await running

        assert report.counts == {NOT_SENT: 1}

    async def test_polls_end_with_their_outcomes_as_they_stand(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        targets = add_runtimes(emulator, 1)
        emulator.inject(Fault.MALFORMED_JSON)
        emulator.inject(*[Fault.ACCEPTED] * 1000, method="GET")
        session = connect(retry=RetryPolicy(base=0.01))
        batch = session.stop_runtimes(targets, verify=True)
        running = asyncio.create_task(batch)
        await wait_for_requests(emulator, 2)
        batch.stop_reading()
        report = await running

        assert report.counts == {StopResult.ACCEPTED: 1}
        assert_conserved(batch, emulator)


@pytest.mark.parametrize("begun", [1, 100])
def test_at_the_deadline_what_was_throttled_is_rejected_and_the_rest_not_sent(
    monkeypatch: pytest.MonkeyPatch, begun: int
) -> None:
    from bctrl_async import BctrlServerError  # noqa: PLC0415
    from bctrl_async._calls.sender import Sender  # noqa: PLC0415

    async def throttle(*_: object) -> BctrlError:
        return BctrlServerError("503", status=503)

    monkeypatch.setattr(Sender, "_attempt", throttle)

    async def scenario(session: BctrlSession) -> StopReport:
        return await session.stop_runtimes([("ws", f"r{n}") for n in range(begun)], deadline=5)

    report, _ = run_in_virtual_time(scenario)
    assert report.counts.total() == begun
    sent = {failure.result for failure in report.failures if failure.attempts}
    waiting = {failure.result for failure in report.failures if not failure.attempts}
    assert sent == {StopResult.REJECTED}
    assert waiting <= {NOT_SENT}


@pytest_asyncio.fixture
async def slow_lookup(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Hold every DNS lookup of aiohttp until the event is set."""
    found = asyncio.Event()
    # The extra speedups replaces the resolver.
    resolver = aiohttp.DefaultResolver
    resolve = resolver.resolve

    async def slow_resolve(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the resolver's.
        await found.wait()
        return await resolve(*args, **kwargs)

    monkeypatch.setattr(resolver, "resolve", slow_resolve)
    return found


async def let_deadline_pass(batch: StopBatch) -> StopReport:
    """Let the deadline of 10 s pass once five attempts have begun."""
    running = asyncio.create_task(batch)
    while batch.in_flight < 5:
        await asyncio.sleep(0)
    pass_time(10.0)
    return await running


class TestConnecting:
    """Fault: an attempt without a connection passed for a request in flight."""

    @pytest.mark.parametrize("end", [StopBatch.stop_reading, StopBatch.abort])
    async def test_a_target_that_has_no_connection_yet_is_not_sent(
        self, emulator: Emulator, slow_lookup: asyncio.Event, end: Callable[[StopBatch], None]
    ) -> None:
        targets = add_runtimes(emulator, 50)
        url = emulator.url.replace("127.0.0.1", "localhost")
        async with BctrlSession("emulator-key", base_url=url) as session:
            batch = session.stop_runtimes(targets)
            running = asyncio.create_task(batch)
            while batch.in_flight < 50:
                await asyncio.sleep(0)
            end(batch)
            slow_lookup.set()
            report = await running

        assert report.counts == {NOT_SENT: 50}
        assert "before it had a connection" in str(report.failures[0].error)
        assert emulator.requests == []

    async def test_a_deadline_leaves_it_not_sent(
        self, emulator: Emulator, slow_lookup: asyncio.Event
    ) -> None:
        targets = add_runtimes(emulator, 5)
        url = emulator.url.replace("127.0.0.1", "localhost")
        async with BctrlSession("emulator-key", base_url=url) as session:
            batch = session.stop_runtimes(targets, deadline=10.0)
            report = await let_deadline_pass(batch)
            slow_lookup.set()

        assert report.counts == {NOT_SENT: 5}

    async def test_on_a_borrowed_pool_it_may_have_been_sent(
        self, emulator: Emulator, slow_lookup: asyncio.Event
    ) -> None:
        targets = add_runtimes(emulator, 5)
        url = emulator.url.replace("127.0.0.1", "localhost")
        async with (
            aiohttp.ClientSession() as http,
            BctrlSession("emulator-key", base_url=url, http=http) as session,
        ):
            batch = session.stop_runtimes(targets, deadline=10.0)
            report = await let_deadline_pass(batch)
            slow_lookup.set()

        assert report.counts == {UNKNOWN: 5}


async def test_a_connector_serves_requests_that_belong_to_no_call(emulator: Emulator) -> None:
    async with aiohttp.ClientSession(connector=Connector()) as http, http.get(emulator.url) as got:
        assert got.status == 404
