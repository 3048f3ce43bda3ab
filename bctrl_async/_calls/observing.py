"""Notify observers of calls; an exception of an observer never reaches a call."""

from __future__ import annotations

import logging
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import msgspec
from multidict import CIMultiDict
from yarl import URL

from bctrl_async._calls.call import Call, annotate
from bctrl_async._calls.results import explain, outcome_of
from bctrl_async._http.request import Operation, checked_headers
from bctrl_async._kinds import Kind
from bctrl_async.errors import BctrlError
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.observer import (
    Attempt,
    AttemptObserver,
    BulkObserver,
    CallObserver,
    Observer,
    StopObserver,
)

_log = logging.getLogger("bctrl_async")

_P = ParamSpec("_P")
_T = TypeVar("_T")


def notify(method: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
    """Call a method of an observer; return None if it raised."""
    try:
        return method(*args, **kwargs)
    # A task is cancelled at an `await`, so this CancelledError is the observer's own.
    except (Exception, CancelledError):  # noqa: BLE001 - logged, and the call goes on.
        _log.exception(
            "an observer raised an exception, which is ignored",
            extra={"bctrl.event": "observer_failed"},
        )
        return None


@contextmanager
def observe_call(
    observer: Observer | BulkObserver | None,
    operation: Operation[_T],
    workspace_id: object,
    alias: object,
) -> Iterator[CallObserver | None]:
    """Observe a call: yield its observer, if any, and name the call in its error."""
    call_observer: CallObserver | None = None
    if observer is not None:
        name = None if alias is None else str(alias)
        call_observer = (
            notify(observer.begin_call, operation.name, str(workspace_id), name)
            or CallObserver()
        )
    try:
        yield call_observer
    except BaseException as error:
        if isinstance(error, BctrlError) and error.workspace_id is None:
            annotate(error, operation.name, workspace_id, alias)
        if call_observer is not None:
            notify(call_observer.end, error)
        raise
    if call_observer is not None:
        notify(call_observer.end, None)


def observe_attempt(
    observer: CallObserver | StopObserver,
    call: Call[_T],
    url: URL,
    headers: CIMultiDict[str],
) -> AttemptObserver:
    """Observe an attempt that starts, and add the headers of its observer."""
    attempt = Attempt(
        number=call.attempts,
        operation=call.operation.name,
        stops=call.operation.stops,
        method=call.operation.method,
        url=url.with_path(call.path, encoded=True),
        template=call.operation.template,
    )
    attempt_observer = notify(observer.begin_attempt, attempt) or AttemptObserver()
    notify(_add_headers, headers, attempt_observer)
    return attempt_observer


def _add_headers(headers: CIMultiDict[str], observer: AttemptObserver) -> None:
    # The headers of the session and of the call take precedence.
    for name, value in checked_headers(observer.headers()).items():
        headers.setdefault(name, value)


class ObservedStop:
    """A single stop and its observer, made before the stop waits for a slot."""

    def __init__(self, observer: Observer, workspace_id: str, alias: str) -> None:
        self._target = RuntimeRef(workspace_id, alias)
        self._started = time.monotonic()
        self.observer: StopObserver = (
            notify(observer.begin_stop, *self._target) or StopObserver()
        )

    def fail(self, error: BaseException, call: Call[Runtime] | None) -> None:
        """Notify the observer of what the stop raises, then of the outcome."""
        notify(self.observer.raised, error)
        self.end(error, call)

    def end(self, result: Runtime | BaseException, call: Call[Runtime] | None) -> None:
        """Notify the observer of the outcome; `call` is None if no call was made."""
        answer = _answer_of(result, call)
        attempts = 0
        request_id = sent_at = None
        if call is not None:
            attempts = call.attempts
            request_id = call.request_id
            sent_at = call.sent_at
        outcome = outcome_of(
            self._target,
            answer,
            attempts=attempts,
            elapsed=time.monotonic() - self._started,
            request_id=request_id,
            sent_at=sent_at,
        )
        # If the answer is a conflict, the result may be a runtime that the call then
        # got. If that runs, it was started after the conflict, and is left out.
        if (
            answer is not result
            and isinstance(result, Runtime)
            and result.status.is_final
        ):
            outcome = msgspec.structs.replace(outcome, runtime=result)
        notify(self.observer.end, explain(outcome))


def _answer_of(
    result: Runtime | BaseException, call: Call[Runtime] | None
) -> Runtime | BctrlError:
    """Return the answer or the error of a stop that ends with a result."""
    if call is not None:
        failure = call.retries.last_failure
        if failure is not None and failure.kind is Kind.NOT_RUNNING:
            # The conflict settles the stop, whatever the GET that follows returns.
            return call.error(failure)
    if isinstance(result, Runtime | BctrlError):
        return result
    reason = f"{type(result).__name__} was raised"
    error = BctrlError(f"aborted because {reason}")
    if call is not None:
        error = call.error(call.aborted(reason))
    error.__cause__ = result
    return error
