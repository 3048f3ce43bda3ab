"""A rate shared by several limiters through leases, in virtual time."""

import asyncio
import gc
import math
import weakref

import pytest
import virtual_time
from pacing import Member, MemoryPace, jain, most_in_a_window
from throttling import throttled
from virtual_time import in_virtual_time, now

from bctrl_async import BctrlConfigError
from bctrl_async._limiter.limiter import Limiter, Priority
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async.pace import Pace
from bctrl_async.pace._leases import LEASE, Lease, Store


async def run_all(members: list[Member], count: int) -> float:
    """Run a bulk in every member; return the seconds that all took."""
    await asyncio.gather(*(member.bulk(count) for member in members))
    for member in members:
        await member.close()
    return now()


@in_virtual_time
class TestSharing:
    @pytest.mark.parametrize(
        ("count", "rate", "ideal"), [(1, 195, 10), (8, 195, 10), (16, 1950, 4)]
    )
    async def test_together_they_use_the_whole_rate_in_equal_parts(
        self, count: int, rate: int, ideal: int
    ) -> None:
        pace = MemoryPace(rate=rate)
        members = [Member(pace) for _ in range(count)]

        seconds = await run_all(members, ideal * rate // count)

        assert seconds <= 1.01 * ideal
        assert jain([member.between(1, ideal - 1) for member in members]) > 0.999
        assert most_in_a_window([t for member in members for t in member.starts], rate) <= 2

    @pytest.mark.parametrize("count", [1, 8])
    async def test_a_round_trip_to_the_store_costs_nothing(self, count: int) -> None:
        """Fault: a member that asks when its slots are used up loses those of the round trip."""
        pace = MemoryPace(rate=195, latency=0.02)

        assert await run_all([Member(pace) for _ in range(count)], 1950 // count) <= 10.15

    async def test_a_late_joiner_has_its_share_within_a_second(self) -> None:
        pace = MemoryPace(rate=195)
        first = [Member(pace) for _ in range(3)]
        late = Member(pace)

        async def join() -> None:
            await asyncio.sleep(5)
            await late.bulk(10_000, until=10)

        await asyncio.gather(*(member.bulk(10_000, until=10) for member in first), join())

        share = 195 / 4
        assert late.between(5, 6) == pytest.approx(share, rel=0.1)
        assert [m.between(6, 10) for m in first] == [pytest.approx(4 * share, rel=0.03)] * 3
        assert sum(m.between(4, 5) for m in first) == pytest.approx(195, abs=2)

    async def test_a_member_that_dies_costs_one_lease(self) -> None:
        pace = MemoryPace(rate=195)
        members = [Member(pace) for _ in range(3)]
        dying = asyncio.create_task(members[0].bulk(10_000))
        living = [asyncio.create_task(m.bulk(10_000, until=10)) for m in members[1:]]
        await asyncio.sleep(5.001)
        dying.cancel()
        await asyncio.gather(*living)

        assert sum(member.between(5.001, 10) for member in members) >= 195 * 5 - 195 * LEASE - 1

    async def test_a_single_attempt_leases_a_single_slot(self) -> None:
        pace = MemoryPace(rate=1000)
        member = Member(pace)
        for _ in range(3):
            await member.attempt()
            await asyncio.sleep(1)

        assert pace.asked_for == [1, 1, 1]

    async def test_attempts_in_quick_succession_lease_more_slots_each_time(self) -> None:
        pace = MemoryPace(rate=1000)
        member = Member(pace, limit=1, latency=0.001)
        for _ in range(100):
            await member.attempt()

        assert (max(pace.asked_for), len(pace.calls)) == (64, 7)

    async def test_a_slot_is_lost_one_lease_after_its_time(self) -> None:
        """Fault: a member that was idle for two leases starts both at once."""
        pace = MemoryPace(rate=1000)
        member = Member(pace, latency=0.0)
        abandoned = asyncio.gather(*(member.attempt() for _ in range(50)))
        await asyncio.sleep(0.001)
        abandoned.cancel()
        await asyncio.sleep(LEASE + 0.04)
        began = now()
        await member.bulk(100)

        # The fifty slots of the first lease were due in its 0.05 s: 0.04 s of them are lost.
        assert member.between(began, began + 0.0005) == pytest.approx(10, abs=2)

    async def test_those_that_have_a_slot_ask_for_no_other(self) -> None:
        pace = MemoryPace(rate=1000, latency=0.02)
        member = Member(pace)
        await asyncio.gather(*(member.attempt() for _ in range(60)))

        # Fifty are in the first lease, and of these some still wait when the second is asked for.
        assert pace.asked_for == [60, 10]

    async def test_single_stops_wait_for_milliseconds_beside_bulks_in_other_processes(self) -> None:
        pace = MemoryPace(rate=195)
        bulks = [Member(pace) for _ in range(7)]
        single = Member(pace)
        running = [asyncio.create_task(bulk.bulk(10_000, until=20)) for bulk in bulks]
        waits = []
        await asyncio.sleep(1)
        while now() < 19:
            waits.append(await single.attempt())
            await asyncio.sleep(0.05)
        await asyncio.gather(*running)

        assert sorted(waits)[int(0.99 * len(waits))] < 0.1


@in_virtual_time
class TestPriorities:
    async def test_single_stops_wait_for_milliseconds_beside_a_bulk_in_their_session(self) -> None:
        """Fault: a single stop waits behind a hundred targets, half a second at 200 a second."""
        member = Member(MemoryPace(rate=200))
        running = asyncio.create_task(member.bulk(10_000, until=20))
        await asyncio.sleep(1)
        waits = []
        while now() < 19:
            waits.append(await member.attempt())
            await asyncio.sleep(0.05)
        await running

        assert sorted(waits)[int(0.99 * len(waits))] < 0.05
        assert len(member.starts) == pytest.approx(200 * 20, abs=100)

    async def test_a_bulk_keeps_a_fifth_if_single_stops_could_use_everything(self) -> None:
        member = Member(MemoryPace(rate=200))
        started = 0

        async def use() -> None:
            nonlocal started
            while now() < 10:
                await member.attempt()
                started += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(150):
                group.create_task(use())
            group.create_task(member.bulk(10_000, until=10))

        assert started == pytest.approx(0.8 * len(member.starts), rel=0.1)

    async def test_a_retry_goes_before_the_turn_of_the_bulk(self) -> None:
        limiter = Limiter(1, AdaptiveRate())
        order: list[str] = []

        async def use(name: str, priority: Priority) -> None:
            await limiter.acquire(60, priority)
            order.append(name)
            await asyncio.sleep(1)
            limiter.release("a runtime")

        async with asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(use("single", Priority.SINGLE))
            group.create_task(use("bulk", Priority.BULK))
            # The bulk waits while four go before it, so the next turn is its own.
            while len(order) < 5:
                await asyncio.sleep(0.5)
            group.create_task(use("retry", Priority.RETRY))

        assert order == ["single"] * 5 + ["retry", "bulk", "single"]

    async def test_waiting_single_stops_go_on_when_the_bulk_is_cancelled_at_its_turn(self) -> None:
        member = Member(MemoryPace(rate=10), latency=0.0)
        bulk = asyncio.create_task(member.bulk(100))
        await asyncio.sleep(0)
        singles = [asyncio.create_task(member.attempt()) for _ in range(20)]
        while sum(single.done() for single in singles) < 4:
            await asyncio.sleep(0.01)
        bulk.cancel()
        async with asyncio.timeout(60):
            await asyncio.gather(*singles)


class LibraryError(Exception):
    """An error of the client of a store."""


@in_virtual_time
class TestWithoutStore:
    @pytest.mark.parametrize(
        ("error", "named"),
        [
            # Fault: the text of an exception of a store began further lines of the log.
            (ConnectionError("refused\n  by the\r\nserver"), ": refused by the server"),
            # Fault: a request that ended with CancelledError woke nobody, for ever.
            (asyncio.CancelledError(), ""),
            (LibraryError("redis://:s3cret@redis.internal"), ""),
        ],
        ids=["an error", "a cancelled answer", "an error with a password"],
    )
    async def test_a_store_that_was_never_there_leaves_the_whole_rate(
        self, error: BaseException, named: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        pace = MemoryPace(rate=100)
        pace.error = error
        member = Member(pace)
        await member.bulk(1000)

        assert now() == pytest.approx(10, abs=0.1)
        assert most_in_a_window(member.starts, 100) <= 4
        assert len(pace.calls) == pytest.approx(10, abs=1), "it is asked once a second"
        [warning] = caplog.records
        assert warning.getMessage() == (
            f"the shared pace cannot be asked ({type(error).__name__}{named}): this session goes "
            "on with 100 attempts a second, its share of 1"
        )

    async def test_attempts_that_are_late_by_a_timer_are_made_up_for(self) -> None:
        pace = MemoryPace(rate=100)
        pace.error = ConnectionRefusedError("refused")
        member = Member(pace, latency=0.008, limit=1)
        for _ in range(100):
            # Longer than the rate says, and then as much shorter.
            member.latency = 0.02 - member.latency
            await member.attempt()

        assert now() == pytest.approx(1.0, abs=0.02)

    async def test_a_store_that_goes_away_leaves_each_its_share(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        pace = MemoryPace(rate=200)
        members = [Member(pace) for _ in range(4)]
        running = [asyncio.create_task(m.bulk(10_000, until=9)) for m in members]
        await asyncio.sleep(3)
        pace.error = ConnectionResetError()
        await asyncio.sleep(3)
        pace.error = None
        await asyncio.gather(*running)

        assert [m.between(3.2, 5.8) for m in members] == [pytest.approx(2.6 * 50, rel=0.1)] * 4
        assert sum(m.between(7, 9) for m in members) == pytest.approx(400, abs=10)
        starts = sorted(start for m in members for start in m.starts)
        assert most_in_a_window(starts, 200) <= 200 * 2 * LEASE + 8
        messages = [record.getMessage() for record in caplog.records]
        assert sum("50 attempts a second, its share of 4" in each for each in messages) == 4
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

    async def test_a_store_that_always_answers_late_gives_one_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        member = Member(MemoryPace(rate=100, latency=0.3))
        await member.bulk(500)

        assert len(caplog.records) == 1
        assert "(no answer within 0.25 s)" in caplog.text

    async def test_a_pace_that_cannot_be_opened_is_asked_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(Pace):
            opened = 0

            def open(self) -> Store:
                self.opened += 1
                raise OSError("no such device")

        pace = Broken(rate=100)
        member = Member(pace)
        await member.bulk(250)
        await member.close()

        assert pace.opened == 3
        assert "(OSError: no such device)" in caplog.text

    async def test_a_request_that_is_cancelled_from_outside_is_made_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fault: code that cancelled all other tasks left the waiters without any timer."""
        pace = MemoryPace(rate=100, latency=0.02)
        member = Member(pace)
        others = asyncio.all_tasks()
        bulk = asyncio.create_task(member.bulk(200))
        await asyncio.sleep(0.01)
        workers = {task for task in asyncio.all_tasks() if "work" in repr(task.get_coro())}
        (request,) = asyncio.all_tasks() - others - workers - {bulk}
        request.cancel()
        await bulk

        assert now() == pytest.approx(2.05, abs=0.1)
        assert caplog.records == []

    async def test_the_learned_limit_stays_beneath(self) -> None:
        member = Member(MemoryPace(rate=1000))
        await member.limiter.acquire(60)
        member.limiter.release(throttled(0.1))
        before = now()
        await member.bulk(10)

        assert member.between(before, before + 0.4) == 0


@in_virtual_time
class TestNonsense:
    @pytest.mark.parametrize(
        "answer",
        [
            Lease(1, 0.0, 10**9),
            Lease(1, 0.0, 0),
            Lease(1, 1e308, 1),
            Lease(1, math.nan, 1),
            Lease(1, -1.0, 1),
            Lease(10**9, 0.0, 1),
            Lease(0, 0.0, 1),
            Lease(-1, 0.0, 1),
        ],
        ids=str,
    )
    async def test_an_answer_that_cannot_be_holds_up_nothing(
        self, answer: Lease, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fault: one slot in years, or a busy loop, as a store said."""
        pace = MemoryPace(rate=100)
        pace.answer = answer
        await Member(pace).bulk(200)

        assert now() == pytest.approx(2, abs=0.1)
        assert len(caplog.records) == 1
        assert "cannot be asked (its answer makes no sense)" in caplog.text

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
    async def test_calls_fail_with_the_error_and_the_store_is_asked_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fault: each process went on with the whole rate, for ever."""
        pace = MemoryPace(rate=100)
        pace.error = BctrlConfigError("wrong password", argument="pace")
        member = Member(pace)
        waiting = [member.attempt() for _ in range(3)]
        failures: list[object] = await asyncio.gather(*waiting, return_exceptions=True)
        failures += await asyncio.gather(member.attempt(), return_exceptions=True)
        await asyncio.sleep(10)
        await member.close()

        # Each has its own, for a call adds to the error what it was about.
        assert len({id(failure) for failure in failures}) == 4
        for failure in failures:
            assert isinstance(failure, BctrlConfigError)
            assert (failure.summary, failure.argument) == ("wrong password", "pace")
        assert len(pace.calls) == 1
        assert caplog.records == []

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

    async def test_after_the_first_lease_it_is_a_store_that_is_away(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        pace = MemoryPace(rate=100)
        member = Member(pace)
        await member.attempt()
        pace.error = BctrlConfigError("wrong password")
        await member.bulk(200)

        assert now() == pytest.approx(2, abs=0.1)
        assert "(BctrlConfigError: wrong password)" in caplog.text


@in_virtual_time
class TestEnd:
    async def test_closing_ends_the_request_and_the_connection_and_nothing_is_asked_later(
        self,
    ) -> None:
        pace = MemoryPace(rate=100)
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

    async def test_a_request_that_closing_interrupts_is_no_failure_of_the_store(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fault: a session that closes warns that it goes on without the store."""

        class Interrupted(Pace):
            def open(self) -> Store:
                return InterruptedStore()

        class InterruptedStore:
            async def lease(self, *_: object) -> Lease:
                try:
                    await asyncio.sleep(math.inf)
                except asyncio.CancelledError:
                    raise ConnectionError("the connection was closed") from None
                raise AssertionError

            async def close(self) -> None:
                pass

        member = Member(Interrupted(rate=100))
        waiting = asyncio.create_task(member.attempt())
        await asyncio.sleep(0.1)
        await member.close()
        with pytest.raises(BctrlConfigError, match="the session is closed"):
            await waiting

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
        assert [r.levelname for r in caplog.records if r.name == "bctrl_async"] in ([], ["DEBUG"])

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
