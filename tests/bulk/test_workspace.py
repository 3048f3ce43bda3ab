"""`stop_workspace`: list the runtimes of a workspace, and stop those that match."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import ClassVar

import pytest
from support.helpers import (
    BOUND,
    Bulk,
    Connect,
    add_runtimes,
    await_batch,
    counted_turns,
    pass_time,
    wait_for_requests,
)
from support.servers import http_answer, served

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlNotFoundError,
    BctrlResponseError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    RuntimeFilter,
    StopOutcome,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, NOT_FOUND, NOT_SENT = (
    StopResult.STOPPED,
    StopResult.NOT_FOUND,
    StopResult.NOT_SENT,
)
REJECTED, UNKNOWN, ACCEPTED = (
    StopResult.REJECTED,
    StopResult.UNKNOWN,
    StopResult.ACCEPTED,
)
Where = Callable[[Runtime], object]


@pytest.fixture(autouse=True)
def _runtimes(emulator: Emulator) -> None:
    """Add three active runtimes, two that have ended, and one elsewhere."""
    emulator.add_runtime("ws-1", "table", kind="spreadsheet")
    emulator.add_runtime("ws-1", "a/b")
    emulator.add_runtime("ws-1", "done", status="stopped")
    emulator.add_runtime("ws-1", "broken", status="failed")
    emulator.add_runtime("ws-2", "crm")


def aliases_stopped(bulk: Bulk) -> set[str | None]:
    return {request.alias for request in bulk.emulator.stops}


async def match_none(_: Runtime) -> bool:
    return False


class TestSelection:
    @pytest.mark.parametrize(
        ("where", "aliases"),
        [
            (None, {"crm", "table", "a/b", "new"}),
            (RuntimeFilter(kind="spreadsheet"), {"table"}),
            (RuntimeFilter(status="active"), {"crm", "table", "a/b"}),
            # A function selects runtimes of any status.
            (lambda runtime: runtime.alias in {"crm", "done"}, {"crm", "done"}),
            (lambda _: False, set()),
        ],
    )
    async def test_what_runs_or_is_selected_is_stopped(
        self, bulk: Bulk, where: Where | None, aliases: set[str]
    ) -> None:
        bulk.emulator.add_runtime("ws-1", "new")
        # A status that is unknown to this version may be of a runtime that runs.
        bulk.emulator.runtimes["ws-1", "new"]["status"] = "starting"
        report = await bulk.session.stop_workspace("ws-1", where=where)

        assert (report.ok, report.total) == (True, len(aliases))
        assert aliases_stopped(bulk) == aliases
        assert bulk.emulator.status("ws-2", "crm") == "active"
        # All workers share one list; the last look is another.
        lists = sum(request.alias is None for request in bulk.emulator.requests)
        assert lists == (2 if aliases else 1)

    @pytest.mark.parametrize("raised", [ZeroDivisionError(), asyncio.CancelledError()])
    async def test_a_function_that_raises_stops_nothing(
        self, bulk: Bulk, raised: BaseException
    ) -> None:
        calls: list[Runtime] = []

        def where(runtime: Runtime) -> bool:
            calls.append(runtime)
            if len(calls) == 1:
                raise raised
            return True

        batch = bulk.session.stop_workspace("ws-1", where=where)
        with pytest.raises((ZeroDivisionError, BctrlError)):
            await batch

        # No worker fetched the list again.
        assert len(bulk.emulator.requests) == len(calls) == 1
        assert f"the input raised {type(raised).__name__}" in str(
            batch.report.ended_early
        )
        assert not batch.report.ok

    @pytest.mark.parametrize(
        "where",
        [
            match_none,
            lambda _: asyncio.get_running_loop().create_future(),
            lambda listed: listed.alias.startswith,  # The call is forgotten.
            str,
        ],
    )
    async def test_a_function_that_returns_no_bool_stops_nothing(
        self, bulk: Bulk, where: Where
    ) -> None:
        with pytest.raises(BctrlConfigError, match="a plain function"):
            await bulk.session.stop_workspace("ws-1", where=where)
        assert bulk.emulator.received.total() == 0

    async def test_other_tasks_run_meanwhile(self, bulk: Bulk) -> None:
        add_runtimes(bulk.emulator, 5_000)
        moments = set()

        def where(_: Runtime) -> bool:
            moments.add(turns())
            return False

        with counted_turns() as turns:
            await bulk.session.stop_workspace("ws-1", where=where)

        assert len(moments) >= 5


class TestUnreadable:
    async def test_an_unreadable_runtime_is_rejected(self, emulator: Emulator) -> None:
        runtime = dict(emulator.runtimes["ws-1", "crm"])
        listed = json.dumps({"runtimes": [runtime, {"alias": "odd"}, 7]}).encode()
        stopped = json.dumps(runtime | {"status": "stopped"}).encode()

        async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
            writer.write(
                http_answer("200 OK", stopped if head.startswith(b"POST") else listed)
            )

        async with served(handle) as session:
            report = await session.stop_workspace("ws-1")

        assert report.counts == {STOPPED: 1, REJECTED: 2}
        assert {outcome.target for outcome in report.failures} == {
            ("ws-1", "odd"),
            ("ws-1", ""),
        }
        for outcome in report.failures:
            assert isinstance(outcome.error, BctrlResponseError)
            assert not outcome.error.may_have_stopped
            assert outcome.attempts == 0

    async def test_a_runtime_of_unknown_age_is_rejected(self, bulk: Bulk) -> None:
        bulk.emulator.runtimes["ws-1", "table"]["createdAt"] = "2020-01-01T00:00:00"
        where = RuntimeFilter(kind="spreadsheet", older_than=3600)
        report = await bulk.session.stop_workspace("ws-1", where=where)

        [failure] = report.failures
        assert (failure.target, failure.result) == (("ws-1", "table"), REJECTED)
        assert str(failure.error) == (
            "list of 'table' in workspace 'ws-1': its age cannot be read: "
            "'2020-01-01T00:00:00' is not an ISO 8601 date and time with a UTC offset. "
            "Stop it by its alias, or select it without its age"
        )
        assert "table" not in aliases_stopped(bulk)

    @pytest.mark.parametrize(
        ("where", "status"),
        [
            (RuntimeFilter(older_than=3600, kind="browser"), "active"),
            (RuntimeFilter(older_than=3600, status="any"), "stopped"),
        ],
    )
    async def test_it_is_left_out_if_it_cannot_match(
        self, bulk: Bulk, where: RuntimeFilter, status: str
    ) -> None:
        bulk.emulator.add_runtime(
            "ws-1", "table", kind="spreadsheet", status=status, created_at="2020-01-01"
        )
        assert (
            REJECTED
            not in (await bulk.session.stop_workspace("ws-1", where=where)).counts
        )
        assert "table" not in aliases_stopped(bulk)


class TestListedRuntime:
    FAILURES: ClassVar[
        dict[str, tuple[str, Fault | Reply, StopResult, bool | None]]
    ] = {
        "is forbidden": ("crm", Reply(403), REJECTED, True),
        "is forbidden, but it had ended": ("done", Reply(403), REJECTED, None),
        # Each of these requests may have stopped it since the list, or says more than
        # the list.
        "fails": ("crm", Fault.SERVER_ERROR, UNKNOWN, None),
        "is not confirmed": ("crm", Reply(200, body={}), ACCEPTED, None),
        "is too late": ("crm", Reply(404, code="runtime.not_found"), NOT_FOUND, None),
    }

    @pytest.mark.parametrize("case", FAILURES)
    async def test_it_still_runs_only_if_its_stop_had_no_effect_for_certain(
        self, emulator: Emulator, connect: Connect, case: str
    ) -> None:
        alias, reply, result, is_running = self.FAILURES[case]
        emulator.inject(reply, alias=alias)
        emulator.inject(Reply(403), alias=alias, method="GET")
        async with connect(retry=RetryPolicy(attempts=1)) as session:
            [listed] = [
                it for it in await session.list_runtimes("ws-1") if it.alias == alias
            ]
            report = await session.stop_workspace(
                "ws-1", where=lambda runtime: runtime.alias == alias
            )

        [failure] = report.failures
        assert (failure.result, failure.running) == (result, is_running)
        assert failure.runtime == (listed if is_running else None)

    async def test_what_was_not_sent_is_as_listed(self, bulk: Bulk) -> None:
        stopped: list[datetime] = []

        def stop_reading(outcome: StopOutcome) -> None:
            if outcome.ok:
                stopped.append(outcome.at)
            batch.stop_reading()

        batch = bulk.session.stop_workspace(
            "ws-1", concurrency=1, on_outcome=stop_reading
        )
        report = await batch

        assert (report.running, report.not_running) == (2, 1)
        assert [failure.result for failure in report.failures] == [NOT_SENT] * 2
        # They were listed before anything was stopped.
        assert all(failure.at < min(stopped) for failure in report.failures)

    async def test_it_is_as_old_as_the_answer(self, bulk: Bulk) -> None:
        """Fault: another run had stopped it, while the list was made."""
        listed = json.dumps(
            {"runtimes": [dict(bulk.emulator.runtimes["ws-1", "crm"])]}
        ).encode()
        answered: list[datetime] = []

        async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
            if head.startswith(b"GET"):
                answered.append(datetime.now(UTC))
                writer.write(http_answer("200 OK", listed))
            writer.write(http_answer("403 Forbidden"))

        async with served(handle) as session:
            report = await session.stop_workspace("ws-1")

        [failure] = report.failures
        assert failure.running is True
        assert failure.at >= answered[0]

    @pytest.mark.parametrize("order", [1, -1])
    async def test_an_alias_that_is_listed_twice_is_what_runs(
        self, bulk: Bulk, order: int
    ) -> None:
        """Fault: a condition for ended runtimes stopped what has their alias now."""
        new = dict(bulk.emulator.runtimes["ws-1", "crm"])
        listed = [new, {**new, "status": "stopped"}][::order]
        bulk.emulator.inject(*[Reply(200, body={"runtimes": listed})] * 2, method="GET")

        report = await bulk.session.stop_workspace(
            "ws-1", where=lambda runtime: runtime.status.is_final
        )
        assert (report.ok, report.total, aliases_stopped(bulk)) == (True, 0, set())

        report = await bulk.session.stop_workspace("ws-1", where=lambda _: True)
        assert report.counts == {STOPPED: 1}


class TestListing:
    async def test_its_error_is_raised(self, bulk: Bulk) -> None:
        batch = bulk.session.stop_workspace("ws-9")
        with pytest.raises(
            BctrlNotFoundError, match="list of workspace 'ws-9': "
        ) as caught:
            await batch

        assert batch.report.ended_early is caught.value
        assert (batch.report.ok, batch.report.total) == (False, 0)
        assert aliases_stopped(bulk) == set()

    @pytest.mark.moves_clock
    async def test_it_is_retried_and_timed_out(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.inject(Fault.SERVER_ERROR, Fault.HANG, method="GET")
        policy = RetryPolicy(attempts=2, base=0.001)
        async with connect(timeout=1000) as session:
            batch = session.stop_workspace("ws-1", timeout=40, retry=policy)
            running = asyncio.create_task(await_batch(batch))
            await wait_for_requests(emulator, 2)
            pass_time(40)
            with pytest.raises(BctrlError, match="2 attempts"):
                await asyncio.wait_for(running, BOUND)

            emulator.inject(Fault.SERVER_ERROR, method="GET")
            assert (await session.stop_workspace("ws-1", retry=policy)).counts == {
                STOPPED: 3
            }

    @pytest.mark.parametrize(
        "end",
        [
            "stop_reading",
            "abort",
            "cancel",
            pytest.param("deadline", marks=pytest.mark.moves_clock),
            "at once",
        ],
    )
    async def test_it_can_be_interrupted(self, bulk: Bulk, end: str) -> None:
        bulk.emulator.inject(Fault.HANG, method="GET")
        batch = bulk.session.stop_workspace("ws-1", deadline=30)
        if end == "at once":
            batch.stop_reading()
        running = asyncio.create_task(await_batch(batch))
        if end != "at once":
            await wait_for_requests(bulk.emulator, 1)
        ends: dict[str, Callable[[], object]] = {
            "stop_reading": batch.stop_reading,
            "abort": batch.abort,
            "cancel": running.cancel,
            "deadline": lambda: pass_time(30),
        }
        ends.get(end, lambda: None)()
        await asyncio.wait([running], timeout=BOUND)

        assert running.cancelled() is (end == "cancel")
        assert isinstance(batch.report.ended_early, BctrlError)
        assert (batch.report.ok, batch.report.total) == (False, 0)
        assert aliases_stopped(bulk) == set()
        assert len(bulk.emulator.requests) == (end != "at once")

    async def test_an_invalid_id_is_rejected_at_once(
        self, session: BctrlSession
    ) -> None:
        with pytest.raises(BctrlConfigError, match="workspace id"):
            session.stop_workspace("..")
