"""`stop_workspace`: list the runtimes of a workspace, and stop those that match."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from helpers import BOUND, Connect, add_runtimes, pass_time, wait_for_requests
from servers import http_answer, raw_server

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlNotFoundError,
    BctrlResponseError,
    BctrlServerError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    RuntimeFilter,
    RuntimeState,
    StopOutcome,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.journal import read_journals

STOPPED, NOT_FOUND, NOT_SENT = StopResult.STOPPED, StopResult.NOT_FOUND, StopResult.NOT_SENT


@pytest.fixture
def workspace(emulator: Emulator) -> Emulator:
    """Three active runtimes and two inactive ones, and an active one in another workspace."""
    emulator.add_runtime("ws-1", "table", kind="spreadsheet")
    emulator.add_runtime("ws-1", "a/b")
    emulator.add_runtime("ws-1", "done", status="stopped")
    emulator.add_runtime("ws-1", "broken", status="failed")
    emulator.add_runtime("ws-2", "crm")
    return emulator


def aliases_stopped(emulator: Emulator) -> set[str | None]:
    return {request.alias for request in emulator.requests if request.method == "POST"}


class TestSelection:
    async def test_what_has_not_ended_is_stopped_by_default(
        self, workspace: Emulator, session: BctrlSession
    ) -> None:
        report = await session.stop_workspace("ws-1")

        assert report.ok
        assert report.counts == {STOPPED: 3}
        assert aliases_stopped(workspace) == {"crm", "table", "a/b"}
        assert workspace.status("ws-2", "crm") == "active"
        # All workers share one list.
        assert [request.method for request in workspace.requests].count("GET") == 1

    @pytest.mark.parametrize(
        ("where", "aliases"),
        [
            (RuntimeFilter(kind="spreadsheet"), {"table"}),
            # A function selects runtimes of any status.
            (lambda runtime: runtime.alias in {"crm", "done"}, {"crm", "done"}),
            (lambda _: False, set()),
        ],
    )
    async def test_a_filter_or_a_function_selects_runtimes(
        self,
        workspace: Emulator,
        session: BctrlSession,
        where: Callable[[Runtime], bool],
        aliases: set[str],
    ) -> None:
        report = await session.stop_workspace("ws-1", where=where)
        assert (report.ok, report.total) == (True, len(aliases))
        assert aliases_stopped(workspace) == aliases

    async def test_stop_reading_before_the_run_lists_nothing(
        self, workspace: Emulator, session: BctrlSession
    ) -> None:
        batch = session.stop_workspace("ws-1")
        batch.stop_reading()
        report = await batch

        assert report.total == 0
        assert report.ended_early is not None
        assert workspace.requests == []

    async def test_the_timeout_applies_to_the_list(
        self, workspace: Emulator, connect: Connect
    ) -> None:
        workspace.inject(Fault.HANG, method="GET")
        async with connect(timeout=1000) as session:
            running = asyncio.create_task(session.stop_workspace("ws-1", timeout=40))
            await wait_for_requests(workspace, 1)
            pass_time(40)
            async with asyncio.timeout(BOUND):
                report = await running
        assert report.counts == {STOPPED: 3}

    @pytest.mark.parametrize(
        ("error", "raised"),
        [(ZeroDivisionError(), ZeroDivisionError), (asyncio.CancelledError(), BctrlError)],
    )
    async def test_an_error_of_a_function_is_raised_and_stops_nothing(
        self,
        workspace: Emulator,
        session: BctrlSession,
        error: BaseException,
        raised: type[Exception],
    ) -> None:
        calls: list[Runtime] = []

        def where(runtime: Runtime) -> bool:
            calls.append(runtime)
            if len(calls) == 1:
                raise error
            return True

        batch = session.stop_workspace("ws-1", where=where)
        with pytest.raises(raised):
            await batch

        # No worker fetched the list again.
        assert len(workspace.requests) == len(calls) == 1
        assert f"the input raised {type(error).__name__}" in str(batch.report.ended_early)
        assert not batch.report.ok

    async def test_other_tasks_run_while_runtimes_are_selected(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        add_runtimes(emulator, 5_000)
        turns, seen = 0, set()

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        def where(_: Runtime) -> bool:
            seen.add(turns)
            return False

        counting = asyncio.create_task(count_turns())
        await session.stop_workspace("ws-1", where=where)
        counting.cancel()

        assert len(seen) >= 5

    async def test_outcomes_have_the_given_workspace_id(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        workspace = uuid.uuid4()
        emulator.add_runtime(str(workspace), "crm")
        outcomes: list[StopOutcome] = []
        async with session.stop_workspace(workspace, on_outcome=outcomes.append) as batch:
            streamed = [outcome async for outcome in batch]

        assert streamed == outcomes
        assert streamed[0].target == (str(workspace), "crm")
        assert batch.total == 1


class TestUnreadable:
    async def test_an_unreadable_runtime_is_rejected_and_the_others_are_stopped(
        self, workspace: Emulator
    ) -> None:
        runtimes = [dict(runtime) for runtime in workspace.runtimes.values()]
        body = json.dumps({"runtimes": [*runtimes[:2], {"alias": "odd"}, 7]}).encode()
        heads: list[bytes] = []

        async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
            heads.append(head)
            answer = body
            if head.startswith(b"POST"):
                alias = head.split(b"/")[5].decode()
                answer = json.dumps({**runtimes[0], "alias": alias, "status": "stopped"}).encode()
            writer.write(http_answer("200 OK", answer))

        outcomes: list[StopOutcome] = []
        async with raw_server(handle) as url, BctrlSession("key", base_url=url) as session:
            report = await session.stop_workspace("ws-1", on_outcome=outcomes.append)

        assert not report.ok
        assert report.counts == {STOPPED: 2, StopResult.REJECTED: 2}
        rejected = [outcome for outcome in outcomes if outcome.result is StopResult.REJECTED]
        assert {outcome.target for outcome in rejected} == {("ws-1", "odd"), ("ws-1", "")}
        for outcome in rejected:
            assert isinstance(outcome.error, BctrlResponseError)
            assert not outcome.error.may_have_stopped
            assert outcome.attempts == 0
        assert len(heads) == 3


@pytest.mark.parametrize(
    ("where", "is_stopped"),
    [
        (None, True),
        (RuntimeFilter(kind="spreadsheet"), True),
        (RuntimeFilter(status="active"), False),
    ],
)
async def test_a_runtime_whose_status_is_unknown_to_this_version_is_stopped_unless_left_out(
    workspace: Emulator,
    session: BctrlSession,
    where: Callable[[Runtime], bool] | None,
    *,
    is_stopped: bool,
) -> None:
    workspace.runtimes["ws-1", "table"]["status"] = "starting"
    assert (await session.stop_workspace("ws-1", where=where)).ok
    assert ("table" in aliases_stopped(workspace)) is is_stopped


class TestUnknownAge:
    async def test_a_runtime_that_may_be_old_enough_is_rejected(
        self, workspace: Emulator, session: BctrlSession
    ) -> None:
        workspace.runtimes["ws-1", "table"]["createdAt"] = "2020-01-01T00:00:00"
        where = RuntimeFilter(kind="spreadsheet", older_than=3600)
        report = await session.stop_workspace("ws-1", where=where)

        assert not report.ok
        [failure] = report.failures
        assert (failure.target, failure.result) == (("ws-1", "table"), StopResult.REJECTED)
        assert str(failure.error) == (
            "list of 'table' in workspace 'ws-1': its age cannot be read: '2020-01-01T00:00:00' is "
            "not an ISO 8601 date and time with a UTC offset. Stop it by its alias, or select it "
            "without its age"
        )
        assert "table" not in aliases_stopped(workspace)

    @pytest.mark.parametrize(
        ("where", "status"),
        [
            (RuntimeFilter(older_than=3600, kind="browser"), "active"),
            (RuntimeFilter(older_than=3600, status="any"), "stopped"),
        ],
    )
    async def test_it_is_left_out_if_something_else_speaks_against_it(
        self, workspace: Emulator, session: BctrlSession, where: RuntimeFilter, status: str
    ) -> None:
        workspace.add_runtime(
            "ws-1", "table", kind="spreadsheet", status=status, created_at="2020-01-01"
        )
        assert StopResult.REJECTED not in (await session.stop_workspace("ws-1", where=where)).counts
        assert "table" not in aliases_stopped(workspace)


class TestListedRuntime:
    @pytest.mark.parametrize(
        ("alias", "reply", "result", "state"),
        [
            ("crm", Reply(403), StopResult.REJECTED, RuntimeState.STILL_RUNNING),
            # Each of these requests may have stopped it since the list, or says more than the list.
            ("crm", Fault.SERVER_ERROR, StopResult.UNKNOWN, RuntimeState.UNCONFIRMED),
            ("crm", Reply(200, body={}), StopResult.ACCEPTED, RuntimeState.UNCONFIRMED),
            ("crm", Reply(404, code="runtime.not_found"), NOT_FOUND, RuntimeState.UNCONFIRMED),
            ("done", Reply(403), StopResult.REJECTED, RuntimeState.UNCONFIRMED),
        ],
    )
    @pytest.mark.parametrize("verify", [False, True])
    async def test_a_failed_stop_leaves_the_runtime_as_listed_if_it_still_runs(  # noqa: PLR0917 - a table.
        self,
        workspace: Emulator,
        connect: Connect,
        alias: str,
        reply: Fault | Reply,
        result: StopResult,
        state: RuntimeState,
        *,
        verify: bool,
    ) -> None:
        workspace.inject(reply, alias=alias)
        workspace.inject(*[Reply(403)] * verify, alias=alias, method="GET")
        async with connect(retry=RetryPolicy(attempts=1)) as session:
            [listed] = [it for it in await session.list_runtimes("ws-1") if it.alias == alias]
            report = await session.stop_workspace(
                "ws-1", where=lambda runtime: runtime.alias == alias, verify=verify
            )

        [failure] = report.failures
        assert (failure.result, failure.state) == (result, state)
        is_known = state is RuntimeState.STILL_RUNNING
        assert failure.runtime == (listed if is_known else None)
        assert report.states == {state: 1}

    @pytest.mark.usefixtures("workspace")
    async def test_a_stop_that_was_not_sent_leaves_the_runtime_as_listed(
        self, session: BctrlSession
    ) -> None:
        stopped: list[datetime] = []

        def stop_reading(outcome: StopOutcome) -> None:
            if outcome.ok:
                stopped.append(outcome.at)
            batch.stop_reading()

        batch = session.stop_workspace("ws-1", concurrency=1, on_outcome=stop_reading)
        report = await batch

        assert report.states == {RuntimeState.NOT_RUNNING: 1, RuntimeState.STILL_RUNNING: 2}
        assert [failure.result for failure in report.failures] == [NOT_SENT] * 2
        # They were listed before anything was stopped.
        assert all(failure.at < min(stopped) for failure in report.failures)

    async def test_a_listed_runtime_that_cannot_be_addressed_still_runs(
        self, workspace: Emulator, session: BctrlSession
    ) -> None:
        listed = {"runtimes": [dict(workspace.runtimes["ws-1", "crm"], alias="..")]}
        workspace.inject(Reply(200, body=listed), method="GET")
        report = await session.stop_workspace("ws-1")

        [failure] = report.failures
        assert (failure.result, failure.state) == (StopResult.REJECTED, RuntimeState.STILL_RUNNING)

    @pytest.mark.parametrize("order", [1, -1])
    async def test_an_alias_that_is_listed_twice_is_its_runtime_that_runs(
        self, workspace: Emulator, session: BctrlSession, order: int
    ) -> None:
        """Fault: a condition for ended runtimes stopped another one, which has their alias now."""
        new = dict(workspace.runtimes["ws-1", "crm"])
        listed = [new, {**new, "status": "stopped"}][::order]
        workspace.inject(*[Reply(200, body={"runtimes": listed})] * 2, method="GET")

        report = await session.stop_workspace("ws-1", where=lambda each: each.status.is_final)
        assert (report.ok, report.total, aliases_stopped(workspace)) == (True, 0, set())

        report = await session.stop_workspace("ws-1", where=lambda _: True)
        assert report.counts == {STOPPED: 1}

    @pytest.mark.usefixtures("workspace")
    async def test_what_another_run_has_stopped_since_the_list_does_not_run(
        self, session: BctrlSession, tmp_path: Path
    ) -> None:
        lists, stops = tmp_path / "lists", tmp_path / "stops"

        async def stop_all(_: StopOutcome) -> None:
            batch.stop_reading()
            if not stops.exists():
                await session.stop_workspace("ws-1", journal=stops)

        batch = session.stop_workspace("ws-1", concurrency=1, journal=lists, on_outcome=stop_all)
        assert (await batch).counts == {STOPPED: 1, NOT_SENT: 2}

        outcomes = list(read_journals([lists, stops]))
        assert [each.state for each in outcomes] == [RuntimeState.NOT_RUNNING] * 3
        assert all(each.ok for each in outcomes)


class TestListing:
    async def test_an_error_of_the_list_is_raised_and_reported(
        self, workspace: Emulator, session: BctrlSession
    ) -> None:
        batch = session.stop_workspace("ws-9")
        with pytest.raises(BctrlNotFoundError, match="list of workspace 'ws-9': ") as caught:
            await batch

        assert batch.report.ended_early is caught.value
        assert (batch.report.ok, batch.report.total) == (False, 0)
        assert aliases_stopped(workspace) == set()

        with pytest.raises(BctrlNotFoundError):
            async with session.stop_workspace("ws-9") as streamed:
                assert [outcome async for outcome in streamed] == []

    async def test_the_list_is_retried(self, workspace: Emulator, session: BctrlSession) -> None:
        workspace.inject(Fault.SERVER_ERROR, method="GET")
        assert (await session.stop_workspace("ws-1")).counts == {STOPPED: 3}

        workspace.inject(*[Fault.SERVER_ERROR] * 2, method="GET")
        with pytest.raises(BctrlServerError):
            await session.stop_workspace("ws-1", retry=RetryPolicy(attempts=2, base=0.001))

    async def test_the_deadline_includes_the_list(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(Fault.HANG, method="GET")
        report = await session.stop_workspace("ws-1", deadline=0.1)

        assert "the deadline of 0.1 s has passed" in str(report.ended_early)
        assert report.total == 0
        assert aliases_stopped(emulator) == set()

    @pytest.mark.parametrize("method", ["stop_reading", "abort", "cancel"])
    async def test_the_list_can_be_interrupted(
        self, emulator: Emulator, session: BctrlSession, method: str
    ) -> None:
        emulator.inject(Fault.HANG, method="GET")
        batch = session.stop_workspace("ws-1")
        running = asyncio.create_task(batch)
        await wait_for_requests(emulator, 1)
        if method == "cancel":
            running.cancel()
        else:
            getattr(batch, method)()
        await asyncio.wait([running], timeout=BOUND)

        assert running.done()
        assert running.cancelled() is (method == "cancel")
        assert isinstance(batch.report.ended_early, BctrlError)
        assert (batch.report.ok, batch.report.total) == (False, 0)
        assert aliases_stopped(emulator) == set()


class TestArguments:
    async def test_an_invalid_workspace_id_is_rejected_at_once(self, session: BctrlSession) -> None:
        with pytest.raises(BctrlConfigError, match="workspace id"):
            session.stop_workspace("..")

    async def test_an_async_where_is_rejected_and_stops_nothing(
        self, session: BctrlSession, emulator: Emulator
    ) -> None:
        async def match_none(_: Runtime) -> bool:
            return False

        conditions: tuple[Callable[[Runtime], object], ...] = (
            match_none,
            lambda _: asyncio.get_running_loop().create_future(),
            str,
        )
        for where in conditions:
            with pytest.raises(BctrlConfigError, match="a plain function"):
                await session.stop_workspace("ws-1", where=where)
        assert emulator.received.total() == 0
