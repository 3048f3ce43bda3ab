"""Workers of a cluster that cannot stop anything leave their chunks to others."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest
from dask_cluster import (
    SmallCluster,
    begin,
    faulty,
    let_first_worker,
    make_unfit_session,
    small_cluster,
)
from helpers import add_runtimes

from bctrl_async import BctrlError, BctrlSession, RetryPolicy, StopOutcome, StopResult
from bctrl_async._calls.call import Call
from bctrl_async._http import transport
from bctrl_async.dask import Chunk, ClusterRun, _LeftError, stop_runtimes
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.errors import BctrlNetworkError
from bctrl_async.models import Runtime

pytestmark = pytest.mark.usefixtures("emulator_environment")

STOPPED, NOT_SENT, UNKNOWN = StopResult.STOPPED, StopResult.NOT_SENT, StopResult.UNKNOWN
REJECTED = StopResult.REJECTED
QUICK = RetryPolicy(base=0.001, cap=0.001)


def fail() -> BctrlSession:
    # Its lock cannot be pickled.
    error = LookupError("no vault")
    error.__cause__ = LookupError(threading.Lock())
    raise error


def without_network() -> BctrlSession:
    return BctrlSession(proxy="http://127.0.0.1:1", allow_plaintext=True)


def without_key() -> BctrlSession:
    def ask() -> str:
        raise LookupError

    return BctrlSession(api_key=ask)


Answer = Callable[[object, Call[Runtime]], BctrlError | None]


def intercept(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    """Let `answer` say what the attempts of a session's client get; None asks the server."""
    send_once: Callable[..., Awaitable[object]] = transport.send_once

    async def send(
        http: object, path: object, call: Call[Runtime], *args: object, **options: object
    ) -> object:
        return answer(http, call) or await send_once(http, path, call, *args, **options)

    monkeypatch.setattr(transport, "send_once", send)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (fail, "no vault"),
        (without_key, "the api_key function raised LookupError"),
        (without_network, "the server does not answer"),
    ],
)
async def test_a_worker_that_cannot_stop_leaves_its_chunks_to_the_others(
    cluster: SmallCluster,
    emulator: Emulator,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[], BctrlSession],
    reason: str,
) -> None:
    """Fault: one worker without a key, or a network, ended the run for all."""
    let_first_worker(make)
    targets = iter(add_runtimes(emulator, 400))
    options: Any = {"session": make_unfit_session, "retry": QUICK}
    report = await stop_runtimes(cluster.client, targets, chunk_size=5, **options)

    assert report.ok
    assert report.counts == {STOPPED: 400}
    [said] = [each for each in caplog.records if each.name == "bctrl_async.dask"]
    assert getattr(said, "bctrl.event") == "worker_left"
    assert re.search(rf"the worker tcp://\S+: .*{reason}", said.getMessage())


async def test_a_worker_that_the_server_answers_stays_though_a_connection_is_refused(
    cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: one refused connection took a worker out, and two of them ended the run."""
    refused = {f"r{number}" for number in range(10, 100, 20)}

    def answer(_: object, call: Call[Runtime]) -> BctrlError | None:
        is_refused = call.operation.stops and call.alias in refused
        return BctrlNetworkError("no connection: refused") if is_refused else None

    intercept(monkeypatch, answer)
    targets, retry = iter(add_runtimes(emulator, 100)), RetryPolicy(attempts=1)
    report = await stop_runtimes(cluster.client, targets, chunk_size=20, retry=retry)

    assert report.counts == {STOPPED: 95, NOT_SENT: 5}
    assert {each.target.alias for each in report.failures} == refused
    assert report.ended_early is None


@pytest.mark.parametrize(
    ("answers", "results"),
    [
        ([], {"r0": STOPPED, "r1": REJECTED, "r2": STOPPED, "r3": STOPPED}),
        ([Reply(403)], {"r0": STOPPED, "r1": REJECTED, "r2": UNKNOWN, "r3": REJECTED}),
    ],
)
async def test_a_worker_that_leaves_hands_over_what_it_has_not_settled(
    cluster: SmallCluster,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[Reply],
    results: dict[str, StopResult],
) -> None:
    """Fault: all was sent again, even a `rejected` target, and a 403 became `unknown`."""
    monkeypatch.setattr("bctrl_async.bulk._run.BULK_PATIENCE", 0.2)
    attempts: list[object] = []

    def answer(http: object, call: Call[Runtime]) -> BctrlError | None:
        # The session that sends first loses its network as it sends r2.
        attempts.append(http)
        is_cut = http is attempts[0] and attempts.count(http) > 2
        error = BctrlNetworkError("the network is down", may_have_stopped=call.alias == "r2")
        return error if is_cut else None

    intercept(monkeypatch, answer)
    targets = add_runtimes(emulator, 20)
    emulator.inject(Reply(403), alias="r1")
    for alias in ("r2", "r3"):
        emulator.inject(*answers, alias=alias)
    outcomes: list[StopOutcome] = []
    options: Any = {"retry": QUICK, "on_outcome": outcomes.append}
    await stop_runtimes(cluster.client, iter(targets), concurrency=1, **options)

    others = {alias: STOPPED for _, alias in targets[4:]}
    assert {each.target.alias: each.result for each in outcomes} == results | others
    assert all(targets[each.index] == each.target for each in outcomes)
    assert set(emulator.received.values()) == {1}


async def test_the_run_ends_if_no_worker_is_left(emulator: Emulator) -> None:
    let_first_worker(fail)
    targets = iter(faulty(emulator, Fault.HANG, 1))
    async with small_cluster() as cluster:
        running = await begin(cluster, emulator, targets, 1, session=make_unfit_session)
        [left] = running.engine._left
        [other] = [each for each in cluster.workers if each.address != left]
        # It refuses the chunk at once, even if it is the only one that is there.
        await cluster.lose(other)
        report = await running.ended()

    assert report.counts == {UNKNOWN: 1}
    assert "no vault" in str(report.ended_early)


async def test_a_chunk_is_handed_out_in_measure_while_only_an_unfit_worker_takes_it(
    cluster: SmallCluster, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: while the others were paused, it was handed out hundreds of times a second."""
    result_of = ClusterRun._result_of
    times: list[float] = []

    async def refuse_twice(run: ClusterRun, chunk: Chunk) -> Exception | None:
        times.append(asyncio.get_running_loop().time())
        if len(times) > 2:
            return await result_of(run, chunk)
        run._left.add("tcp://unfit")
        return _LeftError("tcp://unfit", BctrlError("no vault"))

    monkeypatch.setattr(ClusterRun, "_result_of", refuse_twice)
    report = await stop_runtimes(cluster.client, add_runtimes(emulator, 1))

    assert report.counts == {STOPPED: 1}
    # A busy machine makes them longer.
    assert min(later - earlier for earlier, later in pairwise(times)) > 0.2


async def test_an_outage_at_the_start_of_a_chunk_is_survived(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a worker gave the server up at once, though it had answered other chunks."""
    first, *others = add_runtimes(emulator, 30)
    is_known = asyncio.Event()
    attempts: list[object] = []

    def answer(_: object, call: Call[Runtime]) -> BctrlError | None:
        attempts.append(call)
        return BctrlNetworkError("no connection: refused") if 1 < len(attempts) < 100 else None

    async def source() -> AsyncIterator[tuple[str, str]]:
        yield first
        await is_known.wait()
        for target in others:
            yield target

    intercept(monkeypatch, answer)
    options: Any = {"retry": QUICK, "verify": False, "on_outcome": lambda _: is_known.set()}
    async with small_cluster(1) as cluster:
        report = await stop_runtimes(cluster.client, source(), **options)

    assert report.ok
