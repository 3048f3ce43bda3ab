"""The limiter that every attempt of a session passes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Iterator
from dataclasses import replace

from bctrl_async import _quick_failures
from bctrl_async._kinds import Failure
from bctrl_async._limiter.bounds import FixedRate
from bctrl_async._limiter.evidence import History, Slots
from bctrl_async._limiter.gate import Gate
from bctrl_async._limiter.queues import Priority, Waiter
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async._limiter.standings import Standing, Standings
from bctrl_async.errors import BctrlError, session_closed
from bctrl_async.pace import Pace
from bctrl_async.pace._leases import Leases

_MAX_LANES = 1000
"""The number of lanes above which the oldest without a call are forgotten."""
_REFUSED_AGAIN = 2.0
"""First attempts that end an exemption if they are throttled. Fewer may be about their
targets."""


class RecalledError(Exception):
    """A bulk stop is to wait without a worker, in the lane of its workspace."""


class Limiter:
    """A gate for all attempts of a session, and a lane for each throttled workspace.

    A lane is a gate of its own that comes before: a workspace over its quota slows down
    alone. If eight workspaces are throttled, they show a limit for all, which takes the
    place of theirs. It does not hold a workspace that is exempt, and its Retry-After
    holds only those that were throttled.
    """

    def __init__(
        self, limit: int, rate: AdaptiveRate, bound: FixedRate | Pace | None = None
    ) -> None:
        self.limit: int = limit
        self._all = Gate(limit, rate)
        self._lanes: dict[str, Gate] = {}
        self._standings = Standings(rate)
        self._leases: Leases | None = None
        if isinstance(bound, FixedRate):
            self._all.bound_by(bound)
        elif bound is not None:
            self._leases = self._all.use_pace(bound, on_misconfigured=self.close)
        self._error: BctrlError | None = None
        """The error of each call once it is closed."""
        self._sleepers: set[asyncio.Future[None]] = set()

    def is_closed(self) -> bool:
        """Return True if the limiter is closed."""
        return self._error is not None

    @property
    def in_use(self) -> int:
        """The number of slots in use."""
        return self._all.in_use

    @property
    def waiting(self) -> int:
        """The number of calls that wait for a slot or sleep between attempts."""
        return sum(len(gate.waiting) for gate in self._gates()) + len(self._sleepers)

    @property
    def is_throttled(self) -> bool:
        """True from throttling that shows a limit until the limit is gone."""
        lanes = self._lanes.values()
        return self._all.rate.has_limit or any(lane.is_limiting for lane in lanes)

    def _gates(self) -> Iterator[Gate]:
        yield self._all
        yield from self._lanes.values()

    def answers_others(self, since: float) -> bool:
        """Return True if a call that was never throttled was answered since a time."""
        answered_at = self._all.rate.answers.unthrottled_at
        return max(answered_at, self._standings.exempt_answered_at) >= since

    @property
    def retry_after(self) -> float:
        """The longest wait in seconds that the server asks for; 0 outside a loop."""
        return max(_seconds_until(gate.retry_after_ends) for gate in self._gates())

    def retry_after_of_all(self, workspace: str) -> float:
        """Return the seconds that a Retry-After for all holds a workspace."""
        wait = _seconds_until(self._all.retry_after_ends)
        return wait if self._standing(workspace) is Standing.HELD else 0.0

    def _standing(self, workspace: str) -> Standing:
        """Return the standing by which a workspace queues at the gate for all."""
        if not self._all.rate.has_limit:
            return Standing.HELD
        return self._standings.of(workspace, asyncio.get_running_loop().time())

    def has_lane(self, workspace: str) -> bool:
        """Return True if the calls in a workspace wait in a lane of their own."""
        return workspace in self._lanes

    def acquire_nowait(self, workspace: str = "") -> bool:
        """Acquire a slot if no rate bounds attempts, and no wait is needed."""
        return workspace not in self._lanes and self._all.acquire_nowait()

    async def acquire(
        self,
        patience: float,
        priority: Priority = Priority.SINGLE,
        history: History | None = None,
    ) -> None:
        """Acquire a slot, waiting if necessary.

        Raises:
            BctrlConfigError: The limiter is closed, now or while waiting.
            BctrlRateLimitError: A Retry-After is longer than `patience` seconds, or
                the server throttles every attempt for that long.
            RecalledError: A bulk stop is to wait in the lane of its workspace, with
                `enqueue`.
        """
        history = history or History()
        try:
            # A call passes its lane, if any, and then the gate for all. While it waits
            # there, it may be moved into a lane.
            while True:
                gate = self._next_gate(priority, history)
                passed = await self._pass(gate, patience, priority, history)
                if passed is self._all:
                    break
                history.lane = passed
        except BaseException:
            self.leave_lane(history)
            raise
        history.started_at = asyncio.get_running_loop().time()

    def _next_gate(self, priority: Priority, history: History) -> Gate:
        """Return the gate that a call passes next: its lane, or the gate for all."""
        if history.lane is not None or priority is Priority.CANARY:
            return self._all
        return self._lanes.get(history.workspace, self._all)

    async def _pass(
        self, gate: Gate, patience: float, priority: Priority, history: History
    ) -> Slots | None:
        """Pass a gate; return it, or the lane into which the call was moved."""
        standing = Standing.HELD
        if gate is self._all:
            standing = self._standing(history.workspace)
        # `add` checks the patience of a throttled call first.
        if not history.was_throttled and gate.acquire_if_due(standing):
            return gate
        if history.may_park and gate is not self._all:
            raise RecalledError("its workspace is throttled")
        waiter = _waiter(patience, priority, history)
        waiter.standing = standing
        gate.add(waiter)
        try:
            await waiter.admitted
            waiter.raise_if_failed()
            self._check_open()
        except BaseException:
            # A call that was admitted before it was cancelled has a slot to release.
            if waiter.gate is not None:
                waiter.gate.release()
            raise
        return waiter.gate

    def _check_open(self) -> None:
        if self._error is not None:
            raise replace(self._error)

    def enqueue(
        self, patience: float, priority: Priority, history: History
    ) -> Waiter | None:
        """Let a call wait in its lane without a task; return None if it may go on."""
        lane = self._next_gate(priority, history)
        if lane is self._all:
            return None
        if not history.was_throttled and lane.acquire_if_due():
            history.lane = lane
            return None
        waiter = _waiter(patience, priority, history)
        waiter.has_task = False
        lane.add(waiter)
        return waiter

    def enter_lane(self, waiter: Waiter) -> None:
        """Enter the lane after `enqueue`; raise the error of a failed waiter."""
        lane = waiter.gate
        if lane is not None:
            lane.take_slot()
            waiter.history.lane = lane
        waiter.raise_if_failed()

    def leave_lane(self, history: History) -> None:
        """Release the slot that a call has in the lane of its workspace, if any."""
        if history.lane is None:
            return
        history.lane.release()
        history.lane = None
        lane = self._lanes.get(history.workspace)
        if lane is not None and lane.is_idle:
            self._drop_lane(history.workspace)

    def _drop_lane(self, workspace: str) -> None:
        """Forget a lane in which no call waits and none is in flight."""
        self._lanes.pop(workspace).cancel_timers()

    def release(self, answer: object, history: History | None = None) -> bool:
        """Release a slot after an attempt that ended with this answer or `Failure`.

        `history` is that of its call. Return True if a gateway answered 503 again while
        other calls are answered.
        """
        history = history or History()
        target_failed = False
        if type(answer) is Failure:
            target_failed = self._on_failure(answer, history)
            # No rate may bound its next attempt.
            history.started_at = 0.0
        elif answer is not None:
            self._on_success(history)
        # Most calls are in no lane, so this check saves the call of `leave_lane`.
        if history.lane is not None:
            self.leave_lane(history)
        self._all.release()
        return target_failed

    def give_way(self, failure: Failure, history: History) -> bool:
        """Release a slot, as others in flight have all that the machine holds.

        Return False, and release nothing, if no other is in flight.
        """
        if self.in_use == 1:
            return False
        self._all.on_lack(failure)
        self.release(None, history)
        return True

    def _on_success(self, history: History) -> None:
        now = asyncio.get_running_loop().time()
        rate = self._all.rate
        if self._lanes or rate.has_limit:
            self._on_success_beside_throttled(now, history)
        else:
            rate.on_success(now, history)

    def _on_success_beside_throttled(self, now: float, history: History) -> None:
        workspace = history.workspace
        is_first = not history.was_throttled
        standing = self._standing(workspace)
        self._standings.on_success(workspace, now, is_first=is_first)
        self._queue_anew_if_moved(workspace, standing, now)
        # The answers of the exempt tell nothing of a limit that does not hold them.
        if not self._standings.exempts(workspace):
            self._all.rate.on_success(now, history)
        if workspace in self._lanes:
            self._lanes[workspace].on_success(now, history)

    def _queue_anew_if_moved(
        self, workspace: str, earlier: Standing, now: float
    ) -> None:
        """Let waiters wait anew if the limit holds them otherwise than earlier."""
        standing = self._standing(workspace)
        is_exempted = Standing.EXEMPT in (standing, earlier)
        # Without a Retry-After, the others differ only in whose turn it is, which is
        # not worth a look at all waiters.
        is_held_otherwise = is_exempted or self._all.rate.asks_to_wait(now)
        if standing is not earlier and is_held_otherwise:
            self._queue_anew([workspace])

    def _queue_anew(self, workspaces: Collection[str]) -> None:
        """Let the waiters of workspaces wait as their standing is now."""
        waiters = self._all.take(workspaces)
        for waiter in waiters:
            waiter.standing = self._standing(waiter.history.workspace)
        self._all.add(*waiters)

    def _on_failure(self, failure: Failure, history: History) -> bool:
        kind = failure.kind
        if not kind.is_throttling:
            if kind.is_answer:
                # Another error status shows that the server keeps up.
                self._on_success(history)
            return False
        rate = self._all.rate
        target_failed = False
        retry_after = failure.retry_after
        if kind.is_unanswered:
            target_failed = rate.answers.throttles_alone(
                history.throttled_at, self._standings.exempt_answered_at
            )
            # A gateway's Retry-After holds its own call only.
            retry_after = None
        if _quick_failures.is_on:
            # The rate learns nothing from the answer: its limits would make calls wait.
            rate.is_starting = False
            return target_failed
        self._on_throttled(failure.status, retry_after, history)
        return target_failed

    def _on_throttled(
        self, status: int | None, retry_after: float | None, history: History
    ) -> None:
        now = asyncio.get_running_loop().time()
        workspace = history.workspace
        lane = self._lane(workspace)
        is_explained = lane.rate.has_limit
        is_first = not history.was_throttled
        if lane.on_throttled(now, status, retry_after, history):
            self._move_waiters(workspace, lane)
        elif lane.rate.excess < _REFUSED_AGAIN and self._standings.exempts(workspace):
            return
        reasons = self._reasons(now)
        standing = self._standing(workspace)
        self._standings.on_throttled(workspace, is_first=is_first)
        if self._all.on_throttled(
            now, status, retry_after, history, is_explained=is_explained
        ):
            self._lift_lanes()
        if self._reasons(now) > reasons:
            self._queue_anew({waiter.history.workspace for waiter in self._all.waiting})
        else:
            self._queue_anew_if_moved(workspace, standing, now)

    def _reasons(self, now: float) -> int:
        """Return how many reasons there are to tell the workspaces apart."""
        rate = self._all.rate
        return rate.refuses_first + rate.asks_to_wait(now)

    def _lift_lanes(self) -> None:
        for workspace, lane in list(self._lanes.items()):
            if lane.is_empty:
                self._drop_lane(workspace)
            else:
                lane.lift_limit()

    def _move_waiters(self, workspace: str, lane: Gate) -> None:
        """Move those who wait at the gate for all into a lane that has a limit now."""
        for waiter in self._all.take([workspace]):
            self.leave_lane(waiter.history)
            if waiter.history.may_park:
                waiter.fail(RecalledError("its workspace is throttled"))
            else:
                waiter.standing = Standing.HELD
                lane.add(waiter)

    def _lane(self, workspace: str) -> Gate:
        """Return the lane of a workspace, which is made if there is none."""
        lane = self._lanes.get(workspace)
        if lane is None:
            self._forget_oldest_lane()
            answers = self._all.rate.answers.of(workspace)
            lane = Gate(math.inf, AdaptiveRate.of_workspace(answers), workspace)
            self._lanes[workspace] = lane
        return lane

    def _forget_oldest_lane(self) -> None:
        if len(self._lanes) < _MAX_LANES:
            return
        workspace, oldest = next(iter(self._lanes.items()))
        if oldest.is_empty:
            self._drop_lane(workspace)
        else:
            # A lane in use becomes the newest.
            self._lanes[workspace] = self._lanes.pop(workspace)

    async def sleep(self, delay: float) -> None:
        """Sleep without a slot for some seconds, or until the limiter is closed."""
        if self._error is None:
            await self.start_sleep(delay)

    def start_sleep(self, delay: float) -> asyncio.Future[None]:
        """Return a future that is done after some seconds, or when this is closed."""
        if self._error is not None:
            delay = 0.0
        loop = asyncio.get_running_loop()
        sleeper: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(delay, _wake, sleeper)
        self._sleepers.add(sleeper)
        sleeper.add_done_callback(self._sleepers.discard)
        sleeper.add_done_callback(lambda _: timer.cancel())
        return sleeper

    def close(self, error: BctrlError | None = None) -> None:
        """Close the limiter: all waiters fail, by default as on a closed session."""
        self._error = session_closed() if error is None else replace(error)
        for gate in self._gates():
            gate.close(self._error)
        for sleeper in list(self._sleepers):
            _wake(sleeper)

    async def close_pace(self) -> None:
        """Close the connection to the store of the pace."""
        if self._leases is not None:
            await self._leases.close()


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


def _waiter(patience: float, priority: Priority, history: History) -> Waiter:
    """Make a waiter, and record since when its call waits."""
    loop = asyncio.get_running_loop()
    history.waits_since = min(history.waits_since, loop.time())
    return Waiter(loop.create_future(), history, priority, patience)


def _seconds_until(time: float) -> float:
    try:
        return max(time - asyncio.get_running_loop().time(), 0.0)
    except RuntimeError:
        # No loop runs.
        return 0.0
