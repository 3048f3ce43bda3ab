"""Poll the runtimes of a bulk stop: get one of them, or list a workspace for many."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial

from msgspec.structs import replace

from bctrl_async import _quick_failures
from bctrl_async._calls.bulk_calls import BulkCall, BulkCalls
from bctrl_async._calls.call import Call
from bctrl_async._calls.results import (
    outcome_with_runtime,
    outcome_without_answer,
    outcome_without_runtime,
)
from bctrl_async._http.lists import RuntimeList
from bctrl_async._kinds import Failure, Kind
from bctrl_async.bulk._polls import Poll, Polls, Workspace
from bctrl_async.bulk._sender import BulkSender
from bctrl_async.bulk._state import Worker
from bctrl_async.errors import log_fields, subject_of
from bctrl_async.models import Runtime
from bctrl_async.outcomes import StopOutcome

_log = logging.getLogger("bctrl_async")

_SLICE = 1_000
"""The number of listed runtimes that are handled before other tasks get a turn."""
_CANARY_TIME = 2.5
"""The least seconds for a canary, after a list that took all its time."""


class Poller:
    """The requests of polls, and what their answers say."""

    def __init__(self, polls: Polls, sender: BulkSender, calls: BulkCalls) -> None:
        self._polls = polls
        self._sender = sender
        self._calls = calls

    async def work(
        self,
        worker: Worker,
        job: Poll | Workspace,
        hold: AbstractContextManager[None],
    ) -> StopOutcome | None:
        """List a workspace or get a runtime; return the outcome of a poll if over.

        It is in `hold` while it waits for its turn in a throttled workspace.
        """
        if isinstance(job, Workspace):
            await self._list(worker, job, hold)
        elif job.is_over:
            return self._record(job)
        else:
            await self._get(worker, job, hold)
        return None

    def _record(self, poll: Poll) -> StopOutcome:
        outcome = replace(poll.outcome, elapsed=time.monotonic() - poll.started)
        # A stop that was never polled ends as the server answered it.
        if poll.failure is not None and not poll.is_answered:
            outcome = outcome_without_answer(outcome, poll.failure)
        self._polls.remove()
        return self._sender.ledger.record(outcome, poll.observer)

    async def _get(
        self, worker: Worker, poll: Poll, hold: AbstractContextManager[None]
    ) -> None:
        call = self._calls.poll(poll.outcome.target)
        call.retries.follow(poll.history)
        answer = await self._sender.send_poll(
            worker, call, poll.deadline, hold, poll.observer
        )
        if isinstance(answer, Runtime):
            outcome = outcome_with_runtime(poll.outcome, answer, call.sent_at)
            self._polls.on_answer(poll, outcome, _now())
        elif answer.kind is Kind.NOT_FOUND:
            error = call.error(answer)
            outcome = outcome_without_runtime(poll.outcome, error, call.sent_at)
            self._polls.on_answer(poll, outcome, _now())
        else:
            if poll.failure is None:
                # The log has the first of several failures, not each of 1,000 polls.
                _log_failure(call, answer)
            self._fail(poll, answer, call)

    def _fail(self, poll: Poll, failure: Failure, call: BulkCall) -> None:
        is_last = _would_fail_again(failure, call)
        self._polls.on_failure(poll, failure, _now(), is_last=is_last)

    async def _list(
        self, worker: Worker, workspace: Workspace, hold: AbstractContextManager[None]
    ) -> None:
        """List a workspace for all its polls but those whose runtimes are being got."""
        wait = 0.0
        # A list may be older than the answer to a stop that arrives meanwhile.
        polls = [poll for poll in workspace.polls if not poll.is_got]
        if polls:
            call = self._calls.list_of(workspace.name)
            started = _now()
            # If it is not answered, a canary shows whether others are.
            limit = call.limit.total or 0.0
            deadline = max(polls[0].deadline, started + limit + _CANARY_TIME)
            send = partial(self._sender.send_poll, worker, call, deadline, hold)
            answer = await self._sender.send_list(call, send)
            if isinstance(answer, Failure):
                self._on_list_failure(workspace, polls, answer, call, started)
                wait = answer.retry_after or 0.0
            else:
                workspace.on_list(len(answer))
                await self._on_list(polls, answer, call.sent_at)
        self._polls.end_list(workspace, _now(), wait)

    async def _on_list(
        self, polls: list[Poll], items: RuntimeList, sent_at: datetime | None
    ) -> None:
        """Update each poll whose runtime a list shows; get the others."""
        runtimes = await _by_alias(items)
        for number, poll in enumerate(polls, 1):
            if number % _SLICE == 0:
                await asyncio.sleep(0)
            if poll.is_over:
                # The run has ended meanwhile.
                continue
            runtime = runtimes.get(poll.outcome.target.alias)
            if runtime is None:
                self._polls.get(poll)
            else:
                outcome = outcome_with_runtime(poll.outcome, runtime, sent_at)
                self._polls.on_answer(poll, outcome, _now())

    def _on_list_failure(
        self,
        workspace: Workspace,
        polls: list[Poll],
        failure: Failure,
        call: Call[RuntimeList],
        started: float,
    ) -> None:
        """Record the failure of a list; get each runtime that the next is too late for.

        A GET would fail as well if the server is down or the machine cannot connect:
        that counts as a request of each poll.
        """
        _log_failure(call, failure)
        now = _now()
        is_down = failure.kind.is_local or (
            failure.kind.is_unanswered and not self._sender.has_answered_since(call)
        )
        if is_down:
            for poll in polls:
                self._fail(poll, failure, call)
            return
        recurs = _would_fail_again(failure, call)
        wait = failure.retry_after or 0.0
        workspace.on_list_failure(now, now - started, wait, recurs=recurs)
        comes_later = now < workspace.list_at
        for poll in polls:
            if not poll.is_over and (comes_later or now >= poll.deadline):
                self._polls.get(poll)


async def _by_alias(items: RuntimeList) -> dict[str | None, Runtime | None]:
    """Return the runtimes of a list; None if an alias is in it twice or unreadable."""
    runtimes: dict[str | None, Runtime | None] = {}
    for number, item in enumerate(items, 1):
        if number % _SLICE == 0:
            await asyncio.sleep(0)
        if isinstance(item, Runtime) and item.alias not in runtimes:
            runtimes[item.alias] = item
        else:
            runtimes[item.alias] = None
    return runtimes


def _log_failure(call: BulkCall, failure: Failure) -> None:
    """Log the failure of a poll, after which others may follow."""
    if _log.isEnabledFor(logging.INFO):
        error = call.attempt_error(failure)
        _log.info(
            "a poll failed: %s%s",
            subject_of(error),
            failure.summary,
            extra={"bctrl.event": "poll_failed", **log_fields(error)},
        )


def _would_fail_again(failure: Failure, call: BulkCall) -> bool:
    """Return True if another poll would fail as well."""
    # An earlier poll would only add load.
    patience = call.retries.policy.max_throttle_wait
    is_shut = failure.kind.is_throttling and (failure.retry_after or 0.0) > patience
    return (
        is_shut
        or _quick_failures.hangs(failure)
        or not call.retries.may_succeed(failure)
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
