"""A bulk stop, its input and its output, and the ways in which it is ended."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any

import aiohttp
import anyio

from bctrl_async import BctrlSession, Observer, StopBatch, StopOutcome
from bctrl_async.cli._output import Output
from bctrl_async.cli._progress import run_with_progress
from bctrl_async.observer import BulkObserver
from sim.plan import Ending, Kind
from sim.records import REACTION, BulkRun, Moment, PlannedError, Recorded
from sim.retry_watch import RetryWatch

if TYPE_CHECKING:
    from sim.world import World


class BulkStop(BulkObserver):
    """One bulk stop and its ending."""

    def __init__(self, world: World, run: BulkRun, ending: Ending) -> None:
        self._world = world
        self._plan = world.plan
        self._loop = world.loop
        self._run = run
        self._ending = ending
        self._closing: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._scope = anyio.CancelScope()

    async def run(self) -> None:
        plan, world = self._plan, self._world
        http = aiohttp.ClientSession() if plan.borrows else None
        try:
            async with world.make_session(self._observer(), http) as session:
                self._session = session
                watch = RetryWatch(plan, self._loop, self._run, world.limiters[-1])
                world.network.on_answer = watch.on_answer
                if plan.input == "workspace":
                    stop = partial(session.stop_workspace, plan.workspace)
                else:
                    stop = partial(
                        session.stop_runtimes,
                        self._input(),
                    )
                self._batch = batch = stop(
                    concurrency=plan.concurrency,
                    deadline=plan.end_time if self._ending is Ending.DEADLINE else None,
                    on_outcome=self._callback(),
                    journal=self._run.journal,
                    verify=plan.verify_seconds if plan.verify else False,
                )
                self._task = task = asyncio.create_task(self._consume(batch))
                self._arm()
                await asyncio.wait([task])
                self._run.raised = (
                    asyncio.CancelledError() if task.cancelled() else task.exception()
                )
                self._run.report = batch.report
                del batch
                if self._ending is Ending.DROPPED:
                    self._run.report = None
                    del self._batch
                    gc.collect()
                    await asyncio.sleep(5.0)
            if self._closing is not None:
                await self._closing
        finally:
            if http is not None:
                await http.close()

    def _observer(self) -> Observer | None:
        if not self._plan.observed:
            return None
        observer = Observer()
        observer.begin_bulk = lambda: self  # type: ignore[method-assign]
        return observer

    def outcome(self, outcome: StopOutcome) -> None:
        """Record an outcome, as the observer of the bulk stop."""
        world, run = self._world, self._run
        status = world.server.status(*outcome.target)
        run.recorded.append(
            Recorded(self._loop.time(), self._loop.step, outcome, status)
        )
        world.network.log(
            0,
            f"outcome {outcome.index} {'/'.join(outcome.target)}: {outcome.result}, "
            f"{outcome.attempts} attempts, {outcome.error!r}",
        )
        if (
            self._plan.trigger == "outcome"
            and len(run.recorded) == self._plan.end_count + 1
        ):
            if self._task is None:
                # An eager task has an outcome before it is known here.
                self._loop.call_soon(self._end)
            else:
                self._end()

    # Input and output

    def _input(self) -> Any:  # noqa: ANN401 - any input that has these items.
        if self._plan.input == "list":
            return self._plan.items
        if self._plan.input != "async":
            return self._as_generator()
        return self._as_async()

    def _as_generator(self) -> Iterator[object]:
        for index, item in enumerate(self._plan.items):
            if self._ending is Ending.INPUT_RAISES and index == self._plan.end_count:
                raise PlannedError
            yield item

    async def _as_async(self) -> AsyncIterator[object]:
        plan = self._plan
        for index, item in enumerate(self._as_generator()):
            await asyncio.sleep(plan.input_delay)
            if plan.idle and index == plan.idle_at:
                await asyncio.sleep(plan.idle)
            yield item
        if plan.idle_at == len(plan.items):
            await asyncio.sleep(plan.idle)

    def _callback(self) -> Callable[[StopOutcome], object] | None:
        def plain(outcome: StopOutcome) -> None:
            run = self._run
            run.delivered.append(outcome)
            if len(run.delivered) == self._plan.end_count + 1:
                if self._ending is Ending.CALLBACK_RAISES:
                    raise PlannedError
                if not self._plan.observed and self._plan.trigger == "outcome":
                    self._end()

        async def slow(outcome: StopOutcome) -> None:
            await asyncio.sleep(self._plan.reader_delay)
            plain(outcome)

        if self._plan.callback is None:
            return None
        return plain if self._plan.callback == "plain" else slow

    async def _consume(self, batch: StopBatch) -> None:
        plan = self._plan
        if plan.kind is Kind.COMMAND:
            self._run.interrupted = await _run_command(batch, self._session)
        elif self._ending is Ending.MOVE_ON_AFTER:
            with anyio.move_on_after(plan.end_time):
                await self._read(batch)
        elif self._ending is Ending.FAIL_AFTER:
            with anyio.fail_after(plan.end_time):
                await self._read(batch)
        elif self._ending is Ending.SCOPE_CANCELLED:
            with self._scope:
                await self._read(batch)
        elif self._ending is Ending.DROPPED:
            await batch.__aenter__()
            for _ in range(plan.end_count):
                with suppress(StopAsyncIteration):
                    await anext(batch)
        else:
            await self._read(batch)

    async def _read(self, batch: StopBatch) -> None:
        plan = self._plan
        if plan.consumer == "await":
            await batch
        elif plan.consumer == "task":
            await asyncio.create_task(batch)
        else:
            count = 0
            async with batch:
                async for _ in batch:
                    await asyncio.sleep(plan.reader_delay)
                    count += 1
                    if self._ending is Ending.LEFT_EARLY and count > plan.end_count:
                        break

    # The ending

    def _arm(self) -> None:
        plan = self._plan
        if plan.trigger == "step":
            self._loop.at_step(self._loop.step + plan.end_step, self._end)
        elif plan.trigger == "time":
            # A deadline counts from when the journal is open.
            opening = self._ending is Ending.DEADLINE and plan.journal
            delay = plan.end_time + plan.thread_delay * opening
            self._loop.call_later(delay, self._end)

    def _end(self) -> None:
        task = self._task
        if task is None or task.done() or self._run.ended_at is not None:
            return
        acts: dict[Ending, Callable[[], object]] = {
            Ending.DEADLINE: lambda: None,
            Ending.MOVE_ON_AFTER: lambda: None,
            Ending.FAIL_AFTER: lambda: None,
            Ending.CANCELLED: task.cancel,
            Ending.SCOPE_CANCELLED: self._scope.cancel,
            Ending.STOP_READING: self._batch.stop_reading,
            Ending.ABORT: self._batch.abort,
            Ending.KEY_REVOKED: self._revoke_key,
            Ending.SESSION_CLOSED: self._close_session,
            Ending.CTRL_C: self._interrupt,
            Ending.CTRL_C_TWICE: self._interrupt,
        }
        act = acts.get(self._ending)
        if act is None:
            return
        if act == self._interrupt and signal.SIGINT not in self._loop.signal_handlers:
            return
        in_flight = self._batch.progress.in_flight
        self._world.network.log(0, f"{self._ending}, with {in_flight} in flight")
        self._run.ended_at = Moment(self._loop.time(), self._loop.step, 0)
        self._loop.at_step(self._loop.step + REACTION, self._count_in_flight)
        act()

    def _count_in_flight(self) -> None:
        moment = self._run.ended_at
        if moment is not None:
            self._run.ended_at = moment._replace(
                in_flight=self._batch.progress.in_flight
            )

    def _revoke_key(self) -> None:
        self._world.key = "revoked"

    def _close_session(self) -> None:
        self._closing = asyncio.ensure_future(self._session.close())

    def _interrupt(self) -> None:
        self._loop.call_soon(self._deliver_interrupt)

    def _deliver_interrupt(self) -> None:
        handler = self._loop.signal_handlers.get(signal.SIGINT)
        if handler is None:
            # The run has just ended by itself.
            self._run.ended_at = None
            return
        handler()
        if self._ending is Ending.CTRL_C_TWICE:
            self._loop.call_later(self._plan.twice_after, self._interrupt_again)

    def _interrupt_again(self) -> None:
        handler = self._loop.signal_handlers.get(signal.SIGINT)
        if handler is not None:
            self._world.network.log(0, "Ctrl-C again")
            handler()


async def _run_command(batch: StopBatch, session: BctrlSession) -> bool:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return await run_with_progress(batch, session, Output())
