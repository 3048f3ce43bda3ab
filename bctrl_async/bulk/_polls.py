"""The polls of a bulk stop, as data: which are due, and when. Sans-IO.

A runtime is polled until it has ended or its time is up. There are two cases:

1. Few runtimes of a workspace are polled. Each has its own time, and is got then.
2. Many are polled. The workspace has a time, and is listed then: that answers for all.

If lists fail, each runtime is got, and a list is tried ever later.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import count

import msgspec

from bctrl_async import _quick_failures
from bctrl_async._calls.retry import RetryPolicy, probe_delay
from bctrl_async._kinds import Failure
from bctrl_async._limiter.evidence import History
from bctrl_async.observer import StopObserver
from bctrl_async.outcomes import StopOutcome

_MAX_POLLS = 100_000
"""The most runtimes that are polled, of 1.5 KB each; nothing is read beyond them."""
_MIN_FOR_LIST = 10
"""The number of polled runtimes from which a list answers for a workspace."""
_MAX_LIST_PER_POLL = 20
"""The most listed runtimes for each that is polled: a GET costs as much as some 20."""
_MAX_FAILED_LISTS = 3
"""The number of lists that fail in a row until each runtime is got."""
_SLOW_LIST = 2.0
"""Seconds after which a list that fails is not tried again at once."""
_PAUSES_PER_LIST = 4
"""A slow list that fails takes at most a fifth of the time of polls."""
_MIN_PAUSE = 0.5
"""The least seconds between two lists, however many polls end between them."""
_MAX_PAUSE = 60.0
"""The most seconds between a list that failed and the next."""
_GATEWAY_PATIENCE = 60.0
"""Seconds for which a gateway's 503 may be throttling; later its target is dead."""
_CADENCE = RetryPolicy(base=0.5)
"""The delays between polls; those of the user's policy are for a server in trouble."""


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
    history: History = msgspec.field(default_factory=History)
    """The throttled requests in a row; it follows a stop that was not accepted."""
    is_answered: bool = False
    """True once a request was answered."""
    is_got: bool = False
    """True while a GET is due or in flight."""
    is_over: bool = False
    """True once its outcome is final."""
    entry: int = -1
    """The number of its last entry in the schedule, whose others do not count."""

    @property
    def is_throttled(self) -> bool:
        """True if its last request was throttled."""
        return self.failure is not None and self.failure.kind.is_throttling

    @property
    def retry_after(self) -> float:
        """The seconds for which the server has asked to wait, if it has."""
        if self.failure is None or self.failure.retry_after is None:
            return 0.0
        return self.failure.retry_after


class Workspace:
    """The polls of a workspace; if it `is_listed`, they have no times of their own."""

    __slots__ = (
        "entry",
        "failed_lists",
        "holds",
        "is_listed",
        "list_at",
        "list_size",
        "lists",
        "name",
        "polls",
        "waiting",
    )

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.polls: dict[Poll, None] = {}
        """In the order of their deadlines."""
        self.is_listed: bool = False
        self.list_at: float = -math.inf
        """The time before which it is not listed; inf if no list would succeed."""
        self.lists: int = 0
        """The number of lists so far."""
        self.failed_lists: int = 0
        """The number of lists that have failed in a row."""
        self.list_size: int = 0
        """The number of runtimes in the last list."""
        self.holds: int = 0
        """The number of its requests that wait for their turn, as it is throttled."""
        self.waiting: list[Poll | Workspace] = []
        """Its jobs that are due meanwhile."""
        self.entry: int = -1
        """The number of its last entry in the schedule, whose others do not count."""

    @property
    def is_over(self) -> bool:
        """True if it has no polls."""
        return not self.polls

    @property
    def ends_at(self) -> float:
        """The time at which the first of its polls has had its seconds."""
        return next(iter(self.polls)).deadline

    def prefers_list(self, now: float) -> bool:
        """Return True if a list may be had, and costs less than a GET of each."""
        count = len(self.polls)
        if now < self.list_at or count < _MIN_FOR_LIST:
            return False
        return self.list_size <= count * _MAX_LIST_PER_POLL

    def on_list(self, size: int) -> None:
        """Record a list of some runtimes."""
        self.failed_lists = 0
        self.list_size = size

    def on_list_failure(
        self, now: float, seconds: float, wait: float, *, recurs: bool
    ) -> None:
        """Record a list that failed after some seconds; set when another is tried.

        The server has asked to `wait` for some seconds.
        """
        self.failed_lists += 1
        if recurs:
            self.list_at = math.inf
        elif seconds >= _SLOW_LIST or self.failed_lists >= _MAX_FAILED_LISTS:
            pause = max(_PAUSES_PER_LIST * seconds, 2.0**self.failed_lists)
            self.list_at = now + max(min(pause, _MAX_PAUSE), wait)
        elif now + wait > self.ends_at:
            # A list would come too late for some polls.
            self.list_at = now + wait


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
        self._ready: deque[Poll | Workspace] = deque()
        self._over: deque[Poll] = deque()
        self._last_deadline = -math.inf
        self.count: int = 0
        """The number of polls whose outcomes are not recorded yet."""
        self.failures: Counter[str] = Counter()
        """The number of polls that are not over, by the failure of the last request."""
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

    @property
    def are_over(self) -> bool:
        """True if none goes on."""
        return not self._workspaces

    def seconds_left(self, until: float) -> float:
        """Return the seconds until the last deadline, or until this time if sooner."""
        if self.are_over:
            return 0.0
        ends_at = min(self._last_deadline, until)
        return max(ends_at - asyncio.get_running_loop().time(), 0.0)

    def needs(self, outcome: StopOutcome) -> bool:
        """Return True if the server may have taken a stop, and the runtime may run."""
        # Most stops have succeeded, which a field tells at the least cost.
        if outcome.running is False or not self.are_made:
            return False
        return outcome.result.needs_poll

    def add(
        self,
        outcome: StopOutcome,
        started: float,
        observer: StopObserver | None,
        now: float,
        history: History,
    ) -> None:
        """Poll a runtime whose stop, of this history, was answered or given up."""
        self._last_deadline = now + self._seconds
        poll = Poll(outcome, started, self._last_deadline, observer)
        if not outcome.result.is_accepted:
            poll.history.follow(history)
        name = outcome.target.workspace_id
        workspace = self._workspaces.get(name)
        if workspace is None:
            workspace = self._workspaces[name] = Workspace(name)
        workspace.polls[poll] = None
        self.count += 1
        if workspace.is_listed:
            return
        if workspace.prefers_list(now):
            workspace.is_listed = True
            self._schedule_at(now + _delay(0, has_answer=False), workspace)
        else:
            self._schedule_get(poll, now)

    def _schedule_at(self, time: float, job: Poll | Workspace) -> None:
        # The number decides between equal times, as jobs cannot be compared.
        job.entry = next(self._numbers)
        heappush(self._schedule, (time, job.entry, job))

    def _schedule_get(self, poll: Poll, now: float) -> None:
        delay = _delay(poll.requests, has_answer=poll.is_answered)
        wait = 0.0
        if poll.is_throttled:
            delay = max(delay, self._policy.backoff(poll.requests, random.uniform))
            wait = poll.retry_after
        at = min(now + delay, self._ends_at(poll))
        self._schedule_at(max(at, now + wait), poll)

    def _ends_at(self, poll: Poll) -> float:
        """Return the time of its last request, which is later if it is throttled."""
        if poll.failure is None or not poll.is_throttled:
            return poll.deadline
        patience = self._policy.max_throttle_wait
        if poll.failure.kind.is_unanswered:
            patience = min(patience, _GATEWAY_PATIENCE)
        return max(poll.deadline, poll.history.waits_since + patience)

    @property
    def next_at(self) -> float:
        """The time of the next job; -inf if it is due now, inf if there is none."""
        if self._ready or self._over:
            return -math.inf
        return self._next_entry_at()

    def _next_entry_at(self) -> float:
        schedule = self._schedule
        while schedule and not self._is_current(*schedule[0][1:]):
            heappop(schedule)
        return schedule[0][0] if schedule else math.inf

    def _is_current(self, number: int, job: Poll | Workspace) -> bool:
        """Return False for what is over, listed or scheduled again since then."""
        if job.entry != number or job.is_over:
            return False
        return isinstance(job, Workspace) or not self._workspace_of(job).is_listed

    def _workspace_of(self, job: Poll | Workspace) -> Workspace:
        if isinstance(job, Workspace):
            return job
        return self._workspaces[job.outcome.target.workspace_id]

    def take(self, now: float) -> Poll | Workspace | None:
        """Return what is due: a poll that is over or to get, or a workspace to list."""
        if self._over:
            return self._over.popleft()
        job = self._take_due(now)
        while job is not None:
            workspace = self._workspace_of(job)
            if not workspace.holds:
                return job
            workspace.waiting.append(job)
            job = self._take_due(now)
        return None

    def _take_due(self, now: float) -> Poll | Workspace | None:
        while self._ready:
            job = self._ready.popleft()
            if not job.is_over:
                return job
        while self._next_entry_at() < math.inf and self._next_entry_at() <= now:
            _, _, job = heappop(self._schedule)
            if isinstance(job, Poll):
                job.is_got = True
                return job
            if job.is_listed or job.prefers_list(now):
                job.is_listed = True
                return job
        return None

    @contextmanager
    def hold(self, job: Poll | Workspace) -> Iterator[None]:
        """Return no other job of a workspace while a request waits for its turn."""
        workspace = self._workspace_of(job)
        workspace.holds += 1
        try:
            yield
        finally:
            workspace.holds -= 1
            self._ready.extend(workspace.waiting)
            workspace.waiting.clear()

    def get(self, poll: Poll) -> None:
        """Get a runtime next, as no list has shown it."""
        poll.is_got = True
        self._ready.append(poll)

    def on_answer(self, poll: Poll, outcome: StopOutcome, now: float) -> None:
        """Keep the outcome that an answer gives, which may be final."""
        if not poll.is_over:
            poll.outcome = outcome
            self._set_failure(poll, None)
            poll.history = History()
            poll.is_answered = True
        self._on_request(poll, now, is_last=not self.needs(outcome))

    def on_failure(
        self, poll: Poll, failure: Failure, now: float, *, is_last: bool
    ) -> None:
        """Keep the failure of a request, after which another may follow."""
        self._set_failure(poll, failure)
        if poll.is_throttled:
            poll.history.count_throttled()
            poll.history.wait_from(now)
        else:
            poll.history = History()
        self._on_request(poll, now, is_last=is_last)

    def _set_failure(self, poll: Poll, failure: Failure | None) -> None:
        if poll.is_over:
            # The run has ended meanwhile, which may be why the request failed.
            return
        self._count(poll.failure, -1)
        self._count(failure, 1)
        poll.failure = failure

    def _count(self, failure: Failure | None, change: int) -> None:
        if failure is not None:
            self.failures[failure.type] += change

    def _on_request(self, poll: Poll, now: float, *, is_last: bool) -> None:
        was_got = poll.is_got
        poll.is_got = False
        poll.requests += 1
        if poll.is_over:
            # The run has ended meanwhile.
            return
        is_late = now >= self._ends_at(poll) or _quick_failures.is_enough(poll.requests)
        workspace = self._workspace_of(poll)
        if is_last or is_late:
            self._end(poll, workspace)
        elif was_got and not workspace.is_listed:
            self._schedule_get(poll, now)

    def _end(self, poll: Poll, workspace: Workspace) -> None:
        poll.is_over = True
        self._count(poll.failure, -1)
        self._over.append(poll)
        del workspace.polls[poll]
        if not workspace.polls:
            del self._workspaces[workspace.name]

    def end_list(self, workspace: Workspace, now: float, wait: float = 0.0) -> None:
        """Decide when a workspace is listed again, or each of its runtimes got.

        The server has asked to `wait` for some seconds.
        """
        workspace.lists += 1
        if workspace.prefers_list(now):
            delay = _delay(workspace.lists, has_answer=bool(workspace.list_size))
            at = min(now + delay, max(workspace.ends_at, now + _MIN_PAUSE))
            self._schedule_at(max(at, now + wait), workspace)
            return
        workspace.is_listed = False
        if now < workspace.list_at < math.inf:
            self._schedule_at(workspace.list_at, workspace)
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


def _delay(requests: int, *, has_answer: bool) -> float:
    """Return the seconds until the next request, given how many there were."""
    if _quick_failures.is_on and has_answer:
        return _quick_failures.POLL_DELAY
    return probe_delay(_CADENCE, requests + 1)
