"""The outcomes of the targets of a chunk, whichever workers had it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bctrl_async import RuntimeRef, StopResult
from bctrl_async.dask._chunks import Chunk
from bctrl_async.dask._messages import Known
from bctrl_async.errors import BctrlError
from bctrl_async.outcomes import now

REASON = BctrlError("the run was cancelled")


def chunk() -> Chunk:
    return Chunk(0, [7, 8], [RuntimeRef("ws-1", "a"), RuntimeRef("ws-1", "b")])


def known(number: int, result: StopResult) -> Known:
    error = None if result.settled else BctrlError(f"it is {result}")
    return Known(number, result, None, error, 1, 0.1, now())


def results(found: Chunk) -> list[StopResult]:
    return [outcome.result for outcome in found.end(REASON)]


def test_a_chunk_that_no_worker_has_begun_is_not_sent() -> None:
    assert results(chunk()) == [StopResult.NOT_SENT, StopResult.NOT_SENT]


def test_a_chunk_that_was_begun_is_unknown() -> None:
    begun = chunk()
    begun.begin()

    outcomes = list(begun.end(REASON))

    assert [outcome.result for outcome in outcomes] == [StopResult.UNKNOWN, StopResult.UNKNOWN]
    assert [outcome.index for outcome in outcomes] == [7, 8]
    assert str(outcomes[0].error) == (
        "stop of 'a' in workspace 'ws-1': no outcome came back: the run was cancelled (the runtime "
        "may have stopped). Stop it again: a stop is safe to repeat"
    )


def test_the_first_settled_outcome_stays() -> None:
    repeated = chunk()
    repeated.begin()
    first = list(repeated.add([known(0, StopResult.STOPPED)]))
    repeated.begin()
    second = list(
        repeated.add([known(0, StopResult.ALREADY_STOPPED), known(1, StopResult.STOPPED)])
    )

    assert [(outcome.index, outcome.result) for outcome in first + second] == [
        (7, StopResult.STOPPED),
        (8, StopResult.STOPPED),
    ]
    assert results(repeated) == []


def test_an_unsettled_outcome_is_replaced() -> None:
    repeated = chunk()
    repeated.begin()
    assert list(repeated.add([known(0, StopResult.UNKNOWN)])) == []
    assert not repeated.is_known
    repeated.begin()

    settled = list(repeated.add([known(0, StopResult.STOPPED), known(1, StopResult.REJECTED)]))

    assert [outcome.result for outcome in settled] == [StopResult.STOPPED]
    assert repeated.is_known


def test_what_a_dead_worker_may_have_sent_is_not_reported_as_not_sent() -> None:
    """Fault: the second worker has not sent it, and the first, which has, is forgotten."""
    repeated = chunk()
    repeated.begin()
    list(repeated.add([known(1, StopResult.REJECTED)]))
    repeated.begin()
    list(repeated.add([known(0, StopResult.NOT_SENT), known(1, StopResult.NOT_SENT)]))

    first, second = repeated.end(REASON)

    assert first.result is StopResult.UNKNOWN
    assert first.error is not None
    assert first.error.may_have_stopped
    assert second.result is StopResult.NOT_SENT


@pytest.mark.parametrize("second", [StopResult.NOT_SENT, StopResult.REJECTED])
def test_a_target_that_is_unknown_to_the_first_worker_stays_so(second: StopResult) -> None:
    """Fault: a request that may have stopped the runtime is reported as never sent."""
    repeated = chunk()
    repeated.begin()
    list(repeated.add([known(0, StopResult.UNKNOWN), known(1, StopResult.STOPPED)]))
    repeated.begin()
    list(repeated.add([known(0, second)]))

    (outcome,) = repeated.end(REASON)

    assert outcome.result is StopResult.UNKNOWN
    assert outcome.error is not None
    assert outcome.error.may_have_stopped


def test_targets_that_are_handed_out_again_are_counted_once() -> None:
    first = chunk()
    second = first.again(5)

    assert results(first) == []
    assert results(second) == [StopResult.NOT_SENT, StopResult.NOT_SENT]
    assert second.tries == 2


def test_without_dask_the_import_says_what_to_install() -> None:
    program = "import sys; sys.modules['distributed'] = None; import bctrl_async.dask"
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )

    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: bctrl_async.dask needs dask.distributed: "
        "python -m pip install 'bctrl-async[dask]'"
    )


def test_another_module_that_is_missing_is_named() -> None:
    program = "import sys; sys.modules['tornado'] = None; import bctrl_async.dask"
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )

    assert "bctrl_async.dask needs" not in done.stderr
    assert "tornado" in done.stderr.splitlines()[-1]
