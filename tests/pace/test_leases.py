"""A rate shared by several limiters through leases, in virtual time."""

import asyncio
import gc
import logging
import math
import weakref

import pytest
import virtual_time
from pacing import Member, MemoryPace, jain, most_in_a_window
from throttling import throttled

from bctrl_async import BctrlConfigError
from bctrl_async._limiter.limiter import Limiter, Priority
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async.pace import Pace
from bctrl_async.pace._leases import LEASE, Lease, Store


def now() -> float:
    return asyncio.get_running_loop().time()


async def run_all(members: list[Member], count: int) -> float:
    """Run a bulk in every member; return the seconds that all took."""
    await asyncio.gather(*(member.bulk(count) for member in members))
    for member in members:
        await member.close()
    return now()


class TestSharing:
    @pytest.mark.parametrize(
        ("count", "rate", "ideal"), [(1, 195, 10), (8, 195, 10), (16, 1950, 4)]
    )
    def test_together_they_use_the_whole_rate_in_equal_parts(
        self, count: int, rate: int, ideal: int
    ) -> None:
        async def scenario() -> tuple[float, list[Member]]:
            pace = MemoryPace(rate=rate)
            members = [Member(pace) for _ in range(count)]
            return await run_all(members, ideal * rate // count), members

        seconds, members = virtual_time.run(scenario())

        assert seconds <= 1.01 * ideal
        assert jain([member.between(1, ideal - 1) for member in members]) > 0.999
        assert most_in_a_window([t for member in members for t in member.starts], rate) <= 2

    @pytest.mark.parametrize("count", [1, 8])
    def test_a_round_trip_to_the_store_costs_nothing(self, count: int) -> None:
        """Fault: a member that asks when its slots are used up loses those of the round trip."""

        async def scenario() -> float:
            pace = MemoryPace(rate=195, latency=0.02)
            return await run_all([Member(pace) for _ in range(count)], 1950 // count)

        assert virtual_time.run(scenario()) <= 10.15

    def test_a_late_joiner_has_its_share_within_a_second(self) -> None:
        async def scenario() -> tuple[Member, list[Member]]:
            pace = MemoryPace(rate=195)
            first = [Member(pace) for _ in range(3)]
            late = Member(pace)

            async def join() -> None:
                await asyncio.sleep(5)
                await late.bulk(10_000, until=10)

            await asyncio.gather(*(member.bulk(10_000, until=10) for member in first), join())
            return late, first

        late, first = virtual_time.run(scenario())

        share = 195 / 4
        assert late.between(5, 6) == pytest.approx(share, rel=0.1)
        assert [m.between(6, 10) for m in first] == [pytest.approx(4 * share, rel=0.03)] * 3
        assert sum(m.between(4, 5) for m in first) == pytest.approx(195, abs=2)

    def test_a_member_that_dies_costs_one_lease(self) -> None:
        async def scenario() -> int:
            pace = MemoryPace(rate=195)
            members = [Member(pace) for _ in range(3)]
            dying = asyncio.create_task(members[0].bulk(10_000))
            living = [asyncio.create_task(m.bulk(10_000, until=10)) for m in members[1:]]
            await asyncio.sleep(5.001)
            dying.cancel()
            await asyncio.gather(*living)
            return sum(member.between(5.001, 10) for member in members)

        assert virtual_time.run(scenario()) >= 195 * 5 - 195 * LEASE - 1

    def test_an_idle_member_takes_nothing_from_the_others(self) -> None:
        async def scenario() -> int:
            pace = MemoryPace(rate=195)
            busy, idle = Member(pace), Member(pace)
            await idle.attempt()
            await busy.bulk(10_000, until=5)
            return busy.between(1, 5)

        assert virtual_time.run(scenario()) == pytest.approx(4 * 195, abs=2)

    def test_a_single_attempt_leases_a_single_slot(self) -> None:
        async def scenario() -> list[int]:
            pace = MemoryPace(rate=1000)
            member = Member(pace)
            for _ in range(3):
                await member.attempt()
                await asyncio.sleep(1)
            return pace.asked_for

        assert virtual_time.run(scenario()) == [1, 1, 1]

    def test_attempts_in_quick_succession_lease_more_slots_each_time(self) -> None:
        async def scenario() -> tuple[int, int]:
            pace = MemoryPace(rate=1000)
            member = Member(pace, limit=1, latency=0.001)
            for _ in range(100):
                await member.attempt()
            return max(pace.asked_for), len(pace.calls)

        most, calls = virtual_time.run(scenario())

        assert (most, calls) == (64, 7)

    def test_a_slot_is_lost_one_lease_after_its_time(self) -> None:
        """Fault: a member that was idle for two leases starts both at once."""

        async def scenario() -> int:
            pace = MemoryPace(rate=1000)
            member = Member(pace, latency=0.0)
            abandoned = asyncio.gather(*(member.attempt() for _ in range(50)))
            await asyncio.sleep(0.001)
            abandoned.cancel()
            await asyncio.sleep(LEASE + 0.04)
            began = now()
            await member.bulk(100)
            return member.between(began, began + 0.0005)

        # The fifty slots of the first lease were due in its 0.05 s: 0.04 s of them are lost.
        assert virtual_time.run(scenario()) == pytest.approx(10, abs=2)

    def test_those_that_have_a_slot_ask_for_no_other(self) -> None:
        async def scenario() -> list[int]:
            pace = MemoryPace(rate=1000, latency=0.02)
            member = Member(pace)
            await asyncio.gather(*(member.attempt() for _ in range(60)))
            return pace.asked_for

        # Fifty are in the first lease, and of these some still wait when the second is asked for.
        assert virtual_time.run(scenario()) == [60, 10]

    def test_single_stops_wait_for_milliseconds_beside_bulks_in_other_processes(self) -> None:
        async def scenario() -> list[float]:
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
            return sorted(waits)

        waits = virtual_time.run(scenario())

        assert waits[int(0.99 * len(waits))] < 0.1


class TestPriorities:
    def test_single_stops_wait_for_milliseconds_beside_a_bulk_in_their_session(self) -> None:
        """Fault: a single stop waits behind a hundred targets, half a second at 200 a second."""

        async def scenario() -> tuple[list[float], int]:
            member = Member(MemoryPace(rate=200))
            running = asyncio.create_task(member.bulk(10_000, until=20))
            await asyncio.sleep(1)
            waits = []
            while now() < 19:
                waits.append(await member.attempt())
                await asyncio.sleep(0.05)
            await running
            return sorted(waits), len(member.starts)

        waits, starts = virtual_time.run(scenario())

        assert waits[int(0.99 * len(waits))] < 0.05
        assert starts == pytest.approx(200 * 20, abs=100)

    def test_a_bulk_keeps_a_fifth_if_single_stops_could_use_everything(self) -> None:
        async def scenario() -> tuple[int, int]:
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
            return started, len(member.starts)

        singles, starts = virtual_time.run(scenario())

        assert singles == pytest.approx(0.8 * starts, rel=0.1)

    def test_a_retry_goes_before_the_turn_of_the_bulk(self) -> None:
        async def scenario() -> list[str]:
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
            return order

        assert virtual_time.run(scenario()) == ["single"] * 5 + ["retry", "bulk", "single"]

    def test_waiting_single_stops_go_on_when_the_bulk_is_cancelled_at_its_turn(self) -> None:
        async def scenario() -> int:
            member = Member(MemoryPace(rate=10), latency=0.0)
            bulk = asyncio.create_task(member.bulk(100))
            await asyncio.sleep(0)
            singles = [asyncio.create_task(member.attempt()) for _ in range(20)]
            while sum(single.done() for single in singles) < 4:
                await asyncio.sleep(0.01)
            bulk.cancel()
            await asyncio.wait_for(asyncio.gather(*singles), 60)
            return len(singles)

        assert virtual_time.run(scenario()) == 20


class LibraryError(Exception):
    """An error of the client of a store."""


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
    def test_a_store_that_was_never_there_leaves_the_whole_rate(
        self, error: BaseException, named: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario() -> tuple[float, Member, MemoryPace]:
            pace = MemoryPace(rate=100)
            pace.error = error
            member = Member(pace)
            await member.bulk(1000)
            return now(), member, pace

        seconds, member, pace = virtual_time.run(scenario())

        assert seconds == pytest.approx(10, abs=0.1)
        assert most_in_a_window(member.starts, 100) <= 4
        assert len(pace.calls) == pytest.approx(10, abs=1), "it is asked once a second"
        [warning] = caplog.records
        assert warning.getMessage() == (
            f"the shared pace cannot be asked ({type(error).__name__}{named}): this session goes "
            "on with 100 attempts a second, its share of 1"
        )

    def test_attempts_that_are_late_by_a_timer_are_made_up_for(self) -> None:
        async def scenario() -> float:
            pace = MemoryPace(rate=100)
            pace.error = ConnectionRefusedError("refused")
            member = Member(pace, latency=0.008, limit=1)
            for _ in range(100):
                # Longer than the rate says, and then as much shorter.
                member.latency = 0.02 - member.latency
                await member.attempt()
            return now()

        assert virtual_time.run(scenario()) == pytest.approx(1.0, abs=0.02)

    def test_a_store_that_goes_away_leaves_each_its_share(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario() -> list[Member]:
            pace = MemoryPace(rate=200)
            members = [Member(pace) for _ in range(4)]
            running = [asyncio.create_task(m.bulk(10_000, until=9)) for m in members]
            await asyncio.sleep(3)
            pace.error = ConnectionResetError()
            await asyncio.sleep(3)
            pace.error = None
            await asyncio.gather(*running)
            return members

        with caplog.at_level(logging.WARNING):
            members = virtual_time.run(scenario())

        assert [m.between(3.2, 5.8) for m in members] == [pytest.approx(2.6 * 50, rel=0.1)] * 4
        assert sum(m.between(7, 9) for m in members) == pytest.approx(400, abs=10)
        starts = sorted(start for m in members for start in m.starts)
        assert most_in_a_window(starts, 200) <= 200 * 2 * LEASE + 8
        messages = [record.getMessage() for record in caplog.records]
        assert sum("50 attempts a second, its share of 4" in each for each in messages) == 4
        assert sum("the shared pace is used again, after" in each for each in messages) == 4
        assert len(messages) == 8

    def test_no_attempt_waits_longer_than_a_quarter_of_a_second_for_one_that_hangs(self) -> None:
        async def scenario() -> tuple[list[float], list[float]]:
            pace = MemoryPace(rate=100)
            member = Member(pace)
            await member.attempt()
            pace.latency = math.inf
            waits = []
            while now() < 10:
                waits.append(await member.attempt())
            return waits, pace.calls

        waits, calls = virtual_time.run(scenario())

        assert waits[0] == pytest.approx(0.25)
        assert max(waits[1:]) <= 0.01
        assert len(calls) == pytest.approx(10, abs=1)

    def test_a_connection_that_is_slow_at_first_is_used_once_it_is_there(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario() -> tuple[int, int]:
            pace = MemoryPace(rate=100, latency=0.6)
            member = Member(pace)
            await member.attempt()
            pace.latency = 0.001
            await asyncio.sleep(1)
            await member.bulk(200)
            return len(pace.calls), sum("used again" in r.getMessage() for r in caplog.records)

        calls, came_back = virtual_time.run(scenario())

        assert calls > 10
        assert came_back == 1

    def test_a_store_that_always_answers_late_gives_one_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario() -> None:
            member = Member(MemoryPace(rate=100, latency=0.3))
            await member.bulk(500)

        virtual_time.run(scenario())

        assert len(caplog.records) == 1
        assert "(no answer within 0.25 s)" in caplog.text

    def test_a_pace_that_cannot_be_opened_is_asked_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(Pace):
            opened = 0

            def open(self) -> Store:
                self.opened += 1
                raise OSError("no such device")

        async def scenario() -> int:
            pace = Broken(rate=100)
            member = Member(pace)
            await member.bulk(250)
            await member.close()
            return pace.opened

        assert virtual_time.run(scenario()) == 3
        assert "(OSError: no such device)" in caplog.text

    def test_a_request_that_is_cancelled_from_outside_is_made_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fault: code that cancelled all other tasks left the waiters without any timer."""

        async def scenario() -> float:
            pace = MemoryPace(rate=100, latency=0.02)
            member = Member(pace)
            others = asyncio.all_tasks()
            bulk = asyncio.create_task(member.bulk(200))
            await asyncio.sleep(0.01)
            workers = {task for task in asyncio.all_tasks() if "work" in repr(task.get_coro())}
            (request,) = asyncio.all_tasks() - others - workers - {bulk}
            request.cancel()
            await bulk
            return now()

        assert virtual_time.run(scenario()) == pytest.approx(2.05, abs=0.1)
        assert caplog.records == []

    def test_the_learned_limit_stays_beneath(self) -> None:
        async def scenario() -> int:
            member = Member(MemoryPace(rate=1000))
            await member.limiter.acquire(60)
            member.limiter.release(throttled(0.1))
            before = now()
            await member.bulk(10)
            return member.between(before, before + 0.4)

        assert virtual_time.run(scenario()) == 0


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
    def test_an_answer_that_cannot_be_holds_up_nothing(
        self, answer: Lease, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fault: one slot in years, or a busy loop, as a store said."""

        async def scenario() -> float:
            pace = MemoryPace(rate=100)
            pace.answer = answer
            await Member(pace).bulk(200)
            return now()

        assert virtual_time.run(scenario()) == pytest.approx(2, abs=0.1)
        assert len(caplog.records) == 1
        assert "cannot be asked (its answer makes no sense)" in caplog.text

    def test_an_answer_as_of_a_thousand_members_is_believed(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario() -> float:
            pace = MemoryPace(rate=100)
            pace.answer = Lease(1, 20.0, 1000)
            await Member(pace).attempt()
            return now()

        assert virtual_time.run(scenario()) >= 20
        assert caplog.records == []


class TestMisconfigured:
    def test_calls_fail_with_the_error_and_the_store_is_asked_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Fault: each process went on with the whole rate, for ever."""

        async def scenario() -> tuple[list[object], int]:
            pace = MemoryPace(rate=100)
            pace.error = BctrlConfigError("wrong password", argument="pace")
            member = Member(pace)
            waiting = [member.attempt() for _ in range(3)]
            failures: list[object] = await asyncio.gather(*waiting, return_exceptions=True)
            failures += await asyncio.gather(member.attempt(), return_exceptions=True)
            await asyncio.sleep(10)
            await member.close()
            return failures, len(pace.calls)

        failures, calls = virtual_time.run(scenario())

        # Each has its own, for a call adds to the error what it was about.
        assert len({id(failure) for failure in failures}) == 4
        for failure in failures:
            assert isinstance(failure, BctrlConfigError)
            assert (failure.summary, failure.argument) == ("wrong password", "pace")
        assert calls == 1
        assert caplog.records == []

    def test_the_error_that_caused_it_is_not_kept(self) -> None:
        """Fault: the frames of its traceback had the connection, and so the password."""
        # Once it is imported, a copy of an error has the traceback and the context as well.
        pytest.importorskip("distributed")

        async def scenario() -> None:
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

        virtual_time.run(scenario())

    def test_after_the_first_lease_it_is_a_store_that_is_away(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario() -> float:
            pace = MemoryPace(rate=100)
            member = Member(pace)
            await member.attempt()
            pace.error = BctrlConfigError("wrong password")
            await member.bulk(200)
            return now()

        assert virtual_time.run(scenario()) == pytest.approx(2, abs=0.1)
        assert "(BctrlConfigError: wrong password)" in caplog.text


class TestEnd:
    def test_closing_ends_the_request_and_the_connection_and_nothing_is_asked_later(self) -> None:
        async def scenario() -> tuple[int, int, set[asyncio.Task[object]]]:
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
            return pace.opened, pace.closed, asyncio.all_tasks() - {asyncio.current_task()}

        assert virtual_time.run(scenario()) == (1, 1, set())

    def test_a_request_that_closing_interrupts_is_no_failure_of_the_store(
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

        async def scenario() -> None:
            member = Member(Interrupted(rate=100))
            waiting = asyncio.create_task(member.attempt())
            await asyncio.sleep(0.1)
            await member.close()
            with pytest.raises(BctrlConfigError, match="the session is closed"):
                await waiting

        virtual_time.run(scenario())

        assert caplog.records == []

    def test_a_connection_that_cannot_be_closed_does_not_matter(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario() -> int:
            pace = MemoryPace(rate=100)
            member = Member(pace)
            await member.attempt()
            pace.error = OSError("gone")
            await member.close()
            return pace.closed

        assert virtual_time.run(scenario()) == 1
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
