"""A bulk stop on a cluster of dask.distributed, and its journal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from dask_cluster import (
    SmallCluster,
    make_session,
    record_sessions,
    small_cluster,
)
from helpers import add_runtimes

from bctrl_async import (
    BctrlConfigError,
    BctrlSession,
    RetryPolicy,
    StopOutcome,
    StopResult,
)
from bctrl_async.dask import stop_runtimes
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.errors import BctrlError
from bctrl_async.journal import read_journals

pytestmark = pytest.mark.usefixtures("emulator_environment")


class TestStops:
    async def test_every_target_is_stopped_once_and_reported(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 300)

        report = await stop_runtimes(cluster.client, targets, chunk_size=20)

        assert report.ok
        assert report.counts == {StopResult.STOPPED: 300}
        assert set(emulator.received.values()) == {1}

    async def test_all_workers_have_a_part_of_a_short_input(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        made = record_sessions()

        await stop_runtimes(cluster.client, add_runtimes(emulator, 100), session=make_session)

        assert len(made) == 2

    async def test_outcomes_have_the_index_the_target_and_the_runtime(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 30)
        outcomes: list[StopOutcome] = []

        await stop_runtimes(cluster.client, targets, chunk_size=7, on_outcome=outcomes.append)

        assert sorted((o.index, tuple(o.target)) for o in outcomes) == list(enumerate(targets))
        assert {o.runtime.alias for o in outcomes if o.runtime} == {alias for _, alias in targets}

    async def test_outcomes_can_be_iterated_over(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 250)

        async with stop_runtimes(cluster.client, targets) as batch:
            assert batch.total == 250
            assert not batch.is_throttled
            assert not batch.is_unanswered
            assert (batch.polling, batch.retry_after, batch.retrying) == (0, 0.0, {})
            seen = [outcome.index async for outcome in batch]

        assert sorted(seen) == list(range(250))
        assert batch.report.ok
        assert batch.in_flight == 0

    async def test_an_empty_input_has_an_empty_report(self, cluster: SmallCluster) -> None:
        report = await stop_runtimes(cluster.client, [])

        assert report.ok
        assert report.total == 0

    async def test_failures_carry_their_errors(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        add_runtimes(emulator, 3)
        emulator.poison("ws-1", "r1", Fault.SERVER_ERROR)

        report = await stop_runtimes(
            cluster.client,
            [("ws-1", "r0"), ("ws-1", "r1"), ("ws-1", "missing"), ("ws-1", "r2")],
            retry=RetryPolicy(attempts=2, base=0.001, cap=0.001),
        )

        assert report.counts == {
            StopResult.STOPPED: 2,
            StopResult.UNKNOWN: 1,
            StopResult.NOT_FOUND: 1,
        }
        errors = {outcome.target.alias: outcome.error for outcome in report.failures}
        assert isinstance(errors["r1"], BctrlError)
        assert errors["r1"].status == 500
        assert errors["r1"].attempts == 2
        assert report.retries == 1

    async def test_missing_runtimes_may_be_ok(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        add_runtimes(emulator, 1)

        report = await stop_runtimes(cluster.client, [("ws-1", "gone")], missing_ok=True)

        assert report.ok

    async def test_an_invalid_item_is_rejected_here(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets: list[object] = [("ws-1", "crm"), "nonsense", ("ws-1", ""), 7]

        report = await stop_runtimes(cluster.client, targets)  # type: ignore[arg-type]

        assert report.counts == {StopResult.STOPPED: 1, StopResult.REJECTED: 3}
        assert [outcome.index for outcome in report.failures] == [1, 2, 3]
        assert len(emulator.requests) == 1

    async def test_throttled_answers_are_counted(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 1)
        emulator.inject(Fault.RATE_LIMITED, alias="r0")

        report = await stop_runtimes(
            cluster.client, targets, retry=RetryPolicy(base=0.001, cap=0.001)
        )

        assert report.ok
        assert report.throttled == 1

    async def test_accepted_stops_are_verified(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 1)
        emulator.inject(Fault.ACCEPTED, alias="r0")

        report = await stop_runtimes(
            cluster.client, targets, verify=True, retry=RetryPolicy(base=0.001, cap=0.001)
        )

        assert report.counts == {StopResult.STOPPED: 1}

    async def test_a_target_that_takes_long_holds_up_no_chunk(self, emulator: Emulator) -> None:
        """Fault: a worker waits for the slowest target of a chunk before it begins the next."""
        targets = add_runtimes(emulator, 40)
        emulator.poison("ws-1", "r0", Fault.HANG)
        outcomes: list[StopOutcome] = []

        async with (
            small_cluster(1) as cluster,
            stop_runtimes(cluster.client, targets, chunk_size=10) as batch,
        ):
            async for outcome in batch:
                outcomes.append(outcome)
                if len(outcomes) == 39:
                    batch.abort()

        assert Counter(outcome.result for outcome in outcomes) == {
            StopResult.STOPPED: 39,
            StopResult.UNKNOWN: 1,
        }

    async def test_workers_with_several_threads_stop_chunks_in_turn(
        self, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 60)

        async with small_cluster(1, nthreads=3) as cluster:
            report = await stop_runtimes(cluster.client, targets, chunk_size=10, concurrency=2)

        assert report.ok
        assert len(emulator.requests) == 60


class TestJournal:
    async def test_a_journal_is_resumed_without_sending_settled_targets(
        self, cluster: SmallCluster, emulator: Emulator, tmp_path: Path
    ) -> None:
        targets = add_runtimes(emulator, 220)
        journal = tmp_path / "night.jsonl"

        await stop_runtimes(cluster.client, targets[:150], journal=journal)
        report = await stop_runtimes(cluster.client, targets, journal=journal)

        assert report.ok
        assert report.resumed == 150
        assert len(emulator.requests) == 220
        assert [each.ok for each in read_journals([journal], targets)] == [True] * 220

    async def test_an_accepted_stop_is_sent_again(
        self, cluster: SmallCluster, emulator: Emulator, tmp_path: Path
    ) -> None:
        """Fault: with a journal, a runtime whose stop had no effect ran for ever."""
        targets = add_runtimes(emulator, 1)
        journal = tmp_path / "night.jsonl"
        emulator.inject(Reply(200, body="OK", takes_effect=False))
        await stop_runtimes(cluster.client, targets, journal=journal)

        report = await stop_runtimes(cluster.client, targets, journal=journal)

        assert emulator.status("ws-1", "r0") == "stopped"
        assert report.counts == {StopResult.STOPPED: 1}

    async def test_a_journal_is_resumed_in_one_process(
        self, cluster: SmallCluster, emulator: Emulator, tmp_path: Path
    ) -> None:
        targets = add_runtimes(emulator, 20)
        journal = tmp_path / "night.jsonl"
        await stop_runtimes(cluster.client, targets, journal=journal)

        async with BctrlSession() as session:
            report = await session.stop_runtimes(targets, journal=journal)

        assert report.resumed == 20

    async def test_a_journal_of_another_server_is_an_error(
        self, cluster: SmallCluster, tmp_path: Path
    ) -> None:
        journal = tmp_path / "night.jsonl"
        await stop_runtimes(cluster.client, [], journal=journal)

        with pytest.raises(BctrlConfigError, match="another server"):
            await stop_runtimes(
                cluster.client, [], journal=journal, base_url="https://other.example"
            )

    async def test_a_journal_that_cannot_be_written_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator, tmp_path: Path
    ) -> None:
        targets = add_runtimes(emulator, 300)
        journal = tmp_path / "night.jsonl"

        def fail(*_: object) -> None:
            raise BctrlError("the journal cannot be written: no space left")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bctrl_async.journal.Journal.write", fail)
            report = await stop_runtimes(cluster.client, targets, journal=journal, chunk_size=10)

        assert report.ended_early is not None
        assert "journal" in str(report.ended_early)
        assert report.counts.total() == 300
