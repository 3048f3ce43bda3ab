"""Known faults, to be put back into the client: the simulation must find each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from aiohttp import ClientSession, TCPConnector

from bctrl_async import BctrlError, BctrlSession, Runtime, StopOutcome, StopResult
from bctrl_async._calls.call import Call
from bctrl_async._limiter.limiter import Limiter
from bctrl_async.bulk._cancel import CancelLevel, Worker
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.observer import StopObserver
from bctrl_async.outcomes import result_of

_record, _aborted, _result_of = Ledger.record, Call.aborted, result_of
_release, _cancel = Limiter.release, Worker.cancel


def _record_unless_aborted(
    ledger: Ledger, outcome: StopOutcome, observer: StopObserver | None = None
) -> StopOutcome:
    if outcome.result is StopResult.UNKNOWN and "aborted" in str(outcome.error):
        return outcome
    return _record(ledger, outcome, observer)


def _aborted_without_doubt(call: Call[Any], reason: str) -> BctrlError:
    error = _aborted(call, reason)
    error.may_have_stopped = False
    return error


def _result_by_status(ended: Runtime | BctrlError) -> StopResult:
    result = _result_of(ended)
    if result is StopResult.NOT_SENT and isinstance(ended, BctrlError) and ended.status:
        return StopResult.REJECTED
    return result


def _cancel_no_call(worker: Worker, level: CancelLevel) -> bool:
    if level is CancelLevel.READING and worker.call is not None:
        return False
    return _cancel(worker, level)


async def _never_answered(*_: object) -> bool:
    return False


def _release_if_answered(limiter: Limiter, answer: object) -> None:
    if answer is not None:
        _release(limiter, answer)


async def _stop_without_a_look(
    session: BctrlSession, call: Call[Runtime], http: ClientSession, **_: object
) -> Runtime:
    return await session._sender.attempt_loop(call, http)


FAULTS: dict[str, tuple[str, dict[str, Callable[..., object] | object]]] = {
    "foreign-404": (
        "a 404 of another service settles a stop as not_found",
        {"bctrl_async.errors.BctrlNotFoundError.names_runtime": True},
    ),
    "page-accepted": (
        "a login page with status 200 is an accepted stop",
        {
            "bctrl_async._http.response._is_page_type": lambda _: None,
            "bctrl_async._http.response._begins_like_page": lambda _: False,
        },
    ),
    "stray-answer": (
        "a connection is reused on which a stray answer arrived while it was idle",
        {
            "bctrl_async._http.connector.Connector.connect": TCPConnector.connect,
            "bctrl_async._http.connector.Connector._release": TCPConnector._release,
        },
    ),
    "another-runtime": (
        "an answer about another runtime settles a stop",
        {"bctrl_async._http.transport.check_answer": lambda *_: None},
    ),
    "dead-target": (
        "a target that is never answered passes for a dead server",
        {"bctrl_async.bulk._run.Run._is_answered": _never_answered},
    ),
    "stop-reading": (
        "targets that wait for the limiter are still sent after stop_reading",
        {"bctrl_async.bulk._cancel.Worker.cancel": _cancel_no_call},
    ),
    "cut-off": (
        "a target that was only throttled when the run ended is rejected",
        {"bctrl_async.outcomes.result_of": _result_by_status},
    ),
    "own-work": (
        "stop_runtime raises a conflict although its own earlier attempt stopped the runtime",
        {"bctrl_async.BctrlSession._stop": _stop_without_a_look},
    ),
    "locked": (
        "an absurd Retry-After locks the session",
        {
            "bctrl_async._limiter.rate.PROBE_INTERVAL": math.inf,
            "bctrl_async._limiter.limiter.PROBE_INTERVAL": math.inf,
        },
    ),
    "lost-outcome": (
        "the target of a worker that is cancelled in flight has no outcome",
        {"bctrl_async.bulk._ledger.Ledger.record": _record_unless_aborted},
    ),
    "aborted-not-sent": (
        "a request that is abandoned in flight counts as not sent",
        {"bctrl_async._calls.call.Call.aborted": _aborted_without_doubt},
    ),
    "lost-slot": (
        "a cancelled attempt keeps its slot",
        {"bctrl_async._limiter.limiter.Limiter.release": _release_if_answered},
    ),
    "torn-journal": (
        "the torn line of a journal is not cut off, and the next line is appended to it",
        {"os.ftruncate": lambda *_: None},
    ),
}
"""What each fault does, and what is patched for it."""


@contextmanager
def put_back(name: str | None) -> Iterator[None]:
    """Put a fault back into the client; None is no fault."""
    with ExitStack() as stack:
        if name is not None:
            for target, replacement in FAULTS[name][1].items():
                stack.enter_context(patch(target, replacement))
        yield
