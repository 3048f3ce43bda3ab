"""The chunks of a run on a cluster whose tasks fail, without a cluster."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from bctrl_async import BctrlError, RuntimeRef, StopOutcome, StopResult
from bctrl_async.bulk._cancel import RunState
from bctrl_async.bulk._targets import Input
from bctrl_async.dask._dispatcher import Dispatcher
from bctrl_async.dask._distributed import Cluster, DiedError
from bctrl_async.dask._messages import Begun, Known, Outcomes, Result, encode
from bctrl_async.outcomes import now


class DyingCluster:
    """A cluster on which workers die while chunks wait for them.

    Args:
        deaths: The number of chunks that fail so; all later ones succeed.
    """

    def __init__(self, deaths: int) -> None:
        self._deaths = deaths
        self.submitted: list[int] = []

    def submit(self, number: int, *_: object) -> int:
        self.submitted.append(number)
        return number

    async def result(self, number: int) -> bytes:
        await asyncio.sleep(0)
        if len(self.submitted) <= self._deaths:
            raise DiedError("4 workers died that had its chunk")
        stopped = Known(0, StopResult.STOPPED, None, None, 1, 0.1, now())
        return encode(Result([encode(Begun(number)), encode(Outcomes(number, [stopped]))]))

    def release(self, future: object) -> None:
        pass


async def dispatch(cluster: DyingCluster) -> tuple[list[StopOutcome], RunState]:
    """Hand out one target; return its outcomes, and how the run has ended."""
    outcomes: list[StopOutcome] = []
    ending = RunState(Input([]))

    def fail(error: BaseException) -> None:
        raise error

    def ignore(*_: Any) -> None:  # noqa: ANN401 - any callback.
        pass

    dispatcher = Dispatcher(
        cast("Cluster", cluster),
        b"",
        ending,
        record=outcomes.append,
        throttled=ignore,
        end_early=ending.end_early,
        fail=fail,
        changed=ignore,
    )
    dispatcher.hand_out([7], [RuntimeRef("ws-1", "crm")])
    while dispatcher.tasks:
        await asyncio.sleep(0)
    return outcomes, ending


@pytest.mark.parametrize("deaths", [1, 2])
async def test_a_chunk_that_only_waited_for_a_worker_that_died_is_handed_out_again(
    deaths: int,
) -> None:
    """Fault: dask counts the deaths also for it, and the run ended with all the rest not sent."""
    cluster = DyingCluster(deaths)

    (outcome,), ending = await dispatch(cluster)

    assert (outcome.index, outcome.result) == (7, StopResult.STOPPED)
    assert cluster.submitted == list(range(1, deaths + 2))
    assert ending.goes_on()


async def test_a_chunk_that_no_worker_survives_ends_the_run() -> None:
    cluster = DyingCluster(100)

    (outcome,), ending = await dispatch(cluster)

    assert (outcome.index, outcome.result) == (7, StopResult.NOT_SENT)
    assert cluster.submitted == [1, 2, 3]
    assert isinstance(ending.reason, DiedError)


async def test_any_other_error_of_a_worker_names_its_class() -> None:
    failed: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    failed.set_exception(MemoryError("no room"))
    cluster = Cluster(cast("Any", None), "run")

    with pytest.raises(BctrlError, match=r"^a worker failed: MemoryError: no room\. Read the logs"):
        await cluster.result(cast("Any", failed))
