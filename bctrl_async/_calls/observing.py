"""Notify observers of calls; an exception of an observer never reaches a call."""

from __future__ import annotations

import logging
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import msgspec
from multidict import CIMultiDict
from yarl import URL

from bctrl_async._calls.call import Call, annotate
from bctrl_async._calls.results import outcome_of
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
    call: CallObserver | None = None
    if observer is not None:
        names = str(workspace_id), None if alias is None else str(alias)
        call = notify(observer.begin_call, operation.name, *names) or CallObserver()
    try:
        yield call
    except BaseException as error:
        if isinstance(error, BctrlError) and error.workspace_id is None:
            annotate(error, operation.name, workspace_id, alias)
        if call is not None:
            notify(call.end, error)
        raise
    if call is not None:
        notify(call.end, None)


def observe_attempt(
    observer: CallObserver | StopObserver, call: Call[_T], url: URL, headers: CIMultiDict[str]
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
    observed = notify(observer.begin_attempt, attempt) or AttemptObserver()
    for name, value in (notify(_headers_of, observed) or {}).items():
        headers.setdefault(name, value)
    return observed


def _headers_of(attempt: AttemptObserver) -> Mapping[str, str]:
    return checked_headers(attempt.headers())


class ObservedStop:
    """A single stop and its observer, made before the stop waits for a slot."""

    def __init__(self, observer: Observer, workspace_id: str, alias: str) -> None:
        self._target = RuntimeRef(workspace_id, alias)
        self._began = time.monotonic()
        self.observer: StopObserver = notify(observer.begin_stop, *self._target) or StopObserver()

    def fail(self, error: BaseException, call: Call[Runtime] | None) -> None:
        """Notify the observer of what the stop raises, then of the outcome."""
        notify(self.observer.raised, error)
        self.end(error, call)

    def end(self, ended: Runtime | BaseException, call: Call[Runtime] | None) -> None:
        """Notify the observer of the outcome; `call` is None if no call was made."""
        last = None if call is None else call.retries.last_failure
        settled: Runtime | BctrlError
        if call is not None and last is not None and last.kind is Kind.NOT_RUNNING:
            # The conflict settles the stop, whatever the GET that follows returns.
            settled = call.error(last)
        elif isinstance(ended, Runtime | BctrlError):
            settled = ended
        else:
            name = type(ended).__name__
            settled = BctrlError(f"aborted: {name}")
            if call is not None:
                settled = call.error(call.aborted(name))
            settled.__cause__ = ended
        outcome = outcome_of(
            self._target,
            settled,
            attempts=0 if call is None else call.attempts,
            elapsed=time.monotonic() - self._began,
            request_id=None if call is None else call.request_id,
        )
        # A runtime that runs now was started after the conflict, so the outcome leaves it out.
        if settled is not ended and isinstance(ended, Runtime) and ended.status.is_final:
            outcome = msgspec.structs.replace(outcome, runtime=ended)
        notify(self.observer.end, outcome)
