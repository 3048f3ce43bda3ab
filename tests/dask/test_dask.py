"""A bulk stop on a cluster of dask.distributed: its input, its journal and its sessions."""

from __future__ import annotations

import asyncio
import pickle
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
from dask_cluster import SmallCluster, begin, connect, make_session, record_sessions, small_cluster
from distributed import Client
from helpers import BOUND, add_runtimes

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    RetryPolicy,
    StopOutcome,
    StopResult,
)
from bctrl_async.dask import Chunk, ClusterRun, stop_runtimes
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.journal import read_journals
from bctrl_async.pace import FilePace

pytestmark = pytest.mark.usefixtures("emulator_environment")


class TestStops:
    async def test_each_target_is_stopped_once_and_its_outcome_has_its_index(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 250)

        async with stop_runtimes(cluster.client, targets, chunk_size=7) as batch:
            assert batch.total == 250
            assert not batch.is_throttled
            assert not batch.is_unanswered
            assert (batch.polling, batch.retry_after, batch.retrying) == (0, 0.0, {})
            seen = [outcome async for outcome in batch]

        assert sorted((each.index, tuple(each.target)) for each in seen) == list(enumerate(targets))
        assert {each.runtime.alias for each in seen if each.runtime} == {a for _, a in targets}
        assert batch.in_flight == 0
        assert batch.report.ok
        assert batch.report.counts == {StopResult.STOPPED: 250}
        assert set(emulator.received.values()) == {1}

    async def test_an_empty_input_has_an_empty_report(self, cluster: SmallCluster) -> None:
        report = await stop_runtimes(cluster.client, [])
        assert (report.ok, report.total) == (True, 0)

    async def test_failures_carry_their_errors_and_options_apply_on_the_workers(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        emulator.inject(Fault.RATE_LIMITED, alias="r0")
        emulator.poison("ws-1", "r1", Fault.SERVER_ERROR)
        targets: list[Any] = [*add_runtimes(emulator, 2), ("ws-1", "missing"), "nonsense"]
        retry = RetryPolicy(attempts=2, base=0.001, cap=0.001)

        report = await stop_runtimes(cluster.client, targets, retry=retry, verify=False)

        assert {outcome.index: outcome.result for outcome in report.failures} == {
            1: StopResult.UNKNOWN,
            2: StopResult.NOT_FOUND,
            3: StopResult.REJECTED,
        }
        [error] = [each.error for each in report.failures if each.index == 1]
        assert isinstance(error, BctrlError)
        assert (error.status, error.attempts) == (500, 2)
        assert report.counts[StopResult.STOPPED] == report.throttled == 1
        assert report.retries == 2

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

    async def test_a_journal_is_resumed_on_the_cluster_and_in_one_process(
        self, cluster: SmallCluster, emulator: Emulator, tmp_path: Path
    ) -> None:
        targets = add_runtimes(emulator, 220)
        journal = tmp_path / "night.jsonl"
        await stop_runtimes(cluster.client, targets[:150], journal=journal)

        report = await stop_runtimes(cluster.client, targets, journal=journal)
        async with BctrlSession() as session:
            again = await session.stop_runtimes(targets, journal=journal)

        assert report.ok
        assert (report.resumed, again.resumed) == (150, 220)
        assert len(emulator.requests) == 220
        assert [each.ok for each in read_journals([journal], targets)] == [True] * 220

        other = "https://other.example"
        with pytest.raises(BctrlConfigError, match="another server"):
            await stop_runtimes(cluster.client, [], journal=journal, base_url=other)


class TestInput:
    async def test_the_targets_of_a_slow_input_do_not_wait_for_a_full_chunk(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        """Fault: a target waits for a thousand others that may come tomorrow."""
        add_runtimes(emulator, 2)
        stopped = asyncio.Event()

        async def targets() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "r0"
            await asyncio.wait_for(stopped.wait(), BOUND)
            yield "ws-1", "r1"

        report = await stop_runtimes(cluster.client, targets(), on_outcome=lambda _: stopped.set())

        assert report.counts == {StopResult.STOPPED: 2}

    async def test_a_slow_generator_is_handed_out_in_whole_chunks(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: each of its targets was a chunk, and stopping 600 took 35 times as long."""
        monkeypatch.setattr("bctrl_async.bulk._targets._SLOW", -1.0)
        sizes: list[int] = []
        result_of = ClusterRun._result_of

        def count(run: ClusterRun, chunk: Chunk) -> Awaitable[Exception | None]:
            sizes.append(len(chunk.targets))
            return result_of(run, chunk)

        monkeypatch.setattr(ClusterRun, "_result_of", count)
        targets = iter(add_runtimes(emulator, 20))
        assert (await stop_runtimes(cluster.client, targets, chunk_size=10)).ok
        assert sizes == [10, 10]

    async def test_an_endless_input_is_read_only_as_far_as_workers_and_callback_come(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        """Fault: the whole input is handed to the scheduler, and kept in its memory."""
        add_runtimes(emulator, 500)
        read = 0

        def targets() -> Iterator[tuple[str, str]]:
            nonlocal read
            while True:
                read += 1
                yield "ws-1", f"r{read % 500}"

        ahead: list[int] = []

        async def on_outcome(_: StopOutcome) -> None:
            ahead.append(read - len(ahead))
            if len(ahead) == 600:
                batch.stop_reading()
            await asyncio.sleep(0.001)

        batch = stop_runtimes(cluster.client, targets(), chunk_size=10, on_outcome=on_outcome)
        report = await batch

        # Two workers have ten chunks each, and one more is read; others await their delivery.
        assert max(ahead) <= 4 * 10 * 10 + 10
        assert report.total == report.counts.total() == read
        assert report.ended_early is not None

    async def test_the_error_of_the_input_is_raised_after_all_outcomes(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        def source() -> Iterator[tuple[str, str]]:
            yield from add_runtimes(emulator, 5)
            raise LookupError("the database is gone")

        running = await begin(cluster, emulator, source(), 0)
        with pytest.raises(LookupError):
            await running.ended()
        report = running.batch.report
        assert report.counts.total() == 5
        assert "LookupError" in str(report.ended_early)

    async def test_the_error_of_a_callback_cancels_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 200)
        # It is in flight when the first outcome comes.
        emulator.inject(Fault.HANG, alias="r199")
        on_outcome = Mock(side_effect=LookupError)
        running = await begin(cluster, emulator, targets, 0, on_outcome=on_outcome, chunk_size=10)
        with pytest.raises(LookupError):
            await running.ended()
        assert running.batch.report.counts.total() == 200
        assert running.batch.report.ended_early is not None


def fail_to_make_a_session() -> BctrlSession:
    raise LookupError("no vault")


def make_keyed_session() -> BctrlSession:
    return BctrlSession("a key that is invalid, and has -key in it")


def fail_to_set_up(*_: object, **__: object) -> None:
    raise ImportError("no module named 'vault'")


class TestSession:
    async def test_each_worker_has_a_part_of_a_short_input_and_one_session_that_is_closed(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        made = record_sessions()

        await stop_runtimes(cluster.client, add_runtimes(emulator, 100), session=make_session)

        assert [session.closed for session in made] == [True, True]

    @pytest.mark.usefixtures("patient")
    async def test_the_sessions_share_a_pace(
        self, cluster: SmallCluster, emulator: Emulator, tmp_path: Path
    ) -> None:
        pace = FilePace(tmp_path / "pace", rate=10_000)

        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 20), pace=pace)

        assert report.ok
        assert (tmp_path / "pace").exists()

    @pytest.mark.parametrize(
        ("options", "patched", "said"),
        [
            ({"concurrency": 101}, {}, "expected at most the session's max_connections, 100"),
            # Fault: workers and coordinator mean different servers, and production is stopped.
            ({"base_url": "https://api.bctrl.ai"}, {}, "it would send to http://127.0.0.1"),
            ({"session": dict}, {}, "expected a function that returns a session, not dict"),
            ({"session": fail_to_make_a_session}, {}, "a worker failed: LookupError: no vault"),
            ({"session": make_keyed_session}, {}, r"the worker tcp://\S+: invalid API key"),
            ({}, {"__version__": "0.0.1"}, "it has bctrl_async 0.0.1, not"),
            ({}, {"Visit.setup": fail_to_set_up}, "'vault'.* need the same packages"),
        ],
    )
    async def test_workers_without_their_sessions_end_the_run_and_say_why(
        self,
        cluster: SmallCluster,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        *,
        options: dict[str, Any],
        patched: dict[str, object],
        said: str,
    ) -> None:
        batch = stop_runtimes(cluster.client, add_runtimes(emulator, 5), **options)
        for name, value in patched.items():
            monkeypatch.setattr(f"bctrl_async.dask.{name}", value)
        report = await batch

        assert report.counts == {StopResult.NOT_SENT: 5}
        assert re.search(said, str(report.ended_early))
        assert emulator.requests == []

    @pytest.mark.parametrize("session", [BctrlSession, make_keyed_session])
    def test_the_key_is_not_in_what_is_sent(self, session: Callable[[], BctrlSession]) -> None:
        batch = stop_runtimes(Mock(spec=Client), [], session=session)
        batch.close()
        sent = pickle.dumps(cast("ClusterRun", batch._run)._visit)
        assert session.__name__.encode() in sent
        assert b"-key" not in sent


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"session": "a-key"}, "invalid session"),
            ({"session": partial(BctrlSession, "another-key")}, "at the top level of a module"),
            ({"session": lambda: BctrlSession("another-key")}, "at the top level of a module"),
            ({"pace": 5}, "invalid pace"),
            ({"chunk_size": 0}, "invalid chunk_size"),
            ({"concurrency": 0}, "invalid concurrency"),
            ({"base_url": "nonsense"}, "invalid base_url"),
            ({"targets": 3}, "invalid targets"),
            ({"client": 3}, "invalid client"),
        ],
    )
    def test_an_invalid_argument_is_an_error_at_once(
        self, arguments: dict[str, Any], text: str
    ) -> None:
        given: dict[str, Any] = {"client": Mock(spec=Client), "targets": [], **arguments}

        with pytest.raises(BctrlConfigError, match=text) as raised:
            stop_runtimes(**given)

        assert "another-key" not in str(raised.value)

    async def test_a_client_that_is_closed_or_of_another_loop_is_an_error(
        self, cluster: SmallCluster
    ) -> None:
        async with connect(cluster.address) as closed:
            pass
        other: Any = await asyncio.to_thread(connect, cluster.address, asynchronous=False)
        try:
            for client, said in ((closed, r"\(closed\) does not"), (other, "does not")):
                with pytest.raises(BctrlConfigError, match=f"{said} run in this event loop"):
                    await stop_runtimes(client, [])
        finally:
            await asyncio.to_thread(other.close)
