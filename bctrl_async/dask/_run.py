"""The run of a bulk stop on a cluster: it cuts its input into chunks, and records the outcomes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from math import ceil

from bctrl_async._http.request import STOP
from bctrl_async.bulk._cancel import CancelLevel, CancelScope, Worker
from bctrl_async.bulk._delivery import Deliver
from bctrl_async.bulk._engine import Engine
from bctrl_async.bulk._targets import Input
from bctrl_async.dask._deliveries import Deliveries
from bctrl_async.dask._dispatcher import Dispatcher
from bctrl_async.dask._distributed import Cluster
from bctrl_async.errors import BctrlConfigError, BctrlError
from bctrl_async.journal import Journal
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import StopOutcome, outcome_of

_LINGER = 0.1
"""Seconds that targets of a slow input wait for more of them."""
_SHARES = 4
"""Chunks for each worker into which a short input is cut at least."""
_AT_ONCE = 100
"""Items that need no worker and are recorded before the event loop runs."""


class _Cluster(Worker):
    """The workers of the cluster, as the state of the run sees them."""

    def __init__(self, dispatcher: Dispatcher, on_cancel: Callable[[CancelLevel], bool]) -> None:
        super().__init__()
        self._dispatcher = dispatcher
        self._on_cancel = on_cancel

    @property
    def in_flight(self) -> int:
        """The number of targets that are handed out and have no settled outcome."""
        return self._dispatcher.open

    @property
    def is_stopping(self) -> bool:
        """True while targets are handed out."""
        return bool(self._dispatcher.open)

    def cancel(self, level: CancelLevel) -> bool:
        """Tell the workers; return True if that ends a stop."""
        return self._on_cancel(level)


class ClusterRun(Engine):
    """One bulk stop on a cluster, with the pickled recipe of the run."""

    def __init__(
        self,
        source: Input,
        cluster: Cluster,
        recipe: bytes,
        *,
        chunk_size: int,
        deadline: float | None,
        missing_ok: bool,
        open_journal: Callable[[], Journal] | None,
    ) -> None:
        super().__init__(
            source,
            0,
            deadline=deadline,
            missing_ok=missing_ok,
            open_journal=open_journal,
            observer=None,
        )
        self._cluster = cluster
        self._chunk_size = chunk_size
        self._dispatcher = Dispatcher(
            cluster,
            recipe,
            self.state,
            record=self._record,
            throttled=self._count_throttled,
            end_early=self.state.end_early,
            fail=self._fail,
            changed=self._on_change,
        )
        self.state.workers[_Cluster(self._dispatcher, self._on_end)] = None
        self._deliveries: Deliveries | None = None
        self._scope = CancelScope()
        self._wake = asyncio.Event()
        self._indices: list[int] = []
        self._targets: list[RuntimeRef] = []
        self._is_due = False
        self._told: CancelLevel | None = None

    def open(self) -> None:
        """Check that the client runs in the current event loop."""
        self._cluster.check_usable()

    async def _work(self, worker: Worker) -> None:
        raise NotImplementedError

    def _on_end(self, level: CancelLevel) -> bool:
        """Tell the workers that the run ends; return True if that ends a stop."""
        leaves_stops = not self._dispatcher.all_read or bool(self._targets)
        if level is CancelLevel.DELIVERY and self._deliveries is not None:
            self._deliveries.discard()
            self._deliveries = None
        if self._told is None or level > self._told:
            self._told = level
            self._dispatcher.end(self.state.reason, level)
        self._scope.cancel()
        self._wake.set()
        return leaves_stops

    async def run(self, deliver: Deliver | None) -> None:
        """Give every target its outcome.

        Args:
            deliver: Called with each outcome, if given.

        Raises:
            BaseException: The error of the input or of `deliver`, once every target that was read
                has its outcome.
        """
        if deliver is not None:
            self._deliveries = Deliveries(deliver, self._on_change)
        self._dispatcher.begin()
        timer: asyncio.TimerHandle | None = None
        if self._deadline is not None:
            self._dispatcher.ends_at = time.monotonic() + self._deadline
            passed = BctrlError(f"the deadline of {self._deadline:g} s has passed")
            timer = asyncio.get_running_loop().call_later(
                self._deadline, self.state.end_early, passed, CancelLevel.IN_FLIGHT
            )
        watching = asyncio.create_task(self._dispatcher.watch())
        try:
            cancelled = await self._wait(self._deliveries)
        finally:
            watching.cancel()
            if timer is not None:
                timer.cancel()
            if (failed := self.source.error) is not None:
                raised = BctrlError(f"the input raised {type(failed).__name__}")
                self.state.set_ended_early(failed if isinstance(failed, BctrlError) else raised)
        await self._dispatcher.close()
        if cancelled is not None:
            raise cancelled
        if (error := self._failure or failed) is not None:
            raise error

    async def _wait(self, deliveries: Deliveries | None) -> asyncio.CancelledError | None:
        """Wait until each target has its outcome; return the cancellation of the caller."""
        cancelled: asyncio.CancelledError | None = None
        delivering = None if deliveries is None else self._start(deliveries.run)
        reading = self._start(self._read)
        while True:
            pending = [task for task in (reading, *self._dispatcher.tasks) if not task.done()]
            if not pending and not self._dispatcher.tasks:
                if self._targets or not self.source.closed:
                    # The task that read was cancelled from outside: another one records the rest.
                    self.cancel()
                    reading = self._start(self._read)
                    continue
                if deliveries is None or delivering is None or delivering.done():
                    return cancelled
                deliveries.end()
                pending = [delivering]
            try:
                # A task that is done may still have its callbacks to come.
                await (asyncio.wait(pending) if pending else asyncio.sleep(0))
            except asyncio.CancelledError as error:
                cancelled = error
                self.cancel()
            except GeneratorExit:
                # The coroutine was closed; the tasks end without it.
                self.cancel()
                self._dispatcher.close_later()
                raise

    async def _read(self) -> None:
        """Read the input to its end, and hand out its targets as the workers need them."""
        await self._wait_until(lambda: self._dispatcher.workers is not None)
        self._set_chunk_size()
        recorded = 0
        while (item := await self._next_item()) is not None:
            if not self._take(*item):
                recorded += 1
                if recorded % _AT_ONCE == 0:
                    await asyncio.sleep(0)
                    await self._wait_until(lambda: not self._is_behind)
            elif len(self._targets) >= self._chunk_size:
                await self._wait_until(self._has_room)
                self._hand_out()
        await self._wait_until(self._has_room)
        self._hand_out()

    def _set_chunk_size(self) -> None:
        if self.source.length is not None:
            # A short input is for all workers as well.
            share = ceil(self.source.length / (_SHARES * (self._dispatcher.workers or 1)))
            self._chunk_size = max(min(self._chunk_size, share), 1)

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition is true, or the run is ended."""
        while self.state.goes_on() and not condition():
            self._wake.clear()
            await self._wake.wait()

    async def _next_item(self) -> tuple[int, object] | None:
        if not self.source.is_async:
            return self.source.next_nowait()
        with self._scope:
            return await self.source.next()
        return None

    def _take(self, index: int, item: object) -> bool:
        """Take an item of the input; return True if it is for a worker, False if it is recorded."""
        target = self._checked(index, item)
        if isinstance(target, StopOutcome):
            self._put(target)
            return False
        try:
            STOP.path("", *target)
        except BctrlConfigError as error:
            self._put(self._reject_name(index, target, error))
            return False
        if not self.state.goes_on():
            self._record(outcome_of(target, self.state.not_begun, index=index))
            return False
        if not self._targets and self.source.is_async:
            asyncio.get_running_loop().call_later(_LINGER, self._on_linger, self._indices)
        self._indices.append(index)
        self._targets.append(target)
        return True

    def _on_linger(self, indices: list[int]) -> None:
        if indices is self._indices:
            self._is_due = True
            self._on_change()

    @property
    def _is_behind(self) -> bool:
        """True while too many outcomes are undelivered."""
        return self._deliveries is not None and self._deliveries.is_full

    def _has_room(self) -> bool:
        return self._dispatcher.has_room and not self._is_behind

    def _on_change(self) -> None:
        try:
            if self._is_due and self._has_room():
                self._hand_out()
        except BaseException as error:  # noqa: BLE001 - dask or the event loop would only log it.
            self._fail(error)
        self._wake.set()

    def _hand_out(self) -> None:
        """Hand out the targets read so far; none if the run is ended."""
        indices, targets = self._indices, self._targets
        self._indices, self._targets, self._is_due = [], [], False
        if not targets:
            return
        if self.state.goes_on():
            self._dispatcher.hand_out(indices, targets)
            return
        for index, target in zip(indices, targets, strict=True):
            self._record(outcome_of(target, self.state.not_begun, index=index))

    def _record(self, outcome: StopOutcome) -> None:
        self._put(self.ledger.record(outcome))

    def _put(self, outcome: StopOutcome) -> None:
        if self._deliveries is not None:
            self._deliveries.put(outcome)

    def _count_throttled(self, count: int) -> None:
        self.ledger.throttled += count
