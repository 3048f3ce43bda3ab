"""A session whose shared pace is away, is refused, or closes, in virtual time."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref

import pytest
import virtual_time
from pacing import Member, MemoryPace, most_in_a_window
from virtual_time import in_virtual_time, now

from bctrl_async import BctrlConfigError
from bctrl_async.pace._leases import LEASE, Lease, Store


class LibraryError(Exception):
    """An error of the client of a store."""


NONSENSE = [
    Lease(1, 0.0, 10**9),
    Lease(1, 0.0, 0),
    Lease(1, 1e308, 1),
    Lease(1, math.nan, 1),
    Lease(1, -1.0, 1),
    Lease(10**9, 0.0, 1),
    Lease(0, 0.0, 1),
]
# The attributes of a pace, and the reason that the log has.
AWAY: dict[str, tuple[dict[str, object], str]] = {
    # Fault: the text of an exception of a store began further lines of the log.
    "an error": (
        {"error": ConnectionError("refused\n  by the\r\nserver")},
        "ConnectionError: refused by the server",
    ),
    # Fault: a request that ended with CancelledError woke nobody, for ever.
    "a cancelled answer": ({"error": asyncio.CancelledError()}, "CancelledError"),
    "an error with a password": (
        {"error": LibraryError("redis://:s3cret@redis.internal")},
        "LibraryError",
    ),
    "an answer that is always late": ({"latency": 0.3}, "no answer within 250ms"),
    # Fault: one slot in years, or a busy loop, as a store said.
    **{str(lease): ({"answer": lease}, "its answer makes no sense") for lease in NONSENSE},
}


@in_virtual_time
class TestWithoutStore:
    @pytest.mark.parametrize(("attributes", "reason"), AWAY.values(), ids=AWAY)
    async def test_a_store_that_was_never_of_use_leaves_the_whole_rate(
        self, attributes: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        pace = MemoryPace(rate=100)
        vars(pace).update(attributes)
        member = Member(pace)
        await member.bulk(1000)

        assert now() == pytest.approx(10, abs=0.3)
        assert most_in_a_window(member.starts, 100) <= 4
        assert len(pace.calls) == pytest.approx(10, abs=1), "it is asked once a second"
        [warning] = caplog.records
        assert warning.getMessage() == (
            f"the shared pace cannot be asked ({reason}): this session goes "
            "on with 100 attempts a second, its share of 1"
        )

    async def test_a_pace_that_cannot_be_opened_is_asked_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(MemoryPace):
            def open(self) -> Store:
                super().open()
                raise OSError("no such device")

        pace = Broken(rate=100)
        member = Member(pace)
        await member.bulk(250)
        await member.close()

        assert pace.opened == 3
        assert "(OSError: no such device)" in caplog.text

    async def test_a_store_that_goes_away_leaves_each_its_share(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        pace = MemoryPace(rate=200)
        members = [Member(pace) for _ in range(4)]
        running = [asyncio.create_task(m.bulk(10_000, until=9)) for m in members]
        await asyncio.sleep(3)
        pace.error = BctrlConfigError("wrong password")
        await asyncio.sleep(3)
        pace.error = None
        await asyncio.gather(*running)

        assert [m.between(3.2, 5.8) for m in members] == [pytest.approx(2.6 * 50, rel=0.1)] * 4
        assert sum(m.between(7, 9) for m in members) == pytest.approx(400, abs=10)
        starts = sorted(start for m in members for start in m.starts)
        assert most_in_a_window(starts, 200) <= 200 * 2 * LEASE + 8
        messages = [record.getMessage() for record in caplog.records]
        away = "(BctrlConfigError: wrong password): this session goes on with 50 attempts a second"
        assert sum(away in each for each in messages) == 4
        assert sum("the shared pace is used again, after" in each for each in messages) == 4
        assert len(messages) == 8

    async def test_no_attempt_waits_longer_than_a_quarter_of_a_second_for_one_that_hangs(
        self,
    ) -> None:
        pace = MemoryPace(rate=100)
        member = Member(pace)
        await member.attempt()
        pace.latency = math.inf
        waits = []
        while now() < 10:
            waits.append(await member.attempt())

        assert waits[0] == pytest.approx(0.25)
        assert max(waits[1:]) <= 0.01
        assert len(pace.calls) == pytest.approx(10, abs=1)

    async def test_a_connection_that_is_slow_at_first_is_used_once_it_is_there(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        pace = MemoryPace(rate=100, latency=0.6)
        member = Member(pace)
        await member.attempt()
        pace.latency = 0.001
        await asyncio.sleep(1)
        await member.bulk(200)

        assert len(pace.calls) > 10
        assert sum("used again" in record.getMessage() for record in caplog.records) == 1

    async def test_attempts_that_are_late_by_a_timer_are_made_up_for(self) -> None:
        pace = MemoryPace(rate=100)
        pace.error = ConnectionRefusedError("refused")
        member = Member(pace, latency=0.008, limit=1)
        for _ in range(100):
            # Longer than the rate says, and then as much shorter.
            member.latency = 0.02 - member.latency
            await member.attempt()

        assert now() == pytest.approx(1.0, abs=0.02)

    async def test_a_request_that_is_cancelled_from_outside_is_made_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fault: code that cancelled all other tasks left the waiters without any timer."""
        member = Member(MemoryPace(rate=100, latency=0.02))
        attempts = [asyncio.create_task(member.attempt()) for _ in range(200)]
        await asyncio.sleep(0.01)
        (request,) = asyncio.all_tasks() - {*attempts, asyncio.current_task()}
        request.cancel()
        await asyncio.gather(*attempts)

        assert now() == pytest.approx(2.05, abs=0.1)
        assert caplog.records == []

    async def test_an_answer_as_of_a_thousand_members_is_believed(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        pace = MemoryPace(rate=100)
        pace.answer = Lease(1, 20.0, 1000)
        await Member(pace).attempt()

        assert now() >= 20
        assert caplog.records == []


@in_virtual_time
class TestMisconfigured:
    async def test_the_error_that_caused_it_is_not_kept(self) -> None:
        """Fault: the frames of its traceback had the connection, and so the password."""
        # Once it is imported, a copy of an error has the traceback and the context as well.
        pytest.importorskip("distributed")
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


class Interrupted(MemoryPace):
    """A pace whose store turns a cancellation into an error of its connection."""

    def open(self) -> Store:
        store = super().open()
        lease = store.lease

        async def interrupted(*args: object) -> Lease:
            try:
                return await lease(*args)  # type: ignore[arg-type]  # passed on.
            except asyncio.CancelledError:
                raise ConnectionError("the connection was closed") from None

        vars(store)["lease"] = interrupted
        return store


@in_virtual_time
class TestEnd:
    async def test_closing_ends_the_request_and_the_connection_and_nothing_is_asked_later(
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
        assert (pace.opened, pace.closed) == (1, 1)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert caplog.records == []

    async def test_a_connection_that_cannot_be_closed_does_not_matter(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        pace = MemoryPace(rate=100)
        member = Member(pace)
        await member.attempt()
        pace.error = OSError("gone")
        await member.close()

        assert pace.closed == 1
        assert [record for record in caplog.records if record.levelname != "DEBUG"] == []

    @pytest.mark.parametrize("attempts", [1, 0])
    def test_the_connection_is_opened_at_first_use_and_closed_with_the_loop(
        self, attempts: int
    ) -> None:
        """Fault: connections of a session that was not closed are left to the garbage collector."""
        pace = MemoryPace(rate=100)

        async def scenario() -> Member:
            member = Member(pace)
            for _ in range(attempts):
                await member.attempt()
            assert pace.closed == 0
            return member

        virtual_time.run(scenario())

        assert (pace.opened, pace.closed) == (attempts, attempts)
