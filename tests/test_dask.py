"""A bulk stop on a cluster of dask.distributed, in this process."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from dask_cluster import SmallCluster, connect, small_cluster, tasks_of
from helpers import add_runtimes, wait_for_requests

import bctrl_async.dask._dispatcher
import bctrl_async.dask._worker
from bctrl_async import (
    BctrlConfigError,
    BctrlSession,
    RetryPolicy,
    StopBatch,
    StopOutcome,
    StopResult,
)
from bctrl_async.bulk._cancel import CancelLevel
from bctrl_async.dask import stop_runtimes
from bctrl_async.dask._distributed import Client, Cluster, Future, Host, Worker
from bctrl_async.dask._messages import (
    End,
    Outcomes,
    decode_end,
    decode_message,
    decode_result,
    encode,
)
from bctrl_async.dask._run import ClusterRun
from bctrl_async.dask._worker import Visit, stop_chunk
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.errors import BctrlAuthenticationError, BctrlError
from bctrl_async.journal import read_journal
from bctrl_async.pace import FilePace

KEY = "emulator-key"


@pytest.fixture(autouse=True)
def _environment(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("BCTRL_BASE_URL", emulator.url)


@pytest.fixture
async def cluster() -> AsyncIterator[SmallCluster]:
    async with small_cluster() as running:
        yield running
        await running.assert_clean()


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
        made: list[BctrlSession] = []
        _MADE.append(made)

        await stop_runtimes(cluster.client, add_runtimes(emulator, 100), session=_make_session)

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

    async def test_a_duplicate_is_sent_once(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        add_runtimes(emulator, 2)
        outcomes: list[StopOutcome] = []

        report = await stop_runtimes(
            cluster.client, [("ws-1", "r0"), ("ws-1", "r1")] * 2, on_outcome=outcomes.append
        )

        assert report.counts == {StopResult.STOPPED: 4}
        assert report.duplicates == 2
        assert sorted(outcome.index for outcome in outcomes) == [0, 1, 2, 3]
        assert len(emulator.requests) == 2

    async def test_a_duplicate_of_a_known_outcome_repeats_it(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        add_runtimes(emulator, 1)
        first_known = asyncio.Event()

        async def targets() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "r0"
            await first_known.wait()
            yield "ws-1", "r0"

        report = await stop_runtimes(
            cluster.client,
            targets(),
            deduplicate=True,
            on_outcome=lambda _: first_known.set(),
        )

        assert report.duplicates == 1
        assert len(emulator.requests) == 1

    async def test_thousands_of_duplicates_of_one_target_are_read(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        add_runtimes(emulator, 1)

        report = await stop_runtimes(cluster.client, [("ws-1", "r0")] * 2_500, chunk_size=1)

        assert report.counts == {StopResult.STOPPED: 2_500}
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


class TestInput:
    async def test_a_plain_generator_is_read(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 50)

        report = await stop_runtimes(cluster.client, (target for target in targets), chunk_size=8)

        assert report.counts == {StopResult.STOPPED: 50}

    async def test_the_targets_of_a_slow_input_do_not_wait_for_a_full_chunk(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        """Fault: a target waits for a thousand others that may come tomorrow."""
        add_runtimes(emulator, 2)
        stopped = asyncio.Event()

        async def targets() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "r0"
            await asyncio.wait_for(stopped.wait(), 10)
            yield "ws-1", "r1"

        report = await stop_runtimes(cluster.client, targets(), on_outcome=lambda _: stopped.set())

        assert report.counts == {StopResult.STOPPED: 2}

    async def test_an_endless_input_is_read_only_as_far_as_the_workers_need(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        """Fault: the whole input is handed to the scheduler, and kept in its memory."""
        for number in range(500):
            emulator.add_runtime("ws-1", f"r{number}")
        read = 0

        def targets() -> Iterator[tuple[str, str]]:
            nonlocal read
            while True:
                read += 1
                yield "ws-1", f"r{read % 500}"

        ahead: list[int] = []

        def on_outcome(_: StopOutcome) -> None:
            ahead.append(read - len(ahead))
            if len(ahead) == 300:
                batch.stop_reading()

        batch = stop_runtimes(cluster.client, targets(), chunk_size=10, on_outcome=on_outcome)
        report = await batch

        assert max(ahead) <= 2 * 10 * 10 + 10
        assert report.total == read
        assert report.counts.total() == read
        assert report.ended_early is not None

    async def test_a_slow_callback_holds_up_the_reading(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bctrl_async.dask._deliveries._LIMIT", 3)
        targets = add_runtimes(emulator, 200)
        read = 0

        def source() -> Iterator[tuple[str, str]]:
            nonlocal read
            for target in targets:
                read += 1
                yield target

        delivered = 0
        ahead: list[int] = []

        async def on_outcome(_: StopOutcome) -> None:
            nonlocal delivered
            delivered += 1
            ahead.append(read - delivered)
            await asyncio.sleep(0)

        report = await stop_runtimes(cluster.client, source(), chunk_size=5, on_outcome=on_outcome)

        assert report.ok
        assert delivered == 200
        assert max(ahead) < 200

    async def test_the_error_of_the_input_is_raised_after_all_outcomes(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 5)
        outcomes: list[StopOutcome] = []

        def source() -> Iterator[tuple[str, str]]:
            yield from targets
            raise LookupError("the database is gone")

        batch = stop_runtimes(cluster.client, source(), on_outcome=outcomes.append)
        with pytest.raises(LookupError):
            await batch

        assert len(outcomes) == 5
        assert batch.report.ended_early is not None
        assert "LookupError" in str(batch.report.ended_early)

    async def test_the_error_of_a_callback_cancels_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 200)

        def on_outcome(outcome: StopOutcome) -> None:
            raise LookupError(outcome.index)

        batch = stop_runtimes(cluster.client, targets, on_outcome=on_outcome, chunk_size=10)
        with pytest.raises(LookupError):
            await batch

        assert batch.report.counts.total() == 200
        assert batch.report.ended_early is not None


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
        content = read_journal(journal)
        assert content is not None
        assert content.is_complete
        assert len(content.outcomes) == 220

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


class TestSession:
    async def test_each_worker_makes_one_session_and_closes_it(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        made: list[BctrlSession] = []
        _MADE.append(made)

        report = await stop_runtimes(
            cluster.client, add_runtimes(emulator, 100), chunk_size=5, session=_make_session
        )

        assert report.ok
        assert len(made) == 2
        assert all(session.closed for session in made)

    async def test_the_sessions_share_a_pace(
        self, cluster: SmallCluster, emulator: Emulator, tmp_path: Path
    ) -> None:
        pace = FilePace(tmp_path / "pace", rate=10_000)

        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 20), pace=pace)

        assert report.ok
        assert (tmp_path / "pace").exists()

    async def test_a_worker_without_a_key_ends_the_run_and_says_so(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("BCTRL_API_KEY")

        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 50))

        assert report.counts == {StopResult.NOT_SENT: 50}
        assert isinstance(report.ended_early, BctrlConfigError)
        assert "cannot make its session: no API key" in str(report.ended_early)

    async def test_a_worker_that_would_send_elsewhere_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        """Fault: workers and coordinator mean different servers, and production is stopped."""
        report = await stop_runtimes(
            cluster.client, add_runtimes(emulator, 5), base_url="https://api.bctrl.ai"
        )

        assert report.counts == {StopResult.NOT_SENT: 5}
        assert "would send to" in str(report.ended_early)

    async def test_a_worker_of_another_version_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bctrl_async.dask._dispatcher, "__version__", "0.0.1")

        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 5))

        assert report.counts == {StopResult.NOT_SENT: 5}
        assert "not 0.0.1" in str(report.ended_early)

    async def test_a_function_that_makes_no_session_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        report = await stop_runtimes(
            cluster.client,
            add_runtimes(emulator, 5),
            session=dict,  # type: ignore[arg-type]
        )

        assert report.counts == {StopResult.NOT_SENT: 5}
        assert "not a BctrlSession" in str(report.ended_early)

    async def test_a_worker_that_lacks_the_module_of_the_function_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        report = await stop_runtimes(
            cluster.client,
            add_runtimes(emulator, 5),
            session=_Unpicklable(),
        )

        assert report.counts == {StopResult.NOT_SENT: 5}
        assert "cannot import" in str(report.ended_early)

    async def test_a_function_that_raises_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 5), session=_raise)

        assert report.counts == {StopResult.NOT_SENT: 5}
        assert "LookupError: no vault" in str(report.ended_early)

    async def test_an_idle_session_is_closed(
        self, cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: the sessions of a coordinator that was killed stay open for ever."""
        monkeypatch.setattr(bctrl_async.dask._worker, "_IDLE", 0.01)
        made: list[BctrlSession] = []
        _MADE.append(made)
        closed = asyncio.Event()

        async def targets() -> AsyncIterator[tuple[str, str]]:
            yield "ws-1", "crm"
            while not (made and all(session.closed for session in made)):
                await asyncio.sleep(0.01)
            closed.set()
            yield "ws-1", "crm"

        report = await stop_runtimes(cluster.client, targets(), session=_make_session)

        assert closed.is_set()
        assert report.counts == {StopResult.STOPPED: 1, StopResult.ALREADY_STOPPED: 1}

    async def test_a_session_with_chunks_is_not_idle(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        """Fault: a chunk that comes as its session is about to be closed fails."""
        emulator.poison("ws-1", "crm", Fault.HANG)
        batch = stop_runtimes(cluster.client, [("ws-1", "crm")])
        running = asyncio.create_task(batch)
        await wait_for_requests(emulator, 1)
        visits = [
            plugin
            for worker in cluster.workers
            for plugin in worker.plugins.values()
            if isinstance(plugin, Visit)
        ]

        await visits[0]._close()

        assert not visits[0]._session.closed
        batch.abort()
        await running

    async def test_the_key_is_not_in_what_is_sent(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent: list[bytes] = []
        submit = Cluster.submit

        def record(
            self: Cluster,
            number: int,
            function: Callable[..., Coroutine[object, object, bytes]],
            *args: object,
        ) -> Future[bytes]:
            sent.append(pickle.dumps(args))
            return submit(self, number, function, *args)

        monkeypatch.setattr(Cluster, "submit", record)
        await stop_runtimes(cluster.client, add_runtimes(emulator, 5))

        assert sent
        assert not any(KEY.encode() in data for data in sent)


def _close(client: Client) -> None:
    close: Callable[[], None] = client.close
    close()


_MADE: list[list[BctrlSession]] = []


def _make_session() -> BctrlSession:
    session = BctrlSession()
    _MADE[-1].append(session)
    return session


def _raise() -> BctrlSession:
    raise LookupError("no vault")


class _Unpicklable:
    """A function that is pickled, and cannot be unpickled."""

    def __call__(self) -> BctrlSession:
        raise AssertionError

    def __reduce__(self) -> tuple[object, ...]:
        return _fail_to_import, ()


def _fail_to_import() -> object:
    raise ModuleNotFoundError("No module named 'vault'")


def end_nothing(run: str, dask_worker: object) -> None:
    """Leave the session of a run open."""


async def _remove_visits(dask_worker: Worker) -> None:
    for name, plugin in list(dask_worker.plugins.items()):
        if isinstance(plugin, Visit):
            await dask_worker.plugin_remove(name)


class TestMessages:
    async def test_outcomes_whose_messages_were_lost_come_with_the_result(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Host, "publish", lambda *_: None)

        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 50), chunk_size=10)

        assert report.counts == {StopResult.STOPPED: 50}

    async def test_outcomes_come_in_several_messages(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bctrl_async.dask._worker, "_MAX_OUTCOMES", 5)

        report = await stop_runtimes(cluster.client, add_runtimes(emulator, 50))

        assert report.counts == {StopResult.STOPPED: 50}

    @pytest.mark.parametrize("has_session", [True, False])
    async def test_a_worker_sends_nothing_of_a_run_that_is_over(
        self,
        cluster: SmallCluster,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        *,
        has_session: bool,
    ) -> None:
        """Fault: a chunk that was taken back reaches a worker late, and is stopped after all."""
        orders: list[tuple[object, ...]] = []
        submit = Cluster.submit

        def record(
            self: Cluster,
            number: int,
            function: Callable[..., Coroutine[object, object, bytes]],
            *args: object,
        ) -> Future[bytes]:
            orders.append((self._run, *args))
            return submit(self, number, function, *args)

        monkeypatch.setattr(Cluster, "submit", record)
        if has_session:
            monkeypatch.setattr(bctrl_async.dask._dispatcher, "close_visit", end_nothing)
        await stop_runtimes(cluster.client, [("ws-1", "crm")])

        late: Callable[..., Future[bytes]] = cluster.client.submit
        # On the worker that has had it.
        for worker in cluster.workers:
            result = await late(stop_chunk, *orders[0], workers=worker.address, pure=False)
            (message,) = decode_result(result).messages
            outcomes = decode_message(message)
            assert isinstance(outcomes, Outcomes)
            assert [known.result for known in outcomes.known] == [StopResult.NOT_SENT]

        assert len(emulator.requests) == 1
        await cluster.client.run(_remove_visits)

    @pytest.mark.parametrize("name", ["decode_message", "decode_result"])
    async def test_a_message_that_cannot_be_read_fails_the_run(
        self,
        cluster: SmallCluster,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
    ) -> None:
        """Fault: dask logs the exception, and the run waits for ever."""

        def fail(_: bytes) -> object:
            raise LookupError(name)

        monkeypatch.setattr(bctrl_async.dask._dispatcher, name, fail)
        monkeypatch.setattr(bctrl_async.dask._dispatcher, "_GRACE", 0.1)
        batch = stop_runtimes(cluster.client, add_runtimes(emulator, 50), chunk_size=10)

        with pytest.raises(LookupError, match=name):
            await asyncio.wait_for(asyncio.ensure_future(batch), 10)

        assert batch.report.counts.total() == 50

    async def test_nothing_but_errors_is_pickled_in_a_message(self) -> None:
        with pytest.raises(TypeError, match="not part of a message"):
            encode(object())

    def test_an_error_keeps_its_attributes_and_loses_its_cause(self) -> None:
        error = BctrlAuthenticationError("no", status=401, request_id="r-1")
        error.__cause__ = OSError("a socket")

        end = decode_end(encode(End(error, CancelLevel.WAITING)))

        assert vars(end.reason) == vars(error)
        assert type(end.reason) is BctrlAuthenticationError
        assert end.reason.__cause__ is None


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"session": "a-key"}, "invalid session"),
            ({"session": partial(BctrlSession, "another-key")}, "would travel"),
            ({"session": partial(BctrlSession, api_key="another-key")}, "would travel"),
            ({"session": lambda: BctrlSession("emulator-key")}, "would travel"),
            ({"pace": 5}, "invalid pace"),
            ({"chunk_size": 0}, "invalid chunk_size"),
            ({"concurrency": 0}, "invalid concurrency"),
            ({"deadline": 0}, "invalid deadline"),
            ({"timeout": 0}, "invalid timeout"),
            ({"retry": 3}, "invalid retry"),
            ({"journal": 3}, "invalid journal"),
            ({"journal_max_age": 0}, "invalid journal_max_age"),
            ({"deduplicate": 3}, "invalid deduplicate"),
            ({"on_outcome": 3}, "invalid on_outcome"),
            ({"base_url": "nonsense"}, "invalid base_url"),
            ({"targets": 3}, "invalid targets"),
            ({"client": 3}, "invalid client"),
        ],
    )
    def test_an_invalid_argument_is_an_error_at_once(
        self, arguments: dict[str, object], text: str
    ) -> None:
        given: dict[str, object] = {"client": Mock(spec=Client), "targets": [], **arguments}

        with pytest.raises(BctrlConfigError, match=text) as raised:
            stop_runtimes(**given)  # type: ignore[arg-type]

        assert "another-key" not in str(raised.value)

    def test_a_function_that_cannot_be_pickled_is_an_error(self) -> None:
        lock = threading.Lock()

        def session() -> BctrlSession:
            raise AssertionError(lock)

        with pytest.raises(BctrlConfigError, match="cannot be pickled"):
            stop_runtimes(Mock(spec=Client), [], session=session)

    async def test_a_client_that_is_closed_is_an_error(self, cluster: SmallCluster) -> None:
        async with connect(cluster.address) as client:
            pass

        with pytest.raises(BctrlConfigError, match="it is closed"):
            await stop_runtimes(client, [])

    async def test_a_client_of_another_loop_is_an_error(self, cluster: SmallCluster) -> None:
        client = await asyncio.to_thread(connect, cluster.address, asynchronous=False)
        try:
            with pytest.raises(BctrlConfigError, match="another event loop"):
                await stop_runtimes(client, [])
        finally:
            await asyncio.to_thread(_close, client)


class TestEnding:
    async def test_the_first_401_ends_the_run(
        self, cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BCTRL_API_KEY", "a-revoked-key")
        targets = add_runtimes(emulator, 3_000)

        report = await stop_runtimes(cluster.client, targets, chunk_size=50, concurrency=5)

        assert isinstance(report.ended_early, BctrlAuthenticationError)
        assert report.counts.total() == 3_000
        assert report.counts[StopResult.NOT_SENT] > 2_500

    async def test_the_deadline_ends_it_with_true_outcomes(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 400)
        for target in targets[::2]:
            emulator.poison(*target, Fault.HANG)

        report = await stop_runtimes(
            cluster.client, targets, chunk_size=20, concurrency=5, deadline=0.5
        )

        assert "deadline" in str(report.ended_early)
        assert report.counts.total() == 400
        assert report.counts[StopResult.UNKNOWN] > 0
        for outcome in report.failures:
            if outcome.result is StopResult.NOT_SENT:
                assert emulator.received[outcome.target] == 0

    async def test_a_deadline_works_without_workers(self, emulator: Emulator) -> None:
        async with small_cluster(0) as cluster:
            report = await stop_runtimes(
                cluster.client, add_runtimes(emulator, 30), deadline=0.2, chunk_size=5
            )
            await cluster.assert_clean()

        assert report.counts == {StopResult.NOT_SENT: 30}
        assert "deadline" in str(report.ended_early)

    async def test_it_waits_for_workers_and_uses_those_that_come(self, emulator: Emulator) -> None:
        targets = add_runtimes(emulator, 100)

        async with small_cluster(0) as cluster:
            running = asyncio.create_task(stop_runtimes(cluster.client, targets, chunk_size=5))
            await asyncio.sleep(0.1)
            assert not running.done()
            await cluster.add_worker()
            await cluster.add_worker()
            report = await running

        assert report.ok

    async def test_stop_reading_finishes_what_is_in_flight(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 1_000)

        async with stop_runtimes(cluster.client, targets, chunk_size=50) as batch:
            async for _ in batch:
                batch.stop_reading()

        report = batch.report
        assert report.counts.total() == 1_000
        assert set(report.counts) == {StopResult.STOPPED, StopResult.NOT_SENT}
        assert report.counts[StopResult.STOPPED] == len(emulator.requests)
        assert "begin no more stops" in str(report.ended_early)

    async def test_a_cancelled_run_says_so_in_its_journal(
        self, cluster: SmallCluster, emulator: Emulator, tmp_path: Path
    ) -> None:
        targets = add_runtimes(emulator, 300)
        for target in targets:
            emulator.poison(*target, Fault.HANG)
        journal = tmp_path / "night.jsonl"
        running = asyncio.create_task(
            stop_runtimes(cluster.client, targets, journal=journal, chunk_size=10, concurrency=2)
        )
        await wait_for_requests(emulator, 4)

        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, 4)

        lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
        assert len(lines) == 300
        results = Counter(line["result"] for line in lines)
        assert results["unknown"] == len(emulator.requests)
        assert results["not_sent"] == 300 - len(emulator.requests)

    async def test_a_run_can_be_cancelled_before_it_knows_its_workers(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        batch = stop_runtimes(cluster.client, add_runtimes(emulator, 10))
        running = asyncio.create_task(batch)
        await asyncio.sleep(0)
        running.cancel()

        with pytest.raises(asyncio.CancelledError):
            await running

        assert batch.report.counts == {StopResult.NOT_SENT: 10}

    async def test_what_is_ended_after_its_end_stays_as_it_was(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        batch = stop_runtimes(cluster.client, add_runtimes(emulator, 5))
        await batch

        batch.abort()

        assert batch.report.ok

    async def test_what_is_aborted_before_its_start_sends_nothing(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        batch = stop_runtimes(cluster.client, add_runtimes(emulator, 5))
        batch.abort()
        report = await batch

        assert report.counts == {StopResult.NOT_SENT: 5}
        assert emulator.requests == []

    @pytest.mark.parametrize("plain", [True, False])
    async def test_a_run_whose_tasks_are_cancelled_from_outside_accounts_for_all(
        self, cluster: SmallCluster, emulator: Emulator, *, plain: bool
    ) -> None:
        targets = add_runtimes(emulator, 50)
        for target in targets:
            emulator.poison(*target, Fault.HANG)

        async def source() -> AsyncIterator[tuple[str, str]]:
            for target in targets:
                yield target

        batch = stop_runtimes(cluster.client, targets if plain else source(), chunk_size=5)
        running = asyncio.create_task(batch)
        await wait_for_requests(emulator, 1)
        for task in tasks_of(ClusterRun):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(running, 10)

        assert batch.report.counts.total() == batch.read
        assert batch.read == 50 or not plain
        assert "cancelled" in str(batch.report.ended_early)

    async def test_a_run_whose_coroutine_is_closed_leaves_nothing_behind(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 50)
        for target in targets:
            emulator.poison(*target, Fault.HANG)
        batch = stop_runtimes(cluster.client, targets, chunk_size=5)
        batch.send(None)
        await wait_for_requests(emulator, 1)

        batch.close()
        async with asyncio.timeout(10):
            while batch.report.counts.total() < 50:
                await asyncio.sleep(0.01)

        assert tasks_of(ClusterRun) == []

    def test_a_run_whose_loop_has_ended_can_be_closed(self, emulator: Emulator) -> None:
        async def begin() -> StopBatch:
            async with small_cluster(1) as cluster:
                batch = stop_runtimes(cluster.client, [("ws-1", "crm")] * 5)
                batch.send(None)
            return batch

        batch = asyncio.run(begin())
        batch.close()

        assert emulator.requests == []
        assert not batch.report.ok

    async def test_leaving_the_block_early_cancels_the_run(
        self, cluster: SmallCluster, emulator: Emulator
    ) -> None:
        targets = add_runtimes(emulator, 500)

        async with stop_runtimes(cluster.client, targets, chunk_size=10) as batch:
            await anext(batch)

        assert batch.report.counts.total() == 500
        assert batch.report.ended_early is not None
