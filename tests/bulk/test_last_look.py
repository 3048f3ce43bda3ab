"""The last look of `stop_workspace`: what runs although its runtimes were stopped."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from support.helpers import BOUND, Bulk, Connect, wait_for_requests

from bctrl_async import (
    RetryPolicy,
    Runtime,
    RuntimeFilter,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.journal import Journal, read_journals

STOPPED = StopResult.STOPPED
After = Callable[[], object]


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

    async def test_an_alias_whose_stop_failed_is_told_by_its_outcome_alone(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(Reply(403))
        report = await stop_all(bulk, lambda: bulk.emulator.add_runtime("ws-1", "crm"))

        assert report.counts == {StopResult.REJECTED: 1}
        assert aliases(report) == []

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


class TestContradiction:
    """The list has a stopped runtime as running, under the same id."""

    @pytest.fixture
    def active(self, emulator: Emulator) -> dict[str, object]:
        return {**emulator.runtimes["ws-1", "crm"]}

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
        assert (
            "nobody looked for runtimes that started since: the server answered 403"
            in str(report)
        )


class TestFailure:
    async def test_the_summary_says_that_nobody_looked_if_the_list_fails(
        self, bulk: Bulk
    ) -> None:
        bulk.emulator.inject(None, Reply(403), method="GET")
        report = await stop_all(bulk, lambda: None)

        assert report.ok
        assert report.started_since is None
        assert (
            "nobody looked for runtimes that started since: the server answered 403"
            in str(report)
        )
        assert json.loads(json.dumps(report.to_dict()))["look_error"]["status"] == 403

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

    async def test_a_deadline_within_it_leaves_the_outcomes(self, bulk: Bulk) -> None:
        bulk.emulator.inject(None, Fault.HANG, method="GET")
        report = await bulk.session.stop_workspace("ws-1", deadline=0.3)

        assert report.ok
        assert "the deadline of 300ms has passed" in str(report.look_error)

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
