"""A bulk stop on a cluster of dask.distributed (extra `dask`).

The coordinator, the process that calls `stop_runtimes`, cuts the targets into chunks. The workers
of the cluster stop them, each with a session of its own and the key from its own environment, and
send the outcomes back as they are known, into one report and one journal.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import threading
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import CancelledError, wait
from contextlib import suppress
from copy import copy
from functools import partial
from inspect import isclass, isfunction
from math import ceil
from typing import Any, TypeVar, cast

from msgspec.structs import replace

from bctrl_async import _config
from bctrl_async._calls.call import annotate
from bctrl_async._calls.retry import RetryPolicy
from bctrl_async._http.request import STOP
from bctrl_async._version import __version__
from bctrl_async.bulk import OnOutcome, StopBatch
from bctrl_async.bulk._cancel import CancelLevel, CancelScope, Worker
from bctrl_async.bulk._engine import Engine, Options, Progress
from bctrl_async.bulk._run import Run
from bctrl_async.bulk._targets import Input, Targets
from bctrl_async.errors import BctrlConfigError, BctrlError, BctrlNetworkError, log_fields
from bctrl_async.models import RuntimeRef
from bctrl_async.outcomes import StopOutcome, StopResult, outcome_of
from bctrl_async.pace import Pace
from bctrl_async.session import BctrlSession

try:
    import distributed
except ModuleNotFoundError as _error:
    raise _config.missing_extra(_error, "dask") from _error

__all__ = ["stop_runtimes"]

# Few functions of dask have types.
_dask: Any = distributed

_T = TypeVar("_T")
_log = logging.getLogger("bctrl_async.dask")

_Item = tuple[int, RuntimeRef]
"""The index of a target in the input, and the target."""
_Fact = StopOutcome | int | None
"""A message of a worker about a chunk: None before its first request, then outcomes, and at its end
the number of throttled answers."""

_SLOTS = 10
"""The number of chunks that a worker has at once: a slow target holds up no other chunk."""
_SHARES = 4
"""The number of chunks for each worker into which a short input is cut, roughly."""
_TRIES = 3
"""Times that an unstarted chunk is handed out: its worker may have died of another chunk."""
_PULSE = 0.25
"""Seconds between two messages of a worker, and between two checks by the coordinator."""
_GRACE = 5.0
"""Seconds for the workers to send the outcomes of aborted stops, and to close."""
_PATIENCE = 60.0
"""Seconds after which a scheduler that does not answer is given up."""


# This part runs on the workers.


class _LeftError(Exception):
    """A worker leaves its chunks to others: it has no session, or reaches no server."""

    def __init__(self, address: str, reason: BctrlError) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason


def _stop_chunk(run: str, number: int, items: list[_Item]) -> None:
    """Stop the targets of a chunk; a worker runs this as a task of dask, in a thread."""
    # After the run, the plugin is gone and this raises, but nobody waits for the chunk.
    cast("Visit", _dask.get_worker().plugins[run]).stop(number, _Items(items))


class Visit(distributed.WorkerPlugin):
    """A run on one worker of the cluster: its session, and the chunks that are stopped with it.

    The coordinator makes it, and each worker has a copy until the run or the worker ends.
    """

    def __init__(self, session: bytes, base_url: str, pace: Pace | None, options: Options) -> None:
        self.run: str = f"bctrl-async-{uuid.uuid4().hex}"
        self.base_url: str = base_url
        self._version, self._make = __version__, session
        self._pace, self._options = pace, options

    def setup(self, worker: distributed.Worker) -> None:
        """Make the state of the run on a worker, in its event loop."""
        self._worker: Any = worker
        self._loop = asyncio.get_running_loop()
        self._opening, self._sending = asyncio.Lock(), asyncio.Lock()
        self._session: BctrlSession | None = None
        self._left: BctrlError | None = None
        # A task for each started chunk, and its run once the coordinator knows that it started.
        self._runs: dict[asyncio.Task[None], Run | None] = {}
        self._facts: list[tuple[int, _Fact]] = []
        self._is_closing = False

    async def teardown(self, worker: distributed.Worker) -> None:  # noqa: ARG002 - dask passes it.
        """Abort the chunks, and close the session."""
        self._is_closing = True
        for run in filter(None, self._runs.values()):
            run.state.ask_to_end("the worker closes", CancelLevel.IN_FLIGHT)
        if self._runs:
            await asyncio.wait(self._runs, timeout=_GRACE)
        if self._session is not None:
            self._pulsing.cancel()
            _close(self._queue)
            await self._client.close()
            await self._session.close()

    def stop(self, number: int, items: _Items) -> None:
        """Stop the targets of a chunk; once all are taken, let the worker start its next chunk."""
        stopping = asyncio.run_coroutine_threadsafe(self._stop(number, items), self._loop)
        stopping.add_done_callback(lambda _: items.all_taken.set())
        items.all_taken.wait()
        if not stopping.done():
            _dask.secede()
        wait([stopping])
        if self._is_closing or stopping.cancelled():
            # The run goes on, so another worker must take the chunk.
            raise distributed.Reschedule
        stopping.result()

    async def _stop(self, number: int, items: _Items) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._runs[task] = None
        task.add_done_callback(self._runs.pop)
        if (left := self._left) is None:
            try:
                session = await self._open()
                options = replace(self._options, on_outcome=partial(self._add, number, items))
                run = session._make_run(Input(items), options)  # noqa: SLF001 - for this user too.
                # An answer to an earlier chunk counts: the patience then bounds an outage.
                run.breaker.attempts_before = 0
            except Exception as error:  # noqa: BLE001 - the function of a user may raise anything.
                left = self._leave(_failure_of(error))
        if left is not None:
            # The error is raised outside of the handler, because dask pickles it with its context.
            raise _LeftError(self._worker.address, left)
        # The coordinator must know of the start before anything is sent: this worker may die.
        await self._send((number, None))
        # If no end is set yet, the coordinator reads the message above after it sets the end.
        self._runs[task] = run
        await self._obey()
        if not self._is_closing:  # pragma: no branch - a worker that closes at this moment.
            report = await StopBatch(run)
            await self._send((number, report.throttled))
            unsent = (each for each in report.failures if each.result is StopResult.NOT_SENT)
            # Once the server has answered, a failed connection is not this worker's own problem.
            errors = () if run.breaker.has_answered else (each.error for each in unsent)
            for reason in (report.ended_early, *errors):
                if isinstance(reason, BctrlConfigError | BctrlNetworkError):
                    # The cause is this worker: others may have a key, or reach the server.
                    raise _LeftError(self._worker.address, self._leave(reason))
            if report.ended_early is not None:
                raise self._leave(report.ended_early)

    def _add(self, number: int, items: _Items, outcome: StopOutcome) -> None:
        self._facts.append((number, replace(outcome, index=items.indexes[outcome.index])))

    async def _send(self, *facts: tuple[int, _Fact]) -> None:
        self._facts += facts
        # The lock keeps the order: the last fact of a chunk arrives after all its others.
        async with self._sending:
            if sent := self._facts[:]:  # pragma: no branch - another chunk may have sent them.
                await self._queue.put(pickle.dumps(sent))
                del self._facts[: len(sent)]

    async def _obey(self) -> None:
        """Cancel the runs of all chunks to the level that the coordinator has set, if any."""
        if said := await self._end.get(timeout=_PATIENCE):
            reason, level = pickle.loads(said)  # noqa: S301 - dask itself unpickles.
            for run in filter(None, self._runs.values()):
                # The coordinator logs the reason, so a worker does not warn of it.
                run.state.ask_to_end(reason.summary, level)

    async def _pulse(self) -> None:
        while True:
            await asyncio.sleep(_PULSE)
            # Errors need no handling: a lost scheduler ends the worker as well.
            with suppress(Exception):
                if self._runs:
                    await self._send()
                    await self._obey()

    def _leave(self, error: BctrlError) -> BctrlError:
        """Take no more chunks; return the error, which then names this worker as the cause."""
        self._left = _bare(copy(error))
        self._left.summary = f"the worker {self._worker.address}: {error.summary}"
        return self._left

    async def _open(self) -> BctrlSession:
        """Return the session; the first chunk makes it, and connects with the scheduler."""
        async with self._opening:
            if self._session is None:
                session, worker = self._make_session(), self._worker
                # The run opens its own client: dask does not always close the client of a worker.
                self._client: Any = await _dask.Client(
                    worker.scheduler.address,
                    security=worker.security,
                    asynchronous=True,
                    set_as_default=False,
                )
                self._end: Any = _dask.Variable(self.run, client=self._client)
                self._queue: Any = await _dask.Queue(self.run, client=self._client)
                self._session, self._pulsing = session, asyncio.create_task(self._pulse())
            return self._session

    def _make_session(self) -> BctrlSession:
        if self._version != __version__:
            raise BctrlConfigError(
                f"it has bctrl_async {__version__}, not {self._version}",
                advice="Install the same version on all workers",
            )
        make: Callable[..., BctrlSession] = pickle.loads(self._make)  # noqa: S301 - a name.
        session = make() if self._pace is None else make(rate=self._pace)
        _config.check_type(session, BctrlSession, "session", "a function that returns a session")
        if session.base_url != self.base_url:
            raise BctrlConfigError(
                f"it would send to {session.base_url}, and the run is for {self.base_url}",
                advice="Set BCTRL_BASE_URL alike here and on all workers, or pass base_url=",
                argument="base_url",
            )
        return session


class _Items(list[RuntimeRef]):
    """The targets of a chunk, with an event that is set once a free task finds no more of them."""

    def __init__(self, items: list[_Item]) -> None:
        super().__init__(target for _, target in items)
        self.indexes: list[int] = [index for index, _ in items]
        self.all_taken: threading.Event = threading.Event()

    def __iter__(self) -> Iterator[RuntimeRef]:
        yield from super().__iter__()
        self.all_taken.set()


# This part runs in the coordinator.


class Chunk:
    """Targets that are handed out: one worker stops them, or several in turn if some die."""

    def __init__(self, items: list[_Item]) -> None:
        self.number: int = items[0][0]
        self.targets: dict[int, RuntimeRef] = dict(items)
        # The targets without a final outcome, by index, with the last outcome of each, if any.
        self.open: dict[int, StopOutcome | None] = dict.fromkeys(self.targets)
        self.begins: int = 0
        self.tries: int = 0
        self.scope: CancelScope = CancelScope()

    def restart(self) -> Iterator[StopOutcome]:
        """Mark it unstarted if its only worker reported every target; yield rejected outcomes."""
        if self.begins == 1 and None not in self.open.values():
            self.begins = 0
            for told in filter(None, [*self.open.values()]):
                if told.result is StopResult.NOT_SENT:
                    self.open[told.index] = None
                elif told.result is StopResult.REJECTED:
                    del self.open[told.index]
                    yield told

    def add(self, outcome: StopOutcome) -> Iterator[StopOutcome]:
        """Add an outcome; yield it if no repeat of the chunk can change it."""
        index = outcome.index
        if index in self.open:
            if outcome.ok or outcome.result is StopResult.NOT_FOUND:
                del self.open[index]
                yield outcome
            elif not _may_have_effect(self.open[index]) or _may_have_effect(outcome):
                self.open[index] = outcome

    def end(self, reason: BctrlError) -> Iterator[StopOutcome]:
        """Yield the outcomes of the open targets; `reason` is why a target was not reported."""
        rest, self.open = self.open, {}
        not_sent = BctrlError(f"not sent: {reason.summary}")
        for index, outcome in rest.items():
            target = self.targets[index]
            if outcome is None and not self.begins:
                yield outcome_of(target, not_sent, index=index)
            elif outcome is None or (self.begins > 1 and not _may_have_effect(outcome)):
                # A dead worker may have sent the request.
                error = BctrlError(
                    f"no outcome came back: {reason.summary}",
                    advice="Stop it again: a stop is safe to repeat",
                    may_have_stopped=True,
                )
                annotate(error, STOP.name, *target)
                yield outcome_of(target, error, index=index)
            else:
                yield outcome


class ClusterRun(Engine):
    """A bulk stop on a cluster. Its slots are tasks, each of which hands out a chunk at a time."""

    def __init__(
        self, source: Input, options: Options, client: distributed.Client, visit: Visit, size: int
    ) -> None:
        super().__init__(source, options, visit.base_url, None)
        self._client: Any = client
        self._visit, self._run, self._chunk_size = visit, visit.run, size
        self._queue: Any = None
        self._end: Any = _dask.Variable(visit.run, client=client)
        self._slots = 0
        self._chunks: dict[int, Chunk] = {}
        self._read: list[_Item] = []
        self._undelivered: deque[StopOutcome] = deque()
        self._delivering: asyncio.Task[None] | None = None
        self._fetching = asyncio.Lock()
        self._told: CancelLevel | None = None
        # The workers that take part, by their addresses, and those that have left the run.
        self._present: set[str] = set()
        self._left: set[str] = set()
        self._is_lost = False
        # This is True once a message that a chunk has started may be lost.
        self._lacks_messages = False

    @property
    def progress(self) -> Progress:
        """The number of targets that are handed out and have no final outcome."""
        return Progress(sum(len(chunk.open) for chunk in self._chunks.values()))

    def open(self) -> None:
        """Check that the client runs in the current event loop."""
        client = self._client
        if client.status != "running" or client.loop.asyncio_loop != asyncio.get_running_loop():
            raise BctrlConfigError(
                f"the dask client ({client.status}) does not run in this event loop",
                advice="Stop runtimes within `async with Client(…, asynchronous=True) as client`",
                argument="client",
            )

    # These methods deal with the cluster as a whole.

    def _start_work(self) -> None:
        self._start(self._serve)

    async def _serve(self, worker: Worker) -> None:
        """Follow the workers, and tell them the end of the run, until the slots have ended."""
        me = asyncio.current_task()
        try:
            await self._open_on_cluster(worker)
            await self._look(worker)
            while (others := self._tasks.keys() - {me}) and not self._is_lost:
                await asyncio.wait(others, timeout=_PULSE)
                await self._look(worker)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the run raises it.
            self._end_with(error, "the cluster")
        try:
            while others := self._tasks.keys() - {me}:
                await asyncio.wait(others)
        finally:
            # A slot that is cancelled from outside leaves targets that it has read.
            await self._stop_read(worker)
        if self._queue is not None and not self._is_lost:
            with suppress(Exception):
                async with asyncio.timeout(_GRACE):
                    await self._client.unregister_worker_plugin(self._run)
            _close(self._queue)
            self._end.delete()

    async def _open_on_cluster(self, worker: Worker) -> None:
        await self._ask(worker, self._end.set, b"")
        # The await makes sure that the scheduler has the queue.
        self._queue = await self._ask(worker, partial(_dask.Queue, self._run, client=self._client))
        try:
            # A worker that hangs may only hold up its own chunks.
            with suppress(TimeoutError):
                await self._wait_for(worker, self._client.register_plugin(self._visit, self._run))
        except Exception as error:  # noqa: BLE001 - a worker may raise anything.
            self.state.end_early(_failure_of(error), CancelLevel.WAITING)
        await self._count(worker)
        if self.source.length is not None:
            # A short input is cut so that all workers get a part.
            share = ceil(self.source.length / (_SHARES * max(len(self._present), 1)))
            self._chunk_size = max(min(self._chunk_size, share), 1)

    async def _count(self, worker: Worker) -> int:
        """Ask the scheduler for its workers; return their number, including any that left."""
        workers = await self._ask(worker, self._client.nthreads) or {}
        self._present = workers.keys() - self._left
        return len(workers)

    async def _look(self, worker: Worker) -> None:
        """Tell the workers how the run ends, count them, and record the outcomes that they sent."""
        level = self.state.level
        if level is not None and (self._told is None or level > self._told):
            await self._tell(worker, level)
        if not await self._count(worker) and self._told is not None:
            self._give_up(self._chunks.values())
        while self._slots < _SLOTS * max(len(self._present), 1):
            self._slots += 1
            self._start(self._work)
        await self._fetch(worker)

    async def _tell(self, worker: Worker, level: CancelLevel) -> None:
        # At the level DELIVERY, workers would not send their outcomes, which must be recorded.
        told = min(level, CancelLevel.IN_FLIGHT)
        await self._ask(worker, self._end.set, pickle.dumps((_bare(self.state.reason), told)))
        await self._fetch(worker)
        self._told = level
        if told is CancelLevel.IN_FLIGHT:
            asyncio.get_running_loop().call_later(_GRACE, self._give_up, self._chunks.values())
        # A worker that starts one of these chunks later was told of the end, and sends nothing.
        self._give_up(chunk for chunk in self._chunks.values() if not chunk.begins)

    def _give_up(self, chunks: Iterable[Chunk]) -> None:
        """Stop waiting for these chunks."""
        for chunk in chunks:
            chunk.scope.cancel()

    def _lose(self, why: str) -> None:
        """End the run, since the workers cannot be reached any more."""
        self._is_lost = self._lacks_messages = True
        reason = BctrlError(
            f"the cluster was lost: {why}",
            advice="Stop the rest again, here or elsewhere: a stop is safe to repeat",
        )
        self.state.end_early(reason, CancelLevel.IN_FLIGHT)
        self._give_up(self._chunks.values())

    async def _ask(
        self, worker: Worker, method: Callable[..., Awaitable[_T]], *args: object
    ) -> _T | None:
        """Return an answer of the scheduler; None if the cluster is lost."""
        try:
            return None if self._is_lost else await self._wait_for(worker, method(*args))
        except Exception as error:  # noqa: BLE001 - there is no common class.
            self._lose(f"{type(error).__name__}: {error}")
        return None

    async def _wait_for(self, worker: Worker, answer: Awaitable[_T]) -> _T:
        """Wait for an answer, but only for a short time once the run ends."""
        asking = asyncio.ensure_future(answer)
        try:
            if self.state.goes_on():
                with worker.scope():
                    await asyncio.wait([asking], timeout=_PATIENCE)
            # Dask would try to connect to a lost scheduler for half a minute.
            if not (self.state.goes_on() or self._is_lost):
                await asyncio.wait([asking], timeout=_GRACE)
            if asking.done():
                return asking.result()
        finally:
            asking.cancel()
        raise TimeoutError("its scheduler did not answer in time")

    # These methods hand out chunks, each from a slot.

    async def _work(self, worker: Worker) -> None:
        """Read the input, hand it out in chunks, and await each before the next is read."""
        await super()._work(worker)
        await self._stop_read(worker)

    async def _process(self, worker: Worker, index: int, item: object) -> StopOutcome | None:
        target = self._checked(index, item)
        if isinstance(target, StopOutcome):
            return target
        self._read.append(read := (index, target))
        is_last = False
        if self.source.is_async:
            # Items that arrive together are one chunk; they do not wait for later items.
            await asyncio.sleep(0)
            is_last = self._read[-1:] == [read]
        if is_last or len(self._read) >= self._chunk_size or not self.state.goes_on():
            await self._stop_read(worker)
        return None

    async def _stop_read(self, slot: Worker) -> None:
        """Stop the targets that were read and not handed out, unless the run has ended."""
        items, self._read = self._read, []
        if items and self.state.goes_on():
            await self._stop(slot, items)
        else:
            self._record(outcome_of(target, self.state.not_begun, index=i) for i, target in items)
        await self._deliver_all(slot)

    async def _stop(self, slot: Worker, items: list[_Item]) -> None:
        """Hand out targets as a chunk, and account for each of them."""
        chunk = self._chunks[items[0][0]] = Chunk(items)
        failure: BctrlError | None = None
        is_told, is_tried_again = False, True
        try:
            while is_tried_again:
                ended = await self._result_of(chunk)
                failure = None if ended is None else _failure_of(ended)
                await self._fetch(slot)
                if chunk.tries:
                    # The message of a worker that has started the chunk may be lost.
                    chunk.begins += self._lacks_messages
                if isinstance(ended, _LeftError) and ended.address in self._left:
                    # The scheduler may have no other worker for the chunk just now.
                    await asyncio.sleep(_PULSE)
                is_tried_again = self.state.goes_on() and self._goes_elsewhere(chunk, ended)
            is_told = isinstance(ended, _LeftError | BctrlError)
            if failure is not None and self.state.goes_on() and (is_told or not chunk.begins):
                # Other chunks would fail in the same way.
                self.state.end_early(failure, CancelLevel.WAITING)
        except BaseException:
            # The slot was cancelled from outside, and a worker may have started the chunk.
            chunk.begins += 1
            raise
        finally:
            del self._chunks[chunk.number]
            if not self.state.goes_on() and (is_told or None in chunk.open.values()):
                self.state.set_ended_early(self.state.reason)
            self._record(chunk.end(failure or self.state.reason))

    def _goes_elsewhere(self, chunk: Chunk, ended: Exception | None) -> bool:
        """Return True if another worker may succeed with a chunk that ended like this."""
        match ended:
            case _LeftError(address=address, reason=reason):
                if address not in self._left:
                    _log.warning(
                        "a worker has left a bulk stop: %s",
                        reason.summary,
                        extra={"bctrl.event": "worker_left", **log_fields(reason)},
                    )
                self._left.add(address)
                self._present.discard(address)
                if self._present:
                    self._record(chunk.restart())
                return bool(self._present)
            case distributed.KilledWorker():
                return not chunk.begins and chunk.tries < _TRIES
        return False

    async def _result_of(self, chunk: Chunk) -> Exception | None:
        """Submit a chunk and await it; return its error, or None if it ended or is given up."""
        arguments = self._run, chunk.number, [(i, chunk.targets[i]) for i in chunk.open]
        options = {"workers": [*self._present], "allow_other_workers": True} if self._left else {}
        options["key"] = f"{self._run}-{chunk.number}-{chunk.tries}"
        future: Any = None
        try:
            future = self._client.submit(_stop_chunk, *arguments, **options)
            chunk.tries += 1
            with chunk.scope:
                await future
        except CancelledError as error:
            # A worker may still have the chunk, and stop its targets.
            chunk.begins += 1
            if self._client.status == "running":
                return error
            self._lose(f"the client is {self._client.status}")
        except Exception as error:  # noqa: BLE001 - a worker may raise anything.
            return error
        finally:
            if future is not None:  # pragma: no branch - the client may have closed before.
                future.release()
        return None

    # These methods record outcomes.

    async def _fetch(self, worker: Worker) -> None:
        """Record all that the workers have sent by now."""
        async with self._fetching:
            messages: Iterable[bytes] | None = None
            try:
                messages = await self._ask(worker, partial(self._queue.get, batch=True))
            finally:
                self._lacks_messages |= messages is None
            for message in messages or ():
                for number, fact in pickle.loads(message):  # noqa: S301 - dask itself unpickles.
                    if (chunk := self._chunks.get(number)) is not None:
                        self._add(chunk, fact)

    def _add(self, chunk: Chunk, fact: _Fact) -> None:
        match fact:
            case None:
                # A chunk that first starts after the workers were told of the end sends nothing.
                chunk.begins += self._told is None or chunk.begins > 0
            case StopOutcome():
                self._record(chunk.add(fact))
            case _:
                self.ledger.throttled += fact

    def _record(self, outcomes: Iterable[StopOutcome]) -> None:
        """Record outcomes, and deliver them in a separate task, so only that waits for readers."""
        recorded = [self.ledger.record(outcome) for outcome in outcomes]
        if not self._deliveries or self.state.level is CancelLevel.DELIVERY:
            return
        self._undelivered.extend(recorded)
        if self._undelivered and (self._delivering is None or self._delivering.done()):
            self._delivering = self._start(self._deliver_all)

    async def _deliver_all(self, worker: Worker) -> None:
        while self._undelivered:
            await self._deliver_from(worker, self._undelivered.popleft())


def _close(queue: Any) -> None:  # noqa: ANN401
    """Close a queue, which dask has created twice: when it was made, and when it was awaited."""
    queue.close()
    queue.close()


def _may_have_effect(outcome: StopOutcome | None) -> bool:
    return outcome is not None and outcome.result not in {StopResult.NOT_SENT, StopResult.REJECTED}


def _bare(error: BctrlError) -> BctrlError:
    """Return an error without its cause and traceback, which pickle may refuse."""
    error.__cause__ = error.__context__ = error.__traceback__ = None
    return error


def _failure_of(error: Exception) -> BctrlError:
    """Return the error of a chunk whose worker failed."""
    if isinstance(error, _LeftError):
        return error.reason
    if isinstance(error, BctrlError):
        return error.with_traceback(None)
    return BctrlError(
        f"a worker failed: {type(error).__name__}: {error}",
        advice="Read the logs of the workers, which need the same packages",
    )


def _by_name(session: object) -> bytes:
    """Pickle a function by its name, so that the workers import it."""
    if (isfunction(session) or isclass(session)) and session.__module__ != "__main__":
        with suppress(AttributeError, pickle.PicklingError):
            return pickle.dumps(session)
    expected = "a function at the top level of a module, which the workers import"
    raise _config.invalid_type("session", type(session), expected)


def stop_runtimes(
    client: distributed.Client,
    targets: Targets,
    *,
    session: Callable[..., BctrlSession] = BctrlSession,
    base_url: str | None = None,
    pace: Pace | None = None,
    chunk_size: int = 1_000,
    concurrency: int | None = None,
    deadline: float | None = None,
    on_outcome: OnOutcome | None = None,
    timeout: float | None = None,
    retry: RetryPolicy | None = None,
    journal: str | os.PathLike[str] | None = None,
    verify: bool | float = True,
    missing_ok: bool = False,
) -> StopBatch:
    """Stop any number of runtimes on a cluster, with one outcome for each.

        async with Client("tcp://scheduler:8786", asynchronous=True) as client:
            report = await stop_runtimes(client, targets, journal="night.jsonl")

    It works as `BctrlSession.stop_runtimes` does, with these differences. Targets are read in this
    process, and handed to the workers in chunks, up to ten at once for each worker. Each outcome is
    recorded in this process, once. The chunk of a worker that dies is repeated on another; a target
    that was stopped before becomes `already_stopped`. If every worker that takes a chunk dies, its
    targets without an outcome are `unknown`, as are targets that a second worker did not stop.

    The run ends early as in one process: the first 401 of any worker ends it for all. A worker that
    cannot make its session, or reaches no server, leaves its chunks to others, and a warning names
    it; if all workers leave, the run ends early. It also ends early if the scheduler is lost:
    targets that were handed out and have no outcome are then `unknown`. Without workers, it waits.

    Args:
        client: A running client of dask.distributed, made with `asynchronous=True`.
        targets: As for `BctrlSession.stop_runtimes`.
        session: A function that makes the session of each worker, called on it without arguments,
            or with `rate` if there is a `pace`. By default `BctrlSession`, which reads
            `BCTRL_API_KEY` in the environment of the worker. Its name is sent, so that the workers
            can import it: it must be defined at the top level of a module.
        base_url: The URL of the API, which all workers must have as well. None reads
            `BCTRL_BASE_URL` in this process, or uses `https://api.bctrl.ai` if that is not set.
        pace: A rate that all workers share, for their sessions.
        chunk_size: The most targets of a chunk, from 1. A worker that dies costs that many repeated
            requests; each chunk costs the scheduler about a millisecond.
        concurrency: The most stops at once of a chunk, from 1 to the `max_connections` of the
            session, which is the default. A worker starts a chunk once a stop of its previous chunk
            has ended, and no target of that chunk waits for its start.
        deadline: As for `BctrlSession.stop_runtimes`. Waiting for workers counts.
        on_outcome: As for `BctrlSession.stop_runtimes`, called in this process.
        timeout: As for `BctrlSession.stop_runtimes`.
        retry: As for `BctrlSession.stop_runtimes`.
        journal: As for `BctrlSession.stop_runtimes`; this process writes it. Targets that have
            stopped are not handed out. The same file can also be resumed in one process.
        verify: As for `BctrlSession.stop_runtimes`.
        missing_ok: As for `BctrlSession.stop_runtimes`.

    Returns:
        The bulk stop: await it for its `StopReport`, or enter it and iterate. Its `in_flight` is
        the number of targets that are handed out; `polling` and `retry_after` are 0, `retrying` is
        empty, and `is_throttled` and `is_unanswered` are False. The `elapsed` of an outcome counts
        from the time at which its worker read the target.

    Raises:
        BctrlConfigError: Here if an argument is invalid; when awaited or entered if the client does
            not run in this event loop; when awaited or iterated over if the journal cannot be used.
    """
    if not isinstance(client, distributed.Client):
        raise _config.invalid_type("client", type(client), "a dask.distributed.Client")
    server = str(_config.base_url(base_url, allow_plaintext=True))
    _config.check_type(pace, Pace | None, "pace", "a bctrl_async.pace.Pace")
    _config.count(chunk_size, "chunk_size")
    options = Options(
        concurrency=concurrency,
        deadline=deadline,
        on_outcome=on_outcome,
        timeout=timeout,
        retry=retry,
        journal=journal,
        verify=verify,
        missing_ok=missing_ok,
    )
    theirs = replace(options, on_outcome=None, journal=None)
    visit = Visit(_by_name(session), server, pace, theirs)
    return StopBatch(ClusterRun(Input(targets), options, client, visit, chunk_size))
