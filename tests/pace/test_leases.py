"""The session's side of a shared pace: its slots, and its rate without them."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref

import pytest
from support.pacing import Member, MemoryPace, jain, most_in_a_window
from support.throttling import show_limit
from support.virtual_time import in_virtual_time, now

from bctrl_async import BctrlConfigError

LEASE = 0.05
"""The most seconds' worth of slots that a session asks for."""


@in_virtual_time
class TestSharing:
    @pytest.mark.parametrize(
        ("count", "rate", "ideal", "latency"),
        [
            (1, 195, 10, 0.0005),
            (16, 1950, 20, 0.0005),
            (1, 195, 10, 0.02),
            (8, 195, 10, 0.02),
            (4, 195, 10, 0.1),
            (8, 5, 40, 0.001),
        ],
    )
    async def test_together_they_use_the_whole_rate_in_equal_parts(
        self, count: int, rate: int, ideal: int, latency: float
    ) -> None:
        """Fault: a member that asks without slots loses some in the round trip."""
        pace = MemoryPace(rate=rate, latency=latency)
        members = [Member(pace) for _ in range(count)]
        await asyncio.gather(
            *(member.bulk(ideal * rate // count) for member in members)
        )

        assert now() <= 1.015 * ideal + latency
        assert jain([member.between(1, ideal - 1) for member in members]) > 0.999
        assert (
            most_in_a_window([t for member in members for t in member.starts], rate)
            <= 2
        )

    async def test_a_late_joiner_has_its_share_within_a_second(self) -> None:
        pace = MemoryPace(rate=195)
        first = [Member(pace) for _ in range(3)]
        late = Member(pace)
        running = [
            asyncio.create_task(member.bulk(10_000, until=10)) for member in first
        ]
        await asyncio.sleep(5)
        await asyncio.gather(late.bulk(10_000, until=10), *running)

        share = 195 / 4
        assert late.between(5, 6) == pytest.approx(share, abs=195 * LEASE)
        assert [m.between(6, 10) for m in first] == [
            pytest.approx(4 * share, abs=195 * LEASE)
        ] * 3
        assert sum(m.between(4, 5) for m in first) == pytest.approx(195, abs=2)

    async def test_a_member_that_dies_costs_two_leases(self) -> None:
        pace = MemoryPace(rate=195)
        members = [Member(pace) for _ in range(3)]
        dying = asyncio.create_task(members[0].bulk(10_000))
        living = [asyncio.create_task(m.bulk(10_000, until=10)) for m in members[1:]]
        await asyncio.sleep(5.001)
        dying.cancel()
        await members[0].close()
        await asyncio.gather(*living)

        assert (
            sum(member.between(5.001, 10) for member in members)
            >= 195 * (5 - 2 * LEASE) - 1
        )

    async def test_it_asks_for_as_many_as_wait_but_for_one_lease_at_most(self) -> None:
        pace = MemoryPace(rate=1000, latency=0.02)
        member = Member(pace)
        await member.attempt()
        await asyncio.sleep(1)
        await asyncio.gather(*(member.attempt() for _ in range(60)))

        # Fifty are in a lease, and of these some still wait when the next is asked for.
        assert pace.asked_for == [1, 50, 10]

    async def test_a_slot_is_lost_one_lease_after_its_time(self) -> None:
        """Fault: a member that was idle for two leases starts both at once."""
        pace = MemoryPace(rate=1000)
        member = Member(pace, latency=0.0)
        abandoned = asyncio.gather(*(member.attempt() for _ in range(50)))
        await asyncio.sleep(0.001)
        abandoned.cancel()
        await asyncio.sleep(LEASE + 0.04)
        start = now()
        await member.bulk(100)

        # The fifty slots of the first lease were due in its 0.05 s: 0.04 s of them are
        # lost.
        assert member.between(start, start + 0.0005) == pytest.approx(10, abs=2)

    async def test_while_the_server_throttles_nothing_is_asked_for(self) -> None:
        """Fault: the slots of a session that pauses are lost to all others."""
        pace = MemoryPace(rate=1000)
        member = Member(pace)
        await member.limiter.acquire(60)
        member.limiter.release(None)
        show_limit(member.limiter, 0.1)
        before = now()
        await member.bulk(10)

        assert member.between(before, before + 0.4) == 0
        assert pace.calls[1] >= before + 0.4

    @pytest.mark.parametrize(("others", "longest"), [(7, 0.4), (0, 0.05)])
    async def test_a_single_stop_waits_for_one_lease_of_each_other_process(
        self, others: int, longest: float
    ) -> None:
        """Fault: a single stop waits behind a hundred targets, for half a second."""
        pace = MemoryPace(rate=200)
        member = Member(pace)
        # They are in other processes, or there is a single process, in the same
        # session.
        bulks = [Member(pace) for _ in range(others)] or [member]
        running = [asyncio.create_task(bulk.bulk(10_000, until=20)) for bulk in bulks]
        await asyncio.sleep(1)
        waits = []
        while now() < 19:
            waits.append(await member.attempt())
            await asyncio.sleep(0.05)
        await asyncio.gather(*running)

        assert sorted(waits)[int(0.99 * len(waits))] < longest
        used = sum(bulk.between(1, 19) for bulk in bulks) + len(waits) * bool(others)
        assert used == pytest.approx(200 * 18, abs=100)


class LibraryError(Exception):
    """An error of the client of a store."""


# The attributes of a pace, and the reason that the log has.
AWAY: dict[str, tuple[dict[str, object], str]] = {
    # Fault: the text of an exception of a store added lines to the log.
    "an error": (
        {"error": ConnectionError("refused\n  by the\r\nserver")},
        "ConnectionError: refused by the server",
    ),
    "a full disk": (
        {"error": OSError(28, "No space left")},
        "OSError: [Errno 28] No space left",
    ),
    # Fault: a request that ended with CancelledError woke nobody, for ever.
    "a cancelled answer": ({"error": asyncio.CancelledError()}, "CancelledError"),
    "an error with a password": (
        {"error": LibraryError("redis://:s3cret@redis.internal")},
        "LibraryError",
    ),
    "an answer that never comes": ({"latency": math.inf}, "TimeoutError"),
}


@in_virtual_time
class TestWithoutStore:
    @pytest.mark.parametrize(("attributes", "reason"), AWAY.values(), ids=AWAY)
    async def test_a_store_that_was_never_of_use_leaves_the_whole_rate(
        self,
        attributes: dict[str, object],
        reason: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        pace = MemoryPace(rate=100)
        vars(pace).update(attributes)
        member = Member(pace)
        await member.bulk(900)

        assert now() == pytest.approx(10 + (reason == "TimeoutError"), abs=0.1)
        assert most_in_a_window(member.starts, 90) <= 4
        assert len(pace.calls) == pytest.approx(10, abs=1), "it is asked once a second"
        [warning] = caplog.records
        assert warning.getMessage() == (
            f"the shared pace cannot be asked ({reason}): this session goes "
            "on with 90 attempts a second"
        )

    @pytest.mark.parametrize(("rate", "count"), [(200, 4), (200, 1), (8, 8)])
    async def test_a_store_that_goes_away_leaves_each_nearly_its_share(
        self, rate: int, count: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        pace = MemoryPace(rate=rate)
        members = [Member(pace) for _ in range(count)]
        running = [asyncio.create_task(m.bulk(10_000, until=36)) for m in members]
        await asyncio.sleep(12)
        pace.error = BctrlConfigError("wrong password")
        await asyncio.sleep(12)
        pace.error = None
        await asyncio.gather(*running)

        share = 0.9 * rate / count
        assert [m.between(13, 23) for m in members] == [
            pytest.approx(10 * share, rel=0.1, abs=1)
        ] * count
        assert sum(m.between(26, 36) for m in members) == pytest.approx(
            10 * rate, rel=0.02
        )
        messages = [record.getMessage() for record in caplog.records]
        away = (
            f"(BctrlConfigError: wrong password): this session goes on with {share:.3g}"
        )
        assert sum(away in message for message in messages) == count
        assert messages.count("the shared pace is used again") == count
        assert len(messages) == 2 * count

    async def test_the_share_is_a_mean_over_the_last_leases(self) -> None:
        """Fault: after a kill, all kept the last lease's speed, 1.5 times the rate."""
        pace = MemoryPace(rate=200)
        busy, joining = Member(pace), Member(pace)
        running = asyncio.create_task(busy.bulk(10_000, until=10))
        await asyncio.sleep(4)
        while now() < 7:
            # Half of the leases of the busy member wait for one of the other.
            await asyncio.gather(*(joining.attempt() for _ in range(10)))
            await asyncio.sleep(0.05)
        pace.error = ConnectionError()
        mean = busy.between(5, 7) / 2
        await running

        assert busy.between(8, 10) == pytest.approx(2 * 0.9 * mean, rel=0.1)

    async def test_a_process_that_was_held_up_keeps_most_of_its_share(self) -> None:
        """Fault: after a stall, it went on at half of its speed for minutes."""
        pace = MemoryPace(rate=200)
        member = Member(pace)
        running = asyncio.create_task(member.bulk(10_000, until=10))
        await asyncio.sleep(2)
        pace.latency = 0.9
        await asyncio.sleep(1)
        pace.latency = 0.0005
        await asyncio.sleep(0.5)
        pace.error = ConnectionError()
        await running

        assert member.between(5, 10) > 5 * 0.8 * 0.9 * 200

    async def test_no_share_is_more_than_the_rate(self) -> None:
        """Fault: a store that had answered at once left a session without any limit."""

        class Generous(MemoryPace):
            async def acquire(self, slots: int) -> None:
                if self.error is not None:
                    await super().acquire(slots)

        pace = Generous(rate=100)
        member = Member(pace)
        running = asyncio.create_task(member.bulk(10_000, until=10))
        await asyncio.sleep(2)
        pace.error = ConnectionError()
        await running

        assert member.between(5, 10) == pytest.approx(5 * 90, rel=0.02)

    async def test_a_few_calls_say_nothing_about_the_share(self) -> None:
        """Fault: at ten calls a second, it made nine while Redis was away."""
        pace = MemoryPace(rate=100)
        member = Member(pace, limit=10)
        for _ in range(20):
            await member.attempt()
            await asyncio.sleep(0.1)
        pace.error = ConnectionError()
        start = now()
        await member.bulk(91)

        assert now() - start == pytest.approx(1.0, abs=0.05)

    async def test_attempts_that_are_late_by_a_timer_are_made_up_for(self) -> None:
        pace = MemoryPace(rate=100)
        pace.error = ConnectionRefusedError("refused")
        member = Member(pace, latency=0.008, limit=1)
        for _ in range(90):
            # Longer than the rate says, and then as much shorter.
            member.latency = 0.02 - member.latency
            await member.attempt()

        assert now() == pytest.approx(1.0, abs=0.03)

    async def test_a_request_that_is_cancelled_from_outside_is_made_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fault: code that cancelled all tasks left waiters without a timer."""
        member = Member(MemoryPace(rate=100, latency=0.02))
        attempts = [asyncio.create_task(member.attempt()) for _ in range(200)]
        await asyncio.sleep(0.01)
        (request,) = asyncio.all_tasks() - {*attempts, asyncio.current_task()}
        request.cancel()
        await asyncio.gather(*attempts)

        assert now() == pytest.approx(2.05, abs=0.1)
        assert caplog.records == []


class Interrupted(MemoryPace):
    """A pace whose store turns a cancellation into an error of its connection."""

    async def acquire(self, slots: int) -> None:
        try:
            await super().acquire(slots)
        except asyncio.CancelledError:
            raise ConnectionError("the connection was closed") from None


@in_virtual_time
class TestEnd:
    async def test_a_store_that_refuses_a_session_ends_it_and_no_error_is_kept(
        self,
    ) -> None:
        """Fault: frames of its traceback had the connection's password."""
        pace = MemoryPace(rate=100)
        member = Member(pace)
        cause = LibraryError("wrong password: s3cret")
        pace.error = BctrlConfigError("wrong password")
        pace.error.__context__ = cause
        reference = weakref.ref(cause)
        with pytest.raises(BctrlConfigError, match="wrong password"):
            await member.attempt()
        pace.error = None
        del cause
        gc.collect()
        assert reference() is None
        assert member.limiter.is_closed()
        assert len(pace.calls) == 1

    async def test_closing_ends_the_request_and_nothing_is_asked_later(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fault: a session that closes warns that it goes on without the store."""
        pace = Interrupted(rate=100)
        member = Member(pace)
        await member.limiter.acquire(60)
        pace.latency = math.inf
        waiting = asyncio.create_task(member.attempt())
        await asyncio.sleep(0.1)
        await member.close()
        calls = len(pace.calls)
        member.limiter.release("a runtime")
        with pytest.raises(BctrlConfigError, match="the session is closed"):
            await waiting
        await asyncio.sleep(1)
        assert len(pace.calls) == calls
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert caplog.records == []
