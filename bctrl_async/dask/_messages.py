"""The messages between the workers and the coordinator of a bulk stop on a cluster.

They are msgpack, at a third of the cost of pickle. Only errors are pickled within them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import msgspec

from bctrl_async._calls.retry import RetryPolicy
from bctrl_async.bulk._cancel import CancelLevel
from bctrl_async.errors import BctrlError
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.outcomes import RuntimeState, StopOutcome, StopResult
from bctrl_async.pace import Pace


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a run that is the same for all chunks; pickled, since it has a function.

    Args:
        make_session: Makes the session of a worker.
        base_url: The server that the session must have.
        pace: The pace of all workers, or None.
        concurrency: The most stops at once of a chunk, or None.
        timeout: Seconds for one attempt, or None.
        retry: The retry policy, or None.
        verify: As for `BctrlSession.stop_runtimes`.
    """

    make_session: Callable[..., object]
    base_url: str
    pace: Pace | None
    concurrency: int | None
    timeout: float | None
    retry: RetryPolicy | None
    verify: bool | float


class Order(msgspec.Struct, array_like=True, frozen=True):
    """A chunk, as a worker gets it.

    Args:
        number: The number of the chunk.
        targets: The targets.
        patience: Seconds until the deadline of the run, or None.
    """

    number: int
    targets: Sequence[RuntimeRef]
    patience: float | None


class Known(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The outcome of one target of a chunk.

    Args:
        number: The target's position in its chunk.
    """

    number: int
    result: StopResult
    runtime: Runtime | None
    error: BctrlError | None
    attempts: int
    elapsed: float
    at: datetime
    state: RuntimeState
    request_id: str | None

    @classmethod
    def of(cls, outcome: StopOutcome) -> Known:
        """Make the message of an outcome whose index is the target's position."""
        return cls(
            outcome.index,
            outcome.result,
            outcome.runtime,
            outcome.error,
            outcome.attempts,
            outcome.elapsed,
            outcome.at,
            outcome.state,
            outcome.request_id,
        )

    def outcome(self, index: int, target: RuntimeRef) -> StopOutcome:
        """Return the outcome, of the target that stands at an index of the whole input."""
        return StopOutcome(
            index=index,
            target=target,
            result=self.result,
            runtime=self.runtime,
            error=self.error,
            attempts=self.attempts,
            elapsed=self.elapsed,
            at=self.at,
            state=self.state,
            request_id=self.request_id,
        )


class Begun(msgspec.Struct, array_like=True, tag=0, frozen=True):
    """A worker begins a chunk; no request of it was sent before."""

    chunk: int


class AllRead(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """A worker has begun all targets of a chunk, and has room for another chunk."""

    chunk: int


class Outcomes(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """Outcomes of a chunk that became known.

    Args:
        chunk: The chunk.
        known: The outcomes.
        ended_early: Why the worker has ended the chunk, or None.
    """

    chunk: int
    known: list[Known]
    ended_early: BctrlError | None = None


class Barrier(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """Sent by the coordinator to itself: all earlier messages have arrived."""


Message = Begun | AllRead | Outcomes | Barrier


class Result(msgspec.Struct, array_like=True, frozen=True):
    """The result of a chunk: its messages again, since a message may be lost.

    Args:
        messages: The encoded messages with its outcomes.
        throttled: The number of 429 and 503 answers.
        ended_early: Why the worker has ended the chunk, or None.
    """

    messages: list[bytes]
    throttled: int = 0
    ended_early: BctrlError | None = None


class End(msgspec.Struct, array_like=True, frozen=True):
    """The end of a run, as the workers are told of it."""

    reason: BctrlError
    level: CancelLevel


def _pickle_error(value: object) -> bytes:
    if not isinstance(value, BctrlError):
        raise TypeError(f"{type(value).__name__} is not part of a message")
    # Without cause and traceback, which dask makes part of every pickled exception: they may have
    # what cannot be pickled.
    return pickle.dumps((type(value), value.args, vars(value)))


def _unpickle_error(_: type, value: Any) -> object:  # noqa: ANN401 - msgspec's signature.
    # Dask itself unpickles what workers send.
    kind, args, attributes = pickle.loads(value)  # noqa: S301
    error = kind(*args)
    vars(error).update(attributes)
    return error


encode: Callable[[object], bytes] = msgspec.msgpack.Encoder(enc_hook=_pickle_error).encode
_message: Callable[[bytes], Message] = msgspec.msgpack.Decoder(
    Message, dec_hook=_unpickle_error
).decode
_result = msgspec.msgpack.Decoder(Result, dec_hook=_unpickle_error).decode
_end = msgspec.msgpack.Decoder(End, dec_hook=_unpickle_error).decode
_order = msgspec.msgpack.Decoder(Order).decode


def decode_message(data: bytes) -> Message:
    """Return a message of a worker."""
    return _message(data)


def decode_result(data: bytes) -> Result:
    """Return the result of a chunk."""
    return _result(data)


def decode_end(data: bytes) -> End:
    """Return the end of a run."""
    return _end(data)


def decode_order(data: bytes) -> Order:
    """Return a chunk."""
    return _order(data)
