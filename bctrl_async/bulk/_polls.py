"""The polls of a bulk stop, as data: which are due, and when. Sans-IO.

A runtime is polled until it has ended or its time is up. There are two cases:

1. Few runtimes of a workspace are polled. Each has its own time, and is got then.
2. Many are polled. The workspace has a time, and is listed then: that answers for all.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from heapq import heappop, heappush
from itertools import count

import msgspec

from bctrl_async import _quick_failures
from bctrl_async._calls.retry import RetryPolicy, probe_delay
from bctrl_async._kinds import Failure
from bctrl_async.observer import StopObserver
from bctrl_async.outcomes import StopOutcome

_MAX_POLLS = 100_000
"""The most runtimes that are polled, of 1.5 KB each; nothing is read beyond them."""
_MIN_FOR_LIST = 10
"""The number of polled runtimes from which a list answers for a workspace."""
_MAX_LIST_PER_POLL = 20
"""The most listed runtimes for each that is polled: a GET costs as much as some 20."""


class Poll(msgspec.Struct, eq=False):
    """The poll of a runtime that was asked to stop, until a deadline.

    Its target was read at `started`.
    """

    outcome: StopOutcome
    started: float
    deadline: float
    observer: StopObserver | None
    requests: int = 0
    """The number of requests so far, GETs and lists."""
    failure: Failure | None = None
    """The failure of the last request."""
    is_answered: bool = False
    """True once a request was answered."""
    is_got: bool = False
    """True while a GET is due or in flight."""
    is_over: bool = False
    """True once its outcome is final."""
    entry: int = -1
    """The number of its last entry in the schedule; earlier entries do not count."""


class Workspace:
    """The polls of a workspace; if it `is_listed`, they have no times of their own."""

    __slots__ = ("can_list", "is_listed", "list_size", "lists", "name", "polls")

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.polls: dict[Poll, None] = {}
        """In the order of their deadlines."""
        self.is_listed: bool = False
        self.can_list: bool = True
        """False once a list has failed in a way that would recur."""
        self.lists: int = 0
        """The number of lists so far."""
        self.list_size: int = 0
        """The number of runtimes in the last list."""

    @property
    def prefers_list(self) -> bool:
        """True if a list costs less than a GET of each."""
        count = len(self.polls)
        if not self.can_list or count < _MIN_FOR_LIST:
            return False
        return self.list_size <= count * _MAX_LIST_PER_POLL


class Polls:
    """The polls of a bulk stop, of some `seconds` each.

    A poll has a time, or its workspace has or is being listed, or its GET is due or in
    flight, or it is over.
    """

    def __init__(self, policy: RetryPolicy, seconds: float) -> None:
        self._policy = policy
        self._seconds = seconds
        self._workspaces: dict[str, Workspace] = {}
        self._schedule: list[tuple[float, int, Poll | Workspace]] = []
        self._numbers = count()
        self._gets: deque[Poll] = deque()
        self._over: deque[Poll] = deque()
        self._last_deadline = -math.inf
        self.count: int = 0
        """The number of polls whose outcomes are not recorded yet."""
        self.timer_at: float = math.inf
        """The time at which a timer ends the wait for the next; inf without a timer."""
        self._timer: asyncio.Future[None] | None = None

    @property
    def are_made(self) -> bool:
        """True unless the user wants no polls."""
        return self._seconds > 0

    @property
    def is_full(self) -> bool:
        """True if there are so many that nothing is read until some are over."""
        return self.count >= _MAX_POLLS

    def seconds_left(self) -> float:
        """Return the seconds until the last deadline; 0 if there is none."""
        if not self.count:
            return 0.0
        return max(self._last_deadline - asyncio.get_running_loop().time(), 0.0)

    def needs(self, outcome: StopOutcome) -> bool:
        """Return True if the server may have taken a stop, and the runtime may run."""
        return self.are_made and outcome.result.needs_poll and not outcome.ok

    def add(
        self,
        outcome: StopOutcome,
        started: float,
        observer: StopObserver | None,
        now: float,
    ) -> None:
        """Poll a runtime whose stop was just answered, or given up."""
        self._last_deadline = now + self._seconds
        poll = Poll(outcome, started, self._last_deadline, observer)
        name = outcome.target.workspace_id
        workspace = self._workspaces.get(name)
        if workspace is None:
            workspace = self._workspaces[name] = Workspace(name)
        workspace.polls[poll] = None
        self.count += 1
        if workspace.is_listed:
            return
        if workspace.prefers_list:
            workspace.is_listed = True
            delay = self._delay(0, has_answer=False)
            self._schedule_at(now + delay, workspace)
        else:
            self._schedule_get(poll, now)

    def _schedule_at(self, time: float, job: Poll | Workspace) -> None:
        # The number decides between equal times, as jobs cannot be compared.
        number = next(self._numbers)
        if isinstance(job, Poll):
            job.entry = number
        heappush(self._schedule, (time, number, job))

    def _schedule_get(self, poll: Poll, now: float) -> None:
        remaining = max(poll.deadline - now, 0.0)
        delay = self._delay(poll.requests, has_answer=poll.is_answered)
        self._schedule_at(now + min(delay, remaining), poll)

    def _delay(self, requests: int, *, has_answer: bool) -> float:
        """Return the seconds until the next request, given how many there were."""
        if _quick_failures.is_on and has_answer:
            return _quick_failures.POLL_DELAY
        return probe_delay(self._policy, requests + 1)

    @property
    def next_at(self) -> float:
        """The time of the next job; -inf if it is due now, inf if there is none."""
        if self._gets or self._over:
            return -math.inf
        schedule = self._schedule
        while schedule and not self._is_current(*schedule[0][1:]):
            heappop(schedule)
        return schedule[0][0] if schedule else math.inf

    def _is_current(self, number: int, job: Poll | Workspace) -> bool:
        """Return False for what is over, listed or scheduled again since then."""
        if isinstance(job, Workspace):
            return bool(job.polls)
        if job.is_over or job.entry != number:
            return False
        return not self._workspaces[job.outcome.target.workspace_id].is_listed

    def take(self, now: float) -> Poll | Workspace | None:
        """Return what is due: a poll that is over or to get, or a workspace to list."""
        if self._over:
            return self._over.popleft()
        while self._gets:
            poll = self._gets.popleft()
            if not poll.is_over:
                return poll
        next_at = self.next_at
        if next_at == math.inf or next_at > now:
            return None
        _, _, job = heappop(self._schedule)
        if isinstance(job, Poll):
            job.is_got = True
        return job

    def get(self, poll: Poll) -> None:
        """Get a runtime next, as no list has shown it."""
        poll.is_got = True
        self._gets.append(poll)

    def on_answer(self, poll: Poll, outcome: StopOutcome, now: float) -> None:
        """Keep the outcome that an answer gives, which may be final."""
        if not poll.is_over:
            poll.outcome = outcome
            poll.is_answered = True
        self._on_request(poll, now, is_last=not self.needs(outcome))

    def on_failure(
        self, poll: Poll, failure: Failure, now: float, *, is_last: bool
    ) -> None:
        """Keep the failure of a request, after which another may follow."""
        poll.failure = failure
        self._on_request(poll, now, is_last=is_last)

    def _on_request(self, poll: Poll, now: float, *, is_last: bool) -> None:
        was_got = poll.is_got
        poll.is_got = False
        poll.requests += 1
        if poll.is_over:
            # The run has ended meanwhile.
            return
        is_late = now >= poll.deadline or _quick_failures.is_enough(poll.requests)
        workspace = self._workspaces[poll.outcome.target.workspace_id]
        if is_last or is_late:
            self._end(poll, workspace)
        elif was_got and not workspace.is_listed:
            self._schedule_get(poll, now)

    def _end(self, poll: Poll, workspace: Workspace) -> None:
        poll.is_over = True
        self._over.append(poll)
        del workspace.polls[poll]
        if not workspace.polls:
            del self._workspaces[workspace.name]

    def end_list(self, workspace: Workspace, now: float) -> None:
        """Decide when a workspace is listed again, or each of its runtimes got."""
        workspace.lists += 1
        if workspace.prefers_list:
            delay = self._delay(workspace.lists, has_answer=bool(workspace.list_size))
            self._schedule_at(now + delay, workspace)
            return
        workspace.is_listed = False
        for poll in workspace.polls:
            if not poll.is_got:
                self._schedule_get(poll, now)

    def end(self) -> None:
        """End all polls."""
        for workspace in list(self._workspaces.values()):
            for poll in list(workspace.polls):
                self._end(poll, workspace)
        self._schedule.clear()
        self.cancel_timer()

    def remove(self) -> None:
        """Count a poll less, whose outcome is recorded."""
        self.count -= 1
        if not self.count:
            self.cancel_timer()

    def set_timer(self, timer: asyncio.Future[None], when: float) -> None:
        """Wait for the next until this timer is done, in place of an earlier timer."""
        self.cancel_timer()
        self._timer = timer
        self.timer_at = when

    def forget_timer(self, timer: asyncio.Future[None]) -> None:
        """Forget a timer that is done, unless another has taken its place."""
        if self._timer is timer:
            self._timer = None
            self.timer_at = math.inf

    def cancel_timer(self) -> None:
        """Wait no longer; the timer is done then, too."""
        if self._timer is not None:
            self._timer.cancel()
