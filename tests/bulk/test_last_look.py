"""The last look of `stop_workspace`: what runs although its runtimes were stopped."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.helpers import (
    BOUND,
    Bulk,
    Connect,
    await_batch,
    pass_time,
    started,
    until,
    wait_for_requests,
)
from support.simulated import ANSWER, Request, Simulate

from bctrl_async import (
    RetryPolicy,
    Runtime,
    RuntimeFilter,
    RuntimeStatus,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async._http.lists import RuntimeList
from bctrl_async._kinds import Failure, Kind
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.journal import Journal, read_journals

STOPPED = StopResult.STOPPED
After = Callable[[], object]
GiveList = Callable[..., None]


async def stop_all(bulk: Bulk, after_stop: After, **options: object) -> StopReport:
    """Stop the workspace; call a function once its runtime was stopped."""

    def on_outcome(_: StopOutcome) -> None:
        after_stop()

    return await bulk.session.stop_workspace(
        "ws-1",
        on_outcome=on_outcome,
        **options,  # type: ignore[arg-type]
    )


def aliases(report: StopReport) -> list[str] | None:
    if report.started_since is None:
        return None
    return [runtime.alias for runtime in report.started_since]


def lists(emulator: Emulator) -> int:
    return sum(request.alias is None for request in emulator.requests)


class TestStartedSince:
    @pytest.mark.parametrize("alias", ["new", "crm"])
    async def test_what_started_meanwhile_is_told_and_not_stopped(
        self, bulk: Bulk, caplog: pytest.LogCaptureFixture, alias: str
    ) -> None:
        caplog.set_level(logging.WARNING, "bctrl_async")
        report = await stop_all(bulk, lambda: bulk.emulator.add_runtime("ws-1", alias))

        assert report.ok
        assert report.counts == {STOPPED: 1}
        assert aliases(report) == [alias]
        assert str(report).endswith(": 1 stopped; 1 started since")
        assert bulk.emulator.status("ws-1", alias) == "active"
        assert [record.__dict__["bctrl.event"] for record in caplog.records] == [
            "started_since"
        ]
        [told] = json.loads(json.dumps(report.to_dict()))["started_since"]
        assert told["alias"] == alias

    async def test_what_where_leaves_out_is_not_told(self, bulk: Bulk) -> None:
        report = await stop_all(
            bulk,
            lambda: bulk.emulator.add_runtime("ws-1", "new", kind="desktop"),
            where=RuntimeFilter(kind="browser"),
        )
        assert aliases(report) == []
        assert "started since" not in str(report)

    async def test_a_runtime_whose_stop_failed_is_told_by_its_outcome_alone(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(Reply(403))
        report = await stop_all(bulk, lambda: None)

        assert report.counts == {StopResult.REJECTED: 1}
        assert aliases(report) == []

    async def test_what_is_started_anew_after_an_unconfirmed_stop_is_told(
        self, bulk: Bulk
    ) -> None:
        """Fault: its alias was passed over, because the stop was not confirmed."""
        bulk.emulator.inject(Reply(200, body={}))
        bulk.emulator.inject(None, Reply(403), method="GET")
        report = await stop_all(
            bulk, lambda: bulk.emulator.add_runtime("ws-1", "crm"), verify=0.01
        )

        assert report.counts == {StopResult.ACCEPTED: 1}
        assert aliases(report) == ["crm"]

    async def test_a_journal_has_a_new_runtime_as_running(
        self, bulk: Bulk, tmp_path: Path
    ) -> None:
        path = tmp_path / "journal.jsonl"
        with Journal(path, base_url=bulk.session.base_url) as journal:
            report = await stop_all(
                bulk,
                lambda: bulk.emulator.add_runtime("ws-1", "crm"),
                journal=journal,
            )

        assert report.ok
        [outcome] = read_journals([path], [("ws-1", "crm")])
        assert not outcome.ok
        assert (await bulk.session.stop_runtimes([("ws-1", "crm")], journal=path)).ok
        assert bulk.emulator.status("ws-1", "crm") == "stopped"

    async def test_a_later_stop_of_another_run_stands_in_a_shared_journal(
        self, bulk: Bulk, tmp_path: Path
    ) -> None:
        """Fault: what another run stopped after the list counted as running."""
        path = tmp_path / "journal.jsonl"
        outcomes: list[StopOutcome] = []

        def where(_: Runtime) -> bool:
            for outcome in outcomes:
                # It is what another run writes while this run filters its last list.
                now = datetime.now(UTC)
                journal.write(replace(outcome, at=now, sent_at=now))
            return True

        def on_outcome(outcome: StopOutcome) -> None:
            outcomes.append(outcome)
            bulk.emulator.add_runtime("ws-1", "crm")

        with Journal(path, base_url=bulk.session.base_url) as journal:
            report = await bulk.session.stop_workspace(
                "ws-1", where=where, on_outcome=on_outcome, journal=journal
            )

        assert aliases(report) == ["crm"]
        [known] = read_journals([path], [("ws-1", "crm")])
        assert known.ok

    @pytest.mark.parametrize(
        "options", [{"verify": False}, {"deadline": 1e-9}], ids=["verify", "ended"]
    )
    async def test_nobody_looks_without_verify_or_after_an_early_end(
        self, bulk: Bulk, options: dict[str, float]
    ) -> None:
        report = await stop_all(bulk, lambda: None, **options)

        assert report.started_since is None
        assert report.look_error is None
        assert lists(bulk.emulator) <= 1


class TestUnreadable:
    """An item of the last list is not a runtime, or its age cannot be read."""

    @pytest.fixture
    def give_last(self, emulator: Emulator) -> GiveList:
        """Return a function that gives the items of the last list."""

        def give(*items: object) -> None:
            body = {"runtimes": list(items)}
            emulator.inject(None, Reply(200, body=body), method="GET")

        return give

    async def test_a_new_runtime_is_got_and_told(
        self, bulk: Bulk, give_last: GiveList
    ) -> None:
        """Fault: a new runtime that could not be read counted as none."""
        give_last({"alias": "new"})
        report = await stop_all(bulk, lambda: bulk.emulator.add_runtime("ws-1", "new"))
        assert report.ok
        assert aliases(report) == ["new"]

    async def test_a_new_runtime_that_where_leaves_out_is_not_told(
        self, bulk: Bulk, give_last: GiveList
    ) -> None:
        give_last({"alias": "new"})
        report = await stop_all(
            bulk,
            lambda: bulk.emulator.add_runtime("ws-1", "new", kind="desktop"),
            where=RuntimeFilter(kind="browser"),
        )
        assert aliases(report) == []

    async def test_a_stopped_runtime_that_runs_again_ends_the_run_early(
        self, bulk: Bulk, give_last: GiveList, tmp_path: Path
    ) -> None:
        """Fault: the report was ok, and so was the journal."""
        give_last({"alias": "crm"})
        path = tmp_path / "journal.jsonl"

        def revive() -> None:
            bulk.emulator.runtimes["ws-1", "crm"]["status"] = "active"

        report = await stop_all(bulk, revive, journal=path)

        assert "says now that they run: 'crm'" in str(report.ended_early)
        [known] = read_journals([path], [("ws-1", "crm")])
        assert not known.ok

    @pytest.mark.parametrize("alias", ["crm", ""])
    async def test_a_runtime_that_cannot_be_got_either_leaves_it_unknown_what_runs(
        self, bulk: Bulk, give_last: GiveList, alias: str, tmp_path: Path
    ) -> None:
        give_last({"alias": "crm"}, {"alias": alias})
        bulk.emulator.inject(*[Reply(200, body={"alias": "crm"})] * 2, method="GET")
        path = tmp_path / "journal.jsonl"
        report = await stop_all(bulk, lambda: None, journal=path)

        assert report.started_since is None
        assert report.look_error is not None
        [known] = read_journals([path], [("ws-1", "crm")])
        assert not known.ok

    async def test_without_aliases_nobody_knows_what_runs(
        self, bulk: Bulk, give_last: GiveList
    ) -> None:
        give_last(7, {"id": 7})
        report = await stop_all(bulk, lambda: None)

        assert report.ok
        assert report.started_since is None
        assert "2 of the listed runtimes cannot be read" in str(report)

    async def test_what_the_first_list_had_is_told_by_its_outcome_alone(
        self, bulk: Bulk
    ) -> None:
        [crm] = bulk.emulator.runtimes.values()
        items = {"runtimes": [{**crm}, {"alias": "odd"}, 7]}
        bulk.emulator.inject(*[Reply(200, body=items)] * 2, method="GET")
        report = await stop_all(bulk, lambda: None)

        assert report.counts == {STOPPED: 1, StopResult.REJECTED: 2}
        assert aliases(report) == []
        assert [request.alias for request in bulk.emulator.requests] == [
            None,
            "crm",
            None,
            "crm",
        ]

    async def test_a_new_runtime_of_unreadable_age_is_told(self, bulk: Bulk) -> None:
        old = RuntimeFilter(older_than=1)
        bulk.emulator.add_runtime("ws-1", "odd", created_at="long ago")
        report = await stop_all(
            bulk,
            lambda: bulk.emulator.add_runtime("ws-1", "new", created_at="just now"),
            where=old,
        )
        assert report.counts == {STOPPED: 1, StopResult.REJECTED: 1}
        assert aliases(report) == ["new"]

    async def test_a_stopped_runtime_of_unreadable_age_that_runs_is_got(
        self, bulk: Bulk
    ) -> None:
        def revive() -> None:
            crm = bulk.emulator.runtimes["ws-1", "crm"]
            crm["status"], crm["createdAt"] = "active", "long ago"

        report = await stop_all(bulk, revive, where=RuntimeFilter(older_than=1))
        assert "says now that they run: 'crm'" in str(report.ended_early)


class TestContradiction:
    """The list has a stopped runtime as running, under the same id."""

    @pytest.fixture
    def active(self, emulator: Emulator) -> dict[str, object]:
        return {**emulator.runtimes["ws-1", "crm"]}

    async def test_a_stop_shows_which_runtime_it_has_ended(self, bulk: Bulk) -> None:
        """Fault: what took an alias after the first list had "started since"."""

        def replaces(_: Runtime) -> bool:
            if lists(bulk.emulator) == 1:
                bulk.emulator.add_runtime("ws-1", "crm")
                late = {**bulk.emulator.runtimes["ws-1", "crm"]}
                bulk.emulator.inject(
                    Reply(200, body={"runtimes": [late]}), method="GET"
                )
            return True

        report = await stop_all(bulk, lambda: None, where=replaces)
        assert report.ok
        assert aliases(report) == []

    async def test_a_late_list_is_set_right_by_a_get(
        self, bulk: Bulk, active: dict[str, object], tmp_path: Path
    ) -> None:
        bulk.emulator.inject(
            None, Reply(200, body={"runtimes": [active]}), method="GET"
        )
        path = tmp_path / "journal.jsonl"
        report = await stop_all(bulk, lambda: None, journal=path)

        assert report.ok
        assert aliases(report) == []
        [outcome] = read_journals([path], [("ws-1", "crm")])
        assert outcome.ok

    async def test_an_api_that_takes_back_its_word_ends_the_run_early(
        self, bulk: Bulk, active: dict[str, object]
    ) -> None:
        def revive() -> None:
            bulk.emulator.runtimes["ws-1", "crm"]["status"] = "active"

        report = await stop_all(bulk, revive)

        assert not report.ok
        assert report.counts == {STOPPED: 1}
        assert "said that these had ended, and says now that they run: 'crm'" in str(
            report.ended_early
        )
        assert active["id"] == bulk.emulator.runtimes["ws-1", "crm"]["id"]

    async def test_its_error_names_three_of_many(self, bulk: Bulk) -> None:
        for alias in ("a", "b", "c", "d"):
            bulk.emulator.add_runtime("ws-1", alias)

        def revive() -> None:
            for runtime in bulk.emulator.runtimes.values():
                runtime["status"] = "active"

        # One after the other, the last stop comes after the others were revived.
        report = await stop_all(bulk, revive, concurrency=1)
        assert "' and 2 others" in str(report.ended_early)

    async def test_one_that_is_gone_by_then_is_no_contradiction(
        self, bulk: Bulk, active: dict[str, object]
    ) -> None:
        bulk.emulator.inject(
            None,
            Reply(200, body={"runtimes": [active]}),
            Reply(404, body={"code": "runtime.not_found"}),
            method="GET",
        )
        report = await stop_all(bulk, lambda: None)
        assert report.ok
        assert aliases(report) == []

    async def test_an_end_before_it_is_asked_again_leaves_it_unknown(
        self, bulk: Bulk, active: dict[str, object]
    ) -> None:
        bulk.emulator.inject(
            None, Reply(200, body={"runtimes": [active]}), method="GET"
        )
        calls: list[Runtime] = []

        def where(runtime: Runtime) -> bool:
            calls.append(runtime)
            if len(calls) > 1:
                batch.abort()
            return True

        batch = bulk.session.stop_workspace("ws-1", where=where)
        report = await batch
        assert report.ok
        assert "the run was aborted" in str(report.look_error)

    async def test_one_that_was_started_anew_meanwhile_is_told(
        self, bulk: Bulk, active: dict[str, object]
    ) -> None:
        bulk.emulator.inject(
            None, Reply(200, body={"runtimes": [active]}), method="GET"
        )
        report = await stop_all(bulk, lambda: bulk.emulator.add_runtime("ws-1", "crm"))
        assert report.ok
        assert aliases(report) == ["crm"]

    async def test_a_get_that_fails_leaves_it_unknown_what_runs(
        self, bulk: Bulk, active: dict[str, object]
    ) -> None:
        bulk.emulator.inject(
            None,
            Reply(200, body={"runtimes": [active]}),
            Reply(403),
            method="GET",
        )
        report = await stop_all(bulk, lambda: None)

        assert report.ok
        assert report.started_since is None
        assert "nobody knows what has started since (the server answered 403" in str(
            report
        )


class TestFailure:
    async def test_the_summary_says_that_nobody_knows_if_the_list_fails(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(None, Reply(403), method="GET")
        report = await stop_all(bulk, lambda: None)

        assert report.ok
        assert report.started_since is None
        assert "nobody knows what has started since (the server answered 403" in str(
            report
        )
        assert json.loads(json.dumps(report.to_dict()))["look_error"]["status"] == 403

    async def test_a_function_that_raises_leaves_the_outcomes(self, bulk: Bulk) -> None:
        """Fault: the run failed, though all was stopped."""
        mistake = ZeroDivisionError("no age")
        bulk.emulator.add_runtime("ws-1", "new", status="stopped")

        def where(runtime: Runtime) -> bool:
            if bulk.emulator.stops:
                raise mistake
            return not runtime.status.is_final

        report = await bulk.session.stop_workspace("ws-1", where=where)

        assert report.ok
        assert report.started_since is None
        assert "where raised ZeroDivisionError('no age')" in str(report)
        assert report.look_error is not None
        assert report.look_error.__cause__ is mistake

    async def test_a_function_that_returns_no_bool_leaves_the_outcomes(
        self, bulk: Bulk
    ) -> None:
        def where(_: Runtime) -> object:
            return print if bulk.emulator.stops else True

        report = await bulk.session.stop_workspace("ws-1", where=where)
        assert report.ok
        assert "which returns a bool" in str(report.look_error)

    @pytest.mark.parametrize(
        ("answer", "problem"),
        [
            (Failure(kind=Kind.THROTTLED, summary="429", status=429), "429"),
            (None, "before an answer"),
        ],
        ids=["throttles", "hangs"],
    )
    def test_a_server_that_does_not_answer_it_holds_up_the_run_for_a_minute(
        self, simulate: Simulate, answer: Failure | None, problem: str
    ) -> None:
        """Fault: a finished run took five minutes more."""
        simulation = simulate(lambda _: ANSWER)

        def give_list(request: Request) -> RuntimeList | Failure:
            if answer is None or request.number == 1:
                return [replace(ANSWER, status=RuntimeStatus.ACTIVE)]
            return answer

        def hang(request: Request) -> Awaitable[None] | None:
            if answer is not None or request.alias or request.number == 1:
                return None
            return asyncio.sleep(1000.0)

        simulation.list_answer = give_list
        simulation.before_response = hang
        report = simulation.run(lambda session: session.stop_workspace("ws-1"))

        assert report.ok
        assert "a last look takes 60s at most" in str(report.look_error)
        assert problem in str(report.look_error)
        assert 60.0 <= simulation.seconds < 62.0

    async def test_it_is_retried_as_a_stop_is(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.inject(None, Fault.DROP_BEFORE, Reply(503), method="GET")
        async with connect(retry=RetryPolicy(base=0.001)) as session:
            report = await session.stop_workspace("ws-1")
        assert report.started_since == ()

    @pytest.mark.parametrize("end", ["stop_reading", "abort"])
    async def test_an_end_within_it_leaves_the_outcomes(
        self, bulk: Bulk, end: str
    ) -> None:
        bulk.emulator.inject(None, Fault.HANG, method="GET")
        batch = bulk.session.stop_workspace("ws-1")
        running = asyncio.create_task(batch)
        await wait_for_requests(bulk.emulator, 3)
        getattr(batch, end)()
        report = await asyncio.wait_for(running, BOUND)

        assert report.ok
        assert report.started_since is None
        assert report.look_error is not None

    @pytest.mark.parametrize("turns", range(1, 7))
    async def test_an_end_in_any_turn_after_the_last_outcome_sends_nothing_more(
        self, bulk: Bulk, turns: int
    ) -> None:
        """Fault: an end in the turn in which it started was missed."""
        attempts: list[int] = []

        def abort_after(turns: int) -> None:
            if turns:
                asyncio.get_running_loop().call_soon(abort_after, turns - 1)
                return
            batch.abort()
            attempts.append(bulk.session.stats.attempts)

        batch = bulk.session.stop_workspace(
            "ws-1", concurrency=1, on_outcome=lambda _: abort_after(turns)
        )
        report = await asyncio.wait_for(batch, BOUND)

        assert report.counts == {STOPPED: 1}
        assert attempts == [bulk.session.stats.attempts]

    @pytest.mark.moves_clock
    async def test_a_deadline_within_it_leaves_the_outcomes(self, bulk: Bulk) -> None:
        bulk.emulator.inject(None, Fault.HANG, method="GET")
        batch = bulk.session.stop_workspace("ws-1", deadline=30)
        running = await started(batch, bulk.emulator, 3)
        pass_time(30)
        await running

        assert batch.report.ok
        assert "the deadline of 30s has passed" in str(batch.report.look_error)

    @pytest.mark.moves_clock
    async def test_a_list_whose_time_is_up_with_it_leaves_the_outcomes(
        self, bulk: Bulk
    ) -> None:
        """Fault: all was stopped, and `ended_early` was set."""
        bulk.emulator.inject(None, Fault.HANG, method="GET")
        batch = bulk.session.stop_workspace("ws-1")
        running = await started(batch, bulk.emulator, 3)
        pass_time(60)
        await running

        assert batch.report.ok
        assert batch.report.look_error is not None

    async def test_an_end_while_it_asks_again_sends_nothing_more(
        self, bulk: Bulk
    ) -> None:
        """Fault: each of thousands that a late list had was still got, one by one."""
        for number in range(40):
            bulk.emulator.add_runtime("ws-1", f"r{number}")
        active = [{**runtime} for runtime in bulk.emulator.runtimes.values()]
        bulk.emulator.inject(
            None,
            Reply(200, body={"runtimes": active}),
            *[Fault.HANG] * 60,
            method="GET",
        )
        batch = bulk.session.stop_workspace("ws-1")
        running = asyncio.create_task(batch)
        await wait_for_requests(bulk.emulator, 1 + 41 + 1 + 10)
        batch.abort()
        report = await asyncio.wait_for(running, BOUND)

        assert report.ok
        assert report.look_error is not None
        assert len(bulk.emulator.requests) == 1 + 41 + 1 + 10

    async def test_progress_says_that_it_looks(self, bulk: Bulk) -> None:
        looks: list[bool] = []

        def where(_: Runtime) -> bool:
            looks.append(batch.progress.is_looking)
            return True

        batch = bulk.session.stop_workspace("ws-1", where=where)
        assert (await batch).ok
        assert looks == [False, True]
        assert not batch.progress.is_looking


class TestLeft:
    """A run that is left once all outcomes are known, before its last look."""

    @pytest.mark.parametrize("hangs", [True, False])
    async def test_a_block_that_is_left_says_that_nobody_looked(
        self, bulk: Bulk, *, hangs: bool
    ) -> None:
        """Fault: the report was ok, and said nothing of the look."""
        bulk.emulator.inject(None, Fault.HANG, method="GET")
        async with bulk.session.stop_workspace("ws-1") as batch:
            async for _ in batch:
                if hangs:
                    await wait_for_requests(bulk.emulator, 3)
                break

        assert batch.report.ok
        assert batch.report.started_since is None
        assert "the run was cancelled" in str(batch.report.look_error)

    async def test_a_coroutine_that_is_closed_says_that_nobody_looked(
        self, bulk: Bulk
    ) -> None:
        batch = bulk.session.stop_workspace("ws-1", on_outcome=lambda _: batch.close())
        batch.send(None)
        await until(lambda: batch.counts)
        assert batch.report.ok
        assert "the run was cancelled" in str(batch.report.look_error)

    async def test_an_end_after_the_last_outcome_says_that_nobody_looked(
        self, bulk: Bulk
    ) -> None:
        batch = bulk.session.stop_workspace("ws-1", on_outcome=lambda _: batch.abort())
        report = await batch
        assert report.ok
        assert report.started_since is None
        assert "the run was aborted" in str(report.look_error)
        assert lists(bulk.emulator) == 1

    async def test_a_contradiction_is_told_even_so(
        self, bulk: Bulk, tmp_path: Path
    ) -> None:
        bulk.emulator.inject(None, None, None, Fault.HANG, method="GET")
        bulk.emulator.add_runtime("ws-1", "mail")

        def revive() -> None:
            for runtime in bulk.emulator.runtimes.values():
                runtime["status"] = "active"

        path = tmp_path / "journal.jsonl"
        batch = bulk.session.stop_workspace(
            "ws-1", journal=path, concurrency=1, on_outcome=lambda _: revive()
        )
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(bulk.emulator, 6)
        await until(lambda: batch.progress.in_flight == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

        assert "says now that they run" in str(batch.report.ended_early)
        outcomes = read_journals([path], [("ws-1", "crm"), ("ws-1", "mail")])
        assert not any(outcome.ok for outcome in outcomes)
