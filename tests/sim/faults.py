"""Known faults, put back into the client: the simulation must find each."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from aiohttp import TCPConnector
from msgspec.structs import replace

from bctrl_async import BctrlError, BctrlSession, Runtime, StopOutcome, StopResult
from bctrl_async._calls.call import Call
from bctrl_async._calls.results import result_of, running_of
from bctrl_async._kinds import Doubt, Failure
from bctrl_async._limiter.bounds import FixedRate
from bctrl_async._limiter.evidence import Evidence, History
from bctrl_async._limiter.gate import Gate
from bctrl_async._limiter.limiter import Limiter, RecalledError
from bctrl_async._limiter.queues import Priority
from bctrl_async.bulk._cancel import CancelLevel
from bctrl_async.bulk._input import Input
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._parked import Stop
from bctrl_async.bulk._polls import Workspace
from bctrl_async.bulk._run import Run
from bctrl_async.bulk._state import RunState, Worker
from bctrl_async.filters import Selection
from bctrl_async.journal import JournalFile
from bctrl_async.models import RuntimeRef
from bctrl_async.observer import StopObserver

_record, _aborted = Ledger.record, Call.aborted
_result_of, _running_of = result_of, running_of
_release, _cancel = Limiter.release, Worker.cancel
_set_ended_early = RunState.set_ended_early
_next_gate, _prepare = Limiter._next_gate, Input.prepare
_on_throttled, _on_start = Evidence.on_throttled, FixedRate.on_start
_done, _correct = JournalFile.done, JournalFile.correct
_end, _correct_ledger, _look_again = Ledger.end, Ledger.correct, Run._look_again


def _record_unless_aborted(
    ledger: Ledger, outcome: StopOutcome, observer: StopObserver | None = None
) -> StopOutcome:
    if outcome.result is StopResult.UNKNOWN and "aborted" in str(outcome.error):
        return outcome
    return _record(ledger, outcome, observer)


def _aborted_without_doubt(call: Call[Any], reason: str) -> Failure:
    return replace(_aborted(call, reason), in_doubt=False)


def _result_by_status(answer: Runtime | BctrlError) -> StopResult:
    result = _result_of(answer)
    if result is StopResult.REJECTED and type(answer) is BctrlError:
        return StopResult.NOT_SENT
    return result


def _not_running_if_accepted(
    result: StopResult, runtime: Runtime | None
) -> bool | None:
    return False if result.is_accepted else _running_of(result, runtime)


def _cancel_no_call(worker: Worker, level: CancelLevel) -> bool:
    if level is CancelLevel.READING and worker.call is not None:
        return False
    return _cancel(worker, level)


def _set_known_reason(state: RunState, reason: BctrlError) -> None:
    if state.failure is not None or "the run failed" not in reason.summary:
        _set_ended_early(state, reason)


async def _never_answered(*_: object) -> bool:
    return False


def _release_if_answered(limiter: Limiter, answer: object, *history: History) -> bool:
    return answer is not None and _release(limiter, answer, *history)


def _show_limit_of_all(evidence: Evidence, workspace: str) -> bool:
    evidence._is_of_all = False
    return _on_throttled(evidence, workspace)


def _start_in_past(rate: FixedRate, now: float) -> None:
    _on_start(rate, min(now, max(rate._next_start, 0.0)))


def _wait_with_worker(_: object, stop: Stop) -> None:
    stop.call.retries.may_park = False


async def _prepare_after_reader(
    source: Input, on_list: Callable[[Selection], Awaitable[None]]
) -> None:
    async with source._reader_lock:
        await _prepare(source, on_list)


def _no_lane_for_singles(
    limiter: Limiter, priority: Priority, history: History
) -> Gate:
    if priority is Priority.SINGLE:
        return limiter._all
    return _next_gate(limiter, priority, history)


def _move_bulk_waiters(limiter: Limiter, workspace: str, _: Gate) -> None:
    for waiter in limiter._all.waiting:
        if waiter.history.workspace == workspace and waiter.history.may_park:
            waiter.fail(RecalledError("its workspace is throttled"))


def _done_by_all_entries(
    journal: JournalFile, target: RuntimeRef, _: float
) -> StopOutcome | None:
    return _done(journal, target)


def _correct_what_was_read(journal: JournalFile, selection: Selection) -> None:
    with patch.object(journal, "refresh", lambda: None):
        _correct(journal, selection)


def _correct_by_last_list(journal: JournalFile, selection: Selection) -> None:
    journal._listed.clear()
    _correct(journal, selection)


def _list_no_more(workspace: Workspace, *_: float, recurs: bool) -> None:
    del recurs
    workspace.list_at = math.inf


def _end_without_new(ledger: Ledger, total: int) -> None:
    if ledger.started_since:
        ledger.started_since = ()
    _end(ledger, total)


async def _find_targets_again(run: Run) -> None:
    await _look_again(run)
    selection = run.source.selection
    if selection is not None and run.ledger.started_since is not None:
        items = selection.items
        run.ledger.started_since += tuple(
            item for item in items if isinstance(item, Runtime)
        )


async def _never_look(_: Run) -> None:
    pass


def _set_uncontradicted(state: RunState, reason: BctrlError) -> None:
    if "says now that they run" not in reason.summary:
        _set_ended_early(state, reason)


async def _correct_by_first_list(ledger: Ledger, selection: Selection) -> None:
    if ledger.started_since is None:
        await _correct_ledger(ledger, selection)


async def _stop_without_a_look(
    _: BctrlSession, call: Call[Runtime], failure: Failure, *__: object, **___: object
) -> Runtime:
    raise call.error(failure)


class KnownFault(NamedTuple):
    """A fault that the client had, or might have.

    Attributes:
        does: What it does.
        rule: The rule that it breaks.
        patches: The objects to replace, by their names.
        shares_journal: True if only bulk stops that share a journal show it.
    """

    does: str
    rule: str
    patches: dict[str, object]
    shares_journal: bool = False


FAULTS = {
    "accepted-ok": KnownFault(
        "a runtime whose stop was accepted runs no longer",
        "not ok",
        {"bctrl_async._calls.results.running_of": _not_running_if_accepted},
    ),
    "foreign-404": KnownFault(
        "a 404 of another service settles a stop as not_found",
        "is there",
        {"bctrl_async._kinds.Kind.WRONG_PATH.result": StopResult.NOT_FOUND},
    ),
    "foreign-503": KnownFault(
        "a 503 of a gateway is proof that nothing was done",
        "had an effect",
        {
            "bctrl_async._kinds.Kind.GATEWAY_BUSY.doubt": Doubt.NO,
            "bctrl_async._kinds.Kind.GATEWAY_BUSY.result": StopResult.REJECTED,
        },
    ),
    "foreign-4xx": KnownFault(
        "any 4xx of a gateway is proof that nothing was done",
        "had an effect",
        {"bctrl_async._http.response._NOT_FORWARDED": frozenset(range(400, 500))},
    ),
    "dead-upstream": KnownFault(
        "a gateway's 503 for a dead target passes for throttling",
        "dead targets",
        {"bctrl_async._limiter.answers.Answers.throttles_alone": lambda *_: False},
    ),
    "lone-503": KnownFault(
        "a gateway's 503 costs an attempt although all are answered so",
        "outage",
        {"bctrl_async._limiter.answers.Answers.throttles_alone": lambda *_: True},
    ),
    "page-accepted": KnownFault(
        "a login page with status 200 is an accepted stop",
        "runs on",
        {
            "bctrl_async._http.response._is_page_type": lambda _: None,
            "bctrl_async._http.response._begins_like_page": lambda *_: False,
        },
    ),
    "stray-answer": KnownFault(
        "a connection is reused on which a stray answer arrived while it was idle",
        "had an effect",
        {
            "bctrl_async._http.fast.answer.Connector.accepts": lambda *_: True,
            "bctrl_async._http.fast.answer.Connector._release": TCPConnector._release,
        },
    ),
    "another-runtime": KnownFault(
        "an answer about another runtime settles a stop",
        "runs on",
        {"bctrl_async._http.transport.check_answer": lambda *_: None},
    ),
    "dead-target": KnownFault(
        "a target that is never answered passes for a dead server",
        "dead targets",
        {"bctrl_async.bulk._breaker.CircuitBreaker._send_canary": _never_answered},
    ),
    "stop-reading": KnownFault(
        "targets that wait for the limiter are still sent after stop_reading",
        "begun after the end",
        {"bctrl_async.bulk._state.Worker.cancel": _cancel_no_call},
    ),
    "cut-off": KnownFault(
        "a target that was throttled when the run ended is not sent",
        "was sent",
        {"bctrl_async._calls.results.result_of": _result_by_status},
    ),
    "own-work": KnownFault(
        "stop_runtime raises a conflict although its own attempt stopped the runtime",
        "own work",
        {"bctrl_async.BctrlSession._get_stopped_or_raise": _stop_without_a_look},
    ),
    "lost-outcome": KnownFault(
        "the target of a worker that is cancelled in flight has no outcome",
        "lost outcome",
        {"bctrl_async.bulk._ledger.Ledger.record": _record_unless_aborted},
    ),
    "aborted-not-sent": KnownFault(
        "a request that is abandoned in flight counts as not sent",
        "was sent",
        {"bctrl_async._calls.call.Call.aborted": _aborted_without_doubt},
    ),
    "held-input": KnownFault(
        "throttled targets of a workspace over its quota hold up all others",
        "throttled others",
        {"bctrl_async.bulk._parked._MAX_STOPS": 0},
    ),
    "held-retries": KnownFault(
        "a stop that is to be retried waits for the next item of the input",
        "late retry",
        {"bctrl_async.bulk._input.Input.prepare": _prepare_after_reader},
    ),
    "held-workers": KnownFault(
        "a worker waits for the lane of a throttled workspace, and for no other target",
        "throttled others",
        {"bctrl_async.bulk._sender.BulkSender._turn": _wait_with_worker},
    ),
    "one-tenant": KnownFault(
        "a workspace that is throttled alone shows a limit for all",
        "throttled others",
        {"bctrl_async._limiter.evidence.Evidence.on_throttled": _show_limit_of_all},
    ),
    "costly-429": KnownFault(
        "a throttled attempt costs an attempt of the policy",
        "throttled others",
        {
            "bctrl_async._kinds.Kind.THROTTLED.is_throttling": False,
            "bctrl_async._kinds.Kind.BUSY.is_throttling": False,
        },
    ),
    "costly-descriptor": KnownFault(
        "a connection that the machine cannot hold costs an attempt",
        "calm",
        {"bctrl_async._kinds.Kind.NO_RESOURCES.is_local": False},
    ),
    "limit-by-targets": KnownFault(
        "targets that are throttled for ever count as news of a limit that is known",
        "throttled others",
        {
            "bctrl_async._limiter.evidence.Evidence.on_throttled": _show_limit_of_all,
            "bctrl_async._limiter.rate.AdaptiveRate._tells_of_limit": lambda *_: True,
        },
    ),
    "gateway-retry-after": KnownFault(
        "a Retry-After of a gateway holds more than its own call",
        "throttled others",
        {"bctrl_async._kinds.Kind.GATEWAY_BUSY.is_unanswered": False},
    ),
    "caught-up": KnownFault(
        "after a stall, all attempts start that the rate would have allowed meanwhile",
        "rate",
        {"bctrl_async._limiter.bounds.FixedRate.on_start": _start_in_past},
    ),
    "kept-lane": KnownFault(
        "a call keeps its slot in the lane of its workspace",
        "slot left",
        {"bctrl_async._limiter.limiter.Limiter.leave_lane": lambda *_: None},
    ),
    "no-lane": KnownFault(
        "single calls wait in no lane",
        "flood",
        {"bctrl_async._limiter.limiter.Limiter._next_gate": _no_lane_for_singles},
    ),
    "no-move": KnownFault(
        "single calls that wait for a slot do not move to the lane of their workspace",
        "flood",
        {"bctrl_async._limiter.limiter.Limiter._move_waiters": _move_bulk_waiters},
    ),
    "lost-slot": KnownFault(
        "a cancelled attempt keeps its slot",
        "stuck",
        {"bctrl_async._limiter.limiter.Limiter.release": _release_if_answered},
    ),
    "unread-ok": KnownFault(
        "a run that an error leaves before its first item has not ended early",
        "ok, but not all read",
        {
            "bctrl_async.bulk._run.Run._set_unread": lambda *_: None,
            "bctrl_async.bulk._state.RunState.set_ended_early": _set_known_reason,
        },
    ),
    "lookup-raises": KnownFault(
        "the error of a lookup that gets no thread leaves its call",
        "raised",
        {"bctrl_async._http.failures._tells_of_threads": lambda _: False},
    ),
    "torn-journal": KnownFault(
        "the torn line of a journal is not cut off, and the next is appended to it",
        "journal",
        {"os.ftruncate": lambda *_: None},
    ),
    "shared-past": KnownFault(
        "what a run writes to a shared journal is the past of a run that began before",
        "past",
        {"bctrl_async.journal.JournalFile.done": _done_by_all_entries},
        shares_journal=True,
    ),
    "unread-journal": KnownFault(
        "a list corrects only what the journal had when its run began",
        "listed",
        {"bctrl_async.journal.JournalFile.correct": _correct_what_was_read},
        shares_journal=True,
    ),
    "late-answer": KnownFault(
        "a stop is as new as its answer, and newer than a list that came before",
        "listed",
        {"bctrl_async.journal._known_at": lambda outcome: outcome.at},
        shares_journal=True,
    ),
    "late-poll": KnownFault(
        "a poll comes ten seconds after the last",
        "late outcome",
        {"bctrl_async.bulk._polls.probe_delay": lambda *_: 10.0},
    ),
    "no-lists": KnownFault(
        "each runtime is got, however many of a workspace are polled",
        "many polls",
        {"bctrl_async.bulk._polls._MIN_FOR_LIST": math.inf},
    ),
    "last-list": KnownFault(
        "a list that fails once is the last, and each runtime is got from then on",
        "many polls",
        {"bctrl_async.bulk._polls.Workspace.on_list_failure": _list_no_more},
    ),
    "deaf-lists": KnownFault(
        "a list that is not answered passes for a server that is down",
        "unasked",
        {"bctrl_async.bulk._sender.BulkSender.has_answered_since": lambda *_: False},
    ),
    "hasty-lists": KnownFault(
        "a list is tried again soon, however many have failed",
        "many lists",
        {"bctrl_async.bulk._polls._MAX_PAUSE": 0.5},
    ),
    "long-list": KnownFault(
        "a list that hangs has the time limit of a call, however short the polls are",
        "late outcome",
        {"bctrl_async._calls.bulk_calls.at_most": lambda limit, _: limit},
    ),
    "unseen-start": KnownFault(
        "a last look does not tell of runtimes that have started since",
        "not seen",
        {"bctrl_async.bulk._ledger.Ledger.end": _end_without_new},
    ),
    "ended-start": KnownFault(
        "a last look tells of targets as of runtimes that have started since",
        "never started",
        {"bctrl_async.bulk._run.Run._look_again": _find_targets_again},
    ),
    "trusted-word": KnownFault(
        "a run is ok although a runtime that was stopped runs again",
        "taken back",
        {"bctrl_async.bulk._state.RunState.set_ended_early": _set_uncontradicted},
    ),
    "uncorrected": KnownFault(
        "a last look corrects no journal",
        "look in journal",
        {"bctrl_async.bulk._ledger.Ledger.correct": _correct_by_first_list},
    ),
    "skipped-look": KnownFault(
        "a run ends without a last look",
        "look",
        {"bctrl_async.bulk._run.Run._look_again": _never_look},
    ),
    "forgotten-list": KnownFault(
        "a last look takes the place of the list before it",
        "listed",
        {"bctrl_async.journal.JournalFile.correct": _correct_by_last_list},
        shares_journal=True,
    ),
}


@contextmanager
def put_back(name: str | None) -> Iterator[None]:
    """Put a fault back into the client; None is no fault."""
    with ExitStack() as stack:
        if name is not None:
            for target, replacement in FAULTS[name].patches.items():
                stack.enter_context(patch(target, replacement))
        yield
