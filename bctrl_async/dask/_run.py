"""The run of a bulk stop on a cluster: it cuts its input into chunks, and records the outcomes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from math import ceil

import msgspec

from bctrl_async._calls.call import annotate
from bctrl_async._http.operations import STOP
from bctrl_async.bulk._cancel import CancelLevel, CancelScope, Ending
from bctrl_async.bulk._delivery import Deliver
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._targets import Input, as_target, best_effort_ref
from bctrl_async.dask._deliveries import Deliveries
from bctrl_async.dask._dispatcher import Dispatcher
from bctrl_async.dask._distributed import Cluster
from bctrl_async.errors import BctrlConfigError, BctrlError
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import StopOutcome, StopResult, outcome_of

_LINGER = 0.1
"""Seconds that targets of a slow input wait for more of them."""
_SHARES = 4
"""Chunks for each worker into which a short input is cut at least."""
_AT_ONCE = 100
"""Items that need no worker and are recorded before the event loop runs."""


class ClusterRun:
    """One bulk stop on a cluster.

    Args:
        source: The targets.
        cluster: The cluster.
        recipe: The pickled recipe of the run.
        chunk_size: The most targets of a chunk.
        deadline: Seconds until the run is aborted, or None.
        missing_ok: Do not count `not_found` as a failure.

    Attributes:
        source: The targets.
        ledger: The outcomes so far.
    """

    def __init__(
        self,
        source: Input,
        cluster: Cluster,
        recipe: bytes,
        *,
        chunk_size: int,
        deadline: float | None,
        missing_ok: bool,
    ) -> None:
        self.source: Input = source
        self.ledger: Ledger = Ledger(
            lambda error: self.end_early(error, CancelLevel.WAITING), missing_ok=missing_ok
        )
        self._cluster = cluster
        self._chunk_size = chunk_size
        self._deadline = deadline
        self._ending = Ending()
        self._dispatcher = Dispatcher(
            cluster,
            recipe,
            self._ending,
            record=self._record,
            throttled=self._count_throttled,
            end_early=self.end_early,
            fail=self._fail,
            changed=self._on_change,
        )
        self._deliveries: Deliveries | None = None
        self._failure: BaseException | None = None
        self._scope = CancelScope()
        self._wake = asyncio.Event()
        self._indices: list[int] = []
        self._targets: list[RuntimeRef] = []
        self._is_due = False

    @property
    def in_flight(self) -> int:
        """The number of targets that are handed out and have no settled outcome."""
        return self._dispatcher.open

    @property
    def polling(self) -> int:
        """0: the workers poll by themselves."""
        return 0

    @property
    def is_throttled(self) -> bool:
        """False: the workers slow down by themselves."""
        return False

    @property
    def retry_after(self) -> float:
        """0: the workers wait by themselves."""
        return 0.0

    @property
    def is_unanswered(self) -> bool:
        """False: the workers find out by themselves."""
        return False

    @property
    def retrying(self) -> Counter[str]:
        """Empty: the workers retry by themselves."""
        return Counter()

    def open(self) -> None:
        """Check that the client runs in the current event loop."""
        self._cluster.check_usable()

    def end_early(self, reason: BctrlError, level: CancelLevel) -> None:
        """Cancel as much of the run as the level says, for this reason."""
        leaves_stops = not self._dispatcher.all_read or (
            level is not CancelLevel.READING and self._dispatcher.open
        )
        if leaves_stops or self._targets or not self.source.exhausted:
            self.ledger.end_early(reason)
        self.source.end()
        raised = self._ending.level is None or level > self._ending.level
        self._ending.raise_to(level, reason)
        if level is CancelLevel.DELIVERY and self._deliveries is not None:
            self._deliveries.discard()
            self._deliveries = None
        if raised:
            self._dispatcher.end(reason, level)
        self._scope.cancel()
        self._wake.set()

    def cancel(self) -> None:
        """Cancel the run: record the rest, and deliver no further outcome."""
        self.end_early(BctrlError("the run was cancelled"), CancelLevel.DELIVERY)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self.end_early(BctrlError(f"the run failed: {error!r}"), CancelLevel.DELIVERY)

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
                self._deadline, self.end_early, passed, CancelLevel.IN_FLIGHT
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
                self.ledger.end_early(failed if isinstance(failed, BctrlError) else raised)
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

    def _start(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        return asyncio.create_task(self._guard(work))

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work of a task; an exception ends the run, which raises it."""
        try:
            await work()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancel()
            raise
        except BaseException as error:  # noqa: BLE001 - the run raises it.
            self._fail(error)

    async def _read(self) -> None:
        """Read the input to its end, and hand out its targets as the workers need them."""
        await self._wait_until(lambda: self._dispatcher.workers is not None)
        self._set_chunk_size()
        recorded = 0
        while (item := await self._next()) is not None:
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
        while self._ending.goes_on() and not condition():
            self._wake.clear()
            await self._wake.wait()

    async def _next(self) -> tuple[int, object] | None:
        if not self.source.is_async:
            return self.source.next_nowait()
        with self._scope:
            return await self.source.next()
        return None

    def _take(self, index: int, item: object) -> bool:
        """Take an item of the input; return True if it is for a worker, False if it is recorded."""
        try:
            target = as_target(item)
        except BctrlError as error:
            self._reject(index, best_effort_ref(item), error)
            return False
        try:
            STOP.path("", *target)
        except BctrlConfigError as error:
            annotate(error, STOP.name, *target)
            self._reject(index, target, error)
            return False
        ledger = self.ledger
        if (known := ledger.not_running.get(target)) is not None:
            self._record(msgspec.structs.replace(known, index=index))
            return False
        if not self._ending.goes_on():
            self._record(outcome_of(target, self._ending.not_begun, index=index))
            return False
        if not self._targets and self.source.is_async:
            asyncio.get_running_loop().call_later(_LINGER, self._on_linger, self._indices)
        self._indices.append(index)
        self._targets.append(target)
        return True

    def _reject(self, index: int, target: RuntimeRef, error: BctrlError) -> None:
        error = error.with_traceback(None)
        self._record(outcome_of(target, error, index=index, result=StopResult.REJECTED))

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
        if self._ending.goes_on():
            self._dispatcher.hand_out(indices, targets)
            return
        for index, target in zip(indices, targets, strict=True):
            self._record(outcome_of(target, self._ending.not_begun, index=index))

    def _record(self, outcome: StopOutcome) -> None:
        outcome = self.ledger.record(outcome)
        if self._deliveries is not None:
            self._deliveries.put(outcome)

    def _count_throttled(self, count: int) -> None:
        self.ledger.throttled += count
